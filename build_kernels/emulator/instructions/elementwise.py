"""Instructions that compute each lane's result from that lane's operands."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from build_kernels.emulator.execution.warp import Run, Warp
from build_kernels.emulator.instructions.decoding import Decoding, Source, Write, registers_of
from build_kernels.emulator.lanes import Array
from build_kernels.emulator.numerics import floats

Compute = Callable[..., Array]


def build(d: Decoding, result: str, operands: Sequence[str], compute: Compute) -> Run:
    """Decode d = compute(a, ...); result: compute's type. operands: the operands' types."""
    if len(d.operands) != len(operands) + 1:
        raise d.error(f"takes {len(operands) + 1} operands (got {len(d.operands)})")
    sources = [
        d.source(operand, kind) for operand, kind in zip(d.operands[1:], operands, strict=True)
    ]
    return runner(sources, d.destination(d.operands[0], result), compute)


def runner(sources: Sequence[Source], write: Write, compute: Compute) -> Run:
    """Return a function that reads the sources, computes and writes, and hands poison on."""
    registers = registers_of(sources)
    gets = [s.get for s in sources]

    def run(w: Warp) -> None:
        taints = w.t
        taint = None
        for register in registers:
            if taints[register] is not None:
                taint = w.taint(registers)
                break
        write(w, compute(*[get(w) for get in gets]), taint)

    return run


def float_compute(d: Decoding, kind: str, compute: Compute) -> Compute:
    """Wrap a float function with .ftz, .sat and canonical NaNs."""
    ftz, sat = d.take("ftz"), d.take("sat")
    if kind == "f64" and (ftz or sat):
        raise d.error(".ftz and .sat do not apply to .f64")

    def run(*values: Array) -> Array:
        if ftz:
            values = tuple(floats.flush(v) for v in values)
        result = compute(*values)
        if ftz:
            result = floats.flush(result)
        return floats.canonical(floats.saturate(result) if sat else result)

    return run


def on_halves(d: Decoding, kind: str, arity: int, compute: Compute) -> Run:
    """Decode a function of 16-bit floats, computed in float64."""
    raw = "b32" if kind.endswith("x2") else "b16"

    def run(*bits: Array) -> Array:
        return floats.pack_halves(kind, compute(*(floats.unpack_halves(kind, b) for b in bits)))

    return build(d, raw, [raw] * arity, run)
