"""SGLang's own tests of its routers, run against this one.

    DSV4_JUDGE_SGLANG=.../test/registered/kernels/ops/moe \
        python -m pytest tests/judges/sglang_bridge.py

Most of those tests give FP32 logits, and this router takes hidden states: see `identity_gate`. The
files are SGLang's, of a checkout of its repository; no line of
them is kept here. The functions under test are replaced in them, and on a CPU the device.

| left out | reason |
| --- | --- |
| sigmoid, softmax, groups; shared columns without norm | `reason_against` declines such a layer |
| tests that call none of the replaced functions | they judge other code |
| comparisons with moe_fused_gate_jit | SGLang 0.5.23 has no such kernel any more |
| test_mega_gate.py on a CPU | it captures CUDA graphs |
"""

from __future__ import annotations

import importlib
import importlib.util
import os
import sys
import unittest
from contextlib import ExitStack
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any, ClassVar
from unittest import mock

import pytest

torch = pytest.importorskip("torch")
if not importlib.util.find_spec("sglang"):
    pytest.skip("SGLang is installed by .ci/serving alone", allow_module_level=True)
sys.path.append(str(Path(__file__).parents[1]))
importlib.import_module("sglang_layers").start()

from exact_gates import identity_gate  # noqa: E402
from sglang.srt.configs.shared_experts import SharedExpertsConfig  # noqa: E402
from sglang.srt.layers.moe.topk import TopKConfig, TopKOutputFormat  # noqa: E402

from dsv4_router_runtime.integrations.bound_layers import bind_router  # noqa: E402
from dsv4_router_runtime.integrations.sglang.layer import ServedLayer  # noqa: E402

VARIABLE = "DSV4_JUDGE_SGLANG"
ON_GPU = torch.cuda.is_available()
pytestmark = pytest.mark.serving


class MoEGate(SimpleNamespace):
    """The parameters of SGLang's gate."""

    _forward_hooks: ClassVar[dict[int, Any]] = {}


class TopK(SimpleNamespace):
    """The configuration of SGLang's top-k."""

    routing_inputs = staticmethod(lambda: (None, None))


def layer_of(
    logits: Any, bias: Any, bias_vl: Any, config: TopKConfig, image_token: Any
) -> tuple[Any, Any]:
    """Return a served layer, and hidden states of which its gate gives back the logits.

    Skip the test if the layer is declined.
    """
    hidden_states, weight = identity_gate(logits)
    bias, bias_vl = (None if b is None else b.float().contiguous() for b in (bias, bias_vl))
    gate = MoEGate(
        weight=weight,
        e_score_correction_bias=bias,
        e_score_correction_bias_vl=bias_vl,
    )
    shape = {"n_routed_experts": weight.shape[0], "hidden_size": weight.shape[1]}
    moe = SimpleNamespace(
        gate=gate,
        topk=TopK(topk_config=config, enable_waterfill=False),
        experts=None,
        config=SimpleNamespace(image_token_id=image_token, **shape),
        is_hash=False,
        is_deepseek_v4=True,
        layer_id=0,
    )
    layer = ServedLayer(moe, "a judge's layer")
    if not layer.serves(hidden_states):
        pytest.skip(f"left out: {layer.reason}")
    return layer, hidden_states


def moe_fused_gate(
    scores: Any,
    bias: Any,
    topk: int,
    scoring_func: str = "sigmoid",
    num_fused_shared_experts: int = 0,
    renormalize: bool = True,
    routed_scaling_factor: float = 1.0,
    apply_routed_scaling_factor_on_output: bool = False,
    num_expert_group: int = 1,
    **_: Any,
) -> tuple[Any, Any]:
    """Route with the arguments of SGLang's Triton kernel."""
    config = TopKConfig(
        top_k=topk,
        renormalize=renormalize,
        use_grouped_topk=num_expert_group > 1,
        shared_experts=SharedExpertsConfig(num_fused_shared_experts=num_fused_shared_experts),
        routed_scaling_factor=routed_scaling_factor,
        apply_routed_scaling_factor_on_output=apply_routed_scaling_factor_on_output,
        output_format=TopKOutputFormat.STANDARD,
        scoring_func=scoring_func,
    )
    layer, hidden_states = layer_of(scores, bias, None, config, None)
    return tuple(layer.route(hidden_states, None, None)[:2])


