"""st.async and red.async: stores into the cluster that complete on an mbarrier."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import numpy as np

from build_kernels.emulator.execution.operation import Operation
from build_kernels.emulator.execution.warp import LANES, Warp
from build_kernels.emulator.instructions.atom_red import ATOMIC, combine
from build_kernels.emulator.instructions.operands import (
    DTYPE,
    Context,
    Modifiers,
    address,
    items,
    source,
)
from build_kernels.emulator.memory.memory import POISON, VALID
from build_kernels.emulator.memory.state_spaces import locate
from build_kernels.emulator.ordering.barriers import Mbarrier
from build_kernels.emulator.ordering.clocks import Ints
from build_kernels.emulator.ptx.syntax import TYPE_BITS, Instruction

if TYPE_CHECKING:
    from build_kernels.emulator.execution.cta import Cta
from build_kernels.emulator.execution.warp import Array, Run
from build_kernels.emulator.instructions.async_writes import signal, target_barrier, write_shared


class RemoteStore(Operation):
    """st.async or red.async of some lanes: each lane's bytes, then its tx-count.

    PTX treats it as a weak store that a complete-tx releases; no proxy fence is asked for."""

    what = "asynchronous store"
    proxied = False

    def __init__(
        self,
        warp: Warp,
        pieces: Sequence[tuple[Cta, Ints, Array, Array, Mbarrier | None]],
        update: Callable[[Array, Array], Array] | None,
    ) -> None:
        clock = warp.publish(warp.bits)
        self.reduces = update is not None
        super().__init__(warp, warp.first_lane())
        self.clock = clock
        self.pieces = pieces
        self.update = update
        for cta, *_ in pieces:
            self.touches(cta)

    def perform(self) -> None:
        clock = self.completion()
        for cta, offsets, data, state, barrier in self.pieces:
            if self.update is not None:
                data = self.update(cta.shared.data[offsets], data)
                state = np.where(cta.shared.state[offsets] == VALID, state, POISON)
            write_shared(self, cta, offsets, data, state.astype(np.uint8))
            signal(self, barrier, len(offsets), clock)


def remote_store(ins: Instruction, context: Context) -> Run:
    """st.async and red.async into a CTA of the cluster."""
    reducing = ins.words[0] == "red"
    mods = Modifiers(ins, skip=2)
    kind = mods.type()
    mods.one_of("weak", "relaxed")
    mods.one_of("cluster")
    mods.need("shared::cluster")
    mods.need("mbarrier::complete_tx::bytes")
    name = mods.need(*(n for n in ATOMIC if n != "exch")) if reducing else ""
    count = int((mods.one_of("v2", "v4") or "v1")[1:])
    mods.done()
    if TYPE_BITS[kind] not in (32, 64):
        raise ins.error("takes 32- and 64-bit types")
    where = address(ins, ins.operands[0], context)
    sources = [source(ins, each, kind, context) for each in items(ins.operands[1])]
    barrier = address(ins, ins.operands[2], context)
    if len(sources) != count:
        raise ins.error(f"needs {count} values (got {len(sources)})")
    unit = TYPE_BITS[kind] // 8
    size = unit * count
    dtype = np.dtype(DTYPE[kind])

    def update(old: Array, value: Array) -> Array:
        fresh = [
            combine(kind, name, a, b)
            for a, b in zip(old.view(dtype), value.view(dtype), strict=True)
        ]
        return np.array(fresh, dtype=dtype).view(np.uint8)

    def run(w: Warp) -> None:
        w.poisoned("an address of an asynchronous store", where.registers + barrier.registers)
        parts = [
            np.ascontiguousarray(s.get(w)).view(np.uint8).reshape(LANES, unit) for s in sources
        ]
        data = np.concatenate(parts, axis=1)
        poison = [_spread(w.taint(s.registers), unit) for s in sources]
        state = np.where(np.concatenate(poison, axis=1), POISON, VALID).astype(np.uint8)
        barriers = barrier.get(w)
        pieces = []
        for place in locate(w, "shared::cluster", where.get(w), size):
            cta = place.peer or w.cta
            for lane, offset in zip(place.lanes, place.offsets, strict=True):
                found = target_barrier(w, int(lane), int(barriers[lane]), proxied=False)
                if found is not None and found.cta is not cta:
                    w.machine.report(
                        "not-own-shared",
                        "data and mbarrier are in different CTAs",
                        warp=w,
                        lane=int(lane),
                        address=found.describe(),
                    )
                offsets = np.arange(offset, offset + size)
                pieces.append((cta, offsets, data[lane], state[lane], found))
        if not reducing:
            pieces = _together(pieces)
        if pieces:
            w.machine.issue(RemoteStore(w, pieces, update if reducing else None))

    return run


def _spread(taint: Array | None, unit: int) -> Array:
    if taint is None:
        return np.zeros((LANES, unit), dtype=bool)
    return np.repeat(taint[:, None], unit, axis=1)


def _together(
    pieces: list[tuple[Cta, Ints, Array, Array, Mbarrier | None]],
) -> list[tuple[Cta, Ints, Array, Array, Mbarrier | None]]:
    """Join the lanes that write to one CTA and signal one mbarrier."""
    found: dict[tuple[int, int], list[tuple[Cta, Ints, Array, Array, Mbarrier | None]]] = {}
    for piece in pieces:
        found.setdefault((id(piece[0]), id(piece[4])), []).append(piece)
    return [
        (
            group[0][0],
            np.concatenate([p[1] for p in group]),
            np.concatenate([p[2] for p in group]),
            np.concatenate([p[3] for p in group]),
            group[0][4],
        )
        for group in found.values()
    ]
