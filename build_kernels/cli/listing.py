"""Find and print each kernel's state and evidence in a set of artifacts."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Sequence
from itertools import groupby
from pathlib import Path

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from build_kernels.building import compilers, plan
from build_kernels.building.entry import sha256
from build_kernels.evidence.artifact import carries_ptx
from build_kernels.evidence.rungs import RUNGS
from build_kernels.evidence.store import read_evidence, standing, validated_on
from build_kernels.specs import KERNELS, TARGETS, KernelSpec
from dsv4_router_runtime.artifacts.files import MAX_CODE_BYTES, MAX_JSON_BYTES, read_file, reason_of
from dsv4_router_runtime.artifacts.folder import EVIDENCE_NAME, MANIFEST_NAME, ArtifactSet
from dsv4_router_runtime.artifacts.manifest import Kernel, Manifest, parse_manifest
from dsv4_router_runtime.errors import ArtifactError

from .console import fits

Row = dict[str, str]

BUILT = "built"
# Other sources or tools than those here made the kernel.
OUT_OF_DATE = "out of date"
# A file of the kernel is missing or is not the one that the manifest records.
DAMAGED = "damaged"
NOT_BUILT = "not built"
# Without the compilers their versions cannot be compared.
UNKNOWN = "unknown"

_WIDE = ("kernel", "arch", "state", "N", "can load on", "validated on", *RUNGS)
_WIDE_KEYS = ("kernel", "arch", "state", "num_tokens", "loads_on", "validated_on", *RUNGS)
# Of at most 80 columns in all, with a blank between each two.
_NARROW = (
    *(("arch", 9), ("state", 9), ("structure", 9), ("lint", 8), ("protocol", 8)),
    *(("emulated", 8), ("faults", 6), ("hardware", 8), ("GPUs", 7)),
)


def list_rows(folder: Path, names: Collection[str] = (), archs: Collection[str] = ()) -> list[Row]:
    """Return a row per kernel and architecture that this package can build.

    `names` and `archs` choose among them; empty, they choose all. Needs no compiler: without one,
    states are "unknown". Raises ManifestError and EvidenceError for files that cannot be read.
    """
    manifest = _read_manifest(folder)
    evidence = read_evidence(folder / EVIDENCE_NAME)
    listed = {entry.key: entry for entry in manifest.kernels}
    state_of = _state_reader(folder, manifest)
    rows = []
    for spec in KERNELS:
        for arch in spec.targets:
            entry = listed.get(f"{spec.name}.{arch}")
            # A family's target is shown if it was built or is asked for.
            asked = arch in archs if archs else arch in spec.archs or entry is not None
            if not asked or (names and spec.name not in names):
                continue
            rungs = standing(evidence, entry) if entry else dict.fromkeys(RUNGS, "not run")
            rows.append(
                {
                    "kernel": spec.name,
                    "arch": arch,
                    "state": state_of(spec, entry) if entry else NOT_BUILT,
                    "loads_on": TARGETS[arch].loads_on,
                    "validated_on": validated_on(evidence, entry) if entry else "nowhere",
                    "num_tokens": str(spec.problem.num_tokens),
                    "num_experts": str(spec.problem.num_experts),
                    "top_k": str(spec.problem.top_k),
                    **rungs,
                }
            )
    return rows


def _read_manifest(folder: Path) -> Manifest:
    path = folder / MANIFEST_NAME
    try:
        return parse_manifest(read_file(path, most_bytes=MAX_JSON_BYTES), source=str(path))
    except FileNotFoundError as error:
        if not folder.is_dir():
            raise ArtifactError(file=str(path), problem="there is no such folder") from error
        return Manifest(toolchain={}, driver={}, kernels=())
    except OSError as error:
        problem = f"cannot be read ({reason_of(error)})"
        raise ArtifactError(file=str(path), problem=problem) from error


def _state_reader(folder: Path, manifest: Manifest) -> Callable[[KernelSpec, Kernel], str]:
    """Return a function that finds the state of a kernel that the manifest lists."""
    artifacts = ArtifactSet(folder=folder, manifest=manifest)
    has_ptx = carries_ptx(folder)
    try:
        toolchain = compilers.toolchain_versions()
    except compilers.CompileError:
        toolchain = None

    def state_of(spec: KernelSpec, entry: Kernel) -> str:
        try:
            artifacts.read(entry)
            if has_ptx:
                ptx = read_file(folder / f"{entry.key}.ptx", most_bytes=MAX_CODE_BYTES)
                if sha256(ptx) != entry.ptx_sha256:
                    return DAMAGED
        except (ArtifactError, OSError):
            return DAMAGED
        if toolchain is None:
            return UNKNOWN
        current = plan.source_digest(spec, entry.arch, toolchain) == entry.source_digest
        return BUILT if current else OUT_OF_DATE

    return state_of


def explain_states(rows: Iterable[Row], folder: Path) -> list[str]:
    """Return a line per state other than "built": the number of kernels, and its meaning."""
    try:
        compilers.toolchain_versions()
        no_toolchain = ""
    except compilers.CompileError as error:
        no_toolchain = str(error)
    manifest = _read_manifest(folder)
    tools = ", ".join(f"{name} {version}" for name, version in sorted(manifest.toolchain.items()))
    meanings = {
        OUT_OF_DATE: "the sources or tools here are not those that made it "
        f"(the manifest's tools: {tools})",
        DAMAGED: "a file is missing or not the one that the manifest records",
        NOT_BUILT: "the manifest does not list it",
        UNKNOWN: f"not compared with the sources: {no_toolchain}",
    }
    counts = {state: sum(row["state"] == state for row in rows) for state in meanings}
    return [f"{counts[state]} {state}: {meanings[state]}" for state in meanings if counts[state]]


def print_rows(console: Console, rows: Sequence[Row]) -> None:
    """Print one table, or one per kernel if the console is too narrow."""
    table = Table(*_WIDE)
    for row in rows:
        table.add_row(*(escape(row[key]) for key in _WIDE_KEYS))
    if fits(console, table):
        console.print(table)
        return
    console.print(" ".join(name.ljust(width) for name, width in _NARROW).rstrip(), markup=False)
    for (name, num_tokens), group in groupby(rows, key=lambda r: (r["kernel"], r["num_tokens"])):
        console.print(f"{name}, N {num_tokens}", markup=False)
        console.print(_narrow_table(group))
    for arch in TARGETS.values():
        if any(row["arch"] == arch.name for row in rows):
            console.print(f"{arch.name} can load on {arch.loads_on}", markup=False)


def _narrow_table(rows: Iterable[Row]) -> Table:
    """Return a table of a kernel's architectures, with the same columns for each kernel."""
    table = Table(box=None, show_header=False, padding=(0, 1, 0, 0), pad_edge=False)
    for name, width in _NARROW:
        table.add_column(name, width=width, overflow="fold")
    for row in rows:
        cells = (row["state"], *(row[rung] for rung in RUNGS), row["validated_on"])
        table.add_row(f"  {row['arch']}", *map(escape, cells))
    return table
