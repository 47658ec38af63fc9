"""Faults of options: one is ignored, an id is cut in half, a token id is not checked."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial

from build_kernels.evidence.cases import Case
from build_kernels.mutants.mutant import Edit, Mutant
from dsv4_router_runtime.parameters import ABI

from .edits import deleted, parameter_as, pointer_off, unchecked_token_id
from .kernels import (
    ONE_BLOCK,
    TOPK,
    WRONG_IDS,
    WRONG_WEIGHT,
    given,
    hash_layer,
    of_kind,
    sm100,
    topk,
)

_FLAG = r"(selp\.b32 \t%r\d+, 0, )"

# The first 8 is the row's flag, the others are ranks.
_IMAGES = Edit(pattern=_FLAG + r"8(, %p\d+;)", replacement=r"\g<1>0\2", nth=0)
_PADDING = Edit(pattern=_FLAG + r"16(, %p\d+;)", replacement=r"\g<1>0\2")
_COUNT = Edit(
    pattern=r"(setp\.lt\.s32[^;]*;\s+selp\.b32 \t%r\d+, (%r\d+), )1(, %p\d+;)",
    replacement=r"\1\2\3",
    nth=0,
)
_HIGH_OF_IDS = deleted(r"st\.global\.b32 \t\[%rd\d+\+4\], [^;]*;")
_HIGH_OF_TOKEN = Edit(pattern=r"ld\.global\.b64(.*?);", replacement=r"ld.global.s32\1;")
_ALWAYS_A_ROW = Edit(
    pattern=r"(shfl\.sync\.idx\.b32 \t(%r\d+), %r\d+, 0, 31, -1;\s+)shr\.u32 \t(%r\d+), \2, 31;",
    replacement=r"\1mov.b32 \t\3, 0;",
)
_RANK = Edit(
    pattern=r"selp\.b32( \t%r\d+), 1, (%r\d+, %p\d+;\s+shfl)", replacement=r"selp.b32\1, 2, \2"
)
# A row is padding if either of two flags is set: the masks' \2, or the table's \3.
_IS_PADDING = r"or\.b32 (\t%r\d+), (%r\d+), (%r\d+);(\s+setp\.ne\.b32 \t%p\d+, %r\d+, 0;)"
_NO_TABLE = Edit(pattern=_IS_PADDING, replacement=r"mov.b32 \1, \2;\4")
_NO_MASKS = Edit(pattern=_IS_PADDING, replacement=r"mov.b32 \1, \3;\4")


_fixed = partial(parameter_as, "decode")
_OUT = "a token id out of the table is looked up"
_HAS_ROW = "a token id out of the table has a row"
_OUT_OF_BOUNDS = "out-of-bounds"
_ONE = "0f3F800000"
_HASH_GATE_TEMP = parameter_as("hash", "gate_temp", _ONE)

_WRONG_LOGICAL_ID, _WRONG_LOGIT = "a logical id is wrong", "a logit is wrong"
# A forced row that does not name top_k different experts is padding.
_UNKNOWN_FORCED = "a forced row that names an expert twice is taken"
UNKNOWN_OF_DECODE = Edit(pattern=r"(and\.b32 \t%r\d+, %r\d+, )255;", replacement=r"\g<1>0;")
_UNKNOWN_OF_HASH = Edit(
    pattern=r"vote\.sync\.ballot\.b32( \t%r\d+), %p\d+, -1;", replacement=r"mov.b32\1, 0;"
)
_UNKNOWN_OF_TOPK = Edit(
    pattern=r"vote\.sync\.any\.pred( \t%p\d+), %p\d+, %r\d+;", replacement=r"mov.pred\1, 0;"
)
# Option ignored -> the edit's parameter and its constant, or None for a pointer; the case's
# options; the complaint. Made for every role that has the parameter.
_ENGINE = (
    ("shared_weight", _ONE, ("shared",), WRONG_WEIGHT),
    ("weights_are_bfloat16", "0", ("bfloat16",), "out-of-bounds"),
    ("map_is_int64", "0", ("physical", "mapped64"), WRONG_IDS),
    ("num_image_ids", "0", ("image_ids",), WRONG_IDS),
    ("forced_ids", None, ("forced",), WRONG_IDS),
    ("forced_mask", None, ("forced",), WRONG_IDS),
    ("forced_ids_are_int64", "0", ("forced", "int64"), WRONG_IDS),
    ("out_logical_ids", None, ("physical", "logical"), _WRONG_LOGICAL_ID),
    ("out_logits", None, ("logits",), _WRONG_LOGIT),
)


def of_engines(
    make: Callable[..., Mutant], role: str, prefix: str, unknown: Edit, case: Case = ONE_BLOCK
) -> tuple[Mutant, ...]:
    """Return the mutants of a role's kernel that ignore an option, or forced ids."""
    names = {item.name for item in ABI[role]}
    rows = [
        (
            f"{prefix}{name} ignored",
            pointer_off(role, name) if value is None else parameter_as(role, name, value),
            replace(case, options=options),
            complaint,
        )
        for name, value, options, complaint in _ENGINE
        if name in names
    ]
    unchecked = (f"{prefix}{_UNKNOWN_FORCED}", unknown, replace(case, options=("forced",)))
    return of_kind(make, "option ignored", *rows) + of_kind(
        make, "unchecked forced ids", unchecked, complaint=WRONG_IDS
    )


