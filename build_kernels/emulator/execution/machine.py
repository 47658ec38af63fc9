"""The machine: the scheduler, the components of clocks, and who did what."""

from __future__ import annotations

import itertools
import random
from collections import deque
from typing import Any

import numpy as np
from numpy.typing import NDArray

from build_kernels.emulator.execution.cta import Cluster, Cta
from build_kernels.emulator.execution.operation import Operation
from build_kernels.emulator.execution.warp import LANES, Decoded, Warp, lanes_of
from build_kernels.emulator.findings import Finding, FindingLog, Party, Thread
from build_kernels.emulator.launch.launch import Launch, PackedParameters, Schedule
from build_kernels.emulator.launch.tensor_map import TensorMap
from build_kernels.emulator.memory.memory import (
    PARAMETER_WINDOW,
    SHARED_RESERVED,
    WINDOW_MASK,
    GlobalMemory,
    Memory,
)
from build_kernels.emulator.ordering.clocks import (
    GENERIC,
    INIT,
    WEAK,
    ClockSpace,
    Slot,
    actor_of,
    instruction_of,
    join,
    record,
    tick_of,
)
from build_kernels.emulator.ptx.syntax import TYPE_BITS, Instruction, Kernel

AGENTS_PER_CTA = 64

QUANTUM = 400  # instructions a warp runs before another may

IDLE_TURNS = 3  # turns of every warp without an event before an operation must finish

STUCK_TURNS = 2000  # and before warps that spin count as stuck


