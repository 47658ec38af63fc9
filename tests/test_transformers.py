"""transformers' DeepSeek-V4 with its routers served: real classes, tiny sizes; real ones on a GPU.

The judge is the same model with gates in FP64. transformers rounds its router's logits to BF16,
which gives some rows other experts, so that its own routers are no judge of a BF16 model.
"""

from __future__ import annotations

import inspect
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
model_code = pytest.importorskip("transformers.models.deepseek_v4.modeling_deepseek_v4")

from gpu_calls import BF16, KEY_ROUNDING  # noqa: E402
from transformers import AutoModelForCausalLM, DeepseekV4Config, monkey_patching  # noqa: E402
from transformers.utils import output_capturing  # noqa: E402

from dsv4_router_runtime import log  # noqa: E402
from dsv4_router_runtime.integrations import transformers as served  # noqa: E402
from dsv4_router_runtime.reference import (  # noqa: E402
    router_reference,
    select_reference,
    selection_margin,
)

STOCK = (served.TopKRouter, served.HashRouter)
FUSED = (served.FusedTopKRouter, served.FusedHashRouter)
VOCABULARY = 512
SMALL = {
    "vocab_size": VOCABULARY,
    "hidden_size": 256,
    "moe_intermediate_size": 64,
    "num_attention_heads": 4,
    "num_key_value_heads": 1,
    "head_dim": 64,
    "q_lora_rank": 64,
    "num_experts_per_tok": 6,
    "n_routed_experts": 32,
    "sliding_window": 16,
    "o_groups": 2,
    "o_lora_rank": 32,
    "index_n_heads": 2,
    "index_head_dim": 32,
    "index_topk": 8,
    "partial_rotary_factor": 0.5,
    "hc_mult": 2,
    "hc_sinkhorn_iters": 4,
}


class Fp64TopKRouter(served.TopKRouter):
    """The judge's learned router; weights in FP32, as a kernel writes them."""

    def forward(self, hidden_states):
        flat = hidden_states.reshape(-1, self.hidden_dim)
        return None, *_fp64(self, flat, self.e_score_correction_bias)


class Fp64HashRouter(served.HashRouter):
    """The judge's hash router."""

    def forward(self, hidden_states, input_ids):
        flat = hidden_states.reshape(-1, self.hidden_dim)
        ids = input_ids.reshape(-1)
        return None, *_fp64(self, flat, None, tid2eid=self.tid2eid, input_ids=ids)


def _fp64(router: Any, flat: Any, bias: Any, **options: Any) -> tuple[Any, Any]:
    scale, top_k = router.routed_scaling_factor, router.top_k
    weights, ids = router_reference(flat, router.weight.t(), bias, scale, top_k, **options)
    return weights.float(), ids.long()


JUDGE = (Fp64TopKRouter, Fp64HashRouter)


def build(seed: int, device: str = "cpu", dtype: Any = BF16, num_layers: int = 4, **more: Any):
    """Return a random model: a hash layer, then learned ones with biases like V4's."""
    layer_types = ["sliding_attention", "heavily_compressed_attention"]
    layer_types += ["compressed_sparse_attention"] * 2
    config = DeepseekV4Config(
        **SMALL | more,
        num_hidden_layers=num_layers,
        layer_types=layer_types[:num_layers],
        mlp_layer_types=["hash_moe", *["moe"] * (num_layers - 1)],
    )
    torch.manual_seed(seed)
    with torch.device(device):
        model = AutoModelForCausalLM.from_config(config, dtype=dtype).to(dtype).eval()
        for router in routers(model):
            shape = router.num_experts, router.top_k
            if isinstance(router, served.HashRouter):
                rows = torch.rand(VOCABULARY, shape[0]).argsort(1)[:, : shape[1]]
                router.tid2eid.copy_(rows)
            else:
                # from_config makes this buffer BF16; from_pretrained keeps it FP32.
                router.e_score_correction_bias = 8.08 + 0.05 * torch.randn(shape[0])
    return model


