"""Plan a build, compile what is out of date in parallel processes, publish the result.

A kernel is up to date when the manifest's entry has the digest that its sources, spec and toolchain
have now, and the cubin and the PTX on disk have the hashes of that entry. Deciding that reads files
and package metadata; neither the DSL nor NVRTC is loaded for it.
"""

from __future__ import annotations

import hashlib
import json
import os
import sys
import traceback
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path

from dsv4_router_runtime.artifacts import EVIDENCE_NAME, MANIFEST_NAME
from dsv4_router_runtime.errors import ManifestError
from dsv4_router_runtime.manifest import (
    SCHEMA_VERSION,
    Kernel,
    Manifest,
    cubin_name,
    parse_manifest,
    serialise_manifest,
)

from . import compilers, cubin
from .entry import EntryError, make_entry, sha256
from .publish import build_folder, publish
from .specs import KERNELS, KernelSpec
from .workers import WorkerDiedError, run_tasks

# What turns a spec and its sources into bytes, and bytes into the manifest's entry.
_DECIDING_MODULES = ("compilers.py", "cubin.py", "entry.py")


class BuildError(Exception):
    """A build that did not succeed; nothing was published."""


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
class Built:
    """A compiled kernel: its manifest entry and its files."""

    entry: Kernel
    cubin: bytes
    ptx: str


@dataclass(frozen=True, kw_only=True)
class Plan:
    """`stale` is compiled; `current` was asked for and is up to date; `kept` was not asked for.

    `manifest` is the one on disk, None if it is missing or unreadable (`problem` then says why).
    """

    toolchain: dict[str, str]
    manifest: Manifest | None
    problem: str | None
    stale: tuple[Task, ...]
    current: tuple[Kernel, ...]
    kept: tuple[Kernel, ...]


@dataclass(frozen=True, kw_only=True)
class Report:
    """What a build did, as keys `name.arch` and file names."""

    built: tuple[str, ...]
    up_to_date: tuple[str, ...]
    kept: tuple[str, ...] = ()
    removed: tuple[str, ...] = field(default=())


def default_artifacts() -> Path:
    """The checkout's artifacts; BuildError where the package is installed without its checkout."""
    root = Path(__file__).resolve().parent.parent
    if not (root / "pyproject.toml").is_file():
        raise BuildError("this is not a checkout; say where to build with --artifacts FOLDER")
    return root / "artifacts"


def make_plan(artifacts: Path, names: Sequence[str], archs: Sequence[str]) -> Plan:
    """What is up to date and what is not among kernels `names` for `archs`."""
    toolchain = compilers.toolchain_versions()
    manifest, problem = _read_manifest(artifacts)
    entries = {entry.key: entry for entry in manifest.kernels} if manifest else {}
    whole = {key for key, entry in entries.items() if _files_are_whole(artifacts, entry)}
    stale: list[Task] = []
    current: list[Kernel] = []
    asked: set[str] = set()
    known: set[str] = set()
    for spec in KERNELS:
        known.update(f"{spec.name}.{arch}" for arch in spec.archs)
        for arch in (arch for arch in spec.archs if spec.name in names and arch in archs):
            task = Task(spec=spec, arch=arch, digest=source_digest(spec, arch, toolchain))
            asked.add(task.key)
            entry = entries.get(task.key)
            if entry is not None and task.key in whole and entry.source_digest == task.digest:
                current.append(entry)
            else:
                stale.append(task)
    same_tools = manifest is not None and toolchain.items() <= manifest.toolchain.items()
    kept = [
        entry
        for key, entry in entries.items()
        if same_tools and key in whole and key in known and key not in asked
    ]
    return Plan(
        toolchain=toolchain,
        manifest=manifest,
        problem=problem,
        stale=tuple(stale),
        current=tuple(current),
        kept=tuple(kept),
    )


