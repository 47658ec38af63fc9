"""The adapter for vLLM on a CPU: vLLM's real classes, with the reference in the kernels' place."""

from __future__ import annotations

import importlib
import io
import logging
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("vllm", reason="vLLM is installed by .ci/serving alone")

from gpu_recorder import Gpu, replace_gpu  # noqa: E402
from vllm import plugins  # noqa: E402
from vllm.config.logging import LoggingConfig  # noqa: E402
from vllm.logger import configure_logging  # noqa: E402
from vllm.model_executor.custom_op import op_registry_oot  # noqa: E402
from vllm.model_executor.layers.fused_moe import GateLinear  # noqa: E402
from vllm.model_executor.layers.fused_moe.router import base_router  # noqa: E402
from vllm.model_executor.layers.fused_moe.router.fused_topk_bias_router import (  # noqa: E402
    FusedTopKBiasRouter,
)
from vllm.model_executor.layers.fused_moe.runner.moe_runner import MoERunner  # noqa: E402
from vllm_layers import (  # noqa: E402
    FIRST_IMAGE_ID,
    KINDS,
    TOP_K,
    E,
    Layer,
    load,
    model_of,
    replaced_classes,
)

from dsv4_router_runtime import Router  # noqa: E402
from dsv4_router_runtime.integrations.engine import mismatches  # noqa: E402
from dsv4_router_runtime.integrations.vllm import plugin, runner  # noqa: E402
from dsv4_router_runtime.integrations.vllm.contract import CONTRACT  # noqa: E402

pytestmark = pytest.mark.serving


@pytest.fixture(autouse=True)
def switched_on(monkeypatch) -> Iterator[None]:
    monkeypatch.setattr(plugin.LOGGER, "parent", plugin.LOGGER.parent)
    monkeypatch.setattr(plugin.LOGGER, "handlers", plugin.LOGGER.handlers[:])
    with replaced_classes(monkeypatch):
        yield


@pytest.fixture
def registered(switched_on) -> None:
    plugin.register()


def check(layer: Layer, x, input_ids=None, padding=None) -> None:
    """Compare the weights and ids that the experts are given with vLLM's definition."""
    weights, ids = layer(x, input_ids, padding)
    expected_weights, expected_ids, margin = layer.expected(x, input_ids, padding)
    assert margin.min() > 1e-6
    assert torch.equal(ids.long(), expected_ids)
    torch.testing.assert_close(weights.double(), expected_weights, rtol=1e-6, atol=0)


def replaced() -> set[str]:
    return set(op_registry_oot)


def test_the_names_and_signatures_of_vllm_are_those_used() -> None:
    assert mismatches(CONTRACT) == []


def test_vllm_loads_the_entry_point(tmp_path, monkeypatch) -> None:
    project = tomllib.loads((Path(__file__).parents[1] / "pyproject.toml").read_text())
    (group,) = (each for each in project["project"]["entry-points"] if each.startswith("vllm."))
    assert group == plugins.DEFAULT_PLUGINS_GROUP
    metadata = tmp_path / "dsv4_router-0.dist-info"
    metadata.mkdir()
    (metadata / "METADATA").write_text("Metadata-Version: 2.1\nName: dsv4-router\nVersion: 0\n")
    points = project["project"]["entry-points"][group]
    lines = [f"[{group}]", *(f"{name} = {target}" for name, target in points.items())]
    (metadata / "entry_points.txt").write_text("\n".join(lines) + "\n")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(plugins, "plugins_loaded", False)
    monkeypatch.setenv("VLLM_PLUGINS", "dsv4_router")
    plugins.load_general_plugins()
    assert replaced() == {"GateLinear", "MoERunner"}


@pytest.mark.parametrize("switches", [{"DSV4_ROUTER": "0"}, {"DSV4_ROUTER_DISABLE": "1"}])
def test_vllms_own_classes_are_built_when_switched_off(monkeypatch, switches) -> None:
    for name, value in switches.items():
        monkeypatch.setenv(name, value)
    plugin.register()
    assert replaced() == set()
    layer = Layer()
    assert type(layer.runner) is MoERunner
    assert type(layer.gate) is GateLinear


def test_a_switch_that_is_neither_0_nor_1_is_refused(monkeypatch) -> None:
    monkeypatch.setenv("DSV4_ROUTER", "yes")
    with pytest.raises(ValueError, match=r"^DSV4_ROUTER: expected 0 or 1 \(got 'yes'\)"):
        plugin.register()


def test_a_second_load_changes_nothing(registered) -> None:
    before = dict(op_registry_oot)
    plugin.register()
    assert op_registry_oot == before
    layer = Layer()
    check(layer, layer.batch(3)[0])


