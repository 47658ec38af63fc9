"""ld and st (PTX ISA, "ld", "st")."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from build_kernels.binaries.ptx.syntax import TYPE_BITS
from build_kernels.emulator.access.release import synchronise_read, synchronise_write
from build_kernels.emulator.access.staleness import forget, read_old, remember
from build_kernels.emulator.access.state_spaces import locate
from build_kernels.emulator.execution.cta import Released
from build_kernels.emulator.execution.interruption import Interruption
from build_kernels.emulator.execution.warp import Run, Warp
from build_kernels.emulator.instructions.decoding import (
    Decoder,
    Decoding,
    Destination,
    Source,
    items,
    registers_of,
)
from build_kernels.emulator.instructions.elementwise import Elementwise, same
from build_kernels.emulator.instructions.generic_access import (
    lane_by_lane,
    note_read,
    read_states,
    value_bytes,
    value_states,
    write_bytes,
)
from build_kernels.emulator.lanes import LANES, Array, Mask, any_of
from build_kernels.emulator.memory.memory import POISON_BYTE, VALID
from build_kernels.emulator.numerics.types import DTYPE

POLL_COST = 50  # instructions' worth of turn that a strong load uses up, so that polls yield


def load(d: Decoding) -> Run:
    kind = d.type()
    order, scope = d.order("weak")
    space = d.space()
    d.take("nc")
    policy = d.cache_hints()
    count = d.vector("v2", "v4", "v8")
    if len(d.operands) != 2 + policy or order in ("release", "acq_rel"):
        raise d.error("not a form of ld that the emulator supports")
    where = d.address(d.operands[1])
    targets = items(d.operands[0])
    if len(targets) != count:
        raise d.error(f"needs {count} destinations (got {len(targets)})")
    writes = [d.destination(target, kind) for target in targets]
    unit = TYPE_BITS[kind] // 8
    size = unit * count
    dtype = DTYPE[kind]

    def run(w: Warp) -> None:
        w.poisoned("the address", where.registers)
        data = bad = None
        for place in locate(w, space, where.get(w), size):
            offsets = place.bytes(size)
            note_read(w, place, offsets, scope)
            found, poison = place.memory.data[offsets], read_states(w, place, offsets)
            if scope:
                old: dict[int, Released | None] = {}
                if place.memory.old is not None:
                    found, poison, old = read_old(w, place, offsets, found, poison, unit)
                synchronise_read(w, place, order == "acquire", scope, old)
                w.budget -= POLL_COST
            if len(found) == LANES:
                data, bad = found, poison
                continue
            if data is None or bad is None:
                data = np.full((LANES, size), POISON_BYTE, dtype=np.uint8)
                bad = np.zeros((LANES, size), dtype=bool)
                bad[w.active] = True
            data[place.lanes] = found
            bad[place.lanes] = False if poison is None else poison
        if data is None:
            data = np.full((LANES, size), POISON_BYTE, dtype=np.uint8)
            bad = np.repeat(w.active[:, None], size, axis=1)
        values = data.view(dtype)
        poisoned = bad is not None and any_of(bad)
        for i, write in enumerate(writes):
            taint: Mask | None = None
            if poisoned and bad is not None:
                mine: Mask = np.logical_or.reduce(bad[:, i * unit : (i + 1) * unit], axis=1)
                taint = mine if mine.any() else None
            write(w, np.ascontiguousarray(values[:, i]), taint)

    at = where.constant
    if space == "param" and isinstance(at, int) and at % size == 0 and not scope:
        if at + size <= d.context.parameter_bytes:
            return Elementwise([_parameter(at, kind, count)], writes, same)
    return lane_by_lane(run) if scope else Load(run, where.registers, writes, dtype)


class Load:
    """A weak load; registers: those of its address."""

    def __init__(
        self, run: Run, registers: Sequence[int], targets: Sequence[Destination], dtype: Any
    ) -> None:
        self._run = run
        self.registers = registers
        self.targets = targets
        self._dtype = dtype

    def __call__(self, w: Warp) -> Interruption:
        return self._run(w)

    def values(self, data: Array) -> list[Array]:
        """Return what each target holds after a load of [32, bytes]."""
        found = data.view(self._dtype)
        return [np.ascontiguousarray(found[:, i]) for i in range(len(self.targets))]


def _parameter(at: int, kind: str, count: int) -> Source:
    """Return a parameter as a source, or the elements of a vector in a tuple."""
    size = TYPE_BITS[kind] // 8

    # A write of a register is known by its new array.
    if count == 1:
        return Source(lambda w: w.grid.parameter(at, kind).view())
    places = [at + i * size for i in range(count)]
    return Source(lambda w: tuple([w.grid.parameter(place, kind).view() for place in places]))


def store(d: Decoding) -> Run:
    kind = d.type()
    order, scope = d.order("weak")
    space = d.space()
    policy = d.cache_hints()
    count = d.vector("v2", "v4", "v8")
    if len(d.operands) != 2 + policy or order in ("acquire", "acq_rel"):
        raise d.error("not a form of st that the emulator supports")
    where = d.address(d.operands[0])
    sources = [d.source(operand, kind) for operand in items(d.operands[1])]
    if len(sources) != count:
        raise d.error(f"needs {count} sources (got {len(sources)})")
    unit = TYPE_BITS[kind] // 8
    size = unit * count

    def run(w: Warp) -> None:
        w.grid.events += 1
        w.poisoned("the address", where.registers)
        states = value_states(w, sources, unit)  # first: it ends loads that nothing waited for
        data = value_bytes(w, sources, unit)
        for place in locate(w, space, where.get(w), size):
            state = VALID if states is None else states[place.lanes]
            offsets = place.bytes(size)
            if scope:
                remember(w, place, offsets, unit)
            else:
                forget(place, offsets)
            write_bytes(w, place, offsets, data[place.lanes], state, scope)
            if scope:
                synchronise_write(w, place, order == "release", scope, rmw=False)
            elif w.grid.released:
                for offset in place.offsets:
                    w.grid.released.pop((place.memory, int(offset)), None)
        if states is not None and space in ("", "global"):
            w.poisoned("a value stored to global memory", registers_of(sources))

    return lane_by_lane(run) if scope else run


INSTRUCTIONS: dict[str, Decoder] = {**dict.fromkeys(("ld", "ldu"), load), "st": store}
