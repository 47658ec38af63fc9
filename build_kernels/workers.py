"""Run tasks in worker processes. None outlives this process, however it ends.

The workers and every program that they start form one process group. Its leader is the guard, a
small process that waits for the end of a pipe whose other end this process holds. When this process
is gone, killed or not, the guard kills the group in one call. A signal to this process's own group
does not reach the guard. If the guard was killed first, the kernel kills each worker with its
parent (PR_SET_PDEATHSIG); only a program that a worker had started then runs to its end.

PR_SET_PDEATHSIG alone would not do: it is not inherited, and SentryWard starts its prover itself.
"""

from __future__ import annotations

import contextlib
import ctypes
import multiprocessing
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from typing import Any, TypeVar

Key = TypeVar("Key")
Value = TypeVar("Value")

_PR_SET_PDEATHSIG = 1  # sys/prctl.h
# It writes a byte when its group exists, and reads until its standard input is closed.
_GUARD = """
import os, signal
for number in (signal.SIGHUP, signal.SIGINT, signal.SIGTERM):
    signal.signal(number, signal.SIG_IGN)
os.setpgid(0, 0)
os.write(1, b"x")
os.read(0, 1)
os.killpg(0, signal.SIGKILL)
"""


class WorkerDiedError(Exception):
    """The process of one task ended before the task did, so there is no result."""

    def __init__(self) -> None:
        super().__init__("its process died; was the machine out of memory?")


@contextmanager
def run_tasks(
    function: Callable[..., Value],
    tasks: Mapping[Key, tuple[Any, ...]],
    *,
    jobs: int,
    prepare: Callable[[], None] | None = None,
) -> Iterator[Iterator[tuple[Key, Value | WorkerDiedError]]]:
    """Call `function(*tasks[key])` for each key in at most `jobs` processes, started by spawn.

    Yields an iterator over (key, result) in the order in which the tasks end; they start in the
    order of `tasks`. If a task's process dies, its result is a WorkerDiedError and the others go
    on. An exception of a task is raised here. `prepare` is called once per worker, before its first
    task. Leaving the block early, for instance by an exception, kills workers and their children.
    Their temporary files are in one folder, which this process removes: a killed worker cannot.
    """
    if not tasks:
        yield iter(())
        return
    scratch = tempfile.TemporaryDirectory(prefix="dsv4-router-", ignore_cleanup_errors=True)
    guard = _start_guard()
    pools: list[ProcessPoolExecutor] = []

    def new_pool() -> ProcessPoolExecutor:
        # One worker per pool: when it dies, the task that it had is known.
        pool = ProcessPoolExecutor(
            max_workers=1,
            # spawn: the state of torch and of the DSL must not be shared between processes.
            mp_context=multiprocessing.get_context("spawn"),
            initializer=_start_worker,
            initargs=(os.getpid(), guard.pid, scratch.name, prepare),
        )
        pools.append(pool)
        return pool

    finished = False
    try:
        yield _results(function, tasks, jobs, new_pool)
        finished = True
    finally:
        if not finished:
            _kill_group(guard)
        for pool in pools:
            pool.shutdown(wait=True, cancel_futures=True)
        _kill_group(guard)
        guard.communicate()
        scratch.cleanup()


def _results(
    function: Callable[..., Value],
    tasks: Mapping[Key, tuple[Any, ...]],
    jobs: int,
    new_pool: Callable[[], ProcessPoolExecutor],
) -> Iterator[tuple[Key, Value | WorkerDiedError]]:
    waiting = iter(tasks.items())
    running: dict[Future[Value], tuple[Key, ProcessPoolExecutor]] = {}

    def start_next(pool: ProcessPoolExecutor) -> None:
        for key, arguments in waiting:
            try:
                future = pool.submit(function, *arguments)
            except BrokenProcessPool:  # the idle worker died
                pool = new_pool()
                future = pool.submit(function, *arguments)
            running[future] = (key, pool)
            return

    for _ in range(min(jobs, len(tasks))):
        start_next(new_pool())
    while running:
        for future in wait(running, return_when=FIRST_COMPLETED).done:
            key, pool = running.pop(future)
            outcome: Value | WorkerDiedError
            try:
                outcome = future.result()
            except BrokenProcessPool:
                outcome, pool = WorkerDiedError(), new_pool()
            start_next(pool)
            yield key, outcome


def _start_guard() -> subprocess.Popen[bytes]:
    """Start the leader of the workers' group, and wait until it has made the group."""
    guard = subprocess.Popen(
        [sys.executable, "-I", "-S", "-c", _GUARD],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    )
    assert guard.stdout is not None
    if guard.stdout.read(1) != b"x":
        raise OSError("cannot start the process that ends the workers: see the lines above")
    return guard


def _kill_group(guard: subprocess.Popen[bytes]) -> None:
    # The guard is not reaped before this, so its number cannot be another group's.
    with contextlib.suppress(ProcessLookupError):
        os.killpg(guard.pid, signal.SIGKILL)


def _start_worker(
    parent: int, group: int, scratch: str, prepare: Callable[[], None] | None
) -> None:
    """Join the group of the workers and use their folder, or end if the parent has ended."""
    try:
        os.setpgid(0, group)
    except OSError:  # the guard is gone: nothing would end this process
        os._exit(1)
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:  # it ended before the line above
        os._exit(1)
    # The environment is for the programs that it starts.
    os.environ["TMPDIR"] = tempfile.tempdir = scratch
    if prepare is not None:
        prepare()
