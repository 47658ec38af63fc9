"""Moves, comparison and selection: mov, setp, selp (PTX ISA, "mov", "setp", "selp")."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from build_kernels.binaries.ptx.syntax import TYPE_BITS, Operand, Vector
from build_kernels.emulator.execution.registers import Pending
from build_kernels.emulator.execution.warp import Run, Warp
from build_kernels.emulator.instructions.decoding import Decoder, Decoding
from build_kernels.emulator.instructions.elementwise import Elementwise, build, same
from build_kernels.emulator.lanes import LANES, Array, Mask
from build_kernels.emulator.numerics import floats
from build_kernels.emulator.numerics.types import DTYPE, FLOATS, HALVES, unsigned


def move(d: Decoding) -> Run:
    kind = d.type()
    if len(d.operands) != 2:
        raise d.error("takes 2 operands")
    target, origin = d.operands
    if isinstance(origin, Vector):
        return _pack(d, target, origin, TYPE_BITS[kind])
    if isinstance(target, Vector):
        return _unpack(d, target, origin, TYPE_BITS[kind])
    if kind == "pred":
        return build(d, kind, [kind], same)
    return Move([d.source(origin, kind)], [d.destination(target, kind)], same)


class Move(Elementwise):
    """A mov, which is put off if it reads pending registers: that is not yet a use of them."""

    def __call__(self, w: Warp) -> None:
        for register in self.registers:
            if type(w.t[register]) is Pending:
                written = [target.register for target in self.targets if target.register >= 0]
                if w.postpone(self.registers, written, super().__call__):
                    return
        super().__call__(w)


def _pack(d: Decoding, target: Operand, origin: Vector, bits: int) -> Run:
    count = len(origin.items)
    part = f"b{bits // count}"
    sources = [d.source(operand, part) for operand in origin.items]
    unsigned, piece = DTYPE[f"b{bits}"], DTYPE[part]

    def pack(*values: Array) -> Array:
        parts = np.empty(LANES * count, dtype=piece)
        for i, value in enumerate(values):
            parts[i::count] = value
        return parts.view(unsigned)

    return Move(sources, [d.destination(target, f"b{bits}")], pack)


def _unpack(d: Decoding, target: Vector, origin: Operand, bits: int) -> Run:
    count = len(target.items)
    part = f"b{bits // count}"
    piece = DTYPE[part]

    def unpack(whole: Array) -> Any:
        parts = whole.view(piece)
        found = [parts[i::count].copy() for i in range(count)]
        return found if count > 1 else found[0]

    writes = [d.destination(operand, part) for operand in target.items]
    return Move([d.source(origin, f"b{bits}")], writes, unpack)


_COMPARE: dict[str, Callable[[Array, Array], Array]] = {
    "eq": np.equal, "ne": np.not_equal, "lt": np.less, "le": np.less_equal,
    "gt": np.greater, "ge": np.greater_equal,
    "lo": np.less, "ls": np.less_equal, "hi": np.greater, "hs": np.greater_equal,
}  # fmt: skip

_UNORDERED = {"equ": "eq", "neu": "ne", "ltu": "lt", "leu": "le", "gtu": "gt", "geu": "ge"}

_COMBINE: dict[str, Callable[[Array, Array], Array]] = {
    "and": np.logical_and, "or": np.logical_or, "xor": np.logical_xor,
}  # fmt: skip


def _comparison(d: Decoding, kind: str) -> Callable[[Array, Array], Array]:
    word = d.need(*_COMPARE, *_UNORDERED, "num", "nan")
    floating = kind in FLOATS or kind in HALVES
    if word in _COMPARE:
        plain = _COMPARE[word]
        if not floating or word != "ne":
            return plain
        # The ordered "ne" is false for NaN; NumPy's is true.
        return lambda a, b: (a != b) & ~np.isnan(a) & ~np.isnan(b)
    if not floating:
        raise d.error(f"comparison .{word} is for floats")
    if word == "num":
        return lambda a, b: ~np.isnan(a) & ~np.isnan(b)
    if word == "nan":
        return lambda a, b: np.isnan(a) | np.isnan(b)
    inner = _COMPARE[_UNORDERED[word]]
    return lambda a, b: inner(a, b) | np.isnan(a) | np.isnan(b)


def set_predicate(d: Decoding) -> Run:
    kind = d.type()
    compare = _comparison(d, kind)
    combine = d.one_of(*_COMBINE)
    ftz = d.take("ftz")
    if kind in ("f16x2", "bf16x2"):
        raise d.error(f"comparison of .{kind} is not supported")
    arity = 4 if combine else 3
    if len(d.operands) != arity:
        raise d.error(f"takes {arity} operands (got {len(d.operands)})")
    sources = [d.source(operand, kind) for operand in d.operands[1:3]]
    if compare in (np.equal, np.not_equal):
        sources = [d.source(operand, unsigned(kind)) for operand in d.operands[1:3]]
    if combine:
        sources.append(d.source(d.operands[3], "pred"))
    targets = d.pair("pred", "pred")

    def holds(a: Array, b: Array) -> Array:
        if kind == "bf16":
            a, b = floats.bf16_to_f32(a), floats.bf16_to_f32(b)
        if ftz:
            a, b = floats.flush(a), floats.flush(b)
        return compare(a, b)

    def both(a: Array, b: Array, *more: Array) -> tuple[Array, Array]:
        value = holds(a, b)
        return join(value, *more), join(~value, *more)

    join: Callable[..., Array] = _COMBINE[combine] if combine else same
    if targets[1].register >= 0:
        return Elementwise(sources, targets, both)
    if combine:
        return Elementwise(sources, targets[:1], lambda a, b, c: join(holds(a, b), c))
    plain = kind != "bf16" and not ftz
    return Elementwise(sources, targets[:1], compare if plain else holds)


def select(d: Decoding) -> Run:
    """Decode selp; poison in the side that is not chosen does no harm."""
    kind = d.type()
    raw = kind if kind in ("pred", *FLOATS) else f"b{TYPE_BITS[kind]}"
    yes, no = (d.source(operand, raw) for operand in d.operands[1:3])
    which = d.source(d.operands[3], "pred")
    return Select([which, yes, no], [d.destination(d.operands[0], raw)], np.where)


class Select(Elementwise):
    """A selp, with a predicate and two sides."""

    def taint(self, w: Warp) -> Mask | None:
        which, yes, no = self.sources
        taint = w.taint(which.registers)
        of_yes, of_no = w.taint(yes.registers), w.taint(no.registers)
        if of_yes is None and of_no is None:
            return taint
        side: Mask = np.where(
            which.get(w), False if of_yes is None else of_yes, False if of_no is None else of_no
        )
        taint = side if taint is None else taint | side
        return taint if taint.any() else None


INSTRUCTIONS: dict[str, Decoder] = {
    "mov": move,
    "setp": set_predicate,
    "selp": select,
}
