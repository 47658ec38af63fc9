"""The gate as an nn.Module: a checkpoint's names, loads, moves and copies, on a CPU and a GPU."""

from __future__ import annotations

import copy
import pickle
import re
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest

torch = pytest.importorskip("torch", reason="torch is the caller's and is not installed here")

from dsv4_router_runtime import router_reference  # noqa: E402
from dsv4_router_runtime.integrations import bound_layers, torch_op  # noqa: E402
from dsv4_router_runtime.integrations.module import Gate, GateConfig  # noqa: E402

K, E, TOP_K, SCALE, VOCABULARY = 128, 32, 6, 2.5, 9
FORM = {"hidden_size": K, "num_experts": E, "top_k": TOP_K, "routed_scaling_factor": SCALE}
TEXT = GateConfig(**FORM)
HASH = GateConfig(**FORM, hash_vocab_size=VOCABULARY)
VISION = GateConfig(**FORM, vision=True)
VISION_HASH = GateConfig(**FORM, hash_vocab_size=VOCABULARY, vision=True)
KINDS = {"text": TEXT, "hash": HASH, "vision": VISION, "vision hash": VISION_HASH}
each_kind = pytest.mark.parametrize("config", KINDS.values(), ids=KINDS)


pytestmark = pytest.mark.usefixtures("nothing_bound")


@pytest.fixture
def random(seed):
    return torch.Generator().manual_seed(seed)


def checkpoint(config, random):
    """Return a state_dict of the gate with random tensors."""
    shape = (config.num_experts, config.hidden_size)
    state = {"weight": torch.randn(shape, generator=random).bfloat16()}
    if config.hash_vocab_size is None or config.vision:
        state["e_score_correction_bias"] = torch.randn(config.num_experts, generator=random)
    if config.vision:
        state["bias_vl"] = torch.randn(config.num_experts, generator=random)
    if config.hash_vocab_size is not None:
        table = [
            torch.randperm(config.num_experts, generator=random)[: config.top_k]
            for _ in range(config.hash_vocab_size)
        ]
        state["tid2eid"] = torch.stack(table).int()
    return state


def loaded(config, random, device="cpu"):
    gate = Gate(config, device=device)
    gate.load_state_dict(checkpoint(config, random))
    return gate


def batch(gate, random, num_tokens=5):
    """Return hidden_states and the keywords of a call that fits the gate."""
    device = gate.weight.device
    x = torch.randn(num_tokens, gate.config.hidden_size, generator=random).bfloat16().to(device)
    call = {"input_ids": torch.arange(num_tokens, device=device) % (VOCABULARY + 1)}
    if gate.config.vision:
        call["image_mask"] = torch.arange(num_tokens, device=device) % 2 == 0
    return x, call


def check(gate, x, **call):
    """Call the gate, and compare with the reference on the gate's own tensors."""
    config, state = gate.config, gate.state_dict()
    hashed = config.hash_vocab_size is not None
    expected_weights, expected_ids = router_reference(
        x.reshape(-1, config.hidden_size),
        state["weight"].t(),
        None if hashed else state["e_score_correction_bias"],
        config.routed_scaling_factor,
        config.top_k,
        bias_vl=state.get("bias_vl"),
        tid2eid=state.get("tid2eid"),
        gate_temp=config.gate_temp,
        norm_topk_prob=config.norm_topk_prob,
        num_shared_slots=config.num_shared_slots,
        shared_weight=config.shared_weight,
        first_image_id=config.first_image_id,
        num_image_ids=config.num_image_ids if config.vision else 0,
        ids_dtype=config.ids_dtype,
        **{name: rows.reshape(-1) for name, rows in call.items()},
    )
    weights, ids = gate(x, **call)
    assert weights.dtype == config.weights_dtype
    assert ids.dtype == expected_ids.dtype
    assert torch.equal(ids, expected_ids)
    torch.testing.assert_close(weights.double(), expected_weights, rtol=1e-5, atol=1e-6)


@each_kind
def test_a_loaded_gate_routes_as_the_reference(random, config):
    gate = loaded(config, random)
    x, call = batch(gate, random)
    check(gate, x, **call)


