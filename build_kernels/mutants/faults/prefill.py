"""Faults of the prefill kernels: of M tiles, rounds and token tiles, and those that decode has."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import replace
from typing import Any

from build_kernels.evidence.cases import Case
from build_kernels.mutants.mutant import Edit, Mutant

from .edits import ARRIVE, arrivals, deleted, no_wait, parameter_as
from .kernels import BLOCK_K, BOTH, WRONG_IDS, WRONG_WEIGHT, mutant, of_kind
from .options import UNKNOWN_OF_DECODE, of_engines

# One owner with two M tiles; two owners; two token tiles; two pairs per CTA; two rounds of n128.
ONE = Case(num_tokens=7, num_experts=100, top_k=6, k=64)
TWO_OWNERS = replace(ONE, num_experts=132)
TWO_TOKEN_TILES = replace(ONE, num_tokens=70)
TWO_TILES_TWO_OWNERS = replace(TWO_TOKEN_TILES, num_experts=132)
TWO_PAIRS = replace(ONE, num_tokens=40)
TWO_ROUNDS = replace(ONE, num_tokens=72)
# The ring of 7 blocks is in its second turn.
WRAPS = replace(ONE, k=9 * BLOCK_K)


def _of(kernel: str, prefix: str, case: Case) -> Callable[..., Mutant]:
    """Return a maker of mutants of a prefill kernel, with names that begin with the prefix."""

    def make(name: str, kind: str, *edits: Edit, **more: Any) -> Mutant:
        return mutant(
            f"router_prefill_{kernel}", prefix + name, kind, *edits, **{"case": case, **more}
        )

    return make


n64 = _of("kmajor_n64.sm_90a", "prefill: ", ONE)
n128 = _of("kmajor_n128.sm_90a", "prefill, 128 tokens: ", TWO_ROUNDS)
emajor = _of("emajor_n64.sm_90a", "prefill, emajor: ", ONE)
sm100 = _of("kmajor_n64.sm_100a", "prefill, sm_100: ", ONE)


def _given(*options: str, case: Case = ONE) -> Case:
    return replace(case, options=options)


def _as(pattern: str, value: str, nth: int | None = None) -> Edit:
    """Write another value between the two groups of the pattern."""
    return Edit(pattern=pattern, replacement=rf"\g<1>{value}\g<2>", nth=nth)


def _local(pattern: str, nth: int | None = None) -> Edit:
    """Take the place in a token tile of 64 for the token: the second of the pattern's groups."""

    def changed(match: re.Match) -> str:
        before, token, after = match.groups()
        return f"{{ .reg .b32 local; and.b32 local, {token}, 63; {before}local{after} }}"

    return Edit(pattern=pattern, replacement=changed, nth=nth)


# The bytes of the second M tile's W_gate in a block, and the columns of the first one in TMEM.
_SECOND_ROWS = r"(or\.b32 \t%r\d+, %r\d+, )64(;\s+setp\.lt\.s32 \t%p\d+, %r\d+, 1;)"
_SECOND_PLACE = r"(tensor\.2d[^\[]*\[%r\d+)\+8192(\])"
_BLOCK = r"shl\.b32 (\t%r\d+, )%r\d+, 9(;\s+add\.s32 \t%r\d+, %r\d+, 204992;)"
_SUMS = r"(wgmma\.wait_group\.sync\.aligned \t0;\s+)shl\.b32( \t%r\d+), %r\d+, 14;"
_OTHER_EXPERTS = Edit(
    pattern=r"shl\.b32 \t(%r\d+), (%r\d+), 6;(\s+add\.s32 \t%r\d+, \1, %r\d+;\s+mov\.u32)",
    replacement=r"xor.b32 \t\1, \2, 1; shl.b32 \t\1, \1, 6;\3",
)
_TURN = r"setp\.ne\.b32( \t(%p\d+), %r\d+, %r\d+;\s+)@\2 bra[^;]*;(\s+ld\.shared\.b32)"
_LAST = r"(and\.b32 \t%r\d+, %r\d+, 7;\s+add\.s32 \t%r\d+, %r\d+, )-1;"
_OWNERS = r"(add\.s32 \t%r\d+, %r\d+, )-1(;\s+// begin inline asm\s+atom)"

