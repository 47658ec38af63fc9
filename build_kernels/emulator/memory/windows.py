"""Windows of generic addresses, and the numbers of shared memory."""

from __future__ import annotations

SHARED_WINDOW = 0x0001_0000_0000_0000
LOCAL_WINDOW = 0x0002_0000_0000_0000
PARAMETER_WINDOW = 0x0004_0000_0000_0000
WINDOW_MASK = 0x00FF_0000_0000_0000

SHARED_RESERVED = 1024  # the driver keeps the first KiB of shared memory for itself
SHARED_CAPACITY = 228 * 1024
SHARED_RANK_SHIFT = 24  # a shared::cluster address: rank of the CTA << 24 | offset
SHARED_OFFSET = (1 << SHARED_RANK_SHIFT) - 1
SHARED_ADDRESS = 0xFFFF_FFFF  # the part of a generic address that is a shared::cluster address


def split_shared(address: int) -> tuple[int, int]:
    """Return the rank and the offset of a shared address, or a generic one in shared memory."""
    address &= SHARED_ADDRESS
    return address >> SHARED_RANK_SHIFT, address & SHARED_OFFSET


def join_shared(rank: int, offset: int) -> int:
    """Return the shared::cluster address of an offset in a CTA's shared memory."""
    return rank << SHARED_RANK_SHIFT | offset


def window_of(space: str) -> int:
    """Return the window of a state space; 0 for global memory."""
    if space.startswith("shared"):
        return SHARED_WINDOW
    return {"local": LOCAL_WINDOW, "param": PARAMETER_WINDOW}.get(space, 0)
