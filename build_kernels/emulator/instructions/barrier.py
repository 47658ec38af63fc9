"""Barriers of threads: bar, barrier, bar.warp.sync, barrier.cluster."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from build_kernels.emulator.execution.cta import NAMED_BARRIERS
from build_kernels.emulator.execution.interruption import Interruption, Partial, Wait
from build_kernels.emulator.execution.warp import Run, Warp
from build_kernels.emulator.instructions.convergence import among, converge, together
from build_kernels.emulator.instructions.decoding import Decoder, Decoding, Source
from build_kernels.emulator.lanes import LANES, numbers_of
from build_kernels.emulator.ordering.clocks import Clock


def barrier(d: Decoding) -> Run:
    d.take("cta")
    mode = d.need("sync", "arrive", "red")
    operands, vote, tell = list(d.operands), None, None
    if mode == "red":
        vote, tell = _reduction(d)
        operands = operands[1:-1]
    aligned = d.take("aligned") or d.name == "bar"
    number = d.source(operands[0], "u32")
    threads = d.source(operands[1], "u32") if len(operands) > 1 else None
    if mode == "arrive" and threads is None:
        raise d.error("needs a thread count")

    def run(w: Warp) -> Interruption:
        if w.fragment.token is not None:
            return _wait_for_named(w, tell, *w.fragment.token)
        if aligned and (wait := converge(w)) is not None:
            return wait
        w.poisoned("the barrier number", number.registers)
        index = int(number.get(w)[w.first_lane()])
        if not 0 <= index < NAMED_BARRIERS:
            w.report("out-of-bounds", f"barrier {index} of {NAMED_BARRIERS}")
            return None
        whole = -(-w.cta.threads // LANES) * LANES
        expected = int(threads.get(w)[w.first_lane()]) if threads is not None else whole
        if expected % LANES or expected == 0:
            w.report("barrier-mismatch", f"{expected} threads are no multiple of a warp")
        w.grid.events += 1
        before = w.clocks[w.first_lane()]
        named = w.cta.barriers[index]
        if vote is not None:
            w.poisoned("the predicate", vote.registers)
            named.vote(int(vote.get(w)[w.active].sum()), w.bits.bit_count())
        mine = named.arrive(w, expected, w.publish(w.bits), all_threads=threads is None)
        if mode == "arrive":
            return None
        w.fragment.token = (index, mine, before)
        return _wait_for_named(w, tell, *w.fragment.token)

    return run


Tell = Callable[[Warp, int, int], None]


def _reduction(d: Decoding) -> tuple[Source, Tell]:
    """Return the predicate of a barrier's reduction, and a function that writes its result."""
    mode = d.need("popc", "and", "or")
    kind = d.need("u32" if mode == "popc" else "pred")
    write = d.destination(d.operands[0], kind)

    def tell(w: Warp, true: int, votes: int) -> None:
        if mode == "popc":
            write(w, np.full(LANES, true, dtype=np.uint32), None)
        else:
            write(w, np.full(LANES, true == votes if mode == "and" else true > 0), None)

    return d.source(d.operands[-1], "pred"), tell


def _wait_for_named(
    w: Warp, tell: Tell | None, index: int, generation: int, before: Clock
) -> Interruption:
    """Wait for a generation that the warp arrived at with the clock `before`."""
    named = w.cta.barriers[index]
    if named.generation == generation:
        return Wait(
            lambda: f"barrier {index} ({named.arrived} of {named.expected} threads arrived)",
            (named.signal,),
        )
    w.fragment.token = None
    w.acquire(w.bits, named.released, before if named.generation == generation + 1 else None)
    if tell is not None:
        tell(w, *named.voted)
    return None


def warp_sync(d: Decoding) -> Run:
    return among(d, lambda w, members: w.converge(members))


def cluster_arrive(d: Decoding) -> Run:
    strong = d.one_of("release", "relaxed") != "relaxed"
    aligned = d.take("aligned")

    def arrive(w: Warp) -> None:
        if w.cluster_arrived & w.bits:
            w.report("barrier-overflow", "a second barrier.cluster.arrive with no wait between")
        cluster = w.cta.cluster
        clock = w.publish(w.bits, release=strong)
        w.grid.events += 1
        w.cluster_arrived |= w.bits
        mine = cluster.barrier.arrive(w.bits.bit_count(), clock, cluster.living)
        for lane in numbers_of(w.bits):
            w.cluster_generations[lane] = mine

    return together(arrive) if aligned else arrive


def cluster_wait(d: Decoding) -> Run:
    d.take("acquire")
    aligned = d.take("aligned")

    def wait(w: Warp) -> Interruption:
        cluster = w.cta.cluster
        if w.bits & ~w.cluster_arrived:
            w.report("barrier-mismatch", "barrier.cluster.wait with no arrive before it")
            return None
        early = w.waits_for_cluster(w.bits)
        if early and early != w.bits:
            w.activate(w.bits & ~early)
        elif early:
            return Wait(
                lambda: (
                    f"the cluster barrier ({cluster.barrier.arrived} of {cluster.living} threads "
                    "arrived)"
                ),
                (cluster.barrier.signal,),
            )
        w.cluster_arrived &= ~w.bits
        w.acquire(w.bits, cluster.barrier.released)
        return Partial(early, 0) if early else None

    return together(wait) if aligned else wait


INSTRUCTIONS: dict[str, Decoder] = {
    **dict.fromkeys(("bar", "barrier"), barrier),
    "bar.warp": warp_sync,
    "barrier.cluster.arrive": cluster_arrive,
    "barrier.cluster.wait": cluster_wait,
}
