"""Compare the code of cubins: by bytes, or opcode by opcode with nvdisasm."""

from __future__ import annotations

import io
import tempfile
from collections.abc import Mapping
from pathlib import Path

from build_kernels.binaries.cubin import read_cubin
from build_kernels.binaries.nvdisasm import sass_opcodes

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


def opcodes(data: bytes) -> Mapping[str, int]:
    """Count every SASS opcode of a cubin, modifiers kept; CubinError and ToolError as nvdisasm."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.cubin"
        path.write_bytes(data)
        return sass_opcodes(path)
