"""Loads, stores, atomics and address arithmetic through the generic proxy (PTX ISA 9.7.9)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from build_kernels.emulator import floats
from build_kernels.emulator.clocks import (
    CLUSTER_SCOPE,
    CTA_SCOPE,
    GENERIC,
    GPU_SCOPE,
    WEAK,
    Clock,
    join,
)
from build_kernels.emulator.memory import (
    BARRIER,
    LOCAL_WINDOW,
    PARAMETER_WINDOW,
    POISON,
    SHARED_RANK_SHIFT,
    SHARED_RESERVED,
    SHARED_WINDOW,
    VALID,
    WINDOW_MASK,
    Memory,
)
from build_kernels.emulator.operands import (
    DTYPE,
    Context,
    Modifiers,
    address,
    destination,
    items,
    registers_of,
    source,
)
from build_kernels.emulator.ptx import TYPE_BITS, Address, Instruction
from build_kernels.emulator.warp import LANES, Mask, Outcome, ThreadAccess, Warp, indices_of

if TYPE_CHECKING:
    from build_kernels.emulator.machine import Cta

Array = NDArray[Any]
Ints = NDArray[np.int64]
Run = Callable[[Warp], Outcome]
SPACES = ("global", "shared", "shared::cta", "shared::cluster", "local", "param", "const")
SCOPES = {"cta": CTA_SCOPE, "cluster": CLUSTER_SCOPE, "gpu": GPU_SCOPE, "sys": GPU_SCOPE}
POLL_COST = 50  # instructions' worth of turn that a strong load uses up, so that polls yield
CACHE_HINTS = ("ca", "cg", "cs", "lu", "cv", "wb", "wt")


@dataclass(frozen=True)
class Place:
    """Where some lanes' addresses lead: one memory, an offset for each lane."""

    memory: Memory
    lanes: Ints
    offsets: Ints
    peer: Cta | None = None

    def bytes(self, size: int) -> Ints:
        """[lanes, size] offsets of the touched bytes."""
        return self.offsets[:, None] + np.arange(size)


def locate(w: Warp, space: str, addresses: Ints, size: int) -> list[Place]:
    """Resolve the active lanes' addresses; what leads nowhere is reported and left out."""
    lanes = indices_of(w.bits)
    found = addresses[lanes]
    if size & (size - 1) == 0 and (found & (size - 1)).any():
        at = int(np.flatnonzero(found & (size - 1))[0])
        w.machine.report(
            "misaligned",
            f"an access of {size} bytes at an address that is no multiple of it",
            warp=w,
            lane=int(lanes[at]),
            address=f"{int(found[at]):#x}",
        )
    if not space:
        return _generic(w, lanes, found, size)
    if space == "global" or space == "const":
        return _global(w, lanes, found, size)
    if space.startswith("shared"):
        return _shared(w, lanes, found, size, own=space != "shared::cluster")
    if space == "local":
        return [Place(w.cta.machine.local(w), lanes, lanes * w.machine.local_bytes + found)]
    return [Place(w.machine.parameters, lanes, found)]


def _generic(w: Warp, lanes: Ints, found: Ints, size: int) -> list[Place]:
    windows = found & WINDOW_MASK
    places = []
    for window in np.unique(windows):
        mine = windows == window
        inner = found[mine] & ~np.int64(WINDOW_MASK)
        if window == SHARED_WINDOW:
            places += _shared(w, lanes[mine], inner, size, own=False)
        elif window == LOCAL_WINDOW:
            offsets = lanes[mine] * w.machine.local_bytes + inner
            places.append(Place(w.machine.local(w), lanes[mine], offsets))
        elif window == PARAMETER_WINDOW:
            places.append(Place(w.machine.parameters, lanes[mine], inner))
        else:
            places += _global(w, lanes[mine], found[mine], size)
    return places


