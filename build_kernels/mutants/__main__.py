"""`python -m build_kernels.mutants`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from build_kernels.__main__ import run


def _load() -> Callable[..., Any]:
    from .command import mutants_command

    return mutants_command


if __name__ == "__main__":
    run(_load, "python -m build_kernels.mutants")
