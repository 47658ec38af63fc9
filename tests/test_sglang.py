"""The adapter for SGLang on a CPU: its real layers, and the reference in the kernels' place."""

from __future__ import annotations

import importlib
import importlib.util
import logging
from types import SimpleNamespace
from typing import Any
from unittest import mock

import pytest

torch = pytest.importorskip("torch")
if not importlib.util.find_spec("sglang"):
    pytest.skip("SGLang is installed by .ci/serving alone", allow_module_level=True)
importlib.import_module("sglang_layers")  # before SGLang, whose imports it makes possible

import torch.nn.functional as F  # noqa: E402
from gpu_recorder import Gpu, replace_gpu  # noqa: E402
from sglang.srt import plugins, runtime_context  # noqa: E402
from sglang.srt.environ import envs  # noqa: E402
from sglang.srt.layers.moe.topk import TopK  # noqa: E402
from sglang.srt.plugins.hook_registry import HookRegistry, HookType  # noqa: E402
from sglang_layers import (  # noqa: E402
    IMAGE_TOKEN,
    SCALE,
    TOP_K,
    E,
    balanced,
    batch,
    build,
    check,
    fill,
    maps,
    padded_to,
    routed,
    start,
    updater_of,
)

from dsv4_router_runtime import Router  # noqa: E402
from dsv4_router_runtime.integrations import engine  # noqa: E402
from dsv4_router_runtime.integrations.sglang import hooks, plugin  # noqa: E402
from dsv4_router_runtime.integrations.sglang.contract import CONTRACT  # noqa: E402
from dsv4_router_runtime.integrations.sglang.layer import ServedLayer  # noqa: E402

pytestmark = [
    pytest.mark.serving,
    pytest.mark.skipif(torch.cuda.is_available(), reason="test_sglang_gpu.py is for a GPU"),
]
KINDS: dict[str, dict[str, Any]] = {
    "text": {},
    "hash": {"hashed": True},
    "image": {"sees": True},
}
kinds = pytest.mark.parametrize("kind", KINDS)


@pytest.fixture(autouse=True)
def started() -> None:
    start()


def test_the_entry_point_loads_every_hook() -> None:
    assert set(hooks.HOOKS) <= HookRegistry._patched
    assert plugin.differences() == []


@pytest.mark.parametrize("name", [name for name, expected in CONTRACT.items() if expected])
def test_the_contract_names_every_parameter(name) -> None:
    changed = {name: f"{CONTRACT[name]}, more"}
    assert len(engine.mismatches(changed)) == 1


def test_another_version_is_declined_in_words(monkeypatch, caplog) -> None:
    monkeypatch.setattr(plugin, "_registered", False)
    monkeypatch.setattr(plugin, "version", lambda _: "0.5.24")
    monkeypatch.setattr(HookRegistry, "register", None)
    plugin.register()
    assert "serves no layer" in caplog.text
    assert "expected version 0.5.23 (got 0.5.24)" in caplog.text


def test_the_kill_switch_and_a_second_load_register_nothing(monkeypatch) -> None:
    patched = TopK.forward
    monkeypatch.setattr(plugins, "_plugins_loaded", False)
    plugins.load_plugins()
    assert TopK.forward is patched
    monkeypatch.setattr(plugin, "_registered", False)
    monkeypatch.setattr(HookRegistry, "register", None)
    monkeypatch.setenv("DSV4_ROUTER_DISABLE", "1")
    plugin.register()
    monkeypatch.delenv("DSV4_ROUTER_DISABLE")
    monkeypatch.setenv("DSV4_ROUTER", "0")
    plugin.register()


@kinds
@pytest.mark.parametrize("fused_scale", [False, True])
@pytest.mark.parametrize("num_tokens", [1, 17, 80])
def test_a_layer_routes_as_sglangs_definition(kind, fused_scale, num_tokens, seed) -> None:
    moe = build(seed, fused_scale=fused_scale, **KINDS[kind])
    check(moe, *batch(seed, num_tokens))


