"""Convergence of a warp's lanes, which .sync and .aligned instructions wait for."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from build_kernels.emulator.execution.interruption import Interruption, Wait
from build_kernels.emulator.execution.warp import Run, Warp
from build_kernels.emulator.instructions.decoding import Decoding, Destination, Source
from build_kernels.emulator.instructions.elementwise import Elementwise
from build_kernels.emulator.lanes import ALL


class Collective(Elementwise):
    """A collective of a whole warp: `compute` is for all lanes, and `act` for any of them."""

    collective = True

    def __init__(
        self,
        sources: Sequence[Source],
        targets: Sequence[Destination],
        compute: Callable[..., Any],
        act: Run,
    ) -> None:
        super().__init__(sources, targets, compute)
        self._act = act

    def __call__(self, w: Warp) -> Interruption:  # type: ignore[override]
        return self._act(w)


def members_of(d: Decoding) -> int | None:
    """Return the literal mask of members, the last operand; None if a register holds it."""
    constant = d.source(d.operands[-1], "u32").constant
    return None if constant is None else int(constant) & ALL


def among(d: Decoding, act: Callable[[Warp, int], None]) -> Run:
    """Take .sync; return a function that lets the members of the mask, the last operand, act.

    They meet. That orders no memory: bar.warp.sync alone does (PTX ISA, "bar.warp.sync")."""
    d.need("sync")
    mask = d.source(d.operands[-1], "u32")
    constant = members_of(d)

    def run(w: Warp) -> Interruption:
        members = _members(w, mask) if constant is None else constant
        wait = w.converged(members)
        if wait is not None:
            return wait
        if w.bits & ~members:
            w.report(
                "member-mask",
                f"lanes {w.bits & ~members:#010x} execute this but are not in its mask "
                f"{members:#010x}",
            )
        if w.observed:
            w.meet(w.bits)
        act(w, members & w.bits)
        return None

    return run


def _members(w: Warp, mask: Source) -> int:
    w.poisoned("the member mask", mask.registers)
    return int(mask.get(w)[w.first_lane()])


def converge(w: Warp) -> Wait | None:
    """Return a wait until every live lane of the warp is here."""
    wait = w.converged(ALL)
    if wait is None and w.observed:
        w.meet(w.bits)
    return wait


def aligned(d: Decoding, act: Run) -> Run:
    """Take .sync.aligned; return a function that lets every live lane of the warp act."""
    d.need("sync")
    d.need("aligned")
    return together(act)


def together(act: Run) -> Run:
    """Return a function that lets every live lane of the warp act."""

    def run(w: Warp) -> Interruption:
        wait = converge(w)
        return act(w) if wait is None else wait

    return run
