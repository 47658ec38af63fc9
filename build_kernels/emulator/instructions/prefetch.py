"""Cache hints: prefetch, cp.async.bulk.prefetch, createpolicy; without effect on values."""

from __future__ import annotations

import numpy as np

from build_kernels.emulator.access.state_spaces import find_tensor_map
from build_kernels.emulator.execution.warp import Run, Warp
from build_kernels.emulator.instructions.decoding import Decoder, Decoding
from build_kernels.emulator.lanes import LANES, numbers_of


def prefetch(d: Decoding) -> Run:
    d.one_of("global", "local")
    d.need("L1", "L2", "L2::evict_last", "L2::evict_normal")
    where = d.address(d.operands[0])

    def run(w: Warp) -> None:
        w.poisoned("the address", where.registers)

    return run


def prefetch_tensor_map(d: Decoding) -> Run:
    where = d.address(d.operands[0])

    def run(w: Warp) -> None:
        w.poisoned("the address", where.registers)
        lane = w.first_lane()
        find_tensor_map(w, int(where.get(w)[lane]), lane)

    return run


def prefetch_bulk(d: Decoding) -> Run:
    d.need("L2")
    d.need("global")
    hinted = d.take("L2::cache_hint")
    where = d.address(d.operands[0])
    size = d.source(d.operands[1], "u32")
    if len(d.operands) != 2 + hinted:
        raise d.error("has the wrong operands")

    def run(w: Warp) -> None:
        w.poisoned("an operand of cp.async.bulk.prefetch", where.registers + size.registers)

    return run


def prefetch_tensor(d: Decoding) -> Run:
    d.need("1d", "2d", "3d", "4d", "5d")
    d.need("L2")
    d.need("global")
    d.take("tile")
    d.take("L2::cache_hint")
    where = d.address(d.operands[0])

    def run(w: Warp) -> None:
        for lane in numbers_of(w.bits):
            find_tensor_map(w, int(where.get(w)[lane]), lane)

    return run


def create_policy(d: Decoding) -> Run:
    """Decode createpolicy.fractional: an opaque value that steers caches only."""
    d.need("fractional")
    d.need("b64")
    d.cache_hints()
    write = d.destination(d.operands[0], "b64")
    zeros = np.zeros(LANES, dtype=np.uint64)
    return lambda w: write(w, zeros, None)


INSTRUCTIONS: dict[str, Decoder] = {
    "prefetch": prefetch,
    "prefetch.tensormap": prefetch_tensor_map,
    "prefetch.param.tensormap": prefetch_tensor_map,
    "prefetch.const.tensormap": prefetch_tensor_map,
    "cp.async.bulk.prefetch": prefetch_bulk,
    "cp.async.bulk.prefetch.tensor": prefetch_tensor,
    "createpolicy": create_policy,
}