def source_digest(spec: KernelSpec, arch: str, toolchain: dict[str, str]) -> str:
    """sha256 over all that decides the kernel's bytes and what its manifest entry says of them."""
    facts = {
        "arch": arch,
        "spec": asdict(spec),
        "tools": toolchain,
        "schema": SCHEMA_VERSION,
    }
    digest = hashlib.sha256(json.dumps(facts, sort_keys=True).encode())
    deciding = (Path(__file__).with_name(name) for name in _DECIDING_MODULES)
    for file in (*compilers.source_files(spec), *deciding):
        digest.update(f"\n{file.name} {sha256(file.read_bytes())}".encode())
    return digest.hexdigest()


@contextmanager
def _unwatched(total: int) -> Iterator[Callable[[str], None]]:
    yield lambda key: None


def run_build(
    artifacts: Path,
    plan: Plan,
    *,
    jobs: int,
    locked: bool = False,
    watch: Callable[[int], AbstractContextManager[Callable[[str], None]]] = _unwatched,
) -> Report:
    """Compile the plan's stale kernels and publish. BuildError if any fails: then nothing changed.

    `locked`: the manifest that results must be the one on disk, byte for byte. `watch` is
    entered with the number of stale kernels when the build holds the artifacts, and gives what is
    called with a kernel's key as it finishes.
    """
    if locked and plan.manifest is None:
        raise BuildError(
            f"--locked needs a manifest to compare with: {plan.problem}; "
            "restore the tracked one, or make one with `build-kernels build`"
        )
    with build_folder(artifacts) as folder:
        with watch(len(plan.stale)) as on_done:
            built = _compile_all(plan.stale, folder, jobs, on_done)
        manifest = _new_manifest(artifacts, plan, built)
        text = serialise_manifest(manifest)
        path = artifacts / MANIFEST_NAME
        if locked and path.read_text() != text:
            raise BuildError(_locked_difference(plan.manifest, manifest))
        untouched = (*plan.current, *plan.kept)
        kept = tuple(name for entry in untouched for name in _file_names(entry))
        removed: tuple[str, ...] = ()
        if built or _surplus(artifacts, kept) or path.read_text() != text:
            files = {}
            for item in built:
                cubin_file, ptx_file = _file_names(item.entry)
                files[cubin_file], files[ptx_file] = item.cubin, item.ptx.encode()
            removed = publish(artifacts, folder / "staging", files, kept, text)
    return Report(
        built=tuple(item.entry.key for item in built),
        up_to_date=tuple(entry.key for entry in plan.current),
        kept=tuple(entry.key for entry in plan.kept),
        removed=removed,
    )


def _read_manifest(artifacts: Path) -> tuple[Manifest | None, str | None]:
    """The manifest, or what is wrong with it; the caller says what to do about it."""
    path = artifacts / MANIFEST_NAME
    try:
        return parse_manifest(path.read_bytes(), source=str(path)), None
    except FileNotFoundError:
        return None, f"{path} does not exist"
    except OSError as error:
        return None, f"{path} cannot be read ({error.strerror})"
    except ManifestError as error:
        return None, f"{error.source}: {error.path}: {error.problem}"


def _file_names(entry: Kernel) -> tuple[str, str]:
    return entry.file, f"{entry.key}.ptx"


def _files_are_whole(artifacts: Path, entry: Kernel) -> bool:
    wanted = (entry.cubin_sha256, entry.ptx_sha256)
    try:
        found = [(artifacts / name).read_bytes() for name in _file_names(entry)]
    except OSError:
        return False
    return all(sha256(data) == digest for data, digest in zip(found, wanted, strict=True))


def _surplus(artifacts: Path, kept: Iterable[str]) -> bool:
    known = {MANIFEST_NAME, EVIDENCE_NAME, *kept}
    return any(name not in known and not name.startswith(".") for name in os.listdir(artifacts))


