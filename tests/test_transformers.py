"""DeepSeek-V4 of transformers with served routers: real classes, tiny sizes; real on a GPU."""

from __future__ import annotations

import functools
import inspect
import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
model_code = pytest.importorskip("transformers.models.deepseek_v4.modeling_deepseek_v4")

from gpu_calls import BF16  # noqa: E402
from transformers import monkey_patching  # noqa: E402
from transformers.utils import output_capturing  # noqa: E402
from transformers_models import (  # noqa: E402
    FUSED,
    JUDGE,
    STOCK,
    VOCABULARY,
    build,
    check_experts,
    check_generation,
    check_tokens,
    check_weights,
    greedy,
    in_bf16,
    in_fp32,
    load,
    logit_error,
    prompts,
    routers,
    use,
)

from dsv4_router_runtime import log  # noqa: E402
from dsv4_router_runtime.integrations import transformers as served  # noqa: E402
from dsv4_router_runtime.reference import router_scores  # noqa: E402


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


def test_weights_of_logits_summed_in_fp32_pass_and_those_of_worse_logits_fail() -> None:
    generator = torch.Generator().manual_seed(12)
    x = torch.randn(64, 7168, generator=generator).to(BF16)
    weight = (0.02 * torch.randn(384, 7168, generator=generator)).to(BF16)
    chosen = torch.rand(64, 384, generator=generator).argsort(1)[:, :6]
    exact, error = x.double() @ weight.double().t(), logit_error(x, weight)

    def check(logits: Any) -> None:
        scores = router_scores(logits.double()).gather(1, chosen)
        check_weights(scores / scores.sum(1, keepdim=True), chosen, exact, error, 1.0)

    summed = torch.zeros(64, 384)
    for k in range(0, 7168, 16):
        summed += x[:, k : k + 16].float() @ weight[:, k : k + 16].float().t()
    check(summed)
    for worse in (exact.to(BF16), x[:, 1:].double() @ weight[:, 1:].double().t(), exact * 1.001):
        with pytest.raises(AssertionError, match="times the tolerance"):
            check(worse)


def test_greedy_tokens_are_those_of_fp64_gates(tiny) -> None:
    ids = prompts(2, 4, 32)
    expected = greedy(tiny, JUDGE, ids, 6)
    assert len({tuple(row) for row in expected}) > 1
    assert greedy(tiny, FUSED, ids, 6) == expected
    assert check_generation(tiny, ids, 6) == 4 * 4 * (32 + 5)


def test_tokens_in_fp32_tell_routers_apart() -> None:
    model, ids = in_fp32(build(0)), prompts(11, 4, 64)
    num_rows, num_positions = check_tokens(model, FUSED, ids, 6)
    assert num_rows >= 3
    assert num_positions >= 0.95 * ids.shape[0] * (ids.shape[1] + 6)
    with pytest.raises(AssertionError):
        check_tokens(model, STOCK, ids, 6)


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
        (lambda router: setattr(router, "score_fn", torch.nn.Sigmoid()), "are Sigmoid"),
        (lambda router: router.to("meta"), "the weight is on meta"),
        (
            lambda router: setattr(
                router.weight, "data", torch.zeros(32 * 256 + 1, dtype=BF16)[1:].view(32, 256)
            ),
            "address is no multiple of 16",
        ),
    ],
    ids=["FP32", "BF16 bias", "top 9", "K of 32", "sigmoid", "meta", "address"],
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


def test_a_table_that_names_an_expert_twice_is_refused(tiny) -> None:
    """As the zeros of `from_config` do."""
    router = served.FusedHashRouter(tiny.config).to(BF16).requires_grad_(False)
    with pytest.raises(ValueError, match="tid2eid: expected distinct ids in each row"):
        router(torch.ones(3, 256, dtype=BF16), torch.arange(3))


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


def test_the_summary_sees_through_a_forward_that_is_put_before_a_routers() -> None:
    """As a `device_map` or expert parallelism does in a model that exists."""
    for classes, verdict in ((FUSED, "dsv4_router"), (STOCK, "transformers: built without ")):
        model = use(build(13, num_layers=2), classes)
        for router in routers(model):
            router.forward = functools.partial(router.forward)
        assert all(each.startswith(verdict) for each in served.summary(model).values())


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
    num_checked = check_generation(model, ids, 8)
    in_fp32(model)
    num_rows, num_positions = check_tokens(model, FUSED, ids, 8)
    print(f"{num_checked} rows, {num_rows} of 16 answers, {num_positions} of 640 positions")
    assert num_rows >= 14
    assert num_positions >= 620
    with pytest.raises(AssertionError):
        check_tokens(model, STOCK, ids, 8)


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
def test_the_page_runs_as_written(seed, tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    page = Path(served.__file__).with_name("TRANSFORMERS.md").read_text(encoding="utf-8")
    build(seed, num_layers=2).save_pretrained("checkpoint")
    names: dict[str, Any] = {"folder": "checkpoint", "prompt": prompts(seed, 1, 8, device="cuda")}
    for block in re.findall(r"```python\n(.*?)```", page, re.DOTALL):
        exec(compile(block, "TRANSFORMERS.md", "exec"), names)
        if transformers.__version__.startswith("5.17.") and "before" not in names:
            in_bf16(names["model"])  # as the page says
    assert set(names["before"].values()) == {"dsv4_router"}
    assert all(each.startswith("transformers: ") for each in names["after"].values())


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
