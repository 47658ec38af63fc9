"""Decide which kernels are up to date, which to compile, and which a build would lose.

A kernel is up to date if two things hold. Its manifest entry has the digest of the present sources,
spec and toolchain. Its cubin and PTX on disk have the entry's hashes. A plan reads files and
package metadata; it loads neither the DSL nor NVRTC.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from build_kernels.specs import KERNELS, TARGETS, KernelSpec
from dsv4_router_runtime.artifacts.folder import MANIFEST_NAME
from dsv4_router_runtime.artifacts.manifest import SCHEMA_VERSION, Kernel, Manifest, parse_manifest
from dsv4_router_runtime.errors import ManifestError

from . import compilers
from .artifact_folder import file_sha256, read_plain
from .entry import sha256

# They turn a spec and its sources into bytes, and bytes into the manifest's entry.
_DECIDING_MODULES = (
    *("building/compilers.py", "building/entry.py"),
    *("binaries/cubin.py", "binaries/nvdisasm.py"),
)
# The assemblers' version in a manifest's toolchain is read from the cubins, not from metadata.
PTXAS = "ptxas"


@dataclass(frozen=True, kw_only=True)
class Task:
    """One kernel to compile for one architecture."""

    spec: KernelSpec
    arch: str
    digest: str

    @property
    def key(self) -> str:
        return f"{self.spec.name}.{self.arch}"


@dataclass(frozen=True, kw_only=True)
class Plan:
    """Kernels to compile (`stale`), up to date (`current`) and not selected (`kept`).

    manifest: the one on disk, None if it is missing or unreadable, for the reason in `problem`.
    text: its bytes. lost: keys of kernels that a build of selected kernels would drop from the set,
    each with the reason why it cannot be kept.
    """

    toolchain: dict[str, str]
    manifest: Manifest | None
    text: bytes | None
    problem: str | None
    stale: tuple[Task, ...]
    current: tuple[Kernel, ...]
    kept: tuple[Kernel, ...]
    lost: tuple[str, ...]

    @property
    def kept_files(self) -> tuple[str, ...]:
        """Return the names of the files that stay as they are."""
        untouched = (*self.current, *self.kept)
        return tuple(name for entry in untouched for name in file_names(entry))


def make_plan(artifacts: Path, names: Sequence[str], archs: Sequence[str]) -> Plan:
    """Plan a build of the kernels `names` for `archs`."""
    toolchain = compilers.toolchain_versions()
    text, manifest, problem = read_manifest(artifacts)
    entries = {entry.key: entry for entry in manifest.kernels} if manifest else {}
    whole = {key for key, entry in entries.items() if files_are_whole(artifacts, entry)}
    stale: list[Task] = []
    current: list[Kernel] = []
    asked: set[str] = set()
    for spec in KERNELS:
        for arch in (arch for arch in spec.targets if spec.name in names and arch in archs):
            task = Task(spec=spec, arch=arch, digest=source_digest(spec, arch, toolchain))
            asked.add(task.key)
            entry = entries.get(task.key)
            if entry is not None and task.key in whole and entry.source_digest == task.digest:
                current.append(entry)
            else:
                stale.append(task)
    known = known_keys()
    lost = _why_lost(artifacts, manifest, toolchain, whole, asked)
    if text and manifest is None:
        lost["all that the manifest lists"] = f"{problem}"
    kept = known - asked - lost.keys()
    whole_set = {f"{spec.name}.{arch}" for spec in KERNELS for arch in spec.archs}
    return Plan(
        toolchain=toolchain,
        manifest=manifest,
        text=text,
        problem=problem,
        stale=tuple(stale),
        current=tuple(current),
        kept=tuple(entry for key, entry in entries.items() if key in kept),
        lost=() if asked >= whole_set else tuple(f"{key} ({lost[key]})" for key in sorted(lost)),
    )


def known_keys() -> set[str]:
    """Return the key of every kernel that this version builds."""
    return {f"{spec.name}.{arch}" for spec in KERNELS for arch in spec.targets}


def known_files() -> set[str]:
    """Return the names of the cubins and PTX that this version builds."""
    return {f"{key}.{kind}" for key in known_keys() for kind in ("cubin", "ptx")}


def _why_lost(
    artifacts: Path,
    manifest: Manifest | None,
    toolchain: dict[str, str],
    whole: set[str],
    asked: set[str],
) -> dict[str, str]:
    """Map each kernel that is there but cannot stay in the set to the reason."""
    listed = {entry.key for entry in manifest.kernels} if manifest else set()
    before = dict(manifest.toolchain) if manifest else {}
    other_tools = [
        f"{name} {before.get(name, 'none')}, here {version}"
        for name, version in toolchain.items()
        if before.get(name) != version
    ]
    lost = {}
    for key in (listed | known_keys()) - asked:
        if key not in listed:
            if any((artifacts / f"{key}.{kind}").exists() for kind in ("cubin", "ptx")):
                lost[key] = "no manifest lists it"
        elif key not in known_keys():
            lost[key] = "no spec names it any more"
        elif key not in whole:
            lost[key] = "its files are missing or altered"
        elif other_tools:
            lost[key] = "made by other tools: " + "; ".join(other_tools)
    return lost


def source_digest(spec: KernelSpec, arch: str, toolchain: dict[str, str]) -> str:
    """Return the sha256 of all inputs that decide a kernel's bytes and its manifest entry."""
    inputs = {
        "arch": arch,
        "driver": TARGETS[arch].driver,
        "spec": asdict(spec),
        "tools": toolchain,
        "schema": SCHEMA_VERSION,
    }
    digest = hashlib.sha256(json.dumps(inputs, sort_keys=True).encode())
    deciding = (Path(__file__).parents[1] / name for name in _DECIDING_MODULES)
    for file in (*compilers.source_files(spec), *deciding):
        digest.update(f"\n{file.name} {sha256(file.read_bytes())}".encode())
    return digest.hexdigest()


