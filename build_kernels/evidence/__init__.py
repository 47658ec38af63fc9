"""The ladder of evidence: whether an artifact is correct, without a GPU of its architecture.

README.md beside this file describes the rungs and what they do not prove. Importing this package
imports neither torch nor the DSL.
"""

from __future__ import annotations

from .climb import Outcome, verify
from .command import verify_command
from .document import EvidenceError
from .result import Result
from .rungs import RUNGS
from .store import Evidence, read_evidence, standing, validated_on

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
