"""griddepcontrol: the order of a grid after the one before it (PTX ISA, "griddepcontrol")."""

from __future__ import annotations

from build_kernels.emulator.execution.warp import Warp
from build_kernels.emulator.instructions.control_flow import go_on
from build_kernels.emulator.instructions.decoding import Decoder, always
from build_kernels.emulator.ordering.clocks import GENERIC, Clock


def wait(w: Warp) -> None:
    """Order the lanes after the grid before, which is complete, with its writes visible."""

    def change(clock: Clock) -> Clock:
        return clock.replaced(GENERIC, clock[GENERIC].with_tick(w.grid.clocks.predecessor, 1))

    w.replace_clocks(w.bits, change)


# The grid that launch_dependents starts is not modelled.
INSTRUCTIONS: dict[str, Decoder] = {
    "griddepcontrol.wait": always(wait),
    "griddepcontrol.launch_dependents": always(go_on),
}
