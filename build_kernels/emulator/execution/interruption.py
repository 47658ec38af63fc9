"""Reasons why a warp's lanes do not simply go on to the next instruction."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from build_kernels.emulator.ordering.barriers import Signal


@dataclass(eq=False)
class Wait:
    """The lanes execute the instruction again after a signal.

    reason: describes, when called, the event that is missing. times_out: the instruction may give
    up (try_wait). convergence: the wait is for other lanes of the warp.
    """

    reason: Callable[[], str]
    signals: tuple[Signal, ...] = ()
    times_out: bool = False
    convergence: bool = False


class Trapped(Exception):
    """A thread executed trap, which ends the launch of every thread."""


class Exited:
    """The lanes have left the kernel."""


EXITED = Exited()


@dataclass(frozen=True)
class Partial:
    """Only some lanes have executed the instruction.

    left: the other lanes. rest: turns of the warp to pass over before they execute it.
    """

    left: int
    rest: int


Interruption = Wait | Exited | Partial | None
