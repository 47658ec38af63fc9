"""Faults of selection: ties, weights, the merge of expert tiles, physical ids."""

from __future__ import annotations

import re
from dataclasses import replace

from build_kernels.mutants.mutant import Edit

from .edits import deleted
from .kernels import (
    CROWDED,
    THREE_TILES,
    TIES,
    TOPK,
    TWO_TILES,
    WRONG_IDS,
    WRONG_WEIGHT,
    given,
    hash_layer,
    of_kind,
    sm100,
    topk,
)

_TIES = Edit(
    pattern=r"setp\.gt\.u32( \t%p\d+, %r\d+, %r\d+;\s+setp\.eq\.b32)",
    replacement=r"setp.ge.u32\1",
    nth=0,
)

_BIASED_SCORE = (
    r"add\.f32 \t(?P<biased>%r\d+), %r\d+, (?P<score>%r\d+);(?:[^;]*;){2,24}?"
    r"\s*selp\.f32 \t(?P<kept>%r\d+), (?P=score), 0f00000000"
)


def _keep_the_biased(match: re.Match) -> str:
    """Keep the biased sum in place of the score, from which the weight is made."""
    kept = f"selp.f32 \t{match['kept']}, "
    return match[0].replace(kept + match["score"], kept + match["biased"])


_NO_TICKET = Edit(
    pattern=r"atom\.relaxed\.gpu\.global\.inc\.u32 (%r\d+), (\[%rd\d+\]), %r\d+;",
    replacement=r"ld.relaxed.gpu.global.u32 \1, \2;",
)
_ZEROS = r"st\.relaxed\.gpu\.global\.v2\.b64 \[%rd\d+\], \{0, 0\};"
# Two lanes of one store write the two candidates: another warp may see one without the other.
# The first level of the tree of minima, which is followed by three to six more and a test.
_ONE_WORD = Edit(
    pattern=r"min\.u32( \t%r\d+, %r\d+), %r\d+;(?=(?:\s+min\.u32[^;]*;){3,6}\s+setp\.eq)",
    replacement=r"mov.b32\1;",
)
# The test of the tree's root for a candidate that is not there yet.
_NOBODY = Edit(
    pattern=r"(min\.u32[^;]*;\s+setp\.eq\.b32[^;]*, 0;\s+)vote\.sync\.ballot\.b32( \t%r\d+), "
    r"%p\d+, -1;",
    replacement=r"\1mov.b32\2, 0;",
)
# What `take_top_k` leaves to `take_one_by_one`.
TWO_LANES = Edit(
    pattern=r"(vote\.sync\.ballot\.b32 \t(%r\d+), %p\d+, -1;\s+)or\.b32( \t%r\d+), \2, %r\d+;",
    replacement=r"\1mov.b32\3, \2;",
)
_ONE_LANE = Edit(
    pattern=r"setp\.ge\.u32( \t%p\d+, )%r\d+(, %r\d+;\s+(?:setp\.eq|vote))",
    replacement=r"setp.gt.u32\g<1>0\2",
)
_ALL_FOUR = Edit(
    pattern=r"(setp\.ge\.u32 \t(%p\d+)[^;]*;\s+setp\.eq[^;]*;\s+)or\.pred( \t%p\d+), \2, %p\d+;",
    replacement=r"\1mov.pred\3, \2;",
)
# A later exchange of a lane's candidates, so that the reduction still finds the warp's best key.
_EXCHANGE = Edit(
    pattern=r"setp\.gt\.u32( \t(%p\d+), %r\d+, %r\d+;\s+selp\.f32 \t%r\d+, %r\d+, %r\d+, \2;)",
    replacement=r"setp.lt.u32\1",
    nth=3,
)

