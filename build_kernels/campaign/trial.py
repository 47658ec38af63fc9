"""Let a fault happen to a kernel in the emulator, and judge what comes of it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from math import prod
from typing import TYPE_CHECKING, Any

from build_kernels.evidence.artifact import Artifact
from build_kernels.evidence.cases import Case
from build_kernels.evidence.inputs import Inputs, make_inputs
from build_kernels.evidence.rungs.emulated import CANARY_INT, against_reference, emulate_case

from .fault import Changes, Expected, Fault, Scenario

if TYPE_CHECKING:
    from build_kernels.emulator import Result, Schedule

TOP_K = 6
# Loads of a map that one call may make by the hundred: as many of them are torn, evenly spread.
MOST_LOADS = 16
MOST_LOADS_QUICK = 2
QUICK_CONTENTS = 2


@dataclass(frozen=True, kw_only=True)
class Trial:
    """The launches of one fault on one kernel: how many, and the problems, a line each."""

    runs: int
    problems: tuple[str, ...]


def applies(fault: Fault, artifact: Artifact) -> bool:
    """Return whether the emulator can make the fault happen to this kernel."""
    return fault.scenario is not None and artifact.kernel.role in fault.scenario.roles


def try_fault(fault: Fault, artifact: Artifact, *, quick: bool) -> Trial:
    """Run every launch of the fault's scenario; the first launch with a problem is the last.

    EmulatorError or MutantError if the scenario does not fit the kernel.
    """
    assert fault.scenario is not None
    ptx = artifact.ptx
    for edit in fault.scenario.edits:
        ptx = edit(ptx)
    artifact, runs = replace(artifact, ptx=ptx), 0
    for inputs, where, result in _launches(fault.scenario, artifact, quick=quick):
        runs += 1
        problems = judge(fault.expected, fault.scenario, inputs, result, artifact)
        if problems:
            return Trial(runs=runs, problems=tuple(f"{where}: {text}" for text in problems))
    return Trial(runs=runs, problems=())


def _launches(
    scenario: Scenario, artifact: Artifact, *, quick: bool
) -> Iterator[tuple[Inputs, str, Result]]:
    """Run the scenario's launches one by one: their inputs, a description, and the outcome."""
    kernel = artifact.kernel
    for num_experts in scenario.quick if quick else scenario.experts:
        case = Case(
            num_tokens=scenario.num_tokens,
            num_experts=num_experts,
            top_k=TOP_K,
            k=kernel.problem.k_multiple if kernel.role != "select" else 0,
            options=scenario.options,
            kind=scenario.kind,
        )
        inputs = make_inputs(kernel, case)
        if scenario.tears is not None:
            changes = scenario.tears(inputs)
            for load, result in _torn(scenario, artifact, inputs, changes, quick=quick):
                yield inputs, f"{case}, torn at load {load}", result
        schedules = _schedules(artifact)
        for number, contents in enumerate(scenario.contents[: QUICK_CONTENTS if quick else None]):
            turn = number % len(schedules)
            for schedule in schedules[turn : turn + 1] if quick else schedules:
                result = emulate_case(
                    kernel, artifact.ptx, inputs, schedule, contents={"workspace": contents}
                )
                yield inputs, f"{case}, contents {number}, {schedule}", result
        if scenario.tears is None and not scenario.contents:
            for schedule in schedules[: 1 if quick else None]:
                yield inputs, str(case), emulate_case(kernel, artifact.ptx, inputs, schedule)


def _schedules(artifact: Artifact) -> tuple[Schedule, ...]:
    """Return two schedules in which all CTAs run at once, and one with a cluster at a time."""
    from build_kernels.emulator import Schedule

    alone = prod(artifact.kernel.launch.cluster)
    return Schedule(policy="latest"), Schedule(seed=1), Schedule(seed=2, resident_ctas=alone)


def _torn(
    scenario: Scenario,
    artifact: Artifact,
    inputs: Inputs,
    changes: Mapping[str, Changes],
    *,
    quick: bool,
) -> Iterator[tuple[int, Result]]:
    """Tear the arrays at load 1, 2, ... until each was torn at its last load."""
    from build_kernels.emulator import Schedule, Tear

    load, step = 1, 1
    if not scenario.at_every_load:
        # One launch for each number of experts: among them, each number of loads before the tear.
        load = 1 + inputs.case.num_experts % (2 * scenario.num_tokens - 1)
    while True:
        tears = [Tear(array=array, load=load, changes=change) for array, change in changes.items()]
        schedule = Schedule(seed=load)
        result = emulate_case(artifact.kernel, artifact.ptx, inputs, schedule, tears=tears)
        yield load, result
        loads = max(result.loads[array] for array in changes)
        step = max(step, -(-loads // (MOST_LOADS_QUICK if quick else MOST_LOADS)))
        load += step
        if load >= loads or not scenario.at_every_load:
            return


def judge(
    expected: Expected, scenario: Scenario, inputs: Inputs, result: Result, artifact: Artifact
) -> list[str]:
    """Return the problems of one launch, a line each."""
    if result.trapped:
        return [] if expected is Expected.ENDS else [f"the launch trapped: {result.findings[-1]}"]
    problems = [str(finding) for finding in result.findings]
    wrong, _ = against_reference(inputs, result.memory, scenario.torn_rows)
    problems += wrong + _torn_rows(scenario, inputs, result.memory)
    if expected is not Expected.ENDS:
        for parameter in artifact.kernel.parameters:
            scratch = parameter.scratch
            if scratch is not None and scratch.zeroed and result.memory[parameter.name].any():
                problems.append(f"the scratch {parameter.name} is not left zero")
    return problems


def _torn_rows(scenario: Scenario, inputs: Inputs, memory: Mapping[str, Any]) -> list[str]:
    """Return the problems of the torn rows: each is written, with padding or with experts."""
    import numpy as np

    columns, experts = inputs.case.columns, inputs.case.num_experts
    problems = []
    for row in scenario.torn_rows:
        ids, weights = memory["out_ids"][row, :columns], memory["out_weights"][row, :columns]
        if (ids == CANARY_INT).any():
            problems.append(f"the torn row {row} was not written")
        elif (ids == -1).any():
            if (ids != -1).any() or weights.any():
                problems.append(f"the torn row {row} is half padding: {ids.tolist()}")
        elif "physical" not in scenario.options and not ((ids >= 0) & (ids < experts)).all():
            problems.append(f"the torn row {row} names no expert: {ids.tolist()}")
        elif not np.isfinite(weights).all():
            problems.append(f"a weight of the torn row {row} is {weights.tolist()}")
    return problems
