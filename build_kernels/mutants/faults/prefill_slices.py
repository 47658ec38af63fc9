"""Faults of prefill kernels that clusters of 16 cannot have, and of a call's second launch.

A CTA of a cluster of 8 or 4 has several slices of K: their sums, terms and late tickets.
"""

from __future__ import annotations

import re

from build_kernels.mutants.mutant import Edit

from .edits import ARRIVE, arrivals, deleted, no_wait, parameter_as
from .kernels import WRONG_IDS, of_kind
from .prefill_kernels import (
    LONG_SLICES,
    SECOND_LAUNCH,
    SLICES_OF_TWO_OWNERS,
    n64,
    n64_k4,
    n64_k8,
    n128_k4_sm100,
    written,
)

# The numbers of waits, arrivals and mbarrier.inits in the texts.
_TICKETS_WAIT_OF_8, _TICKETS_WAIT_OF_4 = 6, 8
_LAST_OF_SLICE = 3
_REFILL_WAIT, _REFILL_ARRIVE, _REFILL_INIT = 4, 2, 12
# The registers of a tile of 64 tokens.
_NUM_SUMS = 32


def _without_addends(match: re.Match) -> str:
    return re.sub(r"add\.f32( \t%r\d+, %r\d+), %r\d+;", r"mov.b32\1;", match[0])


def _with_sums_before(match: re.Match) -> str:
    before, sums, zeros, _ = match.groups()
    starts = re.findall(r"mov\.b32 \t(%r\d+),", zeros)
    pairs = zip(starts, sums.split(", "), strict=True)
    return before + "".join(f"mov.b32 \t{start}, {total};\n" for start, total in pairs)


_NOT_ADDED = Edit(
    pattern=rf"(?:add\.f32 \t%r\d+, %r\d+, %r\d+;\s+){{{_NUM_SUMS}}}",
    replacement=_without_addends,
    nth=0,
)
# From the last wgmma of a slice to the zeros of the next one's accumulators.
_NOT_ZEROED = Edit(
    pattern=r"(wgmma\.mma_async[^{]*\{([^}]*)\}(?:(?!wgmma\.mma_async)[\s\S])*?)"
    rf"(mov\.b32 \t(%r\d+), 0f00000000;(?:\s+mov\.b32 \t%r\d+, \4;){{{_NUM_SUMS - 1}}})",
    replacement=_with_sums_before,
    nth=0,
)
_OLD_TMEM = Edit(
    pattern=r"setp\.gt\.s32 \t(%p\d+), %r\d+, %r\d+;((?:\s+mov[^;]*;){4}\s+tcgen05\.mma)",
    replacement=r"mov.pred \t\1, -1;\2",
    nth=1,
)
_SECOND_TERM = written(r"(add\.s32 \t%r\d+, %r\d+, )512(;\s+@%p\d+ bra)", "0")
_THIRD_TERM = Edit(
    pattern=r"mad\.lo\.s32( \t%r\d+, %r\d+, 3), %r\d+;", replacement=r"mul.lo.s32\1;"
)
_EARLY_TOO = deleted(
    r"@%p\d+ bra [^;]*;(?=\s+setp\.lt\.u32 [^;]*;\s+@%p\d+ bra [^;]*;\s+add\.s32 [^;]*;"
    r"\s+// begin inline asm\s+atom)",
    0,
)
_OWNERS = r"(add\.s32 \t%r\d+, %r\d+, )-1(;\s+// begin inline asm\s+atom)"
_LAST = r"(add\.s32 \t%r\d+, %r\d+, )-1(;\s+setp\.ne\.b32 \t%p\d+, %r\d+, 0;\s+setp\.eq)"
_MERGED_PLACE = Edit(
    pattern=r"sub\.s32( \t%r\d+, %r\d+), %r\d+;(\s+@%p\d+ bra [^;]*;\s+mad\.lo\.s32 [^;]*, 960;)",
    replacement=r"sub.s32\1, 0;\2",
)
_RELEASED_EARLY = Edit(
    pattern=r"(wgmma\.wait_group\.sync\.aligned \t)1;", replacement=r"\g<1>2;", nth=0
)

SLICES = (
    *of_kind(
        *(n64_k8, "wrong sums"),
        ("the second slice's sum is not added", _NOT_ADDED, WRONG_IDS),
    ),
    *of_kind(
        *(n64_k4, "wrong sums"),
        ("the second slice's sum is not added", _NOT_ADDED, WRONG_IDS),
        ("the second slice goes on from the first one's sums", _NOT_ZEROED, WRONG_IDS),
    ),
    *of_kind(
        *(n64_k8, "wrong term"),
        ("the second term is sent to the first one's place", _SECOND_TERM),
        ("the third term is sent to the first one's place", _THIRD_TERM),
    ),
    *of_kind(
        *(n64_k4, "missing wgmma wait"),
        ("a stage is released while its wgmmas run", _RELEASED_EARLY, "race"),
        case=LONG_SLICES,
    ),
    *of_kind(
        *(n64_k4, "dropped arrive"),
        ("a slice's last stage is not released", deleted(ARRIVE, _LAST_OF_SLICE), "deadlock"),
        case=LONG_SLICES,
    ),
    *of_kind(
        *(n64_k8, "dropped wait"),
        ("epilogue does not wait for the tickets", no_wait(_TICKETS_WAIT_OF_8), "race"),
    ),
    *of_kind(
        *(n64_k4, "dropped wait"),
        ("epilogue does not wait for the tickets", no_wait(_TICKETS_WAIT_OF_4), "race"),
    ),
    *of_kind(
        *(n64_k8, "election"),
        ("late tickets are drawn early too", _EARLY_TOO),
        ("late tickets count one owner too many", written(_OWNERS, "0", 1)),
        ("no CTA has the last ticket", written(_LAST, "0")),
        case=SLICES_OF_TWO_OWNERS,
    ),
    *of_kind(
        *(n128_k4_sm100, "dropped wait"),
        ("MMA does not wait for a free accumulator", no_wait(_REFILL_WAIT), "race"),
    ),
    *of_kind(
        *(n128_k4_sm100, "dropped arrive"),
        ("no arrival on accumulator_empty", deleted(ARRIVE, _REFILL_ARRIVE), "deadlock"),
    ),
    *of_kind(
        *(n128_k4_sm100, "wrong arrive count"),
        ("accumulator_empty needs the arrivals of one M tile", arrivals(4, _REFILL_INIT)),
    ),
    *of_kind(
        *(n128_k4_sm100, "missing tcgen05 fence"),
        (
            "no fence before the arrival on accumulator_empty",
            deleted(r"tcgen05\.fence::before_thread_sync;", 0),
            "tcgen05.fence::before_thread_sync",
        ),
        (
            "no fence after the wait for accumulator_empty",
            deleted(r"tcgen05\.fence::after_thread_sync;", 0),
            "tcgen05.fence::before_thread_sync",
        ),
    ),
    *of_kind(
        *(n128_k4_sm100, "wrong accumulate flag"),
        ("the third slice accumulates onto the first one's sums", _OLD_TMEM, WRONG_IDS),
    ),
)

SECOND_LAUNCHES = (
    *of_kind(
        *(n64, "first token of the launch left out"),
        ("a launch routes the first one's tokens", parameter_as("prefill", "first_token", "0")),
        ("the merge takes a token's place in the call", _MERGED_PLACE),
        case=SECOND_LAUNCH,
    ),
)
