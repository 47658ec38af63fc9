"""transformers' own test suite of DeepSeek-V4, run with this router in its models.

    DSV4_JUDGE_TRANSFORMERS=.../transformers \
        python -m pytest tests/judges/transformers_bridge.py

The folder is a checkout of transformers' repository, of the installed version: the suite imports
most of it from `tests`. No line of it is kept here. Its models are in FP32, and this router's are
in BF16: see `exact_gate`. The suite compares a model with itself, so each call is also compared
with transformers' own router. It has learned routers; it runs a second time with a hash layer.

| left out | reason |
| --- | --- |
| pipelines, FSDP, tensor and expert parallelism | they need other libraries or several processes |
| tests of published checkpoints, and those marked slow | they need downloads, or minutes |
| calls that want a gradient or record router logits | the adapter leaves them to the model |
| with a hash layer: those of `LEFT_OUT_WITH_HASH` | each has its reason there |
"""

from __future__ import annotations

import importlib
import os
import sys
import unittest
from collections import Counter
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any
from unittest import mock

import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
model_code = pytest.importorskip("transformers.models.deepseek_v4.modeling_deepseek_v4")

from exact_gates import exact_gate  # noqa: E402
from transformers import initialization as init  # noqa: E402

from dsv4_router_runtime.integrations import transformers as served  # noqa: E402

VARIABLE = "DSV4_JUDGE_TRANSFORMERS"
SUITE = "tests.models.deepseek_v4.test_modeling_deepseek_v4"
LEFT_OUT = ("pipeline", "fsdp", "tensor_parallel", "expert_parallel")
NO_INPUT_IDS = "no hash router can route inputs_embeds without input_ids"
LEFT_OUT_WITH_HASH = {
    "test_generate_continue_from_inputs_embeds": NO_INPUT_IDS,
    "test_generate_from_inputs_embeds_0_greedy": NO_INPUT_IDS,
    "test_generate_from_inputs_embeds_1_beam_search": NO_INPUT_IDS,
    "test_generate_from_random_inputs_embeds": NO_INPUT_IDS,
    "test_inputs_embeds": NO_INPUT_IDS,
    "test_inputs_embeds_matches_input_ids": NO_INPUT_IDS,
    "test_resize_tokens_embeddings": "tid2eid keeps the rows that it was made for",
    "test_init_weights_can_init_buffers": "its tid2eid would be zeros, one expert twice",
}
if transformers.__version__.startswith("5.17."):
    LEFT_OUT_WITH_HASH["test_keep_in_fp32_modules"] = "transformers 5.17 fails it by itself"
pytestmark = pytest.mark.serving
# The class of a router -> its calls that were served.
calls: Counter[type] = Counter()


def route(self: Any, stock: Any, served_route: Any, hidden_states: Any, *input_ids: Any) -> Any:
    """Route with FP32 operands as the adapter does with BF16 ones, and compare the stock router."""
    if self.weight.dtype is not torch.float32:
        return served_route(self, hidden_states, *input_ids)
    rows = hidden_states.reshape(-1, self.hidden_dim)
    parts, weight = exact_gate(rows, self.weight)
    layer = SimpleNamespace(**vars(self) | self._buffers | self._modules)
    layer.weight, layer.hidden_dim = weight, weight.shape[1]
    expected = stock.forward(self, hidden_states, *input_ids)
    if served._model_routes(layer, parts):
        return expected
    out = served_route(layer, parts, *input_ids)
    if not torch.compiler.is_compiling():
        calls[stock] += 1
        compare(self, out, expected)
    return out


def compare(router: Any, out: Any, expected: Any) -> None:
    """Compare weights and chosen experts with those of transformers' router."""
    _, weights, ids = out
    logits, _, stock_ids = expected
    scores = router.score_fn(logits)
    keys = scores + getattr(router, "e_score_correction_bias", 0)
    chosen, stock_chosen = (keys.gather(1, each).sort(1).values for each in (ids, stock_ids))
    torch.testing.assert_close(chosen, stock_chosen, rtol=1e-6, atol=1e-6)
    assert (ids.sort(1).values.diff(dim=1) > 0).all()
    of_ids = scores.gather(1, ids)
    of_ids = of_ids / of_ids.sum(1, keepdim=True) * router.routed_scaling_factor
    torch.testing.assert_close(weights, of_ids, rtol=2e-6, atol=0)


class JudgedTopKRouter(served.TopKRouter):
    """The learned router under test."""

    def forward(self, hidden_states):
        return route(self, served.TopKRouter, served.route_top_k, hidden_states)


class JudgedHashRouter(served.HashRouter):
    """The hash router under test."""

    def forward(self, hidden_states, input_ids):
        return route(self, served.HashRouter, served.route_hash, hidden_states, input_ids)


def stand_in(name: str) -> ModuleType:
    """Return a module whose test mixins have no tests."""

    def mixin(name: str) -> type:
        if not name.endswith("Mixin"):
            raise AttributeError(name)
        return type(name, (), {})

    module = ModuleType(name)
    vars(module)["__getattr__"] = mixin
    return module


def load(checkout: Path) -> ModuleType:
    """Import the suite from a checkout."""
    for name in (f"tests.test_{each}_mixin" for each in LEFT_OUT):
        sys.modules[name] = stand_in(name)
    path = [str(checkout), str(checkout / "utils"), *sys.path]
    with (
        mock.patch.object(sys, "path", path),
        # Its marks are its own checkout's to declare.
        mock.patch.object(pytest.mark, "_config", None),
    ):
        return importlib.import_module(SUITE)


if not os.environ.get(VARIABLE):
    pytest.skip(f"{VARIABLE} names no checkout of transformers", allow_module_level=True)
suite = load(Path(os.environ[VARIABLE]))


class WithHashLayer(suite.DeepseekV4ModelTester):  # type: ignore[name-defined]
    """The suite's tiny model, whose first router is a hash router."""

    def __init__(self, *given: Any, **more: Any) -> None:
        super().__init__(*given, **more)
        self.mlp_layer_types = ["hash_moe", "moe"]


def init_weights(self: Any, module: Any) -> None:
    """Give hash routers a table of distinct experts, where transformers leaves zeros."""
    stock_init_weights(self, module)
    if isinstance(module, served.HashRouter):
        vocabulary, top_k = module.tid2eid.shape
        rows = torch.arange(vocabulary)[:, None] + torch.arange(top_k)
        init.copy_(module.tid2eid, rows % module.num_experts)


stock_init_weights = model_code.DeepseekV4PreTrainedModel._init_weights


@pytest.fixture(autouse=True)
def _judged(monkeypatch):
    monkeypatch.setattr(model_code, "DeepseekV4TopKRouter", JudgedTopKRouter)
    monkeypatch.setattr(model_code, "DeepseekV4HashRouter", JudgedHashRouter)
    monkeypatch.setattr(model_code.DeepseekV4PreTrainedModel, "_init_weights", init_weights)


class TestLearned(suite.DeepseekV4ModelTest):  # type: ignore[name-defined]
    """The suite as it is."""


class TestHash(suite.DeepseekV4ModelTest):  # type: ignore[name-defined]
    """The suite with a hash layer."""

    model_tester_class = WithHashLayer


for name, reason in LEFT_OUT_WITH_HASH.items():
    setattr(TestHash, name, unittest.skip(f"left out: {reason}")(getattr(TestHash, name)))


def test_the_suite_was_served() -> None:
    """Of each router hundreds of calls were compared; a case or two alone is not the suite."""
    print(dict(calls))
    assert min(calls[stock] for stock in (served.TopKRouter, served.HashRouter)) > 100
