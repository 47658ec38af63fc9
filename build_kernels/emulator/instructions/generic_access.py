"""Accesses through the generic proxy that ld, st, atom, red and tcgen05.alloc share."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from build_kernels.emulator.access.state_spaces import Place
from build_kernels.emulator.access.thread_access import ThreadAccess
from build_kernels.emulator.execution.interruption import Interruption, Partial
from build_kernels.emulator.execution.warp import Run, Warp
from build_kernels.emulator.instructions.decoding import Source
from build_kernels.emulator.lanes import LANES, Array, Ints, Mask, any_of, numbers_of
from build_kernels.emulator.memory.memory import BARRIER, POISON, VALID

PARTED = 0.25  # share of strong accesses whose lanes do not act at one moment
MAX_REST = 4  # turns of its warp that the rest of such an access may pass over


def lane_by_lane(run: Run) -> Run:
    """Let the lanes of a strong access act at different moments, under random schedules.

    PTX orders nothing between threads of a warp, so others may see a store by some lanes before
    the store by the rest. (Of a weak access they cannot without a race.)"""

    def some(w: Warp) -> Interruption:
        schedule, random = w.grid.schedule, w.grid.random
        count = w.bits.bit_count()
        if schedule.policy != "random" or count == 1 or w.grid.lull or random.random() >= PARTED:
            return run(w)
        every = w.bits
        # One comes first, one comes last, or half of them do: the lanes that are left may part
        # again.
        now = random.choice((1, count // 2, count - 1))
        w.activate(sum(1 << lane for lane in random.sample(numbers_of(every), now)))
        run(w)
        return Partial(every & ~w.bits, random.randrange(MAX_REST))

    return some


def value_bytes(w: Warp, sources: Sequence[Source], unit: int) -> Array:
    """Return [lanes, bytes] of the sources' values, `unit` bytes each."""
    parts = [np.ascontiguousarray(s.get(w)).view(np.uint8).reshape(LANES, unit) for s in sources]
    return np.concatenate(parts, axis=1) if len(parts) > 1 else parts[0]


def value_states(w: Warp, sources: Sequence[Source], unit: int) -> Array | None:
    """Return [lanes, bytes] of VALID and POISON for the sources' values; None if none is poison."""
    taints = [w.taint(s.registers) for s in sources]
    if all(taint is None for taint in taints):
        return None
    clean = np.zeros(LANES, dtype=bool)
    columns = np.stack([clean if taint is None else taint for taint in taints], axis=1)
    return np.where(np.repeat(columns, unit, axis=1), POISON, VALID).astype(np.uint8)


def access_of(w: Warp, place: Place, size: int, scope: int) -> ThreadAccess:
    """Return an access to `size` bytes per lane."""
    if place.peer is not None:
        place.memory.foreign = True
    return ThreadAccess(w, place.lanes, size, scope)


def note_read(w: Warp, place: Place, offsets: Ints, scope: int) -> None:
    """Check and record a read by lanes; offsets: [lanes, bytes]."""
    memory = place.memory
    if memory.tracked or memory.on_load is not None:
        memory.note_read(offsets.reshape(-1), access_of(w, place, offsets.shape[1], scope))


def read_states(w: Warp, place: Place, offsets: Ints) -> Mask | None:
    """Return [lanes, bytes] which bytes are poison, None for none; report a live mbarrier."""
    if place.memory.always_valid:
        return None
    state = place.memory.state[offsets]
    if state.tobytes().count(VALID) == state.size:
        return None
    check_no_barrier(w, place, state)
    return state == POISON


def check_no_barrier(w: Warp, place: Place, state: Array) -> None:
    """Report lanes that touch a live mbarrier; state: [lanes, bytes]."""
    touched = state == BARRIER
    if any_of(touched):
        at = int(np.flatnonzero(touched.any(axis=1))[0])
        w.report(
            "mbarrier-as-data",
            "an ordinary access to a live mbarrier object",
            lane=int(place.lanes[at]),
            address=place.memory.describe(int(place.offsets[at])),
        )


def check_writable(w: Warp, place: Place) -> bool:
    """Report a store to read-only memory; False for one."""
    if place.memory.read_only:
        w.report(
            "read-only",
            "a store to memory that the launch declares read-only",
            lane=int(place.lanes[0]),
            address=place.memory.describe(int(place.offsets[0])),
        )
    return not place.memory.read_only


def write_bytes(
    w: Warp, place: Place, offsets: Ints, data: Array, state: Array | int, scope: int
) -> None:
    """Store lanes' bytes, with all checks of a write through the generic proxy."""
    memory = place.memory
    if not check_writable(w, place):
        return
    check_no_barrier(w, place, memory.state[offsets])
    memory.note_write(offsets.reshape(-1), access_of(w, place, offsets.shape[1], scope))
    memory.data[offsets] = data
    memory.state[offsets] = state
    if memory.tracked and not scope:
        clash = memory.data[offsets] != data
        if any_of(clash):
            row = int(np.flatnonzero(clash.any(axis=1))[0])
            w.report(
                "race",
                "two lanes of one store write different values to one location",
                lane=int(place.lanes[row]),
                address=memory.describe(int(place.offsets[row])),
                other=w.instruction,
            )
