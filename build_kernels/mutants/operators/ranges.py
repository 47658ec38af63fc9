"""The values that 32-bit registers and predicates can have in any launch, as intervals.

From the parameters' ranges on, along the text and without its branches: an interval holds whatever
a thread executed before. It starts as that of every value and narrows, so it is right at any time.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from build_kernels.binaries.ptx.syntax import (
    Address,
    Immediate,
    Instruction,
    Kernel,
    Negated,
    Operand,
    Register,
    Special,
    Symbol,
)
from build_kernels.emulator.instructions.lookahead import mentioned
from dsv4_router_runtime.artifacts.manifest import Kernel as Artifact

from .statement import writes_first

_PASSES = 4
# A launch whose K is longer has no memory for W_gate.
_MOST_K_BLOCKS = 1 << 20


class Interval(NamedTuple):
    """The least and the greatest value, as signed numbers."""

    low: int
    high: int

    @property
    def is_one(self) -> bool:
        return self.low == self.high


ANY = Interval(-(1 << 31), (1 << 31) - 1)
COUNT = Interval(0, ANY.high)
BOOLEAN = Interval(0, 1)
FALSE, TRUE = Interval(0, 0), Interval(1, 1)


def _arithmetic(low: int, high: int) -> Interval:
    """Return an interval of results, of every value if one may wrap."""
    return Interval(low, high) if ANY.low <= low and high <= ANY.high else ANY


def _add(a: Interval, b: Interval) -> Interval:
    return _arithmetic(a.low + b.low, a.high + b.high)


def _subtract(a: Interval, b: Interval) -> Interval:
    return _arithmetic(a.low - b.high, a.high - b.low)


def _multiply(a: Interval, b: Interval) -> Interval:
    products = [x * y for x in a for y in b]
    return _arithmetic(min(products), max(products))


def _and(a: Interval, b: Interval) -> Interval:
    bounds = [each.high for each in (a, b) if each.low >= 0]
    return Interval(0, min(bounds)) if bounds else ANY


def _or(a: Interval, b: Interval) -> Interval:
    if a.low < 0 or b.low < 0:
        return ANY
    return Interval(max(a.low, b.low), (1 << max(a.high, b.high).bit_length()) - 1)


def _shift_left(a: Interval, b: Interval) -> Interval:
    return _multiply(a, Interval(1 << b.low, 1 << b.high)) if 0 <= b.low <= b.high < 31 else ANY


def _shift_right(a: Interval, b: Interval) -> Interval:
    if not 0 <= b.low <= b.high < 32:
        return ANY
    shifted = [x >> y for x in a for y in b]
    return Interval(min(shifted), max(shifted))


def _shift_right_unsigned(a: Interval, b: Interval) -> Interval:
    if a.low >= 0:
        return _shift_right(a, b)
    return Interval(0, (1 << 32 - b.low) - 1) if 0 < b.low <= b.high < 32 else ANY


def _least(a: Interval, b: Interval) -> Interval:
    return Interval(min(a.low, b.low), min(a.high, b.high))


def _greatest(a: Interval, b: Interval) -> Interval:
    return Interval(max(a.low, b.low), max(a.high, b.high))


def _remainder(a: Interval, b: Interval) -> Interval:
    return Interval(0, min(a.high, b.high - 1)) if a.low >= 0 and b.low > 0 else ANY


def _quotient(a: Interval, b: Interval) -> Interval:
    return Interval(a.low // b.high, a.high // b.low) if a.low >= 0 and b.low > 0 else ANY


def _as_signed(compute: Callable[[Interval, Interval], Interval]) -> Callable[..., Interval]:
    """Return the function for unsigned numbers: the same if none has the top bit."""
    return lambda a, b: compute(a, b) if a.low >= 0 and b.low >= 0 else ANY


_BINARY: Mapping[str, Callable[[Interval, Interval], Interval]] = {
    **{f"add.{kind}": _add for kind in ("s32", "u32")},
    **{f"sub.{kind}": _subtract for kind in ("s32", "u32")},
    **{f"mul.lo.{kind}": _multiply for kind in ("s32", "u32")},
    **{"and.b32": _and, "or.b32": _or, "shl.b32": _shift_left, "shr.s32": _shift_right},
    **{"shr.u32": _shift_right_unsigned, "min.s32": _least, "max.s32": _greatest},
    **{"min.u32": _as_signed(_least), "max.u32": _as_signed(_greatest)},
    **{"rem.s32": _remainder, "rem.u32": _remainder},
    **{"div.s32": _quotient, "div.u32": _quotient},
    **{"and.pred": _least, "or.pred": _greatest},
}
_SPECIALS = {"%tid.x": Interval(0, 1023), "%laneid": Interval(0, 31)}


@dataclass(frozen=True, kw_only=True)
class Facts:
    """What is given: the ranges of parameters, by offset, and of special registers."""

    parameters: Mapping[int, Interval]
    specials: Mapping[str, Interval]


NOTHING = Facts(parameters={}, specials=_SPECIALS)


def facts_of(kernel: Artifact) -> Facts:
    """Return the ranges that a manifest's entry admits."""
    problem, launch = kernel.problem, kernel.launch
    known = {
        name: Interval(allowed.low, ANY.high if allowed.high is None else allowed.high)
        for name in ("num_tokens", "num_experts", "top_k")
        for allowed in (getattr(problem, name),)
    }
    known["num_k_blocks"] = Interval(1, _MOST_K_BLOCKS)
    specials = dict(_SPECIALS)
    if launch.grid[0] == "k_splits":
        specials["%ctaid.x"] = Interval(0, launch.k_splits - 1)
    return Facts(
        parameters={p.offset: known[p.name] for p in kernel.parameters if p.name in known},
        specials=specials,
    )


