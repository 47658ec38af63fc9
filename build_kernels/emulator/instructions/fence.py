"""fence and membar, of scopes, of the async proxy and of mbarrier.init (PTX ISA, "fence")."""

from __future__ import annotations

from functools import partial

from build_kernels.emulator.access import release
from build_kernels.emulator.execution.warp import Run, Warp
from build_kernels.emulator.instructions.decoding import Decoder, Decoding
from build_kernels.emulator.lanes import lanes_of, numbers_of
from build_kernels.emulator.ordering.clocks import ASYNC, GENERIC, INIT, Clock


def fence(d: Decoding) -> Run:
    if d.name == "fence":
        d.one_of("sc", "acq_rel", "acquire", "release")
        scope = d.need("cta", "cluster", "gpu", "sys")
    else:
        scope = {"cta": "cta", "gl": "gpu", "sys": "sys"}[d.need("cta", "gl", "sys")]

    def run(w: Warp) -> None:
        for lane in numbers_of(w.bits):
            release.fence(w, lane, release.SCOPES[scope])

    return run


def proxy_fence(d: Decoding) -> Run:
    """Decode fence.proxy.async; fences of other proxies are not supported."""
    d.need("async")
    # Not .global: the order of the async proxy is not kept per memory space.
    d.one_of("shared::cta", "shared::cluster")
    return partial(_fence_row, row=ASYNC)


def init_fence(d: Decoding) -> Run:
    d.need("release")
    d.need("cluster")
    return partial(_fence_row, row=INIT)


def _fence_row(w: Warp, *, row: int) -> None:
    """Copy the lanes' generic order into another row of their clocks."""
    tick = w.tick
    actors = w.actors[lanes_of(w.bits)]

    def change(clock: Clock) -> Clock:
        published = clock[row].joined(clock[GENERIC])
        return clock.replaced(row, published.with_ticks(actors, tick))

    w.replace_clocks(w.bits, change)
    w.tick += 1


INSTRUCTIONS: dict[str, Decoder] = {
    **dict.fromkeys(("fence", "membar"), fence),
    "fence.proxy": proxy_fence,
    "fence.mbarrier_init": init_fence,
}