def test_each_number_of_the_config_counts(random):
    config = GateConfig(
        **FORM,
        norm_topk_prob=False,
        gate_temp=0.5,
        num_shared_slots=2,
        shared_weight=0.4,
        ids_dtype=torch.int64,
    )
    gate = loaded(config, random)
    x, call = batch(gate, random)
    check(gate, x, **call, padding_mask=torch.arange(5) == 1, num_tokens=torch.tensor([4]).int())
    assert "num_shared_slots=2" in repr(gate)


@each_kind
@pytest.mark.parametrize("with_mask", [False, True])
def test_image_rows_are_told_by_their_token_ids(random, config, with_mask):
    gate = loaded(replace(config, first_image_id=2, num_image_ids=2), random)
    x, call = batch(gate, random)
    if not with_mask:
        call.pop("image_mask", None)
    check(gate, x, **call)
    assert gate.state_dict().keys() == loaded(config, random).state_dict().keys()
    if config.vision:
        words = "5 rows' token ids, which the layer's (num_image_ids|tid2eid)"
        with pytest.raises(TypeError, match=words):
            gate(x)


def test_weights_in_bfloat16(random):
    gate = loaded(TEXT, random)
    x, call = batch(gate, random)
    weights, _ = gate(x, **call)
    gate.config = replace(TEXT, weights_dtype=torch.bfloat16)
    assert torch.equal(gate(x, **call)[0], weights.bfloat16())


@each_kind
def test_leading_dimensions_are_flattened(random, config):
    gate = loaded(config, random)
    x, call = batch(gate, random, 6)
    call = {name: rows.reshape(2, 3) for name, rows in call.items()}
    check(gate, x.reshape(2, 3, K), **call)


@each_kind
def test_state_dict_makes_the_round_trip(random, config):
    gate = loaded(config, random)
    state = checkpoint(config, random)
    gate.load_state_dict(state)
    saved = gate.state_dict()
    assert saved.keys() == state.keys()
    for name, tensor in state.items():
        assert saved[name].dtype == tensor.dtype
        assert torch.equal(saved[name], tensor)


@pytest.mark.parametrize(
    ("name", "other"),
    [("e_score_correction_bias", "bias"), ("bias_vl", "e_score_correction_bias_vl")],
)
def test_the_other_names_of_checkpoints_load(random, name, other):
    state = checkpoint(VISION, random)
    renamed = {f"gate.{other if key == name else key}": value for key, value in state.items()}
    model = torch.nn.ModuleDict({"gate": Gate(VISION)})
    model.load_state_dict(renamed)
    assert torch.equal(model["gate"].state_dict()[name], state[name])
    assert f"gate.{other}" in renamed


def test_two_names_for_one_bias_are_refused(random):
    state = checkpoint(TEXT, random)
    with pytest.raises(RuntimeError, match=r'Unexpected key.*"bias"'):
        Gate(TEXT).load_state_dict({**state, "bias": state["e_score_correction_bias"]})


def test_a_table_of_int64_is_loaded(random):
    state = checkpoint(HASH, random)
    gate = Gate(HASH)
    gate.load_state_dict({**state, "tid2eid": state["tid2eid"].long()})
    assert torch.equal(gate.tid2eid, state["tid2eid"])


def test_a_hash_layer_that_was_never_loaded_says_so():
    gate = Gate(HASH)
    gate.weight.data.zero_()
    with pytest.raises(ValueError, match="tid2eid: expected distinct ids in each row"):
        gate(torch.zeros(1, K, dtype=torch.bfloat16), torch.zeros(1, dtype=torch.int32))


@pytest.mark.parametrize("assign", [False, True])
@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode, torch.enable_grad])
@each_kind
def test_a_load_is_seen_by_the_next_call(random, config, context, assign):
    with context():
        gate = loaded(config, random)
        x, call = batch(gate, random)
        check(gate, x, **call)
        gate.load_state_dict(checkpoint(config, random), assign=assign)
        check(gate, x, **call)