class Ranges:
    """The intervals of a kernel's registers; reads: how many operands read each."""

    def __init__(self, kernel: Kernel, facts: Facts) -> None:
        self._facts = facts
        self._offsets = {p.name: p.offset for p in kernel.parameters}
        self._intervals: dict[int, Interval] = {}
        written: dict[int, list[Instruction]] = {}
        for instruction in kernel.instructions:
            for register in mentioned(instruction.operands[:1]):
                written.setdefault(register, []).append(instruction)
        self._numbers = {
            register
            for register, instructions in written.items()
            if all(map(_is_number, instructions))
        }
        for _ in range(_PASSES):
            for register, instructions in written.items():
                results = [self.result(each) for each in instructions]
                self._intervals[register] = Interval(
                    min(each.low for each in results), max(each.high for each in results)
                )
        self.reads: Counter[int] = Counter()
        masked: dict[int, bool] = {}
        for instruction in kernel.instructions:
            ignored = set(self.masked(instruction))
            for at, operand in enumerate(instruction.operands):
                is_result = at == 0 and isinstance(operand, Register) and writes_first(instruction)
                for register in () if is_result else mentioned([operand]):
                    self.reads[register] += 1
                    masked[register] = masked.get(register, True) and at in ignored
            if instruction.guard is not None:
                masked[instruction.guard[0].index] = False
        self._only_masked = {register for register in masked if masked[register]}

    def of(self, operand: Operand) -> Interval:
        """Return the interval of a source operand."""
        if isinstance(operand, Immediate) and isinstance(operand.value, int):
            value = operand.value
            value = value - (1 << 32) if ANY.high < value < 1 << 32 else value
            return Interval(value, value) if ANY.low <= value <= ANY.high else ANY
        if isinstance(operand, Special):
            return self._facts.specials.get(operand.name, ANY)
        if isinstance(operand, Register):
            whole = BOOLEAN if operand.type == "pred" else ANY
            return self._intervals.get(operand.index, whole) if _is_known(operand) else ANY
        if isinstance(operand, Negated):
            inner = self.of(operand.register)
            return Interval(1 - inner.high, 1 - inner.low)
        return ANY

    def result(self, ins: Instruction) -> Interval:
        """Return the interval of an instruction's result."""
        words, operands = ins.words, ins.operands
        target = operands[0] if operands else None
        if not isinstance(target, Register) or not _is_known(target):
            return ANY
        if target.type == "pred":
            return self._predicate(ins)
        if (compute := _BINARY.get(ins.opcode)) and len(operands) == 3:
            return compute(self.of(operands[1]), self.of(operands[2]))
        if words[0] in ("mov", "shfl") and words[-1][1:] == "32" and len(operands) > 1:
            return self.of(operands[1])
        if words[0] == "selp":
            return self._selected(operands)
        if words[0] == "popc":
            return Interval(0, 32)
        if ins.opcode in ("cvt.u32.u8", "cvt.u32.u16"):
            return Interval(0, 0xFFFF)
        if ins.opcode in ("ld.param.b32", "ld.param.u32", "ld.param.s32"):
            return self._parameter(operands[1])
        return ANY

    def masked(self, ins: Instruction) -> Iterator[int]:
        """Yield the places of operands that do not matter, since others decide the result."""
        words, operands = ins.words, ins.operands
        if ins.opcode in ("and.pred", "or.pred"):
            decides = FALSE if words[0] == "and" else TRUE
            for at, other in ((1, 2), (2, 1)):
                if self.of(operands[other]) == decides != self.of(operands[at]):
                    yield at
        if words[0] == "selp" and (which := self.of(operands[3])).is_one:
            yield 2 if which == TRUE else 1

    def is_ignored(self, register: Register) -> bool:
        """Return whether every instruction that reads a register has another operand decide."""
        return register.index in self._only_masked

    def is_nan_of(self, ins: Instruction) -> Register | None:
        """Return the register of which a comparison tells whether it is NaN, None if of others."""
        if ins.words[:2] != ("setp", "nan"):
            return None
        unknown = {
            each.index: each
            for each in ins.operands[1:]
            if isinstance(each, Register) and each.index not in self._numbers
        }
        return next(iter(unknown.values())) if len(unknown) == 1 else None

    def _predicate(self, ins: Instruction) -> Interval:
        words, operands = ins.words, ins.operands
        if ins.opcode in ("and.pred", "or.pred"):
            return _BINARY[ins.opcode](self.of(operands[1]), self.of(operands[2]))
        if ins.opcode == "not.pred" and isinstance(operands[1], Register):
            return self.of(Negated(operands[1]))
        if words[0] != "setp" or len(words) != 3 or words[2] not in ("s32", "u32", "b32"):
            return BOOLEAN
        a, b = self.of(operands[1]), self.of(operands[2])
        if words[2] == "u32" and min(a.low, b.low) < 0:
            return self._against_zero(words[1], b)
        return _compared(words[1], a, b)

    def _against_zero(self, comparison: str, b: Interval) -> Interval:
        """Return the result of an unsigned comparison of any number with b."""
        if b == Interval(0, 0) and comparison in ("lt", "ge"):
            return FALSE if comparison == "lt" else TRUE
        return BOOLEAN

    def _selected(self, operands: Sequence[Operand]) -> Interval:
        which = self.of(operands[3])
        first, second = self.of(operands[1]), self.of(operands[2])
        if which.is_one:
            return first if which == TRUE else second
        return Interval(min(first.low, second.low), max(first.high, second.high))

    def _parameter(self, operand: Operand) -> Interval:
        if isinstance(operand, Address) and isinstance(operand.base, Symbol):
            offset = self._offsets.get(operand.base.name)
            if offset is not None:
                return self._facts.parameters.get(offset + operand.offset, ANY)
        return ANY


