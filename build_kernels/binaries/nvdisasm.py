"""Count the SASS instructions of a cubin: the one reader of nvdisasm's output."""

from __future__ import annotations

import os
import re
import subprocess
from bisect import bisect
from collections import Counter
from collections.abc import Mapping, Sequence
from itertools import accumulate
from pathlib import Path
from tempfile import NamedTemporaryFile

from .cubin import CubinError
from .wheels import ToolError, how_to_repair, wheel_file

# Counted into the manifest: tensor cores, TMA and its barriers, TMEM, clusters, global and shared
# traffic, warp exchanges, the arithmetic of the scores, programmatic dependent launch.
WATCHED_OPCODES = (
    *("HGMMA", "UTCHMMA", "UTCBAR", "UTCATOMSWS", "LDTM"),
    *("UTMALDG", "UTMASTG", "SYNCS", "STAS", "UCGABAR_ARV", "UCGABAR_WAIT"),
    *("LDG", "STG", "ATOMG", "LDS", "STS", "BAR", "MEMBAR"),
    *("REDUX", "CREDUX", "SHFL", "VOTE", "FFMA", "MUFU", "ACQBULK", "PREEXIT"),
)
# Local memory: a spill, a stack frame or an array that did not become registers.
LOCAL_OPCODES = ("LDL", "STL")

# It takes half a second for one kernel, most of it to start.
TIMEOUT_SECONDS = 60
INSTRUCTION_BYTES = 16
_OPCODE = re.compile(
    r"/\*([0-9a-f]{4,})\*/\s+(?:@!?U?P[T0-9]+\s+)?([A-Z][A-Z0-9_]*(?:\.[A-Za-z0-9_]+)*)"
)


def sass_opcodes(path: Path) -> Counter[str]:
    """Count each SASS opcode in a cubin on disk, modifiers kept.

    Raises ToolError if nvdisasm cannot be run to its end, CubinError if it cannot read the file.
    """
    return Counter(opcode for _, opcode in _disassemble(path, "-c"))


def sass_opcodes_of(codes: Sequence[bytes], arch: str) -> list[Counter[str]]:
    """Count each SASS opcode of the machine code of several kernels of one architecture.

    One process reads all of them: 16 kernels take 1.3 s, one by one 9. Errors as `sass_opcodes`.
    """
    with NamedTemporaryFile(prefix="code-", suffix=f".{arch}") as file:
        file.write(b"".join(codes))
        file.flush()
        found = _disassemble(Path(file.name), "--binary", f"SM{arch.removeprefix('sm_')}")
    ends = list(accumulate(map(len, codes)))
    counts: list[Counter[str]] = [Counter() for _ in codes]
    for address, opcode in found:
        counts[bisect(ends, int(address, 16))][opcode] += 1
    for code, count in zip(codes, counts, strict=True):
        if count.total() * INSTRUCTION_BYTES != len(code):
            raise CubinError(
                f"nvdisasm reads {count.total()} instructions in {len(code)} bytes of {arch}; each "
                f"has {INSTRUCTION_BYTES}"
            )
    return counts


def _disassemble(path: Path, *options: str) -> list[tuple[str, str]]:
    """Return the address, in hexadecimal, and the opcode of each instruction."""
    tool = _nvdisasm()
    try:
        process = subprocess.run(
            # Without its analysis of branches, which takes 0.1 s.
            [tool, "--no-dataflow", *options, path],
            capture_output=True,
            text=True,
            errors="replace",
            timeout=TIMEOUT_SECONDS,
            check=False,
        )
    except subprocess.TimeoutExpired as error:
        raise ToolError(f"nvdisasm took more than {TIMEOUT_SECONDS} s") from error
    except OSError as error:
        raise _cannot_be_run(tool, str(error.strerror)) from error
    found = _OPCODE.findall(process.stdout)
    if process.returncode or not found:
        raise CubinError(f"nvdisasm cannot read {path.name}: {process.stderr.strip()}")
    return found


def watched(sass: Mapping[str, int]) -> dict[str, int]:
    """Return the counts that the manifest records, modifiers left off.

    They are those of the watched opcodes that occur, and those of local memory in any case.
    """
    counts: Counter[str] = Counter()
    for opcode, count in sass.items():
        counts[opcode.partition(".")[0]] += count
    return {
        opcode: counts[opcode]
        for opcode in (*WATCHED_OPCODES, *LOCAL_OPCODES)
        if counts[opcode] or opcode in LOCAL_OPCODES
    }


def _nvdisasm() -> Path:
    tool = wheel_file("nvidia-cuda-nvdisasm", "nvdisasm")
    if not os.access(tool, os.X_OK):
        raise _cannot_be_run(tool, "not executable")
    return tool


def _cannot_be_run(tool: Path, why: str) -> ToolError:
    return ToolError(f"{tool.name} cannot be run ({why}: {tool}); {how_to_repair(damaged=True)}")
