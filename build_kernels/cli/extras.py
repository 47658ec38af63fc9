"""Which of this project's extras brings a package, and how to say so. Imports nothing else."""

from __future__ import annotations

from importlib.util import find_spec

# By the package's name at import.
EXTRAS = {
    "click": "build",
    "rich": "build",
    "elftools": "build",
    "cutlass": "build",
    "numpy": "verify",
    "sentryward": "verify",
    "torch": "torch",
    "matplotlib": "bench",
}


def how_to_install(package: str) -> str:
    """Name the extra that brings `package`, and the command that installs it."""
    extra = EXTRAS[package]
    return f"it comes with the extra `{extra}`: pip install 'dsv4-router[{extra}]'"


def why_missing(package: str) -> str | None:
    """Say that `package` is not installed and how to install it; None if it is installed."""
    if _is_installed(package):
        return None
    return f"the package {package} is not installed; {how_to_install(package)}"


def _is_installed(package: str) -> bool:
    try:
        return find_spec(package) is not None
    except ValueError:  # a test has put None into sys.modules
        return False
