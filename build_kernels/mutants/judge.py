"""Put a mutant to a rung and read its verdict."""

from __future__ import annotations

from dataclasses import dataclass, replace

from build_kernels.evidence.artifact import Artifact
from build_kernels.evidence.inputs import make_inputs
from build_kernels.evidence.result import FAILED, NOT_RUN, PASSED
from build_kernels.evidence.rungs import emulated, protocol, rewrites

from .mutant import Mutant, mutated

REJECTED = "rejected"
ACCEPTED = "accepted"
UNDECIDED = "undecided"


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """The verdict of one rung on one mutant.

    word: rejected, accepted, or undecided if the tool cannot follow the kernel or complains about
    another fault. reason: the first complaint, or why there is none.
    """

    mutant: str
    rung: str
    word: str
    reason: str


def judge(mutant: Mutant, artifact: Artifact, rung: str) -> Verdict:
    """Put one mutant to one rung of JUDGES."""
    ptx = mutated(mutant, artifact.ptx)
    word, reason = JUDGES[rung](mutant, replace(artifact, ptx=ptx))
    return Verdict(mutant=mutant.name, rung=rung, word=word, reason=reason)


def is_right(mutant: Mutant, verdict: Verdict) -> bool:
    """Return whether the mutant states this verdict of the rung."""
    if mutant.harmless:
        return verdict.word == ACCEPTED
    return verdict.word == REJECTED or verdict.rung not in mutant.rejected_by


def _emulate(mutant: Mutant, artifact: Artifact) -> tuple[str, str]:
    from build_kernels.emulator import EmulatorError, Schedule

    inputs = make_inputs(artifact.kernel, mutant.case)
    for policy, seed in mutant.schedules:
        schedule = Schedule(policy=policy, seed=seed)
        try:
            outcome = emulated.run(
                artifact.kernel, artifact.ptx, inputs, schedule, tensor_map_changes=mutant.maps
            )
        except EmulatorError as error:
            return REJECTED, f"refused: {error}"
        if outcome.problems:
            to_the_point = [text for text in outcome.problems if mutant.complaint in text]
            if to_the_point:
                return REJECTED, f"{policy} {seed}: {to_the_point[0]}"
            return UNDECIDED, f"{policy} {seed}, another fault: {outcome.problems[0]}"
    return ACCEPTED, f"no complaint under {len(mutant.schedules)} schedules"


def _prove(mutant: Mutant, artifact: Artifact) -> tuple[str, str]:
    case = protocol.ProofCase(
        num_tokens=mutant.case.num_tokens,
        num_experts=mutant.case.num_experts,
        top_k=mutant.case.top_k,
        k=mutant.case.k,
        rewrites=rewrites.rewrites_for(artifact.kernel),
    )
    result = protocol.prove(artifact, (case,), tensor_map_changes=mutant.maps)
    words = {PASSED: ACCEPTED, FAILED: REJECTED, NOT_RUN: UNDECIDED}
    return words[result.status], result.reason or "race_free"


# The rungs that read the PTX, in the order of the table's columns.
JUDGES = {emulated.RUNG.name: _emulate, protocol.RUNG.name: _prove}
