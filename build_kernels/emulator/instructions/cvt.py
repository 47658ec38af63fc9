"""cvt between integer and float types (PTX ISA, "cvt")."""

from __future__ import annotations

import numpy as np

from build_kernels.binaries.ptx.syntax import TYPE_BITS
from build_kernels.emulator.execution.warp import Run
from build_kernels.emulator.instructions.decoding import Decoder, Decoding
from build_kernels.emulator.instructions.elementwise import Compute, build
from build_kernels.emulator.lanes import LANES, Array
from build_kernels.emulator.numerics import floats
from build_kernels.emulator.numerics.types import DTYPE


def convert(d: Decoding) -> Run:
    origin = d.type()
    target = d.type()
    mode = d.one_of("rn", "rz", "rm", "rp", "rni", "rzi", "rmi", "rpi")
    sat, ftz = d.take("sat"), d.take("ftz")
    if target in ("f16x2", "bf16x2"):
        if origin != "f32" or mode not in ("rn", "rz") or sat:
            raise d.error("only .rn and .rz from .f32 are supported")
        rounding = mode

        def pack(high: Array, low: Array) -> Array:
            # The first source becomes the upper half.
            return floats.pack_halves(target, np.stack([low, high]).astype(np.float64), rounding)

        return build(d, "b32", ["f32", "f32"], pack)

    def run(values: Array) -> Array:
        if origin == "bf16":
            values = floats.bf16_to_f32(values)
        if ftz and values.dtype == np.float32:
            values = floats.flush(values)
        result = _convert(d, values, origin, target, mode, sat)
        if ftz and result.dtype == np.float32 and target == "f32":
            result = floats.flush(result)
        return result

    raw = "b16" if target in ("f16", "bf16") else target
    # Refuse a conversion that is not supported now, not when it is executed.
    _convert(d, np.zeros(LANES, dtype=DTYPE[origin]), origin, target, mode, sat)
    return build(d, raw, [origin], run)


_INTEGER_ROUND: dict[str, Compute] = {
    "rni": np.rint, "rzi": np.trunc, "rmi": np.floor, "rpi": np.ceil,
}  # fmt: skip


def _convert(
    d: Decoding, values: Array, origin: str, target: str, mode: str | None, sat: bool
) -> Array:
    from_float = origin[0] in "fb" and origin not in ("b8", "b16", "b32", "b64")
    to_float = target in ("f16", "bf16", "f32", "f64")
    if not from_float and not to_float:
        if sat:
            low, high = _integer_range(target)
            values = np.array([min(max(int(v), low), high) for v in values], dtype=object)
        return values.astype(DTYPE[target])
    if from_float and not to_float:
        if mode not in _INTEGER_ROUND:
            raise d.error("a conversion from float to integer needs .rni, .rzi, .rmi or .rpi")
        rounded = _INTEGER_ROUND[mode](values.astype(np.float64))
        low, high = _integer_range(target)
        clamped = [0 if np.isnan(v) else int(min(max(v, low), high)) for v in rounded]
        return np.array([min(max(v, low), high) for v in clamped], dtype=DTYPE[target])
    if from_float and mode in _INTEGER_ROUND:
        values = _INTEGER_ROUND[mode](values)
        mode = None
    if sat:
        values = floats.saturate(values)
    if target == "f64":
        return values.astype(np.float64)
    rounding = mode or "rn"
    if target == "f32":
        if TYPE_BITS[origin] == 64 and not from_float:
            if rounding != "rn":
                raise d.error("directed rounding of 64-bit integers is not modelled")
            return values.astype(np.float32)
        return floats.narrow(values.astype(np.float64), rounding)
    if rounding not in ("rn", "rz"):
        raise d.error(f"rounding .{rounding} to .{target} is not modelled")
    return floats.pack_halves(target, values.astype(np.float64), rounding)


def _integer_range(kind: str) -> tuple[int, int]:
    bits = TYPE_BITS[kind]
    if kind[0] == "s":
        return -(1 << (bits - 1)), (1 << (bits - 1)) - 1
    return 0, (1 << bits) - 1


INSTRUCTIONS: dict[str, Decoder] = {"cvt": convert}
