"""Moves, comparison and selection: mov, setp, selp (PTX ISA, "mov", "setp", "selp")."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from build_kernels.binaries.ptx.syntax import TYPE_BITS, Operand, Register, Vector
from build_kernels.emulator.execution.interruption import Interruption
from build_kernels.emulator.execution.registers import Pending
from build_kernels.emulator.execution.warp import Run, Warp
from build_kernels.emulator.instructions.decoding import Decoder, Decoding, registers_of
from build_kernels.emulator.instructions.elementwise import build, runner
from build_kernels.emulator.lanes import LANES, Array, Mask
from build_kernels.emulator.numerics import floats
from build_kernels.emulator.numerics.types import DTYPE, FLOATS, HALVES


def move(d: Decoding) -> Run:
    kind = d.type()
    if len(d.operands) != 2:
        raise d.error("takes 2 operands")
    target, origin = d.operands
    if isinstance(origin, Vector):
        return _pack(d, target, origin, TYPE_BITS[kind])
    if isinstance(target, Vector):
        return _unpack(d, target, origin, TYPE_BITS[kind])
    run = build(d, kind, [kind], lambda a: a)
    if kind == "pred":
        return run
    return _movable(run, d.source(origin, kind).registers, (target,))


def _pack(d: Decoding, target: Operand, origin: Vector, bits: int) -> Run:
    part = f"b{bits // len(origin.items)}"
    sources = [d.source(operand, part) for operand in origin.items]
    unsigned = DTYPE[f"b{bits}"]

    def pack(*values: Array) -> Array:
        stacked = np.stack(values, axis=1)
        return np.ascontiguousarray(stacked).view(unsigned).reshape(LANES)

    run = runner(sources, d.destination(target, f"b{bits}"), pack)
    return _movable(run, registers_of(sources), (target,))


def _unpack(d: Decoding, target: Vector, origin: Operand, bits: int) -> Run:
    part = f"b{bits // len(target.items)}"
    whole = d.source(origin, f"b{bits}")
    writes = [d.destination(operand, part) for operand in target.items]
    piece = DTYPE[part]

    def unpack(w: Warp) -> None:
        taint = w.taint(whole.registers)
        parts = np.ascontiguousarray(whole.get(w)).view(piece).reshape(LANES, -1)
        for i, write in enumerate(writes):
            write(w, np.ascontiguousarray(parts[:, i]), taint)

    return _movable(unpack, whole.registers, target.items)


def _movable(run: Run, sources: Sequence[int], targets: Sequence[Operand]) -> Run:
    """Put the mov off if it reads pending registers, which is not yet a use of them."""
    written = [each.index for each in targets if isinstance(each, Register)]

    def guarded(w: Warp) -> Interruption:
        for register in sources:
            if type(w.t[register]) is Pending and w.postpone(sources, written, run):
                return None
        return run(w)

    return guarded if sources else run


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
    if combine:
        sources.append(d.source(d.operands[3], "pred"))
    writes = d.pair("pred", "pred")
    registers = registers_of(sources)

    def run(w: Warp) -> None:
        taint = w.taint(registers)
        a, b = sources[0].get(w), sources[1].get(w)
        if kind == "bf16":
            a, b = floats.bf16_to_f32(a), floats.bf16_to_f32(b)
        if ftz:
            a, b = floats.flush(a), floats.flush(b)
        holds = compare(a, b)
        for value, write in zip((holds, ~holds), writes, strict=True):
            if combine:
                value = _COMBINE[combine](value, sources[2].get(w))
            write(w, value, taint)

    return run


def select(d: Decoding) -> Run:
    """Decode selp; poison in the side that is not chosen does no harm."""
    kind = d.type()
    raw = kind if kind in ("pred", *FLOATS) else f"b{TYPE_BITS[kind]}"
    yes, no = (d.source(operand, raw) for operand in d.operands[1:3])
    which = d.source(d.operands[3], "pred")
    write = d.destination(d.operands[0], raw)

    def run(w: Warp) -> None:
        chosen = which.get(w)
        taint = w.taint(which.registers)
        of_yes, of_no = w.taint(yes.registers), w.taint(no.registers)
        if of_yes is not None or of_no is not None:
            side: Mask = np.where(
                chosen, False if of_yes is None else of_yes, False if of_no is None else of_no
            )
            taint = side if taint is None else taint | side
            if not taint.any():
                taint = None
        write(w, np.where(chosen, yes.get(w), no.get(w)), taint)

    return run


INSTRUCTIONS: dict[str, Decoder] = {
    "mov": move,
    "setp": set_predicate,
    "selp": select,
}
