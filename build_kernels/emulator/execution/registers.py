"""Registers that an asynchronous operation is still to write."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

from build_kernels.binaries.ptx.syntax import Instruction
from build_kernels.emulator.lanes import Mask


@dataclass(eq=False, slots=True)
class Pending:
    """The state of a register that must not be read before a wait.

    what: the wait, for findings. taint: the register's poison after the wait.
    """

    what: str
    owner: Writer
    taint: Mask | None = None


class Writer(Protocol):
    """An asynchronous operation that writes registers.

    moves: register moves that came before the wait; they are executed after it. guarded: hardware
    holds what uses the registers until they are written, wait or no wait.
    """

    guarded: bool
    instruction: Instruction
    moves: list[Move]

    def settle(self) -> None:
        """Finish as if it had been waited for, to go on after the finding that it was not."""
        ...


@dataclass(eq=False)
class Move:
    """A mov whose sources are pending: compilers put copies between a load and its wait.

    pending: the state of the targets until then. bits: the lanes. run: executes the mov.
    """

    pending: dict[int, Pending]
    bits: int
    run: Callable[[], object]


Taint = Mask | Pending | None
