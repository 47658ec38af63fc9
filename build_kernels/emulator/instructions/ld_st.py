"""Loads and stores through the generic proxy (PTX ISA, "Data Movement")."""

from __future__ import annotations

import numpy as np

from build_kernels.emulator.execution.warp import (
    LANES,
    Array,
    Mask,
    Outcome,
    Partial,
    Run,
    Warp,
    indices_of,
    lanes_of,
)
from build_kernels.emulator.instructions.operands import (
    DTYPE,
    Context,
    Modifiers,
    address,
    destination,
    items,
    registers_of,
    source,
)
from build_kernels.emulator.memory.memory import BARRIER, POISON, VALID
from build_kernels.emulator.memory.state_spaces import SPACES, Place, locate
from build_kernels.emulator.ordering.clocks import Ints
from build_kernels.emulator.ordering.release import order_of, synchronise_read, synchronise_write
from build_kernels.emulator.ordering.thread_access import ThreadAccess
from build_kernels.emulator.ptx.syntax import TYPE_BITS, Address, Instruction

PARTED = 0.25  # share of strong accesses whose lanes do not act at one moment

MAX_REST = 4  # turns of its warp that the rest of such an access may pass over

POLL_COST = 50  # instructions' worth of turn that a strong load uses up, so that polls yield

CACHE_HINTS = ("ca", "cg", "cs", "lu", "cv", "wb", "wt")


def hints(mods: Modifiers) -> bool:
    """Drop words that steer caches only; True when an L2 cache-policy operand follows."""
    mods.one_of(*CACHE_HINTS)
    policy = False
    for word in list(mods.left):
        if word.startswith(("L1::", "L2::")):
            mods.left.remove(word)
            policy |= word == "L2::cache_hint"
    return policy


