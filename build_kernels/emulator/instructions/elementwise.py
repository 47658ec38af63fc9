"""Instructions that compute each lane's result from that lane's operands."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from build_kernels.emulator.execution.warp import Warp
from build_kernels.emulator.instructions.decoding import (
    Decoding,
    Destination,
    Source,
    registers_of,
)
from build_kernels.emulator.lanes import Array, Mask
from build_kernels.emulator.numerics import floats
from build_kernels.emulator.numerics.types import unsigned

Compute = Callable[..., Array]


class Elementwise:
    """An instruction that reads registers, computes, and writes registers, and does nothing else.

    compute: from the sources' values to the target's, or to a tuple of several targets' values.
    collective: the lanes converge first, and it computes so for a whole warp.
    """

    collective = False

    def __init__(
        self, sources: Sequence[Source], targets: Sequence[Destination], compute: Callable[..., Any]
    ) -> None:
        self.sources = sources
        self.targets = targets
        self.compute = compute
        self.registers = registers_of(sources)
        self._gets = [source.get for source in sources]
        self._target = targets[0] if len(targets) == 1 else None

    def __call__(self, w: Warp) -> None:
        taint, taints = None, w.t
        for register in self.registers:
            if taints[register] is not None:
                taint = self.taint(w)
                break
        values = self.compute(*[get(w) for get in self._gets])
        if self._target is not None:
            self._target(w, values, taint)
            return
        for target, value in zip(self.targets, values, strict=True):
            target(w, value, taint)

    def results(self, operands: Sequence[Array]) -> Sequence[Array]:
        """Return the value of each target."""
        values = self.compute(*operands)
        return values if self._target is None else (values,)

    def taint(self, w: Warp) -> Mask | None:
        """Return the poison of the results."""
        return w.taint(self.registers)


def same(a: Array) -> Array:
    """Return the operand."""
    return a


def build(
    d: Decoding, result: str, operands: Sequence[str], compute: Compute, *, signless: bool = False
) -> Elementwise:
    """Decode d = compute(a, ...); result: compute's type. operands: the operands' types.

    signless: compute has the same bits for unsigned types, which registers hold.
    """
    if len(d.operands) != len(operands) + 1:
        raise d.error(f"takes {len(operands) + 1} operands (got {len(d.operands)})")
    target = d.destination(d.operands[0], result)
    kinds = list(operands)
    sources = [d.source(*each) for each in zip(d.operands[1:], kinds, strict=True)]
    if signless and not d.is_wider(d.operands[0], result):
        target = d.destination(d.operands[0], unsigned(result))
        kinds = [unsigned(kind) for kind in operands]
        sources = [d.source(*each) for each in zip(d.operands[1:], kinds, strict=True)]
    return Elementwise(sources, [target], compute)


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


def on_halves(d: Decoding, kind: str, arity: int, compute: Compute) -> Elementwise:
    """Decode a function of 16-bit floats, computed in float64."""
    raw = "b32" if kind.endswith("x2") else "b16"

    def run(*bits: Array) -> Array:
        return floats.pack_halves(kind, compute(*(floats.unpack_halves(kind, b) for b in bits)))

    return build(d, raw, [raw] * arity, run)
