"""Let a fault happen to a kernel in the emulator, and judge the outcome."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from math import prod
from typing import TYPE_CHECKING, Any

from build_kernels.evidence.artifact import Artifact
from build_kernels.evidence.cases import Case
from build_kernels.evidence.inputs import Inputs, make_inputs
from build_kernels.evidence.outputs import against_reference, id_canary, scratch_not_zero
from build_kernels.evidence.rungs.emulated import emulate_case
from dsv4_router_runtime.artifacts.kernel import Kernel

from .fault import Expected, Fault, Scenario, Torn
from .moments import Tearing, tear_at_moments

if TYPE_CHECKING:
    from build_kernels.emulator import Result, Schedule

TOP_K = 6
QUICK_CONTENTS = 2
# Of one owner and of two, where a CTA has two expert tiles; between them is no other case.
PREFILL_EXPERTS = {65: 129, 96: 65}


@dataclass(frozen=True, kw_only=True)
class Trial:
    """The launches of one fault on one kernel: how many, and the problems, a line each."""

    runs: int
    problems: tuple[str, ...]


def applies(fault: Fault, artifact: Artifact, *, quick: bool) -> bool:
    """Return whether the emulator makes the fault happen to this kernel in such a run."""
    scenario = fault.scenario
    return (
        scenario is not None
        and artifact.kernel.role in scenario.roles
        and bool(not quick or scenario.quick)
    )


def together(faults: Sequence[Fault]) -> list[list[Fault]]:
    """Group the faults that share their launches: tears of the same cases."""
    groups: dict[object, list[Fault]] = {}
    for fault in faults:
        scenario = fault.scenario
        same: object = fault.name
        if scenario is not None and scenario.tears is not None:
            same = scenario.num_tokens, scenario.options, scenario.kind
        groups.setdefault(same, []).append(fault)
    return list(groups.values())


def try_faults(faults: Sequence[Fault], artifact: Artifact, *, quick: bool) -> dict[str, Trial]:
    """Run every launch of the faults' scenarios; a problem is the end of its fault.

    Return the trials by name. EmulatorError or MutantError if a scenario does not fit the kernel.
    """
    trials: dict[str, Trial] = {}
    for group in together(faults):
        if _scenario(group[0]).tears is not None:
            trials |= _tear(group, artifact, quick=quick)
        else:
            (fault,) = group
            trials[fault.name] = _try_alone(fault, artifact, quick=quick)
    return trials


def _scenario(fault: Fault) -> Scenario:
    if fault.scenario is None:
        raise ValueError(f"{fault.name}: the emulator cannot make this fault")
    return fault.scenario


def _case(scenario: Scenario, kernel: Kernel, num_experts: int) -> Case:
    images, tokens = kernel.role != "hash", scenario.num_tokens
    return Case(
        num_tokens=tokens(kernel.launch.token_tile) if callable(tokens) else tokens,
        num_experts=num_experts,
        top_k=TOP_K,
        k=kernel.problem.k_multiple if kernel.role != "select" else 0,
        options=tuple(name for name in scenario.options if name != "images" or images),
        kind=scenario.kind,
    )


def _try_alone(fault: Fault, artifact: Artifact, *, quick: bool) -> Trial:
    """Run the launches without a tear; the first launch with a problem is the last."""
    scenario, ptx, runs = _scenario(fault), artifact.ptx, 0
    for edit in scenario.edits:
        ptx = edit(ptx)
    artifact = replace(artifact, ptx=ptx)
    for inputs, where, result in _launches(scenario, artifact, quick=quick):
        runs += 1
        problems = judge(fault.expected, (), inputs, result, artifact)
        if problems:
            return Trial(runs=runs, problems=tuple(f"{where}: {text}" for text in problems))
    return Trial(runs=runs, problems=())


def _launches(
    scenario: Scenario, artifact: Artifact, *, quick: bool
) -> Iterator[tuple[Inputs, str, Result]]:
    """Run the scenario's launches one by one: their inputs, a description, and the outcome."""
    kernel, schedules = artifact.kernel, _schedules(artifact)
    for num_experts in _experts(scenario, kernel, quick=quick):
        case = _case(scenario, kernel, num_experts)
        inputs = make_inputs(kernel, case)
        for number, contents in enumerate(scenario.contents[: QUICK_CONTENTS if quick else None]):
            turn = number % len(schedules)
            for schedule in schedules[turn : turn + 1] if quick else schedules:
                result = emulate_case(
                    kernel, artifact.ptx, inputs, schedule, contents={"workspace": contents}
                )
                yield inputs, f"{case}, contents {number}, {schedule}", result
        if not scenario.contents:
            for schedule in schedules[: 1 if quick else None]:
                yield inputs, str(case), emulate_case(kernel, artifact.ptx, inputs, schedule)


def _schedules(artifact: Artifact) -> tuple[Schedule, ...]:
    """Return two schedules in which all CTAs run at once, and one with a cluster at a time."""
    from build_kernels.emulator import Schedule

    alone = prod(artifact.kernel.launch.cluster)
    return Schedule(policy="latest"), Schedule(seed=1), Schedule(seed=2, resident_ctas=alone)