DECODE = (
    *of_kind(
        *(sm100, "option ignored"),
        ("image_mask ignored", _IMAGES, given("images"), WRONG_IDS),
        ("image_mask ignored in a hash layer", _IMAGES, given("table", "images"), WRONG_IDS),
        ("padding ignored", _PADDING, given("padding"), WRONG_IDS),
        ("num_valid_tokens ignored", _COUNT, given("count"), WRONG_IDS),
        ("gate_temp ignored", _fixed("gate_temp", _ONE), given("temperature"), WRONG_WEIGHT),
        ("norm_topk_prob ignored", _fixed("norm_topk_prob", "1"), given("unnormed"), WRONG_WEIGHT),
        ("num_shared_slots ignored", _fixed("num_shared_slots", "0"), given("shared"), WRONG_IDS),
    ),
    *of_kind(
        *(sm100, "half of an id"),
        ("high words of 64-bit ids left out", _HIGH_OF_IDS, given("int64")),
        ("a token id's high word left out", _HIGH_OF_TOKEN, given("table", "unknown", "int64")),
        complaint=WRONG_IDS,
    ),
    *of_kind(
        *(sm100, "unchecked token id"),
        (_OUT, unchecked_token_id(), _OUT_OF_BOUNDS),
        (_HAS_ROW, _ALWAYS_A_ROW, WRONG_IDS),
        case=given("table", "unknown"),
    ),
    *of_kind(
        *(sm100, "wrong rank"),
        ("a hash layer's second slot ranks as its third", _RANK, given("table"), WRONG_IDS),
    ),
    *of_engines(sm100, "decode", "", UNKNOWN_OF_DECODE),
)

HASH = (
    *of_kind(
        *(hash_layer, "unchecked token id"),
        (f"hash: {_OUT}", unchecked_token_id(), _OUT_OF_BOUNDS),
        (f"hash: {_HAS_ROW}", _NO_TABLE, WRONG_IDS),
        case=given("unknown"),
    ),
    *of_kind(
        *(hash_layer, "option ignored"),
        ("hash: padding ignored", _NO_MASKS, given("padding"), WRONG_IDS),
        ("hash: gate_temp ignored", _HASH_GATE_TEMP, given("temperature"), WRONG_WEIGHT),
    ),
    *of_engines(hash_layer, "hash", "hash: ", _UNKNOWN_OF_HASH),
)

TOPK_OPTIONS = of_engines(topk, "select", "top-k: ", _UNKNOWN_OF_TOPK, TOPK)
