"""Hatchling's hook: refuse a wheel or sdist unless it has every kernel, made from its sources.

Runs in the build environment, which has hatchling and neither this project nor a compiler. The
modules that it imports need the standard library alone.
"""

from __future__ import annotations

import sys
import tempfile
import tomllib
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface

if TYPE_CHECKING:
    from dsv4_router_runtime.artifacts.folder import ArtifactSet


class ArtifactsHook(BuildHookInterface):
    """Check artifacts/ as the loader does; refuse missing kernels and those older than a source.

    A wheel then gets manifest, evidence and cubins beside the runtime, and the SBOM. An sdist has
    artifacts anyway.
    """

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        """Add the artifacts to a wheel, or abort with the reason why they cannot be shipped."""
        if version == "editable":
            return  # a checkout finds its own artifacts, and finds them as they are rebuilt
        sys.path.insert(0, self.root)
        from dsv4_router_runtime.errors import RouterError

        try:
            names = _checked_names(Path(self.root) / "artifacts")
        except (RouterError, UnfitError) as error:
            # abort, not raise: pip would show forty lines of traceback before the reason.
            self.app.abort(f"error: no {self.target_name} is made: {error}")
        if self.target_name == "wheel":
            from build_kernels.building.sbom import ARTIFACTS_IN_WHEEL

            for name in names:
                source = str(Path(self.root) / "artifacts" / name)
                build_data["force_include"][source] = f"{ARTIFACTS_IN_WHEEL}/{name}"
            # It is deleted with this object, also if no wheel comes of it.
            self.scratch = tempfile.TemporaryDirectory(prefix="dsv4-router-sbom-")
            build_data["sbom_files"].append(str(_write_sbom(Path(self.root), self.scratch.name)))


class UnfitError(Exception):
    """The artifacts are whole, but not made from these sources."""


def _checked_names(folder: Path) -> list[str]:
    """Return the names of the files that an installed runtime and its tools read."""
    from build_kernels.building.plan import packaging_problem
    from dsv4_router_runtime.artifacts.dsse import ENVELOPE_NAME
    from dsv4_router_runtime.artifacts.folder import EVIDENCE_NAME, MANIFEST_NAME, open_artifacts

    artifacts = open_artifacts(folder)
    for kernel in artifacts.manifest.kernels:
        artifacts.read(kernel)
    if problem := packaging_problem(artifacts.manifest):
        raise UnfitError(f"{folder}: {problem}; make them with `build-kernels build`")
    names = [MANIFEST_NAME, *(kernel.file for kernel in artifacts.manifest.kernels)]
    if (folder / ENVELOPE_NAME).is_file():
        _check_signed(artifacts)
    # Evidence and signatures go where their bytes go.
    beside = (EVIDENCE_NAME, ENVELOPE_NAME)
    return [*names, *(name for name in beside if (folder / name).is_file())]


def _check_signed(artifacts: ArtifactSet) -> None:
    """Refuse signatures of another set: a server that asks for some would refuse the wheel."""
    from dsv4_router_runtime.artifacts.dsse import ENVELOPE_NAME, parse_envelope
    from dsv4_router_runtime.artifacts.folder import MANIFEST_NAME, subjects
    from dsv4_router_runtime.artifacts.statement import parse_statement

    file = artifacts.folder / ENVELOPE_NAME
    payload = parse_envelope(file.read_bytes(), source=str(file)).payload
    signed = parse_statement(payload, source=f"{file}: payload").subjects
    if signed != subjects(artifacts.manifest, (artifacts.folder / MANIFEST_NAME).read_bytes()):
        raise UnfitError(
            f"{file} is signed for another set; delete it, and sign this one with "
            "`build-kernels sign`"
        )


def _write_sbom(root: Path, folder: str) -> Path:
    from build_kernels.building.sbom import SBOM_NAME, sbom_text
    from dsv4_router_runtime.artifacts.folder import MANIFEST_NAME
    from dsv4_router_runtime.artifacts.manifest import parse_manifest

    project = tomllib.loads((root / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    manifest = (root / "artifacts" / MANIFEST_NAME).read_bytes()
    path = Path(folder, SBOM_NAME)
    path.write_text(sbom_text(project, parse_manifest(manifest), manifest), encoding="utf-8")
    return path
