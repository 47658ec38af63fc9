"""Grid arithmetic, and parameters laid out as the driver reads them."""

from __future__ import annotations

import ctypes
from dataclasses import replace

import pytest
from conftest import decode_kernel, topk_kernel

from dsv4_router_runtime.device import driver
from dsv4_router_runtime.device.launch import (
    ParameterBlock,
    ceil_div,
    grid_depends_on_tokens,
    grid_of,
    launch_config,
)

PER_THREAD = "CUDA_PYTHON_CUDA_PER_THREAD_DEFAULT_STREAM"


@pytest.mark.parametrize(
    ("value", "divisor", "result"), [(0, 4, 0), (1, 4, 1), (4, 4, 1), (5, 4, 2)]
)
def test_ceil_div(value, divisor, result):
    assert ceil_div(value, divisor) == result


@pytest.mark.parametrize(
    ("num_experts", "grid"),
    [(1, (16, 1, 1)), (64, (16, 1, 1)), (65, (16, 2, 1)), (512, (16, 8, 1))],
)
def test_decode_grid(num_experts, grid):
    assert grid_of(decode_kernel().launch, num_tokens=64, num_experts=num_experts) == grid


@pytest.mark.parametrize(("num_tokens", "blocks"), [(1, 1), (4, 1), (5, 2), (8192, 2048)])
def test_topk_grid(num_tokens, blocks):
    assert grid_of(topk_kernel().launch, num_tokens=num_tokens, num_experts=8) == (blocks, 1, 1)


def test_grid_must_be_whole_clusters():
    launch = replace(decode_kernel().launch, k_splits=24)
    with pytest.raises(ValueError, match=r"grid.x: expected a multiple of the cluster's 16"):
        grid_of(launch, num_tokens=1, num_experts=384)


@pytest.mark.parametrize(("axis", "limit"), [(0, 2**31 - 1), (1, 65535), (2, 65535)])
def test_grid_limits_of_each_axis(axis, limit):
    grid = [1, 1, 1]
    grid[axis] = "token_tiles"
    launch = replace(topk_kernel().launch, grid=tuple(grid))
    assert grid_of(launch, num_tokens=4 * limit, num_experts=8)[axis] == limit
    message = rf"grid.{'xyz'[axis]}: expected .* from 1 to {limit} \(got {limit + 1} "
    with pytest.raises(ValueError, match=message):
        grid_of(launch, num_tokens=4 * limit + 1, num_experts=8)


def test_empty_grid():
    with pytest.raises(
        ValueError, match=r"grid.x: expected .* from 1 to .*\(got 0 for num_tokens=0"
    ):
        grid_of(topk_kernel().launch, num_tokens=0, num_experts=8)


def test_whose_grid_follows_the_tokens():
    assert grid_depends_on_tokens(topk_kernel().launch)
    assert not grid_depends_on_tokens(decode_kernel().launch)


def read_back(block: ParameterBlock) -> dict[str, bytes]:
    """What the driver would copy: for each parameter, `size` bytes behind its pointer."""
    count = len(block.kernel.parameters)
    pointers = (ctypes.c_uint64 * count).from_address(block.address)
    return {
        parameter.name: ctypes.string_at(pointer, parameter.size)
        for parameter, pointer in zip(block.kernel.parameters, pointers, strict=True)
    }


def test_parameters_reach_the_driver():
    block = ParameterBlock(decode_kernel())
    w_map = ctypes.create_string_buffer(b"w" * 128, 128)
    x_map = ctypes.create_string_buffer(b"x" * 128, 128)
    block.set({"w_map": ctypes.addressof(w_map), "x_map": ctypes.addressof(x_map)})
    block.set({"partials": 2**63 + 1, "num_tokens": -1, "routed_scaling_factor": 2.5})
    got = read_back(block)
    assert got["w_map"] == b"w" * 128
    assert got["x_map"] == b"x" * 128
    assert got["partials"] == (2**63 + 1).to_bytes(8, "little")
    assert got["num_tokens"] == b"\xff" * 4
    assert got["routed_scaling_factor"] == bytes(ctypes.c_float(2.5))
    assert len(got) == len(decode_kernel().parameters)


def test_cells_are_live():
    block = ParameterBlock(topk_kernel())
    for value in (7, 8):
        block.cells["top_k"].value = value
        assert read_back(block)["top_k"] == value.to_bytes(4, "little")


def test_unknown_parameter():
    with pytest.raises(KeyError, match="no parameter named w_stride"):
        ParameterBlock(topk_kernel()).set({"w_stride": 1})


@pytest.mark.parametrize(
    ("value", "given", "taken"),
    [(None, 0, 0), ("1", 0, 1), ("1", 2, 2), ("1", 0x70, 0x70), (None, 0x70, 0x70)],
)
def test_torchs_null_stream_is_one_stream_whatever_the_bindings_default_is(
    monkeypatch, value, given, taken
):
    """Two threads launch on it with one slot of scratch; 0 would be a stream of each thread's."""
    bindings = pytest.importorskip("cuda.bindings.driver")
    monkeypatch.setattr(driver, "bindings", lambda: bindings)
    if value is None:
        monkeypatch.delenv(PER_THREAD, raising=False)
    else:
        monkeypatch.setenv(PER_THREAD, value)
    kernel = decode_kernel()
    config = launch_config(kernel, grid=(16, 1, 1), shared_bytes=0, stream=given, pdl=False)
    assert int(config.hStream) == taken
