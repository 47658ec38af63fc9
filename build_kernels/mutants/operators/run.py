"""Judge the mutants of several kernels in processes, and count the verdicts."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from build_kernels.evidence.artifact import Artifact
from build_kernels.evidence.cases import Case
from build_kernels.evidence.picked import cases_of
from build_kernels.evidence.result import QUICK
from build_kernels.workers import WorkerDiedError, run_tasks
from dsv4_router_runtime.artifacts.manifest import Kernel

from .edits import OPERATORS
from .equivalents import why_equivalent
from .judge import EQUIVALENT, KILLED, SURVIVED, Reach, Verdict, judge, record
from .mutation import Mutation
from .results import Results


@dataclass(frozen=True, kw_only=True)
class KernelMutants:
    """The mutants of one kernel.

    counts: of all its mutants, by operator. chosen: those to judge. verdicts: of these, by place;
    those of an interrupted run may be fewer.
    """

    artifact: Artifact
    counts: Mapping[str, int]
    chosen: Sequence[Mutation]
    verdicts: dict[str, Verdict] = field(default_factory=dict)


def one_per_role(kernels: Sequence[Kernel], seed: int) -> list[Kernel]:
    """Return a kernel of each role at random, in the order of the manifest."""
    by_role: dict[str, list[Kernel]] = {}
    for kernel in kernels:
        by_role.setdefault(kernel.role, []).append(kernel)
    draw = random.Random(seed)
    return [draw.choice(of_role) for of_role in by_role.values()]


def settle(
    kernels: Sequence[KernelMutants], results: Results, scope: str
) -> dict[str, list[Mutation]]:
    """Give the mutants their verdict that have a reason or a stored one; return the others."""
    waiting: dict[str, list[Mutation]] = {}
    for each in kernels:
        for mutation in each.chosen:
            reason = why_equivalent(mutation)
            known = results.of(each.artifact.ptx_sha256, mutation, scope)
            if reason is not None:
                known = Verdict(word=EQUIVALENT, scope=scope, reason=reason)
            if known is not None:
                each.verdicts[mutation.place] = known
            else:
                waiting.setdefault(mutation.artifact, []).append(mutation)
    return waiting


def judge_waiting(
    folder: Path,
    kernels: Sequence[KernelMutants],
    waiting: Mapping[str, Sequence[Mutation]],
    results: Results,
    *,
    scope: str,
    jobs: int,
    on_verdict: Callable[[Mutation, Verdict], None],
) -> None:
    """Judge mutants in processes, and keep each verdict when it is found."""
    by_key = {each.artifact.kernel.key: each for each in kernels}
    asked = [by_key[key].artifact.kernel for key in waiting]
    reaches = _record(folder, asked, scope=scope, jobs=jobs)
    calls = {
        (key, mutation.place): (folder, mutation, _cases(reaches[key], mutation), scope)
        for key, mutations in waiting.items()
        for mutation in mutations
    }
    with run_tasks(judge, calls, jobs=jobs) as found:
        for (key, place), verdict in found:
            each, mutation = by_key[key], calls[key, place][1]
            if isinstance(verdict, WorkerDiedError):
                verdict = Verdict(word=SURVIVED, scope=scope, reason=f"not judged: {verdict}")
            else:
                results.add(each.artifact.ptx_sha256, mutation, verdict)
            each.verdicts[place] = verdict
            on_verdict(mutation, verdict)


def _record(
    folder: Path, kernels: Sequence[Kernel], *, scope: str, jobs: int
) -> dict[str, list[Reach]]:
    """Return what each case of each kernel executes, the cheapest case first."""
    calls = {
        (kernel.key, case): (folder, kernel.key, case)
        for kernel in kernels
        for case in cases_of(kernel, quick=scope == QUICK)
    }
    found: dict[str, list[Reach]] = {kernel.key: [] for kernel in kernels}
    with run_tasks(record, calls, jobs=jobs) as recorded:
        for (key, _), reach in recorded:
            if isinstance(reach, WorkerDiedError):
                raise reach
            found[key].append(reach)
    return {key: sorted(each, key=lambda reach: reach.steps) for key, each in found.items()}


def _cases(reaches: Sequence[Reach], mutation: Mutation) -> list[tuple[Case, float]]:
    return [(r.case, r.seconds) for r in reaches if mutation.index in r.instructions]


def counts(mutations: Sequence[Mutation]) -> dict[str, int]:
    """Count mutants by operator, in the order of the operators."""
    found = Counter(mutation.operator for mutation in mutations)
    return {operator: found[operator] for operator in OPERATORS if found[operator]}


def score(verdicts: Sequence[Verdict], scope: str | None = None) -> tuple[int, int]:
    """Return how many mutants were killed, and how many are not equivalent.

    scope: QUICK counts those alone that the quick cases killed.
    """
    faults = [verdict for verdict in verdicts if verdict.word != EQUIVALENT]
    killed = [v for v in faults if v.word == KILLED and scope in (None, v.scope)]
    return len(killed), len(faults)