_PHYSICAL_ID = r"(ld\.shared\.b32 \t%r\d+, \[%r\d+\+)81920\];"
_ROW = r"shl\.b32( \t%r\d+, )%r\d+, 9(;(?:\s+(?:add|shl)[^;]*;){3}\s+ld\.shared)"
_FIRST_WARP = Edit(pattern=_ROW, replacement=r"mov.b32\g<1>0\2", nth=0)
_NEXT = Edit(pattern=_PHYSICAL_ID, replacement=r"\g<1>81924];", nth=0)
# The row of which the replica is token % count; what follows tells maps of int64 from int32 ones.
_REPLICA = Edit(
    pattern=r"selp\.b32( \t%r\d+), %r\d+, 0, (%p\d+;\s+setp\.ne\.b32[^;]*;\s+add\.s32[^;]*, -1;)",
    replacement=r"selp.b32\1, 0, 0, \2",
)
# Lanes that do not hold the largest key offer -1: the least of all, as a signed number.
# Of router_topk: whether another candidate of an equal key is better.
_EQUAL = r"setp\.lt\.u32( \t(%p\d+), %r\d+, %r\d+;\s+and\.pred  \t%p\d+, %p\d+, \2;)"
_HIGHEST = Edit(pattern=_EQUAL, replacement=r"setp.gt.u32\1")
_ONE_RANK = Edit(pattern=_EQUAL, replacement=r"setp.ne.u32\1")
_KEEP_BIAS = Edit(pattern=_BIASED_SCORE, replacement=_keep_the_biased)

DECODE = (
    *of_kind(
        *(sm100, "tie rule reversed"),
        ("equal keys go to the higher register", _TIES, TIES, WRONG_IDS),
        ("equal keys of two lanes are not noticed", TWO_LANES, CROWDED, WRONG_IDS),
        (
            "equal keys of one lane are not noticed",
            *(_ONE_LANE, replace(THREE_TILES, top_k=6), WRONG_IDS),
        ),
    ),
    *of_kind(
        *(sm100, "wrong candidate"),
        ("a lane's fifth candidate is not looked for", _ALL_FOUR, THREE_TILES, WRONG_IDS),
        ("the candidates of two keys are not exchanged", _EXCHANGE, TWO_TILES, WRONG_IDS),
    ),
    sm100("the weight keeps the bias", "bias in the weight", _KEEP_BIAS, complaint=WRONG_WEIGHT),
    sm100("no ticket is drawn", "election", _NO_TICKET, case=TWO_TILES),
    *of_kind(
        *(sm100, "scratch not zeroed"),
        ("the merger leaves its entries behind", deleted(_ZEROS), TWO_TILES),
    ),
    sm100(
        *("the merger waits for nobody", "dropped wait", _NOBODY),
        case=TWO_TILES,
        # Each one finds it.
        schedules=(("earliest", 0),),
        complaint=WRONG_IDS,
    ),
    sm100(
        *("the merger waits for one word of each pair", "half of a pair", _ONE_WORD),
        case=replace(TWO_TILES, num_tokens=8),
        # About one random schedule in ten stops a store between two lanes at the right moment.
        schedules=tuple(("random", seed) for seed in range(40)),
    ),
)

PHYSICAL_IDS = of_kind(
    *(sm100, "wrong physical id"),
    ("every warp takes the first warp's physical ids", _FIRST_WARP),
    ("the next expert's physical id", _NEXT),
    case=given("physical"),
    complaint=WRONG_IDS,
)

HASH = of_kind(
    *(hash_layer, "wrong physical id"),
    ("hash: every token's replica is the first token's", _REPLICA, given("physical"), WRONG_IDS),
)

TOPK_TIE = of_kind(
    *(topk, "tie rule reversed"),
    ("top-k: equal keys go to the higher expert", _HIGHEST),
    ("top-k: of equal keys each one is better", _ONE_RANK),
    case=replace(TOPK, kind="ties"),
    complaint=WRONG_IDS,
)
TOPK_STORE = topk(
    *("top-k: one column too many is stored", "store beside the outputs"),
    Edit(
        pattern=r"(add\.s32 \t(%r\d+), %r\d+, %r\d+;\s+)setp\.ge\.s32( \t%p\d+, %r\d+, \2;)",
        replacement=r"\1setp.gt.s32\3",
    ),
    complaint="beside the outputs",
)
