"""Climb the ladder for each artifact, in processes, and keep the results."""

from __future__ import annotations

import errno
import traceback
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from build_kernels.workers import WorkerDiedError, run_tasks
from dsv4_router_runtime.artifacts.dispatch import runs_on
from dsv4_router_runtime.artifacts.folder import EVIDENCE_NAME, open_artifacts
from dsv4_router_runtime.artifacts.manifest import Kernel
from dsv4_router_runtime.errors import WHEEL_FOLDER

from .artifact import NO_PTX, ArtifactReadError, load_artifact
from .document import EvidenceError
from .result import FAILED, NOT_RUN, PASSED, Result, not_run
from .rungs import RUNGS, hardware
from .rungs.hardware import Record, result_of
from .rungs.rung import Reads
from .store import Evidence, read_evidence, update_evidence
from .tasks import Task, join_parts, make_tasks, results_by_kernel

# Where an installed wheel has its artifacts.
INSTALLED = ("dsv4_router_runtime", WHEEL_FOLDER)
_READ_ONLY = (errno.EROFS, errno.EACCES, errno.EPERM)


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """A rung's result for an artifact; `climbed` if it is of this run, not of stored evidence."""

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
    others: Sequence[Evidence] = (),
    jobs: int = 1,
    on_done: Callable[[Outcome], None] = lambda outcome: None,
    on_unkept: Callable[[str], None] = lambda reason: None,
) -> list[Outcome]:
    """Climb `rungs` (all if empty) for the chosen artifacts (all if empty), and store the evidence.

    records, others: GPU test records, and evidence found elsewhere, to merge first; EvidenceError
    if one is of other bytes, or of another checker. ArtifactReadError before any climb if a file is
    missing or is not the manifest's. Returns one outcome per rung and chosen artifact in the
    manifest's order; for rungs not requested, from the stored evidence. `on_done` gets each climbed
    outcome when its climb ends, `on_unkept` the reason if no evidence can be stored.
    """
    listed = open_artifacts(artifacts_dir).manifest.kernels
    chosen = choose_kernels(artifacts_dir, listed, archs, kernels)
    loaded = [load_artifact(artifacts_dir, kernel.key) for kernel in chosen]
    _refuse_strangers(records, listed)
    kept = _open_evidence(
        artifacts_dir,
        lambda known: _with_others(_with_records(known, listed, records), listed, others),
    )
    if kept.problem is not None:
        if records or others:
            what = "records" if records else "evidence"
            raise EvidenceError(f"the {what} cannot be merged: {kept.problem}")
        on_unkept(kept.problem)
    tasks = make_tasks(loaded, rungs, kept.evidence)
    calls = {
        (task, part): (artifacts_dir, first.key, _bytes_of(first), task[0], quick, part)
        for task, (first, *_) in tasks.items()
        for part in range(len(RUNGS[task[0]].climbs))
    }
    found: dict[tuple[str, str], Result] = {}
    for task, result in _joined(calls, jobs):
        for kernel, shown in results_by_kernel(tasks[task], result):
            rung = task[0]
            found[kernel.key, rung] = shown
            add = partial(Evidence.with_result, kernel=kernel, rung=rung, result=shown)
            # After each result, so that an interrupted run keeps it.
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


def _joined(
    calls: Mapping[tuple[Task, int], tuple[Any, ...]], jobs: int
) -> Iterator[tuple[Task, Result | WorkerDiedError]]:
    """Run the parts of all tasks, and yield each task when its last part has ended."""
    parts: dict[Task, list[Result | WorkerDiedError]] = {}
    with run_tasks(climb_one, calls, jobs=jobs) as climbed:
        for (task, _), part in climbed:
            parts.setdefault(task, []).append(part)
            if len(parts[task]) == len(RUNGS[task[0]].climbs):
                yield task, join_parts(task[0], parts[task])


def choose_kernels(
    folder: Path, listed: Sequence[Kernel], archs: Sequence[str], names: Sequence[str]
) -> list[Kernel]:
    """Return the listed kernels that were requested; ArtifactReadError if there are none."""
    chosen = [
        kernel
        for kernel in listed
        if (not archs or kernel.arch in archs) and (not names or kernel.name in names)
    ]
    if not chosen:
        raise ArtifactReadError(
            f"{folder} has none of the requested kernels; it has "
            f"{', '.join(kernel.key for kernel in listed) or 'none at all'}"
        )
    return chosen


def _with_records(
    evidence: Evidence, listed: Sequence[Kernel], records: Sequence[Record]
) -> Evidence:
    """Merge GPU test records and drop the evidence of bytes that are no longer listed."""
    evidence = evidence.only(listed)
    for kernel in listed:
        result = result_of(kernel, records, evidence.of(kernel).get(hardware.RUNG.name))
        if result is not None:
            evidence = evidence.with_result(kernel, hardware.RUNG.name, result)
    return evidence


