"""Read PTX text without executing it: target, entry, block size and instruction counts.

The emulator has a parser of its own (`build_kernels.emulator.ptx`), which needs NumPy.
"""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import dataclass

_ENTRY = re.compile(r"\.entry\s+([\w$]+)\s*\((.*?)\)", re.S)
_PARAMETER = re.compile(
    r"\.param\s+(?:\.align\s+\d+\s+)?\.(b8|u32|s32|b32|f32|u64|b64|s64|f64)\b[^,\[]*(?:\[(\d+)\])?"
)
_TARGET = re.compile(r"^(\.target\s+)(\w+)", re.M)
_BLOCK = re.compile(r"\.(?:reqntid|maxntid)\s+(\d+)(?:\s*,\s*(\d+))?(?:\s*,\s*(\d+))?")
_INSTRUCTION = re.compile(
    r"(?:^|[;{}])\s*(?:[\w$]+:(?!:)\s*)?(?:@!?%?\w+\s+)?([a-z][a-z0-9_]*(?:[.:]+\w+)*)", re.M
)
_COMMENT = re.compile(r"//[^\n]*|/\*.*?\*/", re.S)


class PtxReadError(Exception):
    """PTX text without exactly one target and one entry, or with an unreadable parameter."""


@dataclass(frozen=True, kw_only=True)
class PtxParameter:
    """A kernel parameter as declared: `type` is u32, f32, ..., or b8 for an array of bytes."""

    type: str
    size: int


def read_target(ptx: str) -> str:
    """Return the architecture of the .target line."""
    found = [name for _, name in _TARGET.findall(ptx)]
    if len(found) != 1:
        raise PtxReadError(f"expected one .target in the PTX (found {found})")
    return str(found[0])


def without_target(ptx: str) -> str:
    """Return the text without the architecture of its .target line."""
    return _TARGET.sub(r"\1", ptx, count=1)


def read_block(ptx: str) -> tuple[int, int, int] | None:
    """Return the block size of .reqntid or .maxntid, or None if the text has neither."""
    found = _BLOCK.search(_COMMENT.sub("", ptx))
    if found is None:
        return None
    x, y, z = (int(number or 1) for number in found.groups())
    return x, y, z


def read_entry(ptx: str) -> tuple[str, tuple[PtxParameter, ...]]:
    """Return the symbol of the only kernel and its parameters in order."""
    found = _ENTRY.findall(_COMMENT.sub("", ptx))
    if len(found) != 1:
        raise PtxReadError(f"expected one .entry in the PTX (found {len(found)})")
    symbol, text = found[0]
    parameters = []
    for declaration in text.split(","):
        match = _PARAMETER.search(declaration)
        if match is None:
            raise PtxReadError(f"cannot read the parameter {declaration.strip()!r}")
        kind, count = match.groups()
        parameters.append(PtxParameter(type=kind, size=int(kind[1:]) // 8 * int(count or 1)))
    return str(symbol), tuple(parameters)


def parameter_name(symbol: str, index: int | str) -> str:
    """Return the name of a kernel's parameter by both compilers; `index` may be a pattern."""
    return f"{symbol}_param_{index}"


def count_opcodes(ptx: str) -> Counter[str]:
    """Count each instruction with its modifiers, such as `tcgen05.commit.cta_group::1`."""
    _, _, body = _COMMENT.sub("", ptx).partition(".entry")
    return Counter(_INSTRUCTION.findall(body))


def count_starting(opcodes: Counter[str], prefix: str) -> int:
    """Count an opcode with any further modifiers: "st.async" includes "st.async.shared"."""
    return sum(
        count for name, count in opcodes.items() if name == prefix or name.startswith(prefix + ".")
    )