def test_a_load_keeps_the_layer_that_graphs_read(random):
    gate = loaded(VISION_HASH, random)
    x, call = batch(gate, random)
    check(gate, x, **call)
    [bound] = bound_layers.layers.values()
    gate.load_state_dict(checkpoint(VISION_HASH, random))
    # Before any call: a replay may be the first thing that comes.
    assert torch.equal(bound.router._options["tid2eid"], gate.tid2eid)
    check(gate, x, **call)
    assert list(bound_layers.layers.values()) == [bound]
    with pytest.raises(ValueError, match="tid2eid: expected distinct ids"):
        gate.load_state_dict({"tid2eid": torch.zeros_like(gate.tid2eid)}, strict=False)


@each_kind
@pytest.mark.parametrize("copied", [copy.deepcopy, lambda gate: pickle.loads(pickle.dumps(gate))])
def test_a_copy_is_a_layer_of_its_own(random, config, copied):
    gate = loaded(config, random)
    x, call = batch(gate, random)
    check(gate, x, **call)
    twin = copied(gate)
    twin.load_state_dict(checkpoint(config, random))
    check(twin, x, **call)
    check(gate, x, **call)
    assert not torch.equal(twin.weight, gate.weight)


@pytest.mark.parametrize("swap", [False, True])
def test_a_conversion_leaves_the_biases_as_they_are(random, monkeypatch, swap):
    monkeypatch.setattr(torch.__future__, "_swap_module_params_on_conversion", swap)
    gate = loaded(VISION, random)
    x, call = batch(gate, random)
    check(gate, x, **call)
    biases = [gate.e_score_correction_bias.clone(), gate.bias_vl.clone()]
    gate.float().bfloat16()
    assert gate.weight.dtype == torch.bfloat16
    for bias, now in zip(biases, [gate.e_score_correction_bias, gate.bias_vl], strict=True):
        assert torch.equal(bias, now)
        assert now.dtype == torch.float32
    check(gate, x, **call)
    assert len(bound_layers.layers) == 1


def test_a_gate_is_made_without_memory_and_filled_later(random):
    gate = Gate(VISION, device="meta").to_empty(device="cpu")
    gate.load_state_dict(checkpoint(VISION, random))
    x, call = batch(gate, random)
    check(gate, x, **call)


@pytest.mark.slow
@each_kind
def test_compile_and_export_take_the_whole_gate(random, config):
    gate = loaded(config, random)
    x, call = batch(gate, random)
    with torch.no_grad():
        expected = gate(x, **call)
        torch._dynamo.reset()
        compiled = torch.compile(gate, backend="aot_eager", fullgraph=True, dynamic=True)
        program = torch.export.export(gate, (x,), call)
        for got in (compiled(x, **call), program.module()(x, **call)):
            for part, wanted in zip(got, expected, strict=True):
                assert torch.equal(part, wanted)
    assert program.graph_signature.parameters == ("weight",)


# The config of a layer

V4 = {
    "hidden_size": 4096,
    "n_routed_experts": 256,
    "num_experts_per_tok": 6,
    "routed_scaling_factor": 1.5,
    "norm_topk_prob": True,
    "scoring_func": "sqrtsoftplus",
    "vocab_size": 129280,
    "num_hidden_layers": 43,
    "num_nextn_predict_layers": 1,
    "num_hash_layers": 3,
}
V41 = {
    **V4,
    "hidden_size": 5120,
    "n_routed_experts": 384,
    "num_hash_layers": 0,
    "num_nextn_predict_layers": 3,
    "dspark_n_routed_experts": 128,
    "dspark_num_experts_per_tok": 3,
    "vision_n_layers": 24,
}
FLASH = {"hidden_size": 4096, "num_experts": 256, "top_k": 6, "routed_scaling_factor": 1.5}
FLASH41 = {**FLASH, "hidden_size": 5120, "num_experts": 384, "vision": True}


