"""Comparison, selection and moves (PTX ISA, "setp", "selp", "mov")."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from build_kernels.emulator.execution.warp import LANES, Array, Outcome, Pending, Run, Warp
from build_kernels.emulator.instructions.bits import predicate_logic
from build_kernels.emulator.instructions.elementwise import FLOATS, HALVES, build, runner
from build_kernels.emulator.instructions.operands import (
    DTYPE,
    Context,
    Modifiers,
    destination,
    registers_of,
    source,
)
from build_kernels.emulator.numerics import floats
from build_kernels.emulator.ptx.syntax import (
    TYPE_BITS,
    Instruction,
    Operand,
    Pair,
    Register,
    Vector,
)

_COMPARE: dict[str, Callable[[Array, Array], Array]] = {
    "eq": np.equal, "ne": np.not_equal, "lt": np.less, "le": np.less_equal,
    "gt": np.greater, "ge": np.greater_equal,
    "lo": np.less, "ls": np.less_equal, "hi": np.greater, "hs": np.greater_equal,
}  # fmt: skip

_UNORDERED = {"equ": "eq", "neu": "ne", "ltu": "lt", "leu": "le", "gtu": "gt", "geu": "ge"}

_COMBINE: dict[str, Callable[[Array, Array], Array]] = {
    "and": np.logical_and, "or": np.logical_or, "xor": np.logical_xor,
}  # fmt: skip


def _comparison(ins: Instruction, mods: Modifiers, kind: str) -> Callable[[Array, Array], Array]:
    word = mods.need(*_COMPARE, *_UNORDERED, "num", "nan")
    floating = kind in FLOATS or kind in HALVES
    if word in _COMPARE:
        plain = _COMPARE[word]
        if not floating or word != "ne":
            return plain
        # Ordered "ne" is false for NaN; NumPy's is true.
        return lambda a, b: (a != b) & ~np.isnan(a) & ~np.isnan(b)
    if not floating:
        raise ins.error(f"comparison .{word} is for floats")
    if word == "num":
        return lambda a, b: ~np.isnan(a) & ~np.isnan(b)
    if word == "nan":
        return lambda a, b: np.isnan(a) | np.isnan(b)
    inner = _COMPARE[_UNORDERED[word]]
    return lambda a, b: inner(a, b) | np.isnan(a) | np.isnan(b)


def set_predicate(ins: Instruction, context: Context) -> Run:
    mods = Modifiers(ins)
    kind = mods.type()
    compare = _comparison(ins, mods, kind)
    combine = mods.one_of(*_COMBINE)
    ftz = mods.take("ftz")
    mods.done()
    if kind in ("f16x2", "bf16x2"):
        raise ins.error(f"comparison of .{kind} is not supported")
    count_ = 4 if combine else 3
    if len(ins.operands) != count_:
        raise ins.error(f"takes {count_} operands (got {len(ins.operands)})")
    sources = [source(ins, operand, kind, context) for operand in ins.operands[1:3]]
    if combine:
        sources.append(source(ins, ins.operands[3], "pred", context))
    target = ins.operands[0]
    firsts = (target.first, target.second) if isinstance(target, Pair) else (target,)
    writes = [destination(ins, operand, "pred") for operand in firsts]
    registers = registers_of(sources)

    def run(w: Warp) -> None:
        taint = w.taint(registers)
        a, b = sources[0].get(w), sources[1].get(w)
        if kind == "bf16":
            a, b = floats.bf16_to_f32(a), floats.bf16_to_f32(b)
        if ftz:
            a, b = floats.flush(a), floats.flush(b)
        holds = compare(a, b)
        for value, write in zip((holds, ~holds), writes, strict=False):
            if combine:
                value = _COMBINE[combine](value, sources[2].get(w))
            write(w, value, taint)

    return run


def select(ins: Instruction, context: Context) -> Run:
    mods = Modifiers(ins)
    kind = mods.type()
    mods.done()
    raw = f"b{TYPE_BITS[kind]}" if kind != "pred" else kind
    yes, no = (source(ins, operand, raw, context) for operand in ins.operands[1:3])
    if kind in FLOATS:
        yes, no = (source(ins, operand, kind, context) for operand in ins.operands[1:3])
        raw = kind
    which = source(ins, ins.operands[3], "pred", context)
    write = destination(ins, ins.operands[0], raw)

    def run(w: Warp) -> None:
        chosen = which.get(w)
        taint = w.taint(which.registers)
        of_yes, of_no = w.taint(yes.registers), w.taint(no.registers)
        if of_yes is not None or of_no is not None:
            # Poison in the side that was not chosen does no harm.
            side = np.where(
                chosen, False if of_yes is None else of_yes, False if of_no is None else of_no
            )
            taint = side if taint is None else taint | side
            if not taint.any():
                taint = None
        write(w, np.where(chosen, yes.get(w), no.get(w)), taint)

    return run


def move(ins: Instruction, context: Context) -> Run:
    """mov, of a register, literal, address, special register, or to and from { }."""
    mods = Modifiers(ins)
    kind = mods.type()
    mods.done()
    if len(ins.operands) != 2:
        raise ins.error("takes 2 operands")
    target, origin = ins.operands
    if kind == "pred":
        return predicate_logic(ins, context)
    bits = TYPE_BITS[kind]
    if isinstance(origin, Vector):
        part = f"b{bits // len(origin.items)}"
        sources = [source(ins, operand, part, context) for operand in origin.items]
        unsigned = DTYPE[f"b{bits}"]

        def pack(*values: Array) -> Array:
            stacked = np.stack(values, axis=1)
            return np.ascontiguousarray(stacked).view(unsigned).reshape(LANES)

        run = runner(sources, destination(ins, target, f"b{bits}"), pack)
        return _movable(run, registers_of(sources), (target,))
    if isinstance(target, Vector):
        part = f"b{bits // len(target.items)}"
        whole = source(ins, origin, f"b{bits}", context)
        writes = [destination(ins, operand, part) for operand in target.items]
        piece = DTYPE[part]

        def unpack(w: Warp) -> None:
            taint = w.taint(whole.registers)
            parts = np.ascontiguousarray(whole.get(w)).view(piece).reshape(LANES, -1)
            for i, write in enumerate(writes):
                write(w, np.ascontiguousarray(parts[:, i]), taint)

        return _movable(unpack, whole.registers, target.items)
    run = build(ins, context, kind, [kind], lambda a: a)
    return _movable(run, source(ins, origin, kind, context).registers, (target,))


def _movable(run: Run, sources: Sequence[int], targets: Sequence[Operand]) -> Run:
    """A mov of registers that are pending is no use of them: it happens after the wait."""
    written = [each.index for each in targets if isinstance(each, Register)]

    def guarded(w: Warp) -> Outcome:
        for register in sources:
            if type(w.t[register]) is Pending and w.postpone(sources, written, run):
                return None
        return run(w)

    return guarded if sources else run
