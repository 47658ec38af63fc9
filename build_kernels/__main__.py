"""`python -m build_kernels`, and the entry of the command `build-kernels`."""

from __future__ import annotations

import sys

# What the commands themselves import; compilers are looked for when something is to be compiled.
_NEEDED = ("click", "rich", "elftools")


def main() -> None:
    """Run the command, or say which extra is missing: an installed wheel may be a server's."""
    try:
        from .cli import main as command

        command(prog_name="build-kernels")
    except ModuleNotFoundError as error:
        if error.name is None or error.name.split(".")[0] not in _NEEDED:
            raise
        sys.exit(
            f"error: build-kernels needs the package {error.name}, which comes with the extra "
            "`build`: pip install 'dsv4-router[build]'"
        )


if __name__ == "__main__":
    main()
