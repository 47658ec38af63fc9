"""Address conversion: cvta, mapa, getctarank, isspacep (PTX ISA, "Data Movement")."""

from __future__ import annotations

import numpy as np

from build_kernels.emulator.access.state_spaces import SPACES
from build_kernels.emulator.execution.warp import Run, Warp
from build_kernels.emulator.instructions.decoding import Decoder, Decoding
from build_kernels.emulator.instructions.elementwise import build
from build_kernels.emulator.memory.windows import (
    SHARED_ADDRESS,
    SHARED_OFFSET,
    SHARED_RANK_SHIFT,
    SHARED_WINDOW,
    WINDOW_MASK,
    window_of,
)
from build_kernels.emulator.numerics.types import DTYPE


def convert_address(d: Decoding) -> Run:
    """Decode cvta, between a state space's addresses and generic ones."""
    kind = d.type()
    to = d.take("to")
    space = d.need(*SPACES)
    window = DTYPE[kind](window_of(space))
    return build(d, kind, [kind], lambda a: a - window if to else a + window)


def map_address(d: Decoding) -> Run:
    """Decode mapa: the address of the same variable in another CTA of the cluster.

    With a rank outside the cluster it is poison: only its use is a fault."""
    kind = d.type()
    shared = d.one_of("shared::cluster") is not None
    inner = d.source(d.operands[1], kind)
    rank = d.source(d.operands[2], "u32")
    write = d.destination(d.operands[0], kind)
    dtype = DTYPE[kind]
    low = dtype(SHARED_OFFSET)
    window = dtype(0 if shared else SHARED_WINDOW)
    registers = inner.registers + rank.registers

    def run(w: Warp) -> None:
        ranks = rank.get(w)
        taint = w.taint(registers)
        outside = ranks >= len(w.cta.cluster.ctas)
        if outside.any():
            taint = outside if taint is None else outside | taint
        base = (inner.get(w) & low) + (ranks.astype(dtype) << dtype(SHARED_RANK_SHIFT))
        write(w, base + window, taint)

    return run


def rank_of_address(d: Decoding) -> Run:
    """Decode getctarank: the cluster rank in a shared::cluster address."""
    kind = d.type()
    d.take("shared::cluster")
    mask, shift = DTYPE[kind](SHARED_ADDRESS), DTYPE[kind](SHARED_RANK_SHIFT)
    return build(d, "u32", [kind], lambda a: ((a & mask) >> shift).astype(np.uint32))


def is_space(d: Decoding) -> Run:
    space = d.need(*SPACES)
    inner = d.source(d.operands[1], "u64")
    write = d.destination(d.operands[0], "pred")
    window = window_of(space)

    def run(w: Warp) -> None:
        found = inner.get(w).astype(np.int64)
        holds = (found & WINDOW_MASK) == window
        if space in ("shared", "shared::cta"):
            holds &= ((found & SHARED_ADDRESS) >> SHARED_RANK_SHIFT) == w.cta.rank
        write(w, holds, w.taint(inner.registers))

    return run


INSTRUCTIONS: dict[str, Decoder] = {
    "cvta": convert_address,
    "mapa": map_address,
    "getctarank": rank_of_address,
    "isspacep": is_space,
}
