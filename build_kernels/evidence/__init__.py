"""The ladder of evidence: what shows that an artifact is right, without a GPU of its architecture.

    structure   the cubin is what the manifest says, and the PTX's instructions survived into it
    lint        the DSL's own diagnostics, each one explained
    protocol    SentryWard proves the PTX race-free in every schedule, at fixed sizes
    emulated    the PTX, run on a CPU under adversarial schedules, gives the reference's answers
    hardware    a GPU of the architecture ran the cubin, as recorded by the gpu tests

Importing this imports neither torch nor the DSL.
"""

from __future__ import annotations

from .climb import Outcome, verify
from .command import verify_command
from .store import RUNGS, Evidence, EvidenceError, Result, read_evidence, standing, validated_on

__all__ = [
    "RUNGS",
    "Evidence",
    "EvidenceError",
    "Outcome",
    "Result",
    "read_evidence",
    "standing",
    "validated_on",
    "verify",
    "verify_command",
]