def _global(w: Warp, lanes: Ints, found: Ints, size: int) -> list[Place]:
    places = []
    while len(lanes):
        memory = w.machine.memory.find(int(found[0]))
        if memory is None:
            memory = w.machine.memory.arrays[0] if w.machine.memory.arrays else None
        start = memory.base if memory else 0
        end = start + memory.size if memory else 0
        inside = (found >= start) & (found + size <= end)
        if memory is None or not inside[0]:
            near = memory.describe(int(found[0]) - start) if memory else f"{int(found[0]):#x}"
            w.machine.report(
                "out-of-bounds",
                f"an access of {size} bytes outside every argument array"
                + (f" ({memory.name} has {memory.size})" if memory else ""),
                warp=w,
                lane=int(lanes[0]),
                address=near,
            )
            lanes, found = lanes[1:], found[1:]
            continue
        if memory.dependent:
            check_dependent(w, memory)
        places.append(Place(memory, lanes[inside], found[inside] - start))
        lanes, found = lanes[~inside], found[~inside]
    return places


def check_dependent(w: Warp, memory: Memory) -> None:
    """Data of the grid before this one may be touched only behind griddepcontrol.wait."""
    for clock, bits in w.groups_of(w.bits):
        if not clock[GENERIC, w.machine.clocks.predecessor]:
            w.machine.report(
                "missing-griddepcontrol-wait",
                f"{memory.name} belongs to the grid before, and no griddepcontrol.wait is "
                "ordered before this",
                warp=w,
                lane=int(indices_of(bits)[0]),
            )
            return


def _shared(w: Warp, lanes: Ints, found: Ints, size: int, own: bool) -> list[Place]:
    ranks = found >> SHARED_RANK_SHIFT
    offsets = found & ((1 << SHARED_RANK_SHIFT) - 1)
    places = []
    for rank in np.unique(ranks) if (ranks != ranks[0]).any() else ranks[:1]:
        mine = ranks == rank
        peers = w.cta.cluster.ctas
        good = mine & (offsets >= SHARED_RESERVED) & (offsets + size <= w.cta.shared_end)
        if not 0 <= rank < len(peers):
            good = np.zeros_like(mine)
        if (mine & ~good).any():
            bad = int(np.flatnonzero(mine & ~good)[0])
            w.machine.report(
                "out-of-bounds",
                f"an access of {size} bytes outside the CTA's shared memory "
                f"({SHARED_RESERVED:#x}..{w.cta.shared_end:#x})",
                warp=w,
                lane=int(lanes[bad]),
                address=f"shared {int(found[bad]):#x}",
            )
        if not good.any():
            continue
        peer = peers[int(rank)]
        if peer is not w.cta and not reach(w, peer, int(lanes[good][0]), own):
            continue
        places.append(
            Place(peer.shared, lanes[good], offsets[good], None if peer is w.cta else peer)
        )
    return places


def reach(w: Warp, peer: Cta, lane: int, own: bool) -> bool:
    """Check an access to a peer CTA's shared memory; False when it is gone."""
    where = f"shared memory of cta {peer.index}"
    if own:
        w.machine.report(
            "not-own-shared",
            "a .shared::cta address leads to another CTA",
            warp=w,
            lane=lane,
            address=where,
        )
    if peer.exited:
        w.machine.report(
            "exited-peer", "the CTA has exited", warp=w, lane=lane, address=where
        )
        return False
    if not w.machine.started(w, peer, lane):
        w.machine.report(
            "peer-not-started",
            "nothing orders the start of the peer CTA before this (no cluster barrier)",
            warp=w,
            lane=lane,
            address=where,
        )
    return True


@dataclass
class Released:
    """What the last strong write of a location handed over, at which scope, by whom."""

    clock: Clock
    scope: int
    cta: Cta


def _reaches(entry: Released, scope: int, cta: Cta) -> bool:
    scope = min(scope, entry.scope)
    if scope == CTA_SCOPE:
        return entry.cta is cta
    if scope == CLUSTER_SCOPE:
        return entry.cta.cluster is cta.cluster
    return True


