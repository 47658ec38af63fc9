"""vLLM's real layer on a GPU: its own router against the plugin's, each row against FP64."""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import Any

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("vllm", reason="vLLM is carried to a GPU machine by hand")

from gpu_calls import KEY_ROUNDING  # noqa: E402
from torch import nn  # noqa: E402
from vllm_layers import (  # noqa: E402
    KINDS,
    VOCABULARY,
    E,
    Layer,
    load,
    model_of,
    replaced_classes,
)

from dsv4_router_runtime.integrations.vllm import plugin, runner  # noqa: E402

pytestmark = [pytest.mark.serving, pytest.mark.gpu]
SHAPES = [(7168, 384), (4096, 256)]
COUNTS = [1, 8, 64, 128, 512]
# Of a weight, relative: what test_gpu_options.py allows where the logits are exact.
WEIGHT_ROUNDING = 1e-6
SERVED = pytest.mark.parametrize("served", [False, True], ids=["stock", "plugin"])


@pytest.fixture
def make(monkeypatch) -> Iterator[Any]:
    """Build a layer of vLLM's own classes or of the plugin's."""
    with replaced_classes(monkeypatch) as registry:

        def made(served: bool, shape: tuple[int, int] = SHAPES[1], **given: Any) -> Layer:
            registry.clear()
            if served:
                plugin.register()
            k, num_experts = shape
            return Layer(device="cuda", k=k, num_experts=num_experts, **given)

        yield made


def wrong_rows(given: Any, expected: Any, served: bool = True) -> int:
    """Count the rows with other experts than FP64's, or a weight off by more than WEIGHT_ROUNDING.

    The logits are exact. Rows whose keys FP32 may not tell apart are left out. Weights of vLLM's
    own router that are off are counted in print alone: it computes log(1 + exp(x)) in FP32, which
    loses the digits of a small exp(x).
    """
    weights, ids, margin = (*given, expected[2])
    ids, order = ids.long().sort(1)
    expected_ids, expected_order = expected[1].sort(1)
    exact = expected[0].gather(1, expected_order)
    error = (weights.double().gather(1, order) - exact).abs()
    off = ~(error <= WEIGHT_ROUNDING * exact)
    wrong, off = (ids != expected_ids).any(1), off.any(1)
    clear = margin >= KEY_ROUNDING
    assert clear.float().mean() > 0.9
    if not served:
        print(f"{int((off & ~wrong & clear).sum())} of {len(off)} rows with other weights")
        off = torch.zeros_like(off)
    return int(((wrong | off) & clear).sum())


def padding_of(num_tokens: int, first: int) -> Any:
    """Return a mask longer than a batch, as vLLM's buffer is, with padding from `first` on."""
    return torch.arange(num_tokens + 64, device="cuda") >= first