def _tear(faults: Sequence[Fault], artifact: Artifact, *, quick: bool) -> dict[str, Trial]:
    """Tear the arrays of faults that share their launches, one launch per number of experts."""
    from build_kernels.emulator import Schedule

    kernel = artifact.kernel
    trials = {fault.name: Trial(runs=0, problems=()) for fault in faults}
    moments = dict.fromkeys(trials, 0)
    for num_experts in _numbers_of_experts(faults, kernel, quick=quick):
        case = _case(_scenario(faults[0]), kernel, num_experts)
        inputs = make_inputs(kernel, case)
        made = {}
        for fault in faults:
            scenario = _scenario(fault)
            if scenario.tears is None or trials[fault.name].problems:
                continue
            wanted = _wanted(scenario, kernel, num_experts, moments[fault.name], quick=quick)
            if wanted is not None:
                made[fault.name] = Tearing(
                    torn=scenario.tears(inputs),
                    wanted=wanted,
                    judge=partial(_judge_torn, fault, inputs, artifact),
                )
        sizes = {name: tensor.itemsize for name, tensor in inputs.tensors.items()}
        run = partial(emulate_case, kernel, artifact.ptx, inputs, Schedule(seed=num_experts))
        for name, found in tear_at_moments(run, made, sizes).items():
            moments[name] = found.moments
            problems = tuple(f"{case}, {text}" for text in found.problems)
            trials[name] = Trial(runs=trials[name].runs + found.runs, problems=problems)
    return trials


def _experts(scenario: Scenario, kernel: Kernel, *, quick: bool) -> tuple[int, ...]:
    """Return the numbers of experts of a scenario's launches, but for those between."""
    experts = scenario.quick if quick else scenario.experts
    if kernel.role != "prefill":
        return experts
    return tuple(PREFILL_EXPERTS.get(number, number) for number in experts)


def _between(scenario: Scenario, kernel: Kernel, *, quick: bool) -> tuple[int, ...]:
    return () if quick or kernel.role == "prefill" else scenario.between


def _numbers_of_experts(faults: Sequence[Fault], kernel: Kernel, *, quick: bool) -> Iterable[int]:
    """Return the numbers of experts of the launches, those between last."""
    scenarios = [_scenario(fault) for fault in faults]
    return dict.fromkeys(
        number
        for numbers in (_experts, _between)
        for scenario in scenarios
        for number in numbers(scenario, kernel, quick=quick)
    )


def _wanted(
    scenario: Scenario, kernel: Kernel, num_experts: int, moments: int, *, quick: bool
) -> Callable[[int], bool] | None:
    """Return which moments of a launch, from 1, are wanted; None if the launch is not.

    moments: those of the last launch, whose number of expert tiles may differ.
    """
    between = _between(scenario, kernel, quick=quick)
    if num_experts not in (*_experts(scenario, kernel, quick=quick), *between):
        return None
    if quick and kernel.role == "prefill":
        return lambda moment: moment == 1
    if quick or not scenario.every_moment:
        # 1, 4, 16, ...
        return lambda moment: moment.bit_count() == 1 and moment.bit_length() % 2 == 1
    if num_experts in between:
        return lambda moment: moment == 1 + num_experts % max(1, moments)
    return lambda moment: True


def _judge_torn(
    fault: Fault, inputs: Inputs, artifact: Artifact, torn: Torn, result: Result
) -> list[str]:
    return judge(fault.expected, torn.rows, inputs, result, artifact)


def judge(
    expected: Expected, torn: Sequence[int], inputs: Inputs, result: Result, artifact: Artifact
) -> list[str]:
    """Return the problems of one launch, a line each. torn: the rows that may differ."""
    if result.trapped:
        return [] if expected is Expected.ENDS else [f"the launch trapped: {result.findings[-1]}"]
    problems = [str(finding) for finding in result.findings]
    wrong, _ = against_reference(inputs, result.memory, torn)
    problems += wrong + _torn_rows(torn, inputs, result.memory)
    if expected is not Expected.ENDS:
        problems += scratch_not_zero(artifact.kernel, result.memory)
    return problems


def _torn_rows(torn: Sequence[int], inputs: Inputs, memory: Mapping[str, Any]) -> list[str]:
    """Return the problems of the torn rows: each is written, with padding or with experts."""
    import numpy as np

    columns, experts = inputs.case.columns, inputs.case.num_experts
    problems = []
    for row in torn:
        ids, weights = memory["out_ids"][row, :columns], memory["out_weights"][row, :columns]
        if (ids == id_canary(ids)).any():
            problems.append(f"the torn row {row} was not written")
        elif (ids == -1).any():
            if (ids != -1).any() or weights.any():
                problems.append(f"the torn row {row} is half padding: {ids.tolist()}")
        elif "physical" not in inputs.case.options and not ((ids >= 0) & (ids < experts)).all():
            problems.append(f"the torn row {row} names no expert: {ids.tolist()}")
        elif not np.isfinite(weights).all():
            problems.append(f"a weight of the torn row {row} is {weights.tolist()}")
    return problems
