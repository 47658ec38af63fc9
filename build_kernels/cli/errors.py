"""Turn expected errors of a subcommand into a message and an exit status."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager

from build_kernels.binaries.cubin import CubinError
from build_kernels.building.compilers import CompileError
from build_kernels.errors import BuilderError
from dsv4_router_runtime.errors import RouterError

from .console import say

# The last two's modules decide a kernel's bytes: a change of them makes each set out of date.
_EXPECTED = (OSError, RouterError, BuilderError, CompileError, CubinError)


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