def synchronise_read(w: Warp, place: Place, acquire: bool, scope: int) -> None:
    """Strong loads learn what the location's last strong store released."""
    for lane, offset in zip(place.lanes, place.offsets, strict=True):
        entry = w.machine.released.get((place.memory, int(offset)))
        if entry is None or not _reaches(entry, scope, w.cta):
            continue
        bit = 1 << int(lane)
        if acquire:
            w.acquire(bit, entry.clock)
        else:
            before = w.unfenced[lane]
            w.unfenced[lane] = entry.clock if before is None else join(before, entry.clock)


def synchronise_write(w: Warp, place: Place, release: bool, scope: int, rmw: bool) -> None:
    """Strong stores hand over what the lane knows; a read-modify-write keeps what was there."""
    for lane, offset in zip(place.lanes, place.offsets, strict=True):
        key = (place.memory, int(offset))
        clock = w.publish(1 << int(lane), release)
        before = w.machine.released.get(key)
        if rmw and before is not None:
            clock = join(before.clock, clock)
        w.machine.released[key] = Released(clock, scope, w.cta)


def _order(mods: Modifiers, default: str) -> tuple[str, int]:
    """The memory order and the scope (WEAK for weak accesses)."""
    order = mods.one_of("weak", "relaxed", "acquire", "release", "acq_rel", "volatile") or default
    scope = mods.one_of(*SCOPES)
    if order == "volatile":
        return "relaxed", GPU_SCOPE
    if order == "weak":
        return order, WEAK
    return order, SCOPES[scope] if scope else GPU_SCOPE


def _hints(mods: Modifiers) -> bool:
    """Drop words that steer caches only; True when an L2 cache-policy operand follows."""
    mods.one_of(*CACHE_HINTS)
    policy = False
    for word in list(mods.left):
        if word.startswith(("L1::", "L2::")):
            mods.left.remove(word)
            policy |= word == "L2::cache_hint"
    return policy


def _space(mods: Modifiers) -> str:
    return mods.one_of(*SPACES) or ""


def load(ins: Instruction, context: Context) -> Run:
    mods = Modifiers(ins)
    kind = mods.type()
    order, scope = _order(mods, "weak")
    space = _space(mods)
    mods.take("nc")
    policy = _hints(mods)
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
            place.memory.note_read(
                flat, ThreadAccess(w, np.repeat(place.lanes, size), scope)
            )
            data[place.lanes] = place.memory.data[offsets]
            state = place.memory.state[offsets]
            if (state == BARRIER).any():
                _barrier_as_data(w, place, state)
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

    return run


def _barrier_as_data(w: Warp, place: Place, state: Array) -> None:
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
    order, scope = _order(mods, "weak")
    space = _space(mods)
    policy = _hints(mods)
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

    return run


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
        _barrier_as_data(w, place, old)
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
    """atom and red (PTX ISA 9.7.13, "atom"): lanes of a warp act in a scheduled order."""
    if len(ins.words) > 1 and ins.words[1] == "async":
        raise ins.error("handled elsewhere")
    reduce = ins.words[0] == "red"
    mods = Modifiers(ins)
    kind = mods.type()
    order, scope = _order(mods, "relaxed")
    space = _space(mods)
    policy = _hints(mods)
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
                _barrier_as_data(w, place, memory.state[offsets])
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

    return run


def convert_address(ins: Instruction, context: Context) -> Run:
    """cvta: between a state space's addresses and generic ones."""
    mods = Modifiers(ins)
    kind = mods.type()
    to = mods.take("to")
    space = mods.need(*SPACES)
    mods.done()
    window = {"local": LOCAL_WINDOW, "param": PARAMETER_WINDOW}.get(space, 0)
    if space.startswith("shared"):
        window = SHARED_WINDOW
    inner = source(ins, ins.operands[1], kind, context)
    write = destination(ins, ins.operands[0], kind)
    offset = DTYPE[kind](window)

    def run(w: Warp) -> None:
        value = inner.get(w)
        write(w, value - offset if to else value + offset, w.taint(inner.registers))

    return run


