"""The state that all CTAs of a grid share."""

from __future__ import annotations

import random
from abc import ABC, abstractmethod
from collections import deque

import numpy as np

from build_kernels.binaries.ptx.syntax import TYPE_BITS, Instruction, Kernel
from build_kernels.emulator.execution.cta import Cta, Released
from build_kernels.emulator.findings import FindingLog, Thread
from build_kernels.emulator.lanes import LANES, Array
from build_kernels.emulator.launch.arguments import PackedArguments
from build_kernels.emulator.launch.launch import Launch, Schedule
from build_kernels.emulator.launch.tensor_map import TensorMap
from build_kernels.emulator.launch.variables import VariableLayout
from build_kernels.emulator.memory.access_records import actor_of, instruction_of, tick_of
from build_kernels.emulator.memory.memory import Memory
from build_kernels.emulator.numerics.types import DTYPE, STORAGE
from build_kernels.emulator.ordering.barriers import Signal
from build_kernels.emulator.ordering.clocks import ClockSpace, Slot

AGENTS_PER_CTA = 64


class Task(ABC):
    """Work in flight: in a slot of the clocks, perhaps after other work.

    after: the task that must be done before this one. signal: notifies when this one is done.
    """

    def __init__(self, slot: Slot, after: Task | None) -> None:
        self.slot = slot
        self.after = after
        self.followers: list[Task] = []
        self.done = False
        self.signal = Signal()

    @abstractmethod
    def perform(self) -> None:
        """Do the work."""


