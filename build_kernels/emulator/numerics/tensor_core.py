"""The sum of one tensor-core instruction, on arrays: the products of 16-bit floats and D.

As an H200's wgmma adds BF16. MMA-Sim (arXiv 2511.10909) gives tcgen05.mma of kind::f16 the same.
"""

from __future__ import annotations

import numpy as np

from build_kernels.emulator.lanes import Array
from build_kernels.emulator.numerics import floats

# The bits of a term that are kept below the largest exponent of all terms, which is that of the
# least BF16 at least; of F16 no GPU has shown it.
FRACTION_BITS, LEAST_EXPONENT = 25, -133
OF_DENORMALS = {True: -126, False: -14}  # by whether they are BF16 or FP32


def multiply_add(a: Array, b: Array, d: Array, bf16: tuple[bool, bool]) -> Array:
    """Return float32 [m, n]: a [m, K] times b [n, K], and d [m, n].

    bf16: whether a and b are bf16; else they are f16. Each of the K products and d is truncated
    toward zero at FRACTION_BITS bits below the largest exponent among those that are not zero, that
    of a product being the sum of its factors'. Their exact sum is truncated toward zero to float32.
    """
    if _is_exact(a, b, d):
        return (a @ b.T + d).astype(np.float32) + np.float32(0)
    of_a, of_b = (_exponents(x, is_bf16) for x, is_bf16 in zip((a, b), bf16, strict=True))
    of_zero = (a == 0)[:, None] | (b == 0)
    of_products = np.where(of_zero, LEAST_EXPONENT, of_a[:, None] + of_b).max(axis=2)
    of_d = np.where(d == 0, LEAST_EXPONENT, _exponents(d, True))
    largest = np.maximum(np.maximum(of_products, of_d), LEAST_EXPONENT)
    scale = np.ldexp(1.0, FRACTION_BITS - largest)
    with np.errstate(invalid="ignore"):  # infinities of both signs
        terms = np.trunc(a[:, None] * b * scale[..., None])
        total = (terms.sum(axis=2) + np.trunc(d * scale)) / scale
    # The FP64 sum is exact. What is beyond float32's range is infinite.
    with np.errstate(over="ignore"):
        truncated = floats.narrow(total, "rz")
        return np.where(np.abs(total) < 2.0**128, truncated, total.astype(np.float32)) + np.float32(
            0
        )


def _is_exact(a: Array, b: Array, d: Array) -> bool:
    """Return whether all are integers, so small that nothing is truncated in any order."""
    with np.errstate(invalid="ignore"):
        factors = float(np.abs(a).max()) * float(np.abs(b).max())
        most = factors * a.shape[1] + float(np.abs(d).max())
        # False for NaN. Below 2^24 float32 has every integer, and a term at most 25 bits.
        return most <= 2.0**24 and all([bool((np.rint(x) == x).all()) for x in (a, b, d)])


def _exponents(values: Array, bf16: bool) -> Array:
    """Return the exponents of nonzero numbers."""
    return np.maximum(np.frexp(values)[1] - 1, OF_DENORMALS[bf16])