@pytest.mark.parametrize("as_object", [False, True], ids=["dict", "object"])
@pytest.mark.parametrize(
    ("config", "index", "expected"),
    [
        (V4, 0, {**FLASH, "hash_vocab_size": 129280}),
        (V4, 3, FLASH),
        (V4, 42, FLASH),
        (V4, 43, FLASH),
        ({**V4, "vision_n_layers": 24}, 2, {**FLASH, "hash_vocab_size": 129280, "vision": True}),
        (V41, 0, FLASH41),
        (V41, 45, {**FLASH41, "num_experts": 128, "top_k": 3}),
        ({**V4, "mlp_layer_types": ["moe", "hash_moe"]}, 1, {**FLASH, "hash_vocab_size": 129280}),
        ({**V4, "mlp_layer_types": ["moe", "hash_moe"]}, 0, FLASH),
        (
            {"text_config": V4, "vision_config": {"num_hidden_layers": 24}},
            5,
            FLASH | {"vision": True},
        ),
        ({**V4, "norm_topk_prob": False}, 9, {**FLASH, "norm_topk_prob": False}),
    ],
)
def test_the_config_of_a_layer_is_read_from_its_models(config, index, expected, as_object):
    given = SimpleNamespace(**config) if as_object else config
    assert GateConfig.of_layer(given, index) == GateConfig(**expected)


@pytest.mark.parametrize(
    ("change", "index", "words"),
    [
        ({"scoring_func": "sigmoid"}, 0, "scoring_func: expected 'sqrtsoftplus' .got 'sigmoid'"),
        ({}, 44, r"layer_index: expected 0\.\.43, 43 layers and 1 draft layers \(got 44\)"),
        ({}, -1, "layer_index: expected"),
        ({"routed_scaling_factor": None}, 0, "config: expected routed_scaling_factor"),
    ],
)
def test_a_config_of_another_model_is_refused(change, index, words):
    with pytest.raises(ValueError, match=words):
        GateConfig.of_layer({**V4, **change}, index)


def test_fields_that_no_model_has_are_passed_on():
    config = GateConfig.of_layer(V4, 3, num_shared_slots=1, ids_dtype=torch.int64, pdl=True)
    assert (config.num_shared_slots, config.ids_dtype, config.pdl) == (1, torch.int64, True)


# The page

README = Path(torch_op.__file__).with_name("README.md").read_text(encoding="utf-8")


def run_the_pages_examples(device):
    """Run the examples of README.md in their order, on `device`; return their names."""
    names: dict = {}
    for example in re.findall(r"```python\n(.*?)```", README, re.DOTALL):
        exec(example.replace('"cuda"', f'"{device}"'), names)
    return names


@pytest.mark.slow
@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_the_pages_examples_run(device):
    torch._dynamo.reset()
    names = run_the_pages_examples(device)
    check(names["gate"], names["hidden_states"])
    with torch.no_grad():
        for ours, other in zip(
            (names["weights"], names["ids"]), names["step"](names["hidden_states"]), strict=True
        ):
            assert torch.equal(ours, other)


# On a GPU


@pytest.mark.gpu
@each_kind
def test_a_gate_moves_to_a_gpu_and_back(random, config):
    gate = loaded(config, random)
    for device in ("cpu", "cuda", "cpu"):
        gate.to(device)
        x, call = batch(gate, random)
        check(gate, x, **call)
    assert len(bound_layers.layers) == 1


@pytest.mark.gpu
@pytest.mark.parametrize("num_tokens", [1, 8, 64, 200, 1000])
@each_kind
def test_a_gate_routes_compiled_captured_and_loaded_anew_on_a_gpu(random, config, num_tokens):
    gate = loaded(config, random, "cuda")
    x, call = batch(gate, random, num_tokens)
    check(gate, x, **call)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = gate(x, **call)
    for _ in range(3):
        x.copy_(batch(gate, random, num_tokens)[0])
        gate.load_state_dict(checkpoint(config, random))
        graph.replay()
        replayed = [part.clone() for part in out]
        check(gate, x, **call)
        for part, expected in zip(replayed, gate(x, **call), strict=True):
            assert torch.equal(part, expected)
    torch._dynamo.reset()
    compiled = torch.compile(gate, fullgraph=True, dynamic=True)
    for part, expected in zip(compiled(x, **call), gate(x, **call), strict=True):
        assert torch.equal(part, expected)
