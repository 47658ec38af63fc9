"""Recipes turned into what cuTensorMapEncodeTiled is asked for."""

from __future__ import annotations

import re
from dataclasses import replace

import pytest
from conftest import decode_kernel

from dsv4_router_runtime.tensor_map import encode_arguments

ADDRESS = 0x7F0000001000


def recipe(layout: str = "kmajor", which: int = 0):
    return decode_kernel(layout=layout).parameters[which].tensor_map


def test_kmajor_weights():
    sizes, strides = {"K": 7168, "E": 384}, {"K": 1, "E": 7168}
    got = encode_arguments(recipe(), address=ADDRESS, sizes=sizes, strides=strides)
    assert got.dims == (7168, 384)
    assert got.strides == (14336,)
    assert got.box == (64, 64)
    assert got.element_strides == (1, 1)
    assert (got.swizzle, got.interleave, got.l2_promotion) == ("128B", "none", "256B")
    assert (got.element_type, got.oob_fill, got.address) == ("bfloat16", "zeros", ADDRESS)


def test_emajor_weights():
    sizes, strides = {"K": 4096, "E": 256}, {"K": 512, "E": 1}
    got = encode_arguments(recipe("emajor"), address=ADDRESS, sizes=sizes, strides=strides)
    assert got.dims == (256, 4096)
    assert got.strides == (1024,)


def test_hidden_states_with_a_padded_row():
    sizes, strides = {"N": 6, "K": 5120}, {"N": 6144, "K": 1}
    got = encode_arguments(recipe(which=1), address=ADDRESS, sizes=sizes, strides=strides)
    assert got.dims == (5120, 6)
    assert got.strides == (12288,)
    assert got.box == (64, 16)


@pytest.mark.parametrize("meaningless", [0, 1, 3, 2**62])
def test_stride_of_a_single_row_is_replaced(meaningless):
    sizes, strides = {"N": 1, "K": 5120}, {"N": meaningless, "K": 1}
    got = encode_arguments(recipe(which=1), address=ADDRESS, sizes=sizes, strides=strides)
    assert got.strides == (10240,)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"address": ADDRESS + 8}, "hidden_states: expected an address aligned to 16 bytes"),
        ({"strides": {"N": 5120, "K": 2}}, "expected unit stride along K (got 2)"),
        ({"strides": {"N": 5121, "K": 1}}, "expected a stride along N that is a positive multiple"),
        ({"strides": {"N": 0, "K": 1}}, "expected a stride along N that is a positive multiple"),
        ({"strides": {"N": 2**39, "K": 1}}, "expected a stride along N"),
        ({"sizes": {"N": 0, "K": 5120}}, "expected sizes from 1 to 2**32"),
    ],
)
def test_what_the_driver_would_refuse(change, message):
    facts = {"address": ADDRESS, "sizes": {"N": 6, "K": 5120}, "strides": {"N": 5120, "K": 1}}
    with pytest.raises(ValueError, match=re.escape(message)):
        encode_arguments(recipe(which=1), **(facts | change))


@pytest.mark.parametrize(
    ("box", "swizzle"), [((128, 16), "128B"), ((64, 16), "64B"), ((4, 4), "none")]
)
def test_box_rows_must_fit_the_swizzle(box, swizzle):
    bad = replace(recipe(which=1), box=box, swizzle=swizzle)
    sizes, strides = {"N": 6, "K": 5120}, {"N": 5120, "K": 1}
    with pytest.raises(ValueError, match="hidden_states: expected box rows"):
        encode_arguments(bad, address=ADDRESS, sizes=sizes, strides=strides)
