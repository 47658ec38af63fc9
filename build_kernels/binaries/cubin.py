"""Read symbols, launch ABI and resources from the ELF file that a cubin is.

Layout of `.nv.info` sections, as cuobjdump -elf prints them: records of a format byte, an attribute
byte and 16 bits. These are the value, or for format 4 the number of payload bytes that follow.
"""

from __future__ import annotations

import io
import re
import struct
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from dsv4_router_runtime.artifacts.files import MAX_CODE_BYTES
from dsv4_router_runtime.artifacts.folder import ELF_HEADER_BYTES, elf_compute_capability
from dsv4_router_runtime.errors import ArtifactError

if TYPE_CHECKING:
    from elftools.elf.elffile import ELFFile

# Far above any cubin of one kernel: now 40.
_MAX_SECTIONS = 1024
_SECTION_BYTES = 64
_SYMBOL_BYTES = 24
_SHT_SYMTAB, _SHT_NOBITS = 2, 8
_SHF_COMPRESSED = 0x800

_FORMAT_SIZED = 4
_MAX_THREADS = 0x05
_REQNTID = 0x10
_FRAME_SIZE = 0x11
_MIN_STACK_SIZE = 0x12
_KPARAM_INFO = 0x17
_REGCOUNT = 0x2F
_CTA_PER_CLUSTER = 0x3D
# From sm_90 on, the first KiB of static shared memory belongs to the driver.
_RESERVED_SHARED_BYTES = 1024
_FIRST_RESERVING_CAPABILITY = 90

_PTXAS = re.compile(rb"Cuda compilation tools, release [0-9.]+, V([0-9.]+)")


class CubinError(Exception):
    """A cubin cannot be read, or does not hold one kernel."""


@dataclass(frozen=True, kw_only=True)
class CubinParameter:
    """One kernel parameter; `offset` counts bytes from the first parameter."""

    offset: int
    size: int


@dataclass(frozen=True, kw_only=True)
class Cubin:
    """Launch ABI, resources and machine code of a cubin's one kernel.

    None for a block or cluster not stated.
    """

    compute_capability: int
    symbol: str
    parameters: tuple[CubinParameter, ...]
    registers: int
    stack_bytes: int
    static_shared_bytes: int
    required_block: tuple[int, int, int] | None
    max_block: tuple[int, int, int] | None
    cluster: tuple[int, int, int] | None
    code: bytes = field(repr=False)


def read_cubin(data: bytes) -> Cubin:
    """Read a cubin that holds exactly one kernel; CubinError for anything else."""
    # Imported here, so that commands that read no cubin run without it.
    from elftools.common.exceptions import ELFError
    from elftools.elf.elffile import ELFFile

    _check_bounds(data)
    try:
        elf = ELFFile(io.BytesIO(data))
        kernels = _kernel_symbols(elf)
        if len(kernels) != 1:
            found = ", ".join(sorted(kernels)) or "none"
            raise CubinError(f"expected one kernel in a cubin (found {found})")
        ((symbol, index),) = kernels.items()
        return _cubin_of(elf, data, symbol, index)
    except (ELFError, ArtifactError, struct.error) as error:
        raise CubinError(f"not a readable cubin ({error})") from error


def _check_bounds(data: bytes) -> None:
    """Refuse sizes that lead out of the file: pyelftools trusts the headers."""
    if len(data) > MAX_CODE_BYTES:
        raise CubinError(f"not a readable cubin ({len(data)} bytes; at most {MAX_CODE_BYTES})")
    if len(data) < ELF_HEADER_BYTES:
        raise CubinError(f"not a readable cubin ({len(data)} bytes are no ELF header)")
    (table,) = struct.unpack_from("<Q", data, 40)
    size, count = struct.unpack_from("<HH", data, 58)
    if size != _SECTION_BYTES or not 0 < count <= _MAX_SECTIONS or table + count * size > len(data):
        raise CubinError(
            f"not a readable cubin (a table of {count} sections of {size} bytes at {table}, in "
            f"{len(data)} bytes)"
        )
    for index in range(count):
        at = table + index * size
        kind, flags = struct.unpack_from("<IQ", data, at + 4)
        start, length = struct.unpack_from("<QQ", data, at + 24)
        (entry_size,) = struct.unpack_from("<Q", data, at + 56)
        if kind != _SHT_NOBITS and start + length > len(data):
            problem = f"ends at {start + length}, after the {len(data)} bytes of the file"
        elif flags & _SHF_COMPRESSED:
            problem = "is compressed"
        elif kind == _SHT_SYMTAB and (entry_size != _SYMBOL_BYTES or length % _SYMBOL_BYTES):
            problem = f"holds symbols of {entry_size} bytes in {length}"
        else:
            continue
        raise CubinError(f"not a readable cubin (section {index} {problem})")


