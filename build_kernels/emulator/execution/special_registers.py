"""Special registers (PTX ISA, "Special Registers")."""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from typing import Any

import numpy as np

from build_kernels.emulator.execution.warp import Warp
from build_kernels.emulator.lanes import LANE_INDEX, LANES, Array
from build_kernels.emulator.memory.windows import SHARED_RESERVED

_TIMERS = ("%globaltimer", "%globaltimer_lo")
CLOCKS = ("%clock", "%clock64", *_TIMERS)

_LANE = LANE_INDEX.astype(np.int64)
_ONE = np.int64(1) << _LANE


@lru_cache(maxsize=256)
def _thread_index(block: tuple[int, int, int], warp: int, axis: int) -> Array:
    linear = warp * LANES + _LANE
    width, height, _ = block
    return (linear % width, linear // width % height, linear // (width * height))[axis]


_VECTORS: dict[str, Callable[[Warp, int], Any]] = {
    "%tid": lambda w, axis: _thread_index(w.grid.launch.block, w.index, axis),
    "%ntid": lambda w, axis: w.grid.launch.block[axis],
    "%ctaid": lambda w, axis: w.cta.index[axis],
    "%nctaid": lambda w, axis: w.grid.launch.grid[axis],
    "%clusterid": lambda w, axis: w.cta.index[axis] // w.grid.launch.cluster[axis],
    "%nclusterid": lambda w, axis: w.grid.launch.grid[axis] // w.grid.launch.cluster[axis],
    "%cluster_ctaid": lambda w, axis: w.cta.place[axis],
    "%cluster_nctaid": lambda w, axis: w.cta.cluster.shape[axis],
}

_SCALARS: dict[str, Callable[[Warp], Any]] = {
    "%laneid": lambda w: _LANE,
    "%lanemask_eq": lambda w: _ONE,
    "%lanemask_lt": lambda w: _ONE - 1,
    "%lanemask_le": lambda w: 2 * _ONE - 1,
    "%lanemask_gt": lambda w: (1 << LANES) - 2 * _ONE,
    "%lanemask_ge": lambda w: (1 << LANES) - _ONE,
    "%warpid": lambda w: w.index,
    "%nwarpid": lambda w: w.grid.warps_per_cta,
    "%cluster_ctarank": lambda w: w.cta.rank,
    "%cluster_nctarank": lambda w: len(w.cta.cluster.ctas),
    "%is_explicit_cluster": lambda w: int(w.grid.launch.cluster != (1, 1, 1)),
    "%smid": lambda w: w.cta.slot,
    "%dynamic_smem_size": lambda w: w.grid.launch.dynamic_shared_bytes,
    "%total_smem_size": lambda w: w.cta.shared_end - SHARED_RESERVED,
}

SPECIALS = {*CLOCKS, *_SCALARS, *(f"{name}.{axis}" for name in _VECTORS for axis in "xyz")}


def special(w: Warp, name: str, dtype: Any) -> Array:
    """Return a special register as 32 values."""
    if name in _TIMERS:
        w.grid.timer_reads += 1
        return np.full(LANES, w.grid.nanoseconds + w.grid.steps, dtype=np.uint64).astype(dtype)
    if name in CLOCKS:
        return np.full(LANES, w.grid.steps, dtype=np.uint64).astype(dtype)
    values = w.specials.get((name, dtype))
    if values is None:
        vector, _, axis = name.partition(".")
        value = _VECTORS[vector](w, "xyz".index(axis)) if axis else _SCALARS[name](w)
        values = np.empty(LANES, dtype=np.int64)
        values[:] = value
        values = values.astype(dtype)
        w.specials[name, dtype] = values
    return values.view()  # a write of a register is known by its new array
