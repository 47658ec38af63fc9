"""Faults of a prefill kernel that decode can have too: of pipelines, options and TMEM."""

from __future__ import annotations

from dataclasses import replace

from build_kernels.mutants.mutant import Edit

from .edits import ARRIVE, arrivals, deleted, no_wait, parameter_as
from .kernels import BOTH, WRONG_IDS, WRONG_WEIGHT, of_kind
from .options import UNKNOWN_OF_DECODE, of_engines
from .prefill import COUNTS_M_TILES, FEWER_TICKETS, FIRST_PAIR, FIRST_TILE, TURN
from .prefill_kernels import (
    FULL_TILES_TWO_OWNERS,
    ONE,
    TWO_OWNERS,
    TWO_PAIRS,
    TWO_TOKEN_TILES,
    WRAPS,
    emajor,
    given,
    n64,
    n64_k8,
    sm100,
    written,
)


def _late(pattern: str, groups: int) -> Edit:
    """Let so many groups of wgmmas still run after a wait."""
    return Edit(pattern=pattern, replacement=rf"\g<1>{groups};")


_WAIT_ALL, _WAIT_ONE = (rf"(wgmma\.wait_group\.sync\.aligned \t){n};" for n in (0, 1))
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
        ("epilogue does not wait for the row flags", no_wait(5), ONE),
        ("owner does not wait for the sums", no_wait(6), ONE),
        case=WRAPS,
        complaint="race",
    ),
    *of_kind(
        *(n64, "missing wgmma wait"),
        ("no wgmma.wait_group", deleted(_WAIT_ALL), "race"),
        ("ring freed while its last wgmmas run", _late(_WAIT_ALL, 1)),
        case=WRAPS,
    ),
    *of_kind(
        *(n64_k8, "missing wgmma wait"),
        ("a stage is released while its wgmmas run", _late(_WAIT_ONE, 2), "race"),
        ("no last wgmma.wait_group", deleted(_WAIT_ALL)),
        case=WRAPS,
    ),
    *of_kind(
        *(n64, "missing wgmma fence"),
        ("no wgmma.fence", deleted(r"wgmma\.fence\.sync\.aligned;"), "missing-wgmma-fence"),
    ),
    *of_kind(
        *(n64_k8, "stage off by one"),
        (
            "the next stage is released",
            written(r"(mbarrier\.arrive\.shared\.b64 %rd\d+, \[%r\d+\+)221560(\])", "221568"),
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
        ("row_flags_full needs 33 arrivals", arrivals(33, 10), "deadlock", ONE),
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
            given("temperature"),
            WRONG_WEIGHT,
        ),
        (
            "norm_topk_prob ignored",
            parameter_as("prefill", "norm_topk_prob", "1"),
            given("unnormed"),
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
            written(r"(ld\.shared\.b32 \t%r\d+, \[%r\d+\+\d+\];\s+add\.s32 [^;]*, )64(;)", "0"),
        ),
        (
            "the second M tile multiplies the first one's W_gate",
            written(r"(add\.s32 \t%r\d+, %r\d+, )512(;)", "0", 0),
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
        ("dealloc before both M tiles have read", deleted(r"bar\.sync \t1, 256;")),
        ("dealloc when one M tile has read", written(r"(bar\.sync \t1, )256(;)", "128")),
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
            written(r"(shl\.b32 \t%r\d+, %r\d+, )14(;\s+mbarrier\.arrive\.expect_tx)", "13", 0),
            "race",
        ),
    ),
    *of_kind(
        *(sm100, "workspace too small"),
        ("there are tickets for 64 tokens", FEWER_TICKETS, FULL_TILES_TWO_OWNERS),
    ),
    *of_kind(
        *(sm100, "wrong sums"),
        ("owner adds the first pair's sums for each", FIRST_PAIR, TWO_PAIRS, WRONG_IDS),
    ),
    *of_kind(
        *(sm100, "first token left out"),
        ("the first token's tile is multiplied for each", FIRST_TILE, TWO_TOKEN_TILES, WRONG_IDS),
    ),
    *of_kind(
        *(sm100, "election"),
        ("tickets count M tiles, not owners", COUNTS_M_TILES, TWO_OWNERS),
    ),
)

HARMLESS = (
    n64(
        *("the other M tile merges a token", "harmless"),
        Edit(
            pattern=TURN,
            replacement=r"sub.s32\1 xor.b32 \2, \2, 1;\3",
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
