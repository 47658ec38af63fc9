"""Faults of mbarriers: waits, commits, arrivals, phases and byte counts."""

from __future__ import annotations

from functools import partial

from build_kernels.mutants.mutant import Edit

from .edits import ARRIVE, WAIT, arrivals, deleted, no_wait
from .kernels import (
    BEFORE_ROW_FLAGS,
    BOTH,
    WRAPS,
    WRAPS_BOTH,
    emajor,
    given,
    hash_layer,
    of_kind,
    sm90,
    sm100,
)

# The numbers of waits, arrivals and mbarrier.inits in a decode kernel's text, with two stages.
# Physical ids are waited for four times: with one expert tile, and after each of the merges.
_ROW_FLAGS_WAIT = 3
_PHYSICAL_IDS_WAIT = 5
_PHYSICAL_IDS_ARRIVE = 1
_EMPTY_ARRIVE = 2
_ROW_FLAGS_FULL = 6
_PHYSICAL_IDS_FULL = 7

# A wait for an mbarrier that is used once.
_WAIT_ONCE = r"(mbarrier\.try_wait[^;]*), 0, 10000000;"

_PRODUCER_PARITY = Edit(
    pattern=r"not\.b32( \t%r\d+, %r\d+;\s+and\.b32 \t%r\d+, %r\d+, 1;)",
    replacement=r"mov.b32\1",
    nth=0,
)
_MMA_PARITY = Edit(
    pattern=WAIT.replace(r"(%r\d+|\d+)", r"(%r\d+)"),
    replacement=r"mbarrier.try_wait.parity.shared.b64 P1, \1, 0, 10000000;",
    nth=1,
)
_EPILOGUE_PARITY = Edit(pattern=_WAIT_ONCE, replacement=r"\1, 1, 10000000;", nth=0)

# The bytes of hidden_states, added to those of W_gate's blocks, which are multiples of 8192.
_EXPECTED = r"(or\.b32 \t%r\d+, %r\d+, )4096;(\s+mbarrier\.arrive\.expect_tx)"
_EXPECTED_SUMS = r"(shl\.b32 \t%r\d+, %r\d+, )13;(\s+mbarrier\.arrive\.expect_tx)"
_LESS = Edit(pattern=_EXPECTED, replacement=r"\g<1>0;\2", nth=0)
_MORE = Edit(pattern=_EXPECTED, replacement=r"\g<1>4112;\2", nth=1)
_HALF_OF_THE_SUMS = Edit(pattern=_EXPECTED_SUMS, replacement=r"\g<1>12;\2", nth=0)

_STAGE_OF_HIDDEN_STATES = Edit(
    pattern=r"(shl\.b32 \t%r\d+, )%r\d+(, 12;\s+add\.s32 \t%r\d+, %r\d+, %r\d+;\s+"
    r"shl\.b32 \t%r\d+, %r\d+, 2;)",
    replacement=r"\g<1>0\g<2>",
)
_STAGE_OF_MMA = Edit(
    pattern=r"and\.b32 (\t%r\d+, %r\d+, 1;\s+shl\.b32 \t%r\d+, %r\d+, 3;)",
    replacement=r"xor.b32 \1",
    nth=0,
)

_MORE_THAN_9 = "more arrivals than the 9 of a phase"
_COMMIT = r"tcgen05\.commit[^;]*;"
_ONE_OF_NINE = Edit(pattern=r"mov\.b32( \t%r\d+), 9;", replacement=r"mov.b32\1, 1;")

_decode = partial(sm100, case=WRAPS)
_physical = partial(sm100, case=given("physical"))
_sm90 = partial(sm90, case=WRAPS_BOTH)
_hash = partial(hash_layer, case=WRAPS)

