"""Climb the ladder for each artifact, in processes, and keep what was found.

Each (artifact, rung) is one task of a process pool: the DSL and the emulator are single-threaded,
and SentryWard is a program of its own. A rung is a module with
`climb(artifact, *, quick) -> Result`. Two of the rungs read nothing but the PTX and the launch:
where a kernel's PTX for two architectures differs in its `.target` only, and it is launched alike,
one climb serves both.
"""

from __future__ import annotations

import errno
import importlib
import re
import traceback
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

from build_kernels.workers import WorkerDiedError, run_tasks
from dsv4_router_runtime.artifacts.dispatch import runs_on
from dsv4_router_runtime.artifacts.folder import EVIDENCE_NAME, open_artifacts
from dsv4_router_runtime.artifacts.manifest import Kernel
from dsv4_router_runtime.errors import WHEEL_FOLDER

from .artifact import NO_PTX, Artifact, ArtifactReadError, load_artifact
from .checkers import present
from .rungs.hardware import Record, result_of
from .store import (
    FAILED,
    NOT_RUN,
    PASSED,
    RUNGS,
    Evidence,
    EvidenceError,
    Result,
    not_run,
    read_evidence,
    update_evidence,
)

# Longest first, so that the pool does not end on one long task.
_START_ORDER = ("protocol", "emulated", "lint", "structure", "hardware")
# Rungs whose answer is settled by the PTX's text and the launch.
_TEXT_RUNGS = ("emulated", "protocol")
# Where an installed wheel has its artifacts.
INSTALLED = ("dsv4_router_runtime", WHEEL_FOLDER)
_READ_ONLY = (errno.EROFS, errno.EACCES, errno.EPERM)
# Rung, kernel name, and what the kernels that one climb serves have in common.
_Task = tuple[str, str, str]


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """A rung's result for an artifact. `climbed`: found by this run, not read from the evidence."""

    artifact: str
    rung: str
    result: Result
    climbed: bool


def verify(
    artifacts_dir: Path,
    archs: Sequence[str] = (),
    kernels: Sequence[str] = (),
    rungs: Sequence[str] = (),
    *,
    quick: bool = False,
    records: Sequence[Record] = (),
    jobs: int = 1,
    on_done: Callable[[Outcome], None] = lambda outcome: None,
    on_unkept: Callable[[str], None] = lambda reason: None,
) -> list[Outcome]:
    """Climb `rungs` (all if empty) for the chosen artifacts (all if empty), and store the evidence.

    records: GPU test records to merge first; EvidenceError if one is of other bytes than the
    artifacts'. Before anything is climbed, ArtifactReadError for a file that is missing or is not
    the manifest's. Returns one outcome for every rung of every chosen artifact, in the manifest's
    order: rungs that were not asked for are read from the stored evidence. `on_done` is called with
    each climbed outcome as it comes, `on_unkept` with the reason if no evidence can be stored.
    """
    listed = open_artifacts(artifacts_dir).manifest.kernels
    chosen = _choose(artifacts_dir, listed, archs, kernels)
    loaded = [load_artifact(artifacts_dir, kernel.key) for kernel in chosen]
    _refuse_strangers(records, listed)
    kept = _open_evidence(artifacts_dir, lambda known: _with_records(known, listed, records))
    if kept.problem is not None:
        if records:
            raise EvidenceError(f"the records cannot be merged: {kept.problem}")
        on_unkept(kept.problem)
    tasks = _tasks(loaded, rungs, kept.evidence)
    calls = {
        task: (artifacts_dir, first.key, _bytes_of(first), task[0], quick)
        for task, (first, *_) in tasks.items()
    }
    found: dict[tuple[str, str], Result] = {}
    with run_tasks(climb_one, calls, jobs=jobs) as climbed:
        for task, result in climbed:
            for kernel, shown in _shared(tasks[task], result):
                rung = task[0]
                found[kernel.key, rung] = shown
                add = partial(Evidence.with_result, kernel=kernel, rung=rung, result=shown)
                # After each, so that an interrupted run keeps what it found.
                kept.change(add)
                on_done(Outcome(artifact=kernel.key, rung=rung, result=shown, climbed=True))
    return [
        Outcome(
            artifact=kernel.key,
            rung=rung,
            result=_standing(kept.evidence, kernel, rung, found.get((kernel.key, rung))),
            climbed=(kernel.key, rung) in found,
        )
        for kernel in chosen
        for rung in RUNGS
    ]


