"""Fences, named barriers and cluster barriers (PTX ISA, "Parallel Synchronization")."""

from __future__ import annotations

import numpy as np

from build_kernels.emulator.execution.warp import (
    LANES,
    Outcome,
    Run,
    Wait,
    Warp,
    indices_of,
    lanes_of,
)
from build_kernels.emulator.instructions.collectives import aligned, gather
from build_kernels.emulator.instructions.operands import Context, Modifiers, source
from build_kernels.emulator.ordering import release
from build_kernels.emulator.ordering.clocks import ASYNC, GENERIC, INIT, Clock
from build_kernels.emulator.ptx.syntax import Instruction


def fence(ins: Instruction, context: Context) -> Run:
    """fence and membar. Proxy fences other than the async proxy's are unknown."""
    mods = Modifiers(ins)
    if mods.take("proxy"):
        mods.need("async")
        # Not .global: what is known to the async proxy is not kept by memory space.
        mods.one_of("shared::cta", "shared::cluster")
        mods.done()
        return lambda w: _fence_rows(w, ASYNC)
    if mods.take("mbarrier_init"):
        mods.need("release")
        mods.need("cluster")
        mods.done()
        return lambda w: _fence_rows(w, INIT)
    if ins.words[0] == "fence":
        mods.one_of("sc", "acq_rel", "acquire", "release")
        scope = mods.need("cta", "cluster", "gpu", "sys")
    else:
        scope = {"cta": "cta", "gl": "gpu", "sys": "sys"}[mods.need("cta", "gl", "sys")]
    mods.done()

    def run(w: Warp) -> None:
        for lane in indices_of(w.bits):
            release.fence(w, int(lane), release.SCOPES[scope])

    return run


def _fence_rows(w: Warp, row: int) -> None:
    """Make what the lane knows in general known in `row` too."""
    tick = w.tick
    actors = w.actors[lanes_of(w.bits)]

    def change(clock: Clock) -> None:
        np.maximum(clock[row], clock[GENERIC], out=clock[row])
        clock[row, actors] = tick

    w.replace_clocks(w.bits, change)
    w.tick += 1


def barrier(ins: Instruction, context: Context) -> Run:
    """bar, barrier (and .cta), bar.warp.sync, barrier.cluster."""
    if "cluster" in ins.words:
        return _cluster(ins)
    if "warp" in ins.words:
        return _warp_sync(ins, context)
    mods = Modifiers(ins)
    mods.take("cta")
    mode = mods.need("sync", "arrive")
    together = mods.take("aligned") or ins.words[0] == "bar"
    mods.done()
    number = source(ins, ins.operands[0], "u32", context)
    threads = source(ins, ins.operands[1], "u32", context) if len(ins.operands) > 1 else None
    if mode == "arrive" and threads is None:
        raise ins.error("needs a thread count")

    def run(w: Warp) -> Outcome:
        if w.fragment.token is not None:
            return _await_named(w, *w.fragment.token)
        if together and (wait := aligned(w)) is not None:
            return wait
        w.poisoned("the barrier number", number.registers)
        index = int(number.get(w)[w.first_lane()])
        if not 0 <= index < 16:
            w.machine.report("out-of-bounds", f"barrier {index} of 16", warp=w)
            return None
        whole = -(-w.cta.threads // LANES) * LANES
        expected = int(threads.get(w)[w.first_lane()]) if threads is not None else whole
        if expected % LANES or expected == 0:
            w.machine.report(
                "barrier-mismatch", f"{expected} threads are no multiple of a warp", warp=w
            )
        # Barriers count whole warps (PTX ISA, "bar": "in multiples of warp size").
        arriving = LANES if together else w.bits.bit_count()
        mine = w.cta.barriers[index].arrive(w, arriving, expected, w.publish(w.bits))
        if mode == "arrive":
            return None
        w.fragment.token = (index, mine)
        return _await_named(w, index, mine)

    return run


def _await_named(w: Warp, index: int, generation: int) -> Outcome:
    barrier_ = w.cta.barriers[index]
    if barrier_.generation == generation:
        return Wait(
            lambda: f"barrier {index} ({barrier_.arrived} of {barrier_.expected} threads arrived)",
            (barrier_.signal,),
        )
    w.fragment.token = None
    w.acquire(w.bits, barrier_.released)
    return None


def _warp_sync(ins: Instruction, context: Context) -> Run:
    mods = Modifiers(ins)
    mods.need("warp")
    mods.need("sync")
    mods.done()
    mask = source(ins, ins.operands[0], "u32", context)
    return lambda w: gather(w, mask)[1]


def _cluster(ins: Instruction) -> Run:
    mods = Modifiers(ins)
    mods.need("cluster")
    mode = mods.need("arrive", "wait")
    order = mods.one_of("release", "relaxed", "acquire")
    together = mods.take("aligned")
    mods.done()
    if (mode == "wait") != (order == "acquire") and order is not None:
        raise ins.error(f"barrier.cluster.{mode} has no .{order}")

    def arrive(w: Warp) -> Outcome:
        if together and (wait := aligned(w)) is not None:
            return wait
        if w.cluster_arrived & w.bits:
            w.machine.report(
                "barrier-overflow", "a second barrier.cluster.arrive with no wait between", warp=w
            )
        cluster = w.cta.cluster
        clock = w.publish(w.bits, release=order != "relaxed")
        w.cluster_arrived |= w.bits
        w.cluster_generation = cluster.barrier.arrive(w.bits.bit_count(), clock, cluster.living())
        return None

    def wait_(w: Warp) -> Outcome:
        if together and (wait := aligned(w)) is not None:
            return wait
        if w.bits & ~w.cluster_arrived:
            w.machine.report(
                "barrier-mismatch", "barrier.cluster.wait with no arrive before it", warp=w
            )
            return None
        barrier_ = w.cta.cluster.barrier
        if barrier_.generation == w.cluster_generation:
            return Wait(
                lambda: (
                    f"the cluster barrier ({barrier_.arrived} of {w.cta.cluster.living()} threads "
                    "arrived)"
                ),
                (barrier_.signal,),
            )
        w.cluster_arrived &= ~w.bits
        w.acquire(w.bits, barrier_.released)
        return None

    return arrive if mode == "arrive" else wait_
