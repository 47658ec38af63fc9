"""Commands whose every descendant can be found again, and tasks that import little."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

_MARK = "ROUTER_TEST_FAMILY"


@dataclass(frozen=True)
class Family:
    """A process and all that it starts: they inherit a mark in their environment."""

    head: subprocess.Popen[str]
    mark: str

    def members(self) -> dict[int, str]:
        """Return the command line of each living member by process id, the head's included."""
        found = {}
        for process in Path("/proc").iterdir():
            try:
                # A zombie has no environment.
                if self.mark.encode() in (process / "environ").read_bytes():
                    command = (process / "cmdline").read_bytes().replace(b"\0", b" ")
                    found[int(process.name)] = command.decode(errors="replace")
            except (OSError, ValueError):
                continue
        return found

    def wait_for(self, word: str, seconds: float = 60) -> None:
        """Wait until a member's command line holds `word`."""
        self._wait(lambda: any(word in command for command in self.members().values()), seconds)

    def signal(self, number: signal.Signals, *, group: bool) -> None:
        """Send a signal to the head, or to its process group."""
        (os.killpg if group else os.kill)(self.head.pid, number)

    def survivors(self, seconds: float) -> list[str]:
        """Return the members that are still alive after `seconds`; sooner if there are none."""
        try:
            self._wait(lambda: not self.members(), seconds)
        except TimeoutError:
            return sorted(self.members().values())
        return []

    def _wait(self, condition: Callable[[], bool], seconds: float) -> None:
        deadline = time.monotonic() + seconds
        while not condition():
            if time.monotonic() > deadline:
                raise TimeoutError(f"after {seconds} s: {self.members()}")
            time.sleep(0.05)


@contextmanager
def family(command: Sequence[str], **environment: str) -> Iterator[Family]:
    """Start `command` in a process group of its own; what is left of it at the end is killed."""
    mark = f"{_MARK}={uuid.uuid4().hex}"
    head = subprocess.Popen(
        command,
        env={
            **os.environ,
            "PYTHONPATH": os.pathsep.join(filter(None, sys.path)),
            **environment,
            _MARK: mark.partition("=")[2],
        },
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        preexec_fn=heed_signals,
    )
    members = Family(head=head, mark=mark)
    try:
        yield members
    finally:
        for process in members.members():
            os.kill(process, signal.SIGKILL)
        head.communicate(timeout=30)


def heed_signals() -> None:
    """Undo what tests inherit in the background or under nohup: SIGINT or SIGHUP ignored."""
    for number in (signal.SIGINT, signal.SIGHUP):
        signal.signal(number, signal.SIG_DFL)


def double(number: int) -> int:
    """Kill the worker for 13, raise for 0, else return twice the number."""
    if number == 13:
        os.kill(os.getpid(), signal.SIGKILL)
    if number == 0:
        raise ValueError("nothing to double")
    return 2 * number


def append_records(path: Path, record: Any) -> None:
    """Append a GPU test's record 10 times."""
    from build_kernels.evidence.rungs.hardware import append_record

    for _ in range(10):
        append_record(path, record)


def start_and_wait(file: str) -> None:
    """Start a program, tell its process id, wait for it."""
    program = subprocess.Popen(["sleep", "617"])
    Path(file).write_text(f"{os.getpid()} {program.pid}")
    program.wait()
