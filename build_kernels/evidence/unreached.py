"""Explain the outcomes that no case reaches: by another one, or by a reason."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache

from build_kernels.binaries.ptx.syntax import Instruction, Kernel, Register
from build_kernels.emulator.coverage import (
    BLOCK,
    FALSE,
    PREDICATE,
    RAN,
    TRUE,
    Coverage,
    Place,
)

Outcome = tuple[Place, str]

# The one list of what cannot be reached: the outcome that was not seen of a predicate whose block
# ran, the instructions about it, one a line with `> ` before its own, and the reason. P is a
# predicate, R a register. The first that matches counts.
_UNREACHABLE: tuple[tuple[str, str, str], ...] = (
    (
        TRUE,
        r"> setp.lt.[su]32 (P), R, -?\d+;\nand.pred P, \1, P;\nselp.b32 R, -1, 0, P;",
        "the correction of a floored division: no dividend is negative",
    ),
    (
        TRUE,
        r"> setp.lt.s32 (P), R, 1;\n(?:.*\n){0,4}?@\1 bra",
        "a loop without a turn: top_k and a chunk's blocks of K are 1 or more",
    ),
    (
        TRUE,
        r"> setp.lt.s32 (P), R, 0;\n@\1 bra .*\ngriddepcontrol.wait",
        "true by construction, so that the wait depends on a division",
    ),
    (
        TRUE,
        r"> setp.eq.b32 (P), R, 0;\nmov.b32 R, 32;\n@\1 bra .*\nadd.s32 R, R, -1;",
        "no lane holds the largest key of all lanes",
    ),
    (
        TRUE,
        r"> (setp.ge.u32 P, R, R;\nmov.b32 R, 1;\nmbarrier.arrive"
        r"|setp.ne.b64 P, RD, 0;\nor.pred .*\nvote.sync.ballot"
        r"|setp.ne.b32 (P), R, 0;\nselp.b32 R, 1, 0, \2;\n.*fault"
        r"|.*\.reg \.pred fault)",
        "damage of the workspace: the rung `faults`",
    ),
    (
        FALSE,
        r"> setp.ne.b32 P, R, 0;\nand.pred .*\n@P bra .*\nsetp.eq.b32 P, R, 0;\n@P bra .*\n"
        r"mov.u64 RD, %globaltimer",
        "a peer that 1024 polls do not see: the rung `faults`",
    ),
    (
        FALSE,
        r"> setp.eq.b32 P, R, 0;\n@P bra .*\nmov.u64 RD, %globaltimer",
        "a peer that 1024 polls do not see: the rung `faults`",
    ),
    (
        TRUE,
        r"fault.*\n> setp.ne.b32 (P), R, 0;\n@\1 bra",
        "a peer that 1024 polls do not see: the rung `faults`",
    ),
    (
        TRUE,
        r"> or.pred P, P, P;\nvote.sync.ballot.b32 .*\nsetp.ne.b32 .*\nselp.b32 .*\n.*fault",
        "damage of the workspace: the rung `faults`",
    ),
    (
        TRUE,
        r"> setp.eq.s32 (P), R, 0;\nselp.b32 R, 0, R, \1;",
        "a key is 1 or more, and slot 0 is whole if there are more slots than a group's",
    ),
    (
        TRUE,
        r"bar.warp.sync .*\n> setp.eq.s32 P, R, 0;",
        "the estimates of router_topk leave top_k experts or more",
    ),
    (
        TRUE,
        r"selp.b32 R, 8, 0, P;\n> setp.(ge|le).s32 (P), R, R;\n@\2 bra",
        "a batch of router_topk has a candidate: no other one begins",
    ),
    (
        FALSE,
        r"> mbarrier.try_wait",
        "a wait of the emulator gives up only if nothing else can go on",
    ),
    (
        FALSE,
        r"> setp.ne.b32 p, R, 0;\nwgmma",
        "a constant: the first product of an accumulator that is zero",
    ),
)
_BEFORE, _AFTER = 2, 8


@dataclass(frozen=True, kw_only=True)
class Unreached:
    """An outcome that was not seen. follows: the line of the outcome that it follows from, 0 if
    none does; reason: why it cannot be reached, empty if nothing is known."""

    kind: str
    outcome: str
    line: int
    text: str
    follows: int
    reason: str

    @property
    def is_open(self) -> bool:
        """Return whether a case may be missing."""
        return not (self.follows or self.reason)


def unreached(coverage: Coverage) -> list[Unreached]:
    """Return every outcome that was not seen, in the order of the text."""
    search, code = _Search(coverage), coverage.kernel.instructions
    found = []
    for place, outcome in coverage.missing():
        cause = search.cause(place, outcome)
        found.append(
            Unreached(
                kind=place.kind,
                outcome=outcome,
                line=code[place.index].line,
                text=code[place.index].text,
                follows=0 if cause is None else code[cause].line,
                reason=_reason(code, place.index, outcome) if cause is None else "",
            )
        )
    return found


def _reason(code: Sequence[Instruction], index: int, outcome: str) -> str:
    start = max(0, index - _BEFORE)
    lines = [ins.text.replace("\t", "") for ins in code[start : index + _AFTER]]
    lines[index - start] = "> " + lines[index - start]
    text = "\n".join(" ".join(line.split()) for line in lines)
    for missed, pattern, reason in _UNREACHABLE:
        if missed == outcome and re.search(_expanded(pattern), text):
            return reason
    return ""


@cache
def _expanded(pattern: str) -> str:
    """Write the registers of a pattern out."""
    for name, digits in ((r"\bRD\b", "%rd"), (r"\bR\b", "%r"), (r"\bP\b", "%p")):
        pattern = re.sub(name, rf"{digits}\\d+", pattern)
    return pattern


class _Search:
    """Find from which other outcome, not seen either, one follows."""

    def __init__(self, coverage: Coverage) -> None:
        self._code = coverage.kernel.instructions
        self._missing = set(coverage.missing())
        self._leaders = [place.index for place in coverage.seen if place.kind == BLOCK]
        self._writers: dict[int, list[Place]] = defaultdict(list)
        self._others = _other_writers(coverage.kernel)
        for place in coverage.seen:
            if place.kind == PREDICATE:
                self._writers[place.register].append(place)

    def cause(self, place: Place, outcome: str) -> int | None:
        """Return the index of the instruction with the other outcome, or None."""
        block = max(leader for leader in self._leaders if leader <= place.index)
        if place.kind == BLOCK:
            # A block does not run if no branch to it was taken.
            return next(self._ways_to(block), None)
        if (Place(kind=BLOCK, index=block), RAN) in self._missing:
            return block
        if place.kind != PREDICATE:
            value = outcome if not place.negated else TRUE if outcome == FALSE else FALSE
            return self._never(place.register, value)
        ins = self._code[place.index]
        if ins.opcode not in ("and.pred", "or.pred"):
            return None
        causes = [
            self._never(operand.index, outcome) if isinstance(operand, Register) else None
            for operand in ins.operands[1:]
        ]
        # One operand decides that a conjunction is never true; that it is never false takes both.
        one_decides = outcome == (TRUE if ins.opcode == "and.pred" else FALSE)
        if not one_decides and None in causes:
            return None
        return next((cause for cause in causes if cause is not None), None)

    def _never(self, register: int, value: str) -> int | None:
        """Return the one instruction that sets a predicate, if it never sets this value."""
        writers = self._writers[register]
        if register in self._others or not writers:
            return None
        if all((writer, value) in self._missing for writer in writers):
            return writers[0].index
        return None

    def _ways_to(self, block: int) -> Iterator[int]:
        for at, ins in enumerate(self._code):
            if ins.target == block or (at == block - 1 and ins.words[0] not in ("ret", "exit")):
                yield at


def _other_writers(kernel: Kernel) -> set[int]:
    """Return the predicate registers that some instruction sets to a constant."""
    return {
        ins.operands[0].index
        for ins in kernel.instructions
        if ins.words[0] == "mov"
        and isinstance(ins.operands[0], Register)
        and ins.operands[0].type == "pred"
    }
