"""The faults: what each changes in the project's own PTX, and which rungs must reject it."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from typing import Any

from build_kernels.evidence.cases import Case

from .mutant import Edit, Mutant

BOTH = ("emulated", "protocol")
EMULATED = ("emulated",)
PROTOCOL = ("protocol",)
# SentryWard has to know the facts, and is undecided about a decode kernel that never gets to them.
NOT_TO_THE_FACTS = EMULATED

# A ring has 8 blocks of K, in 1, 2 or 8 stages (router_hash, n8, n64), so that 9 blocks a CTA use a
# stage again, and end in a chunk that is not full where a chunk is more than a block.
BLOCKS_OF_A_WRAP = 9
# With so many, both stages of n8 are.
BLOCKS_OF_BOTH_STAGES = 13
BLOCK_K = 64 * 16

_SM100 = "router_decode_kmajor_n8.sm_100a"
_SM100_EMAJOR = "router_decode_emajor_n64.sm_100a"
_SM90 = "router_decode_kmajor_n8.sm_90a"
_HASH = "router_hash.sm_100a"
_TOPK = "router_topk.sm_100a"

# Bits of a shared-memory descriptor and of an instruction descriptor, as sm_100 has them.
_SWIZZLE_SHIFT = 61
_STRIDE_SHIFT = 32
_TRANSPOSE_A = 1 << 15

_ONE_BLOCK = Case(num_tokens=7, num_experts=60, top_k=6, k=BLOCK_K)
_WRAPS = replace(_ONE_BLOCK, k=BLOCK_K * BLOCKS_OF_A_WRAP)
_WRAPS_BOTH = replace(_ONE_BLOCK, k=BLOCK_K * BLOCKS_OF_BOTH_STAGES)
_TWO_TILES = replace(_ONE_BLOCK, num_experts=100)
_TIES = replace(_ONE_BLOCK, kind="ties")
_TOPK_CASE = Case(num_tokens=7, num_experts=132, top_k=6)

# Which wait, arrival or mbarrier.init it is of a decode kernel's text, with two stages. Names are
# waited for four times: where it selects from one tile, and after each of the merges.
_FACTS_WAIT = 3
_NAMES_WAIT = 5
_NAMES_ARRIVE = 1
_FACTS_FULL = 6
_NAMES_FULL = 7

_WRONG_IDS = "ids are wrong"
_WRONG_WEIGHT = "a weight is off"

# One mbarrier wait as the DSL writes it; its test made always true.
_WAIT = r"mbarrier\.try_wait\.parity\.shared\.b64 P1, (\[[^\]]+\]), (%r\d+|\d+), 10000000;"
_NO_WAIT = "setp.eq.b32 P1, 0, 0;"
# The same wait whose mbarrier is used once, and any arrival of a thread's own.
_WAIT_ONCE = r"(mbarrier\.try_wait[^;]*), 0, 10000000;"
_ARRIVE = r"mbarrier\.arrive\.shared\.b64[^;]*;"
_INIT = r"(mbarrier\.init\.shared\.b64 \t\[[^\]]+\], )%r\d+;"


def _given(*options: str) -> Case:
    return replace(_ONE_BLOCK, options=options)


def _mutant(
    artifact: str,
    name: str,
    kind: str,
    rejected_by: tuple[str, ...],
    *edits: Edit,
    case: Case = _ONE_BLOCK,
    **more: Any,
) -> Mutant:
    return Mutant(
        name=name,
        kind=kind,
        artifact=artifact,
        rejected_by=rejected_by,
        edits=edits,
        case=case,
        **more,
    )


_sm100 = partial(_mutant, _SM100)
_emajor = partial(_mutant, _SM100_EMAJOR)
_sm90 = partial(_mutant, _SM90)
_hash = partial(_mutant, _HASH)
_topk = partial(_mutant, _TOPK, case=_TOPK_CASE)


def _no_wait(nth: int) -> Edit:
    return Edit(pattern=_WAIT, replacement=_NO_WAIT, nth=nth)


def _deleted(pattern: str, nth: int | None = None) -> Edit:
    return Edit(pattern=pattern, replacement="", nth=nth)


def _arrivals(count: int, nth: int) -> Edit:
    """The nth mbarrier.init says another count."""
    return Edit(pattern=_INIT, replacement=rf"\g<1>{count};", nth=nth)


def _option_off(parameter: int, value: str) -> Edit:
    """A 32-bit parameter that is read as a constant."""
    return Edit(
        pattern=rf"ld\.param\.b32( \t%r\d+), \[\w+_param_{parameter}\];",
        replacement=rf"mov.b32\1, {value};",
    )


def _in_descriptor(change: Callable[[int], int], nth: int) -> Edit:
    """Change the constant part of the nth shared-memory descriptor: 0 hidden_states, 1 W_gate."""

    def changed(match: re.Match) -> str:
        return f"{match[1]}{change(int(match[2]))};"

    pattern = r"(or\.b64\s+%rd\d+, %rd\d+, )(4611\d{15});"
    return Edit(pattern=pattern, replacement=changed, nth=nth)


def _swizzle_64b(descriptor: int) -> int:
    return descriptor & ~(7 << _SWIZZLE_SHIFT) | 4 << _SWIZZLE_SHIFT


def _half_stride(descriptor: int) -> int:
    stride = descriptor >> _STRIDE_SHIFT & 0x3FFF
    return descriptor & ~(0x3FFF << _STRIDE_SHIFT) | stride // 2 << _STRIDE_SHIFT


def _transposed(match: re.Match) -> str:
    return f"{match[1]}{int(match[2]) ^ _TRANSPOSE_A};"


def _score_with_bias(match: re.Match) -> str:
    """Keep the biased sum where the score was kept for the weight."""
    return match[0].replace(f"selp.f32 \t{match['kept']}, {match['score']}", _kept_biased(match))


def _kept_biased(match: re.Match) -> str:
    return f"selp.f32 \t{match['kept']}, {match['biased']}"


_BIASED_SCORE = (
    r"add\.f32 \t(?P<biased>%r\d+), %r\d+, (?P<score>%r\d+);(?:[^;]*;){2,24}?"
    r"\s*selp\.f32 \t(?P<kept>%r\d+), (?P=score), 0f00000000"
)


def _barriers() -> Iterator[Mutant]:
    """Waits, arrivals, phases and byte counts of the decode kernel's mbarriers."""
    for nth, name, rejected_by in (
        (0, "producer does not wait for empty", BOTH),
        (1, "MMA does not wait for full", BOTH),
        (2, "epilogue does not wait for the accumulator", BOTH),
        (_FACTS_WAIT, "epilogue does not wait for the facts", NOT_TO_THE_FACTS),
        (4, "owner does not wait for the sums", BOTH),
    ):
        wait = _no_wait(nth)
        yield _sm100(name, "dropped wait", rejected_by, wait, case=_WRAPS, complaint="race")
    for nth, name in enumerate(("no commit to empty", "no commit to accumulator_full")):
        commit = _deleted(r"tcgen05\.commit[^;]*;", nth)
        yield _sm100(name, "dropped commit", NOT_TO_THE_FACTS, commit, case=_WRAPS)

    flipped = Edit(
        pattern=r"not\.b32( \t%r\d+, %r\d+;\s+and\.b32 \t%r\d+, %r\d+, 1;)",
        replacement=r"mov.b32\1",
        nth=0,
    )
    constant = Edit(
        pattern=_WAIT.replace(r"(%r\d+|\d+)", r"(%r\d+)"),
        replacement=r"mbarrier.try_wait.parity.shared.b64 P1, \1, 0, 10000000;",
        nth=1,
    )
    accumulator = Edit(pattern=_WAIT_ONCE, replacement=r"\1, 1, 10000000;", nth=0)
    for name, rejected_by, parity in (
        ("producer waits for the other parity", BOTH, flipped),
        ("MMA waits for parity 0 in every turn", NOT_TO_THE_FACTS, constant),
        ("epilogue waits for parity 1", BOTH, accumulator),
    ):
        yield _sm100(name, "wrong parity", rejected_by, parity, case=_WRAPS)

    # What hidden_states adds to the blocks of W_gate, which are multiples of 8192.
    expected = r"(or\.b32 \t%r\d+, %r\d+, )4096;(\s+mbarrier\.arrive\.expect_tx)"
    of_sums = r"(shl\.b32 \t%r\d+, %r\d+, )13;(\s+mbarrier\.arrive\.expect_tx)"
    for name, rejected_by, pattern, replacement, nth in (
        ("first turn expects 4096 bytes less", BOTH, expected, r"\g<1>0;\2", 0),
        ("later turns expect 16 bytes more", NOT_TO_THE_FACTS, expected, r"\g<1>4112;\2", 1),
        ("owner expects half of the sums", BOTH, of_sums, r"\g<1>12;\2", 0),
    ):
        edit = Edit(pattern=pattern, replacement=replacement, nth=nth)
        yield _sm100(name, "wrong tx-count", rejected_by, edit, case=_WRAPS)

    for nth, name, count, rejected_by in (
        (0, "full needs two arrivals", 2, NOT_TO_THE_FACTS),
        (1, "empty needs two arrivals", 2, NOT_TO_THE_FACTS),
        (_FACTS_FULL, "facts_full needs 33 arrivals", 33, NOT_TO_THE_FACTS),
        # Lanes of a warp arrive at once in the emulator.
        (_FACTS_FULL, "facts_full needs 31 arrivals", 31, PROTOCOL),
    ):
        edit = _arrivals(count, nth)
        yield _sm100(name, "wrong arrive count", rejected_by, edit, case=_WRAPS)

    x_stage = Edit(
        pattern=r"(shl\.b32 \t%r\d+, )%r\d+(, 12;\s+add\.s32 \t%r\d+, %r\d+, %r\d+;\s+"
        r"shl\.b32 \t%r\d+, %r\d+, 2;)",
        replacement=r"\g<1>0\g<2>",
    )
    mma_stage = Edit(
        pattern=r"and\.b32 (\t%r\d+, %r\d+, 1;\s+shl\.b32 \t%r\d+, %r\d+, 3;)",
        replacement=r"xor.b32 \1",
        nth=0,
    )
    for name, stage in (
        ("hidden_states always into stage 0", x_stage),
        ("MMA reads the other stage", mma_stage),
    ):
        yield _sm100(name, "stage off by one", BOTH, stage, case=_WRAPS)
    name = "emajor, 64 tokens: producer does not wait for empty"
    yield _emajor(name, "dropped wait", BOTH, _no_wait(0), case=_WRAPS)