class Machine:
    """Runs one grid."""

    def __init__(
        self, kernel: Kernel, launch: Launch, packed: PackedParameters, schedule: Schedule
    ) -> None:
        self.kernel = kernel
        self.launch = launch
        self.schedule = schedule
        self.random = random.Random(schedule.seed)
        self.log = FindingLog()
        self.register_bits = [TYPE_BITS[r.type] for r in kernel.registers]
        self.program: list[Decoded] = []
        self.memory = GlobalMemory()
        self.parameters = Memory(
            "parameters",
            max(len(packed.data), 1),
            initial=np.frombuffer(packed.data or b"\0", dtype=np.uint8),
            read_only=True,
        )
        self.packed = packed
        self.tensor_maps: dict[int, tuple[TensorMap, Memory]] = {}
        self.shared_end = SHARED_RESERVED
        self.local_bytes = 0
        self._locals: dict[int, Memory] = {}
        self.released: dict[tuple[Memory, int], Any] = {}
        self.events = 0
        self.steps = 0
        self.runnable: deque[Warp] = deque()
        # Operations that may act now; one that comes after another is among its followers.
        self.pending: list[Operation] = []

        threads = int(np.prod(launch.block))
        self.warps_per_cta = -(-threads // LANES)
        cluster_size = int(np.prod(launch.cluster))
        clusters = int(np.prod(launch.grid)) // cluster_size
        self.resident = max(1, min(clusters, schedule.resident_ctas // cluster_size))
        slots = self.resident * cluster_size
        # Pipe 0 of a CTA is its tcgen05 unit, pipe 1 + w the wgmma unit as warp w sees it.
        self.pipes_per_cta = 1 + self.warps_per_cta
        self.clocks = ClockSpace(
            slots * self.warps_per_cta * LANES, slots * self.pipes_per_cta, slots * AGENTS_PER_CTA
        )
        self._free_slots = list(range(slots))
        self._occupants: list[list[tuple[int, Cta]]] = [[] for _ in range(slots)]
        self._end_ticks = [0] * slots

    # ---- identity ----

    def claim(self, cta: Cta) -> int:
        slot = self._free_slots.pop(0)
        self._occupants[slot].append((self._end_ticks[slot] + 1, cta))
        return slot

    def first_tick(self, actor: int) -> int:
        return self._end_ticks[actor // (self.warps_per_cta * LANES)] + 1

    def cta_of(self, actor: int, tick: int | None = None) -> Cta | None:
        """The CTA of a thread as of a tick; None for an agent."""
        if actor >= self.clocks.threads:
            return None
        history = self._occupants[actor // (self.warps_per_cta * LANES)]
        for first, cta in reversed(history):
            if tick is None or tick >= first:
                return cta
        return None

    def actor_thread(self, record: int) -> Thread | None:
        actor, tick = actor_of(record), tick_of(record)
        if actor >= self.clocks.threads:
            issue = self.clocks.issue(record)
            return issue.thread if issue else None
        cta = self.cta_of(actor, tick)
        if cta is None:
            return None
        within = actor % (self.warps_per_cta * LANES)
        return Thread(cta=cta.index, warp=within // LANES, lane=within % LANES)

    def report(
        self,
        kind: str,
        message: str,
        *,
        warp: Warp | None = None,
        lane: int | None = None,
        operation: Operation | None = None,
        instruction: Instruction | None = None,
        thread: Thread | None = None,
        address: str = "",
        other: Instruction | None = None,
        other_thread: Thread | None = None,
    ) -> None:
        """Add a finding; the instruction and thread come from the warp or the operation."""
        if operation is not None:
            instruction = instruction or operation.instruction
            thread = thread or operation.thread()
        elif warp is not None:
            instruction = instruction or warp.instruction
            thread = thread or warp.thread(lane)
        self.log.add(
            Finding(
                kind=kind,
                message=message,
                line=instruction.line if instruction else self.kernel.line,
                text=instruction.text[:160] if instruction else self.kernel.name,
                thread=thread,
                address=address,
                other=None
                if other is None
                else Party(line=other.line, text=other.text[:160], thread=other_thread),
            )
        )

    # ---- memories ----

    def local(self, warp: Warp) -> Memory:
        """Local memory of the warp's lanes, one after the other."""
        memory = self._locals.get(id(warp))
        if memory is None:
            memory = Memory("local memory", max(self.local_bytes, 1) * LANES, tracked=False)
            self._locals[id(warp)] = memory
        return memory

    def tensor_map(self, warp: Warp, address: int, lane: int) -> tuple[TensorMap, Memory] | None:
        """The tensor map at a generic address in parameter space, or None, reported."""
        found = None
        if address & WINDOW_MASK == PARAMETER_WINDOW:
            found = self.tensor_maps.get(address & ~WINDOW_MASK)
        if found is None:
            self.report(
                "tensor-map",
                "no tensor map lies here",
                warp=warp,
                lane=lane,
                address=f"{address:#x}",
            )
        return found

    # ---- asynchronous operations ----

    def slot_for(self, operation: Operation) -> Slot:
        """The operation's component of the clocks: its pipe's, or an agent's of its own."""
        if operation.pipe >= 0:
            return self.clocks.pipe(operation.cta.slot * self.pipes_per_cta + operation.pipe)
        slot = self.clocks.lend()
        while slot is None:
            self.perform(self.pending[0])
            slot = self.clocks.lend()
        slot.busy = True
        return slot

    def issue(self, operation: Operation) -> None:
        """Hand an operation to the schedule."""
        self.events += 1
        if operation.after is not None and not operation.after.done:
            operation.after.followers.append(operation)
            return
        self.pending.append(operation)
        if self.schedule.policy == "earliest":
            self.perform(operation)

    def perform(self, operation: Operation) -> None:
        operation.finish()

    def finished(self, operation: Operation) -> None:
        self.events += 1
        operation.slot.busy = False
        if operation in self.pending:
            self.pending.remove(operation)
        self.pending += [follower for follower in operation.followers if not follower.done]
        operation.followers = []

    def _perform_one(self) -> bool:
        """Finish one operation: the oldest, or any of them."""
        if not self.pending:
            return False
        earliest = self.schedule.policy == "earliest"
        self.perform(self.pending[0] if earliest else self.random.choice(self.pending))
        return True

    # ---- running ----

    def run(self) -> None:
        """Run every cluster of the grid, `resident` at a time."""
        launch = self.launch
        origins = itertools.product(
            *(range(0, g, c) for g, c in zip(launch.grid[::-1], launch.cluster[::-1], strict=True))
        )
        waiting = deque((x, y, z) for z, y, x in origins)
        active: list[Cluster] = []
        with np.errstate(all="ignore"):
            while waiting or active:
                while waiting and len(active) < self.resident:
                    cluster = Cluster(self, launch.cluster, waiting.popleft())
                    active.append(cluster)
                    self.runnable.extend(w for cta in cluster.ctas for w in cta.warps)
                if not self._run_until_exit(active):
                    return
                active = [cluster for cluster in active if not cluster.exited]
            while self.pending:
                self.perform(self.pending[0])

    def _run_until_exit(self, active: list[Cluster]) -> bool:
        """Run until some cluster has exited; False on a deadlock."""
        policy = self.schedule.policy
        idle, events, stuck_at = 0, self.events, -1
        while not any(cluster.exited for cluster in active):
            if self.events != events:
                idle, events = 0, self.events
            if policy == "random" and self.pending and self.random.random() < 0.3:
                self._perform_one()
            if self.runnable and idle > IDLE_TURNS * len(self.runnable) and self._perform_one():
                continue
            if idle > STUCK_TURNS * max(1, len(self.runnable)):
                self._report_stuck(active, "spins and nothing else happens")
                return False
            if self.runnable:
                idle += 1
                self._turn()
            elif not self._perform_one():
                # All are blocked. A try_wait may give up; if that changes nothing, all is lost.
                if stuck_at == self.events or not self._time_out(active):
                    self._report_stuck(active, "goes round and round")
                    return False
                stuck_at = self.events
        return True

    def _turn(self) -> None:
        policy = self.schedule.policy
        if policy == "random":
            self.runnable.rotate(self.random.randrange(len(self.runnable)))
            quantum = self.random.randrange(1, QUANTUM)
        else:
            quantum = QUANTUM
        warp = self.runnable.popleft() if policy != "latest" else self.runnable.pop()
        if warp.rest:
            warp.rest -= 1
            self.runnable.append(warp)
            return
        warp.queued = False
        self.steps += quantum
        warp.run(quantum)
        if warp.queued or not any(f.wait is None for f in warp.fragments):
            return
        warp.queued = True
        if policy == "latest":
            self.runnable.appendleft(warp)
        else:
            self.runnable.append(warp)

    def _time_out(self, active: list[Cluster]) -> bool:
        any_ = False
        for warp in (w for c in active for cta in c.ctas for w in cta.warps):
            for fragment in warp.fragments:
                if fragment.wait is not None and fragment.wait.times_out:
                    fragment.timed_out = True
                    fragment.wait = None
                    any_ = True
            if any_ and warp.fragments and not warp.queued:
                warp.queued = True
                self.runnable.append(warp)
        return any_

    def _report_stuck(self, active: list[Cluster], verb: str) -> None:
        for warp in (w for c in active for cta in c.ctas for w in cta.warps):
            for fragment in warp.fragments:
                first = int(np.flatnonzero(lanes_of(fragment.mask))[0])
                self.report(
                    "deadlock",
                    f"waits for {fragment.wait.reason()}" if fragment.wait else verb,
                    instruction=self.kernel.instructions[fragment.pc],
                    thread=warp.thread(first),
                )

    # ---- the end of a CTA ----

    def cta_exits(self, cta: Cta) -> None:
        """Everything that must be over when a CTA's last thread exits."""
        last = cta.warps[0].joined(1)
        for warp in cta.warps:
            for clock, _ in warp.groups_of((1 << LANES) - 1):
                last = join(last, clock)
        known = last[GENERIC]
        instruction = cta.warps[0].instruction
        thread = Thread(cta=cta.index, warp=cta.warps[0].index)
        for barrier in cta.mbarriers.values():
            if barrier.tx:
                self.report(
                    "tx-leftover",
                    f"{barrier.tx} transaction bytes are still pending at exit",
                    instruction=barrier.init_instruction,
                    thread=thread,
                    address=barrier.describe(),
                )
            for actor, tick, touch in barrier.foreign_touches:
                if known[actor] < tick:
                    self.report(
                        "exited-peer",
                        "the CTA may have exited before a peer's operation on its mbarrier",
                        instruction=touch,
                        thread=self.actor_thread(int(record(tick, actor, WEAK, 0))),
                        address=barrier.describe(),
                        other=instruction,
                        other_thread=thread,
                    )
        cta.tensor_memory.check_exit(thread)
        for unwaited in cta.touched_by:
            if known[unwaited.actor] < unwaited.tick:
                self.report(
                    "unfinished-at-exit",
                    f"the CTA exited and none of its threads waited for {unwaited.thread.agent}",
                    instruction=unwaited.instruction,
                    thread=unwaited.thread,
                )
        if len(cta.cluster.ctas) > 1:
            self._check_foreign(cta, known, instruction, thread)
        self._end_ticks[cta.slot] = max(warp.tick for warp in cta.warps)
        if cta.cluster.exited:
            for each in cta.cluster.ctas:
                self._free_slots.append(each.slot)

    def _check_foreign(
        self, cta: Cta, known: NDArray[np.int32], instruction: Instruction, thread: Thread
    ) -> None:
        records = cta.shared.foreign_records(cta.first_actor, cta.last_actor)
        for one in (int(one) for one in records):
            actor, tick = actor_of(one), tick_of(one)
            if actor < self.clocks.threads and known[actor] < tick:
                self.report(
                    "exited-peer",
                    "the CTA may have exited before a peer's access to its shared memory",
                    instruction=self.kernel.instructions[instruction_of(one)],
                    thread=self.actor_thread(one),
                    address=cta.shared.name,
                    other=instruction,
                    other_thread=thread,
                )

    def started(self, warp: Warp, peer: Cta, lane: int) -> bool:
        """Does the lane know that the peer CTA runs?"""
        clock = warp.clocks[lane]
        span = slice(peer.first_actor, peer.first_actor + self.warps_per_cta * LANES)
        first = peer.warps[0].first_tick
        return bool((clock[GENERIC, span] >= first).any() or (clock[INIT, span] >= first).any())
