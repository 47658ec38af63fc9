"""Address arithmetic and hints: cvta, mapa, isspacep, prefetch (PTX ISA, "Data Movement")."""

from __future__ import annotations

import numpy as np

from build_kernels.emulator.execution.warp import LANES, Run, Warp
from build_kernels.emulator.instructions.operands import (
    DTYPE,
    Context,
    Modifiers,
    address,
    destination,
    source,
)
from build_kernels.emulator.memory.memory import (
    LOCAL_WINDOW,
    PARAMETER_WINDOW,
    SHARED_RANK_SHIFT,
    SHARED_WINDOW,
    WINDOW_MASK,
)
from build_kernels.emulator.memory.state_spaces import SPACES
from build_kernels.emulator.ptx.syntax import Instruction


def convert_address(ins: Instruction, context: Context) -> Run:
    """cvta: between a state space's addresses and generic ones."""
    mods = Modifiers(ins)
    kind = mods.type()
    to = mods.take("to")
    space = mods.need(*SPACES)
    mods.done()
    window = {"local": LOCAL_WINDOW, "param": PARAMETER_WINDOW}.get(space, 0)
    if space.startswith("shared"):
        window = SHARED_WINDOW
    inner = source(ins, ins.operands[1], kind, context)
    write = destination(ins, ins.operands[0], kind)
    offset = DTYPE[kind](window)

    def run(w: Warp) -> None:
        value = inner.get(w)
        write(w, value - offset if to else value + offset, w.taint(inner.registers))

    return run


def map_address(ins: Instruction, context: Context) -> Run:
    """mapa: the address of the same variable in another CTA of the cluster."""
    mods = Modifiers(ins)
    kind = mods.type()
    shared = mods.one_of("shared::cluster") is not None
    mods.done()
    inner = source(ins, ins.operands[1], kind, context)
    rank = source(ins, ins.operands[2], "u32", context)
    write = destination(ins, ins.operands[0], kind)
    dtype = DTYPE[kind]
    low = dtype((1 << SHARED_RANK_SHIFT) - 1)
    window = dtype(0 if shared else SHARED_WINDOW)
    registers = inner.registers + rank.registers

    def run(w: Warp) -> None:
        ranks = rank.get(w)
        size = len(w.cta.cluster.ctas)
        if (ranks[w.active] >= size).any():
            w.machine.report(
                "out-of-bounds", f"mapa to a rank outside the cluster of {size}", warp=w
            )
        base = (inner.get(w) & low) + (ranks.astype(dtype) << dtype(SHARED_RANK_SHIFT))
        write(w, base + window, w.taint(registers))

    return run


def rank_of_address(ins: Instruction, context: Context) -> Run:
    """getctarank: the cluster rank in a shared::cluster address."""
    mods = Modifiers(ins)
    kind = mods.type()
    mods.take("shared::cluster")
    mods.done()
    inner = source(ins, ins.operands[1], kind, context)
    write = destination(ins, ins.operands[0], "u32")
    dtype = DTYPE[kind]

    def run(w: Warp) -> None:
        ranks = (inner.get(w) & dtype(0xFFFFFFFF)) >> dtype(SHARED_RANK_SHIFT)
        write(w, ranks.astype(np.uint32), w.taint(inner.registers))

    return run


def is_space(ins: Instruction, context: Context) -> Run:
    mods = Modifiers(ins)
    space = mods.need(*SPACES)
    mods.done()
    inner = source(ins, ins.operands[1], "u64", context)
    write = destination(ins, ins.operands[0], "pred")
    window = {"local": LOCAL_WINDOW, "param": PARAMETER_WINDOW}.get(space, 0)
    if space.startswith("shared"):
        window = SHARED_WINDOW

    def run(w: Warp) -> None:
        found = inner.get(w).astype(np.int64)
        holds = (found & WINDOW_MASK) == window
        if space in ("shared", "shared::cta"):
            holds &= ((found & 0xFFFFFFFF) >> SHARED_RANK_SHIFT) == w.cta.rank
        write(w, holds, w.taint(inner.registers))

    return run


def prefetch(ins: Instruction, context: Context) -> Run:
    """prefetch, prefetchu, discard, applypriority, createpolicy-free hints: no effect on values."""
    mods = Modifiers(ins)
    if mods.take("tensormap"):
        mods.one_of("param", "const")
    else:
        mods.one_of("global", "local")
        mods.need("L1", "L2", "L2::evict_last", "L2::evict_normal")
    mods.done()
    where = address(ins, ins.operands[0], context)
    tensor_map = "tensormap" in ins.words

    def run(w: Warp) -> None:
        w.poisoned("the address", where.registers)
        if tensor_map:
            lane = w.first_lane()
            w.machine.tensor_map(w, int(where.get(w)[lane]), lane)

    return run


def create_policy(ins: Instruction, context: Context) -> Run:
    """createpolicy.fractional: an opaque value that steers caches only."""
    mods = Modifiers(ins)
    mods.need("fractional")
    mods.need("b64")
    for word in list(mods.left):
        if word.startswith("L2::"):
            mods.left.remove(word)
    mods.done()
    write = destination(ins, ins.operands[0], "b64")
    zeros = np.zeros(LANES, dtype=np.uint64)
    return lambda w: write(w, zeros, None)
