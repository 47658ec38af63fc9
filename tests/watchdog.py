"""A time limit for what might hang: a blocked read or an endless loop becomes a failed test."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import contextmanager

import pytest


@contextmanager
def ends_within(seconds: float) -> Iterator[None]:
    """Fail the test if the block takes longer; a blocked system call is interrupted."""

    def late(signum, frame):
        pytest.fail(f"still running after {seconds} s")

    before = signal.signal(signal.SIGALRM, late)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