def load(folder: Path) -> Any:
    """Return the model of a folder, its parameters in BF16 as `build` has them.

    5.17 loads the norms in FP32, with which a BF16 model does not run. On a CPU, parameters lie in
    the mapped file at addresses that are no multiple of 16; these are copies.
    """
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=BF16).eval()
    for parameter in model.parameters():
        parameter.data = parameter.data.to(BF16, copy=True)
    return model


def routers(model: Any) -> list[Any]:
    return [module for module in model.modules() if isinstance(module, STOCK)]


def use(model: Any, classes: tuple[type, type]) -> Any:
    """Let every router of the model be of these classes, with the weights that it has."""
    for router in routers(model):
        router.__class__ = classes[isinstance(router, served.HashRouter)]
    return model


def prompts(seed: int, *shape: int, device: str = "cpu"):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(2, VOCABULARY, shape, generator=generator).to(device)


def greedy(model: Any, classes: tuple[type, type], ids: Any, num_tokens: int) -> list[list[int]]:
    answer = use(model, classes).generate(
        ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=num_tokens,
        min_new_tokens=num_tokens,
        do_sample=False,
    )
    return answer[:, ids.shape[1] :].tolist()


def answers(model: Any, ids: Any) -> list[tuple[Any, Any, Any]]:
    """Return of each router, in one forward: itself, its hidden states [N, K] and its output."""
    seen: list[tuple[Any, Any, Any]] = []
    hooks = [
        router.register_forward_hook(
            lambda router, given, out: seen.append((router, given[0].flatten(0, -2), out))
        )
        for router in routers(model)
    ]
    with torch.no_grad():
        model(ids)
    for hook in hooks:
        hook.remove()
    return seen


def other_experts(ids: Any, expected: Any) -> Any:
    """Return bool [N]: the rows whose sets of experts differ."""
    return (ids.sort(1).values != expected.sort(1).values).any(1)


def check_experts(model: Any, ids: Any) -> int:
    """Check every row of every learned layer; return in how many transformers' own router errs."""
    wrong_of_stock = 0
    seen = answers(use(model, FUSED), ids)
    assert len(seen) == len(routers(model))
    for router, hidden_states, (logits, weights, chosen) in seen:
        assert logits is None
        assert weights.dtype is torch.float32
        assert chosen.dtype is torch.int64
        if isinstance(router, served.HashRouter):
            assert torch.equal(chosen, router.tid2eid[ids.flatten()])
            continue
        exact = hidden_states.double() @ router.weight.double().t()
        bias, top_k = router.e_score_correction_bias, router.top_k
        expected_weights, expected = select_reference(
            exact, bias, router.routed_scaling_factor, top_k
        )
        clear = selection_margin(exact, bias, top_k) > KEY_ROUNDING
        assert clear.sum() >= len(clear) - 1
        assert not (other_experts(chosen, expected) & clear).any()
        total, expected_total = weights.double().sum(1), expected_weights.sum(1)
        torch.testing.assert_close(total, expected_total, rtol=1e-5, atol=0)
        with torch.no_grad():
            stock = served.TopKRouter.forward(router, hidden_states)[2]
        wrong_of_stock += int((other_experts(stock, expected) & clear).sum())
    return wrong_of_stock


@pytest.fixture(scope="module")
def tiny():
    return build(0)


@pytest.fixture
def registered() -> Iterator[None]:
    served.register()
    yield
    served.unregister()


def test_the_names_and_signatures_of_transformers_are_those_used() -> None:
    def parameters(function: Any) -> list[str]:
        return list(inspect.signature(function).parameters)

    assert parameters(served.TopKRouter.forward) == ["self", "hidden_states"]
    assert parameters(served.HashRouter.forward) == ["self", "hidden_states", "input_ids"]
    assert parameters(monkey_patching.register_patch_mapping) == ["mapping", "overwrite"]
    assert parameters(monkey_patching.unregister_patch_mapping) == ["keys"]
    assert isinstance(output_capturing._active_collector, output_capturing.CompileableContextVar)
    assert output_capturing._active_collector.global_var is None
    recorders = model_code.DeepseekV4PreTrainedModel._can_record_outputs
    assert recorders["router_logits"].index == 0
    assert recorders["router_logits"].target_class is served.TopKRouter
    for router in routers(build(0)):
        assert router.weight.shape == (router.num_experts, router.hidden_dim)
        assert router.score_fn is not None
        assert isinstance(router.routed_scaling_factor, float)


