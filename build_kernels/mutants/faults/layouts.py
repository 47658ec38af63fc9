"""Faults of layouts: descriptors, tensor maps, tensor memory; the wrong bytes are multiplied."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import replace
from functools import partial

from build_kernels.mutants.mutant import Edit

from .kernels import (
    BEFORE_ROW_FLAGS,
    ONE_BLOCK,
    WRAPS,
    WRONG_IDS,
    WRONG_WEIGHT,
    emajor,
    hash_layer,
    of_kind,
    sm100,
)

_STRIDE = "wrong descriptor stride"
_INSTRUCTION = "wrong instruction descriptor"

# Bits of a shared-memory descriptor and of an instruction descriptor on sm_100.
_SWIZZLE_SHIFT = 61
_STRIDE_SHIFT = 32
_TRANSPOSE_A = 1 << 15


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


_RAGGED = Edit(
    pattern=r"setp\.ge\.s32 \t(%p\d+), (%r\d+), %r\d+;(\s+@%p\d+ bra[^;]*;\s+shl\.b32"
    r" \t%r\d+, %r\d+, 11;\s+add\.s32)",
    replacement=r"mov.pred \t\1, 0;\3",
    nth=1,
)
_ACCUMULATE = Edit(
    pattern=r"setp\.ne\.b32 \t(%p\d+), %r\d+, 0;(\s+mov\.b32[^;]*;\s+mov\.b32"
    r"[^;]*;\s+tcgen05\.mma)",
    replacement=r"mov.pred \t\1, -1;\2",
)
_LANE = Edit(
    pattern=r"(shl\.b32 \t%r\d+, %r\d+, )16;(\s+and\.b32 \t%r\d+, %r\d+, 14680064;)",
    replacement=r"\g<1>17;\2",
)
_RANK = Edit(
    pattern=r"(mapa\.shared::cluster\.u32 \t%r\d+, %r\d+, )(%r\d+);",
    replacement=r"\g<1>0;",
    nth=0,
)

_K_STEP = Edit(pattern=r"(add\.s32 \t%r\d+, %r\d+, )2;", replacement=r"\g<1>4;", nth=0)
_MN_MAJOR = Edit(pattern=r"(mov\.b32 \t%r\d+, )(67241104);", replacement=_transposed)
_K_MAJOR = Edit(pattern=r"(mov\.b32 \t%r\d+, )(6\d{7}|7\d{7});", replacement=_transposed)
_COLUMN = Edit(pattern=r"(tcgen05\.ld\.sync[^;]*\[%r\d+)\];", replacement=r"\1+8];")

_FIRST_SLOT = Edit(
    pattern=r"mad\.lo\.s64( \t%rd\d+, %rd\d+, %rd\d+), %rd\d+;", replacement=r"mul.lo.s64\1;", nth=0
)
_NO_SWIZZLE = Edit(pattern=r"xor\.b32( \t%r\d+), %r\d+, (%r\d+);", replacement=r"mov.b32\1, \2;")

_ids = partial(sm100, complaint=WRONG_IDS)
_weight = partial(hash_layer, complaint=WRONG_WEIGHT)

DECODE = (
    *of_kind(
        *(_ids, "wrong descriptor swizzle"),
        ("hidden_states descriptor with 64B swizzle", _in_descriptor(_swizzle_64b, 0)),
        ("W_gate descriptor with 64B swizzle", _in_descriptor(_swizzle_64b, 1)),
    ),
    _ids("W_gate descriptor with half the stride", _STRIDE, _in_descriptor(_half_stride, 1)),
    _ids(
        *("second K step of hidden_states reads the third's bytes", "wrong descriptor start"),
        _K_STEP,
    ),
    _ids("instruction descriptor with an MN-major W_gate", _INSTRUCTION, _MN_MAJOR),
    _ids("tcgen05.ld eight columns on", "wrong TMEM column", _COLUMN),
    *of_kind(
        *(_ids, "stale block"),
        ("a ragged chunk multiplies a block that was not loaded", _RAGGED, WRAPS),
    ),
    sm100("first MMA accumulates onto old contents of TMEM", "wrong accumulate flag", _ACCUMULATE),
    sm100("tcgen05.ld of another warp's lanes", "wrong TMEM lane", _LANE),
    # A tile of 8 tokens has no second group of 8 rows, and its stride is never used.
    emajor(
        *("emajor, 64 tokens: hidden_states descriptor with half the stride", _STRIDE),
        _in_descriptor(_half_stride, 0),
        case=replace(ONE_BLOCK, num_tokens=16),
        complaint=WRONG_IDS,
    ),
    emajor("emajor: instruction descriptor with a K-major W_gate", _INSTRUCTION, _K_MAJOR),
    sm100(
        *("hidden_states box of two blocks", "wrong tensor-map box"),
        maps={"x_map": {"box": (64, 8, 2)}},
        rejected_by=BEFORE_ROW_FLAGS,
        case=WRAPS,
    ),
    _ids(
        *("W_gate map without swizzle", "wrong tensor-map swizzle"),
        maps={"w_map": {"swizzle": "none"}},
    ),
    sm100("sums sent to rank 0, completed at the owner", "wrong cluster rank", _RANK),
)

HASH = (
    _weight(
        *("hash: each slot of four tokens reads the first slot's row", "wrong row of W_gate"),
        _FIRST_SLOT,
    ),
    _weight(
        *("hash: W_gate stored without the swizzle", "wrong shared-memory swizzle"),
        _NO_SWIZZLE,
    ),
)