@kinds
@pytest.mark.parametrize("num_tokens", [0, 1, 16])
def test_rows_after_the_bound_are_padding(kind, num_tokens, seed) -> None:
    moe = build(seed, **KINDS[kind])
    hidden_states, input_ids = batch(seed, 17)
    hidden_states[num_tokens:] = torch.nan
    got = None
    with padded_to(num_tokens):
        got = routed(moe, hidden_states, input_ids)
        assert bool((got.topk_ids[num_tokens:] == -1).all())
        assert not got.topk_weights[num_tokens:].any()
        if num_tokens:
            hidden_states[num_tokens:] = 0
            check(moe, hidden_states, input_ids)


@pytest.mark.parametrize("kind", ["text", "image"])
def test_weights_may_stay_unnormalised(kind, seed) -> None:
    moe = build(seed, norm_topk_prob=False, fused_scale=True, **KINDS[kind])
    check(moe, *batch(seed, 17))


def test_images_are_known_by_their_token(seed) -> None:
    moe = build(seed, sees=True)
    hidden_states, input_ids = batch(seed, 17)
    seen = check(moe, hidden_states, input_ids).topk_ids
    text = check(moe, hidden_states, torch.zeros_like(input_ids)).topk_ids
    changed = (seen != text).any(1)
    assert bool(changed[input_ids == IMAGE_TOKEN].all())
    assert not changed[input_ids != IMAGE_TOKEN].any()
    assert torch.equal(check(moe, hidden_states, None).topk_ids, text)


@pytest.mark.parametrize("kind", ["hash", "image"])
def test_a_shared_column_is_one_over_the_scale(kind, seed) -> None:
    moe = build(seed, num_shared=1, **KINDS[kind])
    got = check(moe, *batch(seed, 17))
    assert bool((got.topk_ids[:, TOP_K] == E).all())
    assert torch.allclose(got.topk_weights[:, TOP_K], torch.tensor(1 / SCALE))


@pytest.mark.parametrize("fused_scale", [False, True])
def test_shared_columns_of_a_text_layer(fused_scale, seed) -> None:
    moe = build(seed, num_shared=2, fused_scale=fused_scale)
    hidden_states, input_ids = batch(seed, 17)
    with padded_to(12):
        got = routed(moe, hidden_states, input_ids)
    plain = build(seed, fused_scale=fused_scale)
    with padded_to(12):
        expected = check(plain, hidden_states, input_ids)
    assert torch.equal(got.topk_ids[:, :TOP_K], expected.topk_ids)
    assert torch.equal(got.topk_weights[:, :TOP_K], expected.topk_weights)
    assert got.topk_ids[:12, TOP_K:].tolist() == [[E, E + 1]] * 12
    weight = 1.0 if fused_scale else 1 / SCALE
    assert torch.allclose(got.topk_weights[:12, TOP_K:], torch.tensor(weight))
    assert not got.topk_weights[12:].any()


@kinds
@pytest.mark.parametrize("algorithm", ["static", "dynamic"])
def test_physical_experts_follow_sglangs_maps(kind, algorithm, seed, monkeypatch) -> None:
    monkeypatch.setattr(hooks, "_post_process_topk_ids", None)  # the kernel maps
    moe = build(seed, **KINDS[kind])
    hidden_states, input_ids = batch(seed, 17)
    logical = check(moe, hidden_states, input_ids).topk_ids
    with balanced(seed, algorithm) as metadata, padded_to(13):
        got = check(moe, hidden_states, input_ids).topk_ids
        layer = metadata.physical_to_logical_map[moe.layer_id]
        assert torch.equal(layer[got[:13]].int(), logical[:13])
        metadata.update(maps(seed + 1), [moe.layer_id])
        assert not torch.equal(check(moe, hidden_states, input_ids).topk_ids, got)
        metadata.update(maps(seed + 2), [moe.layer_id + 1])
        check(moe, hidden_states, input_ids)
    with balanced(seed + 3, algorithm):
        check(moe, hidden_states, input_ids)


@pytest.mark.parametrize("algorithm", ["static", "dynamic"])
def test_maps_are_read_where_sglang_has_them(seed, algorithm) -> None:
    moe = build(seed)
    hidden_states, input_ids = batch(seed, 17)
    for number in range(2):
        with balanced(seed + number, algorithm) as metadata:
            check(moe, hidden_states, input_ids)
            routers = moe.gate.dsv4_router._routers
            ((_, at),) = routers
            name = "rank_dispatch" if algorithm == "static" else "all"
            assert (
                at == getattr(metadata, f"logical_to_{name}_physical_map")[moe.layer_id].data_ptr()
            )
            bound = dict(routers)
            metadata.update(maps(seed + 2), [moe.layer_id])
            check(moe, hidden_states, input_ids)
            assert routers == bound