def packaging_problem(manifest: Manifest) -> str | None:
    """Say why a set may not be shipped with these sources; None if they made all of it.

    Needs no compiler: the digests are those of the tools that the manifest records.
    """
    tools = {name: made for name, made in manifest.toolchain.items() if name != PTXAS}
    listed = {entry.key: entry.source_digest for entry in manifest.kernels}
    wanted = {
        f"{spec.name}.{arch}": source_digest(spec, arch, tools)
        for spec in KERNELS
        for arch in spec.archs
    }
    if missing := sorted(wanted.keys() - listed.keys()):
        return f"{len(missing)} of {len(wanted)} kernels are missing ({missing[0]}, ...)"
    if surplus := sorted(listed.keys() - wanted.keys()):
        return f"no spec names {', '.join(surplus)}"
    old = sorted(key for key in wanted if wanted[key] != listed[key])
    return f"{len(old)} kernels are older than their sources ({old[0]}, ...)" if old else None


def read_manifest(artifacts: Path) -> tuple[bytes | None, Manifest | None, str | None]:
    """Return the file's bytes, the manifest, and the problem if there is no manifest."""
    path = artifacts / MANIFEST_NAME
    text = read_plain(path)
    if text is None:
        there = os.path.lexists(path)
        return None, None, f"{path} {'cannot be read as a file' if there else 'does not exist'}"
    try:
        return text, parse_manifest(text, source=str(path)), None
    except ManifestError as error:
        return text, None, f"{error.source}: {error.path}: {error.problem}"


def file_names(entry: Kernel) -> tuple[str, str]:
    """Return the names of a kernel's cubin and PTX."""
    return entry.file, f"{entry.key}.ptx"


def files_are_whole(artifacts: Path, entry: Kernel) -> bool:
    """Return whether cubin and PTX in the folder are those of the manifest's entry."""
    wanted = (entry.cubin_sha256, entry.ptx_sha256)
    return wanted == tuple(file_sha256(artifacts / name) for name in file_names(entry))
