"""Turn expected errors of a subcommand into a message and an exit status."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager

from build_kernels.bench.report import ReportError
from build_kernels.binaries.cubin import CubinError
from build_kernels.binaries.wheels import ToolError
from build_kernels.building.artifact_folder import PlaceError
from build_kernels.building.build import BuildError
from build_kernels.building.compilers import CompileError
from build_kernels.building.router_wheel import WheelError
from build_kernels.building.staging import LockedError
from build_kernels.evidence import EvidenceError
from build_kernels.evidence.artifact import ArtifactReadError
from build_kernels.release.errors import SigningError
from build_kernels.review.budgets import BudgetError
from build_kernels.review.side import SideError
from dsv4_router_runtime.errors import RouterError

from .console import say

_EXPECTED = (
    *(BuildError, CompileError, LockedError, PlaceError),
    *(ArtifactReadError, EvidenceError, SigningError, CubinError, SideError, BudgetError),
    *(ReportError, ToolError, WheelError, RouterError, OSError),
)


@contextmanager
def reported_errors(status: int = 1) -> Iterator[None]:
    """Print an expected error and exit with `status`; any other keeps its traceback."""
    try:
        yield
    except KeyboardInterrupt:
        say("interrupted; the artifacts are as they were")
        sys.exit(130)
    except _EXPECTED as error:
        say(f"error: {error}")
        sys.exit(status)
