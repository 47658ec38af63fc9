"""Instructions that compute each lane's result from that lane's operands."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from build_kernels.emulator.execution.warp import Array, Run, Warp
from build_kernels.emulator.instructions.operands import (
    Context,
    Modifiers,
    Source,
    destination,
    registers_of,
    source,
)
from build_kernels.emulator.numerics import floats
from build_kernels.emulator.ptx.syntax import Instruction

FLOATS = ("f32", "f64")

HALVES = ("f16", "bf16", "f16x2", "bf16x2")


def build(
    ins: Instruction,
    context: Context,
    result: str,
    operands: Sequence[str],
    compute: Callable[..., Array],
) -> Run:
    """d = compute(a, ...): operand types, and the type of what compute returns."""
    if len(ins.operands) != len(operands) + 1:
        raise ins.error(f"takes {len(operands) + 1} operands (got {len(ins.operands)})")
    sources = [
        source(ins, operand, kind, context)
        for operand, kind in zip(ins.operands[1:], operands, strict=True)
    ]
    write = destination(ins, ins.operands[0], result)
    return runner(sources, write, compute)


def runner(
    sources: Sequence[Source], write: Callable[..., None], compute: Callable[..., Array]
) -> Run:
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


def float_compute(
    ins: Instruction, mods: Modifiers, kind: str, compute: Callable[..., Array]
) -> Callable[..., Array]:
    """Wrap a float function with .ftz, .sat and canonical NaNs."""
    ftz, sat = mods.take("ftz"), mods.take("sat")
    if kind == "f64" and (ftz or sat):
        raise ins.error(".ftz and .sat do not apply to .f64")

    def run(*values: Array) -> Array:
        if ftz:
            values = tuple(floats.flush(v) for v in values)
        result = compute(*values)
        if ftz:
            result = floats.flush(result)
        return floats.canonical(floats.saturate(result) if sat else result)

    return run


def on_halves(
    ins: Instruction, context: Context, kind: str, arity: int, compute: Callable[..., Array]
) -> Run:
    raw = "b32" if kind.endswith("x2") else "b16"

    def run(*bits: Array) -> Array:
        return floats.pack_halves(kind, compute(*(floats.unpack_halves(kind, b) for b in bits)))

    return build(ins, context, raw, [raw] * arity, run)