@pytest.fixture
def gpu(monkeypatch) -> Gpu:
    """A recorder in the GPU's place: what the adapter passes, a real Router launches."""

    def bind(weight, e_bias, **bound):
        return Router(weight.t(), e_bias, **bound)

    monkeypatch.setattr(f"{ServedLayer.__module__}.bind_router", bind)
    return replace_gpu(monkeypatch)


def test_captured_graphs_share_their_scratch(seed, gpu) -> None:
    for gpu.capture in (0, 1, 2):
        routed(build(seed, num_experts=384), *batch(seed, 8))
    eager, *captured = (launch["workspace"] for launch in gpu.launches)
    assert captured == [captured[0]] * 2
    assert eager != captured[0]


@pytest.mark.parametrize("deterministic", [False, True])
def test_deterministic_inference_takes_no_matrix_product(
    seed, gpu, monkeypatch, deterministic
) -> None:
    now = runtime_context.get_exec()
    facts = SimpleNamespace(enable_deterministic_inference=deterministic)
    config = SimpleNamespace(deterministic=facts, moe=now.moe)
    monkeypatch.setattr(f"{ServedLayer.__module__}.get_exec", lambda: config)
    routed(build(seed), *batch(seed, 4000))
    assert len(gpu.products) == (not deterministic)
    assert (len(gpu.launches) > 1) == deterministic


def test_a_capture_with_other_maps_is_sglangs(seed, monkeypatch, caplog) -> None:
    moe = build(seed)
    layer = moe.gate.dsv4_router
    routed(moe, *batch(seed, 3))
    monkeypatch.setattr(f"{ServedLayer.__module__}._is_capturing", lambda _: True)
    with balanced(seed, "dynamic"):
        info = moe.topk.routing_inputs()[1]
        assert not layer.can_route(info)
        assert "is captured before it is run" in caplog.text
        assert layer.can_route(None)


@pytest.mark.parametrize("num_shared", [0, 1])
def test_image_rows_of_a_hash_layer_select_by_their_bias(num_shared, seed) -> None:
    moe = build(seed, hashed=True, sees=True, num_shared=num_shared)
    hidden_states, input_ids = batch(seed, 17)
    bias_vl = moe.gate.e_score_correction_bias_vl.double()
    logits = hidden_states.double() @ moe.gate.weight.double().t()
    table = moe.topk.tid2eid[input_ids].long()
    images = (input_ids == IMAGE_TOKEN)[:, None]
    expected = torch.where(images, (F.softplus(logits).sqrt() + bias_vl).topk(TOP_K)[1], table)
    with padded_to(13):
        got = routed(moe, hidden_states, input_ids)
    expected[13:] = -1
    assert torch.equal(got.topk_ids[:, :TOP_K].sort(1)[0].long(), expected.sort(1)[0])
    assert bool((got.topk_ids[:13, TOP_K:] == E).all())
    assert not got.topk_weights[13:].any()
    with torch.inference_mode():
        # Its top-k by the table alone, as batches that overlap take it.
        as_text = moe.topk(hidden_states, moe.gate(hidden_states), input_ids)
    assert torch.equal(as_text.topk_ids[:, :TOP_K].long(), table)


def test_random_replicas_and_captured_ids_are_left_to_sglang(seed, monkeypatch) -> None:
    moe = build(seed)
    finished = mock.Mock(wraps=hooks._post_process_topk_ids)
    monkeypatch.setattr(hooks, "_post_process_topk_ids", finished)
    hidden_states, input_ids = batch(seed, 17)
    logical = check(moe, hidden_states, input_ids).topk_ids
    with balanced(seed, "dynamic", backend="deepep") as metadata:
        got = routed(moe, hidden_states, input_ids).topk_ids
        layer = metadata.physical_to_logical_map[moe.layer_id]
        assert torch.equal(layer[got].int(), logical)
    assert finished.call_count == 1
    captured = []
    capturer = SimpleNamespace(capture=lambda layer_id, topk_indices: captured.append(topk_indices))
    resources = runtime_context.get_resources()
    resources.experts_capturer = capturer
    try:
        with balanced(seed, "dynamic"):
            got = routed(moe, hidden_states, input_ids)
            assert torch.equal(captured.pop(), logical)
            check(moe, hidden_states, input_ids)
        captured.clear()
        routed(moe, hidden_states, input_ids)
        assert torch.equal(captured.pop(), logical)
    finally:
        resources.experts_capturer = None


