"""The scheduler: starts clusters, gives warps their turns, and finds deadlocks."""

from __future__ import annotations

import itertools
from collections import deque

import numpy as np

from build_kernels.emulator.execution.cta import Cluster, Cta
from build_kernels.emulator.execution.exit_checks import check_exit
from build_kernels.emulator.execution.grid import Grid
from build_kernels.emulator.execution.interruption import Trapped
from build_kernels.emulator.execution.program import Program
from build_kernels.emulator.execution.warp import Warp
from build_kernels.emulator.findings import FindingLog
from build_kernels.emulator.lanes import LANES, lowest
from build_kernels.emulator.launch.arguments import PackedArguments
from build_kernels.emulator.launch.launch import Launch, Schedule

QUANTUM = 400  # instructions a warp runs before another may
IDLE_TURNS = 3  # turns of every warp without an event before an operation must finish
STUCK_TURNS = 2000  # and before warps that spin count as stuck
LULL_TURNS = 100  # and before warps that spin get longer turns, and time leaps if they look at it
LULL_TURN = 16  # as many turns in one: a bounded wait may look once in a thousand polls
LEAP = 60_000_000_000  # ns: beyond the bound of any wait of a kernel
MAX_LEAPS = 4  # without an event; a spin that goes on is endless
EAGERNESS = 0.3  # chance per turn that an operation finishes, under random schedules
FREEZING = 0.01  # chance per turn that a CTA or a cluster is frozen, under schedules that freeze


