"""mbarrier instructions (PTX ISA, "mbarrier")."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from build_kernels.emulator.execution.warp import LANES, Outcome, Run, Wait, Warp, indices_of
from build_kernels.emulator.instructions.operands import (
    Context,
    Modifiers,
    Source,
    address,
    destination,
    source,
)
from build_kernels.emulator.memory.memory import BARRIER, POISON, SHARED_RANK_SHIFT, SHARED_RESERVED
from build_kernels.emulator.memory.state_spaces import reach
from build_kernels.emulator.ordering.barriers import MAX_COUNT, Mbarrier
from build_kernels.emulator.ordering.thread_access import ThreadAccess
from build_kernels.emulator.ptx.syntax import Instruction, Sink


def find(w: Warp, where: int, lane: int, *, local: bool) -> Mbarrier | None:
    """The mbarrier at an address (shared, or generic in the shared window), or None, reported."""
    where &= 0xFFFFFFFF
    rank, offset = where >> SHARED_RANK_SHIFT, where & ((1 << SHARED_RANK_SHIFT) - 1)
    peers = w.cta.cluster.ctas
    peer = peers[rank] if rank < len(peers) else None
    if peer is not None and peer is not w.cta and not reach(w, peer, lane, local):
        return None
    found = peer.mbarriers.get(offset) if peer is not None else None
    if found is None:
        w.machine.report(
            "barrier-uninitialised",
            "no mbarrier was initialised here",
            warp=w,
            lane=lane,
            address=f"shared {where:#x}",
        )
        return None
    remote = peer is not w.cta
    if not found.knows_init(w.clocks[lane], w.actor + lane, proxied=False, remote=remote):
        w.machine.report(
            "barrier-uninitialised",
            "nothing orders the initialisation of the mbarrier before this",
            warp=w,
            lane=lane,
            address=found.describe(),
            other=found.init_instruction,
        )
    return found


def _by_address(w: Warp, where: Source) -> list[tuple[int, int]]:
    """(address, lanes) of the active lanes."""
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


def mbarrier(ins: Instruction, context: Context) -> Run:
    name = ins.words[1] if len(ins.words) > 1 else ""
    table: dict[str, Callable[[Instruction, Context], Run]] = {
        "init": _init,
        "inval": _invalidate,
        "arrive": _arrive,
        "arrive_drop": _arrive,
        "expect_tx": _expect,
        "test_wait": _wait,
        "try_wait": _wait,
    }
    if name not in table:
        raise ins.error(f"mbarrier.{name} is not supported")
    return table[name](ins, context)


def _words(ins: Instruction) -> Modifiers:
    mods = Modifiers(ins, skip=2)
    mods.need("b64")
    return mods


def _init(ins: Instruction, context: Context) -> Run:
    mods = _words(ins)
    mods.one_of("shared", "shared::cta")
    mods.done()
    where = address(ins, ins.operands[0], context)
    count = source(ins, ins.operands[1], "u32", context)

    def run(w: Warp) -> None:
        for place, bits in _by_address(w, where):
            lane = int(indices_of(bits)[0])
            rank = (place & 0xFFFFFFFF) >> SHARED_RANK_SHIFT
            offset = place & ((1 << SHARED_RANK_SHIFT) - 1)
            memory = w.cta.shared
            inside = SHARED_RESERVED <= offset <= w.cta.shared_end - 8
            if offset % 8 or rank != w.cta.rank or not inside:
                w.machine.report(
                    "out-of-bounds",
                    "an mbarrier lies at an 8-byte aligned address of the CTA's shared memory",
                    warp=w,
                    lane=lane,
                    address=f"shared {place:#x}",
                )
                continue
            expected = int(count.get(w)[lane])
            if not 1 <= expected <= MAX_COUNT:
                w.machine.report(
                    "barrier-mismatch", f"an mbarrier counts 1..{MAX_COUNT} (got {expected})",
                    warp=w, lane=lane,
                )  # fmt: skip
            old = w.cta.mbarriers.get(offset)
            if old is not None:
                w.machine.report(
                    "barrier-reinitialised",
                    "the mbarrier is live; mbarrier.inval comes first",
                    warp=w,
                    lane=lane,
                    address=old.describe(),
                    other=old.init_instruction,
                )
            offsets = np.arange(offset, offset + 8)
            memory.note_write(offsets, ThreadAccess(w, np.full(8, lane)))
            memory.state[offsets] = BARRIER
            w.cta.mbarriers[offset] = Mbarrier(w.machine, w.cta, offset, expected, w)
            w.machine.events += 1

    return run


def _invalidate(ins: Instruction, context: Context) -> Run:
    mods = _words(ins)
    mods.one_of("shared", "shared::cta")
    mods.done()
    where = address(ins, ins.operands[0], context)

    def run(w: Warp) -> None:
        for place, bits in _by_address(w, where):
            found = find(w, place, int(indices_of(bits)[0]), local=True)
            if found is None:
                continue
            if found.tx:
                w.machine.report(
                    "tx-leftover",
                    f"{found.tx} transaction bytes are still pending",
                    warp=w,
                    address=found.describe(),
                )
            offsets = np.arange(found.offset, found.offset + 8)
            memory = found.cta.shared
            memory.note_write(offsets, ThreadAccess(w, np.full(8, int(indices_of(bits)[0]))))
            memory.state[offsets] = POISON
            del found.cta.mbarriers[found.offset]

    return run


def _order(mods: Modifiers) -> bool:
    """Take the order, scope and space; True unless .relaxed."""
    order = mods.one_of("relaxed", "release", "acquire")
    mods.one_of("cta", "cluster")
    return order != "relaxed"


def _arrive(ins: Instruction, context: Context) -> Run:
    mods = _words(ins)
    drop = ins.words[1] == "arrive_drop"
    expect = mods.take("expect_tx")
    strong = _order(mods)
    space = mods.one_of("shared", "shared::cta", "shared::cluster")
    mods.done()
    operands = list(ins.operands)
    write = None
    if len(operands) > 1 and not _is_address(operands[0]):
        target = operands.pop(0)
        write = None if isinstance(target, Sink) else destination(ins, target, "b64")
    where = address(ins, operands.pop(0), context)
    amount = source(ins, operands.pop(0), "u32", context) if operands else None
    if operands or (expect and amount is None):
        raise ins.error("has the wrong operands")
    local = space in ("shared", "shared::cta")

    def run(w: Warp) -> None:
        states = np.zeros(LANES, dtype=np.uint64)
        if amount is not None:
            w.poisoned("the count", amount.registers)
        amounts = amount.get(w) if amount is not None else np.ones(LANES, dtype=np.uint32)
        for place, bits in _by_address(w, where):
            lanes = indices_of(bits)
            found = find(w, place, int(lanes[0]), local=local)
            if found is None:
                continue
            states[lanes] = found.phase
            total = int(amounts[lanes].sum())
            _touch_remote(w, found, int(lanes[0]))
            if drop:
                found.expected -= len(lanes) if expect else total
            arrivals = len(lanes) if expect else total
            parts = [bits]
            if arrivals > found.pending:
                # The lanes' arrivals end a phase half way: take them one by one.
                parts = [1 << int(lane) for lane in lanes]
            for part in parts:
                mine = indices_of(part)
                clock = w.publish(part, release=strong)
                if expect:
                    # Expect first, then arrive, as one step (PTX ISA, "mbarrier.arrive").
                    found.tx += int(amounts[mine].sum())
                    found.arrive(len(mine), clock, warp=w)
                else:
                    found.arrive(int(amounts[mine].sum()), clock, warp=w)
        if write is not None:
            write(w, states, None)

    return run


def _is_address(operand: Any) -> bool:
    return type(operand).__name__ == "Address"


def _touch_remote(w: Warp, found: Mbarrier, lane: int) -> None:
    if found.cta is not w.cta:
        found.foreign_touches.append((w.actor + lane, w.tick, w.instruction))


def _expect(ins: Instruction, context: Context) -> Run:
    mods = _words(ins)
    _order(mods)
    space = mods.one_of("shared", "shared::cta", "shared::cluster")
    mods.done()
    where = address(ins, ins.operands[0], context)
    amount = source(ins, ins.operands[1], "u32", context)

    def run(w: Warp) -> None:
        w.poisoned("the byte count", amount.registers)
        for place, bits in _by_address(w, where):
            lanes = indices_of(bits)
            found = find(w, place, int(lanes[0]), local=space != "shared::cluster")
            if found is not None:
                _touch_remote(w, found, int(lanes[0]))
                found.expect(int(amount.get(w)[lanes].sum()), w)

    return run


def _wait(ins: Instruction, context: Context) -> Run:
    """test_wait and try_wait. A try_wait sleeps until its phase ends or time is up.

    Time is up at once when a wait is first met too early, so that code which takes a try_wait's
    return for success is found out; met again, it sleeps."""
    mods = _words(ins)
    parity = mods.take("parity")
    strong = _order(mods)
    mods.one_of("shared", "shared::cta")
    mods.done()
    blocking = ins.words[1] == "try_wait"
    write = destination(ins, ins.operands[0], "pred")
    where = address(ins, ins.operands[1], context)
    phase = source(ins, ins.operands[2], "u32" if parity else "u64", context)

    def run(w: Warp) -> Outcome:
        w.poisoned("the phase", phase.registers)
        phases = phase.get(w)
        result = np.zeros(LANES, dtype=bool)
        missed = []
        for place, bits in _by_address(w, where):
            lanes = indices_of(bits)
            found = find(w, place, int(lanes[0]), local=True)
            if found is None:
                result[lanes] = True
                continue
            token = w.fragment.token
            if token is not None and token[0] is found and found.phase > token[1] + 1:
                w.machine.report(
                    "phase-overrun",
                    f"phase {token[1]} and the next both ended while this waited for it",
                    warp=w,
                    address=found.describe(),
                )
            if parity:
                passed = np.array([found.passed(int(phases[lane])) for lane in lanes])
            else:
                passed = phases[lanes] < found.phase
            result[lanes] = passed
            if passed.any():
                seen = sum(1 << int(lane) for lane in lanes[passed])
                found.observe(w, seen, strong)
            else:
                missed.append(found)
        if blocking and missed and not result[w.active].any() and not w.fragment.timed_out:
            this = (w.fragment.pc, missed[0], missed[0].phase)
            if w.fragment.refused != this:
                w.fragment.refused = this
                write(w, result, None)
                return None
            w.fragment.token = (missed[0], missed[0].phase)
            return Wait(
                lambda: (
                    f"phase {missed[0].phase} of {missed[0].describe()} ({missed[0].pending} of "
                    f"{missed[0].expected} arrivals and {missed[0].tx} bytes missing)"
                ),
                tuple(each.signal for each in missed),
                times_out=True,
            )
        w.fragment.token = None
        write(w, result, None)
        return None

    return run
