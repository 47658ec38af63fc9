"""Checks of everything that must be over when a CTA's last thread exits."""

from __future__ import annotations

from collections.abc import Sequence

from build_kernels.binaries.ptx.syntax import Instruction
from build_kernels.emulator.execution.cta import Cta
from build_kernels.emulator.execution.grid import Grid
from build_kernels.emulator.execution.warp import Warp
from build_kernels.emulator.findings import Thread
from build_kernels.emulator.lanes import ALL
from build_kernels.emulator.memory.access_records import WEAK, actor_of, pack, tick_of
from build_kernels.emulator.ordering.clocks import GENERIC, Row, join


def check_exit(grid: Grid, cta: Cta, warps: Sequence[Warp]) -> None:
    """Report leftovers of a CTA: barriers, tensor memory, operations, peers' accesses."""
    last = warps[0].joined(1)
    for warp in warps:
        for clock, _ in warp.groups_of(ALL):
            last = join(last, clock)
    known = last[GENERIC]
    instruction = warps[0].instruction
    thread = Thread(cta=cta.index, warp=warps[0].index)
    _check_mbarriers(grid, cta, known, instruction, thread)
    for start, (columns, allocation) in cta.tensor_memory.allocations.items():
        grid.log.report(
            "tmem-leak",
            f"{columns} columns at {start} are still allocated at exit",
            instruction=allocation,
            thread=thread,
        )
    for unwaited in cta.touched_by:
        if known.tick(unwaited.actor) < unwaited.tick:
            grid.log.report(
                "unfinished-at-exit",
                f"the CTA exited and none of its threads waited for {unwaited.thread.agent}",
                instruction=unwaited.instruction,
                thread=unwaited.thread,
            )
    if cta.shared.foreign:
        _check_peers(grid, cta, known, instruction, thread)


def _check_mbarriers(
    grid: Grid, cta: Cta, known: Row, instruction: Instruction, thread: Thread
) -> None:
    for barrier in cta.mbarriers.values():
        if barrier.tx:
            grid.log.report(
                "tx-leftover",
                f"{barrier.tx} transaction bytes are still pending at exit",
                instruction=barrier.init_instruction,
                thread=thread,
                address=barrier.describe(),
            )
        if barrier.pending != barrier.expected:
            grid.log.report(
                "arrivals-leftover",
                f"the last phase has {barrier.expected - barrier.pending} of {barrier.expected} "
                "arrivals at exit",
                instruction=barrier.init_instruction,
                thread=thread,
                address=barrier.describe(),
            )
        for actor, tick, touch in barrier.foreign_touches:
            if known.tick(actor) < tick:
                grid.log.report(
                    "exited-peer",
                    "the CTA may have exited before a peer's operation on its mbarrier",
                    instruction=touch,
                    thread=grid.thread_of(int(pack(tick, actor, WEAK, 0))),
                    address=barrier.describe(),
                    other=instruction,
                    other_thread=thread,
                )


def _check_peers(
    grid: Grid, cta: Cta, known: Row, instruction: Instruction, thread: Thread
) -> None:
    records = cta.shared.foreign_records(cta.first_actor, cta.last_actor)
    for one in (int(one) for one in records):
        actor, tick = actor_of(one), tick_of(one)
        if actor < grid.clocks.threads and known.tick(actor) < tick:
            author, author_thread = grid.author_of(one)
            grid.log.report(
                "exited-peer",
                "the CTA may have exited before a peer's access to its shared memory",
                instruction=author,
                thread=author_thread,
                address=cta.shared.name,
                other=instruction,
                other_thread=thread,
            )
