"""Find programs and libraries in installed wheels."""

from __future__ import annotations

import importlib.metadata
from pathlib import Path

from build_kernels.errors import BuilderError


class ToolError(BuilderError):
    """A program or library is missing or cannot be run; the message names the package."""


def how_to_repair(*, damaged: bool = False) -> str:
    """Return the command that installs the builder's requirements.

    pip leaves a wheel alone if one of its files was deleted: `damaged` forces it.
    """
    return f"run `pip install {'--force-reinstall ' if damaged else ''}dsv4-router-builder`"


def wheel_file(distribution: str, name: str) -> Path:
    """Return the file `name` of an installed wheel; ToolError names the package."""
    try:
        files = importlib.metadata.files(distribution) or []
    except importlib.metadata.PackageNotFoundError:
        files = []
    for file in files:
        if file.name == name and (path := Path(str(file.locate()))).is_file():
            return path
    raise ToolError(
        f"{name} is missing: it comes with the wheel {distribution}; "
        f"{how_to_repair(damaged=bool(files))}"
    )