M_TILES = (
    *of_kind(
        *(n64, "wrong M tile"),
        ("the second M tile loads the first one's W_gate", _as(_SECOND_ROWS, "0"), WRONG_IDS),
        (
            "both M tiles multiply the first one's W_gate",
            Edit(pattern=_BLOCK, replacement=r"mov.b32 \g<1>0\2"),
            WRONG_IDS,
        ),
        ("both M tiles load to the first one's place", _as(_SECOND_PLACE, "")),
        (
            "both M tiles send to the first one's sums",
            Edit(pattern=_SUMS, replacement=r"\1mov.b32\2, 0;"),
        ),
        ("M tiles publish as each other's experts", _OTHER_EXPERTS, WRONG_IDS),
    ),
    *of_kind(
        *(n64, "election"),
        ("both M tiles merge a token", Edit(pattern=_TURN, replacement=r"setp.ne.b32\1\3")),
        ("no M tile merges a token", Edit(pattern=_LAST, replacement=r"\g<1>-2;")),
        ("tickets count one owner too few", _as(_OWNERS, "-2"), TWO_OWNERS),
        ("tickets count M tiles, not owners", _as(_OWNERS, "1"), TWO_OWNERS),
    ),
    *of_kind(
        *(n64, "wrong tx-count"),
        (
            "owner expects the sums of one M tile",
            _as(r"(shl\.b32 \t%r\d+, %r\d+, )14(;\s+mbarrier\.arrive\.expect_tx)", "13", 0),
            "race",
        ),
        (
            "first turn expects the W_gate of one M tile",
            _as(r"(shl\.b32 \t%r\d+, %r\d+, )14(;\s+or\.b32 \t%r\d+, %r\d+, 8192;)", "13", 0),
        ),
    ),
)

