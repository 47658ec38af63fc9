"""router_topk's PTX, executed on a CPU by the emulator, against the oracle."""

from __future__ import annotations

from pathlib import Path

import pytest

pytest.importorskip("elftools", reason="needs the extra `build`")
pytest.importorskip("numpy", reason="needs the extra `verify`")
pytest.importorskip("torch", reason="the oracle needs the extra `torch`")

import numpy as np
import torch

from build_kernels import compilers
from build_kernels.emulator import DeviceArray, Launch, Schedule, emulate
from build_kernels.specs import ARCHITECTURES, KERNELS, CudaSource
from dsv4_router_runtime.reference import ranking_margin, select_reference

(SPEC,) = (spec for spec in KERNELS if isinstance(spec.source, CudaSource))
SCALE = 2.5
CANARY_WEIGHT, CANARY_ID = 7.0, -7
# One for each number of register groups, whole and ragged, and the smallest.
SHAPES = [(1, 1), (8, 8), (128, 3), (132, 4), (144, 6), (216, 6), (256, 6), (384, 6), (512, 8)]


@pytest.fixture(scope="module")
def ptx() -> dict[str, str]:
    archs = [arch.name for arch in ARCHITECTURES]
    return {arch: compilers.compile_kernel(SPEC, arch, Path("unused")).ptx for arch in archs}


def route(ptx: dict[str, str], arch: str, logits, bias, top_k: int):
    """Weights and ids of the emulated kernel; it must have no findings and keep to its outputs."""
    num_tokens, num_experts = logits.shape
    # Rows further apart than they are long, with NaN between: reading it would show.
    padded = np.full((num_tokens, num_experts + 5), np.nan, np.float32)
    padded[:, :num_experts] = logits
    weights = np.full((num_tokens, top_k + 2), CANARY_WEIGHT, np.float32)
    ids = np.full((num_tokens, top_k + 1), CANARY_ID, np.int32)
    result = emulate(
        ptx[arch],
        Launch(grid=(-(-num_tokens // SPEC.token_tile), 1, 1), block=SPEC.source.block, arch=arch),
        [
            DeviceArray(name="logits", data=padded, read_only=True, dependent=True),
            DeviceArray(name="e_bias", data=bias, read_only=True),
            DeviceArray(name="out_weights", data=weights),
            DeviceArray(name="out_ids", data=ids),
            *(num_tokens, num_experts, top_k, np.float32(SCALE)),
            *(padded.shape[1], weights.shape[1], ids.shape[1]),
        ],
        Schedule(seed=num_experts),
    )
    assert result.findings == ()
    got_weights, got_ids = result.memory["out_weights"], result.memory["out_ids"]
    assert (got_weights[:, top_k:] == CANARY_WEIGHT).all()
    assert (got_ids[:, top_k:] == CANARY_ID).all()
    return got_weights[:, :top_k], got_ids[:, :top_k]


def check(ptx: dict[str, str], arch: str, logits, bias, top_k: int) -> None:
    weights, ids = route(ptx, arch, logits, bias, top_k)
    as_double = torch.from_numpy(logits).double()
    wanted, wanted_ids = select_reference(as_double, torch.from_numpy(bias), SCALE, top_k)
    np.testing.assert_array_equal(ids, wanted_ids.numpy())
    assert np.isfinite(weights).all()
    np.testing.assert_allclose(weights, wanted.numpy(), rtol=1e-6, atol=1e-30)


def clear_gaussians(num_tokens: int, num_experts: int, top_k: int, bias_mean: float):
    """Rows whose first top_k + 1 keys are apart by more than FP32's rounding of a key near 8."""
    generator = np.random.default_rng(num_experts * 8 + top_k)
    bias = generator.normal(bias_mean, 0.05, num_experts).astype(np.float32)
    rows: list = []
    while len(rows) < num_tokens:
        row = generator.normal(0, 3, (1, num_experts)).astype(np.float32)
        margin = ranking_margin(torch.from_numpy(row).double(), torch.from_numpy(bias), top_k)
        if margin.item() > 1e-5:
            rows.append(row)
    return np.concatenate(rows), bias


@pytest.mark.parametrize("arch", ["sm_90a", "sm_100a"])
@pytest.mark.parametrize(("num_experts", "top_k"), SHAPES)
def test_real_bias_scale(ptx: dict[str, str], arch: str, num_experts: int, top_k: int) -> None:
    logits, bias = clear_gaussians(3, num_experts, top_k, 8.08)
    check(ptx, arch, logits, bias, top_k)


@pytest.mark.parametrize("num_tokens", [1, 4, 5, 9])
def test_every_number_of_tokens_in_a_block(ptx: dict[str, str], num_tokens: int) -> None:
    logits, bias = clear_gaussians(num_tokens, 160, 6, 0.0)
    check(ptx, "sm_100a", logits, bias, 6)


@pytest.mark.parametrize("top_k", range(1, 9))
def test_every_top_k(ptx: dict[str, str], top_k: int) -> None:
    logits, bias = clear_gaussians(2, 144, top_k, 0.0)
    check(ptx, "sm_90a", logits, bias, top_k)


@pytest.mark.parametrize(("num_experts", "top_k"), [(8, 8), (132, 4), (384, 6)])
def test_equal_keys_go_to_the_lower_expert(
    ptx: dict[str, str], num_experts: int, top_k: int
) -> None:
    bias = np.zeros(num_experts, np.float32)
    equal = np.full((1, num_experts), 1.25, np.float32)
    _, ids = route(ptx, "sm_90a", equal, bias, top_k)
    assert ids.tolist() == [list(range(top_k))]
    # Few distinct values, so that lanes and a lane's own slots tie with each other.
    generator = np.random.default_rng(num_experts)
    logits = generator.integers(-1, 2, (4, num_experts)).astype(np.float32)
    check(ptx, "sm_90a", logits, bias, top_k)


def test_nan_and_infinity(ptx: dict[str, str]) -> None:
    generator = np.random.default_rng(7)
    logits = generator.integers(-8, 8, (6, 132)).astype(np.float32)
    logits[0, 3:70] = np.nan
    logits[1, :] = np.nan
    logits[2, :] = -np.inf
    logits[3, 5:100] = np.inf
    logits[4, :] = np.nan
    logits[4, [7, 100]] = [-np.inf, 2.0]  # fewer numbers than top_k
    logits[5, ::2] = -np.inf
    check(ptx, "sm_90a", logits, np.zeros(132, np.float32), 6)
    check(ptx, "sm_100a", logits, np.zeros(132, np.float32), 6)


def test_extreme_logits(ptx: dict[str, str]) -> None:
    """Where naive formulas of softplus overflow, underflow or lose all digits."""
    steps = np.linspace(1.0, 1.7, 128, dtype=np.float32)
    for scale in (-100.0, -88.0, -20.0, -16.6, -1.0, -1e-3, 1e-3, 20.0, 88.7, 100.0, 1e30):
        logits = (steps * np.float32(scale))[None, :].copy()
        check(ptx, "sm_90a", logits, np.zeros(128, np.float32), 8)
