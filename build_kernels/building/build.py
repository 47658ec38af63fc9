"""Compile a plan's stale kernels in parallel processes, then publish the set."""

from __future__ import annotations

import os
import sys
import traceback
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, chdir, contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from build_kernels.binaries.cubin import Cubin, CubinError, read_cubin, stated_ptxas
from build_kernels.binaries.nvdisasm import sass_opcodes_of, watched
from build_kernels.binaries.wheels import ToolError
from build_kernels.errors import BuilderError
from build_kernels.specs import TARGETS
from build_kernels.workers import WorkerDiedError, run_tasks
from dsv4_router_runtime.artifacts.dsse import ENVELOPE_NAME
from dsv4_router_runtime.artifacts.folder import MANIFEST_NAME
from dsv4_router_runtime.artifacts.manifest import Kernel, Manifest, cubin_name, serialise_manifest

from . import compilers
from .artifact_folder import (
    Contents,
    check_contents,
    check_replaced,
    read_contents,
    resolve_folder,
)
from .compilers import Compiled
from .entry import EntryError, make_entry
from .plan import PTXAS, Plan, Task, file_names, known_files
from .publish import NewSet, publish
from .staging import WORK, build_folder, sweep

_SHOWN_LOST = 3
# More than a compiler writes for one kernel: the cubin, the PTX and a copy of the cubin are 0.3 MB.
_PROBE_BYTES = 2**20


class BuildError(BuilderError):
    """A build failed; nothing was published unless the message has it."""


@dataclass(frozen=True, kw_only=True)
class Made:
    """What the compiler made of a kernel, and what its cubin says."""

    compiled: Compiled
    cubin: Cubin


@dataclass(frozen=True, kw_only=True)
class Built:
    """A compiled kernel: its manifest entry and its files."""

    entry: Kernel
    cubin: bytes
    ptx: str


@dataclass(frozen=True, kw_only=True)
class Report:
    """Results of a build: keys `name.arch`, and the names of removed files."""

    built: tuple[str, ...]
    up_to_date: tuple[str, ...]
    kept: tuple[str, ...] = ()
    removed: tuple[str, ...] = field(default=())


def default_artifacts() -> Path:
    """Return the checkout's artifacts folder; BuildError if there is no checkout."""
    root = Path(__file__).resolve().parents[2]
    if not (root / "pyproject.toml").is_file():
        raise BuildError("this is not a checkout; say where to build with --artifacts FOLDER")
    return root / "artifacts"


def open_folder(artifacts: Path) -> Path:
    """Return the folder to build in, links followed; PlaceError if a build may not touch it.

    Deletes the files that a killed build left there.
    """
    folder = resolve_folder(artifacts)
    sweep(folder)
    _look_at(folder)
    return folder


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
    """Compile the plan's stale kernels and publish. BuildError if one fails: then nothing changed.

    If `locked`, the new manifest must equal the one on disk, byte for byte. `watch` is called with
    the number of stale kernels once the build holds the artifacts. Its context yields a function,
    which is called with each kernel's key when that kernel is compiled.
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
        # Published: only the clean-up of private files was cut short. The next build does it.
        if report is None:
            raise
    return report


def _look_at(folder: Path) -> Contents:
    """Read a folder's contents; PlaceError if a build did not make all of them."""
    contents = read_contents(folder, known_files())
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
    """Return whether the folder is the plan's result; a build then writes nothing, nor a lock."""
    text = serialise_manifest(_new_manifest(folder, plan, ())).encode()
    contents = _look_at(folder)
    wanted = {*plan.kept_files, ENVELOPE_NAME}
    return contents.manifest == plan.text == text and not contents.surplus(wanted)


def _publish(
    folder: Path, private: Path, plan: Plan, built: Sequence[Built], before: Contents, locked: bool
) -> Report:
    """Publish the built kernels, unless the folder changed since the build began."""
    now = _look_at(folder)
    if now.identity != before.identity or now.manifest != plan.text:
        raise BuildError(
            f"{folder} was changed while this build ran; nothing was published: build again"
        )
    manifest = _new_manifest(folder, plan, built)
    text = serialise_manifest(manifest).encode()
    if locked and plan.text != text:
        raise BuildError(_locked_difference(plan.manifest, manifest))
    # Signatures of this very manifest stay.
    signed = {ENVELOPE_NAME} & now.made if plan.text == text else set()
    new = NewSet(files=_new_files(built) | {MANIFEST_NAME: text}, kept={*plan.kept_files, *signed})
    check_replaced(folder, now, new.files)
    strays = publish(folder, private, new, now)
    if strays:
        raise BuildError(
            f"published, but other files came into {folder} at that moment: see "
            f"{', '.join(map(str, strays))}. They are no part of the set: move them elsewhere"
        )
    return _report(plan, built, removed=now.surplus(new.names))


def _new_files(built: Sequence[Built]) -> dict[str, bytes]:
    files = {}
    for item in built:
        cubin_file, ptx_file = file_names(item.entry)
        files[cubin_file], files[ptx_file] = item.cubin, item.ptx.encode()
    return files


