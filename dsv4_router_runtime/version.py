"""The version of this package: the checkout's that it lies in, or the installed distribution's."""

from __future__ import annotations

import re
from importlib import metadata
from pathlib import Path

DISTRIBUTION = "dsv4-router"


def package_version() -> str:
    """Return the version; "unknown" for a copy that neither a checkout nor pip vouches for."""
    # A checkout first: the metadata of an editable install is as old as that install.
    project = Path(__file__).resolve().parents[1] / "pyproject.toml"
    if project.is_file():
        text = project.read_text(encoding="utf-8")
        stated = re.search(r'^version = "([^"]+)"$', text, re.M)
        if stated and f'\nname = "{DISTRIBUTION}"\n' in text:
            return stated.group(1)
    try:
        return metadata.version(DISTRIBUTION)
    except metadata.PackageNotFoundError:
        return "unknown"