def test_every_row_has_the_experts_of_fp32_logits(tiny) -> None:
    # Or the judge would pass whatever is chosen.
    assert check_experts(tiny, prompts(1, 4, 128)) > 0


def test_greedy_tokens_are_those_of_fp64_gates(tiny) -> None:
    ids = prompts(2, 4, 32)
    expected = greedy(tiny, JUDGE, ids, 6)
    assert len({tuple(row) for row in expected}) > 1
    assert greedy(tiny, FUSED, ids, 6) == expected


def test_exact_logits_give_what_transformers_gives(tiny) -> None:
    """Logits that BF16 holds: nothing is rounded, so the model's own routers agree."""
    generator = torch.Generator().manual_seed(3)
    hidden_states = torch.randint(-1, 2, (96, 256), generator=generator).to(BF16)
    for router in (type(each)(tiny.config).to(BF16) for each in routers(use(tiny, FUSED))[:2]):
        router.requires_grad_(False)
        router.weight.copy_(torch.randint(-1, 2, router.weight.shape, generator=generator))
        given: tuple[Any, ...] = (hidden_states,)
        if isinstance(router, served.HashRouter):
            rows = torch.rand(VOCABULARY, 32, generator=generator).argsort(1)[:, :6]
            router.tid2eid.copy_(rows)
            given += (prompts(4, 96),)
        else:
            # Keys 3 apart: no two experts tie, with scores below 8 that BF16 rounds.
            router.e_score_correction_bias = torch.randperm(32, generator=generator) * 8.0
        logits, weights, ids = router(*given)
        stock = STOCK[isinstance(router, served.HashRouter)].forward(router, *given)
        assert logits is None
        assert stock[0].dtype is BF16
        order, stock_order = ids.argsort(1), stock[2].argsort(1)
        assert torch.equal(ids.gather(1, order), stock[2].gather(1, stock_order))
        torch.testing.assert_close(
            weights.gather(1, order),
            stock[1].float().gather(1, stock_order),
            rtol=2**-6,
            atol=0,
        )


def test_router_logits_come_from_the_models_own_forward(tiny, caplog, monkeypatch) -> None:
    monkeypatch.setattr(log, "_logged", set())
    ids = prompts(5, 2, 16)
    with torch.no_grad():
        expected = use(tiny, STOCK)(ids, output_router_logits=True)
        for _ in range(2):
            out = use(tiny, FUSED)(ids, output_router_logits=True)
    assert len(out.router_logits) == 3
    assert all(map(torch.equal, out.router_logits, expected.router_logits))
    assert torch.equal(out.logits, expected.logits)
    said = [record.message for record in caplog.records if "recorded" in record.message]
    assert len(said) == 1
    # The recorder's hooks stay; the next call is served all the same.
    assert check_experts(tiny, ids) >= 0


