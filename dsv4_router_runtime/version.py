"""The version of this package: the checkout's that it lies in, or the installed distribution's."""

from __future__ import annotations

import re
from importlib import metadata
from pathlib import Path

from .artifacts.files import MAX_JSON_BYTES, read_file

DISTRIBUTION = "dsv4-router"


def checkout_settings(folder: Path) -> str | None:
    """Return the text of `folder`'s pyproject.toml; None unless `folder` is this project's."""
    try:
        text = read_file(folder / "pyproject.toml", most_bytes=MAX_JSON_BYTES).decode()
    except (OSError, UnicodeDecodeError):
        return None
    return text if f'\nname = "{DISTRIBUTION}"\n' in text else None


def package_version() -> str:
    """Return the version; "unknown" for a copy that neither a checkout nor pip vouches for."""
    # A checkout first: the metadata of an editable install is as old as that install.
    settings = checkout_settings(Path(__file__).resolve().parents[1])
    if stated := re.search(r'^version = "([^"]+)"$', settings or "", re.M):
        return stated.group(1)
    try:
        return metadata.version(DISTRIBUTION)
    except metadata.PackageNotFoundError:
        return "unknown"
