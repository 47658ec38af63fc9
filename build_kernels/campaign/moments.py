"""Tear arrays at every moment of a launch: fork it there, and finish it with the new contents.

Two tears differ for a launch only if it loads a torn element between them. So the moments of a tear
are the loads of its elements, but for the first: before that one nothing has seen the old contents.
The launch up to a moment is emulated once, in the parent. A child finishes it, judges it and sends
its problems through a pipe. One child runs at a time. A moment on which nothing depends is not
forked: see emulator/instructions/lookahead.py.
"""

from __future__ import annotations

import gc
import json
import os
import sys
import traceback
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NoReturn

from .fault import Changes, Torn

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from build_kernels.emulator import Result

NOTHING = Torn(rows=(), arrays={})
CHILD_DIED = "its process died: see the lines above"


@dataclass(kw_only=True)
class Tearing:
    """One tear of a launch. wanted: takes a moment, from 1. loads, runs, problems: so far.

    as_next: whether the last moment was found to be as the one after it.
    """

    torn: Torn
    wanted: Callable[[int], bool]
    judge: Callable[[Torn, Result], list[str]]
    loads: int = 0
    runs: int = 0
    as_next: bool = False
    problems: list[str] = field(default_factory=list)

    @property
    def moments(self) -> int:
        """Return how many moments there were: loads of a torn element after the first one."""
        return max(0, self.loads - 1)


def tear_at_moments(
    run: Callable[..., Result], tearings: Mapping[str, Tearing], sizes: Mapping[str, int]
) -> Mapping[str, Tearing]:
    """Run a launch, and each tear of it at each wanted moment until it has a problem.

    The launch without a tear is judged too: one that ends early is torn nowhere. run: takes
    `emulate`'s on_load. sizes: bytes per element, by array.
    """
    forks = _Forks(tearings, sizes)
    try:
        result = run(on_load=forks.on_load)
        if forks.child is None:
            for tearing in tearings.values():
                if not tearing.problems:
                    problems = tearing.judge(NOTHING, result)
                    tearing.problems = [f"not torn: {problem}" for problem in problems]
                if not tearing.problems and tearing.as_next:
                    problems = tearing.judge(tearing.torn, result)
                    tearing.problems = [f"torn at the end: {problem}" for problem in problems]
            return tearings
        tearing = forks.child
        problems = tearing.judge(tearing.torn, result)
    except BaseException as error:
        if forks.child is None:
            raise
        traceback.print_exc()
        problems = [f"{type(error).__name__}: {error}"]
    forks.end(problems)


class _Forks:
    """Fork a launch at the moments of its tears. child: the tear of this process, in a child."""

    def __init__(self, tearings: Mapping[str, Tearing], sizes: Mapping[str, int]) -> None:
        self.child: Tearing | None = None
        self._pipe = -1
        self._watched: dict[str, list[tuple[Tearing, NDArray[Any]]]] = {}
        for tearing in tearings.values():
            for array, changes in tearing.torn.arrays.items():
                touched = _bytes_of(changes, sizes[array])
                self._watched.setdefault(array, []).append((tearing, touched))

    def on_load(
        self, array: str, offsets: NDArray[Any], depends: Callable[[Mapping[str, Changes]], bool]
    ) -> Mapping[str, Changes]:
        """Fork if a torn element is about to be loaded; return the tear to a child.

        A moment at which nothing depends on the tear is as the next one, or as a tear at the end.
        """
        if self.child is not None:
            return {}
        for tearing, touched in self._watched.get(array, ()):
            if not touched[offsets[offsets < len(touched)]].any():
                continue
            moment, tearing.loads = tearing.loads, tearing.loads + 1
            wanted = moment > 0 and not tearing.problems and tearing.wanted(moment)
            if not wanted:
                continue
            tearing.runs += 1
            tearing.as_next = tearing.wanted(moment + 1) and not depends(tearing.torn.arrays)
            where = f"torn at moment {moment}, before a load of {array}"
            if not tearing.as_next and self._fork(tearing, where):
                return tearing.torn.arrays
        return {}

    def _fork(self, tearing: Tearing, where: str) -> bool:
        """Return True in a child; in the parent, wait for it, note its problems, return False."""
        reading, writing = os.pipe()
        sys.stdout.flush()
        sys.stderr.flush()
        child = os.fork()
        if child == 0:
            # The collector would write to every object, and so copy the memory that is shared.
            gc.freeze()
            os.close(reading)
            self.child, self._pipe = tearing, writing
            return True
        os.close(writing)
        with os.fdopen(reading) as pipe:
            sent = pipe.read()
        _, status = os.waitpid(child, 0)
        problems = json.loads(sent) if status == 0 and sent else [CHILD_DIED]
        tearing.problems += [f"{where}: {problem}" for problem in problems]
        return False

    def end(self, problems: list[str]) -> NoReturn:
        """Send a child's problems and end it, without its parent's exit handlers."""
        status = 1
        try:
            with os.fdopen(self._pipe, "w") as pipe:
                json.dump(problems, pipe)
            status = 0
        finally:
            os._exit(status)


def _bytes_of(changes: Changes, size: int) -> NDArray[Any]:
    """Return whether each byte of an array, up to the last torn one, is of a torn element."""
    import numpy as np

    touched = np.zeros((max(changes, default=-1) + 1) * size, dtype=bool)
    touched.reshape(-1, size)[list(changes)] = True
    return touched