def test_another_plugin_in_the_same_place_is_left_alone(caplog) -> None:
    op_registry_oot["MoERunner"] = other = type("TheirRunner", (MoERunner,), {})
    plugin.register()
    assert op_registry_oot == {"MoERunner": other}
    (record,) = caplog.records
    assert "TheirRunner has replaced MoERunner before" in record.getMessage()


@pytest.mark.parametrize("expected", ["(self, x, more)", None])
def test_a_changed_signature_registers_nothing(monkeypatch, caplog, expected) -> None:
    name = "GateLinear.forward" if expected else "GateLinear.backward"
    monkeypatch.setitem(CONTRACT, f"{GateLinear.__module__}:{name}", expected)
    plugin.register()
    assert replaced() == set()
    (record,) = caplog.records
    assert record.levelno == logging.WARNING
    assert name in record.getMessage()


@pytest.mark.parametrize("ids_dtype", [None, torch.int32, torch.int64], ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_the_experts_are_given_what_vllm_defines(registered, seed, kind, ids_dtype) -> None:
    layer = Layer(seed=seed, ids_dtype=ids_dtype, **KINDS[kind])
    x, input_ids = layer.batch(33)
    padding = torch.zeros(64, dtype=torch.bool)
    padding[29:] = True
    for mask in (None, padding):
        check(layer, x, input_ids, mask)
    assert layer.experts.given[1].dtype == (ids_dtype or torch.int32)
    check(layer, x, input_ids.long(), padding)


def test_padding_is_ignored_if_vllm_says_so(registered, monkeypatch) -> None:
    monkeypatch.setenv("VLLM_MOE_SKIP_PADDING", "0")
    layer = Layer()
    x, _ = layer.batch(5)
    weights, ids = layer(x, None, torch.ones(5, dtype=torch.bool))
    assert (ids >= 0).all()
    assert (weights > 0).all()


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64], ids=str)
@pytest.mark.parametrize("kind", ["image", "image and hash"])
def test_the_ids_of_images_are_five(registered, seed, kind, dtype) -> None:
    layer = Layer(seed=seed, **KINDS[kind])
    input_ids = torch.arange(FIRST_IMAGE_ID - 2, FIRST_IMAGE_ID + 7, dtype=dtype)
    x, _ = layer.batch(len(input_ids))
    check(layer, x, input_ids)
    as_text = layer.expected(x, torch.zeros_like(input_ids))[1]
    images = (layer.expected(x, input_ids)[1] != as_text).any(1)
    assert images[2:7].all()


def test_a_layer_that_sees_needs_token_ids(registered) -> None:
    layer = Layer(vision=True)
    with pytest.raises(TypeError, match=r"^input_ids: expected a torch\.Tensor"):
        layer(layer.batch(2)[0])


def test_no_logits_are_made_and_a_reader_of_them_fails(registered) -> None:
    layer = Layer()
    x, _ = layer.batch(4)
    layer(x)
    logits, bias = layer.gate(x)
    assert (logits.shape, logits.dtype, bias) == ((4, E), torch.float32, None)
    with pytest.raises(NotImplementedError, match="meta"):
        logits.to("cpu")


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda gate: gate.register_forward_hook(lambda *_: None), "a hook reads"),
        (lambda gate: setattr(gate.weight, "data", -gate.weight.data), "lies elsewhere"),
    ],
    ids=["hook", "moved"],
)
def test_real_logits_are_routed_by_vllm(registered, monkeypatch, caplog, change, reason) -> None:
    """As after the first forward, if a hook reads the logits or the weight is other memory."""
    layer = Layer()
    x, _ = layer.batch(4)
    layer(x)
    routed = []

    def compute(self, hidden_states, router_logits, indices_type, *, input_ids=None):
        routed.append(router_logits)
        shape = (len(hidden_states), TOP_K)
        return torch.ones(shape), torch.zeros(shape, dtype=torch.int32)

    monkeypatch.setattr(FusedTopKBiasRouter, "_compute_routing", compute)
    change(layer.gate)
    for _ in range(2):
        _, ids = layer(x)
    assert not ids.any()
    logits = routed[1]
    assert caplog.text.count(reason) == 1
    expected = x.float() @ layer.gate.weight.float().t()
    torch.testing.assert_close(logits, expected, rtol=0.01, atol=0.05)


