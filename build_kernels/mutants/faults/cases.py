"""Faults that the drawn cases show: those by hand, quick and full, accepted them before."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

from build_kernels.evidence.cases import Case
from build_kernels.mutants.mutant import Edit

from .edits import deleted
from .kernels import TOPK, WRONG_IDS, given, mutant, of_kind, sm100, topk
from .selection import TWO_LANES

_OUT_OF_BOUNDS = "out-of-bounds"

# Decode merges 5 or 6 tiles by one code, and 7 or 8 by the last.
_EIGHT_TILES = Case(num_tokens=8, num_experts=512, top_k=4, k=64, kind="nans")
# Draw 16 of decode.
_SIX_TILES = Case(
    num_tokens=8,
    num_experts=384,
    top_k=8,
    k=64,
    kind="extreme",
    options=("image_ids", "images", "int64", "mapped64", "physical", "shared"),
)
_OF_SIX, _OF_EIGHT = 2, 3
_HIGH_WORD = r"st\.global\.b32 \t(\[%rd\d+\+4\]), (%r\d+);"
_NOT_OF_PADDING = r"{ .reg .pred q; setp.ge.s32 q, \2, 0; @q st.global.b32 \1, \2; }"
# The second of the two experts of a lane.
_UPPER_NAN = Edit(
    pattern=r"(setp\.num\.f32 \t(%p\d+)[^;]*;\s+selp\.b32 \t%r\d+, (%r\d+), )3, \2;",
    replacement=r"\1\3, \2;",
    nth=1,
)
_MOST = Edit(
    pattern=r"min\.s32( \t%r\d+, %r\d+), %r\d+;"
    r"(\s+max\.s32 \t%r\d+, %r\d+, 1;\s+min\.s32 \t%r\d+, %r\d+, 32;)",
    replacement=r"mov.b32\1;\2",
)
_LOOKUP = Edit(
    pattern=r"setp\.ge\.s64( \t%p\d+, %rd\d+, %rd\d+;\s+or\.pred)", replacement=r"setp.gt.s64\1"
)
_BEYOND = Edit(
    pattern=r"setp\.lt\.s32( \t%p\d+, %r\d+, (%r\d+);\s+)"
    r"setp\.lt\.s32( \t%p\d+, %r\d+, \2;\s+selp\.b32 \t%r\d+, %r\d+, 1,)",
    replacement=r"setp.le.s32\1setp.le.s32\3",
)
_LOW = Case(num_tokens=3, num_experts=100, top_k=8, k=64, kind="low")
_FEW = given("physical", "few")

_n64 = partial(mutant, "router_decode_kmajor_n64.sm_100a")
_ALL_TOKEN_32S = Case(num_tokens=64, num_experts=384, top_k=6, k=64, options=("physical",))
_TOKEN_32 = Edit(
    pattern=r"add\.s32( \t%r\d+, %r\d+), 32;(\s+rem\.s32)", replacement=r"add.s32\1, 0;\2"
)

DECODE = (
    *of_kind(
        *(sm100, "tie rule reversed"),
        ("equal keys in 6 tiles are not noticed", replace(TWO_LANES, nth=_OF_SIX), _SIX_TILES),
        ("equal keys in 8 tiles are not noticed", replace(TWO_LANES, nth=_OF_EIGHT), _EIGHT_TILES),
        complaint=WRONG_IDS,
    ),
    *of_kind(
        *(sm100, "wrong candidate"),
        ("NaN ranks first in the upper half", _UPPER_NAN, _EIGHT_TILES),
        ("the expert beyond the last is a candidate", _BEYOND, _LOW),
        complaint=WRONG_IDS,
    ),
    *of_kind(
        *(sm100, "half of an id"),
        (
            "high words left out after a merge of 8 tiles",
            deleted(_HIGH_WORD, _OF_EIGHT),
            replace(_EIGHT_TILES, options=("int64",)),
        ),
        (
            "the high word of a padded row left out",
            Edit(pattern=_HIGH_WORD, replacement=_NOT_OF_PADDING),
            given("int64", "padding"),
        ),
        complaint=WRONG_IDS,
    ),
    *of_kind(
        *(sm100, "wrong physical id"),
        ("a count above the replicas is taken", _MOST, _FEW),
        complaint="",
    ),
    sm100(
        *("the token id after the last is looked up", "unchecked token id", _LOOKUP),
        case=given("table", "unknown"),
        complaint=_OUT_OF_BOUNDS,
    ),
    _n64(
        *("n64: token 32 takes the replicas of token 0", "wrong physical id", _TOKEN_32),
        case=_ALL_TOKEN_32S,
        complaint=WRONG_IDS,
    ),
)

# The high word of an int64 store is left out if the id is negative.
_TOPK_HIGH = Edit(
    pattern=r"(cvt\.s64\.s32 \t(%rd\d+), )(%r\d+);"
    r"(\s+shl\.b64[^;]*;\s+add\.s64 \t(%rd\d+)[^;]*;\s+)st\.global\.u64 \t\[\5\], \2;",
    replacement=r"\1\3;\4{ .reg .pred q; setp.ge.s32 q, \3, 0; @q st.global.u64 [\5], \2; "
    r"@!q st.global.u32 [\5], \3; }",
)
_TOPK_MOST = Edit(
    pattern=r"min\.s32( \t%r\d+, %r\d+), %r\d+;(\s+rem)", replacement=r"min.s32\1, 2147483647;\2"
)
_TOPK_LOOKUP = Edit(
    pattern=r"setp\.ge\.u64( \t%p\d+, %rd\d+, %rd\d+;\s+and\.pred)",
    replacement=r"setp.gt.u64\1",
    nth=0,
)
_TOPK_TABLE = Edit(
    pattern=r"(add\.s32 \t(%r\d+), %r\d+, -1;\s+)min\.u32( \t%r\d+, %r\d+), \2;",
    replacement=r"\1mov.b32\3;",
)
_TOPK_NAN = Edit(
    pattern=r"selp\.b32( \t%r\d+), 1, (%r\d+), (%p\d+);", replacement=r"selp.b32\1, \2, \2, \3;"
)
# How far below the top_k-th largest estimate a candidate's may be: by 2^-9.
_ALLOWANCE = r"add\.rn\.f32( \t%f\d+, %f\d+, )0fBB000000;"
_TOPK_ABOVE = Edit(pattern=_ALLOWANCE, replacement=r"add.rn.f32\g<1>0f3B000000;")
_TOPK_EXACT = Edit(pattern=_ALLOWANCE, replacement=r"add.rn.f32\g<1>0f00000000;")
_TOPK_RANGE = Edit(
    pattern=r"(setp\.le\.f32 \t(%p\d+), %f\d+, )0f42C00000(;\s+selp\.b32 \t%r\d+, %r\d+, 0, \2;)",
    replacement=r"\g<1>0f7F800000\3",
)
_TOPK_BATCH = Edit(pattern=r"add\.s32( \t(%r\d+), \2, )24;", replacement=r"add.s32\g<1>512;")


def _topk(*options: str, **changes: object) -> Case:
    return replace(TOPK, options=options, **changes)  # type: ignore[arg-type]


TOPK_FAULTS = (
    *of_kind(
        *(topk, "wrong candidate"),
        ("top-k: NaN ranks first", _TOPK_NAN, _topk(num_experts=384, kind="nans")),
        ("top-k: a candidate's estimate is above the least", _TOPK_ABOVE, TOPK),
        ("top-k: estimates are taken for keys", _TOPK_EXACT, _topk(num_experts=384, kind="dense")),
        ("top-k: an estimate that overflows counts", _TOPK_RANGE, _topk(kind="wide")),
        ("top-k: the second batch is left out", _TOPK_BATCH, _topk(kind="ties")),
        complaint=WRONG_IDS,
    ),
    *of_kind(
        *(topk, "half of an id"),
        ("top-k: the high word of a padded row", _TOPK_HIGH, _topk("int64", "padding")),
        complaint=WRONG_IDS,
    ),
    topk(
        *("top-k: a count above the replicas is taken", "wrong physical id", _TOPK_MOST),
        case=_topk("physical", "few"),
    ),
    *of_kind(
        *(topk, "unchecked token id"),
        ("top-k: the token id after the last", _TOPK_LOOKUP, _topk("table", "unknown")),
        complaint=_OUT_OF_BOUNDS,
    ),
    *of_kind(
        *(topk, "unchecked expert"),
        ("top-k: an expert of the table is not clamped", _TOPK_TABLE, _topk("table", "stray")),
    ),
)
