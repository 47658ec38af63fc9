"""A warp: 32 lanes of registers, their divergence, and what each lane knows of the others.

Lanes that took different branches are kept as fragments (a program counter and a mask). The
fragment with the lowest counter runs first, and fragments that meet at one instruction merge,
which reconverges structured code. Any fragment may run while another is blocked: threads of a
warp make progress independently (PTX ISA, "Scalable multithreading").
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
from numpy.typing import NDArray

from build_kernels.emulator.findings import Thread
from build_kernels.emulator.ordering.clocks import GENERIC, INIT, WEAK, Clock, join
from build_kernels.emulator.ptx.syntax import Instruction

if TYPE_CHECKING:
    from build_kernels.emulator.execution.cta import Cta
    from build_kernels.emulator.execution.machine import Machine
    from build_kernels.emulator.ordering.release import Released


LANES = 32

ALL = (1 << LANES) - 1

LANE_INDEX = np.arange(LANES)

STORAGE = {1: np.bool_, 8: np.uint8, 16: np.uint16, 32: np.uint32, 64: np.uint64}

Array = NDArray[Any]

Mask = NDArray[np.bool_]


@lru_cache(maxsize=4096)
def lanes_of(bits: int) -> Mask:
    """bool[32] from a lane mask."""
    mask = (bits >> LANE_INDEX & 1).astype(bool)
    mask.flags.writeable = False
    return mask


@lru_cache(maxsize=4096)
def indices_of(bits: int) -> NDArray[np.int64]:
    """Lane numbers of a mask, ascending."""
    return np.flatnonzero(lanes_of(bits))


def bits_of(mask: Mask) -> int:
    """Lane mask from bool[32]."""
    return int(np.packbits(mask, bitorder="little").view(np.uint32)[0])


class Signal:
    """Something warps wait for."""

    def __init__(self) -> None:
        self.waiters: dict[Warp, None] = {}  # in order, for the same run from the same seed

    def notify(self) -> None:
        for warp in self.waiters:
            warp.wake()
        self.waiters.clear()


@dataclass(eq=False)
class Wait:
    """Why a fragment does not go on. times_out: the instruction may also give up (try_wait).

    reason(): what it waits for, as of the asking."""

    reason: Callable[[], str]
    signals: tuple[Signal, ...] = ()
    times_out: bool = False
    convergence: bool = False


class Exited:
    """Returned by an instruction after which its lanes are no more."""


EXITED = Exited()


@dataclass(frozen=True)
class Partial:
    """Returned by an instruction that only some lanes have executed.

    left: those that have not; rest: how many of the warp's turns to pass over before they do."""

    left: int
    rest: int


Outcome = Wait | Exited | Partial | None
Run = Callable[["Warp"], Outcome]


@dataclass(eq=False)
class Fragment:
    """Lanes of a warp that run together.

    token: the state of a half-done instruction; refused: the wait that last gave up early."""

    pc: int
    mask: int
    wait: Wait | None = None
    token: Any = None
    refused: Any = None
    timed_out: bool = False


@dataclass(eq=False, slots=True)
class Pending:
    """A register that an asynchronous operation will write: not to be read before its wait.

    taint: what the register's taint is once it was waited for.
    """

    what: str
    owner: Writer
    taint: Mask | None = None


class Writer(Protocol):
    """An asynchronous operation that writes registers.

    moves: register moves that came before the wait, to be made up for after it."""

    instruction: Instruction
    moves: list[Move]

    def settle(self) -> None:
        """Finish as if it had been waited for, to go on after the finding that it was not."""
        ...


@dataclass(eq=False)
class Move:
    """A mov whose sources are pending: compilers put copies between a load and its wait.

    pending: what the targets hold till then; bits: the lanes; run: the mov itself."""

    pending: dict[int, Pending]
    bits: int
    run: Callable[[Warp], Outcome]


Taint = Mask | Pending | None


@dataclass(frozen=True)
class Decoded:
    """An instruction ready to run."""

    instruction: Instruction
    run: Callable[[Warp], Outcome]
    guard: int = -1
    negated: bool = False
    target: int = -1


EVERY_LANE = lanes_of(ALL)


