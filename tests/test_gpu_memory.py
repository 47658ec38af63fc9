"""On a GPU: scratch, private copies, captures and streams, whatever the server does to memory."""

from __future__ import annotations

import gc
import subprocess
import sys
import textwrap
import time

import pytest

torch = pytest.importorskip("torch", reason="torch is not installed")

from gpu_calls import (  # noqa: E402
    captured,
    integers,
    logits_of,
    most_in_one_launch,
    outputs,
)
from gpu_recorder import table_of, w_copy_of, workspace_of  # noqa: E402
from test_gpu_router import bound as bind  # noqa: E402
from test_gpu_router import check as check_against_oracle  # noqa: E402

from dsv4_router_runtime import (  # noqa: E402
    Router,
    RouterError,
    binding,
    check,
    reset,
    router_reference,
    status,
)
from dsv4_router_runtime.device import driver, memory, streams  # noqa: E402
from dsv4_router_runtime.device.capture import capture_of, stream_id  # noqa: E402
from dsv4_router_runtime.device.workspace import KEPT_FOREIGN_SLOTS  # noqa: E402

pytestmark = pytest.mark.gpu

K, E, TOP_K, SCALE = 1024, 384, 6, 2.5
MIB = 2**20


@pytest.fixture
def random(seed):
    return torch.Generator(device="cuda").manual_seed(seed)


class Layer:
    """A router, inputs for up to `most` tokens, and what the first eager call made of them."""

    def __init__(self, random, most=64, num_experts=E, layout="kmajor", **more) -> None:
        self.x, self.W, self.bias = integers(random, most, K, num_experts, layout)
        self.router = bind(self.W, self.bias, SCALE, TOP_K, **more)
        self.weights, self.ids = outputs(most, TOP_K)
        self.call(most)
        torch.cuda.synchronize()
        check_against_oracle(
            self.weights, self.ids, logits_of(self.x, self.W), self.bias, SCALE, TOP_K
        )
        self.expected = self.weights.clone(), self.ids.clone()

    def call(self, num_tokens: int) -> None:
        self.router(self.x[:num_tokens], self.weights[:num_tokens], self.ids[:num_tokens])

    def forget(self) -> None:
        self.weights.fill_(-1)
        self.ids.fill_(-1)

    def is_right(self, num_tokens: int) -> bool:
        """Whether the last call of `num_tokens` gave what the first one did, bit for bit."""
        torch.cuda.synchronize()
        got = self.weights[:num_tokens], self.ids[:num_tokens]
        return all(
            torch.equal(mine, wanted[:num_tokens])
            for mine, wanted in zip(got, self.expected, strict=True)
        )


def node_types(graph) -> list[str]:
    cuda = driver.bindings()
    _, count = driver.checked("counting nodes", cuda.cuGraphGetNodes(graph))
    nodes, _ = driver.checked("listing nodes", cuda.cuGraphGetNodes(graph, count))
    types = [driver.checked("asking a node", cuda.cuGraphNodeGetType(node)) for node in nodes]
    return [kind.name.removeprefix("CU_GRAPH_NODE_TYPE_") for kind in types]


def capture(layer: Layer, num_tokens: int, pool) -> tuple[torch.cuda.CUDAGraph, list[str]]:
    """Capture one call on the current stream without torch.cuda.graph, which collects garbage."""
    graph = torch.cuda.CUDAGraph()
    graph.capture_begin(pool=pool)
    try:
        layer.call(num_tokens)
        _, captured_graph = capture_of(torch.cuda.current_stream().cuda_stream)
        kinds = node_types(captured_graph)
    finally:
        graph.capture_end()
    return graph, kinds


def captures_left(wanted: int) -> int:
    """Wait for the driver to drop what belongs to graphs that are gone: it does so by and by."""
    torch.cuda.synchronize()
    deadline = time.monotonic() + 10
    while status().captures > wanted and time.monotonic() < deadline:
        time.sleep(0.01)
    return status().captures


