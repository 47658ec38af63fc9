"""st.async and red.async: stores into the cluster that complete on an mbarrier."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np

from build_kernels.binaries.ptx.syntax import TYPE_BITS
from build_kernels.emulator.access.state_spaces import locate
from build_kernels.emulator.execution.cta import Cta
from build_kernels.emulator.execution.operation import Operation
from build_kernels.emulator.execution.warp import Run, Warp
from build_kernels.emulator.instructions.async_writes import signal, target_barrier, write_shared
from build_kernels.emulator.instructions.atom_red import ATOMIC, combine
from build_kernels.emulator.instructions.decoding import Decoder, Decoding, Source, items
from build_kernels.emulator.instructions.generic_access import value_bytes, value_states
from build_kernels.emulator.instructions.mbarrier import find_quietly
from build_kernels.emulator.lanes import Array, Ints, numbers_of
from build_kernels.emulator.memory.memory import POISON, VALID
from build_kernels.emulator.numerics.types import DTYPE
from build_kernels.emulator.ordering.mbarrier import Mbarrier


class Piece(NamedTuple):
    """Bytes for one CTA that complete on one mbarrier; all arrays are [bytes]."""

    cta: Cta
    offsets: Ints
    data: Array
    state: Array
    barrier: Mbarrier | None


class AsyncStore(Operation):
    """st.async or red.async of some lanes: each lane's bytes, then its tx-count.

    PTX treats it as a weak store that a complete-tx releases; it needs no proxy fence.
    """

    what = "asynchronous store"
    proxied = False

    def __init__(
        self,
        warp: Warp,
        pieces: Sequence[Piece],
        update: Callable[[Array, Array], Array] | None,
    ) -> None:
        clock = warp.publish(warp.bits)
        self.reduces = update is not None
        super().__init__(warp, warp.first_lane())
        self.clock = clock
        self.pieces = pieces
        self.update = update
        for piece in pieces:
            self.touches(piece.cta)

    def perform(self) -> None:
        clock = self.completion()
        for cta, offsets, data, state, barrier in self.pieces:
            if self.update is not None:
                data = self.update(cta.shared.data[offsets], data)
                state = np.where(cta.shared.state[offsets] == VALID, state, POISON)
            write_shared(self, cta, offsets, data, state.astype(np.uint8))
            signal(self, barrier, len(offsets), clock)


def async_store(d: Decoding) -> Run:
    reducing = d.name == "red.async"
    kind = d.type()
    d.one_of("weak", "relaxed")
    d.one_of("cluster")
    d.need("shared::cluster")
    d.need("mbarrier::complete_tx::bytes")
    name = d.need(*(n for n in ATOMIC if n != "exch")) if reducing else ""
    count = d.vector("v2", "v4")
    if TYPE_BITS[kind] not in (32, 64):
        raise d.error("takes 32- and 64-bit types")
    where = d.address(d.operands[0])
    sources = [d.source(each, kind) for each in items(d.operands[1])]
    barrier = d.address(d.operands[2])
    if len(sources) != count:
        raise d.error(f"needs {count} values (got {len(sources)})")
    unit = TYPE_BITS[kind] // 8
    dtype = np.dtype(DTYPE[kind])

    def update(old: Array, value: Array) -> Array:
        pairs = zip(old.view(dtype), value.view(dtype), strict=True)
        return np.array([combine(kind, name, a, b) for a, b in pairs], dtype=dtype).view(np.uint8)

    def run(w: Warp) -> None:
        w.poisoned("an address of an asynchronous store", where.registers + barrier.registers)
        pieces = _pieces(w, where.get(w), barrier, sources, unit, together=not reducing)
        if not reducing:
            pieces = _together(pieces)
        if pieces:
            w.grid.issue(AsyncStore(w, pieces, update if reducing else None))

    return run


def _pieces(
    w: Warp, where: Ints, barrier: Source, sources: Sequence[Source], unit: int, *, together: bool
) -> list[Piece]:
    """Return each lane's piece; report a lane whose mbarrier is in another CTA than its data.

    together: lanes of one CTA that signal one mbarrier may make one piece."""
    size = unit * len(sources)
    data = value_bytes(w, sources, unit)
    states = value_states(w, sources, unit)
    if states is None:
        states = np.full(data.shape, VALID, dtype=np.uint8)
    barriers = barrier.get(w).tolist()
    quiet = {at: find_quietly(w, at) for at in {barriers[lane] for lane in numbers_of(w.bits)}}
    pieces = []
    for place in locate(w, "shared::cluster", where, size):
        cta = place.peer or w.cta
        lanes, starts = place.lanes.tolist(), place.offsets.tolist()
        common = quiet[barriers[lanes[0]]]
        if together and common is not None and common.cta is cta:
            if all([barriers[lane] == barriers[lanes[0]] for lane in lanes]):
                offsets, rows = place.bytes(size).reshape(-1), place.lanes
                joined = data[rows].reshape(-1), states[rows].reshape(-1)
                pieces.append(Piece(cta, offsets, *joined, common))
                continue
        for lane, offset in zip(lanes, starts, strict=True):
            at = barriers[lane]
            found = quiet[at] or target_barrier(w, lane, at, proxied=False)
            if found is not None and found.cta is not cta:
                why = "data and mbarrier are in different CTAs"
                w.report("not-own-shared", why, lane=lane, address=found.describe())
            offsets = np.arange(offset, offset + size)
            pieces.append(Piece(cta, offsets, data[lane], states[lane], found))
    return pieces


def _together(pieces: Sequence[Piece]) -> list[Piece]:
    groups: dict[tuple[int, int], list[Piece]] = {}
    for piece in pieces:
        groups.setdefault((id(piece.cta), id(piece.barrier)), []).append(piece)
    return [
        group[0]
        if len(group) == 1
        else Piece(
            group[0].cta,
            np.concatenate([piece.offsets for piece in group]),
            np.concatenate([piece.data for piece in group]),
            np.concatenate([piece.state for piece in group]),
            group[0].barrier,
        )
        for group in groups.values()
    ]


INSTRUCTIONS: dict[str, Decoder] = dict.fromkeys(("st.async", "red.async"), async_store)