def _choose(
    folder: Path, listed: Sequence[Kernel], archs: Sequence[str], names: Sequence[str]
) -> list[Kernel]:
    """Give the listed kernels that were asked for; ArtifactReadError if there are none."""
    chosen = [
        kernel
        for kernel in listed
        if (not archs or kernel.arch in archs) and (not names or kernel.name in names)
    ]
    if not chosen:
        raise ArtifactReadError(
            f"{folder} has none of the kernels asked for; it has "
            f"{', '.join(kernel.key for kernel in listed) or 'none at all'}"
        )
    return chosen


def _with_records(
    evidence: Evidence, listed: Sequence[Kernel], records: Sequence[Record]
) -> Evidence:
    """Merge GPU test records, and drop the evidence of bytes that are no longer listed."""
    evidence = evidence.only(listed)
    for kernel in listed:
        result = result_of(kernel, records, evidence.of(kernel).get("hardware"))
        if result is not None:
            evidence = evidence.with_result(kernel, "hardware", result)
    return evidence


@dataclass
class _Evidence:
    """The evidence of one run, on disk as well unless `problem` says why it cannot be."""

    path: Path
    evidence: Evidence
    problem: str | None = None

    def change(self, change: Callable[[Evidence], Evidence]) -> None:
        if self.problem is None:
            self.evidence = update_evidence(self.path, change)
        else:
            self.evidence = change(self.evidence)


def _open_evidence(folder: Path, change: Callable[[Evidence], Evidence]) -> _Evidence:
    """Read a folder's evidence and make the first change, on disk if that may be written to."""
    path = folder / EVIDENCE_NAME
    if folder.resolve().parts[-2:] == INSTALLED:
        problem = "the set is part of an installed package, whose files stay as they were installed"
    else:
        try:
            return _Evidence(path=path, evidence=update_evidence(path, change))
        except OSError as error:
            if error.errno not in _READ_ONLY:
                raise
            problem = f"{folder} cannot be written to ({error.strerror})"
    return _Evidence(path=path, evidence=change(read_evidence(path)), problem=problem)


def _tasks(
    loaded: Sequence[Artifact], named: Sequence[str], evidence: Evidence
) -> dict[_Task, list[Kernel]]:
    """Group the kernels that one climb of a rung serves, the longest rungs first.

    named: the rungs that were asked for by name, all if empty. What cannot be climbed here and has
    evidence is left out, for the evidence to stand: a GPU's tests, and a rung that reads the PTX of
    a set without it, unless it was asked for by name.
    """
    tasks: dict[_Task, list[Kernel]] = {}
    for rung in _START_ORDER:
        for artifact in loaded if not named or rung in named else ():
            kernel = artifact.kernel
            reads_ptx = rung in _TEXT_RUNGS
            beyond = rung == "hardware" or (reads_ptx and not artifact.has_ptx and not named)
            if not (beyond and rung in evidence.of(kernel)):
                shares = reads_ptx and artifact.has_ptx
                same = text_and_launch(artifact) if shares else kernel.key
                tasks.setdefault((rung, kernel.name, same), []).append(kernel)
    return tasks


def _shared(
    kernels: Sequence[Kernel], found: Result | WorkerDiedError
) -> Iterator[tuple[Kernel, Result]]:
    """Give each kernel of a group the result that was found on the first of them."""
    first, *twins = kernels
    result = not_run(str(found)) if isinstance(found, WorkerDiedError) else found
    yield first, result
    note = f"climbed on the PTX for {first.arch}, which differs in its .target line alone"
    for twin in twins:
        yield twin, replace(result, assumptions=(*result.assumptions, note))