DECODE = (
    *of_kind(
        *(_decode, "dropped wait"),
        ("producer does not wait for empty", no_wait(0), BOTH),
        ("MMA does not wait for full", no_wait(1), BOTH),
        ("epilogue does not wait for the accumulator", no_wait(2), BOTH),
        ("epilogue does not wait for the row flags", no_wait(_ROW_FLAGS_WAIT), BEFORE_ROW_FLAGS),
        ("owner does not wait for the sums", no_wait(4), BOTH),
        complaint="race",
    ),
    *of_kind(
        *(_decode, "dropped commit"),
        ("no commit to empty", deleted(_COMMIT, 0), BEFORE_ROW_FLAGS),
        ("no commit to accumulator_full", deleted(_COMMIT, 1), BEFORE_ROW_FLAGS),
    ),
    *of_kind(
        *(_decode, "wrong parity"),
        ("producer waits for the other parity", _PRODUCER_PARITY, BOTH),
        ("MMA waits for parity 0 in every turn", _MMA_PARITY, BEFORE_ROW_FLAGS),
        ("epilogue waits for parity 1", _EPILOGUE_PARITY, BOTH),
    ),
    *of_kind(
        *(_decode, "wrong tx-count"),
        ("first turn expects 4096 bytes less", _LESS, BOTH),
        ("later turns expect 16 bytes more", _MORE, BEFORE_ROW_FLAGS),
        ("owner expects half of the sums", _HALF_OF_THE_SUMS, BOTH),
    ),
    *of_kind(
        *(_decode, "wrong arrive count"),
        ("full needs two arrivals", arrivals(2, 0), BEFORE_ROW_FLAGS),
        ("empty needs two arrivals", arrivals(2, 1), BEFORE_ROW_FLAGS),
        ("row_flags_full needs 33 arrivals", arrivals(33, _ROW_FLAGS_FULL), BEFORE_ROW_FLAGS),
        ("row_flags_full needs 31 arrivals", arrivals(31, _ROW_FLAGS_FULL), BOTH),
    ),
    *of_kind(
        *(_decode, "stage off by one"),
        ("hidden_states always into stage 0", _STAGE_OF_HIDDEN_STATES, BOTH),
        ("MMA reads the other stage", _STAGE_OF_MMA, BOTH),
    ),
    *of_kind(
        *(emajor, "dropped wait"),
        ("emajor, 64 tokens: producer does not wait for empty", no_wait(0), BOTH, WRAPS),
    ),
)

PHYSICAL_IDS = (
    _physical(
        "epilogue does not wait for the physical ids", "dropped wait", no_wait(_PHYSICAL_IDS_WAIT)
    ),
    _physical(
        "no arrival on physical_ids_full", "dropped arrive", deleted(ARRIVE, _PHYSICAL_IDS_ARRIVE)
    ),
    _physical(
        *("physical_ids_full needs 33 arrivals", "wrong arrive count"),
        arrivals(33, _PHYSICAL_IDS_FULL),
    ),
    _physical(
        *("physical_ids_full needs 31 arrivals", "wrong arrive count"),
        arrivals(31, _PHYSICAL_IDS_FULL),
    ),
)

# SentryWard does not support wgmma.
SM90 = (
    *of_kind(
        *(_sm90, "dropped wait"),
        ("sm_90: producer does not wait for empty", no_wait(0)),
        ("sm_90: warpgroup does not wait for full", no_wait(1)),
        ("sm_90: epilogue does not wait for the row flags", no_wait(_ROW_FLAGS_WAIT)),
        complaint="race",
    ),
    *of_kind(
        *(_sm90, "dropped arrive"),
        ("sm_90: no arrival on empty", deleted(ARRIVE, _EMPTY_ARRIVE), "deadlock"),
    ),
)

HASH = (
    *of_kind(
        *(_hash, "dropped wait"),
        # SentryWard rejects it too, but may take minutes.
        ("hash: producer does not wait for empty", no_wait(0), "race"),
        ("hash: loading warps do not wait for empty", no_wait(1), BOTH, _MORE_THAN_9),
        ("hash: MMA does not wait for full", no_wait(2), BOTH, "race"),
        # Without the wait SentryWard cannot tell an output from an option that is null.
        ("hash: owner does not wait for the sums", no_wait(4), "race"),
    ),
    *of_kind(
        *(_hash, "dropped arrive"),
        ("hash: loading warps do not announce", deleted(ARRIVE), BOTH, "deadlock"),
    ),
    *of_kind(
        *(_hash, "wrong arrive count"),
        ("hash: full needs the producer's arrival alone", _ONE_OF_NINE, BOTH, "race"),
    ),
)
