"""Rung `faults`: torn inputs, words left in the workspace, and a silent peer, in the emulator.

Shows, for each row of the fault campaign that the emulator can make: the launch ends, with the
expected outcome (see `campaign.fault.Expected`). The emulated rung shows the rest: that the kernel
is right if nothing happens to it.
"""

from __future__ import annotations

from build_kernels.cli.extras import why_missing
from build_kernels.evidence.artifact import Artifact
from build_kernels.evidence.result import FAILED, FULL, PASSED, QUICK, Result, not_run
from dsv4_router_runtime.artifacts.json_reader import JsonNode

from .emulated import PACKAGES
from .rung import Checker, Reads, Rung, counted


def climb(artifact: Artifact, *, quick: bool) -> Result:
    """Let every fault happen to the kernel; the first wrong outcome ends the climb."""
    for package in PACKAGES:
        if (problem := why_missing(package)) is not None:
            return not_run(problem)
    from build_kernels.campaign.table import FAULTS
    from build_kernels.campaign.trial import applies, try_fault

    scope, runs = QUICK if quick else FULL, 0
    faults = [fault for fault in FAULTS if applies(fault, artifact)]
    for fault in faults:
        trial = try_fault(fault, artifact, quick=quick)
        runs += trial.runs
        if trial.problems:
            problems = "; ".join(trial.problems[:3])
            return Result(status=FAILED, scope=scope, reason=f"{fault.name}: {problems}")
    names = [fault.name for fault in faults]
    return Result(status=PASSED, scope=scope, figures={"faults": names, "runs": runs})


RUNG = Rung(
    name="faults",
    climb=climb,
    checker=Checker(number=1),
    reads=Reads.TEXT_AND_LAUNCH,
    cost=5,
    figures={"faults": lambda node: node.items("a list of faults"), "runs": JsonNode.integer},
    describe=lambda shown: [
        counted(len(shown["faults"]), "fault", "faults"),
        counted(shown["runs"], "run", "runs"),
    ],
    packages=PACKAGES,
)