def _standing(evidence: Evidence, kernel: Kernel, rung: str, found: Result | None) -> Result:
    """What was found now, or is stored; a stored failure that a quick pass did not clear stands."""
    stored = evidence.of(kernel).get(rung)
    if found is None or (stored is not None and stored.status == FAILED):
        return _stored(evidence, kernel, rung)
    return found


def _stored(evidence: Evidence, kernel: Kernel, rung: str) -> Result:
    """What is on file and counts; "not run" with the reason where nothing does."""
    if (result := evidence.of(kernel).get(rung)) is not None:
        return result
    if (stale := evidence.stored(kernel).get(rung)) is not None:
        judge = stale.checker or "a checker without a name"
        return not_run(f"not asked for, and {judge} is not the present checker ({present(rung)})")
    return not_run("not asked for, and no evidence is stored for these bytes")


def is_failure(outcome: Outcome, asked: Iterable[str]) -> bool:
    """Does this outcome make the command fail? `asked`: the rungs named on the command line.

    A failure on record counts as long as the bytes are the same. "Not run" counts where the rung
    was asked for by name and can be climbed by such an artifact.
    """
    result = outcome.result
    if result.status == NOT_RUN:
        return result.applies and outcome.rung in asked
    return result.status != PASSED


def _refuse_strangers(records: Iterable[Record], listed: Iterable[Kernel]) -> None:
    known = {_bytes_of(kernel): kernel.arch for kernel in listed}
    for record in records:
        built_for = known.get((record.cubin_sha256, record.ptx_sha256))
        if built_for is not None and not runs_on(built_for, record.arch):
            raise EvidenceError(
                f"the record of {record.artifact} on {record.gpu} ({record.date}) says that it ran "
                f"on {record.arch}, where a cubin for {built_for} cannot load"
            )
        if built_for is None:
            raise EvidenceError(
                f"the record of {record.artifact} on {record.gpu} ({record.date}) was measured on "
                f"cubin {record.cubin_sha256[:12]}, which is not among the artifacts: stale; "
                "run the gpu tests again on these artifacts"
            )


def text_and_launch(artifact: Artifact) -> str:
    """All that the text rungs read of an artifact."""
    kernel = artifact.kernel
    return repr((without_target(artifact.ptx), kernel.launch, kernel.parameters, kernel.problem))


def without_target(ptx: str) -> str:
    """PTX with the architecture of its .target line left out."""
    return re.sub(r"^(\.target\s+)\w+", r"\1", ptx, count=1, flags=re.M)


def _bytes_of(kernel: Kernel) -> tuple[str, str]:
    return kernel.cubin_sha256, kernel.ptx_sha256


def climb_one(folder: Path, key: str, expected: tuple[str, str], rung: str, quick: bool) -> Result:
    """One rung for one artifact, in this process; nothing if its hashes are no longer `expected`.

    A rung that raises has shown nothing: a failure, with the traceback on stderr and not in the
    evidence, which holds no paths of the machine it was made on.
    """
    try:
        module = importlib.import_module(f"{__package__}.rungs.{rung}")
        artifact = load_artifact(folder, key)
        if _bytes_of(artifact.kernel) != expected:
            return not_run("the artifact was built anew while it was being verified")
        if rung in _TEXT_RUNGS and not artifact.has_ptx:
            return not_run(NO_PTX)
        result = module.climb(artifact, quick=quick)
    except Exception as error:
        traceback.print_exc()
        return Result(status=FAILED, reason=f"the rung broke off: {type(error).__name__}: {error}")
    if not isinstance(result, Result):
        raise TypeError(f"{rung}.climb returned {type(result).__name__}, expected Result")
    return replace(result, checker=present(rung))
