"""Warp collectives and control flow: shfl, vote, match, redux, elect, exits, PDL."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from build_kernels.emulator.execution.warp import (
    ALL,
    EXITED,
    LANE_INDEX,
    LANES,
    Array,
    Outcome,
    Run,
    Wait,
    Warp,
    bits_of,
    indices_of,
)
from build_kernels.emulator.instructions.operands import (
    Context,
    Modifiers,
    Source,
    destination,
    source,
)
from build_kernels.emulator.numerics import floats
from build_kernels.emulator.ordering.clocks import GENERIC
from build_kernels.emulator.ptx.syntax import Instruction, Pair


def gather(w: Warp, mask: Source) -> tuple[int, Wait | None]:
    """Wait until the member mask's live lanes are all here, and order them.

    Returns (members, wait)."""
    if mask.constant is not None:
        members = int(mask.constant) & ALL
    else:
        w.poisoned("the member mask", mask.registers)
        members = int(mask.get(w)[w.first_lane()])
    wait = w.converged(members)
    if wait is not None:
        return members, wait
    if w.bits & ~members:
        w.machine.report(
            "member-mask",
            f"lanes {w.bits & ~members:#010x} execute this but are not in its mask {members:#010x}",
            warp=w,
        )
    w.converge(w.bits)
    return members & w.bits, None


def aligned(w: Warp) -> Wait | None:
    """.aligned: every live lane of the warp executes this together."""
    wait = w.converged(ALL)
    if wait is None:
        w.converge(w.bits)
    return wait


def shuffle(ins: Instruction, context: Context) -> Run:
    """shfl.sync (PTX ISA, "shfl.sync")."""
    mods = Modifiers(ins)
    mods.need("sync")
    mode = mods.need("idx", "up", "down", "bfly")
    mods.need("b32")
    mods.done()
    target = ins.operands[0]
    first, second = (target.first, target.second) if isinstance(target, Pair) else (target, None)
    write = destination(ins, first, "b32")
    write_valid = destination(ins, second, "pred") if second is not None else None
    value = source(ins, ins.operands[1], "b32", context)
    by = source(ins, ins.operands[2], "u32", context)
    limit = source(ins, ins.operands[3], "u32", context)
    mask = source(ins, ins.operands[4], "u32", context)

    def run(w: Warp) -> Outcome:
        members, wait = gather(w, mask)
        if wait is not None:
            return wait
        taint = w.taint(value.registers)
        steer = w.taint(by.registers + limit.registers)
        lane = LANE_INDEX.astype(np.int64)
        b = by.get(w).astype(np.int64) & 31
        c = limit.get(w).astype(np.int64)
        clamp, segment = c & 31, (c >> 8) & 31
        high = (lane & segment) | (clamp & ~segment)
        low = lane & segment
        if mode == "up":
            index = lane - b
            valid = index >= high
        elif mode == "down":
            index = lane + b
            valid = index <= high
        elif mode == "bfly":
            index = lane ^ b
            valid = index <= high
        else:
            index = low | (b & ~segment)
            valid = index <= high
        index = np.where(valid, index, lane)
        absent = ~((members >> index & 1).astype(bool)) & w.active
        if absent.any():
            at = int(np.flatnonzero(absent)[0])
            w.machine.report(
                "inactive-lane",
                f"lane {int(index[at])}, which is not taking part, is read",
                warp=w,
                lane=at,
            )
        if taint is not None:
            taint = taint[index] if taint[index].any() else None
        if steer is not None:
            taint = steer if taint is None else taint | steer
        write(w, value.get(w)[index], taint)
        if write_valid is not None:
            write_valid(w, valid, steer)
        return None

    return run


def vote(ins: Instruction, context: Context) -> Run:
    mods = Modifiers(ins)
    mods.need("sync")
    mode = mods.need("all", "any", "uni", "ballot")
    mods.need("b32" if mode == "ballot" else "pred")
    mods.done()
    predicate = source(ins, ins.operands[1], "pred", context)
    mask = source(ins, ins.operands[2], "u32", context)
    write = destination(ins, ins.operands[0], "b32" if mode == "ballot" else "pred")

    def run(w: Warp) -> Outcome:
        members, wait = gather(w, mask)
        if wait is not None:
            return wait
        taint = _any_taint(w, predicate)
        bits = bits_of(predicate.get(w)) & members
        if mode == "ballot":
            write(w, np.full(LANES, bits, dtype=np.uint32), taint)
            return None
        holds = {
            "all": bits == members,
            "any": bits != 0,
            "uni": bits in (0, members),
        }[mode]
        write(w, np.full(LANES, holds), taint)
        return None

    return run


def _any_taint(w: Warp, value: Source) -> Array | None:
    """Poison in any member poisons every lane's result."""
    taint = w.taint(value.registers)
    if taint is None or not (taint & w.active).any():
        return None
    return np.ones(LANES, dtype=bool)