class Machine:
    """Run the warps of one grid."""

    def __init__(
        self,
        program: Program,
        launch: Launch,
        packed: PackedArguments,
        schedule: Schedule,
        log: FindingLog,
    ) -> None:
        self.program = program
        self.grid = Grid(program.kernel, program.layout, launch, packed, schedule, log)
        self._policy = schedule.policy
        self._random = self.grid.random
        self._runnable: deque[Warp] = deque()
        self._active: list[Cluster] = []
        self._warps: dict[Cta, list[Warp]] = {}
        self._frozen: tuple[Cta, ...] = ()
        self._held: list[Warp] = []  # of the frozen CTAs, which would run
        self.trapped = False

    def run(self) -> None:
        """Run every cluster of the grid, as many at a time as are resident, or until a trap."""
        try:
            self._run()
        except Trapped:
            self.trapped = True

    def _run(self) -> None:
        grid, launch = self.grid, self.grid.launch
        origins = itertools.product(
            *(range(0, g, c) for g, c in zip(launch.grid[::-1], launch.cluster[::-1], strict=True))
        )
        waiting = grid.waiting
        waiting.extend((x, y, z) for z, y, x in origins)
        with np.errstate(all="ignore"):
            while waiting or self._active:
                while waiting and len(self._active) < grid.resident:
                    self._start(waiting.popleft())
                if not self._run_until_exit():
                    return
                self._active = [cluster for cluster in self._active if not cluster.exited]
            while grid.pending:
                grid.perform(grid.pending[0])

    def _start(self, origin: tuple[int, int, int]) -> None:
        """Make a cluster's CTAs and warps, and queue the warps."""
        grid = self.grid
        cluster = Cluster(
            grid.launch.cluster, origin, grid.threads, grid.layout.shared_end, grid.clocks.zero
        )
        self._active.append(cluster)
        for cta in cluster.ctas:
            grid.enter(cta)
            self._warps[cta] = [
                Warp(grid, cta, number, self.program.code, self._runnable, self._lanes_exited)
                for number in range(grid.warps_per_cta)
            ]
            self._runnable.extend(self._warps[cta])

    def _active_warps(self) -> list[Warp]:
        return [w for cluster in self._active for cta in cluster.ctas for w in self._warps[cta]]

    def _run_until_exit(self) -> bool:
        """Run until some cluster has exited; False on a deadlock."""
        grid, runnable = self.grid, self._runnable
        idle, events, stuck_at = 0, grid.events, -1
        reads, leaps = grid.timer_reads, 0
        while not any([cluster.exited for cluster in self._active]):
            if grid.events != events:
                idle, events = 0, grid.events
                reads, leaps = grid.timer_reads, 0
            if self._policy == "random" and grid.pending and self._random.random() < EAGERNESS:
                grid.perform_one()
            if idle > IDLE_TURNS * len(runnable) and (grid.perform_one() or self._thaw()):
                continue
            grid.lull = idle > LULL_TURNS * max(1, len(runnable))
            if grid.lull and grid.timer_reads > reads and leaps < MAX_LEAPS:
                grid.nanoseconds += LEAP
                idle, reads, leaps = 0, grid.timer_reads, leaps + 1
            if idle > STUCK_TURNS * max(1, len(runnable)):
                self._report_stuck("spins and nothing else happens")
                return False
            if runnable:
                idle += LULL_TURN if grid.lull else 1
                self._turn()
            elif not grid.perform_one() and not self._thaw():
                # All are blocked. A try_wait may give up; if that changes nothing, all is lost.
                if stuck_at == grid.events or not self._time_out():
                    self._report_stuck("goes round and round")
                    return False
                stuck_at = grid.events
        return True

    def _turn(self) -> None:
        policy, runnable = self._policy, self._runnable
        quantum = QUANTUM
        if policy == "random":
            runnable.rotate(self._random.randrange(len(runnable)))
            quantum = self._random.randrange(1, QUANTUM)
        if self.grid.lull:
            quantum = LULL_TURN * QUANTUM
        warp = runnable.popleft() if policy != "latest" else runnable.pop()
        if self.grid.schedule.freezes and self._is_frozen(warp):
            self._held.append(warp)
            return
        if warp.rest:
            warp.rest -= 1
            runnable.append(warp)
            return
        warp.queued = False
        self.grid.steps += quantum
        warp.run(quantum)
        if warp.queued or not any(f.wait is None for f in warp.fragments):
            return
        warp.queued = True
        if policy == "latest":
            runnable.appendleft(warp)
        else:
            runnable.append(warp)

    def _is_frozen(self, warp: Warp) -> bool:
        """Freeze the warp's CTA or cluster by chance; return whether the warp may not run."""
        if not self._frozen and self._random.random() < FREEZING:
            whole = self._random.random() < 0.5
            self._frozen = tuple(warp.cta.cluster.ctas) if whole else (warp.cta,)
        return warp.cta in self._frozen

    def _thaw(self) -> bool:
        """Let frozen CTAs go on, now that the rest stands still; False if none is frozen."""
        thawed = bool(self._frozen)
        self._runnable.extend(self._held)
        self._frozen, self._held = (), []
        self.grid.events += thawed
        return thawed

    def _time_out(self) -> bool:
        """Let every try_wait give up; False if there is none."""
        found = False
        for warp in self._active_warps():
            for fragment in warp.fragments:
                if fragment.wait is not None and fragment.wait.times_out:
                    fragment.timed_out = True
                    fragment.wait = None
                    found = True
            if found and warp.fragments and not warp.queued:
                warp.queued = True
                self._runnable.append(warp)
        return found

    def _report_stuck(self, verb: str) -> None:
        for warp in self._active_warps():
            for fragment in warp.fragments:
                self.grid.log.report(
                    "deadlock",
                    f"waits for {fragment.wait.reason()}" if fragment.wait else verb,
                    instruction=self.program.kernel.instructions[fragment.pc],
                    thread=warp.thread(lowest(fragment.mask)),
                )

    def _lanes_exited(self, warp: Warp, bits: int) -> None:
        """Let the cluster go on without these lanes; end the CTA after its last."""
        grid, cta = self.grid, warp.cta
        grid.events += 1
        if warp.live == 0:
            warp.publish((1 << min(LANES, cta.threads - warp.index * LANES)) - 1)
        if warp.live:
            cta.living[warp] = warp.live
        else:
            del cta.living[warp]
        for named in cta.barriers:
            named.settle()
        cta.cluster.living -= bits.bit_count()
        cta.cluster.barrier.leave(warp.waits_for_cluster(bits).bit_count(), cta.cluster.living)
        warps = self._warps[cta]
        if not cta.living:
            cta.exited = True
            cta.cluster.exited = all(each.exited for each in cta.cluster.ctas)
            check_exit(grid, cta, warps)
            grid.leave(cta, max(w.tick for w in warps))
