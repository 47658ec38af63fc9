"""A warp: its registers, the divergence of its 32 lanes, and the run of its instructions.

Lanes that took different branches are kept as fragments (a program counter and a mask). The
fragment with the lowest counter runs first. Fragments that meet at one instruction merge, which
reconverges structured code. Any fragment may run while another is blocked: threads of a warp make
progress independently (PTX ISA, "Scalable multithreading").
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol

import numpy as np

from build_kernels.binaries.ptx.syntax import Instruction
from build_kernels.emulator.execution.cta import Cta, Released
from build_kernels.emulator.execution.grid import Grid
from build_kernels.emulator.execution.interruption import Interruption, Partial, Wait
from build_kernels.emulator.execution.registers import Move, Pending, Taint
from build_kernels.emulator.lanes import (
    ALL,
    EVERY_LANE,
    LANES,
    Array,
    Mask,
    any_of,
    bits_of,
    lanes_of,
    numbers_of,
)
from build_kernels.emulator.memory.memory import Memory
from build_kernels.emulator.ordering.warp_clocks import WarpClocks

Run = Callable[["Warp"], Interruption]


class Block(Protocol):
    """Instructions that nothing interrupts: no other warp can tell when each of them runs."""

    length: int

    def run(self, w: Warp) -> bool:
        """Run them on the active lanes; False if they must run one by one."""
        ...


NOWHERE = 1 << 30  # beyond every program counter


@dataclass(frozen=True)
class DecodedInstruction:
    """An instruction ready to run; `guard` and `target` are -1 if it has none.

    block: this and those that follow, to run at once. probe: called with the warp, the lanes that
    came here and those that the guard lets execute it.
    """

    instruction: Instruction
    run: Run
    block: Block | None = None
    guard: int = -1
    negated: bool = False
    target: int = -1
    probe: Callable[[Warp, int, int], None] | None = None


@dataclass(eq=False)
class Fragment:
    """Lanes of a warp that run together.

    token: the state of a half-done instruction. refused: the wait that last gave up early.
    """

    pc: int
    mask: int
    wait: Wait | None = None
    token: Any = None
    refused: Any = None
    timed_out: bool = False


class Warp(WarpClocks):
    """State of one warp. Register values are immutable arrays of 32: writes replace them.

    r, t: value and taint (poison, or pending) of each register. groups: asynchronous work of the
    warp, owned by the modules that issue it. runnable: the queue of warps that may run. leave:
    called with the lanes that exited. unfenced: by lane, the relaxed reads since its fence.
    cluster_arrived: the lanes that have arrived at the cluster's barrier and not waited;
    cluster_generations: the one that each of them waits for.
    """

    def __init__(
        self,
        grid: Grid,
        cta: Cta,
        index: int,
        code: Sequence[DecodedInstruction],
        runnable: deque[Warp],
        leave: Callable[[Warp, int], None],
    ) -> None:
        threads = min(LANES, cta.threads - index * LANES)
        self.live = (1 << threads) - 1
        super().__init__(
            grid.log,
            grid.clocks,
            cta.index,
            index,
            cta.first_actor + index * LANES,
            cta.first_tick,
            self.live,
            code[0].instruction,
        )
        self.grid = grid
        self.cta = cta
        self.active = lanes_of(self.live)
        self.fragments = [Fragment(0, self.live)]
        self.fragment = self.fragments[0]
        self.r: list[Array] = list(grid.poison)
        self.t: list[Taint] = [EVERY_LANE] * len(self.r)
        self.specials: dict[tuple[str, Any], Array] = {}
        self.local: Memory | None = None
        self.groups: dict[str, Any] = {}
        self.unfenced: dict[int, list[Released]] = {}
        self.cluster_arrived = 0
        self.cluster_generations = [0] * LANES
        cta.living[self] = self.live
        self.queued = True
        self.rest = 0
        self.budget = 0
        self._code = code
        self._runnable = runnable
        self._leave = leave

    def activate(self, bits: int) -> None:
        self.bits, self.active = bits, lanes_of(bits)

    def put(self, register: int, value: Array, taint: Mask | None) -> None:
        """Write the active lanes of a register; the value has its storage type."""
        if self.bits == ALL:
            self.r[register] = value
            self.t[register] = taint
            return
        self.r[register] = np.where(self.active, value, self.r[register])
        old = self.t[register]
        if old is None and taint is None:
            return
        if isinstance(old, Pending):
            old = self.unwaited(register, old)
        merged = np.where(
            self.active, False if taint is None else taint, False if old is None else old
        )
        self.t[register] = merged if any_of(merged) else None

    def taint(self, registers: Iterable[int]) -> Mask | None:
        """Return the lanes in which any of these registers holds poison; None for none.

        A register that an operation is still to write is reported."""
        found: Mask | None = None
        for register in registers:
            taint = self.t[register]
            if taint is None:
                continue
            if isinstance(taint, Pending):
                taint = self.unwaited(register, taint)
                if taint is None:
                    continue
            found = taint if found is None else found | taint
        return found

    def unwaited(self, register: int, pending: Pending) -> Mask | None:
        """Report a register that is used before its wait; return its taint after the wait."""
        self.report(
            "unwaited-register",
            f"{self.grid.kernel.registers[register].name} is used before the wait for "
            f"{pending.what}",
            other=pending.owner.instruction,
            by_the_letter=pending.owner.guarded,
        )
        pending.owner.settle()
        self.t[register] = pending.taint
        return pending.taint

    def postpone(self, sources: Iterable[int], targets: Iterable[int], run: Run) -> bool:
        """Put a mov off if it reads pending registers; False if it may run now."""
        owners = [t.owner for t in (self.t[i] for i in sources) if isinstance(t, Pending)]
        if not owners:
            return False
        owner = owners[-1]
        pending = {}
        for target in targets:
            before = self.t[target]
            if self.bits != self.live and isinstance(before, Pending):
                return False
            pending[target] = Pending("the operation that it copies from", owner)
            self.t[target] = pending[target]
        owner.moves.append(Move(pending, self.bits, partial(run, self)))
        return True

    def hand_over(self, targets: Iterable[tuple[int, Pending, Taint]]) -> None:
        """Make registers readable that still wait for an operation, after its wait."""
        for register, pending, _ in targets:
            if self.t[register] is pending:
                self.t[register] = pending.taint

    def make_up(self, moves: list[Move]) -> None:
        """Run moves that were put off and whose targets still wait for them."""
        bits = self.bits
        for move in moves:
            if any(self.t[target] is not was for target, was in move.pending.items()):
                continue
            for target in move.pending:
                self.t[target] = None
            self.activate(move.bits)
            move.run()
        self.activate(bits)
        moves.clear()

    def poisoned(self, what: str, registers: Iterable[int], lane: int | None = None) -> bool:
        """Report poison in active lanes of registers that are used as `what`."""
        taints = self.t
        if all([taints[register] is None for register in registers]):
            return False
        taint = self.taint(registers)
        if taint is None:
            return False
        bad = taint & self.active
        if not any_of(bad):
            return False
        self.report(
            "poison",
            f"{what} comes from memory or a register that was never written",
            lane=int(np.flatnonzero(bad)[0]) if lane is None else lane,
        )
        return True

    def wake(self) -> None:
        """End the waits of all fragments, and queue the warp."""
        for fragment in self.fragments:
            fragment.wait = None
        if not self.queued:
            self.queued = True
            self._runnable.append(self)

    def _merge(self) -> None:
        places: dict[int, Fragment] = {}
        kept = []
        for fragment in self.fragments:
            at = places.get(fragment.pc)
            free = fragment.token is None and (fragment.wait is None or fragment.wait.convergence)
            if at is not None and free:
                at.mask |= fragment.mask
                at.wait = None
                continue
            if free:
                places[fragment.pc] = fragment
            kept.append(fragment)
        self.fragments = kept

    def run(self, budget: int) -> None:
        """Run up to `budget` instructions, or until every fragment is blocked."""
        self.budget = budget
        while self.budget > 0 and self.fragments:
            ready = [f for f in self.fragments if f.wait is None]
            if not ready:
                return
            fragment = min(ready, key=lambda f: f.pc) if len(ready) > 1 else ready[0]
            others = len(self.fragments) > 1
            later = [f.pc for f in self.fragments if f.pc > fragment.pc] if others else []
            stop = min(later, default=NOWHERE)
            self.fragment = fragment
            while self.budget > 0:
                step = self._code[fragment.pc]
                bits = fragment.mask
                block = step.block
                if (
                    block is not None
                    and block.length <= self.budget
                    and block.length <= stop - fragment.pc
                ):
                    if bits != self.bits:
                        self.activate(bits)
                    if block.run(self):
                        self.budget -= block.length
                        fragment.pc += block.length
                        fragment.timed_out = False
                        if fragment.pc >= stop:
                            break
                        continue
                self.budget -= 1
                if step.guard >= 0:
                    bits &= self._guard(step, fragment)
                if step.probe is not None:
                    step.probe(self, fragment.mask, bits)
                if step.target >= 0:
                    if self._branch(fragment, step.target, bits) or others:
                        break
                    continue
                if bits:
                    if bits != self.bits:
                        self.activate(bits)
                    self.instruction = step.instruction
                    outcome = step.run(self)
                    if outcome is not None:
                        if isinstance(outcome, Wait):
                            self._block(fragment, outcome)
                        elif isinstance(outcome, Partial):
                            self._leave_behind(fragment, outcome)
                        elif not self._retire(fragment, bits):
                            fragment.pc += 1
                        break
                fragment.pc += 1
                fragment.timed_out = False
                if fragment.pc >= stop:
                    break
            if len(self.fragments) > 1:
                self._merge()
                if self.budget <= 0:
                    # A fragment that spins must not starve the others.
                    self.fragments = self.fragments[1:] + self.fragments[:1]

    def _guard(self, step: DecodedInstruction, fragment: Fragment) -> int:
        self.instruction = step.instruction
        if self.t[step.guard] is not None:
            self.activate(fragment.mask)
            self.poisoned("the predicate", (step.guard,))
        taken = bits_of(self.r[step.guard])
        return ~taken & ALL if step.negated else taken

    def _branch(self, fragment: Fragment, target: int, bits: int) -> bool:
        if bits == fragment.mask:
            fragment.pc = target
            return False
        fragment.pc += 1
        if bits == 0:
            return False
        fragment.mask &= ~bits
        self.fragments.append(Fragment(target, bits))
        return True

    def _leave_behind(self, fragment: Fragment, partial: Partial) -> None:
        """Let other warps run before the lanes that are left execute the instruction."""
        self.fragments.append(Fragment(fragment.pc + 1, fragment.mask & ~partial.left))
        fragment.mask = partial.left
        self.rest = partial.rest
        self.budget = 0

    def _block(self, fragment: Fragment, wait: Wait) -> None:
        fragment.wait = wait
        for signal in wait.signals:
            signal.waiters[self] = None

    def _retire(self, fragment: Fragment, bits: int) -> bool:
        """Remove lanes that exited; True if the whole fragment is gone."""
        self.live &= ~bits
        fragment.mask &= ~bits
        if not fragment.mask:
            self.fragments.remove(fragment)
        for other in self.fragments:
            if other.wait is not None and other.wait.convergence:
                other.wait = None
        self._leave(self, bits)
        return not fragment.mask

    def waits_for_cluster(self, bits: int) -> int:
        """Return those of these lanes that the cluster's barrier counts in its generation."""
        present = self.cta.cluster.barrier.generation
        return sum(
            1 << lane
            for lane in numbers_of(bits & self.cluster_arrived)
            if self.cluster_generations[lane] == present
        )

    def converged(self, required: int) -> Wait | None:
        """Return a wait unless all live lanes of `required` execute this instruction now."""
        missing = required & self.live & ~self.bits
        if not missing:
            return None
        return Wait(lambda: f"lanes {missing:#010x} of the warp to converge", convergence=True)
