"""mbarrier instructions (PTX ISA, "mbarrier")."""

from __future__ import annotations

import numpy as np

from build_kernels.binaries.ptx.syntax import Address, Immediate, Sink
from build_kernels.emulator.access.state_spaces import has_started, reach
from build_kernels.emulator.access.thread_access import ThreadAccess
from build_kernels.emulator.execution.interruption import Interruption, Wait
from build_kernels.emulator.execution.warp import Run, Warp
from build_kernels.emulator.instructions.decoding import Decoder, Decoding, Source
from build_kernels.emulator.lanes import LANES, Array, Mask, any_of, indices_of, lowest
from build_kernels.emulator.memory.memory import BARRIER, POISON
from build_kernels.emulator.memory.windows import SHARED_ADDRESS, SHARED_RESERVED, split_shared
from build_kernels.emulator.ordering.mbarrier import MAX_COUNT, Mbarrier

SIZE = 8


def take_order(d: Decoding) -> bool:
    order = d.one_of("relaxed", "release", "acquire")
    d.one_of("cta", "cluster")
    return order != "relaxed"


def find(w: Warp, where: int, lane: int, *, local: bool) -> Mbarrier | None:
    """Return the mbarrier at a shared address, or a generic one of shared memory, or report it."""
    where &= SHARED_ADDRESS
    rank, offset = split_shared(where)
    peers = w.cta.cluster.ctas
    peer = peers[rank] if rank < len(peers) else None
    if peer is not None and peer is not w.cta and not reach(w, peer, lane, local):
        return None
    found = peer.mbarriers.get(offset) if peer is not None else None
    if found is None:
        why = "no mbarrier was initialised here"
        w.report("barrier-uninitialised", why, lane=lane, address=f"shared {where:#x}")
        return None
    remote = peer is not w.cta
    if not found.initialised_before(w.clocks[lane], w.actor + lane, proxied=False, remote=remote):
        w.report(
            "barrier-uninitialised",
            "nothing orders the initialisation of the mbarrier before this",
            lane=lane,
            address=found.describe(),
            other=found.init_instruction,
        )
    return found


def find_quietly(w: Warp, where: int) -> Mbarrier | None:
    """Return the mbarrier if every active lane finds it with nothing to report; else None."""
    rank, offset = split_shared(where)
    groups = w.groups_of(w.bits)
    peers = w.cta.cluster.ctas
    if len(groups) > 1 or rank >= len(peers):
        return None
    clock, peer = groups[0][0], peers[rank]
    found = peer.mbarriers.get(offset)
    if found is None or (peer is not w.cta and (peer.exited or not has_started(peer, clock))):
        return None
    # As remote, so that it does not count which lane initialised it.
    return found if found.initialised_before(clock, -1, proxied=False, remote=True) else None


def by_address(w: Warp, where: Source) -> list[tuple[int, int]]:
    """Return (address, lanes) of the active lanes."""
    w.poisoned("the address", where.registers)
    found = where.get(w)
    lanes = indices_of(w.bits)
    first = int(found[lanes[0]])
    if (found[lanes] == first).all():
        return [(first, w.bits)]
    groups: dict[int, int] = {}
    for lane in lanes:
        groups[int(found[lane])] = groups.get(int(found[lane]), 0) | 1 << int(lane)
    return list(groups.items())


def initialise(d: Decoding) -> Run:
    d.need("b64")
    d.one_of("shared", "shared::cta")
    where = d.address(d.operands[0])
    count = d.source(d.operands[1], "u32")

    def run(w: Warp) -> None:
        for place, bits in by_address(w, where):
            lane = lowest(bits)
            rank, offset = split_shared(place)
            inside = SHARED_RESERVED <= offset <= w.cta.shared_end - SIZE
            if offset % SIZE or rank != w.cta.rank or not inside:
                why = "an mbarrier lies at an 8-byte aligned address of the CTA's shared memory"
                w.report("out-of-bounds", why, lane=lane, address=f"shared {place:#x}")
                continue
            if bits.bit_count() > 1:
                why = f"{bits.bit_count()} lanes initialise one mbarrier"
                w.report("barrier-reinitialised", why, lane=lane, address=f"shared {place:#x}")
            _initialise(w, lane, offset, int(count.get(w)[lane]))

    return run


