"""The self-test's inputs take every step of its layers, and its results are the reference's."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

torch = pytest.importorskip("torch", reason="torch is the caller's and is not installed here")

from dsv4_router_runtime.artifacts.dispatch import LayerProblem, plan_layer  # noqa: E402
from dsv4_router_runtime.artifacts.kernel import LAYOUTS  # noqa: E402
from dsv4_router_runtime.artifacts.manifest import parse_manifest  # noqa: E402
from dsv4_router_runtime.doctor import inputs  # noqa: E402
from dsv4_router_runtime.reference import router_reference  # noqa: E402


def test_the_self_test_takes_every_step_of_its_layers_and_the_product():
    manifest = parse_manifest(
        (Path(__file__).parents[1] / "artifacts" / "manifest.json").read_bytes()
    )
    ends, ends_of_same_bits = {1}, set()
    for arch in manifest.driver:
        for layout in LAYOUTS:
            layer = LayerProblem(
                layout=layout,
                tma_loadable=True,
                hashed=False,
                num_experts=inputs.EXPERTS,
                top_k=inputs.TOP_K,
                k=inputs.K,
            )
            steps = plan_layer(manifest, layer, arch).steps
            assert steps[-1].is_product_and_select
            ends |= {step.max_tokens for step in steps[:-1]} | {steps[-2].max_tokens + 1}
            *_, last, pieces = plan_layer(manifest, replace(layer, same_bits=True), arch).steps
            ends_of_same_bits |= {last.max_tokens, pieces.piece_tokens + 1}
    assert sorted(ends) == list(inputs.TOKENS)
    assert sorted(ends_of_same_bits) == list(inputs.TOKENS_OF_SAME_BITS)


def tensor(content, dtype, *shape):
    return torch.frombuffer(bytearray(content), dtype=dtype).view(shape)


def test_the_exact_results_of_the_self_test_are_the_references():
    drawn = inputs.make_inputs()
    n, k, experts, top_k = inputs.MAX_TOKENS, inputs.K, inputs.EXPERTS, inputs.TOP_K
    x = tensor(drawn.x, torch.bfloat16, n, k)
    W = tensor(drawn.W_gate["kmajor"], torch.bfloat16, experts, k).t()
    assert torch.equal(W, tensor(drawn.W_gate["emajor"], torch.bfloat16, k, experts))
    assert 0.01 < (x != 0).double().mean() < 0.03
    logits = tensor(drawn.logits, torch.float32, n, experts)
    assert torch.equal(logits.double(), x.double() @ W.double())
    bias = tensor(drawn.e_bias, torch.float32, experts)
    table = tensor(drawn.table, torch.int32, inputs.VOCABULARY, top_k)
    token_ids = tensor(drawn.token_ids, torch.int64, n)
    for hashed, (e_bias, options) in {
        False: (bias, {}),
        True: (None, {"tid2eid": table, "input_ids": token_ids}),
    }.items():
        weights, ids = router_reference(x, W, e_bias, inputs.SCALE, top_k, **options)
        assert ids.tolist() == [row for row, _ in drawn.expected[hashed]]
        exact = torch.tensor([row for _, row in drawn.expected[hashed]], dtype=torch.float64)
        torch.testing.assert_close(weights, exact, rtol=1e-12, atol=0)


def test_the_keys_of_the_self_test_are_equal_or_far_apart():
    """Ids are compared bit for bit: no two keys may be as close as FP32 rounds."""
    drawn = inputs.make_inputs()
    logits = tensor(drawn.logits, torch.float32, inputs.MAX_TOKENS, inputs.EXPERTS).double()
    bias = tensor(drawn.e_bias, torch.float32, inputs.EXPERTS)
    keys = torch.nn.functional.softplus(logits).sqrt() + bias.double()
    gaps = keys.sort(dim=1).values.diff(dim=1)
    assert gaps[gaps > 1e-12].min() > 1e-5
    assert (gaps <= 1e-12).any()


def test_the_numbers_of_the_self_test_take_a_quarter_of_a_second():
    """Drawn and computed in a fresh interpreter, in CPU time, once in three times."""
    code = """
import time
from dsv4_router_runtime.doctor import selftest
start = time.process_time()
selftest.make_inputs()
print(time.process_time() - start)
"""
    run = [sys.executable, "-c", code]
    runs = (subprocess.run(run, capture_output=True, check=True) for _ in range(3))
    assert any(float(each.stdout) < 0.25 for each in runs)
