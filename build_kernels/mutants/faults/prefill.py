"""Faults that only a prefill kernel can have: of M tiles, rounds and token tiles."""

from __future__ import annotations

import re

from build_kernels.mutants.mutant import Edit

from .edits import deleted
from .kernels import WRONG_IDS, of_kind
from .prefill_kernels import (
    FULL_TILES_TWO_OWNERS,
    TWO_OWNERS,
    TWO_PAIRS,
    TWO_ROUNDS,
    TWO_TILES_TWO_OWNERS,
    TWO_TOKEN_TILES,
    emajor,
    given,
    n64,
    n64_k8,
    written,
)


def _local(pattern: str, nth: int | None = None) -> Edit:
    """Take the place in a token tile of 64 for the token: the second of the pattern's groups."""

    def changed(match: re.Match) -> str:
        before, token, after = match.groups()
        return f"{{ .reg .b32 local; and.b32 local, {token}, 63; {before}local{after} }}"

    return Edit(pattern=pattern, replacement=changed, nth=nth)


# The bytes of the second M tile's W_gate in a block, and the columns of the first one in TMEM.
_SECOND_ROWS = r"(add\.s32 \t%r\d+, %r\d+, )-64(;)"
_SECOND_PLACE = r"(tensor\.2d[^\[]*\[%r\d+)\+8192(\])"
_BLOCK = r"shl\.b32 (\t(%r\d+), )%r\d+, 9(;\s+add\.s32 \t%r\d+, \2, %r\d+;)"
_SUMS = (
    r"shl\.b32( \t(%r\d+)), %r\d+, 14;"
    r"(\s+add\.s32 \t%r\d+, %r\d+, \2;\s+shl\.b32 \t%r\d+, %r\d+, 1;\s+setp\.ge)"
)
_OTHER_EXPERTS = Edit(
    pattern=r"shl\.b32 \t(%r\d+), (%r\d+), 6;(\s+mov\.u32 \t%r\d+, %laneid;)",
    replacement=r"xor.b32 \t\1, \2, 1; shl.b32 \t\1, \1, 6;\3",
)
# The last owner's box begins with rows of the one before, which stand for experts beyond the last.
_BOX_START = (
    r"sub\.s32( \t%r\d+, %r\d+), %r\d+;"
    r"(\s+add\.s32 \t(%r\d+), %r\d+, 1;\s+shr\.u32 \t%r\d+, \3, 31;)"
)
_ROTATED_ROW = (
    r"sub\.s32( \t(%r\d+), %r\d+), %r\d+;"
    r"(\s+add\.s32 \t(%r\d+), \2, %r\d+;\s+and\.b32 \t%r\d+, \4, 127;)"
)
# The first round of an M tile's warp, 0 or 1.
TURN = r"sub\.s32( \t(%r\d+), %r\d+, %r\d+;)(\s+setp\.gt\.s32 \t%p\d+, \2, 0;)"
_LAST = (
    r"(add\.s32 \t%r\d+, %r\d+, )-1(;(?:\s+(?:add|shl)[^;]*;)+\s+ld\.shared\.b32[^;]*;"
    r"\s+and\.b32 \t%r\d+, %r\d+, 7;)"
)
_OWNERS = r"(add\.s32 \t%r\d+, %r\d+, )-1(;\s+// begin inline asm\s+atom)"
COUNTS_M_TILES = written(_OWNERS, "1")