def test_a_gradient_flows_through_the_models_own_forward(tiny, caplog, monkeypatch) -> None:
    monkeypatch.setattr(log, "_logged", set())
    ids = prompts(6, 1, 16)
    gradients = []
    for classes in (STOCK, FUSED):
        tiny.zero_grad()
        use(tiny, classes)(ids).logits.float().square().sum().backward()
        gradients.append([router.weight.grad for router in routers(tiny)])
    tiny.zero_grad()
    assert all(map(torch.equal, *gradients))
    assert "call the model under torch.no_grad()" in caplog.text


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda router: router.float(), "the weight is torch.float32"),
        (lambda router: router.bfloat16(), "e_score_correction_bias is torch.bfloat16"),
        (lambda router: vars(router).update(top_k=9), "it takes 9 of 32 experts"),
        (lambda router: vars(router).update(hidden_dim=32), "hidden_size is 32"),
        (lambda router: setattr(router, "score_fn", torch.nn.Sigmoid()), "Sigmoid"),
        (lambda router: router.to("meta"), "the weight is on meta"),
    ],
)
def test_what_no_kernel_takes_is_left_to_the_model_and_said(
    tiny, caplog, monkeypatch, change, reason
) -> None:
    monkeypatch.setattr(log, "_logged", set())
    router = served.FusedTopKRouter(tiny.config).to(BF16)
    router.e_score_correction_bias = torch.zeros(32)
    change(router)
    if router.hidden_dim != 256:
        router.weight = torch.nn.Parameter(router.weight[:, : router.hidden_dim])
    hidden_states = torch.ones(3, router.hidden_dim).to(router.weight)
    with torch.no_grad():
        out = router(hidden_states)
    assert out[0] is not None
    assert caplog.text.count("transformers routes by itself") == 1
    assert reason in caplog.text
    assert reason in served.summary(router)[""]


def test_fullgraph_gives_what_eager_gives() -> None:
    ids = prompts(7, 2, 16)
    model = use(build(7, num_layers=2), FUSED).model
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    try:
        with torch.no_grad():
            # Eagerly first: dynamo cannot trace how transformers installs its hooks.
            recorded = model(ids, use_cache=False, output_router_logits=True)
            out = compiled(ids, use_cache=False, output_router_logits=True)
            assert all(map(torch.equal, out.router_logits, recorded.router_logits))
            expected = model(ids, use_cache=False)[0]
            assert not torch.equal(expected, recorded[0])
            assert torch.equal(compiled(ids, use_cache=False)[0], expected)
    finally:
        torch.compiler.reset()


def test_router_logits_are_recorded_of_a_compiled_layer() -> None:
    ids = prompts(10, 2, 16)
    model = use(build(10, num_layers=2), FUSED).model
    with torch.no_grad():
        expected = model(ids, output_router_logits=True).router_logits
        model.layers[1].mlp.compile(backend="eager")
        try:
            recorded = model(ids, output_router_logits=True).router_logits
        finally:
            torch.compiler.reset()
    assert len(recorded) == 1
    assert torch.equal(recorded[0], expected[0])


def test_pretrained_models_are_served_while_registered(tiny, tmp_path, registered) -> None:
    if transformers.__version__.startswith("5.17."):
        # Any patch mapping makes it import the modules of image processors.
        pytest.importorskip("torchvision")
    ids = prompts(8, 2, 16)
    use(tiny, STOCK).save_pretrained(tmp_path)
    served.register()
    model = load(tmp_path)
    assert {type(router) for router in routers(model)} == set(FUSED)
    assert set(served.summary(model).values()) == {"dsv4_router"}
    names = [f"model.layers.{layer}.mlp.gate" for layer in range(4)]
    assert list(served.summary(model)) == names
    assert check_experts(model, ids) >= 0
    served.unregister()
    served.unregister()
    plain = load(tmp_path)
    assert {type(router) for router in routers(plain)} == set(STOCK)
    assert "built without register()" in served.summary(plain)[names[1]]
    with torch.no_grad():
        logits = [each(ids, output_router_logits=True).router_logits[0] for each in (model, plain)]
    assert torch.equal(*logits)


def test_another_packages_replacement_is_kept(registered) -> None:
    served.unregister()
    other = type("Other", (served.TopKRouter,), {})
    monkey_patching.register_patch_mapping({"DeepseekV4TopKRouter": other})
    try:
        with pytest.raises(ValueError, match=r"got .*\.Other\); remove it with"):
            served.register()
        served.unregister()
        assert monkey_patching.get_patch_mapping() == {"DeepseekV4TopKRouter": other}
    finally:
        monkey_patching.clear_patch_mapping()


