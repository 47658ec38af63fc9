"""Plan a build, compile what is out of date in parallel processes, publish the result.

A kernel is up to date when the manifest's entry has the digest that its sources, spec and toolchain
have now, and the cubin and the PTX on disk have the hashes of that entry. Deciding that reads files
and package metadata; neither the DSL nor NVRTC is loaded for it.
"""

from __future__ import annotations

import ctypes
import hashlib
import json
import multiprocessing
import os
import signal
import sys
import traceback
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from contextlib import AbstractContextManager, contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path

from dsv4_router_runtime.artifacts import MANIFEST_NAME
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
from .artifact_folder import (
    Contents,
    check_contents,
    file_sha256,
    read_contents,
    read_plain,
    resolve_folder,
)
from .entry import EntryError, make_entry, sha256
from .publish import NewSet, publish
from .specs import KERNELS, KernelSpec
from .staging import WORK, build_folder, sweep

_PR_SET_PDEATHSIG = 1  # sys/prctl.h
# What turns a spec and its sources into bytes, and bytes into the manifest's entry.
_DECIDING_MODULES = ("compilers.py", "cubin.py", "entry.py")
_SHOWN_LOST = 3


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

    `manifest` is the one on disk, None if it is missing or unreadable (`problem` then says why);
    `text` is its bytes. `lost` is not empty if this is a build of some kernels and others would go
    from the set: their keys, each with the reason why it cannot be kept.
    """

    toolchain: dict[str, str]
    manifest: Manifest | None
    text: bytes | None
    problem: str | None
    stale: tuple[Task, ...]
    current: tuple[Kernel, ...]
    kept: tuple[Kernel, ...]
    lost: tuple[str, ...]


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


def open_folder(artifacts: Path) -> Path:
    """Return the folder to build in, links followed; PlaceError if a build may not touch it.

    Deletes what a killed build left there.
    """
    folder = resolve_folder(artifacts)
    sweep(folder)
    _look_at(folder)
    return folder


def make_plan(artifacts: Path, names: Sequence[str], archs: Sequence[str]) -> Plan:
    """Decide what is up to date and what is not among kernels `names` for `archs`."""
    toolchain = compilers.toolchain_versions()
    text, manifest, problem = _read_manifest(artifacts)
    entries = {entry.key: entry for entry in manifest.kernels} if manifest else {}
    whole = {key for key, entry in entries.items() if _files_are_whole(artifacts, entry)}
    stale: list[Task] = []
    current: list[Kernel] = []
    asked: set[str] = set()
    for spec in KERNELS:
        for arch in (arch for arch in spec.archs if spec.name in names and arch in archs):
            task = Task(spec=spec, arch=arch, digest=source_digest(spec, arch, toolchain))
            asked.add(task.key)
            entry = entries.get(task.key)
            if entry is not None and task.key in whole and entry.source_digest == task.digest:
                current.append(entry)
            else:
                stale.append(task)
    known = _known_keys()
    lost = _why_lost(artifacts, manifest, toolchain, whole, asked)
    if text and manifest is None:
        lost["all that the manifest lists"] = f"{problem}"
    kept = known - asked - lost.keys()
    return Plan(
        toolchain=toolchain,
        manifest=manifest,
        text=text,
        problem=problem,
        stale=tuple(stale),
        current=tuple(current),
        kept=tuple(entry for key, entry in entries.items() if key in kept),
        lost=() if asked == known else tuple(f"{key} ({lost[key]})" for key in sorted(lost)),
    )


def _known_keys() -> set[str]:
    return {f"{spec.name}.{arch}" for spec in KERNELS for arch in spec.archs}


def _known_files() -> set[str]:
    return {f"{key}.{kind}" for key in _known_keys() for kind in ("cubin", "ptx")}


def _why_lost(
    artifacts: Path,
    manifest: Manifest | None,
    toolchain: dict[str, str],
    whole: set[str],
    asked: set[str],
) -> dict[str, str]:
    """Why each kernel that is there, and not asked for, cannot stay in the set."""
    listed = {entry.key for entry in manifest.kernels} if manifest else set()
    before = dict(manifest.toolchain) if manifest else {}
    other_tools = [
        f"{name} {before.get(name, 'none')}, here {version}"
        for name, version in toolchain.items()
        if before.get(name) != version
    ]
    lost = {}
    for key in (listed | _known_keys()) - asked:
        if key not in listed:
            if any((artifacts / f"{key}.{kind}").exists() for kind in ("cubin", "ptx")):
                lost[key] = "no manifest lists it"
        elif key not in _known_keys():
            lost[key] = "no spec names it any more"
        elif key not in whole:
            lost[key] = "its files are missing or altered"
        elif other_tools:
            lost[key] = "made by other tools: " + "; ".join(other_tools)
    return lost


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
    folder = open_folder(artifacts)
    _check_plan(folder, plan, locked)
    if not plan.stale and _is_as_planned(folder, plan):
        return _report(plan)
    report = None
    try:
        with build_folder(folder) as private:
            before = _look_at(folder)
            with watch(len(plan.stale)) as on_done:
                built = _compile_all(plan.stale, private / WORK, jobs, on_done)
            report = _publish(folder, private, plan, built, before, locked)
    except KeyboardInterrupt:
        # Published: only the deletion of the build's own files was cut short. The next one does it.
        if report is None:
            raise
    return report


def _look_at(folder: Path) -> Contents:
    """Read what a folder holds; PlaceError if that is not a build's alone."""
    contents = read_contents(folder, _known_files())
    check_contents(folder, contents)
    return contents