def _left_out() -> Iterator[Mutant]:
    """Fences, waits, barriers and releases of the decode kernel that are not there."""
    for name, kind, rejected_by, pattern in (
        (
            *("no fence after mbarrier.init", "missing proxy fence", EMULATED),
            r"fence\.mbarrier_init\.release\.cluster;",
        ),
        (
            *("no tcgen05.fence::after_thread_sync", "missing tcgen05 fence", EMULATED),
            r"tcgen05\.fence::after_thread_sync;",
        ),
        (
            *("no tcgen05.wait::ld", "missing wait::ld", EMULATED),
            r"tcgen05\.wait::ld\.sync\.aligned;",
        ),
        (
            # Named by the lint rung, which leaves a diagnostic standing on its account.
            *("dealloc before all warps have read", "early dealloc", BOTH),
            r"bar\.sync \t1, 128;",
        ),
        (*("no dealloc", "missing dealloc", EMULATED), r"tcgen05\.dealloc[^;]*;"),
        (
            *("no cluster barrier", "missing cluster barrier", BOTH),
            r"barrier\.cluster\.(arrive\.relaxed|wait);",
        ),
        (
            # SentryWard takes the relaxed cluster barrier for one that orders memory.
            *("no CTA barrier after setup", "missing CTA barrier", EMULATED),
            r"bar\.sync \t0;",
        ),
    ):
        yield _sm100(name, kind, rejected_by, _deleted(pattern))
    yield _sm100(
        # SentryWard takes the others' wait for everyone's.
        *("epilogue does not wait for the cluster", "missing cluster barrier", EMULATED),
        _deleted(r"barrier\.cluster\.wait;", 0),
        complaint="barrier-uninitialised",
    )
    wait = _deleted(r"griddepcontrol\.wait;", 0)
    name = "hidden_states loaded before the grid dependency"
    yield _sm100(
        *(name, "missing grid dependency", EMULATED, wait),
        complaint="hidden_states belongs to the grid before",
    )
    # The producer's wait stands above hidden_states, but its facts are now gathered above the wait.
    # (A CTA without a block of K would jump back: the case has none.)
    early = Edit(
        pattern=r"(?s)(barrier\.cluster\.wait;\s+// begin inline asm\s+griddepcontrol\.wait;.*?\n)"
        r"(\$L\w+:\s+ld\.param[^\n]*\n\s+mov\.u32 \t%r\d+, %laneid;.*?mbarrier\.arrive[^\n]*\n)",
        replacement=r"\2\1",
    )
    for name, tensor, case in (
        ("ticket drawn", "workspace", _TWO_TILES),
        ("image_mask read", "image_mask", _given("images")),
        ("padding_mask read", "padding_mask", _given("padding")),
        ("num_valid_tokens read", "num_valid_tokens", _given("count")),
    ):
        yield _sm100(
            *(f"{name} before the grid dependency", "missing grid dependency", EMULATED, early),
            case=case,
            complaint=f"{tensor} belongs to the grid before",
        )


