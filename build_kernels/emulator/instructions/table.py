"""The table of supported instructions: opcode prefixes and their decoders."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from functools import lru_cache
from types import ModuleType
from typing import Any

from build_kernels.binaries.ptx.syntax import Instruction, Kernel
from build_kernels.emulator.execution.program import Program
from build_kernels.emulator.execution.warp import DecodedInstruction, Run
from build_kernels.emulator.instructions import (
    arithmetic,
    atom_red,
    barrier,
    bits,
    cluster_launch,
    collectives,
    control_flow,
    cp_async,
    cp_async_bulk,
    cvt,
    cvta_mapa,
    fence,
    griddepcontrol,
    ld_st,
    mbarrier,
    mov_setp_selp,
    prefetch,
    shfl,
    st_async,
    stmatrix,
    tcgen05_alloc,
    tcgen05_commit_fence,
    tcgen05_ld_st,
    tcgen05_mma,
    wgmma,
)
from build_kernels.emulator.instructions.block import Block, blocks_of
from build_kernels.emulator.instructions.decoding import Context, Decoder, Decoding
from build_kernels.emulator.lanes import Array
from build_kernels.emulator.launch.variables import VariableLayout

FAMILIES = (
    arithmetic, bits, mov_setp_selp, cvt, ld_st, atom_red, st_async, stmatrix, cvta_mapa, prefetch,
    cp_async, cp_async_bulk, cluster_launch, shfl, collectives, control_flow, griddepcontrol, fence,
    barrier, mbarrier, tcgen05_alloc, tcgen05_ld_st, tcgen05_mma, tcgen05_commit_fence, wgmma,
)  # fmt: skip

# The targets that have an instruction, by the start of their names; the others are everywhere.
_TARGETS = {"tcgen05": "sm_10", "wgmma": "sm_90a", "clusterlaunchcontrol": "sm_10"}


def merge(families: Iterable[ModuleType]) -> Mapping[str, Decoder]:
    """Join the families' tables; ValueError if two of them decode one prefix."""
    merged: dict[str, Decoder] = {}
    owners: dict[str, str] = {}
    for family in families:
        for prefix, decoder in family.INSTRUCTIONS.items():
            if prefix in owners:
                raise ValueError(f"both {owners[prefix]} and {family.__name__} decode {prefix}")
            owners[prefix] = family.__name__
            merged[prefix] = decoder
    return merged


INSTRUCTIONS = merge(FAMILIES)


def supported_instructions(first_word: str = "") -> list[str]:
    """Return the opcode prefixes that can be decoded, or those with this first word."""
    return sorted(p for p in INSTRUCTIONS if not first_word or p.split(".")[0] == first_word)


def make_program(
    kernel: Kernel,
    layout: VariableLayout,
    arch: str,
    approximate: Mapping[str, Callable[[Array], Array]],
) -> Program:
    """Decode a kernel, with a ret at its end; UnsupportedPtx for an unknown instruction."""
    tables = (layout.shared, layout.addresses, approximate)
    code = _decode_all(kernel, arch, *(tuple(table.items()) for table in tables))
    instructions = [step.instruction for step in code]
    return Program(kernel=replace(kernel, instructions=instructions), layout=layout, code=code)


def make_blocks(program: Program) -> None:
    """Make the functions of a program's blocks, which else are made at their first use."""
    for step in program.code:
        if isinstance(step.block, Block):
            _ = step.block.function


def context_of(
    kernel: Kernel,
    arch: str,
    shared: Mapping[str, int],
    addresses: Mapping[str, int],
    approximate: Mapping[str, Callable[[Array], Array]],
) -> Context:
    """Return the names that a kernel's instructions may use."""
    return Context(
        arch=arch,
        shared=shared,
        parameters={p.name: p.offset for p in kernel.parameters},
        parameter_bytes=kernel.parameter_bytes,
        addresses=addresses,
        approximate=approximate,
    )


# Launches of one kernel share its code: decoding is half of a small launch's time.
@lru_cache(maxsize=4)
def _decode_all(
    kernel: Kernel, arch: str, *tables: tuple[tuple[str, Any], ...]
) -> tuple[DecodedInstruction, ...]:
    end = Instruction(len(kernel.instructions), kernel.line, "the end of the kernel", "ret", ())
    context = context_of(kernel, arch, *map(dict, tables))
    instructions = (*kernel.instructions, end)
    runs = [decode(instruction, context) for instruction in instructions]
    blocks = blocks_of(runs, instructions)
    return tuple(_step(*each) for each in zip(instructions, runs, blocks, strict=True))


def _step(ins: Instruction, run: Run, block: Block | None) -> DecodedInstruction:
    guard, negated = (ins.guard[0].index, ins.guard[1]) if ins.guard else (-1, False)
    target = -1 if ins.target is None else ins.target
    return DecodedInstruction(ins, run, block, guard, negated, target)


def decode(instruction: Instruction, context: Context) -> Run:
    """Decode with the longest prefix of the opcode; UnsupportedPtx if there is none."""
    words = instruction.words
    for length in range(len(words), 0, -1):
        decoder = INSTRUCTIONS.get(".".join(words[:length]))
        if decoder is None:
            continue
        if not context.arch.startswith(_TARGETS.get(words[0], "")):
            raise instruction.error(f"{words[0]} does not exist on {context.arch}")
        decoding = Decoding(instruction, context, length)
        try:
            run = decoder(decoding)
        except IndexError:
            raise instruction.error("has too few operands or modifiers") from None
        decoding.done()
        return run
    supported = ", ".join(supported_instructions(words[0]) or supported_instructions())
    raise instruction.error(f"unknown instruction {instruction.opcode}; supported are {supported}")
