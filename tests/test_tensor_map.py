"""Recipes turned into what cuTensorMapEncodeTiled is asked for."""

from __future__ import annotations

import re
from dataclasses import replace

import pytest
from conftest import decode_kernel

from dsv4_router_runtime.device.tensor_map import encode_arguments, hidden_states_arguments

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


def hidden_states(recipe=None, **more):
    facts = {"address": ADDRESS, "num_tokens": 6, "k": 5120, "row_stride": 6144} | more
    return hidden_states_arguments(recipe or BLOCKED, **facts)


BLOCKED = recipe(which=1)
WHOLE = replace(BLOCKED, dims=("K", "N"), box=(64, 16))


def test_hidden_states_in_blocks_with_a_padded_row():
    got = hidden_states()
    assert got.dims == (64, 6, 80)
    assert got.strides == (12288, 128)
    assert got.box == (64, 8, 4)
    assert got.element_strides == (1, 1, 1)


def test_hidden_states_whole():
    got = hidden_states(WHOLE)
    assert (got.dims, got.strides, got.box) == ((5120, 6), (12288,), (64, 16))


@pytest.mark.parametrize("meaningless", [0, 1, 3, 2**62])
def test_stride_of_a_single_row_is_replaced(meaningless):
    assert hidden_states(WHOLE, num_tokens=1, row_stride=meaningless).strides == (10240,)
    assert hidden_states(num_tokens=1, row_stride=meaningless).strides == (128, 128)


def test_single_block():
    got = hidden_states(k=64, row_stride=64)
    assert got.dims == (64, 6, 1)
    # One block is never stepped along: its stride is six rows of 128 bytes, packed.
    assert got.strides == (128, 768)


def test_stride_of_a_single_row_is_packed_and_aligned():
    """One row of three experts, 6 bytes, whose stride the driver still wants as 16 bytes."""
    sizes, strides = {"K": 1, "E": 3}, {"K": 5, "E": 1}
    got = encode_arguments(recipe("emajor"), address=ADDRESS, sizes=sizes, strides=strides)
    assert (got.dims, got.strides) == ((3, 1), (16,))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"address": ADDRESS + 8}, "hidden_states: expected an address aligned to 16 bytes"),
        ({"row_stride": 5121}, "expected a stride along N that is a positive multiple"),
        ({"row_stride": 0}, "expected a stride along N that is a positive multiple"),
        ({"row_stride": 2**39}, "expected a stride along N"),
        ({"num_tokens": 0}, "expected sizes from 1 to 2**32"),
        ({"k": 5100}, "hidden_states: expected K in multiples of 64 (got 5100)"),
    ],
)
def test_what_the_driver_would_refuse(change, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        hidden_states(**change)


def test_unit_stride_is_required():
    sizes, strides = {"K": 7168, "E": 384}, {"K": 2, "E": 14336}
    with pytest.raises(ValueError, match=r"W_gate: expected unit stride along K \(got 2\)"):
        encode_arguments(recipe(), address=ADDRESS, sizes=sizes, strides=strides)


@pytest.mark.parametrize(
    ("box", "swizzle"), [((128, 16), "128B"), ((64, 16), "64B"), ((4, 4), "none")]
)
def test_box_rows_must_fit_the_swizzle(box, swizzle):
    with pytest.raises(ValueError, match="hidden_states: expected box rows"):
        hidden_states(replace(WHOLE, box=box, swizzle=swizzle))
