"""The parts of decode and prefill kernels that the rows depend on, each with the removing edit.

A row that stays as expected without its guard would show nothing: the tests put each of these
kernels to its row, which must then fail.
"""

from __future__ import annotations

from dataclasses import dataclass

from build_kernels.mutants.mutant import Edit

# `trap_if` as the kernels write it: first in the warp of the row flags, then in each merge's wait.
TRAP = r"@\w+ trap;"
PADDING_KEY = 0xFFFF_FFFF
_KEY = f"shr.u64 key, \\2, 32; setp.ne.u64 publishes, key, {PADDING_KEY};"


@dataclass(frozen=True, kw_only=True)
class Guard:
    """A part of a kernel, the rows that show it, and the edits of the PTX that remove it."""

    name: str
    faults: tuple[str, ...]
    edits: tuple[Edit, ...]


GUARDS = (
    Guard(
        name="an owner publishes a padded row too",
        faults=(
            *("padding-set", "padding-clear", "count-up", "count-down", "count-negative"),
            *("count-most", "token-id-leaves", "token-id-enters", "all-torn"),
            *("forced-twice", "forced-none"),
            *("filled-padding-torn", "filled-token-id-torn", "filled-count-torn"),
            *("whole-padding-torn", "whole-token-id-torn", "whole-count-torn"),
            *("second-padding-torn", "second-token-id-torn", "second-count-torn"),
            "bound-count-torn",
        ),
        edits=(
            Edit(
                pattern=r"(st\.relaxed\.gpu\.global\.b64 \[[^\]]+\], (%rd\d+);)",
                replacement="{ .reg .pred publishes; .reg .b64 key; " + _KEY + r" @publishes \1 }",
            ),
        ),
    ),
    Guard(
        name="the merger clears what it merged",
        faults=(
            *("padding-set", "image-set", "image-clear", "hash-image-set", "hash-image-clear"),
            *("hash-image-id", "token-id-moves", "table-torn", "map-torn", "map-counts-torn"),
            *("bias-torn", "image-bias-torn", "hidden-torn", "pair-torn"),
            *("forced-set", "forced-clear", "forced-moves", "image-id-enters", "image-id-leaves"),
            *("filled-image-torn", "filled-map-torn", "filled-map-counts-torn"),
            *("whole-image-torn", "whole-map-torn", "whole-map-counts-torn"),
            *("second-image-torn", "second-map-torn", "second-map-counts-torn"),
            "second-forced-moves",
        ),
        edits=(
            Edit(
                pattern=r"st\.relaxed\.gpu\.global\.v2\.b64 \[%rd\d+\], \{0, 0\};", replacement=""
            ),
        ),
    ),
    Guard(
        name="an owner finds its words zero and its ticket in range",
        faults=("row-left", "ticket-left"),
        edits=(Edit(pattern=TRAP, replacement="", nth=0),),
    ),
    Guard(
        name="the merger's wait has a bound",
        faults=("silent-peer",),
        edits=(
            Edit(
                pattern=rf"(?<=globaltimer;)((?:[^;]*;){{1,24}}?[^;]*;\s*){TRAP}", replacement=r"\1"
            ),
        ),
    ),
)
