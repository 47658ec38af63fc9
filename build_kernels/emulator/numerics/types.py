"""The NumPy type of each PTX type, and of registers by width."""

from __future__ import annotations

from typing import Any

import numpy as np

# 16-bit floats that NumPy lacks, and packed pairs, are held as their bits.
DTYPE: dict[str, Any] = {
    "pred": np.bool_,
    "b8": np.uint8, "u8": np.uint8, "s8": np.int8,
    "b16": np.uint16, "u16": np.uint16, "s16": np.int16, "f16": np.float16, "bf16": np.uint16,
    "b32": np.uint32, "u32": np.uint32, "s32": np.int32, "f32": np.float32,
    "f16x2": np.uint32, "bf16x2": np.uint32,
    "b64": np.uint64, "u64": np.uint64, "s64": np.int64, "f64": np.float64,
    "f32x2": np.uint64, "b128": np.complex128,
}  # fmt: skip

# complex128 is the type of 16 bytes that NumPy moves without a look at them.
STORAGE: dict[int, Any] = {
    1: np.bool_, 8: np.uint8, 16: np.uint16, 32: np.uint32, 64: np.uint64, 128: np.complex128,
}  # fmt: skip

FLOATS = ("f32", "f64")
HALVES = ("f16", "bf16", "f16x2", "bf16x2")


def unsigned(kind: str) -> str:
    """Return the unsigned type of an integer type's width: the view that registers hold."""
    return f"u{kind[1:]}" if kind[0] in "su" else kind