def _layouts() -> Iterator[Mutant]:
    """Descriptors, tensor maps and tensor memory: the wrong bytes are multiplied."""
    swizzle, stride = "wrong descriptor swizzle", "wrong descriptor stride"
    for name, kind, edit, case in (
        (
            *("hidden_states descriptor with 64B swizzle", swizzle),
            *(_in_descriptor(_swizzle_64b, 0), _ONE_BLOCK),
        ),
        (
            *("W_gate descriptor with 64B swizzle", swizzle),
            *(_in_descriptor(_swizzle_64b, 1), _ONE_BLOCK),
        ),
        (
            *("W_gate descriptor with half the stride", stride),
            *(_in_descriptor(_half_stride, 1), _ONE_BLOCK),
        ),
        (
            "second K step of hidden_states reads the third's bytes",
            "wrong descriptor start",
            Edit(pattern=r"(add\.s32 \t%r\d+, %r\d+, )2;", replacement=r"\g<1>4;", nth=0),
            _ONE_BLOCK,
        ),
        (
            "instruction descriptor says W_gate is MN-major",
            "wrong instruction descriptor",
            Edit(pattern=r"(mov\.b32 \t%r\d+, )(67241104);", replacement=_transposed),
            _ONE_BLOCK,
        ),
        (
            "tcgen05.ld eight columns on",
            "wrong TMEM column",
            Edit(pattern=r"(tcgen05\.ld\.sync[^;]*\[%r\d+)\];", replacement=r"\1+8];"),
            _ONE_BLOCK,
        ),
        (
            "a ragged chunk multiplies a block that was not loaded",
            "stale block",
            Edit(
                pattern=r"setp\.ge\.s32 \t(%p\d+), (%r\d+), %r\d+;(\s+@%p\d+ bra[^;]*;\s+shl\.b32"
                r" \t%r\d+, %r\d+, 11;\s+add\.s32)",
                replacement=r"mov.pred \t\1, 0;\3",
                nth=1,
            ),
            _WRAPS,
        ),
    ):
        yield _sm100(name, kind, EMULATED, edit, case=case, complaint=_WRONG_IDS)
    accumulate = Edit(
        pattern=r"setp\.ne\.b32 \t(%p\d+), %r\d+, 0;(\s+mov\.b32[^;]*;\s+mov\.b32"
        r"[^;]*;\s+tcgen05\.mma)",
        replacement=r"mov.pred \t\1, -1;\2",
    )
    name = "first MMA accumulates onto what TMEM held"
    yield _sm100(name, "wrong accumulate flag", EMULATED, accumulate)
    lane = Edit(
        pattern=r"(shl\.b32 \t%r\d+, %r\d+, )16;(\s+and\.b32 \t%r\d+, %r\d+, 14680064;)",
        replacement=r"\g<1>17;\2",
    )
    yield _sm100("tcgen05.ld of another warp's lanes", "wrong TMEM lane", EMULATED, lane)
    # A tile of 8 tokens has no second group of 8 rows, and its stride is never used.
    yield _emajor(
        *("emajor, 64 tokens: hidden_states descriptor with half the stride", stride, EMULATED),
        _in_descriptor(_half_stride, 0),
        case=replace(_ONE_BLOCK, num_tokens=16),
        complaint=_WRONG_IDS,
    )
    yield _emajor(
        "emajor: instruction descriptor says W_gate is K-major",
        "wrong instruction descriptor",
        EMULATED,
        Edit(pattern=r"(mov\.b32 \t%r\d+, )(6\d{7}|7\d{7});", replacement=_transposed),
    )
    yield _sm100(
        "hidden_states box of two blocks",
        "wrong tensor-map box",
        NOT_TO_THE_FACTS,
        maps={"x_map": {"box": (64, 8, 2)}},
        case=_WRAPS,
    )
    yield _sm100(
        "W_gate map without swizzle",
        "wrong tensor-map swizzle",
        EMULATED,
        maps={"w_map": {"swizzle": "none"}},
        complaint=_WRONG_IDS,
    )
    rank = Edit(
        pattern=r"(mapa\.shared::cluster\.u32 \t%r\d+, %r\d+, )(%r\d+);",
        replacement=r"\g<1>0;",
        nth=0,
    )
    name = "sums sent to rank 0, completed at the owner"
    yield _sm100(name, "wrong cluster rank", EMULATED, rank)


