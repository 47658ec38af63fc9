"""Hatchling's hook: a wheel carries the manifest and the cubins, or is not made.

Runs in the wheel's build environment, where hatchling is installed and this project is not.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface


class ArtifactsHook(BuildHookInterface):
    """Checks every artifact as the loader does, then includes it beside the runtime."""

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        if version == "editable":
            return  # a checkout finds its own artifacts, and finds them as they are rebuilt
        sys.path.insert(0, self.root)
        from dsv4_router_runtime.artifacts import EVIDENCE_NAME, MANIFEST_NAME, open_artifacts

        artifacts = open_artifacts(Path(self.root) / "artifacts")
        for kernel in artifacts.manifest.kernels:
            artifacts.read(kernel)
        names = [MANIFEST_NAME, *(kernel.file for kernel in artifacts.manifest.kernels)]
        # For `build-kernels list`: what was shown about these bytes goes where they go.
        if (artifacts.folder / EVIDENCE_NAME).exists():
            names.append(EVIDENCE_NAME)
        for name in names:
            source = str(artifacts.folder / name)
            build_data["force_include"][source] = f"dsv4_router_runtime/_artifacts/{name}"
