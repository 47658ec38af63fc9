"""atom and red, and what strong operations hand over (PTX ISA, "atom", "red")."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from build_kernels.emulator.execution.warp import LANES, Run, Warp
from build_kernels.emulator.instructions.ld_st import (
    barrier_as_data,
    hints,
    lane_by_lane,
    space_of,
    write_bytes,
)
from build_kernels.emulator.instructions.operands import (
    DTYPE,
    Context,
    Modifiers,
    address,
    destination,
    registers_of,
    source,
)
from build_kernels.emulator.memory.memory import BARRIER, POISON, VALID
from build_kernels.emulator.memory.state_spaces import Place, locate
from build_kernels.emulator.numerics import floats
from build_kernels.emulator.ordering.release import order_of, synchronise_read, synchronise_write
from build_kernels.emulator.ordering.thread_access import ThreadAccess
from build_kernels.emulator.ptx.syntax import TYPE_BITS, Instruction


def _wrap(kind: str, value: int) -> int:
    bits = TYPE_BITS[kind]
    value &= (1 << bits) - 1
    return value - (1 << bits) if kind[0] == "s" and value >> (bits - 1) else value


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
    """The new value of an atomic on one location, as a NumPy scalar of `kind`."""
    dtype = DTYPE[kind]
    if kind in ("f32", "f64"):
        if name == "add":
            return dtype(old + value)
        return ATOMIC[name](old, value)
    if kind in ("f16x2", "bf16x2", "f16", "bf16"):
        raw = DTYPE[kind] if kind != "f16" else np.uint16
        pair = [floats.unpack_halves(kind, np.array([x]).view(raw)) for x in (old, value)]
        return floats.pack_halves(kind, pair[0] + pair[1])[0]
    result = _wrap(kind, ATOMIC[name](int(old), int(value)))
    return np.array(result & ((1 << TYPE_BITS[kind]) - 1), dtype=np.uint64).astype(dtype)


def atomic(ins: Instruction, context: Context) -> Run:
    """atom and red (PTX ISA, "atom"): lanes of a warp act in a scheduled order."""
    if len(ins.words) > 1 and ins.words[1] == "async":
        raise ins.error("handled elsewhere")
    reduce = ins.words[0] == "red"
    mods = Modifiers(ins)
    kind = mods.type()
    order, scope = order_of(mods, "relaxed")
    space = space_of(mods)
    policy = hints(mods)
    name = mods.need("cas", *ATOMIC)
    mods.take("noftz")
    mods.done()
    operands = list(ins.operands)
    write = destination(ins, operands.pop(0), kind) if not reduce else None
    where = address(ins, operands.pop(0), context)
    sources = [source(ins, operand, kind, context) for operand in operands]
    if policy:
        sources.pop()
    if len(sources) != (2 if name == "cas" else 1):
        raise ins.error("has the wrong number of operands")
    if kind in ("f16", "bf16", "f16x2", "bf16x2") and name != "add":
        raise ins.error(f"{name} of .{kind} is not supported")
    size = TYPE_BITS[kind] // 8
    dtype = np.dtype(DTYPE[kind])

    def run(w: Warp) -> None:
        w.machine.events += 1
        w.poisoned("the address", where.registers)
        w.poisoned("an operand of an atomic", registers_of(sources))
        values = [s.get(w) for s in sources]
        result = np.zeros(LANES, dtype=dtype)
        for place in locate(w, space, where.get(w), size):
            memory, offsets = place.memory, place.bytes(size)
            if memory.read_only:
                write_bytes(w, place, offsets, memory.data[offsets], VALID, scope)
                continue
            if (memory.state[offsets] == POISON).any():
                w.machine.report(
                    "poison",
                    "an atomic reads memory that was never written",
                    warp=w,
                    lane=int(place.lanes[0]),
                    address=memory.describe(int(place.offsets[0])),
                )
            if (memory.state[offsets] == BARRIER).any():
                barrier_as_data(w, place, memory.state[offsets])
            access = ThreadAccess(w, np.repeat(place.lanes, size), scope)
            memory.note_write(offsets.reshape(-1), access)
            turns = list(range(len(place.lanes)))
            if w.machine.schedule.policy == "random":
                w.machine.random.shuffle(turns)
            for i in turns:
                lane = int(place.lanes[i])
                old = memory.data[offsets[i]].view(dtype)[0]
                result[lane] = old
                if name == "cas":
                    new = values[1][lane] if old == values[0][lane] else old
                else:
                    new = combine(kind, name, old, values[0][lane])
                memory.data[offsets[i]] = np.array([new], dtype=dtype).view(np.uint8)
                one = Place(memory, place.lanes[i : i + 1], place.offsets[i : i + 1])
                synchronise_read(w, one, order in ("acquire", "acq_rel"), scope)
                synchronise_write(w, one, order in ("release", "acq_rel"), scope, rmw=True)
            memory.state[offsets] = VALID
        if write is not None:
            write(w, result, None)

    return lane_by_lane(run) if scope else run