def _selection() -> Iterator[Mutant]:
    """The decode kernel's choice of experts, and the merge of several expert tiles."""
    ties = Edit(
        pattern=r"setp\.gt\.u32( \t%p\d+, %r\d+, %r\d+;\s+setp\.eq\.b32)",
        replacement=r"setp.ge.u32\1",
        nth=0,
    )
    yield _sm100(
        "equal keys go to the higher register",
        "tie rule reversed",
        EMULATED,
        ties,
        case=_TIES,
        complaint=_WRONG_IDS,
    )
    bias = Edit(pattern=_BIASED_SCORE, replacement=_score_with_bias)
    name = "the weight keeps the bias"
    yield _sm100(name, "bias in the weight", EMULATED, bias, complaint=_WRONG_WEIGHT)
    ticket = Edit(
        pattern=r"atom\.relaxed\.gpu\.global\.inc\.u32 (%r\d+), (\[%rd\d+\]), %r\d+;",
        replacement=r"ld.relaxed.gpu.global.u32 \1, \2;",
    )
    yield _sm100("no ticket is drawn", "election", EMULATED, ticket, case=_TWO_TILES)
    zeros = _deleted(r"st\.relaxed\.gpu\.global\.v2\.b64 \[%rd\d+\], \{0, 0\};")
    name = "the merger leaves its entries behind"
    yield _sm100(name, "scratch not zeroed", EMULATED, zeros, case=_TWO_TILES)
    # The two entries are two lanes', of one store: another warp may see one without the other.
    one_word = Edit(
        pattern=r"(ld\.relaxed\.gpu\.global\.v2\.b64 \{%rd\d+, (%rd\d+)\}[^;]*;(?:[^;]*;){1,2}?\s*)"
        r"setp\.eq\.b64 \t(%p\d+), \2, 0;",
        replacement=r"\1mov.pred \t\3, 0;",
    )
    yield _sm100(
        "the merger waits for one word of each pair",
        "half of a pair",
        EMULATED,
        one_word,
        case=replace(_TWO_TILES, num_tokens=8),
        # About one random schedule in ten stops a store between two lanes at the right moment.
        schedules=tuple(("random", seed) for seed in range(40)),
    )


