"""Control flow and hints to the scheduler: bra, ret, exit, trap, nanosleep, setmaxnreg."""

from __future__ import annotations

from build_kernels.emulator.execution.interruption import EXITED, Trapped
from build_kernels.emulator.execution.warp import Run, Warp
from build_kernels.emulator.instructions.convergence import aligned
from build_kernels.emulator.instructions.decoding import Decoder, Decoding, always


def go_on(w: Warp) -> None:
    """Do nothing."""


def end_turn(w: Warp) -> None:
    w.budget = 0


def branch(d: Decoding) -> Run:
    """Decode bra, which the warp itself executes."""
    d.take("uni")
    return go_on


def leave(d: Decoding) -> Run:
    d.take("uni")
    return lambda w: EXITED


def trap(w: Warp) -> None:
    w.report("trap", "the kernel traps", lane=w.first_lane())
    raise Trapped


def pause(d: Decoding) -> Run:
    """Decode nanosleep, which ends the warp's turn, and pmevent, which has no effect."""
    d.take("u32")
    return end_turn if d.name == "nanosleep" else go_on


def set_max_registers(d: Decoding) -> Run:
    """Decode setmaxnreg; register counts are not modelled."""
    d.need("inc", "dec")
    d.need("u32")
    count = d.source(d.operands[0], "u32").constant
    if not isinstance(count, int) or not 24 <= count <= 256 or count % 8:
        raise d.error("setmaxnreg takes a literal multiple of 8 in 24..256")
    return aligned(d, go_on)


INSTRUCTIONS: dict[str, Decoder] = {
    "bra": branch,
    **dict.fromkeys(("ret", "exit"), leave),
    "trap": always(trap),
    **dict.fromkeys(("nanosleep", "pmevent"), pause),
    "setmaxnreg": set_max_registers,
}
