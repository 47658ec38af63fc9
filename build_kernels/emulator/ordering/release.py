"""What strong operations hand over to each other (PTX ISA, "Release and Acquire Patterns")."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from build_kernels.emulator.execution.warp import Warp
from build_kernels.emulator.instructions.operands import Modifiers
from build_kernels.emulator.ordering.clocks import (
    CLUSTER_SCOPE,
    CTA_SCOPE,
    GPU_SCOPE,
    WEAK,
    Clock,
    join,
)

if TYPE_CHECKING:
    from build_kernels.emulator.execution.cta import Cta
from build_kernels.emulator.memory.state_spaces import Place

SCOPES = {"cta": CTA_SCOPE, "cluster": CLUSTER_SCOPE, "gpu": GPU_SCOPE, "sys": GPU_SCOPE}


@dataclass(eq=False)
class Released:
    """What the last strong write of a location handed over, at which scope, by whom."""

    clock: Clock
    scope: int
    cta: Cta


def _reaches(entry: Released, scope: int, cta: Cta) -> bool:
    scope = min(scope, entry.scope)
    if scope == CTA_SCOPE:
        return entry.cta is cta
    if scope == CLUSTER_SCOPE:
        return entry.cta.cluster is cta.cluster
    return True


def synchronise_read(w: Warp, place: Place, acquire: bool, scope: int) -> None:
    """Strong loads learn what the location's last strong store released."""
    for lane, offset in zip(place.lanes, place.offsets, strict=True):
        entry = w.machine.released.get((place.memory, int(offset)))
        if entry is None or not _reaches(entry, scope, w.cta):
            continue
        if acquire:
            w.acquire(1 << int(lane), entry.clock)
        elif entry not in w.unfenced[lane]:
            w.unfenced[lane].append(entry)


def synchronise_write(w: Warp, place: Place, release: bool, scope: int, rmw: bool) -> None:
    """Strong stores hand over what the lane knows; a read-modify-write keeps what was there."""
    for lane, offset in zip(place.lanes, place.offsets, strict=True):
        key = (place.memory, int(offset))
        before = w.machine.released.get(key)
        if not release and w.fenced[lane] is None:
            # A relaxed store with no fence before it hands nothing over.
            if before is not None and not rmw:
                del w.machine.released[key]
            continue
        clock = w.publish(1 << int(lane), release)
        reach = scope if release else min(scope, w.fence_scope[lane])
        if rmw and before is not None:
            clock = join(before.clock, clock)
        w.machine.released[key] = Released(clock, reach, w.cta)


def fence(w: Warp, lane: int, scope: int) -> None:
    """fence.acq_rel: later relaxed writes release, earlier relaxed reads have acquired."""
    bit = 1 << lane
    for entry in w.unfenced[lane]:
        if _reaches(entry, scope, w.cta):
            w.acquire(bit, entry.clock)
    w.unfenced[lane] = [e for e in w.unfenced[lane] if not _reaches(e, scope, w.cta)]
    w.fenced[lane] = w.publish(bit)
    w.fence_scope[lane] = scope


def order_of(mods: Modifiers, default: str) -> tuple[str, int]:
    """The memory order and the scope (WEAK for weak accesses)."""
    order = mods.one_of("weak", "relaxed", "acquire", "release", "acq_rel", "volatile") or default
    scope = mods.one_of(*SCOPES)
    if order == "volatile":
        return "relaxed", GPU_SCOPE
    if order == "weak":
        return order, WEAK
    return order, SCOPES[scope] if scope else GPU_SCOPE