def _options() -> Iterator[Mutant]:
    """What the decode kernel is told of tokens and experts beside hidden_states and W_gate."""
    for name, kind, edit in (
        ("epilogue does not wait for the names", "dropped wait", _no_wait(_NAMES_WAIT)),
        ("no arrival on names_full", "dropped arrive", _deleted(_ARRIVE, _NAMES_ARRIVE)),
        ("names_full needs 33 arrivals", "wrong arrive count", _arrivals(33, _NAMES_FULL)),
        # 31 would leave out one lane's names, and no rung sees it: to the emulator lanes of a warp
        # arrive at once, and SentryWard has no options.
    ):
        yield _sm100(name, kind, EMULATED, edit, case=_given("physical"))

    name_of = r"(ld\.shared\.b32 \t%r\d+, \[%r\d+\+)81920\];"
    row = r"shl\.b32( \t%r\d+, )%r\d+, 9(;(?:\s+(?:add|shl)[^;]*;){3}\s+ld\.shared)"
    flag = r"(selp\.b32 \t%r\d+, 0, )"
    for name, kind, edit, case, complaint in (
        (
            *("every warp takes the first warp's names", "wrong name"),
            Edit(pattern=row, replacement=r"mov.b32\g<1>0\2", nth=0),
            *(_given("physical"), _WRONG_IDS),
        ),
        (
            *("the next expert's name", "wrong name"),
            Edit(pattern=name_of, replacement=r"\g<1>81924];", nth=0),
            *(_given("physical"), _WRONG_IDS),
        ),
        (
            *("image_mask ignored", "option ignored"),
            Edit(pattern=flag + r"8(, %p\d+;\s+or\.b32)", replacement=r"\g<1>0\2"),
            *(_given("images"), _WRONG_IDS),
        ),
        (
            *("padding ignored", "option ignored"),
            Edit(pattern=flag + r"16(, %p\d+;)", replacement=r"\g<1>0\2"),
            *(_given("padding"), _WRONG_IDS),
        ),
        (
            *("num_valid_tokens ignored", "option ignored"),
            Edit(
                pattern=r"(setp\.lt\.s32[^;]*;\s+selp\.b32 \t%r\d+, (%r\d+), )1(, %p\d+;)",
                replacement=r"\1\2\3",
                nth=0,
            ),
            *(_given("count"), _WRONG_IDS),
        ),
        (
            *("gate_temp ignored", "option ignored"),
            *(_option_off(19, "0f3F800000"), _given("temperature"), _WRONG_WEIGHT),
        ),
        (
            *("norm_topk_prob ignored", "option ignored"),
            *(_option_off(20, "1"), _given("unnormed"), _WRONG_WEIGHT),
        ),
        (
            *("num_shared_slots ignored", "option ignored"),
            *(_option_off(24, "0"), _given("shared"), _WRONG_IDS),
        ),
        (
            *("high words of 64-bit ids left out", "half of an id"),
            *(_deleted(r"st\.global\.b32 \t\[%rd\d+\+4\], [^;]*;"), _given("int64"), _WRONG_IDS),
        ),
        (
            *("a token id's high word left out", "half of an id"),
            Edit(pattern=r"ld\.global\.b64(.*?);", replacement=r"ld.global.s32\1;"),
            *(_given("table", "unknown", "int64"), _WRONG_IDS),
        ),
        (
            *("a token id out of the table is looked up", "unchecked token id"),
            *(_unchecked_id(), _given("table", "unknown"), "out-of-bounds"),
        ),
        (
            *("a token id out of the table has a row", "unchecked token id"),
            Edit(pattern=r"setp\.gt\.s32 \t(%p\d+), %r\d+, -1;", replacement=r"mov.pred \t\1, -1;"),
            *(_given("table", "unknown"), _WRONG_IDS),
        ),
        (
            *("a hash layer's second slot ranks as its third", "wrong rank"),
            Edit(
                pattern=r"selp\.b32( \t%r\d+), 1, (%r\d+, %p\d+;\s+shfl)",
                replacement=r"selp.b32\1, 2, \2",
            ),
            *(_given("table"), _WRONG_IDS),
        ),
    ):
        yield _sm100(name, kind, EMULATED, edit, case=case, complaint=complaint)


