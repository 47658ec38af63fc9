"""`python -m build_kernels.mutants`."""

from __future__ import annotations

from .command import mutants_command

if __name__ == "__main__":
    mutants_command(prog_name="python -m build_kernels.mutants")
