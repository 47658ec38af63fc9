"""atom and red (PTX ISA, "atom", "red")."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from build_kernels.binaries.ptx.syntax import TYPE_BITS, Sink
from build_kernels.emulator.access.release import synchronise_read, synchronise_write
from build_kernels.emulator.access.staleness import remember
from build_kernels.emulator.access.state_spaces import Place, locate
from build_kernels.emulator.execution.warp import Run, Warp
from build_kernels.emulator.instructions.decoding import Decoder, Decoding, registers_of
from build_kernels.emulator.instructions.generic_access import (
    access_of,
    check_no_barrier,
    check_writable,
    lane_by_lane,
)
from build_kernels.emulator.lanes import LANES, Array
from build_kernels.emulator.memory.memory import POISON, VALID
from build_kernels.emulator.numerics import floats
from build_kernels.emulator.numerics.types import DTYPE, FLOATS, HALVES

ATOMIC: dict[str, Callable[[Any, Any], Any]] = {
    "add": lambda old, v: old + v,
    "min": min,
    "max": max,
    "and": lambda old, v: old & v,
    "or": lambda old, v: old | v,
    "xor": lambda old, v: old ^ v,
    "exch": lambda old, v: v,
    "inc": lambda old, v: 0 if old >= v else old + 1,
    "dec": lambda old, v: v if old == 0 or old > v else old - 1,
}


def combine(kind: str, name: str, old: Any, value: Any) -> Any:
    """Return the new value of an atomic on one location, as a NumPy scalar of `kind`."""
    dtype = DTYPE[kind]
    if kind in FLOATS:
        return dtype(old + value) if name == "add" else ATOMIC[name](old, value)
    if kind in HALVES:
        raw = DTYPE[kind] if kind != "f16" else np.uint16
        pair = [floats.unpack_halves(kind, np.array([x]).view(raw)) for x in (old, value)]
        return floats.pack_halves(kind, pair[0] + pair[1])[0]
    mask = (1 << TYPE_BITS[kind]) - 1
    return np.array(ATOMIC[name](int(old), int(value)) & mask, dtype=np.uint64).astype(dtype)


@dataclass(frozen=True)
class Update:
    """The read-modify-write of one location by one lane; name "cas" compares first."""

    kind: str
    name: str
    order: str
    scope: int

    def apply(self, w: Warp, place: Place, turn: int, values: list[Array]) -> Any:
        """Let the lane of a turn act; return the old value."""
        memory, lane = place.memory, int(place.lanes[turn])
        dtype = np.dtype(DTYPE[self.kind])
        at = slice(int(place.offsets[turn]), int(place.offsets[turn]) + dtype.itemsize)
        old = memory.data[at].view(dtype)[0]
        if self.name == "cas":
            new = values[1][lane] if old == values[0][lane] else old
        else:
            new = combine(self.kind, self.name, old, values[0][lane])
        one = Place(memory, place.lanes[turn : turn + 1], place.offsets[turn : turn + 1])
        remember(w, one, one.bytes(dtype.itemsize), dtype.itemsize)
        memory.data[at] = np.array([new], dtype=dtype).view(np.uint8)
        synchronise_read(w, one, self.order in ("acquire", "acq_rel"), self.scope)
        synchronise_write(w, one, self.order in ("release", "acq_rel"), self.scope, rmw=True)
        return old


def atomic(d: Decoding) -> Run:
    kind = d.type()
    order, scope = d.order("relaxed")
    space = d.space()
    policy = d.cache_hints()
    update = Update(kind, d.need("cas", *ATOMIC), order, scope)
    d.take("noftz")
    operands = list(d.operands)
    write = d.destination(Sink() if d.name == "red" else operands.pop(0), kind)
    where = d.address(operands.pop(0))
    sources = [d.source(operand, kind) for operand in operands]
    if policy:
        sources.pop()
    if len(sources) != (2 if update.name == "cas" else 1):
        raise d.error("has the wrong number of operands")
    if kind in HALVES and update.name != "add":
        raise d.error(f"{update.name} of .{kind} is not supported")
    size = TYPE_BITS[kind] // 8

    def run(w: Warp) -> None:
        w.grid.events += 1
        w.poisoned("the address", where.registers)
        w.poisoned("an operand of an atomic", registers_of(sources))
        values = [s.get(w) for s in sources]
        result = np.zeros(LANES, dtype=DTYPE[kind])
        for place in locate(w, space, where.get(w), size):
            if not check_writable(w, place):
                continue
            _touch(w, place, size, scope)
            turns = list(range(len(place.lanes)))
            if w.grid.schedule.policy == "random":
                w.grid.random.shuffle(turns)
            for turn in turns:
                result[int(place.lanes[turn])] = update.apply(w, place, turn, values)
            place.memory.state[place.bytes(size)] = VALID
        write(w, result, None)

    return lane_by_lane(run) if scope else run


def _touch(w: Warp, place: Place, size: int, scope: int) -> None:
    memory, offsets = place.memory, place.bytes(size)
    if (memory.state[offsets] == POISON).any():
        w.report(
            "poison",
            "an atomic reads memory that was never written",
            lane=int(place.lanes[0]),
            address=memory.describe(int(place.offsets[0])),
        )
    check_no_barrier(w, place, memory.state[offsets])
    access = access_of(w, place, size, scope)
    memory.note_write(offsets.reshape(-1), access)


INSTRUCTIONS: dict[str, Decoder] = dict.fromkeys(("atom", "red"), atomic)
