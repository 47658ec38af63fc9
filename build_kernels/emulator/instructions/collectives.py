"""Warp collectives: vote, match, redux, elect, activemask."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from build_kernels.binaries.ptx.syntax import Pair
from build_kernels.emulator.execution.warp import Run, Warp
from build_kernels.emulator.instructions.convergence import Collective, among, members_of
from build_kernels.emulator.instructions.decoding import Decoder, Decoding, Source
from build_kernels.emulator.lanes import (
    ALL,
    LANE_INDEX,
    LANES,
    Array,
    Mask,
    bits_of,
    indices_of,
    lowest,
)
from build_kernels.emulator.numerics import floats

_REDUCE: dict[str, Callable[[Array], Any]] = {
    "add": lambda v: v.sum(dtype=v.dtype),
    "min": np.min,
    "max": np.max,
    "and": np.bitwise_and.reduce,
    "or": np.bitwise_or.reduce,
    "xor": np.bitwise_xor.reduce,
}


def vote(d: Decoding) -> Run:
    mode = d.need("all", "any", "uni", "ballot")
    d.need("b32" if mode == "ballot" else "pred")
    predicate = d.source(d.operands[1], "pred")
    write = d.destination(d.operands[0], "b32" if mode == "ballot" else "pred")

    def poll(values: Array, members: int = ALL) -> Array:
        bits = bits_of(values) & members
        if mode == "ballot":
            return np.full(LANES, bits, dtype=np.uint32)
        holds = {"all": bits == members, "any": bits != 0, "uni": bits in (0, members)}[mode]
        return np.full(LANES, holds)

    def act(w: Warp, members: int) -> None:
        write(w, poll(predicate.get(w), members), _any_taint(w, predicate))

    run = among(d, act)
    return run if members_of(d) != ALL else Collective([predicate], [write], poll, run)


def _any_taint(w: Warp, value: Source) -> Mask | None:
    """Return poison in every lane if any member's value is poison."""
    taint = w.taint(value.registers)
    if taint is None or not (taint & w.active).any():
        return None
    return np.ones(LANES, dtype=bool)


def match(d: Decoding) -> Run:
    mode = d.need("any", "all")
    kind = d.type()
    write, write_all = d.pair("b32", "pred")
    value = d.source(d.operands[1], kind)

    def act(w: Warp, members: int) -> None:
        taint = _any_taint(w, value)
        values = value.get(w)
        same = values[:, None] == values[None, :]
        inside = (members >> LANE_INDEX & 1).astype(bool)
        rows = (same & inside[None, :]).astype(np.uint64) @ (
            np.uint64(1) << LANE_INDEX.astype(np.uint64)
        )
        if mode == "any":
            write(w, rows.astype(np.uint32), taint)
            return
        holds = bool((rows[indices_of(members)] == members).all())
        write(w, np.full(LANES, members if holds else 0, dtype=np.uint32), taint)
        write_all(w, np.full(LANES, holds), taint)

    return among(d, act)


def reduce(d: Decoding) -> Run:
    """Decode redux.sync of integers, and of f32 on sm_100a."""
    name = d.need(*_REDUCE)
    kind = d.type()
    absolute, nan = d.take("abs"), d.take("NaN")
    if kind == "f32" and (name not in ("min", "max") or not d.context.arch.startswith("sm_10")):
        raise d.error("redux.sync of .f32 takes min and max, on sm_100a and its family")
    if kind not in ("u32", "s32", "b32", "f32"):
        raise d.error(f"redux.sync of .{kind} does not exist")
    value = d.source(d.operands[1], kind)
    write = d.destination(d.operands[0], kind)

    def act(w: Warp, members: int) -> None:
        taint = _any_taint(w, value)
        values = value.get(w)[indices_of(members)]
        if kind == "f32":
            values = np.abs(values) if absolute else values
            result = values[:1]
            for i in range(1, len(values)):
                result = floats.extreme(result, values[i : i + 1], largest=name == "max", nan=nan)
            total = floats.canonical(result)[0]
        else:
            total = _REDUCE[name](values)
        write(w, np.full(LANES, total, dtype=values.dtype), taint)

    return among(d, act)


def elect(d: Decoding) -> Run:
    """Decode elect.sync; the lowest member leads (PTX leaves the choice open)."""
    if not isinstance(d.operands[0], Pair):
        raise d.error("needs d|p")
    write, write_leader = d.pair("b32", "pred")

    def leads(leader: int) -> tuple[Array, Array]:
        return np.full(LANES, leader, dtype=np.uint32), np.equal(LANE_INDEX, leader)

    def act(w: Warp, members: int) -> None:
        for target, value in zip((write, write_leader), leads(lowest(members)), strict=True):
            target(w, value, None)

    run = among(d, act)
    if members_of(d) != ALL:
        return run
    return Collective([], [write, write_leader], lambda: leads(0), run)


def active_mask(d: Decoding) -> Run:
    d.need("b32")
    write = d.destination(d.operands[0], "b32")
    return lambda w: write(w, np.full(LANES, w.bits, dtype=np.uint32), None)


INSTRUCTIONS: dict[str, Decoder] = {
    "vote": vote,
    "match": match,
    "redux": reduce,
    "elect": elect,
    "activemask": active_mask,
}