def _initialise(w: Warp, lane: int, offset: int, expected: int) -> None:
    if not 1 <= expected <= MAX_COUNT:
        why = f"an mbarrier counts 1..{MAX_COUNT} (got {expected})"
        w.report("barrier-mismatch", why, lane=lane)
    old = w.cta.mbarriers.get(offset)
    if old is not None:
        w.report(
            "barrier-reinitialised",
            "the mbarrier is live; mbarrier.inval comes first",
            lane=lane,
            address=old.describe(),
            other=old.init_instruction,
        )
    offsets = np.arange(offset, offset + SIZE)
    w.cta.shared.note_write(offsets, ThreadAccess(w, np.array([lane]), SIZE))
    w.cta.shared.state[offsets] = BARRIER
    w.cta.mbarriers[offset] = Mbarrier(w.cta, offset, expected, w, w.grid.clocks.zero)
    w.grid.events += 1


def invalidate(d: Decoding) -> Run:
    d.need("b64")
    d.one_of("shared", "shared::cta")
    where = d.address(d.operands[0])

    def run(w: Warp) -> None:
        for place, bits in by_address(w, where):
            lane = lowest(bits)
            found = find(w, place, lane, local=True)
            if found is None:
                continue
            if found.tx:
                why = f"{found.tx} transaction bytes are still pending"
                w.report("tx-leftover", why, address=found.describe())
            offsets = np.arange(found.offset, found.offset + SIZE)
            memory = found.cta.shared
            memory.foreign |= found.cta is not w.cta
            memory.note_write(offsets, ThreadAccess(w, np.array([lane]), SIZE))
            memory.state[offsets] = POISON
            del found.cta.mbarriers[found.offset]

    return run


SPACES = ("shared", "shared::cta", "shared::cluster")


def arrive(d: Decoding) -> Run:
    d.need("b64")
    drop = d.name == "mbarrier.arrive_drop"
    expect = d.take("expect_tx")
    strong = take_order(d)
    local = d.one_of(*SPACES) in ("shared", "shared::cta")
    operands = list(d.operands)
    stateful = len(operands) > 1 and not isinstance(operands[0], Address)
    write = d.destination(operands.pop(0) if stateful else Sink(), "b64")
    where = d.address(operands.pop(0))
    if len(operands) > 1 or (expect and not operands):
        raise d.error("has the wrong operands")
    amount = d.source(operands[0] if operands else Immediate(1), "u32")

    def run(w: Warp) -> None:
        states = np.zeros(LANES, dtype=np.uint64)
        w.poisoned("the count", amount.registers)
        amounts = amount.get(w)
        for place, bits in by_address(w, where):
            found = find(w, place, lowest(bits), local=local)
            if found is None:
                continue
            states[indices_of(bits)] = found.phase
            found.touch(w.cta, w.actor + lowest(bits), w.tick, w.instruction)
            counts = np.ones(LANES, dtype=np.uint32) if expect else amounts
            if drop:
                found.expected -= int(counts[indices_of(bits)].sum())
            _arrive(w, found, bits, counts, amounts if expect else None, strong)
        write(w, states, None)

    return run


def _arrive(
    w: Warp, barrier: Mbarrier, bits: int, counts: Array, tx: Array | None, strong: bool
) -> None:
    """Let lanes arrive on one mbarrier, with transaction bytes to expect or without."""
    w.grid.events += 1
    parts = [bits]
    if int(counts[indices_of(bits)].sum()) > barrier.pending:
        # The lanes' arrivals end a phase half way: take them one by one.
        parts = [1 << int(lane) for lane in indices_of(bits)]
    for part in parts:
        mine = indices_of(part)
        clock = w.publish(part, release=strong)
        if tx is not None:
            # Expect first, then arrive, as one step (PTX ISA, "mbarrier.arrive").
            barrier.tx += int(tx[mine].sum())
        barrier.arrive(int(counts[mine].sum()), clock, w)