def _with_others(
    evidence: Evidence, listed: Sequence[Kernel], others: Iterable[Evidence]
) -> Evidence:
    """Merge evidence found elsewhere, except that of GPUs, which comes by records alone."""
    known = {_bytes_of(kernel): kernel for kernel in listed}
    for entry in (entry for other in others for entry in other.entries.values()):
        kernel = known.get((entry.cubin_sha256, entry.ptx_sha256))
        if kernel is None:
            raise EvidenceError(
                f"the evidence of {entry.artifact} is of cubin {entry.cubin_sha256[:12]}, which is "
                "not among the artifacts: stale; climb again on these artifacts"
            )
        for rung, result in entry.rungs.items():
            if RUNGS[rung].checker is None or result == evidence.stored(kernel).get(rung):
                continue
            if not RUNGS[rung].is_present(result.checker):
                raise EvidenceError(
                    f"the evidence of {entry.artifact} {rung} is of {result.checker}, which is not "
                    f"the present checker ({RUNGS[rung].present_checker()}); climb again with it"
                )
            evidence = evidence.with_result(kernel, rung, result)
    return evidence


@dataclass
class _Evidence:
    """The evidence of one run, also on disk unless `problem` gives the reason why not."""

    path: Path
    evidence: Evidence
    problem: str | None = None

    def change(self, change: Callable[[Evidence], Evidence]) -> None:
        if self.problem is None:
            self.evidence = update_evidence(self.path, change)
        else:
            self.evidence = change(self.evidence)


def _open_evidence(folder: Path, change: Callable[[Evidence], Evidence]) -> _Evidence:
    """Read a folder's evidence and make the first change, on disk if that is writable."""
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


def _standing(evidence: Evidence, kernel: Kernel, rung: str, found: Result | None) -> Result:
    """Return the new result or the stored one; a failure that a quick pass did not clear stands."""
    stored = evidence.of(kernel).get(rung)
    if stored is not None and (found is None or stored.status == FAILED):
        return stored
    if found is not None:
        return found
    if (stale := evidence.stored(kernel).get(rung)) is not None:
        judge = stale.checker or "a checker without a name"
        present = RUNGS[rung].present_checker()
        return not_run(f"not requested, and {judge} is not the present checker ({present})")
    return not_run("not requested, and no evidence is stored for these bytes")


def is_failure(outcome: Outcome, named: Iterable[str]) -> bool:
    """Return whether this outcome makes the command fail; `named`: the rungs named in the command.

    A stored failure counts as long as the bytes are the same. "Not run" counts if the rung was
    named and applies to the artifact.
    """
    result = outcome.result
    if result.status == NOT_RUN:
        return result.applies and outcome.rung in named
    return result.status != PASSED


def _refuse_strangers(records: Iterable[Record], listed: Iterable[Kernel]) -> None:
    """Raise EvidenceError for a record of other bytes, or of a GPU that cannot load them."""
    known = {_bytes_of(kernel): kernel.arch for kernel in listed}
    for record in records:
        built_for = known.get((record.cubin_sha256, record.ptx_sha256))
        if built_for is not None and not runs_on(built_for, record.arch):
            raise EvidenceError(
                f"the record of {record.artifact} on {record.gpu} ({record.date}) is of a run "
                f"on {record.arch}, which cannot load a cubin for {built_for}"
            )
        if built_for is None:
            raise EvidenceError(
                f"the record of {record.artifact} on {record.gpu} ({record.date}) was measured on "
                f"cubin {record.cubin_sha256[:12]}, which is not among the artifacts: stale; "
                "run the gpu tests again on these artifacts"
            )


def _bytes_of(kernel: Kernel) -> tuple[str, str]:
    return kernel.cubin_sha256, kernel.ptx_sha256


def climb_one(
    folder: Path, key: str, expected: tuple[str, str], rung: str, quick: bool, part: int = 0
) -> Result:
    """Climb a part of a rung for an artifact here, unless its hashes are no longer `expected`.

    A rung that raises has failed. The traceback goes to stderr and not into the evidence, which
    holds no paths of this machine.
    """
    climbed = RUNGS[rung]
    try:
        artifact = load_artifact(folder, key)
        if _bytes_of(artifact.kernel) != expected:
            return not_run("the artifact was built anew while it was being verified")
        if climbed.reads is Reads.TEXT_AND_LAUNCH and not artifact.has_ptx:
            return not_run(NO_PTX)
        result = climbed.climbs[part](artifact, quick=quick)
    except Exception as error:
        traceback.print_exc()
        return Result(status=FAILED, reason=f"the rung broke off: {type(error).__name__}: {error}")
    return replace(result, checker=climbed.present_checker())
