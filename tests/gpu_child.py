"""Run functions of gpu_fault_children.py in processes of their own: a hang is a failed test."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from tempfile import TemporaryFile
from typing import Any

import pytest

CHILDREN = Path(__file__).with_name("gpu_fault_children.py")


def environment(**more: str) -> dict[str, str]:
    """Return this process's environment, with the package under test first."""
    places = os.pathsep.join([str(CHILDREN.parents[1]), os.environ.get("PYTHONPATH", "")])
    return {**os.environ, "PYTHONPATH": places, **more}


def command(name: str, *arguments: Any) -> list[str]:
    return [sys.executable, str(CHILDREN), name, json.dumps(arguments)]


def child(
    name: str, *arguments: Any, seconds: float = 120, env: Mapping[str, str] | None = None
) -> dict[str, Any]:
    """Run one function of gpu_fault_children.py; return its figures, or fail the test."""
    (figures,) = together([command(name, *arguments)], seconds=seconds, env=env)
    print(name, *arguments, figures)
    return figures


def together(
    commands: Sequence[Sequence[str]], *, seconds: float, env: Mapping[str, str] | None = None
) -> list[dict[str, Any]]:
    """Run the commands at once; return the JSON that each prints last, or fail the test.

    All are killed after the limit, and once one has failed: the others may wait for it.
    """
    deadline = time.monotonic() + seconds
    with ExitStack() as stack:
        # Files, since a pipe that nothing reads would stop a child.
        files = [stack.enter_context(TemporaryFile("w+")) for _ in range(2 * len(commands))]
        running = []
        for words, out, err in zip(commands, files[::2], files[1::2], strict=True):
            process = subprocess.Popen(
                words, env=environment(**(env or {})), stdout=out, stderr=err, text=True
            )
            stack.callback(end, process)
            running.append(process)
        codes = [process.poll() for process in running]
        while None in codes and not any(codes) and time.monotonic() < deadline:
            time.sleep(0.05)
            codes = [process.poll() for process in running]
        for file in files:
            file.seek(0)
        said = [file.read() for file in files]
    for words, code, errors in zip(commands, codes, said[1::2], strict=True):
        assert not code, f"{words[2:]} exits with {code}: {errors[-4000:]}"
    if None in codes:
        errors = "\n".join(text[-2000:] for text in said[1::2])
        pytest.fail(f"{commands[codes.index(None)][2:]}: running after {seconds} s; {errors}")
    return [json.loads(out.splitlines()[-1]) for out in said[::2]]


def end(process: subprocess.Popen[str]) -> None:
    """Kill a process and wait until it is gone; TimeoutExpired if it cannot be killed."""
    process.kill()
    process.wait(timeout=60)
