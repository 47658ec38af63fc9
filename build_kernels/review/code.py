"""Decide whether two cubins hold the same code, without a disassembler."""

from __future__ import annotations

import io

from build_kernels.binaries.cubin import read_cubin

# Instructions, the addresses that loading fills into them, and constants; bank 0 holds parameters.
# What is left is the launch ABI and resources, which the manifest states, and names.
_CODE = (".text.", ".rela.text.", ".rel.text.", ".nv.constant")
_PARAMETERS = ".nv.constant0."


def same_code(a: bytes, b: bytes) -> bool:
    """Return whether two cubins hold the same instructions; CubinError if one cannot be read."""
    return _code(a) == _code(b)


def _code(data: bytes) -> list[tuple[str, bytes]]:
    from elftools.elf.elffile import ELFFile

    symbol = read_cubin(data).symbol  # refuses whatever pyelftools would trust
    return sorted(
        (section.name.replace(symbol, ""), section.data())
        for section in ELFFile(io.BytesIO(data)).iter_sections()
        if section.name.startswith(_CODE) and not section.name.startswith(_PARAMETERS)
    )