def test_the_kernels_library_takes_the_folder(tiny, tmp_path, monkeypatch) -> None:
    kernels = pytest.importorskip("kernels")
    place = str(Path(served.__file__).parents[2])
    command = [sys.executable, "-m", served.__name__, str(tmp_path)]
    subprocess.run(command, check=True, env={**os.environ, "PYTHONPATH": place})
    metadata = json.loads((tmp_path / "build/torch-cuda/metadata.json").read_text())
    assert metadata["backend"] == {"type": "cuda", "archs": ["10.0a", "10.3a", "9.0a"]}
    layers = kernels.get_local_kernel(tmp_path).layers
    assert layers.DeepseekV4TopKRouter is served.TopKRouterLayer
    mapping: dict[str, Any] = {}
    for stock in STOCK:
        name = stock.__name__
        for attribute in ("kernel_layer_name", "kernel_condition"):
            monkeypatch.setattr(stock, attribute, None, raising=False)
        kernels.replace_kernel_forward_from_hub(stock, name)
        layer = kernels.LocalLayerRepository(tmp_path, layer_name=name)
        mapping[name] = {"cpu": layer, "cuda": layer}
    ids = prompts(9, 2, 16)
    model = use(tiny, STOCK)
    mode = kernels.Mode.INFERENCE | kernels.Mode.TORCH_COMPILE
    with kernels.use_kernel_mapping(mapping):
        kernels.kernelize(model, mode=mode, device=model.device.type)
    assert set(served.summary(model).values()) == {"dsv4_router"}
    with torch.no_grad():
        kernelized = model(ids).logits
        for router in routers(model):
            del router.forward
        assert torch.equal(kernelized, use(model, FUSED)(ids).logits)


SHAPES = [(4096, 256), (7168, 384)]


def build_real(seed: int, k: int, num_experts: int, num_layers: int = 3):
    """Return a model with the router shapes of V4-Flash or V4-Pro, and narrow experts."""
    shape = {"hidden_size": k, "n_routed_experts": num_experts}
    return build(seed, "cuda", num_layers=num_layers, **shape)


@pytest.mark.gpu
@pytest.mark.parametrize(("k", "num_experts"), SHAPES)
def test_experts_and_tokens_at_real_router_shapes(k, num_experts, seed) -> None:
    model = build_real(seed, k, num_experts)
    assert check_experts(model, prompts(seed, 4, 128, device="cuda")) > 0
    ids = prompts(seed + 1, 16, 32, device="cuda")
    assert greedy(model, FUSED, ids, 8) == greedy(model, JUDGE, ids, 8)


@pytest.mark.gpu
@pytest.mark.parametrize(("k", "num_experts"), SHAPES)
@pytest.mark.parametrize("num_tokens", [1, 8, 64])
def test_a_router_is_one_launch(k, num_experts, num_tokens, seed) -> None:
    from cuda.bindings import driver as cuda

    model = build_real(seed, k, num_experts, num_layers=2)
    hidden_states = torch.randn(1, num_tokens, k, device="cuda").to(BF16)
    ids = prompts(seed, 1, num_tokens, device="cuda")
    for router in routers(use(model, FUSED)):
        hashed = isinstance(router, served.HashRouter)
        given = (hidden_states, ids) if hashed else (hidden_states,)
        graph = torch.cuda.CUDAGraph(keep_graph=True)
        with torch.no_grad():
            eager = router(*given)
            with torch.cuda.graph(graph):
                out = router(*given)
        status, _, num_nodes = cuda.cuGraphGetNodes(cuda.CUgraph(graph.raw_cuda_graph()))
        assert status == cuda.CUresult.CUDA_SUCCESS
        assert num_nodes == 1
        graph.replay()
        assert all(map(torch.equal, out[1:], eager[1:]))


@pytest.mark.gpu
def test_fullgraph_gives_what_eager_gives_on_a_gpu(seed) -> None:
    model = build_real(seed, *SHAPES[0], num_layers=2)
    ids = prompts(seed, 2, 16, device="cuda")
    compiled = torch.compile(use(model, FUSED).model, fullgraph=True, backend="aot_eager")
    try:
        with torch.no_grad():
            expected = model.model(ids, use_cache=False)[0]
            assert torch.equal(compiled(ids, use_cache=False)[0], expected)
    finally:
        torch.compiler.reset()
