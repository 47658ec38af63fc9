"""Whether a kernel's cluster fits the context of a stream, and which kernels did not.

All CTAs of a cluster need room at once in one group of SMs (a GPC). A green context, a MIG slice or
MPS may leave no such room. Then the call takes the layer's next step: see `dispatch.without`.
"""

from __future__ import annotations

import math
import threading
from dataclasses import dataclass, replace
from typing import Any

from dsv4_router_runtime.log import warn_once

from . import driver
from .launch import has_clusters, launch_config
from .load import LoadedKernel


@dataclass(frozen=True, kw_only=True)
class Room:
    """The clusters of one kernel that a context holds.

    exclusive_clusters: how many at once if no two CTAs share an SM. reason: why there is no room
    for one cluster; None if there is.
    """

    exclusive_clusters: int
    reason: str | None = None


def ask_room(loaded: LoadedKernel, stream: int) -> Room:
    """Ask the driver how many clusters of a kernel the context of `stream` holds."""
    launch = loaded.kernel.launch
    if not has_clusters(launch):
        return Room(exclusive_clusters=0)
    exclusive = _clusters_at_once(loaded, stream, loaded.exclusive_shared_bytes)
    if exclusive or _clusters_at_once(loaded, stream, launch.dynamic_shared_bytes):
        return Room(exclusive_clusters=exclusive)
    return Room(exclusive_clusters=0, reason=no_room(loaded))


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
    """A kernel that did not fit, the last one taken instead, and how often one was looked for."""

    kernel: str
    device: int
    reason: str
    instead: str
    times: int


_fallbacks: dict[tuple[str, int], Fallback] = {}
_lock = threading.RLock()


def note_fallback(loaded: LoadedKernel, reason: str, instead: str) -> None:
    """Count a fallback; log a warning for the first one of a kernel on a GPU."""
    key = loaded.kernel.key, loaded.device
    with _lock:
        known = _fallbacks.get(key)
        if known is None:
            known = Fallback(kernel=key[0], device=key[1], reason=reason, instead=instead, times=0)
        _fallbacks[key] = replace(known, instead=instead, times=known.times + 1)
    text = f"{key[0]} is not launched: {reason}; such calls take {instead}"
    warn_once(f"no room for {key[0]} on GPU {key[1]}", text)


def fallbacks() -> tuple[Fallback, ...]:
    """Return every kernel that did not fit since the process began."""
    with _lock:
        return tuple(_fallbacks.values())
