"""The dynamic shared memory that a kernel addresses, as far as its text shows.

Extern shared memory has no size in PTX. But an address that is the symbol plus a constant, through
registers that are written once, is fixed before the launch. Compilers address barriers so.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator

from build_kernels.binaries.ptx.syntax import (
    TYPE_BITS,
    Address,
    Immediate,
    Instruction,
    Kernel,
    Operand,
    Pair,
    Register,
    Symbol,
    Vector,
)
from build_kernels.emulator.findings import LaunchError
from build_kernels.emulator.launch.launch import Launch

# Instructions that copy an address that is the same in every lane.
_COPIES = ("mov", "cvta", "cvt", "shfl")


def check_dynamic_shared(kernel: Kernel, launch: Launch) -> None:
    """Raise LaunchError if an instruction, reached or not, addresses more than the launch gives."""
    names = {v.name for v in kernel.variables if v.space == "shared" and v.size is None}
    known = _known_offsets(kernel, names) if names else {}
    for instruction in kernel.instructions if names else ():
        for operand in instruction.operands:
            if not isinstance(operand, Address):
                continue
            start = _offset(operand.base, known, names)
            if start is None:
                continue
            end = start + operand.offset + _bytes(instruction)
            if end > launch.dynamic_shared_bytes:
                raise LaunchError(
                    f"launch.dynamic_shared_bytes: PTX line {instruction.line} addresses "
                    f"{end} bytes of it (got {launch.dynamic_shared_bytes}): `{instruction.text}`"
                )


def _known_offsets(kernel: Kernel, names: set[str]) -> dict[int, int]:
    """Return the offset into dynamic shared memory of each register that is written once."""
    writes = Counter(
        register.index
        for instruction in kernel.instructions
        for register in _registers(instruction.operands[:1])
    )
    known: dict[int, int] = {}
    # In the order of the text: a compiler writes a register before it reads it.
    for instruction in kernel.instructions:
        if len(instruction.operands) < 2 or instruction.guard is not None:
            continue
        target, source, *more = instruction.operands
        if not isinstance(target, Register) or writes[target.index] != 1:
            continue
        start = _offset(source, known, names)
        if start is None:
            continue
        if instruction.words[0] in _COPIES:
            known[target.index] = start
        elif instruction.words[0] == "add" and isinstance(more[0], Immediate):
            if isinstance(more[0].value, int):
                known[target.index] = start + more[0].value
    return known


def _offset(operand: Operand, known: dict[int, int], names: set[str]) -> int | None:
    if isinstance(operand, Register):
        return known.get(operand.index)
    return 0 if isinstance(operand, Symbol) and operand.name in names else None


def _registers(operands: tuple[Operand, ...]) -> Iterator[Register]:
    for operand in operands:
        if isinstance(operand, Register):
            yield operand
        elif isinstance(operand, Vector):
            yield from _registers(operand.items)
        elif isinstance(operand, Pair):
            yield from _registers((operand.first, operand.second))


def _bytes(instruction: Instruction) -> int:
    """Return the size of a plain access; 1 for instructions whose last word is no type."""
    words = instruction.words
    if words[0] not in ("ld", "st", "atom", "red", "mbarrier") or words[-1] not in TYPE_BITS:
        return 1
    count = next((int(word[1:]) for word in words if word in ("v2", "v4", "v8")), 1)
    return TYPE_BITS[words[-1]] // 8 * count