def map_address(ins: Instruction, context: Context) -> Run:
    """mapa: the address of the same variable in another CTA of the cluster."""
    mods = Modifiers(ins)
    kind = mods.type()
    shared = mods.one_of("shared::cluster") is not None
    mods.done()
    inner = source(ins, ins.operands[1], kind, context)
    rank = source(ins, ins.operands[2], "u32", context)
    write = destination(ins, ins.operands[0], kind)
    dtype = DTYPE[kind]
    low = dtype((1 << SHARED_RANK_SHIFT) - 1)
    window = dtype(0 if shared else SHARED_WINDOW)
    registers = inner.registers + rank.registers

    def run(w: Warp) -> None:
        ranks = rank.get(w)
        size = len(w.cta.cluster.ctas)
        if (ranks[w.active] >= size).any():
            w.machine.report(
                "out-of-bounds", f"mapa to a rank outside the cluster of {size}", warp=w
            )
        base = (inner.get(w) & low) + (ranks.astype(dtype) << dtype(SHARED_RANK_SHIFT))
        write(w, base + window, w.taint(registers))

    return run


def rank_of_address(ins: Instruction, context: Context) -> Run:
    """getctarank: the cluster rank in a shared::cluster address."""
    mods = Modifiers(ins)
    kind = mods.type()
    mods.take("shared::cluster")
    mods.done()
    inner = source(ins, ins.operands[1], kind, context)
    write = destination(ins, ins.operands[0], "u32")
    dtype = DTYPE[kind]

    def run(w: Warp) -> None:
        ranks = (inner.get(w) & dtype(0xFFFFFFFF)) >> dtype(SHARED_RANK_SHIFT)
        write(w, ranks.astype(np.uint32), w.taint(inner.registers))

    return run


def is_space(ins: Instruction, context: Context) -> Run:
    mods = Modifiers(ins)
    space = mods.need(*SPACES)
    mods.done()
    inner = source(ins, ins.operands[1], "u64", context)
    write = destination(ins, ins.operands[0], "pred")
    window = {"local": LOCAL_WINDOW, "param": PARAMETER_WINDOW}.get(space, 0)
    if space.startswith("shared"):
        window = SHARED_WINDOW

    def run(w: Warp) -> None:
        found = inner.get(w).astype(np.int64)
        holds = (found & WINDOW_MASK) == window
        if space in ("shared", "shared::cta"):
            holds &= ((found & 0xFFFFFFFF) >> SHARED_RANK_SHIFT) == w.cta.rank
        write(w, holds, w.taint(inner.registers))

    return run


def prefetch(ins: Instruction, context: Context) -> Run:
    """prefetch, prefetchu, discard, applypriority, createpolicy-free hints: no effect on values."""
    mods = Modifiers(ins)
    if mods.take("tensormap"):
        mods.one_of("param", "const")
    else:
        mods.one_of("global", "local")
        mods.need("L1", "L2", "L2::evict_last", "L2::evict_normal")
    mods.done()
    where = address(ins, ins.operands[0], context)
    tensor_map = "tensormap" in ins.words

    def run(w: Warp) -> None:
        w.poisoned("the address", where.registers)
        if tensor_map:
            lane = w.first_lane()
            w.machine.tensor_map(w, int(where.get(w)[lane]), lane)

    return run


def create_policy(ins: Instruction, context: Context) -> Run:
    """createpolicy.fractional: an opaque value that steers caches only."""
    mods = Modifiers(ins)
    mods.need("fractional")
    mods.need("b64")
    for word in list(mods.left):
        if word.startswith("L2::"):
            mods.left.remove(word)
    mods.done()
    write = destination(ins, ins.operands[0], "b64")
    zeros = np.zeros(LANES, dtype=np.uint64)
    return lambda w: write(w, zeros, None)


DECODERS: dict[str, Callable[[Instruction, Context], Run]] = {
    "ld": load,
    "ldu": load,
    "st": store,
    "atom": atomic,
    "red": atomic,
    "cvta": convert_address,
    "mapa": map_address,
    "getctarank": rank_of_address,
    "isspacep": is_space,
    "prefetch": prefetch,
    "createpolicy": create_policy,
}