def _unchecked_id() -> Edit:
    return Edit(
        pattern=r"or\.pred \t(%p\d+), %p\d+, %p\d+;(\s+@%p\d+ bra[^;]*;\s+cvt\.[su]64[^;]*;"
        r"(?:\s+cvt[^;]*;)?\s+mad\.lo\.s64)",
        replacement=r"mov.pred \t\1, 0;\2",
    )


def _of_sm90() -> Iterator[Mutant]:
    """The decode kernel with wgmma; SentryWard cannot be asked."""
    empty = _NAMES_ARRIVE + 1
    wait_group = r"(wgmma\.wait_group\.sync\.aligned \t)0;"
    for name, kind, edit, complaint in (
        ("producer does not wait for empty", "dropped wait", _no_wait(0), "race"),
        ("warpgroup does not wait for full", "dropped wait", _no_wait(1), "race"),
        ("epilogue does not wait for the facts", "dropped wait", _no_wait(_FACTS_WAIT), "race"),
        ("no arrival on empty", "dropped arrive", _deleted(_ARRIVE, empty), "deadlock"),
        ("no wgmma.wait_group", "missing wgmma wait", _deleted(wait_group), "race"),
        (
            *("ring freed while its last wgmmas still run", "missing wgmma wait"),
            *(Edit(pattern=wait_group, replacement=r"\g<1>1;"), "race"),
        ),
        (
            *("no wgmma.fence", "missing wgmma fence"),
            *(_deleted(r"wgmma\.fence\.sync\.aligned;"), "missing-wgmma-fence"),
        ),
    ):
        yield _sm90(f"sm_90: {name}", kind, EMULATED, edit, case=_WRAPS_BOTH, complaint=complaint)


