"""Name the distribution, or the extra, that brings a package. Imports nothing else."""

from __future__ import annotations

from importlib.util import find_spec

BUILDER, RUNTIME = "dsv4-router-builder", "dsv4-router"
# By the package's name at import.
REQUIREMENTS = {
    "click": BUILDER,
    "rich": BUILDER,
    "elftools": BUILDER,
    "cutlass": BUILDER,
    "dsv4_router_runtime": RUNTIME,
    "numpy": f"{BUILDER}[verify]",
    "sentryward": f"{BUILDER}[verify]",
    "torch": f"{RUNTIME}[torch]",
    "matplotlib": f"{BUILDER}[bench]",
    "cryptography": f"{BUILDER}[sign]",
    "hatchling": f"{BUILDER}[release]",
}


def how_to_install(package: str) -> str:
    """Return the command that installs `package`, with the requirement that brings it."""
    return f"it comes with `pip install '{REQUIREMENTS[package]}'`"


def why_missing(package: str) -> str | None:
    """Return that `package` is not installed and how to install it; None if it is installed."""
    if _is_installed(package):
        return None
    return f"the package {package} is not installed; {how_to_install(package)}"


def _is_installed(package: str) -> bool:
    try:
        return find_spec(package) is not None
    except ValueError:  # a test has put None into sys.modules
        return False