@SERVED
@pytest.mark.parametrize("ids_dtype", [None, torch.int64], ids=str)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_every_row_is_right_eager_and_replayed(make, seed, shape, kind, ids_dtype, served) -> None:
    layer = make(served, shape, seed=seed, ids_dtype=ids_dtype, **KINDS[kind])
    for num_tokens in COUNTS:
        x, input_ids = layer.batch(num_tokens)
        # vLLM's own router leaves the columns of shared experts in padding rows as they are.
        rows = num_tokens if kind == "shared" and not served else max(1, num_tokens - 3)
        padding = padding_of(num_tokens, rows)
        given = layer(x, input_ids, padding)
        assert given[1].dtype == (ids_dtype or torch.int32)
        assert wrong_rows(given, layer.expected(x, input_ids, padding), served) == 0
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            given = layer(x, input_ids, padding)
        for _ in range(2):
            new_x, new_ids = layer.batch(num_tokens)
            x.copy_(new_x)
            input_ids.copy_(new_ids)
            padding.copy_(padding_of(num_tokens, max(1, rows // 2)))
            if kind == "shared" and not served:
                padding.zero_()
            graph.replay()
            assert wrong_rows(given, layer.expected(x, input_ids, padding), served) == 0
    if served:
        assert layer.runner.verdict == runner.SERVED


def nodes_of(layer: Layer, x: Any, input_ids: Any, ids_dtype: Any) -> int:
    """Count the nodes of a graph that holds the gate and the choice of experts."""
    from cuda.bindings import driver as cuda

    def route() -> Any:
        logits, _ = layer.runner.gate(x)
        return layer.runner.router.select_experts(x, logits, ids_dtype, input_ids=input_ids)

    padding = padding_of(len(x), len(x))
    graph = torch.cuda.CUDAGraph(keep_graph=True)
    with layer.forward_context(padding):
        route()
        with torch.cuda.graph(graph):
            route()
    status, _, count = cuda.cuGraphGetNodes(cuda.CUgraph(graph.raw_cuda_graph()))
    assert status == cuda.CUresult.CUDA_SUCCESS
    return count


@pytest.mark.parametrize("num_tokens", [1, 8, 64])
@pytest.mark.parametrize("ids_dtype", [torch.int32, torch.int64], ids=str)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_a_router_is_one_launch(make, shape, kind, ids_dtype, num_tokens) -> None:
    layer = make(True, shape, **KINDS[kind])
    x, input_ids = layer.batch(num_tokens)
    layer(x, input_ids)
    assert nodes_of(layer, x, input_ids, ids_dtype) == 1


@pytest.mark.parametrize("num_tokens", [8, 128])
@pytest.mark.parametrize("kind", KINDS)
def test_a_captured_graph_routes_by_weights_that_are_loaded_anew(
    make, seed, kind, num_tokens
) -> None:
    layer = make(True, seed=seed, **KINDS[kind])
    x, input_ids = layer.batch(num_tokens)
    layer(x, input_ids)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        given = layer(x, input_ids)
    graph.replay()
    before = layer.expected(x, input_ids)
    assert wrong_rows(given, before) == 0
    for _ in range(2):
        load(layer, layer.new_weights("hash" in kind, "image" in kind))
        graph.replay()
        after = layer.expected(x, input_ids)
        assert wrong_rows(given, after) == 0
        assert not torch.equal(after[1], before[1])
        assert wrong_rows(layer(x, input_ids), after) == 0


@SERVED
def test_shared_experts_beside_the_router(make, seed, served) -> None:
    """vLLM runs them on a stream of its own, eager and in a graph."""
    with torch.device("cuda"):
        shared = nn.Linear(4096, 4096, bias=False, dtype=torch.bfloat16)
    layer = make(served, seed=seed, shared_experts=shared)
    x, _ = layer.batch(8)
    assert wrong_rows(layer(x), layer.expected(x), served) == 0
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        given = layer(x)
    x.copy_(layer.batch(8)[0])
    graph.replay()
    assert wrong_rows(given, layer.expected(x), served) == 0


@pytest.mark.parametrize("ids_dtype", [torch.int32, torch.int64], ids=str)
def test_eplb_maps_and_counts_the_routers_experts(make, seed, ids_dtype) -> None:
    layer = make(True, (4096, 256), seed=seed, ids_dtype=ids_dtype, eplb=True)
    num_experts = layer.num_experts
    shuffled = torch.randperm(num_experts, generator=layer.generator).cuda()
    load_view = torch.zeros(1, num_experts, dtype=torch.int32, device="cuda")
    layer.runner.set_eplb_state(
        0,
        load_view,
        shuffled[None, :, None],
        torch.ones(1, num_experts, dtype=torch.int64, device="cuda"),
    )
    state = layer.runner.eplb_state
    state.should_record_tensor = torch.ones(1, dtype=torch.bool, device="cuda")
    state.num_unpadded_tokens_tensors = [None]
    x, _ = layer.batch(33)
    padding = padding_of(33, 30)
    _, ids = layer(x, None, padding)
    logical = layer.expected(x, None, padding)[1]
    expected = torch.where(logical < 0, -1, shuffled[logical.clamp(min=0)])
    assert torch.equal(ids.long(), expected)
    chosen = expected[:30].flatten()
    assert torch.equal(load_view[0].long(), torch.bincount(chosen, minlength=num_experts))


def test_nothing_is_compiled_while_serving(make, monkeypatch) -> None:
    """vLLM's monitor raises on a compilation after warm-up."""
    from triton import knobs
    from vllm.utils import jit_monitor

    # The monitor has no way back, and other tests compile.
    hook = knobs.runtime.jit_post_compile_hook
    monkeypatch.setattr(knobs.runtime, "jit_post_compile_hook", hook)
    for name in ("_active", "_mode"):
        monkeypatch.setattr(jit_monitor, name, getattr(jit_monitor, name))
    layers = [make(True, seed=seed, **given) for seed, given in enumerate(KINDS.values())]
    batches = [layer.batch(512) for layer in layers]
    for layer, batch in zip(layers, batches, strict=True):
        layer(*batch)
    jit_monitor.activate(mode="error")
    assert jit_monitor.is_active()
    for layer, (x, input_ids) in zip(layers, batches, strict=True):
        for num_tokens in COUNTS:
            layer(x[:num_tokens], input_ids[:num_tokens])
    assert set(plugin.summary(model_of(*layers)).values()) == {runner.SERVED}


def test_a_capture_before_the_first_forward_is_vllms(make, caplog) -> None:
    layer = make(True)
    x, _ = layer.batch(8)
    with layer.forward_context():
        # What vLLM's own router loads at its first call.
        layer.runner.router.select_experts(x, layer.gate(x)[0], torch.int32)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        given = layer(x)
    assert layer.runner.verdict is None
    assert "a graph is captured before the first forward" in caplog.text
    graph.replay()
    assert wrong_rows(given, layer.expected(x), served=False) == 0
    layer(x)
    assert layer.runner.verdict == runner.SERVED


def test_a_table_with_a_repeated_expert_is_vllms(make) -> None:
    """Of a dummy load, say, whose table is random."""
    layer = make(True, hashed=True)
    layer.gate.tid2eid.data[VOCABULARY - 1] = 3
    x, input_ids = layer.batch(4)
    layer(x, input_ids)
    assert layer.runner.verdict.startswith("tid2eid: expected distinct ids in each row")


@pytest.mark.timing
@pytest.mark.parametrize("kind", ["text", "hash"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_the_host_time_of_a_layers_router(make, shape, kind) -> None:
    """The gate and the choice of experts at N = 8, eager, per layer."""
    best = {}
    for served in (False, True):
        layer = make(served, shape, **KINDS[kind])
        x, input_ids = layer.batch(8)
        layer(x, input_ids)
        with layer.forward_context(padding_of(8, 8)):
            rounds = []
            for _ in range(20):
                torch.cuda.synchronize()
                start = time.perf_counter()
                for _ in range(50):
                    logits, _ = layer.runner.gate(x)
                    layer.runner.router.select_experts(x, logits, torch.int32, input_ids=input_ids)
                rounds.append((time.perf_counter() - start) / 50 * 1e6)
        best[served] = min(rounds)
    print(f"\n{shape} {kind}: stock {best[False]:.1f} us, plugin {best[True]:.1f} us")
    assert best[True] <= 60
    assert best[True] < best[False]


def test_the_layers_differ_in_experts(make) -> None:
    """Or the tests above would pass whatever is chosen."""
    layer = make(True)
    x, _ = layer.batch(64)
    assert layer(x)[1].unique().numel() > E