# Of a token: its pair's sums, 8 KB on, and in n128 those of the second round.
_FIRST_PAIR = Edit(
    pattern=r"shl\.b32 (\t%r\d+, )%r\d+, 11(;\s+add\.s32)", replacement=r"mov.b32 \g<1>0\2"
)
_FLAGS = r"(ld\.shared\.b32 \t%r\d+, \[%r\d+\+)196624(\])"
ROUNDS = (
    *of_kind(
        *(n64, "wrong sums"),
        ("owner adds the first pair's sums for each", _FIRST_PAIR, TWO_PAIRS, WRONG_IDS),
        (
            "the second pair is sent to the first one's place",
            _as(r"(add\.s32 \t%r\d+, %r\d+, )180239(;)", "172047", 0),
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
        *(n128, "wrong round"),
        (
            "the second round adds the first one's sums",
            _as(r"(shl\.b32 \t%r\d+, %r\d+, 12;[^;]*;\s+add\.s32 \t%r\d+, %r\d+, )16384(;)", "0"),
            WRONG_IDS,
        ),
        (
            "the second round publishes as the first one's token",
            Edit(
                pattern=r"(_param_2\];\s+mad\.lo\.s32 \t%r\d+, %r\d+, (%r\d+), 448;[\s\S]*?"
                r"mad\.lo\.s32 \t%r\d+, %r\d+, )%r\d+(, 448;(?:[^;]*;){2}\s+@)",
                replacement=r"\1\2\3",
            ),
        ),
        (
            "the second round has the first one's flags",
            _as(_FLAGS, "196608"),
            _given("padding", case=TWO_ROUNDS),
        ),
        (
            "the second round has the first one's forced ids",
            _as(r"(ld\.shared\.v4\.b32 \t\{[^}]*\}, \[%r\d+\+)196768(\])", "196640"),
            _given("forced", case=TWO_ROUNDS),
            WRONG_IDS,
        ),
        (
            "the second round's tokens draw no ticket",
            _as(r"(setp\.gt\.u32 \t%p\d+, %r\d+, )7(;\s+mov\.pred)", "3"),
        ),
        (
            "forced ids of the second round are not read",
            deleted(r"st\.shared\.b32 \t\[%r\d+\+196640\], [^;]*;", 1),
            _given("forced", case=TWO_ROUNDS),
        ),
    ),
)

# Where the first token of the tile is added.
_FLAGS_TOKEN = r"add\.s32( \t%r\d+), %r7, (%r\d+);(\s+add\.s32 \t%r\d+, %r\d+, %r\d+;\s+shl)"
_EPILOGUE_TOKEN = r"add\.s32( \t%r\d+), %r7, (%r\d+);(\s+add\.s32 [^;]*;\s+add\.s32 [^;]*;\s+setp)"
_FORCED_TOKEN = r"add\.s32( \t%r\d+), (%r\d+), %r7;(\s+add\.s32)"
_FIRST_TILE = Edit(pattern=r"(tensor\.3d[^{]*\{)(%r\d+), %r\d+,", replacement=r"\1\2, \2,")
_NO_FIRST = r"mov.b32\1, \2;\3"
_IN_TILE = r"min\.s32( \t%r\d+), %r\d+, 64;"
_FIRST_LEFT_OUT = Edit(
    pattern=r"sub\.s32( \t%r\d+, %r\d+), %r7;(\s+min\.s32)", replacement=r"add.s32\1, 0;\2"
)
_FEWER_TICKETS = _as(r"(, )448(;)", "32")
TOKEN_TILES = (
    *of_kind(
        *(n64, "first token left out"),
        ("the first token's tile is multiplied for each", _FIRST_TILE, WRONG_IDS),
        ("owned tokens are the first tile's", Edit(pattern=_EPILOGUE_TOKEN, replacement=_NO_FIRST)),
        (
            "padding is that of the first tile's rows",
            Edit(pattern=_FLAGS_TOKEN, replacement=_NO_FIRST),
            _given("padding", case=TWO_TOKEN_TILES),
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
            _given("forced", case=TWO_TOKEN_TILES),
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
                r"(setp\.lt\.s32 \t%p\d+, )(%r\d+)(, %r\d+;)(?=\s+selp\.b32 \t%r\d+, %r\d+, 1,)"
            ),
            _given("count", case=TWO_TOKEN_TILES),
            WRONG_IDS,
        ),
        (
            "the replica is that of a tile's row",
            _local(r"(rem\.s32 \t%r\d+, )(%r\d+)(, %r\d+;)"),
            _given("physical", case=TWO_TOKEN_TILES),
            WRONG_IDS,
        ),
        (
            "outputs are stored as a tile's rows",
            _local(r"(mul\.wide\.s32 \t%rd\d+, )(%r\d+)(, %r\d+;)(?=\s+cvt\.u64\.u32)", 1),
        ),
        (
            "image rows are those of a tile",
            _local(
                r"(cvt\.s64\.s32 \t%rd\d+, )(%r\d+)(;)(?=\s+add\.s64 [^;]*;\s+ld\.global\.s8)", 0
            ),
            _given("images", case=TWO_TOKEN_TILES),
        ),
        (
            "token ids are those of a tile's rows",
            _local(
                r"(mul\.wide\.s32 \t%rd\d+, )(%r\d+)(, 4;)(?=\s+add\.s64 [^;]*;\s+ld\.global\.s32)"
            ),
            _given("table", case=TWO_TOKEN_TILES),
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
        ("there are tickets for 64 tokens", _FEWER_TICKETS, TWO_TILES_TWO_OWNERS),
    ),
)

_WAIT_ONE = r"(wgmma\.wait_group\.sync\.aligned \t)1;"
_ZEROS = r"st\.relaxed\.gpu\.global\.v2\.b64 \[%rd\d+\], \{0, 0\};"
_TIES = Edit(
    pattern=r"setp\.gt\.u32( \t%p\d+, %r\d+, %r\d+;\s+max\.u32)", replacement=r"setp.ge.u32\1"
)
_GRID_WAIT = r"griddepcontrol\.wait;"
PIPELINES = (
    *of_kind(
        *(n64, "dropped wait"),
        ("producer does not wait for empty", no_wait(0)),
        ("warpgroups do not wait for full", no_wait(1)),
        ("epilogue does not wait for the row flags", no_wait(2), ONE),
        ("owner does not wait for the sums", no_wait(3), ONE),
        case=WRAPS,
        complaint="race",
    ),
    *of_kind(
        *(n64, "missing wgmma wait"),
        (
            "a stage is released while its wgmmas run",
            Edit(pattern=_WAIT_ONE, replacement=r"\g<1>2;"),
            "race",
        ),
        ("no last wgmma.wait_group", deleted(r"wgmma\.wait_group\.sync\.aligned \t0;")),
        case=WRAPS,
    ),
    *of_kind(
        *(n64, "missing wgmma fence"),
        ("no wgmma.fence", deleted(r"wgmma\.fence\.sync\.aligned;"), "missing-wgmma-fence"),
    ),
    *of_kind(
        *(n64, "stage off by one"),
        (
            "the stage in use is released",
            _as(r"(add\.s32 \t%r\d+, %r\d+, )204992(;\s+mov\.b32)", "205000"),
        ),
        case=WRAPS,
    ),
    *of_kind(
        *(n64, "dropped arrive"),
        ("no arrival on empty", deleted(ARRIVE, 1), "deadlock"),
        case=WRAPS,
    ),
    *of_kind(
        *(n64, "wrong arrive count"),
        ("empty needs the arrivals of one M tile", arrivals(4, 1)),
        ("row_flags_full needs 33 arrivals", arrivals(33, 16), "deadlock", ONE),
        case=WRAPS,
    ),
    *of_kind(
        *(n64, "missing cluster barrier"),
        ("epilogue does not wait for the cluster", deleted(r"barrier\.cluster\.wait;", 0)),
    ),
    *of_kind(
        *(n64, "missing proxy fence"),
        ("no fence after mbarrier.init", deleted(r"fence\.mbarrier_init\.release\.cluster;")),
    ),
    *of_kind(
        *(n64, "missing grid dependency"),
        ("hidden_states before the grid dependency", deleted(_GRID_WAIT, 0), "hidden_states"),
        ("tickets before the grid dependency", deleted(_GRID_WAIT, 1), "workspace"),
        case=TWO_OWNERS,
        complaint="belongs to the grid before",
    ),
    *of_kind(
        *(n64, "scratch not zeroed"),
        ("the merger leaves its entries behind", deleted(_ZEROS), "not left zero"),
    ),
    *of_kind(
        *(n64, "tie rule reversed"),
        ("equal keys go to the higher register", _TIES, replace(ONE, kind="ties"), WRONG_IDS),
    ),
    *of_kind(
        *(emajor, "dropped wait"),
        ("warpgroups do not wait for full", no_wait(1), "race"),
    ),
)

OPTIONS = (
    *of_kind(
        *(n64, "option ignored"),
        (
            "gate_temp ignored",
            parameter_as("prefill", "gate_temp", "0f3F800000"),
            _given("temperature"),
            WRONG_WEIGHT,
        ),
        (
            "norm_topk_prob ignored",
            parameter_as("prefill", "norm_topk_prob", "1"),
            _given("unnormed"),
            WRONG_WEIGHT,
        ),
    ),
    *of_engines(n64, "prefill", "", UNKNOWN_OF_DECODE, ONE),
)

_COLUMNS = r"(and\.b32 \t(%r\d+), %r\d+, 6291456;\s+)add\.s32( \t%r\d+), %r\d+, \2;"
_COMMIT = r"tcgen05\.commit[^;]*;"
SM100 = (
    *of_kind(
        *(sm100, "wrong M tile"),
        (
            "the second M tile's accumulator is the first one's",
            _as(r"(ld\.shared\.b32 \t%r\d+, \[%r\d+\+205080\];\s+add\.s32 [^;]*, )64(;)", "0"),
        ),
        (
            "the second M tile multiplies the first one's W_gate",
            _as(r"(add\.s32 \t%r\d+, %r\d+, )512(;)", "0", 0),
            WRONG_IDS,
        ),
        (
            "both M tiles read the first one's columns",
            Edit(pattern=_COLUMNS, replacement=r"\1mov.b32\3, \2;"),
            WRONG_IDS,
        ),
    ),
    *of_kind(
        *(sm100, "dropped wait"),
        ("producer does not wait for empty", no_wait(0), "race"),
        ("MMA does not wait for full", no_wait(1), "race", BOTH),
        ("epilogue does not wait for the accumulator", no_wait(2), "race", ONE),
        case=WRAPS,
    ),
    *of_kind(
        *(sm100, "dropped commit"),
        ("no commit to empty", deleted(_COMMIT, 0), "deadlock"),
        ("no commit to accumulator_full", deleted(_COMMIT, 1), "deadlock", ONE),
        case=WRAPS,
    ),
    *of_kind(
        *(sm100, "early dealloc"),
        ("dealloc before both M tiles have read", deleted(r"bar\.sync \t1, 256;"), BOTH),
        ("dealloc when one M tile has read", _as(r"(bar\.sync \t1, )256(;)", "128")),
    ),
    *of_kind(
        *(sm100, "missing tcgen05 fence"),
        ("no fence after the accumulator", deleted(r"tcgen05\.fence::after_thread_sync;")),
    ),
    *of_kind(
        *(sm100, "missing wait::ld"),
        ("no tcgen05.wait::ld", deleted(r"tcgen05\.wait::ld\.sync\.aligned;")),
    ),
    *of_kind(
        *(sm100, "wrong tx-count"),
        (
            "owner expects the sums of one M tile",
            _as(r"(shl\.b32 \t%r\d+, %r\d+, )14(;\s+mbarrier\.arrive\.expect_tx)", "13", 0),
            "race",
        ),
    ),
    *of_kind(
        *(sm100, "workspace too small"),
        ("there are tickets for 64 tokens", _FEWER_TICKETS, TWO_TILES_TWO_OWNERS),
    ),
    *of_kind(
        *(sm100, "wrong sums"),
        ("owner adds the first pair's sums for each", _FIRST_PAIR, TWO_PAIRS, WRONG_IDS),
    ),
    *of_kind(
        *(sm100, "first token left out"),
        ("the first token's tile is multiplied for each", _FIRST_TILE, TWO_TOKEN_TILES, WRONG_IDS),
    ),
    *of_kind(
        *(sm100, "election"),
        ("tickets count M tiles, not owners", _as(_OWNERS, "1"), TWO_OWNERS),
    ),
)

HARMLESS = (
    n64(
        *("the other M tile merges a token", "harmless"),
        Edit(
            pattern=r"setp\.ne\.b32( \t(%p\d+), %r\d+, %r\d+;\s+@\2 bra[^;]*;\s+ld\.shared\.b32)",
            replacement=r"setp.eq.b32\1",
        ),
        rejected_by=(),
        case=TWO_OWNERS,
        harmless="a token has one merging warp in the CTA with its last ticket, whichever M tile "
        "that warp is of: both have the token's flags, and candidates are in the workspace",
    ),
    n64(
        *("no griddepcontrol.wait in the epilogue", "harmless"),
        deleted(_GRID_WAIT, 2),
        rejected_by=(),
        case=replace(TWO_OWNERS, options=("images", "padding")),
        harmless="an epilogue warp touches memory of the grid before after its wait for "
        "row_flags_full, and that warp's lanes arrive there after their griddepcontrol.wait",
    ),
)