M_TILES = (
    *of_kind(
        *(n64, "wrong M tile"),
        (
            "both M tiles multiply the first one's W_gate",
            Edit(pattern=_BLOCK, replacement=r"mov.b32 \g<1>0\3"),
            WRONG_IDS,
        ),
        (
            "both M tiles send to the first one's sums",
            Edit(pattern=_SUMS, replacement=r"mov.b32\1, 0;\3"),
        ),
        ("M tiles publish as each other's experts", _OTHER_EXPERTS, WRONG_IDS),
    ),
    # A K-contiguous W_gate comes in one box for both.
    *of_kind(
        *(emajor, "wrong M tile"),
        (
            "the second M tile loads the first one's W_gate",
            written(_SECOND_ROWS, "-128"),
            WRONG_IDS,
        ),
        ("both M tiles load to the first one's place", written(_SECOND_PLACE, "")),
    ),
    *of_kind(
        *(n64, "rows of the owner before"),
        (
            "the last box begins with the owner's own rows",
            Edit(pattern=_BOX_START, replacement=r"add.s32\1, 0;\2"),
        ),
        (
            "rows of the owner before pass for the last owner's experts",
            Edit(pattern=_ROTATED_ROW, replacement=r"add.s32\1, 0;\3"),
        ),
        case=TWO_OWNERS,
    ),
    n64(
        *("W_gate's box has one M tile", "wrong tensor-map box"),
        maps={"w_map": {"box": (64, 64)}},
    ),
    *of_kind(
        *(n64, "election"),
        ("both M tiles merge a token", Edit(pattern=TURN, replacement=r"mov.b32 \t\2, 0;\3")),
        ("no M tile merges a token", written(_LAST, "-2")),
        ("tickets count one owner too few", written(_OWNERS, "-2"), TWO_OWNERS),
        ("tickets count M tiles, not owners", COUNTS_M_TILES, TWO_OWNERS),
    ),
    *of_kind(
        *(n64, "wrong tx-count"),
        (
            "owner expects the sums of one M tile",
            written(r"(shl\.b32 \t%r\d+, %r\d+, )14(;\s+mbarrier\.arrive\.expect_tx)", "13", 0),
            "race",
        ),
        (
            "first turn expects the W_gate of one M tile",
            written(r"(shl\.b32 \t%r\d+, %r\d+, )14(;\s+add\.s32 \t%r\d+, %r\d+, 16384;)", "13", 0),
        ),
    ),
)

# Of a token: its pair's sums, 8 KB on.
FIRST_PAIR = Edit(
    pattern=r"shl\.b32 (\t%r\d+, )%r\d+, 11(;\s+add\.s32)", replacement=r"mov.b32 \g<1>0\2"
)
# In a CTA of 8 a round is two pairs, of 1536 FP32 each.
_SECOND_SUMS = r"mul\.lo\.s32( \t%r\d+, %r\d+, 1536);"
_FLAGS = r"(ld\.shared\.b32 \t%r\d+, \[%r\d+\+)221200(\])"
_TICKETS = r"(setp\.gt\.u32 \t%p\d+, %r\d+, )7(;\s+setp\.ne\.b32)"
ROUNDS = (
    *of_kind(
        *(n64, "wrong sums"),
        ("owner adds the first pair's sums for each", FIRST_PAIR, TWO_PAIRS, WRONG_IDS),
        (
            "the second pair is sent to the first one's place",
            written(r"(add\.s32 \t%r\d+, %r\d+, )204815(;)", "196623", 0),
            TWO_PAIRS,
        ),
        (
            "owner adds the other token's sums",
            Edit(
                pattern=r"shl\.b32 (\t%r\d+, )%r\d+, 1;(\s+add\.s32 [^;]*;\s+shl\.b32 [^;]*, 11;)",
                replacement=r"mov.b32 \g<1>0;\2",
            ),
            WRONG_IDS,
        ),
    ),
    *of_kind(
        *(n64_k8, "wrong round"),
        (
            "the second round adds the first one's sums",
            Edit(pattern=_SECOND_SUMS, replacement=r"mad.lo.s32\1, -3072;"),
            WRONG_IDS,
        ),
        (
            "the second round publishes as the first one's token",
            Edit(
                pattern=r"(mad\.lo\.s32 \t%r\d+, (%r\d+), (%r\d+), 960;(?:(?!960;)[\s\S])*?"
                r"is_published[\s\S]*?mad\.lo\.s32 \t%r\d+, \2, )%r\d+(, 960;\s+mul\.wide)",
                replacement=r"\1\3\4",
            ),
        ),
        (
            "the second round has the first one's flags",
            written(_FLAGS, "221184"),
            given("padding", case=TWO_ROUNDS),
        ),
        (
            "the second round has the first one's forced ids",
            written(r"(ld\.shared\.v4\.b32 \t\{[^}]*\}, \[%r\d+\+)221376(\])", "221248"),
            given("forced", case=TWO_ROUNDS),
            WRONG_IDS,
        ),
        ("the second round's tokens get no ticket", written(_TICKETS, "3")),
        (
            "forced ids of the second round are not read",
            deleted(r"st\.shared\.b32 \t\[%r\d+\+221248\], [^;]*;", 1),
            given("forced", case=TWO_ROUNDS),
        ),
        case=TWO_ROUNDS,
    ),
)