def lane_by_lane(run: Run) -> Run:
    """Let the lanes of a strong access act at different moments, under random schedules.

    PTX orders nothing between threads of a warp, so others may see what some of a store's lanes
    have written and the rest have not. (Of a weak access they cannot without a race.)"""

    def some(w: Warp) -> Outcome:
        machine = w.machine
        count = w.bits.bit_count()
        random = machine.random
        if machine.schedule.policy != "random" or count == 1 or random.random() >= PARTED:
            return run(w)
        every = w.bits
        # One comes first, one comes last, or half of them do: what is left may part again.
        now = random.choice((1, count // 2, count - 1))
        w.bits = sum(1 << lane for lane in random.sample(indices_of(every).tolist(), now))
        w.active = lanes_of(w.bits)
        run(w)
        return Partial(every & ~w.bits, random.randrange(MAX_REST))

    return some


def space_of(mods: Modifiers) -> str:
    return mods.one_of(*SPACES) or ""


def load(ins: Instruction, context: Context) -> Run:
    mods = Modifiers(ins)
    kind = mods.type()
    order, scope = order_of(mods, "weak")
    space = space_of(mods)
    mods.take("nc")
    policy = hints(mods)
    count = int((mods.one_of("v2", "v4", "v8") or "v1")[1:])
    mods.done()
    if len(ins.operands) != 2 + policy or order in ("release", "acq_rel"):
        raise ins.error("not a form of ld that the emulator knows")
    if space == "param" and isinstance(ins.operands[1], Address):
        where = address(ins, ins.operands[1], context)
    else:
        where = address(ins, ins.operands[1], context)
    targets = items(ins.operands[0])
    if len(targets) != count:
        raise ins.error(f"needs {count} destinations (got {len(targets)})")
    writes = [destination(ins, target, kind) for target in targets]
    unit = TYPE_BITS[kind] // 8
    size = unit * count
    dtype = DTYPE[kind]

    def run(w: Warp) -> None:
        w.poisoned("the address", where.registers)
        data = np.full((LANES, size), 0xFF, dtype=np.uint8)
        bad = np.zeros((LANES, size), dtype=bool)
        bad[w.active] = True
        for place in locate(w, space, where.get(w), size):
            offsets = place.bytes(size)
            flat = offsets.reshape(-1)
            place.memory.note_read(flat, ThreadAccess(w, np.repeat(place.lanes, size), scope))
            data[place.lanes] = place.memory.data[offsets]
            state = place.memory.state[offsets]
            if (state == BARRIER).any():
                barrier_as_data(w, place, state)
            bad[place.lanes] = state == POISON
            if scope:
                synchronise_read(w, place, order == "acquire", scope)
                w.budget -= POLL_COST
        values = data.view(dtype)
        poison = bad.any()
        for i, write in enumerate(writes):
            taint: Mask | None = None
            if poison:
                mine: Mask = np.logical_or.reduce(bad[:, i * unit : (i + 1) * unit], axis=1)
                taint = mine if mine.any() else None
            write(w, np.ascontiguousarray(values[:, i]), taint)

    return lane_by_lane(run) if scope else run


def barrier_as_data(w: Warp, place: Place, state: Array) -> None:
    at = int(np.flatnonzero((state == BARRIER).any(axis=1))[0])
    w.machine.report(
        "mbarrier-as-data",
        "an ordinary access to a live mbarrier object",
        warp=w,
        lane=int(place.lanes[at]),
        address=place.memory.describe(int(place.offsets[at])),
    )


def store(ins: Instruction, context: Context) -> Run:
    if len(ins.words) > 1 and ins.words[1] in ("async", "bulk"):
        raise ins.error("handled elsewhere")
    mods = Modifiers(ins)
    kind = mods.type()
    order, scope = order_of(mods, "weak")
    space = space_of(mods)
    policy = hints(mods)
    count = int((mods.one_of("v2", "v4", "v8") or "v1")[1:])
    mods.done()
    if len(ins.operands) != 2 + policy or order in ("acquire", "acq_rel"):
        raise ins.error("not a form of st that the emulator knows")
    where = address(ins, ins.operands[0], context)
    sources = [source(ins, operand, kind, context) for operand in items(ins.operands[1])]
    if len(sources) != count:
        raise ins.error(f"needs {count} sources (got {len(sources)})")
    unit = TYPE_BITS[kind] // 8
    size = unit * count

    def run(w: Warp) -> None:
        w.machine.events += 1
        w.poisoned("the address", where.registers)
        parts = [
            np.ascontiguousarray(s.get(w)).view(np.uint8).reshape(LANES, unit) for s in sources
        ]
        taints = [w.taint(s.registers) for s in sources]
        data = np.concatenate(parts, axis=1) if count > 1 else parts[0]
        clean = all(taint is None for taint in taints)
        for place in locate(w, space, where.get(w), size):
            memory, offsets = place.memory, place.bytes(size)
            state: Array | int = VALID
            if not clean:
                state = np.concatenate(
                    [
                        np.repeat(
                            np.where(
                                False if taint is None else taint[place.lanes], POISON, VALID
                            ).reshape(-1, 1)
                            * np.ones((len(place.lanes), 1), dtype=np.int64),
                            unit,
                            axis=1,
                        )
                        for taint in taints
                    ],
                    axis=1,
                ).astype(np.uint8)
            write_bytes(w, place, offsets, data[place.lanes], state, scope)
            if scope:
                synchronise_write(w, place, order == "release", scope, rmw=False)
            elif w.machine.released:
                for offset in place.offsets:
                    w.machine.released.pop((memory, int(offset)), None)
        if not clean and space in ("", "global"):
            w.poisoned("a value stored to global memory", registers_of(sources))

    return lane_by_lane(run) if scope else run


def write_bytes(
    w: Warp, place: Place, offsets: Ints, data: Array, state: Array | int, scope: int
) -> None:
    """Store lanes' bytes, with all checks of a write through the generic proxy."""
    memory = place.memory
    if memory.read_only:
        w.machine.report(
            "read-only",
            "a store to memory that the launch declares read-only",
            warp=w,
            lane=int(place.lanes[0]),
            address=memory.describe(int(place.offsets[0])),
        )
        return
    old = memory.state[offsets]
    if (old == BARRIER).any():
        barrier_as_data(w, place, old)
    flat = offsets.reshape(-1)
    size = offsets.shape[1]
    access = ThreadAccess(w, np.repeat(place.lanes, size), scope)
    memory.note_write(flat, access)
    memory.data[offsets] = data
    memory.state[offsets] = state
    if memory.tracked and not scope:
        clash = memory.data[offsets] != data
        if clash.any():
            row = int(np.flatnonzero(clash.any(axis=1))[0])
            w.machine.report(
                "race",
                "two lanes of one store write different values to one location",
                warp=w,
                lane=int(place.lanes[row]),
                address=memory.describe(int(place.offsets[row])),
                other=w.instruction,
            )