def moe_fused_gate_jit(*_: Any, **__: Any) -> None:
    pytest.skip("left out: SGLang 0.5.23 has no such kernel")


def vision_topk(moe: Any, logits: Any, input_ids: Any, num_token_non_padded: Any = None) -> Any:
    """Route with the arguments of SGLang's router of a model that sees."""
    given, gate = moe.topk.topk_config, moe.gate
    # SGLang normalises one expert of a layer that sees for text alone: such a layer is declined,
    # and the router itself is judged.
    if given.top_k == 1:
        return one_expert(moe, logits, input_ids, num_token_non_padded)
    config = TopKConfig(
        top_k=given.top_k,
        renormalize=given.renormalize,
        routed_scaling_factor=given.routed_scaling_factor,
        apply_routed_scaling_factor_on_output=given.apply_routed_scaling_factor_on_output,
        output_format=TopKOutputFormat.STANDARD,
        scoring_func="sqrtsoftplus",
    )
    biases = gate.e_score_correction_bias, gate.e_score_correction_bias_vl
    layer, hidden_states = layer_of(logits, *biases, config, moe.config.image_token_id)
    routed = layer.route(
        hidden_states,
        num_token_non_padded,
        None,
        input_ids=input_ids,
        images=input_ids is not None,
    )
    return SimpleNamespace(topk_weights=routed.weights, topk_ids=routed.ids)


def one_expert(moe: Any, logits: Any, input_ids: Any, num_token_non_padded: Any) -> Any:
    given = moe.topk.topk_config
    hidden_states, weight = identity_gate(logits)
    biases = moe.gate.e_score_correction_bias, moe.gate.e_score_correction_bias_vl
    bias, bias_vl = (each.float().contiguous() for each in biases)
    scale = given.routed_scaling_factor if given.apply_routed_scaling_factor_on_output else 1.0
    router = bind_router(
        weight,
        bias,
        top_k=1,
        routed_scaling_factor=scale,
        bias_vl=bias_vl,
        norm_topk_prob=False,
    )
    weights = hidden_states.new_empty((len(logits), 1), dtype=torch.float32)
    ids = torch.empty_like(weights, dtype=torch.int32)
    image_mask = input_ids == moe.config.image_token_id
    router(hidden_states, weights, ids, image_mask=image_mask, num_tokens=num_token_non_padded)
    return SimpleNamespace(topk_weights=weights, topk_ids=ids)


def bf16_mega_gate(
    x: Any,
    weight: Any,
    top_k: int,
    *,
    routed_scaling_factor: float,
    bias: Any,
    image_bias: Any,
    image_token_mask: Any,
    valid_token_mask: Any,
    hash_topk_ids: Any,
    ep_rank: int,
) -> tuple[Any, Any]:
    """Route with the arguments of DeepGEMM's mega gate, which takes hidden states."""
    hashed = hash_topk_ids is not None
    key = (weight.data_ptr(), hashed)
    if key not in _mega_gates:
        # Bound once: the test captures its third call.
        router = bind_router(
            weight,
            None if hashed else bias,
            top_k=top_k,
            routed_scaling_factor=routed_scaling_factor,
            bias_vl=image_bias,
            tid2eid=hash_topk_ids,
        )
        rows = torch.arange(len(x), device=x.device)
        _mega_gates.clear()
        _mega_gates[key] = router, rows, weight
    router, rows, _ = _mega_gates[key]
    weights = x.new_empty((len(x), top_k), dtype=torch.float32)
    ids = x.new_empty((len(x), top_k), dtype=torch.int64)
    router(
        x,
        weights,
        ids,
        image_mask=image_token_mask,
        padding_mask=~valid_token_mask,
        input_ids=rows if hashed else None,
    )
    return weights, ids


