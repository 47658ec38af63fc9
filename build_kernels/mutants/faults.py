"""The faults: what each changes in the project's own PTX, and which rungs must reject it."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from typing import Any

from build_kernels.verify.cases import Case

from .mutant import Edit, Mutant

BOTH = ("emulated", "protocol")
EMULATED = ("emulated",)
PROTOCOL = ("protocol",)

# The rings have 6 and 8 blocks of K, in stages of 1 and 4, so that 9 blocks a CTA use a stage again
# and end in a chunk that is not full.
BLOCKS_OF_A_WRAP = 9
BLOCK_K = 64 * 16

_SM100 = "router_decode_kmajor_n16.sm_100a"
_SM100_EMAJOR = "router_decode_emajor_n64.sm_100a"
_SM90 = "router_decode_kmajor_n16.sm_90a"
_TOPK = "router_topk.sm_100a"

# Bits of a shared-memory descriptor and of an instruction descriptor, as sm_100 has them.
_SWIZZLE_SHIFT = 61
_STRIDE_SHIFT = 32
_TRANSPOSE_A = 1 << 15

_ONE_BLOCK = Case(num_tokens=7, num_experts=60, top_k=6, k=BLOCK_K)
_WRAPS = replace(_ONE_BLOCK, k=BLOCK_K * BLOCKS_OF_A_WRAP)
_TWO_TILES = replace(_ONE_BLOCK, num_experts=100)
_TIES = replace(_ONE_BLOCK, kind="ties")
_TOPK_CASE = Case(num_tokens=7, num_experts=132, top_k=6)

_WRONG_IDS = "ids are wrong"
_WRONG_WEIGHT = "a weight is off"

# One mbarrier wait as the DSL writes it; its test made always true.
_WAIT = r"mbarrier\.try_wait\.parity\.shared\.b64 P1, (\[[^\]]+\]), (%r\d+|\d+), 10000000;"
_NO_WAIT = "setp.eq.b32 P1, 0, 0;"


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
_topk = partial(_mutant, _TOPK, case=_TOPK_CASE)


def _no_wait(nth: int) -> Edit:
    return Edit(pattern=_WAIT, replacement=_NO_WAIT, nth=nth)


def _deleted(pattern: str, nth: int | None = None) -> Edit:
    return Edit(pattern=pattern, replacement="", nth=nth)


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
    for nth, name in enumerate(
        (
            "producer does not wait for empty",
            "MMA does not wait for full",
            "epilogue does not wait for the accumulator",
            "owner does not wait for the sums",
        )
    ):
        yield _sm100(name, "dropped wait", BOTH, _no_wait(nth), case=_WRAPS)
    for nth, name in enumerate(("no commit to empty", "no commit to accumulator_full")):
        commit = _deleted(r"tcgen05\.commit[^;]*;", nth)
        yield _sm100(name, "dropped commit", BOTH, commit, case=_WRAPS)

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
    accumulator = Edit(
        pattern=r"(mbarrier\.try_wait[^;]*), 0, 10000000;", replacement=r"\1, 1, 10000000;", nth=0
    )
    for name, parity in (
        ("producer waits for the other parity", flipped),
        ("MMA waits for parity 0 in every turn", constant),
        ("epilogue waits for parity 1", accumulator),
    ):
        yield _sm100(name, "wrong parity", BOTH, parity, case=_WRAPS)

    expected = r"(add\.s32 \t%r\d+, %r\d+, )8192;(\s+mbarrier\.arrive\.expect_tx)"
    of_sums = r"(shl\.b32 \t%r\d+, %r\d+, )13;(\s+mbarrier\.arrive\.expect_tx)"
    for name, pattern, replacement, nth in (
        ("first turn expects 4096 bytes less", expected, r"\g<1>4096;\2", 0),
        ("later turns expect 16 bytes more", expected, r"\g<1>8208;\2", 1),
        ("owner expects half of the sums", of_sums, r"\g<1>12;\2", 0),
    ):
        edit = Edit(pattern=pattern, replacement=replacement, nth=nth)
        yield _sm100(name, "wrong tx-count", BOTH, edit, case=_WRAPS)

    init = r"(mbarrier\.init\.shared\.b64 \t\[[^\]]+\], )%r\d+;"
    for nth, barrier in enumerate(("full", "empty")):
        edit = Edit(pattern=init, replacement=r"\g<1>2;", nth=nth)
        name = f"{barrier} needs two arrivals"
        yield _sm100(name, "wrong arrive count", BOTH, edit, case=_WRAPS)

    x_stage = Edit(
        pattern=r"(shl\.b32 \t%r\d+, )%r\d+(, 13;\s+add\.s32 \t%r\d+, %r\d+, %r\d+;\s+"
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
    for nth, name, case in (
        (0, "hidden_states loaded before the grid dependency", _ONE_BLOCK),
        (1, "ticket drawn before the grid dependency", _TWO_TILES),
    ):
        wait = _deleted(r"griddepcontrol\.wait;", nth)
        yield _sm100(name, "missing grid dependency", EMULATED, wait, case=case)


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
            *("hidden_states descriptor with half the stride", stride),
            *(_in_descriptor(_half_stride, 0), replace(_ONE_BLOCK, num_tokens=16)),
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
            Edit(pattern=r"(mov\.b32 \t%r\d+, )(67372176);", replacement=_transposed),
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
    yield _emajor(
        "emajor: instruction descriptor says W_gate is K-major",
        "wrong instruction descriptor",
        EMULATED,
        Edit(pattern=r"(mov\.b32 \t%r\d+, )(6\d{7}|7\d{7});", replacement=_transposed),
    )
    yield _sm100(
        "hidden_states box of two blocks",
        "wrong tensor-map box",
        BOTH,
        maps={"x_map": {"box": (64, 16, 2)}},
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
        case=_TWO_TILES,
        # About one random schedule in ten stops a store between two lanes at the right moment.
        schedules=tuple(("random", seed) for seed in range(40)),
    )


def _of_sm90() -> Iterator[Mutant]:
    """The decode kernel with wgmma; SentryWard cannot be asked."""
    fence = _deleted(r"wgmma\.fence\.sync\.aligned;")
    for name, kind, edit in (
        ("producer does not wait for empty", "dropped wait", _no_wait(0)),
        ("warpgroup does not wait for full", "dropped wait", _no_wait(1)),
        (
            "no arrival on empty",
            "dropped arrive",
            _deleted(r"mbarrier\.arrive\.shared\.b64[^;]*;"),
        ),
        (
            "no wgmma.wait_group at the end",
            "missing wgmma wait",
            _deleted(r"wgmma\.wait_group\.sync\.aligned \t0;"),
        ),
        (
            "stage freed while its wgmma still runs",
            "missing wgmma wait",
            Edit(pattern=r"(wgmma\.wait_group\.sync\.aligned \t)1;", replacement=r"\g<1>2;"),
        ),
        ("no wgmma.fence", "missing wgmma fence", fence),
    ):
        yield _sm90(f"sm_90: {name}", kind, EMULATED, edit, case=_WRAPS)


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


MUTANTS = (
    *_barriers(),
    *_left_out(),
    *_layouts(),
    *_selection(),
    *_of_sm90(),
    *_of_topk(),
    *_harmless(),
)
