"""shfl.sync (PTX ISA, "shfl.sync")."""

from __future__ import annotations

from typing import Any

import numpy as np

from build_kernels.emulator.execution.warp import Run, Warp
from build_kernels.emulator.instructions.convergence import Collective, among, members_of
from build_kernels.emulator.instructions.decoding import Decoder, Decoding
from build_kernels.emulator.lanes import ALL, LANE_INDEX, LANES, Array, Ints, Mask, any_of


def shuffle(d: Decoding) -> Run:
    mode = d.need("idx", "up", "down", "bfly")
    d.need("b32")
    write, write_valid = d.pair("b32", "pred")
    value = d.source(d.operands[1], "b32")
    by = d.source(d.operands[2], "u32")
    limit = d.source(d.operands[3], "u32")

    steering = by.registers + limit.registers
    fixed = None
    if isinstance(by.constant, int) and isinstance(limit.constant, int):
        every = np.ones(LANES, dtype=np.int64)
        fixed = _sources(mode, by.constant * every, limit.constant * every)

    def compute(a: Array, *steer: Array) -> Any:
        index, valid = fixed or _sources(mode, *[each.astype(np.int64) for each in steer])
        return (a[index], valid) if write_valid.register >= 0 else a[index]

    def act(w: Warp, members: int) -> None:
        taint = w.taint(value.registers)
        steer = w.taint(steering)
        if fixed is None:
            lanes_by, lanes_limit = by.get(w).astype(np.int64), limit.get(w).astype(np.int64)
            index, valid = _sources(mode, lanes_by, lanes_limit)
        else:
            index, valid = fixed
        if members != ALL:
            _check_members(w, index, members)
        if taint is not None:
            taint = taint[index] if taint[index].any() else None
        if steer is not None:
            taint = steer if taint is None else taint | steer
        write(w, value.get(w)[index], taint)
        write_valid(w, valid, steer)

    run = among(d, act)
    if members_of(d) != ALL:
        return run
    targets = [write, write_valid] if write_valid.register >= 0 else [write]
    return Collective([value] if fixed else [value, by, limit], targets, compute, run)


def _sources(mode: str, by: Ints, limit: Ints) -> tuple[Ints, Mask]:
    """Return the lane that each lane reads, and whether it lies in the lane's segment."""
    lane = LANE_INDEX.astype(np.int64)
    b = by & 31
    clamp, segment = limit & 31, (limit >> 8) & 31
    low = lane & segment
    high = low | (clamp & ~segment)
    if mode == "up":
        index = lane - b
        valid = index >= high
    else:
        if mode == "idx":
            index = low | (b & ~segment)
        else:
            index = lane + b if mode == "down" else lane ^ b
        valid = index <= high
    return np.where(valid, index, lane), valid


def _check_members(w: Warp, index: Ints, members: int) -> None:
    """Report an active lane that reads one that is not taking part."""
    absent = ~((members >> index & 1).astype(bool)) & w.active
    if any_of(absent):
        at = int(np.flatnonzero(absent)[0])
        why = f"lane {int(index[at])}, which is not taking part, is read"
        w.report("inactive-lane", why, lane=at)


INSTRUCTIONS: dict[str, Decoder] = {"shfl": shuffle}