@kinds
@pytest.mark.parametrize("algorithm", [None, "dynamic"])
@pytest.mark.parametrize("num_shared", [0, 1])
def test_the_recorder_gets_the_routed_experts(kind, algorithm, num_shared, seed) -> None:
    moe = build(seed, num_shared=num_shared, **KINDS[kind])
    recorded = []
    resources = runtime_context.get_resources()
    recorder = SimpleNamespace(on_select_experts=lambda topk_ids: recorded.append(topk_ids))
    kept, resources.expert_distribution_recorder = resources.expert_distribution_recorder, recorder
    try:
        if algorithm is None:
            got = routed(moe, *batch(seed, 5))
        else:
            with balanced(seed, algorithm):
                got = routed(moe, *batch(seed, 5))
    finally:
        resources.expert_distribution_recorder = kept
    (ids,) = recorded
    assert torch.equal(ids, got.topk_ids[:, :TOP_K])


@kinds
def test_weights_loaded_anew_are_taken(kind, seed, monkeypatch) -> None:
    moe, other = (build(each, **KINDS[kind]) for each in (seed, seed + 1))
    hidden_states, input_ids = batch(seed, 17)
    before = check(moe, hidden_states, input_ids).topk_ids
    updater = updater_of(moe)
    monkeypatch.setattr(
        "sglang.srt.model_executor.model_runner_components.weight_updater._unwrap_tensor",
        lambda tensor, **_: tensor,
    )
    monkeypatch.setattr(torch, "get_device_module", lambda _: SimpleNamespace(current_device=int))
    named = [(f"mlp.{name}", tensor.data) for name, tensor in other.named_parameters()]
    updater.update_weights_from_tensor(named, load_format="direct")
    assert not torch.equal(check(moe, hidden_states, input_ids).topk_ids, before)
    fill(moe, seed)
    updater.end_weight_update(run_post_load=False)
    assert torch.equal(check(moe, hidden_states, input_ids).topk_ids, before)


def test_a_bound_layer_on_a_gpu_is_refreshed_in_place(seed) -> None:
    moe = build(seed, hashed=True)
    routed(moe, *batch(seed, 3))
    layer = moe.gate.dsv4_router
    refreshed = []
    layer._routers = {(False, 0): SimpleNamespace(refresh=lambda: refreshed.append(1))}
    layer._tensors[0] = SimpleNamespace(is_cuda=True, data_ptr=layer._tensors[0].data_ptr)
    updater_of(moe).end_weight_update(run_post_load=False)
    assert refreshed == [1]
    assert layer._routers


def test_weights_that_moved_are_followed_but_not_for_ever(seed, caplog) -> None:
    moe = build(seed)
    hidden_states, input_ids = batch(seed, 5)
    check(moe, hidden_states, input_ids)
    moe.gate.weight = torch.nn.Parameter(moe.gate.weight.data.flip(0))
    check(moe, hidden_states, input_ids)
    for _ in range(5):
        # As SGLang's offloaders call a layer.
        moved = {"gate.weight": moe.gate.weight.detach().clone()}
        given = {"input_ids_global": input_ids, "skip_shared_experts": True}
        with torch.inference_mode():
            torch.func.functional_call(moe, moved, hidden_states.clone(), given)
        output = moe.experts.topk_output
    assert not hasattr(output.router_logits, "dsv4_router")
    assert "its weights keep moving" in caplog.text