_mega_gates: dict[tuple[int, bool], Any] = {}
# A file -> the module of the functions that it tests, and what stands in for them.
FILES: dict[str, tuple[str, dict[str, Any]]] = {
    "test_moe_fused_gate.py": (
        "sglang.kernels.ops.moe.moe_fused_gate",
        {"moe_fused_gate": moe_fused_gate, "moe_fused_gate_jit": moe_fused_gate_jit},
    ),
    "test_dsv41_vl_router.py": (
        "sglang.srt.multimodal.dsv41.vl_routing",
        {"vision_topk": vision_topk},
    ),
    "test_mega_gate.py": (
        "sglang.kernels.ops.moe.mega_gate",
        # The wheel of 0.5.23 has no is_mega_gate_available; its repository's test asks for it.
        {"bf16_mega_gate": bf16_mega_gate, "is_mega_gate_available": lambda: True},
    ),
}


def load(path: Path) -> dict[str, Any]:
    """Run SGLang's file with this router in it; return its tests, with their parameters."""
    source = path.read_text(encoding="utf-8")
    if not ON_GPU:
        for quoted in ('device="cuda"', 'DEVICE = "cuda"'):
            source = source.replace(quoted, quoted.replace("cuda", "cpu"))
        source = source.replace("torch.cuda.synchronize()", "None")
    helpers = {name: ModuleType(name) for name in ("register", "utils")}
    vars(helpers["register"])["register_cuda_ci"] = lambda **_: None
    vars(helpers["utils"])["CustomTestCase"] = unittest.TestCase
    imported = {
        "sglang.test.ci.ci_register": helpers["register"],
        "sglang.test.test_utils": helpers["utils"],
    }
    names: dict[str, Any] = {"__name__": path.stem}
    module, replaced = FILES[path.name]
    with ExitStack() as patches:
        patches.enter_context(mock.patch.dict(sys.modules, imported))
        patches.enter_context(mock.patch("torch.cuda.is_available", return_value=True))
        for name, function in replaced.items():
            patches.enter_context(mock.patch(f"{module}.{name}", function, create=True))
        exec(compile(source, str(path), "exec"), names)
    return {f"{name}_{path.stem}": test for name, test in names.items() if judges(test, path.name)}


def judges(test: Any, file: str) -> bool:
    """Return whether this is a test that calls a replaced function."""
    if isinstance(test, type) and issubclass(test, unittest.TestCase):
        # What it asks of the GPU is about SGLang's kernel.
        test.setUpClass = classmethod(lambda cls: None)  # type: ignore[method-assign]
        return test is not unittest.TestCase and (ON_GPU or file != "test_mega_gate.py")
    code = getattr(test, "__code__", None)
    called = set(code.co_names) if code is not None else set()
    return (
        test is not None
        and getattr(test, "__name__", "").startswith("test_")
        and bool(called & set(FILES[file][1]))
    )


if not os.environ.get(VARIABLE):
    pytest.skip(f"{VARIABLE} names no folder of SGLang's tests", allow_module_level=True)
folder = Path(os.environ[VARIABLE])
LOADED = {file: load(folder / file) if (folder / file).is_file() else None for file in FILES}
for tests in LOADED.values():
    globals().update(tests or {})


@pytest.mark.parametrize("file", FILES)
def test_a_file_brings_cases(file) -> None:
    if LOADED[file] is None:
        pytest.skip(f"left out: {VARIABLE} has no {file}")
    if file == "test_mega_gate.py" and not ON_GPU:
        pytest.skip("left out: it captures CUDA graphs")
    assert LOADED[file]
