"""The results that the PTX ISA allows an approximate instruction to give.

The bounds are those of the notes under "Floating Point Instructions", ISA 8.8:
https://docs.nvidia.com/cuda/parallel-thread-execution/#floating-point-instructions
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from build_kernels.emulator.lanes import Array
from build_kernels.emulator.numerics import floats

SIGNIFICAND_BITS = 24


@dataclass(frozen=True, kw_only=True)
class Band:
    """A function in FP64, and the largest error of its FP32 approximation.

    ulps: error in units in the last place of the exact result. relative: error by that result.
    absolute: error of the arguments in (1/2, 2), in place of the relative one.
    """

    function: Callable[[Array], Array]
    ulps: float = 0.0
    relative: float = 0.0
    absolute: float = 0.0

    def nearest(self, values: Array) -> Array:
        """Return the correctly rounded results, which are the emulator's own."""
        return _flushed(self._exact(values).astype(np.float32))

    def ends(self, values: Array) -> tuple[Array, Array]:
        """Return the least and the greatest result; subnormal arguments and results are 0.

        The results of 0, infinity and NaN are exact.
        """
        exact = self._exact(values)
        with np.errstate(all="ignore"):
            error = np.where(np.isfinite(exact), self._error(values, exact), 0.0)
            low = floats.narrow(exact - error, "rp")
            high = floats.narrow(exact + error, "rm")
        return _flushed(low), _flushed(high)

    def _exact(self, values: Array) -> Array:
        with np.errstate(all="ignore"):
            return np.asarray(self.function(floats.flush(values).astype(np.float64)))

    def _error(self, values: Array, exact: Array) -> Array:
        inside = (values > 0.5) & (values < 2) & (self.absolute > 0)
        bound = np.where(inside, self.absolute, self.relative * np.abs(exact))
        # exact = significand * 2^exponent with a significand in [1/2, 1)
        exponent = np.frexp(exact)[1]
        last_place = np.where(exact == 0, 0.0, np.ldexp(1.0, exponent - SIGNIFICAND_BITS))
        return np.asarray(bound + self.ulps * last_place)


def _flushed(results: Array) -> Array:
    return floats.canonical(floats.flush(results))


BANDS = {
    "rcp.approx.ftz.f32": Band(function=np.reciprocal, ulps=1),
    "rsqrt.approx.ftz.f32": Band(function=floats.UNARY["rsqrt"], relative=2**-22.9),
    "sqrt.approx.ftz.f32": Band(function=np.sqrt, relative=2**-23),
    # 2 from the correctly rounded result, which is half a unit from the exact one.
    "ex2.approx.ftz.f32": Band(function=floats.UNARY["ex2"], ulps=2.5),
    "lg2.approx.ftz.f32": Band(function=floats.UNARY["lg2"], relative=2**-22, absolute=2**-22),
}


def at_the_ends(random: np.random.Generator) -> dict[str, Callable[[Array], Array]]:
    """Return functions for `emulate`: each lane gets an end of its band, or the nearest result."""

    def moved(band: Band) -> Callable[[Array], Array]:
        def run(values: Array) -> Array:
            low, high = band.ends(values)
            choice = random.integers(3, size=values.shape)
            return np.choose(choice, (low, high, band.nearest(values)))

        return run

    return {opcode: moved(band) for opcode, band in BANDS.items()}
