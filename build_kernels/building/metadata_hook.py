"""Hatchling's hook: give the builder the version of the runtime, and require that very version."""

from __future__ import annotations

import tomllib
from pathlib import Path
from typing import Any

from hatchling.metadata.plugin.interface import MetadataHookInterface


class RuntimeVersion(MetadataHookInterface):
    """The builder imports private modules of the runtime: only those of one checkout fit."""

    def update(self, metadata: dict[str, Any]) -> None:
        """Add the version, and the requirements that this hook's table lists."""
        text = (Path(self.root).parent / "pyproject.toml").read_text(encoding="utf-8")
        project = tomllib.loads(text)["project"]
        metadata["version"] = project["version"]
        runtime = f"{project['name']}=={project['version']}"
        metadata["dependencies"] = [runtime, *self.config["dependencies"]]