def _report(plan: Plan, built: Sequence[Built] = (), removed: tuple[str, ...] = ()) -> Report:
    return Report(
        built=tuple(item.entry.key for item in built),
        up_to_date=tuple(entry.key for entry in plan.current),
        kept=tuple(entry.key for entry in plan.kept),
        removed=removed,
    )


def _new_manifest(artifacts: Path, plan: Plan, built: Sequence[Built]) -> Manifest:
    untouched = (*plan.current, *plan.kept)
    # The assemblers inside the DSL and NVRTC. Read from the whole set and not only from the kernels
    # built now, so that the manifest does not depend on the order in which its parts were built.
    cubins = [item.cubin for item in built]
    cubins += [(artifacts / entry.file).read_bytes() for entry in untouched]
    stated = {version for data in cubins if (version := stated_ptxas(data))}
    toolchain = plan.toolchain | ({PTXAS: " ".join(sorted(stated))} if stated else {})
    kernels = (*(item.entry for item in built), *untouched)
    driver = {kernel.arch: TARGETS[kernel.arch].driver for kernel in kernels}
    return Manifest(toolchain=toolchain, driver=driver, kernels=kernels)


def _locked_difference(old: Manifest | None, new: Manifest) -> str:
    """Return the error that lists each kernel and field in which two manifests differ."""
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
    """Return each task's result, in order. All are tried; BuildError lists every failure."""
    if not tasks:
        return []
    arguments = {task.key: (task, folder / task.key) for task in tasks}
    made: dict[str, Made] = {}
    failures = []
    with run_tasks(compile_one, arguments, jobs=jobs, prepare=_prepare_compiler) as outcomes:
        for key, outcome in outcomes:
            if isinstance(outcome, Made):
                made[key] = outcome
            elif isinstance(outcome, WorkerDiedError):
                failures.append(f"{key}: {outcome}; the compiler's own messages are above")
            else:
                failures.append(f"{key}: {outcome}")
            on_done(key)
    results = make_entries([task for task in tasks if task.key in made], made)
    failures += [f"{key}: {why}" for key, why in results.items() if isinstance(why, str)]
    if failures:
        raise BuildError("\n".join(failures))
    return [built for task in tasks if isinstance(built := results[task.key], Built)]


def _prepare_compiler() -> None:
    """Make a worker's result independent of the caller's environment."""
    # Compilers print; results belong on stdout alone.
    sys.stdout.flush()
    os.dup2(2, 1)
    for name in [name for name in os.environ if name.startswith("CUTE_DSL_")]:
        del os.environ[name]


def compile_one(task: Task, dump_folder: Path) -> Made | str:
    """Compile one kernel and read its cubin back; return the error as a string if that fails."""
    dump_folder.mkdir()
    try:
        # The DSL puts the folder into lines of options, of which a blank or a quote makes others.
        with chdir(dump_folder):
            compiled = compilers.compile_kernel(task.spec, task.arch, Path("."))
        # So that a full disk is said of a kernel of NVRTC's too, which writes no file.
        (dump_folder / cubin_name(task.spec.name, task.arch)).write_bytes(compiled.cubin)
        return Made(compiled=compiled, cubin=read_cubin(compiled.cubin))
    except (compilers.CompileError, CubinError) as error:
        return f"{_why_no_file(dump_folder)}{error}"
    except Exception as error:
        if why := _why_no_file(dump_folder):
            return f"{why}{error}"
        # A mistake in a DSL kernel may raise anything: its traceback is the message.
        return traceback.format_exc()


def make_entries(tasks: Sequence[Task], made: Mapping[str, Made]) -> dict[str, Built | str]:
    """Make the entries of compiled kernels, by the task's key; an error is returned as a string."""
    by_arch: dict[str, list[Task]] = {}
    for task in tasks:
        by_arch.setdefault(task.arch, []).append(task)
    results: dict[str, Built | str] = {}
    with ThreadPoolExecutor() as threads:
        codes = ([made[task.key].cubin.code for task in same] for same in by_arch.values())
        for same, counts in zip(by_arch.values(), threads.map(_count, codes, by_arch), strict=True):
            for at, task in enumerate(same):
                results[task.key] = (
                    counts if isinstance(counts, str) else _built(task, made[task.key], counts[at])
                )
    return results


def _count(codes: Sequence[bytes], arch: str) -> list[Counter[str]] | str:
    try:
        return sass_opcodes_of(codes, arch)
    except (CubinError, ToolError) as error:
        return str(error)


def _built(task: Task, made: Made, counts: Counter[str]) -> Built | str:
    compiled = made.compiled
    try:
        entry = make_entry(task.spec, task.arch, task.digest, compiled, made.cubin, watched(counts))
    except EntryError as error:
        return str(error)
    return Built(entry=entry, cubin=compiled.cubin, ptx=compiled.ptx)


def _why_no_file(folder: Path) -> str:
    """Return the reason why no file can be written, or "": the DSL does not check its writes."""
    probe = folder / "probe"
    try:
        with probe.open("wb") as file:
            file.write(bytes(_PROBE_BYTES))
            os.fsync(file.fileno())
    except OSError as error:
        return f"no file can be written in {folder} ({error.strerror}): "
    finally:
        probe.unlink(missing_ok=True)
    return ""
