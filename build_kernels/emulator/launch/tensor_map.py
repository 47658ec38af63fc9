"""Tensor maps: the global bytes that a box covers, and their places in shared memory.

Tiled mode only (PTX ISA, "Tensors"). Dimension 0 is the fastest, and coordinates are signed.
Elements outside the tensor are read as zero and are not written.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

from build_kernels.emulator.findings import LaunchError
from build_kernels.emulator.lanes import Ints, Mask
from build_kernels.emulator.launch.device_array import DeviceArray

ELEMENT_BYTES = {
    "uint8": 1, "uint16": 2, "float16": 2, "bfloat16": 2,
    "uint32": 4, "int32": 4, "float32": 4, "uint64": 8, "int64": 8, "float64": 8,
}  # fmt: skip
# The span and the bytes that stay together.
SWIZZLES = {
    "none": (0, 16), "32B": (32, 16), "64B": (64, 16), "128B": (128, 16),
    "128B_atom_32B": (128, 32),
}  # fmt: skip


def swizzle(addresses: NDArray[Any], span: int, atom: int = 16) -> NDArray[Any]:
    """Swizzle byte addresses: XOR the number of an atom in its span with the bits from bit 7."""
    mask = max(span // atom - 1, 0)
    return addresses ^ (((addresses >> 7) & mask) * atom)


@dataclass(frozen=True, kw_only=True, eq=False)
class TensorMap:
    """A tiled tensor map, as cuTensorMapEncodeTiled takes it.

    array: the allocation. offset: bytes into it. element_type: e.g. "bfloat16". dims: elements,
    fastest first. strides: bytes of dims 1.. . box: elements. swizzle: "none", "32B", "64B",
    "128B" or "128B_atom_32B". Interleave is none, out-of-bounds fill zeros, element strides are 1.
    """

    array: DeviceArray
    element_type: str
    dims: tuple[int, ...]
    strides: tuple[int, ...]
    box: tuple[int, ...]
    swizzle: str = "none"
    offset: int = 0

    @property
    def rank(self) -> int:
        return len(self.dims)

    @property
    def element_bytes(self) -> int:
        return ELEMENT_BYTES[self.element_type]

    @property
    def box_bytes(self) -> int:
        """Return the bytes of a full box, which a load takes off the tx-count."""
        return int(np.prod(self.box)) * self.element_bytes

    def check(self, where: str) -> None:
        """Raise LaunchError if cuTensorMapEncodeTiled refuses the map or the array is too small."""
        for name, allowed in (("element_type", ELEMENT_BYTES), ("swizzle", SWIZZLES)):
            if (got := getattr(self, name)) not in allowed:
                raise LaunchError(f"{where}.{name}: expected one of {[*allowed]} (got {got!r})")
        rank = self.rank
        if not 1 <= rank <= 5 or len(self.strides) != rank - 1 or len(self.box) != rank:
            raise LaunchError(
                f"{where}: a tensor of rank 1..5 has rank - 1 strides and a box of its rank "
                f"(got dims {self.dims}, strides {self.strides}, box {self.box})"
            )
        if any(not 1 <= d <= 1 << 32 for d in self.dims):
            raise LaunchError(f"{where}.dims: expected 1..2^32 each (got {self.dims})")
        if any(not 1 <= b <= 256 for b in self.box):
            raise LaunchError(f"{where}.box: expected 1..256 each (got {self.box})")
        inner = self.box[0] * self.element_bytes
        if inner % 16:
            raise LaunchError(f"{where}.box: rows of {inner} bytes are no multiple of 16")
        span, _ = SWIZZLES[self.swizzle]
        if span and inner > span:
            raise LaunchError(
                f"{where}.box: a row of {inner} bytes is wider than the {self.swizzle} swizzle"
            )
        if any(s % 16 or not 0 < s < 1 << 40 for s in self.strides):
            raise LaunchError(
                f"{where}.strides: expected multiples of 16 bytes below 2^40 (got {self.strides})"
            )
        if self.offset % 16:
            raise LaunchError(f"{where}.offset: must be a multiple of 16 (got {self.offset})")
        last = self.offset + self.element_bytes * self.dims[0]
        last += sum(s * (d - 1) for s, d in zip(self.strides, self.dims[1:], strict=True))
        if last > self.array.data.nbytes:
            raise LaunchError(
                f"{where}: dims {self.dims} with strides {self.strides} reach byte {last}, the "
                f"array {self.array.name!r} has {self.array.data.nbytes}"
            )

    def global_bytes(self, start: tuple[int, ...]) -> tuple[Ints, Mask]:
        """Locate a box at these coordinates in the array.

        Returns [n] the byte offset of each element, fastest dimension first, and [n] whether the
        element is inside the tensor."""
        offsets = np.full(1, self.offset, dtype=np.int64)
        inside = np.ones(1, dtype=bool)
        strides = (self.element_bytes, *self.strides)
        for at, extent, size, stride in zip(start, self.box, self.dims, strides, strict=True):
            index = at + np.arange(extent, dtype=np.int64)
            within = (index >= 0) & (index < size)
            offsets = (np.clip(index, 0, size - 1) * stride)[:, None] + offsets[None, :]
            inside = within[:, None] & inside[None, :]
            offsets, inside = offsets.reshape(-1), inside.reshape(-1)
        return offsets, inside

    def shared_bytes(self, base: int) -> Ints:
        """Return [n * element_bytes] the shared-memory offset of each byte of a box at `base`."""
        return swizzle(base + _ramp(self.box_bytes), *SWIZZLES[self.swizzle])


@lru_cache(maxsize=64)
def _ramp(size: int) -> Ints:
    return np.arange(size, dtype=np.int64)
