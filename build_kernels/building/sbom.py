"""Write the SBOM of the runtime's wheel: CycloneDX 1.6, the same bytes for the same set.

Needs the standard library alone, as the hook that calls it: a library for CycloneDX would bring
seven packages into every environment that builds a wheel. The tests hold the document against the
official schema.
"""

from __future__ import annotations

import json
import re
import uuid
from collections.abc import Iterator, Mapping
from typing import Any

from dsv4_router_runtime.artifacts.folder import MANIFEST_NAME
from dsv4_router_runtime.artifacts.manifest import Manifest

from .compilers import NVRTC_DISTRIBUTION
from .entry import sha256
from .plan import PTXAS

SBOM_NAME = "dsv4-router.cdx.json"
# Where a wheel has the artifacts: `hook` puts them there, a reader finds the component's file.
ARTIFACTS_IN_WHEEL = "dsv4_router_runtime/_artifacts"


def sbom_text(project: Mapping[str, Any], manifest: Manifest, manifest_text: bytes) -> str:
    """Return the SBOM of a wheel of `project`, pyproject.toml's table, with a set of kernels."""
    root = _package(project["name"], project["version"]) | {
        "description": project["description"],
        "licenses": [{"license": {"id": project["license"]}}],
    }
    files = [_file(MANIFEST_NAME, sha256(manifest_text))]
    for kernel in manifest.kernels:
        properties = {"arch": kernel.arch, "source_digest": kernel.source_digest}
        files.append(_file(kernel.file, kernel.cubin_sha256) | _properties(properties))
    required = list(_required(project))
    components = sorted([*files, *required], key=lambda component: component["bom-ref"])
    refs = [component["bom-ref"] for component in components]
    document = {
        "$schema": "http://cyclonedx.org/schema/bom-1.6.schema.json",
        "bomFormat": "CycloneDX",
        "specVersion": "1.6",
        "version": 1,
        "metadata": {"lifecycles": [{"phase": "build"}], "component": root},
        "components": components,
        "dependencies": [
            {"ref": root["bom-ref"], "dependsOn": refs},
            *({"ref": ref} for ref in refs),
        ],
        # What made the cubins, and is in no wheel.
        "formulation": [{"bom-ref": "build", "components": list(_tools(manifest))}],
    }
    # A random number, as is usual, would make each build another one.
    content = sha256(json.dumps(document, sort_keys=True).encode())
    document["serialNumber"] = uuid.uuid5(uuid.NAMESPACE_OID, content).urn
    return json.dumps(document, indent=1, sort_keys=True) + "\n"


def _package(name: str, version: str | None) -> dict[str, Any]:
    purl = f"pkg:pypi/{name}" + (f"@{version}" if version else "")
    component = {"type": "library", "bom-ref": purl, "name": name, "purl": purl}
    return component | ({"version": version} if version else {})


def _file(name: str, digest: str) -> dict[str, Any]:
    place = f"{ARTIFACTS_IN_WHEEL}/{name}"
    hashes = [{"alg": "SHA-256", "content": digest}]
    return {"type": "file", "bom-ref": place, "name": place, "hashes": hashes}


def _required(project: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    """Yield the packages that an installer adds: no version, since it chooses one."""
    extras = project.get("optional-dependencies", {}).values()
    scopes = {"required": project["dependencies"], "optional": [each for e in extras for each in e]}
    for scope, requirements in scopes.items():
        for requirement in requirements:
            name = re.split(r"[^A-Za-z0-9._-]", requirement)[0].lower()
            properties = _properties({"requirement": requirement})
            yield _package(name, None) | {"scope": scope} | properties


def _tools(manifest: Manifest) -> Iterator[dict[str, Any]]:
    for name, version in sorted(manifest.toolchain.items()):
        if name == PTXAS:  # inside the others' wheels
            yield {"type": "application", "bom-ref": name, "name": name, "version": version}
        else:
            yield _package(NVRTC_DISTRIBUTION if name == "nvrtc" else name, version)


def _properties(values: Mapping[str, str]) -> dict[str, Any]:
    listed = [{"name": f"dsv4-router:{name}", "value": value} for name, value in values.items()]
    return {"properties": listed}
