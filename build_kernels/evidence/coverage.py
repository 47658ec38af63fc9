"""Measure what the emulated rung's cases reach of a kernel, and pick draws that reach it all."""

from __future__ import annotations

import itertools
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from build_kernels.binaries.ptx.parser import parse
from build_kernels.emulator import Schedule
from build_kernels.emulator.coverage import Coverage
from dsv4_router_runtime.artifacts.manifest import Kernel

from .artifact import Artifact, load_artifact
from .cases import Case
from .draws import draw, smallest
from .goals import goals_met, goals_of
from .inputs import Inputs, UnclearError, make_inputs
from .picked import cases_of
from .rungs.emulated import emulate_case
from .unreached import Unreached, unreached

GOAL = "goal"
LEAST_DRAWS, MOST_DRAWS = 200, 3000
# One schedule: the others change the order of the same instructions, and what waits find.
SCHEDULE = Schedule(policy="latest")


@dataclass(frozen=True, kw_only=True)
class Measured:
    """What cases reach of an artifact. counts: by kind, all outcomes seen and the places."""

    artifact: str
    cases: int
    counts: dict[str, tuple[int, int]]
    unreached: list[Unreached]

    @property
    def open(self) -> list[Unreached]:
        """Return what a case may be missing for."""
        return [each for each in self.unreached if each.is_open]


def measure(artifact: Artifact, cases: Sequence[Case]) -> Measured:
    """Emulate each case once and return what they reach together."""
    kernel, coverage = artifact.kernel, Coverage(parse(artifact.ptx))
    wanted, met = goals_of(kernel), set[str]()
    for case in cases:
        inputs = make_inputs(kernel, case)
        met |= goals_met(kernel, inputs)
        emulate_case(kernel, artifact.ptx, inputs, SCHEDULE, coverage=coverage)
    left = [
        Unreached(kind=GOAL, outcome="met", line=0, text=goal, follows=0, reason="")
        for goal in wanted
        if goal not in met
    ]
    return Measured(
        artifact=kernel.key,
        cases=len(cases),
        counts={**coverage.counts(), GOAL: (len(wanted) - len(left), len(wanted))},
        unreached=unreached(coverage) + left,
    )


def measure_one(folder: Path, key: str, quick: bool) -> Measured:
    """Measure an artifact's own cases, in a process of the pool."""
    artifact = load_artifact(folder, key)
    return measure(artifact, cases_of(artifact.kernel, quick=quick))


def pick(folder: Path, measured: Sequence[str], served: Sequence[str], patience: int) -> list[int]:
    """Return the numbers of a few draws that reach all that many reach.

    measured: the artifacts of one role whose text is covered. The drawing ends after `patience`
    draws with nothing new. served: those that share the picks; their inputs meet all goals.
    """
    artifacts = [load_artifact(folder, key) for key in measured]
    reached: dict[int, set[Any]] = {}
    cost: dict[int, float] = {}
    known = set[Any]()
    for number in itertools.count():
        if number - max(reached, default=0) > patience:
            break
        started, found = time.process_time(), set[Any]()
        for artifact in artifacts:
            found |= {(artifact.kernel.key, each) for each in _reach(artifact, number)}
        if not found <= known:
            known |= found
            reached[number], cost[number] = found, time.process_time() - started
    numbers = smallest(reached, cost)
    for key in served:
        numbers += _for_goals(load_artifact(folder, key).kernel, numbers)
    return sorted(numbers)


def _for_goals(kernel: Kernel, numbers: Sequence[int]) -> list[int]:
    """Return the numbers of a few more draws, so that a kernel's inputs meet every goal."""
    missing = set(goals_of(kernel))
    for number in numbers:
        missing -= goals_met(kernel, make_inputs(kernel, draw(kernel, number)))
    met: dict[int, set[str]] = {}
    tiles: dict[int, float] = {}
    for number in range(MOST_DRAWS):
        if number >= LEAST_DRAWS and missing <= set[str]().union(*met.values()):
            return smallest(met, tiles)
        inputs = _inputs_of(kernel, number)
        if inputs is not None and (found := goals_met(kernel, inputs) & missing):
            met[number] = found
            tiles[number] = -(-inputs.case.num_experts // kernel.launch.expert_tile)
    left = sorted(missing - set[str]().union(*met.values()))
    raise ValueError(f"{kernel.key}: no draw of {MOST_DRAWS} meets: {', '.join(left)}")


def _reach(artifact: Artifact, number: int) -> set[Any]:
    """Return the outcomes and the goals that one draw reaches."""
    kernel, coverage = artifact.kernel, Coverage(parse(artifact.ptx))
    inputs = _inputs_of(kernel, number)
    if inputs is None:
        return set()
    emulate_case(kernel, artifact.ptx, inputs, SCHEDULE, coverage=coverage)
    outcomes = {(place, each) for place, seen in coverage.seen.items() for each in seen}
    return outcomes | goals_met(kernel, inputs)


def _inputs_of(kernel: Kernel, number: int) -> Inputs | None:
    """Return the inputs of a draw, None if its keys cannot be clear of each other."""
    try:
        return make_inputs(kernel, draw(kernel, number))
    except UnclearError:
        return None