# Where the first token of the tile is added.
_FLAGS_TOKEN = (
    r"add\.s32( \t(%r\d+)), (%r\d+), %r\d+;"
    r"(\s+shl\.b32 \t(%r\d+), %r\d+, 1;\s+add\.s32 \t%r\d+, %r\d+, \5;\s+shl)"
)
_EPILOGUE_TOKEN = (
    r"add\.s32( \t(%r\d+)), %r\d+, (%r\d+);"
    r"(\s+add\.s32 \t(%r\d+), \2, %r\d+;\s+add\.s32 \t%r\d+, \5, %r\d+;\s+setp)"
)
_FORCED_TOKEN = (
    r"add\.s32( \t(%r\d+)), (%r\d+), %r\d+;"
    r"(\s+add\.s32 \t(%r\d+), \2, %r\d+;\s+setp\.ge\.s32 \t%p\d+, \5,)"
)
FIRST_TILE = Edit(pattern=r"(tensor\.3d[^{]*\{)(%r\d+), %r\d+,", replacement=r"\1\2, \2,")
_NO_FIRST = r"mov.b32\1, \3;\4"
_IN_TILE = r"min\.s32( \t%r\d+), %r\d+, 64;"
_FIRST_LEFT_OUT = Edit(
    pattern=r"sub\.s32( \t(%r\d+), %r\d+), %r\d+;(\s+min\.s32 \t%r\d+, \2, 64;)",
    replacement=r"add.s32\1, 0;\3",
)
FEWER_TICKETS = written(r"(, )960(;)", "32")
TOKEN_TILES = (
    *of_kind(
        *(n64, "first token left out"),
        ("the first token's tile is multiplied for each", FIRST_TILE, WRONG_IDS),
        ("owned tokens are the first tile's", Edit(pattern=_EPILOGUE_TOKEN, replacement=_NO_FIRST)),
        (
            "padding is that of the first tile's rows",
            Edit(pattern=_FLAGS_TOKEN, replacement=_NO_FIRST),
            given("padding", case=TWO_TOKEN_TILES),
            WRONG_IDS,
        ),
        (
            "tickets are those of the first tile's tokens",
            Edit(pattern=_FLAGS_TOKEN, replacement=_NO_FIRST),
            TWO_TILES_TWO_OWNERS,
        ),
        (
            "forced ids are those of the first tile's rows",
            Edit(pattern=_FORCED_TOKEN, replacement=_NO_FIRST),
            given("forced", case=TWO_TOKEN_TILES),
            WRONG_IDS,
        ),
        ("the last tile has the tokens of all", _FIRST_LEFT_OUT),
        case=TWO_TOKEN_TILES,
    ),
    *of_kind(
        *(n64, "local token"),
        (
            "num_valid_tokens counts a tile's rows",
            _local(
                r"(setp\.lt\.s32 \t%p\d+, )(%r\d+)(, %r\d+;)(?=\s+selp\.b32 \t%r\d+, %r\d+, 1,)", 0
            ),
            given("count", case=TWO_TOKEN_TILES),
            WRONG_IDS,
        ),
        (
            "the replica is that of a tile's row",
            _local(r"(rem\.s32 \t%r\d+, )(%r\d+)(, %r\d+;)"),
            given("physical", case=TWO_TOKEN_TILES),
            WRONG_IDS,
        ),
        (
            "outputs are stored as a tile's rows",
            _local(
                r"(mul\.wide\.s32 \t%rd\d+, )(%r\d+)(, %r\d+;)"
                r"(?=\s+add\.s64 [^;]*;\s+shl\.b64 [^;]*, 2;)"
            ),
        ),
        (
            "padding rows are those of a tile",
            _local(
                r"(cvt\.s64\.s32 \t%rd\d+, )(%r\d+)(;)(?=\s+add\.s64 [^;]*;\s+ld\.global\.s8)", 1
            ),
            given("padding", case=TWO_TOKEN_TILES),
            WRONG_IDS,
        ),
        (
            "token ids are those of a tile's rows",
            _local(
                r"(mul\.wide\.s32 \t%rd\d+, )(%r\d+)(, 4;)(?=\s+add\.s64 [^;]*;\s+ld\.global\.s32)"
            ),
            given("table", case=TWO_TOKEN_TILES),
            WRONG_IDS,
        ),
        case=TWO_TOKEN_TILES,
    ),
    *of_kind(
        *(n64, "wrong number of tokens"),
        ("every tile is full", Edit(pattern=_IN_TILE, replacement=r"mov.b32\1, 64;")),
    ),
    *of_kind(
        *(n64, "workspace too small"),
        ("there are tickets for 64 tokens", FEWER_TICKETS, FULL_TILES_TWO_OWNERS),
    ),
)
