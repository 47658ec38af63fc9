"""Release and acquire by strong accesses and fences (PTX ISA, "Release and Acquire Patterns")."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

from build_kernels.emulator.access.state_spaces import Place
from build_kernels.emulator.execution.cta import Released
from build_kernels.emulator.execution.warp import Warp
from build_kernels.emulator.memory.access_records import CLUSTER_SCOPE, CTA_SCOPE, GPU_SCOPE
from build_kernels.emulator.ordering.clocks import join

SCOPES = {"cta": CTA_SCOPE, "cluster": CLUSTER_SCOPE, "gpu": GPU_SCOPE, "sys": GPU_SCOPE}


def synchronise_read(
    w: Warp,
    place: Place,
    acquire: bool,
    scope: int,
    old: Mapping[int, Released | None] = MappingProxyType({}),
) -> None:
    """Acquire the clock that the location's last strong store released.

    old: what lanes acquire that read an older value."""
    memory, released = place.memory, w.grid.released
    if not released and not old:
        return
    for lane, offset in zip(place.lanes.tolist(), place.offsets.tolist(), strict=True):
        entry = old[lane] if lane in old else released.get((memory, offset))
        if entry is None or not entry.reaches(scope, w.cta):
            continue
        if acquire:
            w.acquire(1 << lane, entry.clock)
        elif entry not in w.unfenced.get(lane, ()):
            w.unfenced.setdefault(lane, []).append(entry)


def synchronise_write(w: Warp, place: Place, release: bool, scope: int, rmw: bool) -> None:
    """Release the lanes' clocks at the location; a read-modify-write joins the one there."""
    for lane, offset in zip(place.lanes.tolist(), place.offsets.tolist(), strict=True):
        key = (place.memory, offset)
        before = w.grid.released.get(key)
        if not release and w.fenced[lane] is None:
            # A relaxed store with no fence before it releases nothing.
            if before is not None and not rmw:
                del w.grid.released[key]
            continue
        clock = w.publish(1 << lane, release)
        reach = scope if release else min(scope, w.fence_scope[lane])
        if rmw and before is not None:
            clock = join(before.clock, clock)
        w.grid.released[key] = Released(clock, reach, w.cta)


def fence(w: Warp, lane: int, scope: int) -> None:
    """Apply fence.acq_rel: earlier relaxed reads acquire, later relaxed writes release."""
    bit = 1 << lane
    for entry in w.unfenced.pop(lane, ()):
        if entry.reaches(scope, w.cta):
            w.acquire(bit, entry.clock)
        else:
            w.unfenced.setdefault(lane, []).append(entry)
    w.fenced[lane] = w.publish(bit)
    w.fence_scope[lane] = scope
