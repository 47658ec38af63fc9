"""Count the SASS instructions of a cubin: the one reader of nvdisasm's output."""

from __future__ import annotations

import os
import re
import subprocess
from collections import Counter
from collections.abc import Mapping
from pathlib import Path

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

# It takes a tenth of a second.
TIMEOUT_SECONDS = 60
_OPCODE = re.compile(
    r"/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P[T0-9]+\s+)?([A-Z][A-Z0-9_]*(?:\.[A-Za-z0-9_]+)*)"
)


def sass_opcodes(path: Path) -> Counter[str]:
    """Count each SASS opcode in a cubin on disk, modifiers kept.

    Raises ToolError if nvdisasm cannot be run to its end, CubinError if it cannot read the file.
    """
    tool = _nvdisasm()
    try:
        process = subprocess.run(
            [tool, "-c", path],
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
    counts = Counter(_OPCODE.findall(process.stdout))
    if process.returncode or not counts:
        raise CubinError(f"nvdisasm cannot read {path.name}: {process.stderr.strip()}")
    return counts


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
