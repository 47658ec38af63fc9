"""Put a mutant to the cases that execute its instruction, the cheapest first."""

from __future__ import annotations

import signal
import time
import traceback
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from types import FrameType

from build_kernels.binaries.ptx.parser import parse
from build_kernels.emulator import EmulatorError
from build_kernels.emulator.coverage import Coverage
from build_kernels.evidence.artifact import Artifact, load_artifact
from build_kernels.evidence.cases import Case
from build_kernels.evidence.inputs import Inputs, make_inputs
from build_kernels.evidence.picked import cases_of
from build_kernels.evidence.result import FULL, QUICK
from build_kernels.evidence.rungs import emulated

from .mutation import Mutation

KILLED = "killed"
SURVIVED = "survived"
EQUIVALENT = "equivalent"
UNREACHED = "no case executes it"
# A mutant that does not end: CPU time beyond the kernel's own. A deadlock is found before.
_TIMES, _SECONDS = 20, 10


class _TimeUp(Exception):
    """A mutant took too long."""


@dataclass(frozen=True, kw_only=True)
class Reach:
    """The instructions that a case executes, with the steps and the CPU time of a run."""

    case: Case
    steps: int
    seconds: float
    instructions: frozenset[int]


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """What became of a mutant.

    word: killed, survived or equivalent. scope: quick if the quick cases alone decided. reason:
    the case and its first complaint, the proof, or how many runs had no complaint.
    """

    word: str
    scope: str
    reason: str


def record(folder: Path, key: str, case: Case) -> Reach:
    """Run a case under the quick schedules and note the instructions."""
    artifact = _artifact(folder, key)
    coverage = Coverage(parse(artifact.ptx))
    kernel, inputs = artifact.kernel, _inputs(folder, key, case)
    started, steps = time.process_time(), 0
    for each in emulated.QUICK_SCHEDULES:
        schedule = emulated.schedule_of(kernel, *each)
        run = emulated.emulate_case(kernel, artifact.ptx, inputs, schedule, coverage=coverage)
        steps += run.steps
    seconds = (time.process_time() - started) / len(emulated.QUICK_SCHEDULES)
    return Reach(case=case, steps=steps, seconds=seconds, instructions=coverage.instructions)


def judge(
    folder: Path, mutation: Mutation, cases: Sequence[tuple[Case, float]], scope: str
) -> Verdict:
    """Run the quick cases under the quick schedules, then all if the scope is full.

    cases: those that execute the instruction, with the kernel's own CPU time, the cheapest first.
    The first complaint ends it.
    """
    artifact = _artifact(folder, mutation.artifact)
    ptx, runs = mutation.applied(artifact.ptx), 0
    if not cases:
        return Verdict(word=SURVIVED, scope=scope, reason=UNREACHED)
    for stage, schedule, case, seconds in _runs(artifact, cases, scope):
        complaint = _complaint(
            artifact,
            ptx,
            _inputs(folder, mutation.artifact, case),
            schedule,
            _TIMES * seconds + _SECONDS,
        )
        if complaint:
            policy, seed, _ = schedule
            reason = f"{case}, schedule {policy} {seed}: {complaint}"
            return Verdict(word=KILLED, scope=stage, reason=reason)
        runs += 1
    return Verdict(word=SURVIVED, scope=scope, reason=f"no complaint in {runs} runs")


def _runs(
    artifact: Artifact, cases: Sequence[tuple[Case, float]], scope: str
) -> Iterator[tuple[str, tuple[str, int, str], Case, float]]:
    """Yield the runs: first those of a quick climb, and last the schedules that it leaves out."""
    quick = set(cases_of(artifact.kernel, quick=True))
    others = [each for each in emulated.FULL_SCHEDULES if each not in emulated.QUICK_SCHEDULES]
    stages = [
        (QUICK, emulated.QUICK_SCHEDULES, [each for each in cases if each[0] in quick]),
        (FULL, emulated.QUICK_SCHEDULES, [each for each in cases if each[0] not in quick]),
        (FULL, others, cases),
    ]
    for stage, schedules, of_stage in stages if scope == FULL else stages[:1]:
        for schedule in schedules:
            for case, seconds in of_stage:
                yield stage, schedule, case, seconds


def _complaint(
    artifact: Artifact, ptx: str, inputs: Inputs, schedule: tuple[str, int, str], limit: float
) -> str:
    """Return the first complaint of the emulated rung, empty for none.

    An exception of any kind is one: a rung that raises has failed.
    """
    kernel = artifact.kernel
    try:
        with _cpu_limit(limit):
            outcome = emulated.run(kernel, ptx, inputs, emulated.schedule_of(kernel, *schedule))
    except EmulatorError as error:
        return f"refused: {error}"
    except _TimeUp:
        return "the launch does not end"
    except Exception as error:
        place = traceback.extract_tb(error.__traceback__)[-1]
        return f"broke off in {Path(place.filename).name}: {type(error).__name__}: {error}"
    return outcome.problems[0] if outcome.problems else ""


@contextmanager
def _cpu_limit(seconds: float) -> Iterator[None]:
    """Raise _TimeUp here after so much CPU time of this process."""

    def stop(number: int, frame: FrameType | None) -> None:
        raise _TimeUp

    before = signal.signal(signal.SIGVTALRM, stop)
    signal.setitimer(signal.ITIMER_VIRTUAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_VIRTUAL, 0)
        signal.signal(signal.SIGVTALRM, before)


@lru_cache(maxsize=4)
def _artifact(folder: Path, key: str) -> Artifact:
    return load_artifact(folder, key)


@lru_cache(maxsize=32)
def _inputs(folder: Path, key: str, case: Case) -> Inputs:
    return make_inputs(_artifact(folder, key).kernel, case)
