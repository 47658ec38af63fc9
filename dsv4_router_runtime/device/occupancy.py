"""How many clusters of a kernel the context of a stream holds, and which kernels were passed over.

All CTAs of a cluster need room at once in one group of SMs (a GPC). A green context, a MIG slice or
MPS may leave no such room, or room for fewer clusters than a launch has. Then the call takes
another step of the layer.
"""

from __future__ import annotations

import math
import threading
from dataclasses import dataclass, replace
from typing import Any

from dsv4_router_runtime.log import info_once, warn_once

from . import driver
from .launch import has_clusters, launch_config
from .load import LoadedKernel


@dataclass(frozen=True, kw_only=True)
class Room:
    """The clusters of one kernel that a context holds.

    exclusive_clusters: how many at once if no two CTAs share an SM. clusters: how many at once, or
    the same number if no more were asked for. reason: why there is no room for one cluster; None if
    there is.
    """

    exclusive_clusters: int
    clusters: int
    reason: str | None = None

    def waves(self, wanted: int) -> int:
        """Return in how many waves a launch of `wanted` clusters runs, if there is room for one.

        CTAs that share SMs are one wave. On one H200, a decode launch of 64 tokens of 7168x384 has
        6 clusters of 16. us in green contexts that hold fewer at once:

            SMs                                        32     48     64
            decode, in several waves                   23.7   12.6   9.2
            the prefill kernel that takes one wave     9.8    8.7    7.8
        """
        return math.ceil(wanted / self.clusters)


def ask_room(loaded: LoadedKernel, stream: int, clusters: int = 1) -> Room:
    """Ask the driver whether the context of `stream` holds so many clusters of a kernel at once.

    Whether more fit if CTAs share SMs is asked only if fewer do without. Of a kernel without
    clusters any context holds one.
    """
    launch = loaded.kernel.launch
    if not has_clusters(launch):
        return Room(exclusive_clusters=0, clusters=1)
    exclusive = shared = _clusters_at_once(loaded, stream, loaded.exclusive_shared_bytes)
    if exclusive < clusters:
        shared = _clusters_at_once(loaded, stream, launch.dynamic_shared_bytes)
    reason = None if exclusive or shared else no_room(loaded)
    return Room(exclusive_clusters=exclusive, clusters=shared, reason=reason)


def no_room(loaded: LoadedKernel) -> str:
    """Say that not one cluster of a kernel fits."""
    launch = loaded.kernel.launch
    return (
        f"no room for a cluster of {math.prod(launch.cluster)} CTAs of "
        f"{launch.dynamic_shared_bytes} bytes of shared memory in this context of "
        f"GPU {loaded.device}"
    )


def _clusters_at_once(loaded: LoadedKernel, stream: int, shared_bytes: int) -> int:
    cuda = driver.bindings()
    kernel = loaded.kernel
    config = launch_config(
        kernel, grid=kernel.launch.cluster, shared_bytes=shared_bytes, stream=stream, pdl=False
    )
    # The kernel's handle, not its function's: that is bound to the primary context, and the driver
    # then ignores the context of config's stream.
    handle = cuda.CUfunction(int(loaded.handle))

    def ask() -> tuple[Any, ...]:
        return tuple(cuda.cuOccupancyMaxActiveClusters(handle, config))

    results = driver.in_a_context(loaded.device, ask(), ask)
    if results[0] == cuda.CUresult.CUDA_ERROR_INVALID_CLUSTER_SIZE:
        return 0
    return int(driver.checked(f"asking how many clusters of {kernel.key} fit", results))


@dataclass(frozen=True, kw_only=True)
class Fallback:
    """A kernel that was passed over, the last one taken instead, and how often that happened."""

    kernel: str
    device: int
    reason: str
    instead: str
    times: int


_fallbacks: dict[tuple[str, int], Fallback] = {}
_lock = threading.RLock()


def note_fallback(loaded: LoadedKernel, reason: str, instead: str, *, has_room: bool) -> None:
    """Count a fallback, and log the first one of a kernel on a GPU.

    That is a warning unless the kernel has room, and is passed over for a faster one.
    """
    key = loaded.kernel.key, loaded.device
    with _lock:
        known = _fallbacks.get(key)
        if known is None:
            known = Fallback(kernel=key[0], device=key[1], reason=reason, instead=instead, times=0)
        _fallbacks[key] = replace(known, instead=instead, times=known.times + 1)
    text = f"{key[0]} is not launched: {reason}; such calls take {instead}"
    once = info_once if has_room else warn_once
    once(f"{'few clusters' if has_room else 'no room'} for {key[0]} on GPU {key[1]}", text)


def fallbacks() -> tuple[Fallback, ...]:
    """Return every kernel that was passed over since the process began."""
    with _lock:
        return tuple(_fallbacks.values())