def stated_ptxas(data: bytes) -> str | None:
    """Return the assembler's version; None for cubins of ABI 7 (sm_90 by toolkit 12)."""
    found = _PTXAS.search(data)
    return found.group(1).decode() if found else None


def _kernel_symbols(elf: ELFFile) -> dict[str, int]:
    """Map each kernel (a global function with an `.nv.info` section) to its symbol-table index."""
    from elftools.elf.sections import SymbolTableSection

    table = elf.get_section_by_name(".symtab")
    if not isinstance(table, SymbolTableSection):
        raise CubinError("no symbol table")
    return {
        symbol.name: index
        for index, symbol in enumerate(table.iter_symbols())
        if symbol["st_info"]["type"] == "STT_FUNC"
        and symbol["st_info"]["bind"] == "STB_GLOBAL"
        and elf.get_section_by_name(f".nv.info.{symbol.name}") is not None
    }


def _cubin_of(elf: ELFFile, data: bytes, symbol: str, index: int) -> Cubin:
    capability = elf_compute_capability(data, file="cubin")
    code = elf.get_section_by_name(f".text.{symbol}")
    if code is None:
        raise CubinError(f"no code of {symbol}")
    of_kernel = dict(_records(elf, f".nv.info.{symbol}"))
    return Cubin(
        compute_capability=capability,
        symbol=symbol,
        parameters=_parameters(elf, symbol),
        registers=_number_of(elf, _REGCOUNT, index),
        stack_bytes=max(_number_of(elf, code, index) for code in (_FRAME_SIZE, _MIN_STACK_SIZE)),
        static_shared_bytes=_static_shared_bytes(elf, symbol, capability),
        required_block=_dim3(of_kernel.get(_REQNTID)),
        max_block=_dim3(of_kernel.get(_MAX_THREADS)),
        cluster=_dim3(of_kernel.get(_CTA_PER_CLUSTER)),
        code=code.data(),
    )


def _records(elf: ELFFile, section_name: str) -> Iterator[tuple[int, bytes]]:
    """Yield (attribute, payload) of each record; without a payload, its 16 bits are it."""
    section = elf.get_section_by_name(section_name)
    data = section.data() if section is not None else b""
    at = 0
    while at < len(data):
        kind, attribute, value = struct.unpack_from("<BBH", data, at)
        at += 4
        if kind == _FORMAT_SIZED:
            yield attribute, data[at : at + value]
            at += value
        else:
            yield attribute, struct.pack("<H", value)


def _number_of(elf: ELFFile, attribute: int, index: int) -> int:
    """Return a per-function number of `.nv.info`; its payload is (symbol index, value)."""
    for found, payload in _records(elf, ".nv.info"):
        if found == attribute and len(payload) == 8:
            function, value = struct.unpack("<II", payload)
            if function == index:
                return int(value)
    raise CubinError(f"no attribute 0x{attribute:02x} for the kernel in .nv.info")


def _parameters(elf: ELFFile, symbol: str) -> tuple[CubinParameter, ...]:
    """List the parameters in order.

    Payload: index u32, ordinal u16, offset u16, flags u32 with the size from bit 18 on.
    """
    found: dict[int, tuple[int, int]] = {}
    for attribute, payload in _records(elf, f".nv.info.{symbol}"):
        if attribute == _KPARAM_INFO:
            _, ordinal, offset, flags = struct.unpack("<IHHI", payload)
            found[ordinal] = (offset, flags >> 18)
    if sorted(found) != list(range(len(found))):
        raise CubinError(f"parameter ordinals with a gap: {sorted(found)}")
    # ptxas 12 starts sm_90a's tensor maps at 48, so that they are aligned in the constant bank.
    first = min((offset for offset, _ in found.values()), default=0)
    ordered = (found[ordinal] for ordinal in range(len(found)))
    return tuple(CubinParameter(offset=offset - first, size=size) for offset, size in ordered)


def _static_shared_bytes(elf: ELFFile, symbol: str, capability: int) -> int:
    section = elf.get_section_by_name(f".nv.shared.{symbol}")
    if section is None:
        return 0
    reserved = _RESERVED_SHARED_BYTES if capability >= _FIRST_RESERVING_CAPABILITY else 0
    return max(0, int(section["sh_size"]) - reserved)


def _dim3(payload: bytes | None) -> tuple[int, int, int] | None:
    if payload is None:
        return None
    x, y, z = struct.unpack("<III", payload)
    return (x, y, z)