def expect(d: Decoding) -> Run:
    d.need("b64")
    take_order(d)
    local = d.one_of(*SPACES) != "shared::cluster"
    where = d.address(d.operands[0])
    amount = d.source(d.operands[1], "u32")

    def run(w: Warp) -> None:
        w.poisoned("the byte count", amount.registers)
        for place, bits in by_address(w, where):
            lane = lowest(bits)
            found = find(w, place, lane, local=local)
            if found is not None:
                found.touch(w.cta, w.actor + lane, w.tick, w.instruction)
                w.grid.events += 1
                found.expect(int(amount.get(w)[indices_of(bits)].sum()), w)

    return run


def wait(d: Decoding) -> Run:
    """Decode test_wait and try_wait; a try_wait sleeps until its phase ends or time is up.

    Time is up at once when a wait is first met too early, so that code which takes a try_wait's
    return for success is found out; met again, it sleeps."""
    d.need("b64")
    parity = d.take("parity")
    strong = take_order(d)
    d.one_of("shared", "shared::cta")
    blocking = d.name == "mbarrier.try_wait"
    write = d.destination(d.operands[0], "pred")
    where = d.address(d.operands[1])
    phase = d.source(d.operands[2], "u32" if parity else "u64")

    def run(w: Warp) -> Interruption:
        w.poisoned("the phase", phase.registers)
        phases = phase.get(w)
        result = np.zeros(LANES, dtype=bool)
        missed = []
        for place, bits in by_address(w, where):
            lanes = indices_of(bits)
            found = find(w, place, lowest(bits), local=True)
            if found is None:
                result[lanes] = True
                continue
            _check_overrun(w, found)
            passed = _passed(found, phases[lanes], parity)
            result[lanes] = passed
            if any_of(passed):
                found.observe(w, sum(1 << int(lane) for lane in lanes[passed]), strong)
            else:
                missed.append(found)
        if blocking and missed and not result[w.active].any() and not w.fragment.timed_out:
            if _first_refusal(w, missed[0]):
                write(w, result, None)
                return None
            w.fragment.token = (missed[0], missed[0].phase)
            signals = tuple(each.signal for each in missed)
            return Wait(missed[0].missing, signals, times_out=True)
        w.fragment.token = None
        write(w, result, None)
        return None

    return run


def _passed(barrier: Mbarrier, phases: Array, parity: bool) -> Mask:
    if parity:
        return np.array([barrier.passed(int(phase)) for phase in phases])
    passed: Mask = phases < barrier.phase
    return passed


def _check_overrun(w: Warp, barrier: Mbarrier) -> None:
    """Report a wait during which its phase and the next one ended."""
    token = w.fragment.token
    if token is not None and token[0] is barrier and barrier.phase > token[1] + 1:
        why = f"phase {token[1]} and the next both ended while this waited for it"
        w.report("phase-overrun", why, address=barrier.describe())


def _first_refusal(w: Warp, barrier: Mbarrier) -> bool:
    """Return whether this wait is met too early for the first time, and note it."""
    this = (w.fragment.pc, barrier, barrier.phase)
    if w.fragment.refused == this:
        return False
    w.fragment.refused = this
    return True


INSTRUCTIONS: dict[str, Decoder] = {
    "mbarrier.init": initialise,
    "mbarrier.inval": invalidate,
    **dict.fromkeys(("mbarrier.arrive", "mbarrier.arrive_drop"), arrive),
    "mbarrier.expect_tx": expect,
    **dict.fromkeys(("mbarrier.test_wait", "mbarrier.try_wait"), wait),
}