def _new_manifest(artifacts: Path, plan: Plan, built: Sequence[Built]) -> Manifest:
    untouched = (*plan.current, *plan.kept)
    # The assemblers inside the DSL and NVRTC. Read from the whole set and not only from what was
    # built now, so that the manifest does not depend on the order in which its parts were built.
    cubins = [item.cubin for item in built]
    cubins += [(artifacts / entry.file).read_bytes() for entry in untouched]
    stated = {version for data in cubins if (version := cubin.stated_ptxas(data))}
    toolchain = plan.toolchain | ({"ptxas": " ".join(sorted(stated))} if stated else {})
    return Manifest(toolchain=toolchain, kernels=(*(item.entry for item in built), *untouched))


def _locked_difference(old: Manifest | None, new: Manifest) -> str:
    """One line for each kernel and field in which two manifests differ."""
    before = {entry.key: entry for entry in old.kernels} if old else {}
    after = {entry.key: entry for entry in new.kernels}
    lines = []
    for key in sorted(before.keys() | after.keys()):
        if key not in before or key not in after:
            lines.append(f"{key}: only {'built' if key in after else 'in the manifest'}")
            continue
        for name in Kernel.__dataclass_fields__:
            was, now = getattr(before[key], name), getattr(after[key], name)
            if was != now:
                lines.append(f"{key}: {name}: {was} in the manifest, {now} built")
    if old is not None and dict(old.toolchain) != dict(new.toolchain):
        was, now = dict(old.toolchain), dict(new.toolchain)
        lines.append(f"toolchain: {was} in the manifest, {now} here")
    detail = "\n  ".join(lines or ["the same contents, written differently"])
    return (
        f"--locked: this build is not the one that {MANIFEST_NAME} records:\n  {detail}\n"
        "Nothing was published. If the change is wanted, build without --locked and commit it."
    )


def _compile_all(
    tasks: Sequence[Task], folder: Path, jobs: int, on_done: Callable[[str], None]
) -> list[Built]:
    """Every task's result, in order. All are tried; BuildError lists every failure."""
    if not tasks:
        return []
    by_key = {task.key: task for task in tasks}
    arguments = {key: (task, folder / key) for key, task in by_key.items()}
    results: dict[str, Built] = {}
    failures = []
    with run_tasks(build_one, arguments, jobs=jobs, prepare=_prepare_compiler) as outcomes:
        for key, outcome in outcomes:
            if isinstance(outcome, Built):
                results[key] = outcome
            elif isinstance(outcome, WorkerDiedError):
                failures.append(f"{key}: {outcome}; the compiler's own messages are above")
            else:
                failures.append(f"{key}: {outcome}")
            on_done(key)
    if failures:
        raise BuildError("\n".join(failures))
    return [results[task.key] for task in tasks]


def _prepare_compiler() -> None:
    """Make a worker's result independent of the caller's environment."""
    # Compilers print; results belong on stdout alone.
    sys.stdout.flush()
    os.dup2(2, 1)
    for name in [name for name in os.environ if name.startswith("CUTE_DSL_")]:
        del os.environ[name]


def build_one(task: Task, dump_folder: Path) -> Built | str:
    """Compile one kernel and read its cubin back; a string says what went wrong."""
    dump_folder.mkdir()
    try:
        compiled = compilers.compile_kernel(task.spec, task.arch, dump_folder)
        path = dump_folder / cubin_name(task.spec.name, task.arch)
        path.write_bytes(compiled.cubin)
        facts = cubin.read_cubin(compiled.cubin)
        opcodes = cubin.watched(cubin.count_opcodes(path))
        entry = make_entry(task.spec, task.arch, task.digest, compiled, facts, opcodes)
        return Built(entry=entry, cubin=compiled.cubin, ptx=compiled.ptx)
    except (EntryError, compilers.CompileError, cubin.CubinError) as error:
        return str(error)
    except Exception:
        # A DSL kernel raises whatever its author's mistake raises: its traceback is the message.
        return traceback.format_exc()
