"""Processes that tests run at once: each gives its figures, and none outlives a failure."""

from __future__ import annotations

import sys
import time
from pathlib import Path

import pytest
from gpu_child import together


def python(code: str) -> list[str]:
    return [sys.executable, "-c", code]


SLEEPER = python("import os, time; os.write(2, b'asleep %d' % os.getpid()); time.sleep(60)")


def test_each_process_gives_its_last_line():
    commands = [python(f"print('x' * 100_000); print({number})") for number in range(2)]
    assert together(commands, seconds=60) == [0, 1]


def test_a_process_that_hangs_is_a_failure_after_the_limit():
    with pytest.raises(pytest.fail.Exception, match=r"running after 1 s; asleep \d+") as failure:
        together([SLEEPER, python("print(1)")], seconds=1)
    assert not Path("/proc", str(failure.value).split()[-1]).exists()


def test_a_process_that_fails_ends_the_others():
    start = time.monotonic()
    with pytest.raises(AssertionError, match=r"exits with 1: (.|\n)*no peer"):
        together([SLEEPER, python("raise SystemExit('no peer')")], seconds=300)
    assert time.monotonic() - start < 30