@pytest.mark.parametrize("kind", KINDS)
def test_weights_that_are_loaded_anew_are_routed_by(registered, seed, kind) -> None:
    layer = Layer(seed=seed, **KINDS[kind])
    x, input_ids = layer.batch(9)
    check(layer, x, input_ids)
    before = layer.expected(x, input_ids)[1]
    places = {name: each.data_ptr() for name, each in layer.gate.named_parameters()}
    router = layer.runner.router
    load(layer, layer.new_weights("hash" in kind, "image" in kind))
    assert {name: each.data_ptr() for name, each in layer.gate.named_parameters()} == places
    assert layer.runner.router is router
    assert not torch.equal(layer.expected(x, input_ids)[1], before)
    check(layer, x, input_ids)


def test_a_table_that_changed_unseen_is_taken_by_refresh(registered) -> None:
    layer = Layer(hashed=True)
    x, input_ids = layer.batch(9)
    check(layer, x, input_ids)
    layer.gate.tid2eid.data.copy_(layer.new_weights(True, False)["tid2eid"])
    plugin.refresh(model_of(layer))
    check(layer, x, input_ids)


def test_recording_and_eplb_stay_vllms(registered, monkeypatch) -> None:
    """Logical ids are recorded; the experts are given what vLLM's mapping makes of them."""
    layer = Layer(eplb=True)
    router = layer.runner.router
    early, late = [], []
    router.set_capture_fn(early.append)
    layer.runner.set_eplb_state(
        0,
        torch.zeros(1, E, dtype=torch.int32),
        torch.arange(E)[None, :, None],
        torch.ones(1, E, dtype=torch.int64),
    )
    state = layer.runner.eplb_state
    state.should_record_tensor = torch.ones(1, dtype=torch.bool)
    state.num_unpadded_tokens_tensors = [None]
    mapped = []

    def map_and_record(topk_ids, **given):
        mapped.append(given["logical_replica_count"])
        return topk_ids + E

    monkeypatch.setattr(base_router, "eplb_map_to_physical_and_record", map_and_record)
    x, _ = layer.batch(5)
    _, ids = layer(x)
    assert plugin.summary(model_of(layer)) == {"0.experts": "dsv4_router"}
    assert layer.runner.eplb_state is state
    _, logical, _ = layer.expected(x)
    assert torch.equal(ids.long(), logical + E)
    assert torch.equal(early[0].long(), logical)
    assert len(mapped) == 1
    layer.runner.router.set_capture_fn(late.append)
    layer(x)
    assert (len(early), len(late)) == (1, 1)


def test_the_specialized_decode_of_v41_takes_the_routers_experts(registered) -> None:
    """Its own top-k reads logits, which are not there: it may not run, even if built before."""
    pytest.importorskip("cutlass", reason="vLLM's specialized decode needs CuTeDSL")
    gemm = importlib.import_module(
        "vllm.models.deepseek_v41.nvidia.specialized_decode.moe.routed_expert_gemm"
    )
    layer = Layer(num_experts=384)
    built = SimpleNamespace(front_config=gemm._front_config(layer.runner))
    assert gemm.front_applies(built, layer.runner)
    x, _ = layer.batch(3)
    layer(x)
    assert not gemm.front_applies(built, layer.runner)
    assert gemm._front_config(layer.runner) == "router ServedRouter"
    # As MoEStep._forward_low_batch does.
    with layer.forward_context():
        logits, _ = layer.runner.gate(x)
        _, ids = layer.runner.router.select_experts(
            hidden_states=x, router_logits=logits, topk_indices_dtype=torch.int32
        )
    assert torch.equal(ids.long(), layer.expected(x)[1])


@pytest.fixture
def gpu(registered, monkeypatch) -> Gpu:
    """A recorder in the GPU's place: what the adapter passes, a real Router launches."""

    def bind(weight, e_bias, **bound):
        return Router(weight.t(), e_bias, **bound)

    monkeypatch.setattr(f"{runner.ServedRouter.__module__}.bind_router", bind)
    return replace_gpu(monkeypatch)


@pytest.mark.parametrize("invariant", [False, True])
def test_batch_invariance_takes_no_matrix_product(gpu, monkeypatch, invariant) -> None:
    monkeypatch.setenv("VLLM_BATCH_INVARIANT", str(int(invariant)))
    layer = Layer()
    layer(layer.batch(4000)[0])
    assert len(gpu.products) == (not invariant)
    assert (len(gpu.launches) > 1) == invariant


