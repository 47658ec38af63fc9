"""The kernels' PTX, executed on a CPU by the emulator, against the exact oracle: bit for bit.

The order of the sums is the PTX's, so these tests hold it to the contract on every architecture.
"""

from __future__ import annotations

from dataclasses import replace

import pytest

pytest.importorskip("elftools", reason="needs dsv4-router-builder")
pytest.importorskip("numpy", reason="needs the extra `verify`")
pytest.importorskip("torch", reason="the oracle needs the extra `torch`")

import numpy as np
import torch
from builds import ARCHS, kernel_set

from build_kernels.emulator import Schedule
from build_kernels.emulator.numerics import tensor_core
from build_kernels.evidence.artifact import load_artifact
from build_kernels.evidence.cases import Case
from build_kernels.evidence.inputs import SCALE, make_inputs
from build_kernels.evidence.rungs import emulated
from build_kernels.specs import KERNELS
from dsv4_router_runtime.exact import exact_logits, exact_selection, fused_sum

DECODE = [spec.name for spec in KERNELS if spec.role == "decode"]
PREFILL = [spec.name for spec in KERNELS if spec.role == "prefill"]


@pytest.fixture(scope="module")
def artifacts(tmp_path_factory):
    folder = tmp_path_factory.mktemp("exact") / "artifacts"
    return kernel_set(folder, [spec.name for spec in KERNELS], ARCHS)


@pytest.fixture
def random(seed):
    return torch.Generator().manual_seed(seed)


def binades(random, count: int, *shape):
    """Gaussian numbers over that many binades."""
    powers = torch.randint(-count // 2, count // 2 + 1, shape, generator=random)
    return (torch.randn(*shape, generator=random) * torch.exp2(powers)).to(torch.bfloat16)


def bits(tensor: torch.Tensor) -> np.ndarray:
    return tensor.contiguous().view(torch.int16).numpy().view(np.uint16)


def with_exact(inputs, x, w, options):
    """The inputs of a case with other factors, and the exact oracle's outputs."""
    logits = exact_logits(x, w)
    bias = None if "tid2eid" in options else torch.from_numpy(inputs.tensors["e_bias"])
    weights, ids = exact_selection(logits, bias, SCALE, inputs.case.top_k, **options)
    tensors = {**inputs.tensors, "hidden_states": bits(x), "W_gate": bits(w)}
    return replace(
        inputs, tensors=tensors, logits=logits.numpy(), weights=weights.numpy(), ids=ids.numpy()
    )


def check(artifact, inputs) -> None:
    outcome = emulated.run(artifact.kernel, artifact.ptx, inputs, Schedule(policy="random", seed=1))
    assert outcome.problems == ()
    np.testing.assert_array_equal(outcome.ids, inputs.ids)
    expected = inputs.weights.view(np.uint32)
    np.testing.assert_array_equal(outcome.weights.view(np.uint32), expected)


@pytest.mark.slow
@pytest.mark.parametrize("arch", ARCHS)
@pytest.mark.parametrize("name", DECODE)
def test_decode_has_the_bits_of_the_contract(artifacts, random, name, arch):
    """K of 33 blocks: slices of two blocks and one of three; logits out, over 8 binades."""
    artifact = load_artifact(artifacts, f"{name}.{arch}")
    tile = artifact.kernel.launch.token_tile
    case = Case(num_tokens=tile - 1, num_experts=40, top_k=6, k=33 * 64, options=("logits",))
    inputs = make_inputs(artifact.kernel, case)
    x, w = binades(random, 4, tile - 1, case.k), binades(random, 4, case.k, 40) / 64
    check(artifact, with_exact(inputs, x, w, {}))


@pytest.mark.slow
@pytest.mark.parametrize("arch", ARCHS)
@pytest.mark.parametrize("name", PREFILL)
def test_prefill_has_the_bits_of_the_contract(artifacts, random, name, arch):
    """Two tiles of tokens and two of experts, K of 17 blocks; logits out, over 4 binades."""
    artifact = load_artifact(artifacts, f"{name}.{arch}")
    num_tokens = artifact.kernel.launch.token_tile + 1
    case = Case(num_tokens=num_tokens, num_experts=100, top_k=6, k=17 * 64, options=("logits",))
    inputs = make_inputs(artifact.kernel, case)
    x, w = binades(random, 4, num_tokens, case.k), binades(random, 4, case.k, 100) / 64
    check(artifact, with_exact(inputs, x, w, {}))


@pytest.mark.slow
@pytest.mark.parametrize("arch", ARCHS)
def test_hash_has_the_bits_of_the_contract(artifacts, random, arch):
    artifact = load_artifact(artifacts, f"router_hash.{arch}")
    case = Case(num_tokens=5, num_experts=40, top_k=6, k=17 * 64)
    inputs = make_inputs(artifact.kernel, case)
    x, w = binades(random, 4, 5, case.k), binades(random, 4, case.k, 40) / 64
    table = {name: torch.from_numpy(inputs.tensors[name]) for name in ("tid2eid", "input_ids")}
    check(artifact, with_exact(inputs, x, w, table))


@pytest.mark.slow
@pytest.mark.parametrize("arch", ARCHS)
def test_topk_has_the_bits_of_its_logits(artifacts, random, arch):
    artifact = load_artifact(artifacts, f"router_topk.{arch}")
    inputs = make_inputs(artifact.kernel, Case(num_tokens=70, num_experts=40, top_k=6))
    logits = torch.randn(70, 40, generator=random) * 4
    bias = torch.from_numpy(inputs.tensors["e_bias"])
    weights, ids = (each.numpy() for each in exact_selection(logits, bias, SCALE, 6))
    tensors = {**inputs.tensors, "logits": logits.numpy()}
    check(artifact, replace(inputs, tensors=tensors, weights=weights, ids=ids))


@pytest.mark.parametrize("spread", [2, 24, 60, 250])
def test_both_statements_of_a_step_agree(random, spread):
    """The emulator's, in NumPy, and the oracle's, in torch; zeros and denormals included."""
    a, b = binades(random, spread, 40, 16), binades(random, spread, 24, 16)
    a[torch.rand(40, 16, generator=random) < 0.2] = 0
    d = binades(random, spread, 40, 24).float() * 1.001
    of_numpy = tensor_core.multiply_add(
        a.double().numpy(), b.double().numpy(), d.numpy(), (True, True)
    )
    of_a, of_b = (
        ((each.view(torch.int16) >> 7 & 0xFF).clamp(min=1) - 127).short() for each in (a, b)
    )
    products = a.double()[:, None] * b.double()
    of_torch = fused_sum(d, products, of_a[:, None] + of_b)
    np.testing.assert_array_equal(of_numpy.view(np.uint32), of_torch.numpy().view(np.uint32))