def _check_plan(folder: Path, plan: Plan, locked: bool) -> None:
    if locked and plan.manifest is None:
        raise BuildError(
            f"--locked needs a manifest to compare with: {plan.problem}; "
            "restore the tracked one, or make one with `build-kernels build`"
        )
    if plan.lost:
        shown = ", ".join(plan.lost[:_SHOWN_LOST])
        more = len(plan.lost) - _SHOWN_LOST
        raise BuildError(
            f"a build of these kernels alone would drop others from {folder}: "
            f"{shown}{f' and {more} more' if more > 0 else ''}. Build all of them, without "
            "--kernel and --arch, or build these in a folder of their own with --artifacts FOLDER"
        )


def _is_as_planned(folder: Path, plan: Plan) -> bool:
    """Does the folder hold what the plan ends in? Then a build writes nothing, not even a lock."""
    text = serialise_manifest(_new_manifest(folder, plan, ())).encode()
    contents = _look_at(folder)
    return contents.manifest == plan.text == text and not contents.surplus(_kept_files(plan))


def _publish(
    folder: Path, private: Path, plan: Plan, built: Sequence[Built], before: Contents, locked: bool
) -> Report:
    """Publish what was built, unless the folder is another one than when the build began."""
    now = _look_at(folder)
    if now.identity != before.identity or now.manifest != plan.text:
        raise BuildError(
            f"{folder} was changed while this build ran; nothing was published: build again"
        )
    manifest = _new_manifest(folder, plan, built)
    text = serialise_manifest(manifest).encode()
    if locked and plan.text != text:
        raise BuildError(_locked_difference(plan.manifest, manifest))
    new = NewSet(files=_new_files(built) | {MANIFEST_NAME: text}, kept=_kept_files(plan))
    strays = publish(folder, private, new, now)
    if strays:
        raise BuildError(
            f"published, but {folder} got other files at that moment: see "
            f"{', '.join(map(str, strays))}. They are no part of the set: move them elsewhere"
        )
    return _report(plan, built, removed=now.surplus(new.names))


def _new_files(built: Sequence[Built]) -> dict[str, bytes]:
    files = {}
    for item in built:
        cubin_file, ptx_file = _file_names(item.entry)
        files[cubin_file], files[ptx_file] = item.cubin, item.ptx.encode()
    return files


def _kept_files(plan: Plan) -> tuple[str, ...]:
    return tuple(name for entry in (*plan.current, *plan.kept) for name in _file_names(entry))


def _report(plan: Plan, built: Sequence[Built] = (), removed: tuple[str, ...] = ()) -> Report:
    return Report(
        built=tuple(item.entry.key for item in built),
        up_to_date=tuple(entry.key for entry in plan.current),
        kept=tuple(entry.key for entry in plan.kept),
        removed=removed,
    )


def built_entries(artifacts: Path, name: str, archs: Sequence[str]) -> tuple[Kernel, ...]:
    """The manifest's entries of a kernel, their files checked; BuildError if one is not whole."""
    _, manifest, problem = _read_manifest(artifacts)
    if manifest is None:
        raise BuildError(f"{problem}; make it with `build-kernels build`")
    entries = {entry.arch: entry for entry in manifest.kernels if entry.name == name}
    for arch in archs:
        if arch not in entries or not _files_are_whole(artifacts, entries[arch]):
            raise BuildError(
                f"{name}.{arch} is not built, or its files are not those of the manifest; "
                f"make it with `build-kernels build --kernel {name} --arch {arch}`"
            )
    return tuple(entries[arch] for arch in archs)


def _read_manifest(artifacts: Path) -> tuple[bytes | None, Manifest | None, str | None]:
    """The file, the manifest, or what is wrong with it; the caller says what to do about it."""
    path = artifacts / MANIFEST_NAME
    text = read_plain(path)
    if text is None:
        there = os.path.lexists(path)
        return None, None, f"{path} {'cannot be read as a file' if there else 'does not exist'}"
    try:
        return text, parse_manifest(text, source=str(path)), None
    except ManifestError as error:
        return text, None, f"{error.source}: {error.path}: {error.problem}"


def _file_names(entry: Kernel) -> tuple[str, str]:
    return entry.file, f"{entry.key}.ptx"


def _files_are_whole(artifacts: Path, entry: Kernel) -> bool:
    wanted = (entry.cubin_sha256, entry.ptx_sha256)
    return wanted == tuple(file_sha256(artifacts / name) for name in _file_names(entry))


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
    # spawn: the DSL's state must not be shared with this process or between processes.
    pool = ProcessPoolExecutor(
        max_workers=min(jobs, len(tasks)),
        mp_context=multiprocessing.get_context("spawn"),
        initializer=_start_worker,
    )
    results: dict[str, Built] = {}
    failures = []
    try:
        futures: dict[Future, Task] = {
            pool.submit(build_one, task, folder / task.key): task for task in tasks
        }
        for future in as_completed(futures):
            task = futures[future]
            try:
                outcome: Built | str = future.result()
            except BrokenProcessPool:
                outcome = "a compiler process died; the compiler's own messages are above"
            if isinstance(outcome, Built):
                results[task.key] = outcome
            else:
                failures.append(f"{task.key}: {outcome}")
            on_done(task.key)
    except BaseException:
        for process in multiprocessing.active_children():
            process.kill()
        raise
    finally:
        pool.shutdown(wait=True, cancel_futures=True)
    if failures:
        raise BuildError("\n".join(failures))
    return [results[task.key] for task in tasks]


def _start_worker() -> None:
    """Make a worker's result independent of the caller's environment, and its end the parent's."""
    # Ctrl-C reaches the whole process group; the parent decides what it means.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    # A parent that is killed cannot stop its workers: have the kernel do it.
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
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