class Warp:
    """State of one warp. Register values are immutable arrays of 32: writes replace them."""

    def __init__(self, machine: Machine, cta: Cta, index: int, threads: int, actor: int) -> None:
        self.machine = machine
        self.cta = cta
        self.index = index
        self.actor = actor
        self.actors = actor + LANE_INDEX.astype(np.int64)
        self.live = (1 << threads) - 1
        self.fragments = [Fragment(0, self.live)]
        poison: dict[int, Array] = {
            n: np.full(LANES, -1, dtype=np.int64).astype(t) for n, t in STORAGE.items()
        }
        self.r: list[Array] = [poison[bits] for bits in machine.register_bits]
        self.t: list[Taint] = [EVERY_LANE] * len(self.r)
        self.bits = self.live
        self.active = lanes_of(self.live)
        self.fragment = self.fragments[0]
        self.instruction: Instruction = machine.program[0].instruction
        self.specials: dict[str, Array] = {}
        # Knowledge
        # A CTA's start is its first tick; what its threads do has later ones.
        self.first_tick = machine.first_tick(actor)
        self.tick = self.first_tick + 1
        zero = machine.clocks.zero()
        self.clocks: list[Clock] = [zero] * LANES
        self.fenced: list[Clock | None] = [None] * LANES
        self.fence_scope = [WEAK] * LANES
        self.unfenced: list[list[Released]] = [[] for _ in range(LANES)]
        self.tensor = np.zeros(machine.clocks.size, dtype=np.int32)
        self._settled = 0
        # Asynchronous work of this warp, owned by the modules that issue it
        self.groups: dict[str, Any] = {}
        self.cluster_arrived = 0
        self.cluster_generation = 0
        self.queued = True
        self.rest = 0
        self.budget = 0

    # ---- identity ----

    def thread(self, lane: int | None = None) -> Thread:
        return Thread(cta=self.cta.index, warp=self.index, lane=lane)

    def first_lane(self) -> int:
        return (self.bits & -self.bits).bit_length() - 1

    # ---- registers ----

    def put(self, register: int, value: Array, taint: Mask | None) -> None:
        """Write the active lanes of a register (unsigned storage type)."""
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
        self.t[register] = merged if merged.any() else None

    def taint(self, registers: Iterable[int]) -> Mask | None:
        """Which lanes of any of these registers hold poison; None for none.

        Reading a register that an operation still has to write is reported here."""
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
        self.machine.report(
            "unwaited-register",
            f"{self.machine.kernel.registers[register].name} is used before the wait for "
            f"{pending.what}",
            warp=self,
            other=pending.owner.instruction,
        )
        pending.owner.settle()
        self.t[register] = pending.taint
        return pending.taint

    def postpone(
        self, sources: Iterable[int], targets: Iterable[int], run: Callable[[Warp], Outcome]
    ) -> bool:
        """Put a mov off when it reads registers that are pending; False when it may run now."""
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
        owner.moves.append(Move(pending, self.bits, run))
        return True

    def make_up(self, moves: list[Move]) -> None:
        """Run moves that were put off, where their targets still wait for them."""
        bits, active = self.bits, self.active
        for move in moves:
            if any(self.t[target] is not was for target, was in move.pending.items()):
                continue
            for target in move.pending:
                self.t[target] = None
            self.bits, self.active = move.bits, lanes_of(move.bits)
            move.run(self)
        self.bits, self.active = bits, active
        moves.clear()

    def poisoned(self, what: str, registers: Iterable[int], lane: int | None = None) -> bool:
        """Report poison in active lanes of these registers, used as `what`."""
        taint = self.taint(registers)
        if taint is None:
            return False
        bad = taint & self.active
        if not bad.any():
            return False
        self.machine.report(
            "poison",
            f"{what} comes from memory or a register that was never written",
            warp=self,
            lane=int(np.flatnonzero(bad)[0]) if lane is None else lane,
        )
        return True

    # ---- running ----

    def wake(self) -> None:
        for fragment in self.fragments:
            fragment.wait = None
        if not self.queued:
            self.queued = True
            self.machine.runnable.append(self)

    def _merge(self) -> None:
        """Fuse fragments that stand at one instruction and have nothing half done."""
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
        program = self.machine.program
        self.budget = budget
        while self.budget > 0 and self.fragments:
            ready = [f for f in self.fragments if f.wait is None]
            if not ready:
                return
            fragment = min(ready, key=lambda f: f.pc) if len(ready) > 1 else ready[0]
            others = [f.pc for f in self.fragments if f is not fragment]
            stop = min((pc for pc in others if pc > fragment.pc), default=1 << 30)
            self.fragment = fragment
            while self.budget > 0:
                step = program[fragment.pc]
                self.budget -= 1
                bits = fragment.mask
                if step.guard >= 0:
                    bits &= self._guard(step, fragment)
                if step.target >= 0:
                    if self._branch(fragment, step.target, bits) or others:
                        break
                    continue
                if bits:
                    if bits != self.bits:
                        self.bits = bits
                        self.active = lanes_of(bits)
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

    def _guard(self, step: Decoded, fragment: Fragment) -> int:
        self.instruction = step.instruction
        if self.t[step.guard] is not None:
            self.bits = fragment.mask
            self.active = lanes_of(self.bits)
            self.poisoned("the predicate", (step.guard,))
        taken = bits_of(self.r[step.guard])
        return ~taken & ALL if step.negated else taken

    def _branch(self, fragment: Fragment, target: int, bits: int) -> bool:
        """Move the fragment; True when it was split."""
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
        """Let other warps run before these lanes execute the fragment's instruction too."""
        self.fragments.append(Fragment(fragment.pc + 1, fragment.mask & ~partial.left))
        fragment.mask = partial.left
        self.rest = partial.rest
        self.budget = 0

    def _block(self, fragment: Fragment, wait: Wait) -> None:
        fragment.wait = wait
        for signal in wait.signals:
            signal.waiters[self] = None

    def _retire(self, fragment: Fragment, bits: int) -> bool:
        """Lanes are gone; True when the whole fragment is."""
        self.live &= ~bits
        fragment.mask &= ~bits
        if not fragment.mask:
            self.fragments.remove(fragment)
        for other in self.fragments:
            if other.wait is not None and other.wait.convergence:
                other.wait = None
        self.cta.lanes_exited(self, bits)
        return not fragment.mask

    def converged(self, required: int) -> Wait | None:
        """None when all live lanes of `required` execute this instruction now, else a wait."""
        missing = required & self.live & ~self.bits
        if not missing:
            return None
        return Wait(lambda: f"lanes {missing:#010x} of the warp to converge", convergence=True)

    # ---- happens-before ----

    def groups_of(self, bits: int) -> list[tuple[Clock, int]]:
        """The distinct clocks of these lanes, with the lanes that share each."""
        first = self.clocks[(bits & -bits).bit_length() - 1]
        if all(clock is first for clock in self.clocks):
            return [(first, bits)]
        found: dict[int, tuple[Clock, int]] = {}
        for lane in indices_of(bits):
            clock = self.clocks[lane]
            found[id(clock)] = (clock, found.get(id(clock), (clock, 0))[1] | 1 << int(lane))
        return list(found.values())

    def joined(self, bits: int) -> Clock:
        groups = self.groups_of(bits)
        clock = groups[0][0]
        for other, _ in groups[1:]:
            clock = join(clock, other)
        return clock

    def publish(self, bits: int, release: bool = True) -> Clock:
        """What a release by these lanes hands over; the next access gets a new tick.

        A relaxed operation hands over only what an earlier fence of the lane released, and
        mbarrier initialisations that a fence.mbarrier_init covered."""
        joined = self.joined(bits)
        if release:
            clock = joined.copy()
            clock[GENERIC, self.actors[lanes_of(bits)]] = self.tick
        else:
            clock = np.zeros_like(joined)
            clock[INIT] = joined[INIT]
            for lane in indices_of(bits):
                fenced = self.fenced[lane]
                if fenced is not None:
                    clock = join(clock, fenced)
        started = self.actors[lanes_of(bits)]
        clock[INIT, started] = np.maximum(clock[INIT, started], self.first_tick)
        self.tick += 1
        self._settled = 0
        return clock

    def acquire(self, bits: int, incoming: Clock) -> None:
        """These lanes now know what `incoming` knows."""
        for clock, lanes in self.groups_of(bits):
            merged = join(clock, incoming)
            for lane in indices_of(lanes):
                self.clocks[lane] = merged
        self._settled = 0

    def learn(self, bits: int, actor: int, tick: int) -> None:
        """These lanes know of an agent's completion."""
        for clock, lanes in self.groups_of(bits):
            if clock[GENERIC, actor] < tick:
                merged = clock.copy()
                merged[GENERIC, actor] = tick
                for lane in indices_of(lanes):
                    self.clocks[lane] = merged
        self._settled = 0

    def replace_clocks(self, bits: int, change: Callable[[Clock], None]) -> None:
        """Apply `change` to a copy of the clock of each of these lanes."""
        for clock, lanes in self.groups_of(bits):
            fresh = clock.copy()
            change(fresh)
            for lane in indices_of(lanes):
                self.clocks[lane] = fresh
        self._settled = 0

    def converge(self, bits: int) -> None:
        """Order everything these lanes did before everything they do next.

        PTX promises that for bar.warp.sync only; every .sync collective is taken so, because
        code everywhere relies on it (elect.sync, then one lane signals for the warp)."""
        if bits & ~self._settled == 0:
            return
        clock = self.publish(bits)
        for lane in indices_of(bits):
            self.clocks[lane] = clock
        self._settled = bits

    def touch(self) -> None:
        """An access was recorded at the current tick."""
        self._settled = 0