class Grid:
    """Own global memory, parameters, clocks, asynchronous operations and findings.

    released: the clocks of strong writes, by memory and offset. released_before: what
    they replaced. waiting: the first CTAs of clusters that have not started. events: counts
    whatever another warp may be waiting for. steps: instructions of all warps, about. nanoseconds:
    of %globaltimer, beside one for each step. timer_reads: its reads so far. lull: all that is left
    are warps that spin. poison: the registers of a warp at its start.
    """

    def __init__(
        self,
        kernel: Kernel,
        layout: VariableLayout,
        launch: Launch,
        packed: PackedArguments,
        schedule: Schedule,
        log: FindingLog,
    ) -> None:
        self.kernel = kernel
        self.layout = layout
        self.launch = launch
        self.schedule = schedule
        self.random = random.Random(schedule.seed)
        self.log = log
        self.memory = layout.memory
        self.parameters = Memory(
            "parameters",
            max(len(packed.data), 1),
            initial=np.frombuffer(packed.data or b"\0", dtype=np.uint8),
            read_only=True,
        )
        self.tensor_maps: dict[int, tuple[TensorMap, Memory]] = {}
        self.released: dict[tuple[Memory, int], Released] = {}
        self.released_before: dict[tuple[Memory, int], Released | None] = {}
        self.waiting: deque[tuple[int, int, int]] = deque()
        self.events = 0
        self.steps = 0
        self.nanoseconds = 0
        self.timer_reads = 0
        self.lull = False
        # Operations that may act now; one that comes after another is among its followers.
        self.pending: list[Task] = []
        self.pipes: dict[tuple[Cta, int], Task] = {}  # the last operation of each in-order unit
        poison = {n: np.full(LANES, -1, dtype=np.int64).astype(t) for n, t in STORAGE.items()}
        self.poison: list[Array] = [poison[TYPE_BITS[r.type]] for r in kernel.registers]
        self._parameter_values: dict[tuple[int, str], Array] = {}
        self.threads = int(np.prod(launch.block))
        self.warps_per_cta = -(-self.threads // LANES)
        self.actors_per_cta = self.warps_per_cta * LANES
        cluster_size = int(np.prod(launch.cluster))
        clusters = int(np.prod(launch.grid)) // cluster_size
        self.resident = max(1, min(clusters, schedule.resident_ctas // cluster_size))
        slots = self.resident * cluster_size
        # Pipe 0 of a CTA is its tcgen05 unit, pipe 1 + w the wgmma unit as warp w sees it.
        self.pipes_per_cta = 1 + self.warps_per_cta
        self.clocks = ClockSpace(
            slots * self.actors_per_cta, slots * self.pipes_per_cta, slots * AGENTS_PER_CTA
        )
        self._free_slots = list(range(slots))
        self._occupants: list[list[tuple[int, Cta]]] = [[] for _ in range(slots)]
        self._end_ticks = [0] * slots

    def parameter(self, offset: int, kind: str) -> Array:
        """Return 32 values of the parameter at an offset."""
        values = self._parameter_values.get((offset, kind))
        if values is None:
            data = self.parameters.data[offset : offset + TYPE_BITS[kind] // 8]
            values = np.full(LANES, data.view(DTYPE[kind])[0])
            self._parameter_values[offset, kind] = values
        return values

    def enter(self, cta: Cta) -> None:
        """Give a CTA a free slot, with the actors that belong to it."""
        cta.slot = self._free_slots.pop(0)
        cta.first_actor = cta.slot * self.actors_per_cta
        cta.last_actor = cta.first_actor + self.actors_per_cta
        cta.first_tick = self._end_ticks[cta.slot] + 1
        self._occupants[cta.slot].append((cta.first_tick, cta))

    def leave(self, cta: Cta, tick: int) -> None:
        """Note the last tick of a CTA, and free the slots of a cluster that has exited."""
        self._end_ticks[cta.slot] = tick
        if cta.cluster.exited:
            self._free_slots += [each.slot for each in cta.cluster.ctas]

    def cta_of(self, actor: int, tick: int | None = None) -> Cta | None:
        """Return the CTA of a thread as of a tick; None for an agent."""
        if actor >= self.clocks.threads:
            return None
        for first, cta in reversed(self._occupants[actor // self.actors_per_cta]):
            if tick is None or tick >= first:
                return cta
        return None

    def thread_of(self, record: int) -> Thread | None:
        """Return the thread that left a record; for an agent, the thread that issued it."""
        actor, tick = actor_of(record), tick_of(record)
        if actor >= self.clocks.threads:
            issue = self.clocks.issue(record)
            return issue.thread if issue else None
        cta = self.cta_of(actor, tick)
        if cta is None:
            return None
        within = actor % self.actors_per_cta
        return Thread(cta=cta.index, warp=within // LANES, lane=within % LANES)

    def author_of(self, record: int) -> tuple[Instruction, Thread | None]:
        return self.kernel.instructions[instruction_of(record)], self.thread_of(record)

    def slot_for(self, cta: Cta, pipe: int) -> Slot:
        """Return the slot of a CTA's pipe; for pipe -1 that of an agent, which becomes busy."""
        if pipe >= 0:
            return self.clocks.pipe(cta.slot * self.pipes_per_cta + pipe)
        slot = self.clocks.lend()
        while slot is None:
            self.perform(self.pending[0])
            slot = self.clocks.lend()
        slot.busy = True
        return slot

    def issue(self, task: Task) -> None:
        """Hand a task to the schedule."""
        self.events += 1
        if task.after is not None and not task.after.done:
            task.after.followers.append(task)
            return
        self.pending.append(task)
        if self.schedule.policy == "earliest":
            self.perform(task)

    def perform(self, task: Task) -> None:
        """Do a task now, after the tasks that come before it."""
        if task.done:
            return
        if task.after is not None:
            self.perform(task.after)
        task.perform()
        task.done = True
        task.after = None
        self.events += 1
        task.slot.busy = False
        if task in self.pending:
            self.pending.remove(task)
        self.pending += [follower for follower in task.followers if not follower.done]
        task.followers = []
        task.signal.notify()

    def perform_one(self) -> bool:
        """Do one pending task: the oldest, or any of them; False if there is none."""
        if not self.pending:
            return False
        earliest = self.schedule.policy == "earliest"
        self.perform(self.pending[0] if earliest else self.random.choice(self.pending))
        return True
