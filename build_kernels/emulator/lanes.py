"""Masks of a warp's 32 lanes, as integers and as NumPy arrays."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

LANES = 32
ALL = (1 << LANES) - 1
LANE_INDEX = np.arange(LANES)

Array = NDArray[Any]
Ints = NDArray[np.int64]
Mask = NDArray[np.bool_]


@lru_cache(maxsize=4096)
def lanes_of(bits: int) -> Mask:
    """Return bool[32] for a lane mask."""
    mask = (bits >> LANE_INDEX & 1).astype(bool)
    mask.flags.writeable = False
    return mask


@lru_cache(maxsize=4096)
def indices_of(bits: int) -> Ints:
    """Return the lane numbers of a mask, ascending."""
    return np.flatnonzero(lanes_of(bits))


@lru_cache(maxsize=4096)
def numbers_of(bits: int) -> tuple[int, ...]:
    """Return the lane numbers of a mask as Python ints, ascending."""
    return tuple(indices_of(bits).tolist())


def bits_of(mask: Mask) -> int:
    """Return the lane mask of bool[32]."""
    return _bits_of(mask.tobytes())


@lru_cache(maxsize=4096)
def _bits_of(raw: bytes) -> int:
    packed = np.packbits(np.frombuffer(raw, dtype=bool), bitorder="little")
    return int.from_bytes(packed.tobytes(), "little")


def any_of(mask: Mask) -> bool:
    """Return mask.any(), which takes NumPy many times as long."""
    return b"\1" in mask.tobytes()


def all_of(mask: Mask) -> bool:
    """Return mask.all()."""
    return b"\0" not in mask.tobytes()


def lowest(bits: int) -> int:
    """Return the lowest lane of a mask that is not empty."""
    return (bits & -bits).bit_length() - 1


EVERY_LANE = lanes_of(ALL)