@pytest.mark.parametrize("shared", [False, True])
def test_piecewise_graphs_hold_launches_alone_and_little_scratch(random, shared):
    """61 layers and 83 sizes of batches, each a graph of its own."""
    sizes = [1, 2, 4, *range(8, 65, 8), *range(80, 80 + 16 * 72, 16)]
    most = most_in_one_launch(E)
    layer = Layer(random, most=most, share_captured_scratch=shared)
    large = Layer(random, most=max(sizes), share_captured_scratch=shared)
    before = captures_left(0)
    free = status().scratch_bytes
    graphs, pool = [], torch.cuda.graph_pool_handle()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        for num_tokens in (1, 1000):
            (layer if num_tokens <= most else large).call(num_tokens)
        for at in range(61 * len(sizes)):
            num_tokens = sizes[at % len(sizes)]
            graph, kinds = capture(layer if num_tokens <= most else large, num_tokens, pool)
            # What a product is made of is up to cuBLAS.
            assert kinds == ["KERNEL"] or num_tokens > most
            graphs.append((num_tokens, graph))
    held = status()
    assert len(graphs) == 5063 == held.captures - before
    # 11 sizes of decode and 36 of prefill; a shared slot grows with each.
    assert held.capture_slots == (47 if shared else 61 * 47)
    # 53 MiB of decode's; prefill keeps 3 KB per token of each graph, to N = 640.
    assert held.capture_bytes <= (48 if shared else 2400) * MIB
    # Beside them the slot of the new stream.
    assert held.scratch_bytes <= (free + 56 * MIB if shared else 2500 * MIB)
    for num_tokens, graph in graphs[:: len(graphs) // 400]:
        if num_tokens <= most:
            layer.forget()
            graph.replay()
            assert layer.is_right(num_tokens), num_tokens
    check()
    del graph
    graphs.clear()
    assert captures_left(before) == before
    # torch's pool has gone with its graphs.
    with torch.cuda.stream(stream):
        graph, _ = capture(layer, 64, torch.cuda.graph_pool_handle())
    layer.forget()
    graph.replay()
    assert layer.is_right(64)
    assert status().scratch_bytes == held.scratch_bytes


def test_a_slot_stays_with_a_graph_that_is_destroyed_while_it_runs(random):
    layer = Layer(random)
    before = captures_left(0)
    stream = torch.cuda.Stream()
    graph = captured([lambda: torch.cuda._sleep(400_000_000), lambda: layer.call(64)], stream)
    with torch.cuda.stream(stream):
        graph.replay()
    del graph
    released = status().captures == before
    assert stream.query() or not released
    assert captures_left(before) == before


def test_no_memory_that_lasts_is_torchs(random):
    """What a server makes in a pool of its own, and unmaps while it sleeps."""
    pool = torch.cuda.MemPool()
    with torch.cuda.use_mem_pool(pool):
        copied = Layer(random, num_experts=132, layout="emajor")
        table = torch.arange(TOP_K, device="cuda").repeat(100, 1)
        hashed = bind(copied.W, None, SCALE, TOP_K, tid2eid=table)
    graph = captured([lambda: copied.call(64)])
    ours = [w_copy_of(copied.router), w_copy_of(hashed), table_of(hashed)]
    addresses = [tensor.data_ptr() for tensor in ours]
    space = workspace_of(copied.router)
    addresses += [slot.zeroed for slot in space.slots.values()]
    addresses += [piece.address for held in space.captures.values() for piece in held.pieces]
    for segment in torch.cuda.memory_snapshot():
        start, end = segment["address"], segment["address"] + segment["total_size"]
        assert not [address for address in addresses if start <= address < end]
    copied.forget()
    graph.replay()
    assert copied.is_right(64)


def test_scratch_that_is_not_zero_is_found_and_reset(random):
    layer = Layer(random)
    graph = captured([lambda: layer.call(64)])
    check()
    space = workspace_of(layer.router)
    *_, piece = (piece for held in space.captures.values() for piece in held.pieces)
    address, size = piece.address, piece.size
    cuda = driver.bindings()
    driver.checked("writing", cuda.cuMemsetD8(address + 256, 0xFF, size - 256))
    with pytest.raises(RouterError, match=rf"capture \d+: .*0xff at address {address + 256:#x}"):
        check()
    reset()
    check()
    layer.forget()
    graph.replay()
    assert layer.is_right(64)
    layer.forget()
    layer.call(64)
    assert layer.is_right(64)


@pytest.mark.parametrize("layout", ["kmajor", "emajor"])
def test_a_graph_is_right_after_its_router_was_dropped(random, layout):
    """E = 132 with unit stride along E is bound as a copy; the caller's tensors go as well."""
    layer = Layer(random, num_experts=132, layout=layout)
    graph = captured([lambda: layer.call(40)])
    layer.router = layer.W = layer.bias = None
    gc.collect()
    torch.cuda.empty_cache()
    # Whatever was freed is given out again, and overwritten.
    waste = [memory.DeviceMemory(0, K * 132 * 2) for _ in range(20)]
    for each in waste:
        driver.checked("filling", driver.bindings().cuMemsetD8(each.address, 0xFF, each.size))
    mine = [torch.full((K, 132), float("nan"), device="cuda").bfloat16() for _ in range(20)]
    layer.forget()
    graph.replay()
    assert layer.is_right(40)
    del waste, mine, graph
    gc.collect()


def test_a_router_dropped_before_its_call_has_run(random):
    """Freeing its copy waits for the call."""
    layer = Layer(random, num_experts=132, layout="emajor")
    layer.forget()
    torch.cuda.synchronize()
    with torch.cuda.stream(torch.cuda.Stream()):
        torch.cuda._sleep(400_000_000)
        layer.call(64)
    layer.router = None
    gc.collect()
    for _ in range(20):
        waste = memory.DeviceMemory(0, K * 132 * 2)
        memory.zero(0, (waste.address, waste.size))
    assert layer.is_right(64)


def test_dropped_routers_leave_no_memory_behind(random):
    x, W, bias = integers(random, 4, K, 132, "emajor")
    out = outputs(4, TOP_K)
    bind(W, bias, SCALE, TOP_K)(x, *out)
    gc.collect()
    before = status().driver_bytes
    for _ in range(50):
        bind(W, bias, SCALE, TOP_K)(x, *out)
    gc.collect()
    assert status().driver_bytes == before
    torch.cuda.synchronize()


@pytest.mark.parametrize("num_tokens", [4, 100, 300])
def test_weights_that_moved_are_refused_and_bound_by_reset(random, num_tokens):
    layer = Layer(random, most=num_tokens)
    _, other, _ = integers(random, num_tokens, K, E)
    layer.W.data = other
    with pytest.raises(ValueError, match=r"W_gate: expected the memory .* moved since"):
        layer.call(num_tokens)
    layer.router.reset()
    layer.call(num_tokens)
    torch.cuda.synchronize()
    logits = logits_of(layer.x, other)
    check_against_oracle(layer.weights, layer.ids, logits, layer.bias, SCALE, TOP_K)


@pytest.mark.parametrize("how", [Router.reset, Router.refresh])
def test_a_copy_is_taken_again_under_a_captured_graph(random, how):
    layer = Layer(random, num_experts=132, layout="emajor")
    graph = captured([lambda: layer.call(64)])
    _, other, _ = integers(random, 64, K, 132, "emajor")
    layer.W.copy_(other)
    how(layer.router)
    graph.replay()
    torch.cuda.synchronize()
    logits = logits_of(layer.x, other)
    check_against_oracle(layer.weights, layer.ids, logits, layer.bias, SCALE, TOP_K)


def tables(random):
    """Return tid2eid, for token ids below 100."""
    rows = torch.rand(100, 132, generator=random, device="cuda")
    return rows.argsort(1)[:, :TOP_K].int()


@pytest.mark.parametrize("num_tokens", [1, 8, 64, 200, 400])
@pytest.mark.parametrize("layout", ["kmajor", "emajor"])
@pytest.mark.parametrize("vision", [False, True], ids=["text", "images"])
@pytest.mark.parametrize("hashed", [False, True], ids=["learned", "hash"])
def test_weights_are_loaded_anew_under_a_captured_graph(random, hashed, vision, layout, num_tokens):
    """emajor rows of 132 experts are copied; what is not copied is read where it was loaded."""
    x, W, bias = integers(random, num_tokens, K, 132, layout)
    options, call = {}, {}
    if hashed:
        bias, options["tid2eid"] = None, tables(random)
        call["input_ids"] = torch.arange(num_tokens, device="cuda") % 101
    if vision:
        options["bias_vl"] = integers(random, 1, K, 132)[2]
        call["image_mask"] = torch.arange(num_tokens, device="cuda") % 2 == 1
    router = bind(W, bias, SCALE, TOP_K, **options)
    assert router.weights_copied == (layout == "emajor")
    weights, ids = outputs(num_tokens, TOP_K)
    graph = captured([lambda: router(x, weights, ids, **call)])
    seen = []
    for _ in range(3):
        _, other, other_bias = integers(random, num_tokens, K, 132, layout)
        W.copy_(other)
        if hashed:
            options["tid2eid"].copy_(tables(random))
        else:
            bias.copy_(other_bias)
        if vision:
            options["bias_vl"].copy_(other_bias.flip(0))
        router.refresh()
        graph.replay()
        expected, expected_ids = router_reference(x, W, bias, SCALE, TOP_K, **options, **call)
        assert torch.equal(ids, expected_ids)
        torch.testing.assert_close(weights.double(), expected, rtol=1e-6, atol=1e-37)
        seen.append(ids.clone())
    assert not torch.equal(seen[0], seen[1])


def test_a_refresh_follows_what_the_current_stream_does(random):
    """A slow write of the weights on a side stream, then refresh() there; any stream may replay."""
    layer = Layer(random, num_experts=132, layout="emajor")
    graph = captured([lambda: layer.call(64)])
    _, other, _ = integers(random, 64, K, 132, "emajor")
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        torch.cuda._sleep(200_000_000)
        layer.W.copy_(other)
        layer.router.refresh()
    graph.replay()
    torch.cuda.synchronize()
    logits = logits_of(layer.x, other)
    check_against_oracle(layer.weights, layer.ids, logits, layer.bias, SCALE, TOP_K)


@pytest.mark.parametrize("busy", [False, True], ids=["idle", "busy"])
def test_foreign_streams_without_end(random, busy):
    """Each is destroyed after one call, with the call still under way if `busy`."""
    layer = Layer(random, most=8)
    cuda = driver.bindings()
    before = status().streams
    outs = [outputs(8, TOP_K) for _ in range(100)]
    most = 0
    for at in range(2_000 if busy else 10_000):
        made = cuda.cuStreamCreate(cuda.CUstream_flags.CU_STREAM_NON_BLOCKING)
        handle = driver.checked("making a stream", made)
        with torch.cuda.stream(torch.cuda.ExternalStream(int(handle))):
            if busy:
                torch.cuda._sleep(100_000)
            layer.router(layer.x, *outs[at % 100])
            if not busy:
                torch.cuda.current_stream().synchronize()
        driver.checked("destroying a stream", cuda.cuStreamDestroy(handle))
        if at % 100 == 99:
            most = max(most, status().streams)
            torch.cuda.synchronize()
            for weights, ids in outs:
                assert torch.equal(weights, layer.expected[0])
                assert torch.equal(ids, layer.expected[1])
                weights.fill_(-1)
                ids.fill_(-1)
            torch.cuda.synchronize()
    assert most - before <= KEPT_FOREIGN_SLOTS + (100 if busy else 2)
    check()


def test_logits_of_a_foreign_stream_are_right_where_torch_fills_new_memory(random):
    """If algorithms are deterministic, with NaN, on the stream that the memory is taken on."""
    layer = Layer(random, most=20_000)
    cuda = driver.bindings()
    memory_stream = binding._memory_stream(layer.x.device)
    outs = [outputs(20_000, TOP_K) for _ in range(40)]
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        for turn in range(20):
            handle = driver.checked("making a stream", cuda.cuStreamCreate(1))
            torch.cuda.synchronize()
            with torch.cuda.stream(memory_stream):
                torch.cuda._sleep(100_000 * turn)
            with torch.cuda.stream(torch.cuda.ExternalStream(int(handle))):
                for out in outs:
                    layer.router(layer.x, *out)
            torch.cuda.synchronize()
            driver.checked("destroying a stream", cuda.cuStreamDestroy(handle))
            for weights, ids in outs:
                assert torch.equal(weights, layer.expected[0])
                assert torch.equal(ids, layer.expected[1])
                weights.fill_(-1)
                ids.fill_(-1)
    finally:
        torch.use_deterministic_algorithms(False)


def test_ids_tell_streams_and_threads_apart(random):
    """What the runtime takes for granted about the driver's ids and torch's."""
    made = [torch.cuda.Stream() for _ in range(3)]
    ids = [stream_id(0, each.cuda_stream) for each in made]
    assert len(set(ids)) == 3
    assert ids == [stream_id(0, each.cuda_stream) for each in made]
    assert streams.is_lasting(0, torch.cuda.current_stream().cuda_stream)
    with torch.cuda.stream(made[0]):
        assert streams.is_lasting(0, made[0].cuda_stream)
    cuda = driver.bindings()
    seen = set()
    for _ in range(50):
        handle = driver.checked("making", cuda.cuStreamCreate(1))
        seen.add(stream_id(0, int(handle)))
        with torch.cuda.stream(torch.cuda.ExternalStream(int(handle))):
            assert not streams.is_lasting(0, int(handle))
        driver.checked("destroying", cuda.cuStreamDestroy(handle))
    assert len(seen) == 50


ELSEWHERE = """
    import threading
    import torch
    from dsv4_router_runtime import Router, check

    def layer(e, hashed):
        W = torch.randn(1024, e, device="cuda").bfloat16()
        table = torch.arange(6, device="cuda").repeat(100, 1) if hashed else None
        bias = None if hashed else torch.zeros(e, device="cuda")
        return W, bias, {"tid2eid": table}

    def outputs():
        return torch.zeros(8, 6, device="cuda"), torch.zeros(8, 6, dtype=torch.int32, device="cuda")

    x = torch.randn(8, 1024, device="cuda").bfloat16()
    tokens = torch.zeros(8, dtype=torch.int64, device="cuda")
    plain, hashed = layer(132, False), layer(384, True)
    outs = [outputs() for _ in range(4)]

    def bind(given):
        W, bias, more = given
        return Router(W, bias, top_k=6, routed_scaling_factor=1.0, **more)

    bind(plain)(x, *outs[0])  # loads the kernels, and warms torch's own operators
    bind(hashed)(x, *outs[1], input_ids=tokens)
    torch.cuda.synchronize()
    captured, failed = bind(plain), []

    def elsewhere():
        try:
            with torch.cuda.stream(torch.cuda.Stream()):
                first, second = bind(plain), bind(hashed)
                first(x, *outs[2])
                second(x, *outs[3], input_ids=tokens)
                del first, second
        except BaseException as error:
            failed.append(error)

    graph, stream = torch.cuda.CUDAGraph(), torch.cuda.Stream()
    with torch.cuda.stream(stream):
        graph.capture_begin(capture_error_mode="global")
        captured(x, *outs[0])
        thread = threading.Thread(target=elsewhere)
        thread.start()
        thread.join(60)
        captured(x, *outs[1])
        graph.capture_end()
    if failed:
        raise failed[0]
    graph.replay()
    torch.cuda.synchronize()
    assert torch.equal(outs[0][1], outs[2][1]) and torch.equal(outs[1][1], outs[2][1])
    check()
    print("both right")
"""


def test_a_bind_and_a_first_call_leave_another_threads_global_capture_alone():
    """In a process of its own: a broken capture may leave the context of no use."""
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(ELSEWHERE)],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.stdout == "both right\n", done.stderr[-4000:]


def test_memory_is_refused_in_words_and_the_next_call_is_right(random):
    layer = Layer(random)
    with pytest.raises(RouterError, match=r"allocating \d+ bytes on GPU 0: .*OUT_OF_MEMORY"):
        memory.DeviceMemory(0, 2**45)
    layer.forget()
    layer.call(64)
    assert layer.is_right(64)