def _is_number(ins: Instruction) -> bool:
    """Return whether an instruction writes an FP32 constant that is no NaN, and nothing else."""
    source = ins.operands[1] if len(ins.operands) == 2 else None
    return (
        ins.opcode == "mov.f32"
        and ins.guard is None
        and isinstance(source, Immediate)
        and not math.isnan(source.value)
    )


def _is_known(register: Register) -> bool:
    return register.type in ("b32", "s32", "u32", "pred")


def _compared(comparison: str, a: Interval, b: Interval) -> Interval:
    """Return the result of a comparison: one value if the intervals decide it."""
    negations = {"ge": "lt", "gt": "le", "ne": "eq"}
    if comparison in negations:
        inner = _compared(negations[comparison], a, b)
        return Interval(1 - inner.high, 1 - inner.low)
    always, never = {
        "lt": (a.high < b.low, a.low >= b.high),
        "le": (a.high <= b.low, a.low > b.high),
        "eq": (a.is_one and a == b, a.high < b.low or b.high < a.low),
    }.get(comparison, (False, False))
    return TRUE if always else FALSE if never else BOOLEAN


def changes_nothing(ranges: Ranges, before: Instruction, after: Instruction) -> bool:
    """Return whether a changed instruction has the same result in every launch that is allowed."""
    if before.guard != after.guard or before.operands[:1] != after.operands[:1]:
        return False
    result = ranges.result(before)
    if result.is_one and result == ranges.result(after):
        return True
    tested = ranges.is_nan_of(before)
    if tested is not None and tested == ranges.is_nan_of(after):
        return True
    masked = set(ranges.masked(before))
    unlike = {
        at
        for at, (old, new) in enumerate(zip(before.operands, after.operands, strict=False))
        if old != new
    }
    if before.opcode == after.opcode and unlike and unlike <= masked:
        return True
    # An unsigned comparison is the signed one if no operand has the top bit.
    unsigned = [word.replace("s32", "u32") for word in after.words]
    return (
        not unlike
        and unsigned == [word.replace("s32", "u32") for word in before.words]
        and before.words[0] in ("setp", "min", "max")
        and all(ranges.of(operand).low >= 0 for operand in before.operands[1:3])
    )


def rounds_to_the_same(
    ranges: Ranges, before: Instruction, after: Instruction, then: Instruction
) -> bool:
    """Return whether another offset from an aligned address is rounded down to the same address.

    then: the next instruction, the one that rounds, if any does.
    """
    if before.words[0] != "add" or then.words[0] != "and" or before.opcode != after.opcode:
        return False
    result, base, offset = before.operands
    if not isinstance(result, Register) or then.operands[1] != result:
        return False
    masks = (offset, after.operands[2], then.operands[2])
    numbers = [m.value for m in masks if isinstance(m, Immediate) and isinstance(m.value, int)]
    if len(numbers) != 3 or after.operands[1] != base or ranges.reads[result.index] != 1:
        return False
    old, new, mask = map(int, numbers)
    is_power = mask < 0 and -mask & (-mask - 1) == 0
    return is_power and old & mask == new & mask