def _of_hash() -> Iterator[Mutant]:
    """router_hash: W_gate comes by threads, not by TMA, and the table says which rows."""
    for name, kind, rejected_by, edit, complaint in (
        # SentryWard rejects it too, but may take minutes.
        ("producer does not wait for empty", "dropped wait", EMULATED, _no_wait(0), "race"),
        (
            *("loading warps do not wait for empty", "dropped wait", BOTH),
            *(_no_wait(1), "more arrivals than the 9 of a phase"),
        ),
        ("MMA does not wait for full", "dropped wait", BOTH, _no_wait(2), "race"),
        # SentryWard then cannot tell an output from an option that is null.
        ("owner does not wait for the sums", "dropped wait", EMULATED, _no_wait(4), "race"),
        ("loading warps do not announce", "dropped arrive", BOTH, _deleted(_ARRIVE), "deadlock"),
        (
            *("full needs the producer's arrival alone", "wrong arrive count", BOTH),
            *(Edit(pattern=r"mov\.b32( \t%r\d+), 9;", replacement=r"mov.b32\1, 1;"), "race"),
        ),
        (
            *("no fence between storing W_gate and multiplying", "missing proxy fence", EMULATED),
            *(_deleted(r"fence\.proxy\.async\.shared::cta;"), "missing-proxy-fence"),
        ),
    ):
        yield _hash(
            *(f"hash: {name}", kind, rejected_by, edit),
            case=_WRAPS,
            complaint=complaint,
        )
    padding = _given("padding")
    for nth, name, tensor in (
        (0, "hidden_states loaded", "hidden_states"),
        (1, "padding_mask read", "padding_mask"),
    ):
        yield _hash(
            f"hash: {name} before the grid dependency",
            *("missing grid dependency", EMULATED, _deleted(r"griddepcontrol\.wait;", nth)),
            case=padding,
            complaint=f"{tensor} belongs to the grid before",
        )
    # Which of the two says that a row is padding: the masks, or the table.
    is_padding = r"or\.b32 (\t%r\d+), (%r\d+), (%r\d+);(\s+setp\.ne\.b32 \t%p\d+, %r\d+, 0;)"
    for name, kind, edit, case, complaint in (
        (
            *("a token id out of the table is looked up", "unchecked token id"),
            *(_unchecked_id(), _given("unknown"), "out-of-bounds"),
        ),
        (
            *("a token id out of the table has a row", "unchecked token id"),
            Edit(pattern=is_padding, replacement=r"mov.b32 \1, \2;\4"),
            *(_given("unknown"), _WRONG_IDS),
        ),
        (
            *("padding ignored", "option ignored"),
            Edit(pattern=is_padding, replacement=r"mov.b32 \1, \3;\4"),
            *(padding, _WRONG_IDS),
        ),
        (
            *("gate_temp ignored", "option ignored"),
            *(_option_off(16, "0f3F800000"), _given("temperature")),
            _WRONG_WEIGHT,
        ),
        (
            *("each slot of four tokens reads the first slot's row", "wrong row of W_gate"),
            Edit(
                pattern=r"mad\.lo\.s64( \t%rd\d+, %rd\d+, %rd\d+), %rd\d+;",
                replacement=r"mul.lo.s64\1;",
                nth=0,
            ),
            *(_ONE_BLOCK, _WRONG_WEIGHT),
        ),
        (
            *("W_gate stored without the swizzle", "wrong shared-memory swizzle"),
            Edit(pattern=r"xor\.b32( \t%r\d+), %r\d+, (%r\d+);", replacement=r"mov.b32\1, \2;"),
            *(_ONE_BLOCK, _WRONG_WEIGHT),
        ),
        (
            *("every token's replica is the first token's", "wrong name"),
            Edit(
                pattern=r"selp\.b32( \t%r\d+), %r\d+, 0, (%p\d+;\s+add\.s32 \t%r\d+, %r\d+, -1;)",
                replacement=r"selp.b32\1, 0, 0, \2",
            ),
            *(_given("physical"), _WRONG_IDS),
        ),
    ):
        yield _hash(f"hash: {name}", kind, EMULATED, edit, case=case, complaint=complaint)


