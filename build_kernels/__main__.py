"""Start the command `build-kernels`, as a script or by `python -m build_kernels`."""

from __future__ import annotations

import io
import os
import sys
from collections.abc import Callable
from typing import Any

from .cli.extras import REQUIREMENTS, how_to_install


def main() -> None:
    """Run the command `build-kernels`."""

    def load() -> Callable[..., Any]:
        from .cli.main import main as command

        return command

    run(load, "build-kernels")


def run(load: Callable[[], Callable[..., Any]], name: str) -> None:
    """Run the click command that `load` imports, which may import a command of its own.

    A missing package is an error that names the requirement that brings it. Output that cannot be
    written (a closed stdout, a full disk) is an error with exit status 1.
    """
    if sys.stderr is None:  # closed by the caller, so no message is read
        sys.stderr = open(os.devnull, "w")
    if sys.stdout is None:
        sys.exit(f"error: {name}: the standard output is closed")
    if isinstance(sys.stdout, io.TextIOWrapper):
        # A path need not be text, nor need the terminal have an arrow.
        sys.stdout.reconfigure(errors="backslashreplace")
    try:
        try:
            load()(prog_name=name)
        finally:
            sys.stdout.flush()
    except ModuleNotFoundError as error:
        package = (error.name or "").partition(".")[0]
        if package not in REQUIREMENTS:
            raise
        sys.exit(f"error: {name} needs the package {package}; {how_to_install(package)}")
    except OSError as error:
        # Python flushes once more at its end, and would print a second error.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(f"error: {name}: {error}")


if __name__ == "__main__":
    main()
