"""Rung `faults`: torn inputs, words left in the workspace, and a silent peer, in the emulator.

Shows, for each row of the fault campaign that the emulator can make: the launch ends, with the
expected outcome (see `campaign.fault.Expected`). The emulated rung shows the rest: that the kernel
is right if nothing happens to it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

from build_kernels.cli.extras import why_missing
from build_kernels.evidence.artifact import Artifact
from build_kernels.evidence.result import FAILED, FULL, PASSED, QUICK, Result, not_run
from dsv4_router_runtime.artifacts.json_reader import JsonNode

from .emulated import PACKAGES
from .rung import Checker, Reads, Rung, counted

# As the greatest group of faults that share their launches takes about half of the time.
PARTS = 4


def climb(artifact: Artifact, *, part: int, quick: bool) -> Result:
    """Let a share of the faults happen to the kernel."""
    for package in PACKAGES:
        if (problem := why_missing(package)) is not None:
            return not_run(problem)
    from build_kernels.campaign.table import FAULTS
    from build_kernels.campaign.trial import applies, together, try_faults

    scope = QUICK if quick else FULL
    groups = together([fault for fault in FAULTS if applies(fault, artifact, quick=quick)])
    faults = [fault for group in groups[part::PARTS] for fault in group]
    trials = try_faults(faults, artifact, quick=quick)
    for name, trial in trials.items():
        if trial.problems:
            problems = "; ".join(trial.problems[:3])
            return Result(status=FAILED, scope=scope, reason=f"{name}: {problems}")
    runs = sum(trial.runs for trial in trials.values())
    return Result(status=PASSED, scope=scope, figures={"faults": list(trials), "runs": runs})


def join(parts: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Return the figures of all parts."""
    faults = [name for figures in parts for name in figures["faults"]]
    return {"faults": sorted(faults), "runs": sum(figures["runs"] for figures in parts)}


RUNG = Rung(
    name="faults",
    climbs=tuple(partial(climb, part=part) for part in range(PARTS)),
    checker=Checker(number=4),
    reads=Reads.TEXT_AND_LAUNCH,
    cost=5,
    figures={"faults": lambda node: node.items("a list of faults"), "runs": JsonNode.integer},
    describe=lambda shown: [
        counted(len(shown["faults"]), "fault", "faults"),
        counted(shown["runs"], "run", "runs"),
    ],
    packages=PACKAGES,
    join=join,
)