def test_one_line_says_who_serves_a_layer(seed, caplog) -> None:
    caplog.set_level(logging.INFO, "dsv4_router_runtime")
    served, declined = build(seed), build(seed, router_fp32=True)
    hidden_states, input_ids = batch(seed, 5)
    for _ in range(2):
        check(served, hidden_states, input_ids)
        logits = declined.gate(hidden_states)
        assert torch.equal(logits, F.linear(hidden_states.float(), declined.gate.weight))
    lines = [record.getMessage() for record in caplog.records]
    assert lines == [
        "sglang: model.layers.4.mlp is served by dsv4_router",
        "sglang: model.layers.4.mlp keeps the engine's router: the weight is torch.float32; "
        "torch.bfloat16 is served",
    ]


@kinds
def test_a_call_that_cannot_be_served_has_its_logits_made(kind, seed, monkeypatch) -> None:
    moe = build(seed, **KINDS[kind])
    hidden_states, input_ids = batch(seed, 5)
    check(moe, hidden_states, input_ids)
    monkeypatch.setattr(ServedLayer, "can_route", lambda *_, **__: False)
    moe.topk._forward_method = getattr(moe.topk, "forward_native", None)
    with envs.SGLANG_OPT_USE_FUSED_HASH_TOPK.override(False):
        output = routed(moe, hidden_states, input_ids)
    assert not hasattr(output.router_logits, "dsv4_router")
    assert torch.equal(output.router_logits, hidden_states @ moe.gate.weight.t())


@pytest.mark.parametrize("hooked", [False, True], ids=["not applied", "another's"])
def test_a_layer_whose_logits_something_else_might_read_is_sglangs(
    seed, monkeypatch, caplog, hooked
) -> None:
    target = "sglang.srt.layers.moe.topk.TopK.forward"
    if hooked:
        monkeypatch.setitem(HookRegistry._hooks, target, [*HookRegistry._hooks[target]])
        HookRegistry.register(target, lambda topk, *given: None, HookType.AROUND)
        reason = f"another plugin hooks {target}"
    else:
        monkeypatch.setattr(HookRegistry, "_patched", HookRegistry._patched - {target})
        reason = f"SGLang has not applied the hook on {target}"
    moe = build(seed)
    hidden_states, _ = batch(seed, 5)
    with torch.no_grad():
        assert torch.equal(moe.gate(hidden_states), hidden_states @ moe.gate.weight.t())
    assert f"keeps the engine's router: {reason}" in caplog.text


def test_a_hook_on_the_gate_gets_logits(seed, caplog) -> None:
    moe = build(seed)
    hidden_states, input_ids = batch(seed, 5)
    check(moe, hidden_states, input_ids)
    seen = []
    handle = moe.gate.register_forward_hook(lambda gate, given, logits: seen.append(logits))
    with torch.no_grad():
        for _ in range(2):
            moe.gate(hidden_states)
            assert torch.equal(seen.pop(), hidden_states @ moe.gate.weight.t())
    assert caplog.text.count("a hook on its gate may read the logits") == 1
    handle.remove()
    check(moe, hidden_states, input_ids)


def test_what_torch_compiles_is_sglangs_own(seed) -> None:
    moe = build(seed)
    hidden_states, input_ids = batch(seed, 5)
    check(moe, hidden_states, input_ids)
    compiled = torch.compile(moe.gate, backend="eager", fullgraph=True)
    with torch.no_grad():
        assert torch.equal(compiled(hidden_states), hidden_states @ moe.gate.weight.t())
    torch.compiler.reset()


@pytest.mark.parametrize("kind", ["text", "hash"])
def test_two_overlapping_batches_keep_apart(kind, seed) -> None:
    moe = build(seed, **KINDS[kind])
    states = []
    for number in range(2):
        hidden_states, input_ids = batch(seed + number, 5 + number)
        forward_batch = SimpleNamespace(input_ids=input_ids)
        state = {"hidden_states_mlp_input": hidden_states, "forward_batch": forward_batch}
        states.append(State(state))
    with torch.inference_mode():
        for step in (moe.op_gate, moe.op_select_experts):
            for state in states:
                step(state)
    for state in states:
        hidden_states, input_ids = state["hidden_states_mlp_input"], state.forward_batch.input_ids
        expected = check(moe, hidden_states, input_ids)
        assert torch.equal(state["topk_output"].topk_ids, expected.topk_ids)


class State(dict):
    """SGLang's state of a batch among overlapping ones: attributes that may be popped."""

    __getattr__ = dict.__getitem__
    __setattr__ = dict.__setitem__