def match(ins: Instruction, context: Context) -> Run:
    mods = Modifiers(ins)
    mode = mods.need("any", "all")
    mods.need("sync")
    kind = mods.type()
    mods.done()
    target = ins.operands[0]
    first, second = (target.first, target.second) if isinstance(target, Pair) else (target, None)
    write = destination(ins, first, "b32")
    write_all = destination(ins, second, "pred") if second is not None else None
    value = source(ins, ins.operands[1], kind, context)
    mask = source(ins, ins.operands[2], "u32", context)

    def run(w: Warp) -> Outcome:
        members, wait = gather(w, mask)
        if wait is not None:
            return wait
        taint = _any_taint(w, value)
        values = value.get(w)
        same = values[:, None] == values[None, :]
        inside = (members >> LANE_INDEX & 1).astype(bool)
        rows = (same & inside[None, :]).astype(np.uint64) @ (
            np.uint64(1) << LANE_INDEX.astype(np.uint64)
        )
        if mode == "any":
            write(w, rows.astype(np.uint32), taint)
            return None
        holds = bool((rows[indices_of(members)] == members).all())
        write(w, np.full(LANES, members if holds else 0, dtype=np.uint32), taint)
        if write_all is not None:
            write_all(w, np.full(LANES, holds), taint)
        return None

    return run


def reduce(ins: Instruction, context: Context) -> Run:
    """redux.sync, of integers, and of f32 on sm_100a."""
    mods = Modifiers(ins)
    mods.need("sync")
    name = mods.need("add", "min", "max", "and", "or", "xor")
    kind = mods.type()
    absolute, nan = mods.take("abs"), mods.take("NaN")
    mods.done()
    if kind == "f32" and (name not in ("min", "max") or not context.arch.startswith("sm_10")):
        raise ins.error("redux.sync of .f32 knows min and max, on sm_100a and its family")
    if kind not in ("u32", "s32", "b32", "f32"):
        raise ins.error(f"redux.sync of .{kind} does not exist")
    value = source(ins, ins.operands[1], kind, context)
    mask = source(ins, ins.operands[2], "u32", context)
    write = destination(ins, ins.operands[0], kind)
    table: dict[str, Callable[[Array], Any]] = {
        "add": lambda v: v.sum(dtype=v.dtype),
        "min": np.min,
        "max": np.max,
        "and": np.bitwise_and.reduce,
        "or": np.bitwise_or.reduce,
        "xor": np.bitwise_xor.reduce,
    }

    def run(w: Warp) -> Outcome:
        members, wait = gather(w, mask)
        if wait is not None:
            return wait
        taint = _any_taint(w, value)
        values = value.get(w)[indices_of(members)]
        if kind == "f32":
            values = np.abs(values) if absolute else values
            result = values[:1]
            for i in range(1, len(values)):
                result = floats.extreme(result, values[i : i + 1], largest=name == "max", nan=nan)
            total = floats.canonical(result)[0]
        else:
            total = table[name](values)
        write(w, np.full(LANES, total, dtype=values.dtype), taint)
        return None

    return run


def elect(ins: Instruction, context: Context) -> Run:
    """elect.sync: the lowest member leads; PTX promises only that the choice is deterministic."""
    mods = Modifiers(ins)
    mods.need("sync")
    mods.done()
    target = ins.operands[0]
    if not isinstance(target, Pair):
        raise ins.error("needs d|p")
    write = destination(ins, target.first, "b32")
    write_leader = destination(ins, target.second, "pred")
    mask = source(ins, ins.operands[1], "u32", context)

    def run(w: Warp) -> Outcome:
        members, wait = gather(w, mask)
        if wait is not None:
            return wait
        leader = (members & -members).bit_length() - 1
        write(w, np.full(LANES, leader, dtype=np.uint32), None)
        write_leader(w, np.equal(LANE_INDEX, leader), None)
        return None

    return run


def active_mask(ins: Instruction, context: Context) -> Run:
    mods = Modifiers(ins)
    mods.need("b32")
    mods.done()
    write = destination(ins, ins.operands[0], "b32")
    return lambda w: write(w, np.full(LANES, w.bits, dtype=np.uint32), None)


def leave(ins: Instruction, context: Context) -> Run:
    """ret and exit of an entry."""
    mods = Modifiers(ins)
    mods.take("uni")
    mods.done()
    return lambda w: EXITED


def trap(ins: Instruction, context: Context) -> Run:
    Modifiers(ins).done()

    def run(w: Warp) -> Outcome:
        w.machine.report("trap", "the kernel traps", warp=w, lane=w.first_lane())
        return EXITED

    return run


def branch(ins: Instruction, context: Context) -> Run:
    mods = Modifiers(ins)
    mods.take("uni")
    mods.done()
    return lambda w: None


def nothing(ins: Instruction, context: Context) -> Run:
    """nanosleep ends the warp's turn; pmevent and setmaxnreg change nothing that is modelled."""
    mods = Modifiers(ins)
    name = ins.words[0]
    if name == "setmaxnreg":
        mods.need("inc", "dec")
        mods.need("sync")
        mods.need("aligned")
        mods.need("u32")
        mods.done()
        count = source(ins, ins.operands[0], "u32", context).constant
        if not isinstance(count, int) or not 24 <= count <= 256 or count % 8:
            raise ins.error("setmaxnreg takes a literal multiple of 8 in 24..256")
        return aligned
    mods.take("u32")
    mods.done()

    def end_turn(w: Warp) -> None:
        w.budget = 0

    return end_turn if name == "nanosleep" else lambda w: None


def dependency(ins: Instruction, context: Context) -> Run:
    """griddepcontrol: after .wait the grid before is complete and its writes are visible."""
    mods = Modifiers(ins)
    what = mods.need("wait", "launch_dependents")
    mods.done()
    if what == "launch_dependents":
        return lambda w: None

    def run(w: Warp) -> None:
        predecessor = w.machine.clocks.predecessor

        def know(clock: Array) -> None:
            clock[GENERIC, predecessor] = 1

        w.replace_clocks(w.bits, know)

    return run
