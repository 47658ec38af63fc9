"""Worker processes: what they return, and that none outlives the command that started it."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

pytest.importorskip("click", reason="needs the builder")
pytest.importorskip("elftools", reason="needs the builder")

from builds import topk_set
from processes import double, family, start_and_wait

from build_kernels.workers import WorkerDiedError, run_tasks

WAYS = [
    pytest.param(number, group, id=f"{number.name}-{'group' if group else 'process'}")
    for number in (signal.SIGTERM, signal.SIGKILL)
    for group in (False, True)
]
# A worker of the proofs waits for this program, which stands in for SentryWard's.
LONG = "sleep 617"


@pytest.fixture(scope="module")
def artifacts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return topk_set(tmp_path_factory.mktemp("workers") / "artifacts", ["sm_100a"])


@pytest.fixture
def long_proof(tmp_path: Path) -> str:
    program = tmp_path / "sentryward-ptx"
    program.write_text(f"#!/bin/sh\nexec {LONG}\n")
    program.chmod(0o755)
    return str(program)


COMMANDS = {
    "verify": ["build_kernels", "verify", "--rung", "protocol"],
    "mutants": [
        *("build_kernels.mutants", "--rung", "protocol"),
        *("--only", "top-k: no barrier between writing keys and reading them"),
    ],
}


@pytest.mark.slow
@pytest.mark.parametrize(("number", "group"), WAYS)
@pytest.mark.parametrize("name", COMMANDS)
def test_a_stopped_command_leaves_no_process_behind(
    artifacts: Path,
    long_proof: str,
    tmp_path_factory: pytest.TempPathFactory,
    name: str,
    number: signal.Signals,
    group: bool,
) -> None:
    """A worker, the prover that it waits for, multiprocessing's resource tracker: all end.

    The prover's input goes too, unless the process that would remove it was killed."""
    scratch = tmp_path_factory.mktemp("scratch")
    pytest.importorskip("sentryward", reason="needs the extra `verify`")
    pytest.importorskip("numpy", reason="needs the extra `verify`")
    command = [sys.executable, "-m", *COMMANDS[name], "--artifacts", str(artifacts)]
    with family(command, SENTRYWARD_PTX_NATIVE=long_proof, TMPDIR=str(scratch)) as started:
        started.wait_for(LONG)
        assert list(scratch.glob("**/kernel.ptx"))
        started.signal(number, group=group)
        assert started.head.wait(timeout=60) == (
            130 if number == signal.SIGTERM else -signal.SIGKILL
        )
        assert started.survivors(seconds=5) == []
    if number == signal.SIGTERM:
        assert list(scratch.iterdir()) == []


@pytest.mark.slow
@pytest.mark.parametrize(("number", "group"), WAYS)
def test_a_stopped_build_leaves_no_process_behind(
    tmp_path: Path, number: signal.Signals, group: bool
) -> None:
    pytest.importorskip("cutlass", reason="needs the builder")
    command = [sys.executable, "-m", "build_kernels", "build", "--arch", "sm_90a", "--jobs", "2"]
    with family([*command, "--artifacts", str(tmp_path / "artifacts")]) as started:
        started.wait_for("spawn_main")
        time.sleep(2)  # into the compilers
        started.signal(number, group=group)
        assert started.head.wait(timeout=60) == (
            130 if number == signal.SIGTERM else -signal.SIGKILL
        )
        assert started.survivors(seconds=5) == []


@pytest.mark.quick(1)
@pytest.mark.parametrize("jobs", [1, 2, 9])
def test_every_task_gives_its_result(jobs: int) -> None:
    with run_tasks(double, {n: (n,) for n in (1, 2, 3, 4)}, jobs=jobs) as results:
        assert dict(results) == {1: 2, 2: 4, 3: 6, 4: 8}


def test_no_task_starts_no_process(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(subprocess, "Popen", lambda *_: pytest.fail("a process was started"))
    with run_tasks(double, {}, jobs=2) as results:
        assert list(results) == []


@pytest.mark.parametrize("jobs", [1, 2])
def test_a_task_whose_process_dies_is_named_and_the_others_go_on(jobs: int) -> None:
    """As when the system kills a worker because memory ran out."""
    with run_tasks(double, {f"task {n}": (n,) for n in (1, 13, 2, 3)}, jobs=jobs) as results:
        found = dict(results)
    died = found.pop("task 13")
    assert isinstance(died, WorkerDiedError)
    assert "out of memory" in str(died)
    assert found == {"task 1": 2, "task 2": 4, "task 3": 6}


def test_what_a_task_raises_is_raised() -> None:
    with (
        pytest.raises(ValueError, match="nothing to double"),
        run_tasks(double, {n: (n,) for n in (0, 1)}, jobs=1) as results,
    ):
        list(results)


def _interrupted_while_it_waits(file: Path) -> None:
    """Let SIGALRM stand in for Ctrl-C, once the worker has told the processes."""

    def interrupt(*_: object) -> None:
        if file.exists() and len(file.read_text().split()) == 2:
            raise KeyboardInterrupt

    before = signal.signal(signal.SIGALRM, interrupt)
    try:
        with run_tasks(start_and_wait, {"one": (str(file),)}, jobs=1) as results:
            signal.setitimer(signal.ITIMER_REAL, 0.1, 0.1)
            list(results)
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def _end(process: int) -> None:
    """Wait until a process is gone or a zombie."""
    deadline = time.monotonic() + 5
    while time.monotonic() < deadline:
        try:
            if Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] == "Z":
                return
        except OSError:
            return
        time.sleep(0.02)
    pytest.fail(f"process {process} is alive")


def test_leaving_early_kills_the_workers_and_what_they_started(tmp_path: Path) -> None:
    file = tmp_path / "processes"
    started = time.monotonic()
    with pytest.raises(KeyboardInterrupt):
        _interrupted_while_it_waits(file)
    assert time.monotonic() - started < 20
    for process in file.read_text().split():
        _end(int(process))


def test_workers_end_with_their_parent_when_the_guard_was_killed_first(tmp_path: Path) -> None:
    file = tmp_path / "processes"
    code = (
        "from build_kernels.workers import run_tasks\n"
        "from processes import start_and_wait\n"
        "if __name__ == '__main__':\n"
        f"    with run_tasks(start_and_wait, {{1: ({str(file)!r},)}}, jobs=1) as results:\n"
        "        list(results)\n"
    )
    script = tmp_path / "script.py"
    script.write_text(code)
    with family([sys.executable, str(script)]) as started:
        started.wait_for("sleep 617")
        (guard,) = (pid for pid, line in started.members().items() if "killpg" in line)
        os.kill(guard, signal.SIGKILL)
        started.signal(signal.SIGKILL, group=False)
        worker, _ = map(int, file.read_text().split())
        _end(worker)