@pytest.mark.parametrize("ids_dtype", [torch.int32, torch.int64], ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_a_call_is_one_launch(gpu, kind, ids_dtype) -> None:
    layer = Layer(ids_dtype=ids_dtype, **KINDS[kind])
    for num_tokens in (1, 8, 64):
        gpu.launches.clear()
        padding = torch.zeros(64, dtype=torch.bool)
        x, input_ids = layer.batch(num_tokens)
        layer(x, input_ids, padding)
        (launch,) = gpu.launches
        assert launch["ids_are_int64"] == (ids_dtype is torch.int64)
        assert launch["padding_mask"] == padding.data_ptr()
        assert launch.get("num_image_ids", 0) == (5 if "image" in kind else 0)
    assert layer.runner.verdict == runner.SERVED
    load(layer, layer.new_weights("hash" in kind, "image" in kind))
    layer(*layer.batch(8))


def test_captured_graphs_share_their_scratch(gpu) -> None:
    for gpu.capture in (0, 1, 2):
        layer = Layer(num_experts=384)
        layer(*layer.batch(8))
    eager, *captured = (launch["workspace"] for launch in gpu.launches)
    assert captured == [captured[0]] * 2
    assert eager != captured[0]


@pytest.mark.parametrize(
    ("given", "reason"),
    [
        ({"monolithic": True}, "the experts route by themselves (monolithic kernel)"),
        ({"scoring_func": "sigmoid"}, "the scores are sigmoid, not sqrtsoftplus"),
        ({"gate": None}, "the gate is elsewhere, not a plain GateLinear that the runner owns"),
        ({"k": 96}, "W_gate: expected K (shape[0]) in multiples of 64"),
        ({"top_k": 16, "num_experts": 64}, "top_k: expected 1..8 (got 16)"),
        ({"use_grouped_topk": True, "num_expert_group": 4, "topk_group": 2}, "the router is a "),
    ],
)
def test_a_layer_that_cannot_be_served_keeps_vllms_router(
    registered, caplog, monkeypatch, given, reason
) -> None:
    stock = object()
    monkeypatch.setattr(base_router.BaseRouter, "_select_experts", lambda *_, **__: (stock, stock))
    layer = Layer(**given)
    router = layer.runner.router
    x, _ = layer.batch(3)
    caplog.set_level(logging.INFO, "dsv4_router_runtime")
    for _ in range(2):
        with layer.forward_context():
            layer.runner(hidden_states=x, router_logits=x)
    assert layer.runner.router is router
    assert layer.gate.served_by is None
    verdict = plugin.summary(model_of(layer))["0.experts"]
    assert verdict.startswith(reason)
    lines = [each for each in caplog.records if each.name == "dsv4_router_runtime"]
    (line,) = lines
    assert line.levelno == logging.WARNING
    assert line.getMessage() == (
        f"vllm: {layer.prefix}.experts keeps the engine's router: {verdict}"
    )


def test_a_served_layer_is_one_line_in_the_log(registered, caplog) -> None:
    caplog.set_level(logging.INFO, "dsv4_router_runtime")
    layer = Layer()
    model = model_of(layer)
    assert plugin.summary(model) == {"0.experts": "undecided: no forward has run"}
    for _ in range(2):
        layer(layer.batch(2)[0])
    lines = [each.getMessage() for each in caplog.records if each.name == "dsv4_router_runtime"]
    assert lines == [f"vllm: {layer.prefix}.experts is served by dsv4_router"]


def test_a_quantized_or_wrapped_gate_or_a_patched_router_is_declined(registered) -> None:
    quantized, wrapped, patched = Layer(), Layer(), Layer()
    patched.runner.router._compute_routing = patched.runner.router._compute_routing
    quantized.gate.is_unquantized = False
    wrapped.runner.gate = torch.nn.Sequential(wrapped.gate)
    facts = importlib.import_module("dsv4_router_runtime.integrations.vllm.runner").facts_of
    assert facts(quantized.runner).quantized
    assert facts(wrapped.runner).gate == "a Sequential"
    assert facts(patched.runner).router == "router with a _compute_routing of its own"


def test_a_decline_is_said_before_vllm_sets_up_its_log() -> None:
    """As in `LLM`, whose engine is a fork that loads no plugin again."""
    script = f"import {plugin.__name__} as plugin; plugin.RELEASE = 'none'; plugin.register()"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert "vllm: not registered, vLLM's routers run: this adapter is for vLLM none" in done.stderr


@pytest.mark.parametrize("level", ["INFO", "WARNING"])
def test_the_log_is_vllms(registered, level) -> None:
    """A server sets up the logger "vllm" alone, after it has loaded the plugins."""
    engine_log = logging.getLogger("vllm")
    before = engine_log.handlers[:], engine_log.level, engine_log.propagate
    written = io.StringIO()
    try:
        configure_logging(LoggingConfig(log_level=level))
        engine_log.handlers[0].setStream(written)
        layer = Layer()
        layer(layer.batch(2)[0])
    finally:
        engine_log.handlers, engine_log.level, engine_log.propagate = before
        engine_log.manager._clear_cache()
    line = f"vllm: {layer.prefix}.experts is served by dsv4_router\n"
    assert (line in written.getvalue()) == (level == "INFO")