def _of_topk() -> Iterator[Mutant]:
    """router_topk."""
    yield _topk(
        # Lanes of a warp run in step in the emulator.
        "top-k: no barrier between writing keys and reading them",
        "missing warp barrier",
        PROTOCOL,
        _deleted(r"bar\.warp\.sync[^;]*;"),
    )
    yield _topk(
        # Lanes that do not hold the largest key offer -1: the least of all, as a signed number.
        "top-k: equal keys go to the higher expert",
        "tie rule reversed",
        EMULATED,
        Edit(pattern=r"redux\.sync\.min\.u32", replacement="redux.sync.max.s32"),
        case=replace(_TOPK_CASE, kind="ties"),
        complaint=_WRONG_IDS,
    )
    yield _topk(
        "top-k: one column too many is stored",
        "store beside the outputs",
        EMULATED,
        Edit(
            pattern=r"(add\.s32 \t(%r\d+), %r\d+, %r\d+;\s+)setp\.ge\.s32( \t%p\d+, %r\d+, \2;)",
            replacement=r"\1setp.gt.s32\3",
        ),
        complaint="beside the outputs",
    )
    name = "top-k: logits read before the grid dependency"
    wait = _deleted(r"griddepcontrol\.wait;")
    yield _topk(name, "missing grid dependency", EMULATED, wait)


def _harmless() -> Iterator[Mutant]:
    """Changes that do no harm, each with the proof; the rungs accept them."""
    for name, edit, proof in (
        (
            "no tcgen05.relinquish_alloc_permit",
            _deleted(r"tcgen05\.relinquish_alloc_permit[^;]*;"),
            "it only takes the CTA's right to allocate again, and the kernel allocates once. "
            "Others' allocations wait for free columns alone: a CTA takes 32 to 64 of 512, and "
            "shared memory lets no more than two be on one SM",
        ),
        (
            "no griddepcontrol.launch_dependents",
            _deleted(r"griddepcontrol\.launch_dependents;"),
            "a CTA that ends has said it: the grid after this one starts later, and it waits for "
            "this one's end in any case before it touches what this one writes",
        ),
        (
            "no prefetch.tensormap",
            _deleted(r"prefetch\.tensormap[^;]*;"),
            "a prefetch fills a cache and nothing else",
        ),
        (
            "no .collector::a::discard",
            _deleted(r"\.collector::a::discard"),
            "it is what tcgen05.mma does where no collector usage is written",
        ),
        (
            "no time limit on mbarrier.try_wait",
            Edit(pattern=r"(mbarrier\.try_wait[^;]*), 10000000;", replacement=r"\1;"),
            "the limit says how long one try may sleep, and each try is in a loop that ends when "
            "the phase has",
        ),
    ):
        yield _sm100(name, "harmless", (), edit, case=_WRAPS, harmless=proof)
    yield _sm100(
        *("no griddepcontrol.wait in the epilogue", "harmless", ()),
        _deleted(r"griddepcontrol\.wait;", 1),
        case=replace(_TWO_TILES, options=("images", "padding")),
        harmless="an epilogue warp touches what the grid before may use after its wait for "
        "facts_full, on which the producer's lanes arrive after a griddepcontrol.wait of their own",
    )


MUTANTS = (
    *_barriers(),
    *_left_out(),
    *_layouts(),
    *_selection(),
    *_options(),
    *_of_sm90(),
    *_of_hash(),
    *_of_topk(),
    *_harmless(),
)
