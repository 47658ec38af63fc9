"""Record what runs of one kernel reach: blocks, and both values of predicates, selects and guards.

A place is watched until all of its outcomes were seen, so that later runs are hardly slower.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial

from build_kernels.binaries.ptx.syntax import (
    Immediate,
    Instruction,
    Kernel,
    Negated,
    Pair,
    Register,
)
from build_kernels.emulator.execution.interruption import Interruption
from build_kernels.emulator.execution.registers import Pending
from build_kernels.emulator.execution.warp import DecodedInstruction, Run, Warp
from build_kernels.emulator.lanes import bits_of

KINDS = BLOCK, PREDICATE, SELECT, GUARD = ("block", "predicate", "select", "guard")
RAN, TRUE, FALSE = "ran", "true", "false"
_ENDS = ("bra", "ret", "exit", "trap")


@dataclass(frozen=True, kw_only=True)
class Place:
    """A part of the text with one outcome or two.

    kind: `block`, the start of a basic block; `predicate`, a result of the instruction; `select`,
    the predicate of a selp; `guard`, that of a branch or of another predicated instruction.
    register: the predicate's, -1 for a block.
    """

    kind: str
    index: int
    register: int = -1
    negated: bool = False

    @property
    def outcomes(self) -> tuple[str, ...]:
        return (RAN,) if self.kind == BLOCK else (TRUE, FALSE)


def places_of(kernel: Kernel) -> list[Place]:
    """Return the places of a kernel's text in its order.

    Left out: instructions that no path leads to, and predicates that the text sets to a constant
    or never reads.
    """
    leaders, reachable = _basic_blocks(kernel)
    read = _predicates_read(kernel)
    places = []
    for at in sorted(reachable):
        ins = kernel.instructions[at]
        if at in leaders:
            places.append(Place(kind=BLOCK, index=at))
        if ins.guard is not None:
            register, negated = ins.guard
            places.append(Place(kind=GUARD, index=at, register=register.index, negated=negated))
        if ins.words[0] == "selp":
            which = ins.operands[3]
            inner = which.register if isinstance(which, Negated) else which
            if isinstance(inner, Register):
                negated = inner is not which
                places.append(Place(kind=SELECT, index=at, register=inner.index, negated=negated))
        written = _predicates_written(ins)
        places += [
            Place(kind=PREDICATE, index=at, register=each.index)
            for each in written
            if each.index in read
        ]
    return places


def _predicates_read(kernel: Kernel) -> set[int]:
    """Return the predicate registers that are operands or guards."""
    read = set()
    for ins in kernel.instructions:
        start = 1 if any(_predicates_written(ins)) else 0
        operands = [*ins.operands[start:], *(ins.guard or ())[:1]]
        for operand in operands:
            register = operand.register if isinstance(operand, Negated) else operand
            if isinstance(register, Register) and register.type == "pred":
                read.add(register.index)
    return read


def _predicates_written(ins: Instruction) -> Iterator[Register]:
    """Yield the predicate registers that an instruction computes."""
    operands = ins.operands
    constant = all(isinstance(each, Immediate) for each in operands[1:])
    # elect.sync takes a constant alone, and yet its lanes differ.
    if not operands or (constant and ins.words[0] != "elect"):
        return
    pair = operands[0]
    for target in (pair.first, pair.second) if isinstance(pair, Pair) else (pair,):
        if isinstance(target, Register) and target.type == "pred":
            yield target


def _basic_blocks(kernel: Kernel) -> tuple[set[int], set[int]]:
    """Return the first instructions of the basic blocks, and all that a path leads to."""
    code = kernel.instructions
    leaders, reachable, todo = {0}, set[int](), [0]
    while todo:
        at = todo.pop()
        if at in reachable or at >= len(code):
            continue
        reachable.add(at)
        ins = code[at]
        ends = ins.words[0] in _ENDS
        following = [] if ends and ins.guard is None else [at + 1]
        if ins.target is not None:
            following.append(ins.target)
        if ends:
            leaders.update(following)
        todo += following
    return leaders & reachable, reachable


class Coverage:
    """The outcomes that runs of one kernel had, by place; `emulate` adds those of its launch."""

    def __init__(self, kernel: Kernel) -> None:
        self.kernel = kernel
        self.seen: dict[Place, set[str]] = {place: set() for place in places_of(kernel)}

    def missing(self) -> list[tuple[Place, str]]:
        """Return the outcomes that were not seen, in the order of the text."""
        return [
            (place, outcome)
            for place, seen in self.seen.items()
            for outcome in place.outcomes
            if outcome not in seen
        ]

    @property
    def instructions(self) -> frozenset[int]:
        """The indexes of the instructions in the blocks that ran."""
        leaders, reachable = _basic_blocks(self.kernel)
        ordered = sorted(leaders)
        ends = [*ordered[1:], len(self.kernel.instructions)]
        return frozenset(
            index
            for first, end in zip(ordered, ends, strict=True)
            if self.seen[Place(kind=BLOCK, index=first)]
            for index in range(first, end)
            if index in reachable
        )

    def counts(self) -> dict[str, tuple[int, int]]:
        """Return by kind how many places had every outcome, and how many there are."""
        found = dict.fromkeys(KINDS, (0, 0))
        for place, seen in self.seen.items():
            reached, every = found[place.kind]
            found[place.kind] = reached + (len(seen) == len(place.outcomes)), every + 1
        return found

    def watch(self, kernel: Kernel, code: Sequence[DecodedInstruction]) -> list[DecodedInstruction]:
        """Return the code of one launch with probes; ValueError if it is of another kernel."""
        if kernel.instructions != self.kernel.instructions:
            raise ValueError(
                f"this coverage is of another text of {self.kernel.name} than the launch's, of "
                f"{kernel.name}: make one with Coverage(parse(text))"
            )
        return _Probes(self.seen, code).steps


class _Probes:
    """The probes of one launch. Each takes itself away when its place had every outcome.

    steps: the code; a run of instructions with a probe in it is no block, until the last is gone.
    """

    def __init__(self, seen: dict[Place, set[str]], code: Sequence[DecodedInstruction]) -> None:
        self.steps = list(code)
        self._seen = seen
        self._code = code
        self._open: dict[int, list[Place]] = defaultdict(list)
        self._start = {
            index: start
            for start, step in enumerate(code)
            if step.block is not None
            for index in range(start, start + step.block.length)
        }
        self._probed: dict[int, set[int]] = defaultdict(set)
        for place, outcomes in seen.items():
            if len(outcomes) < len(place.outcomes):
                self._open[place.index].append(place)
        for index in self._open:
            self._probed[self._start.get(index, index)].add(index)
        for index in self._open.keys() | self._probed.keys():
            self._set(index)

    def _set(self, index: int) -> None:
        """Give a step the probes of its open places, and its block if nothing in it is probed."""
        step, places = self._code[index], self._open.get(index, [])
        if self._probed.get(index):
            step = replace(step, block=None)
        if any(place.kind == PREDICATE for place in places):
            step = replace(step, run=partial(self._run, index, step.run))
        if any(place.kind != PREDICATE for place in places):
            step = replace(step, probe=partial(self._before, index))
        self.steps[index] = step

    def _before(self, index: int, w: Warp, lanes: int, taken: int) -> None:
        """Look at a step that `lanes` have come to and that `taken` of them execute."""
        for place in tuple(self._open[index]):
            if place.kind == BLOCK:
                self._found(place, RAN)
            elif place.kind == GUARD:
                self._saw(w, place, lanes)
            elif place.kind == SELECT:
                self._saw(w, place, taken)

    def _run(self, index: int, run: Run, w: Warp) -> Interruption:
        outcome = run(w)
        if outcome is None:
            for place in tuple(self._open[index]):
                if place.kind == PREDICATE:
                    self._saw(w, place, w.bits)
        return outcome

    def _saw(self, w: Warp, place: Place, lanes: int) -> None:
        """Record the values of a predicate in some lanes. Poison is no value."""
        taint = w.t[place.register]
        if isinstance(taint, Pending):
            return
        if taint is not None:
            lanes &= ~bits_of(taint)
        true = bits_of(w.r[place.register])
        if place.negated:
            true = ~true
        if lanes & true:
            self._found(place, TRUE)
        if lanes & ~true:
            self._found(place, FALSE)

    def _found(self, place: Place, outcome: str) -> None:
        seen = self._seen[place]
        seen.add(outcome)
        if len(seen) < len(place.outcomes) or place not in self._open[place.index]:
            return
        self._open[place.index].remove(place)
        self._set(place.index)
        if not self._open[place.index]:
            start = self._start.get(place.index, place.index)
            self._probed[start].discard(place.index)
            self._set(start)
