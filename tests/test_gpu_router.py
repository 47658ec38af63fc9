"""The router on a GPU against the oracle.

The oracle's logits are FP64 products computed on the same GPU: no kernel of this project and no
tensor-core format takes part, and `test_the_oracle_does_not_depend_on_the_gpu` holds them to the
CPU's. What follows the logits is `select_reference`, plain torch.

Every call in this file writes into outputs that are larger than it may touch; see `route`.
"""

from __future__ import annotations

import threading

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

torch = pytest.importorskip("torch", reason="torch is not installed")

from gpu_calls import (  # noqa: E402
    BF16,
    CANARY,
    KEY_ROUNDING,
    captured,
    gaussian,
    integers,
    laid_out,
    logits_of,
    most_in_one_launch,
    outputs,
)

from dsv4_router_runtime import Router, dense_router_dispatch  # noqa: E402
from dsv4_router_runtime import check as check_scratch  # noqa: E402
from dsv4_router_runtime.reference import (  # noqa: E402
    ranking,
    ranking_margin,
    router_reference,
    router_scores,
    select_reference,
    selection_keys,
)

pytestmark = pytest.mark.gpu

TOKENS = [0, 1, 2, 6, 7, 8, 9, 16, 31, 32, 33, 63, 64, 65, 128, 129, 256, 1000, 8192]
MODELS = {
    "V4-Flash": (4096, 256, 6, 1.5),
    "V4-Pro": (7168, 384, 6, 2.5),
    "V4.1-Flash": (5120, 384, 6, 1.5),
    "V4.1-draft": (5120, 128, 3, 1.5),
}
LAYOUTS = ["kmajor", "emajor"]
# Logits of K = 7168 terms of size 1 summed in FP32, whatever the order: well below this.
SUM_ERROR = 2e-4


@pytest.fixture
def random(seed):
    """A generator on the GPU, seeded by the test's own id."""
    return torch.Generator(device="cuda").manual_seed(seed)


def route(router, x, top_k: int, rows: int = 3, columns: int = 2):
    """Route into outputs with `rows` and `columns` to spare, whose canaries must survive."""
    num_tokens = x.shape[0]
    shape = (num_tokens + rows, top_k + columns)
    weights = torch.full(shape, float(CANARY), device="cuda")
    ids = torch.full(shape, CANARY, dtype=torch.int32, device="cuda")
    router(x, weights, ids)
    for out in (weights, ids):
        assert (out[num_tokens:] == CANARY).all()
        assert (out[:, top_k:] == CANARY).all()
    return weights[:num_tokens, :top_k], ids[:num_tokens, :top_k]


def check(weights, ids, logits, bias, scale, top_k, *, logit_error=0.0, weight_error=1e-6):
    """Compare with the oracle; returns how many rows were too close to call.

    On every row: ids distinct and in range, weights finite and those of the chosen ids, and the
    chosen keys as large, rank by rank, as the oracle's. On rows whose ranking is clear: its ids.
    """
    keys = selection_keys(logits, bias)
    tolerance = logit_error + KEY_ROUNDING * keys.nan_to_num(0, 0, 0).abs().clamp(min=1).amax(1)
    expected_ids = ranking(keys)[:, :top_k]
    chosen = ids.long()
    assert ((ids >= 0) & (ids < logits.shape[1])).all()
    assert (chosen.sort(1)[0].diff(dim=1) > 0).all()
    assert weights.isfinite().all()

    clear = ranking_margin(logits, bias, top_k) > tolerance
    assert torch.equal(chosen[clear], expected_ids[clear])
    shortfall = keys.gather(1, expected_ids) - keys.gather(1, chosen)
    assert (shortfall.nan_to_num(0).abs() <= tolerance[:, None]).all()

    scores = router_scores(logits).gather(1, chosen)
    expected = scores / (scores.sum(1, keepdim=True) + 1e-20) * scale
    torch.testing.assert_close(weights.double(), expected, rtol=weight_error, atol=1e-37)
    return int((~clear).sum())


def bound(W, bias, scale, top_k, **more):
    return Router(W, bias, top_k=top_k, routed_scaling_factor=scale, **more)


# ------------------------------------------------------------------ against the oracle


@pytest.mark.parametrize("num_tokens", TOKENS)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("model", MODELS)
def test_models_on_integers(random, model, layout, num_tokens):
    k, num_experts, top_k, scale = MODELS[model]
    x, W, bias = integers(random, num_tokens, k, num_experts, layout)
    weights, ids = route(bound(W, bias, scale, top_k), x, top_k)
    unclear = check(weights, ids, logits_of(x, W), bias, scale, top_k)
    assert unclear <= 1 + num_tokens // 100


@pytest.mark.parametrize("num_tokens", TOKENS)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("model", MODELS)
def test_models_on_gaussian_inputs_with_real_biases(random, model, layout, num_tokens):
    k, num_experts, top_k, scale = MODELS[model]
    x, W, bias = gaussian(random, num_tokens, k, num_experts, layout)
    weights, ids = route(bound(W, bias, scale, top_k), x, top_k)
    errors = {"logit_error": SUM_ERROR, "weight_error": 1e-3}
    unclear = check(weights, ids, logits_of(x, W), bias, scale, top_k, **errors)
    assert unclear <= 3 + num_tokens // 10


@pytest.mark.parametrize("num_tokens", [1, 16, 17, 64, 65, 130, 1000])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("num_experts", [8, 132, 144, 160, 192, 216, 512])
def test_numbers_of_experts(random, num_experts, layout, num_tokens):
    x, W, bias = integers(random, num_tokens, 4096, num_experts, layout)
    router = bound(W, bias, 1.5, 6)
    assert router.weights_copied == (layout == "emajor" and num_experts % 8 != 0)
    weights, ids = route(router, x, 6)
    unclear = check(weights, ids, logits_of(x, W), bias, 1.5, 6)
    # Where nearly all experts are chosen, the last ones' scores vanish beside equal biases.
    assert unclear <= (1 + num_tokens // 100 if num_experts > 100 else num_tokens)


@pytest.mark.parametrize("num_tokens", [5, 40, 100, 200, 400])
@pytest.mark.parametrize("top_k", range(1, 9))
def test_top_k(random, top_k, num_tokens):
    x, W, bias = integers(random, num_tokens, 5120, 160)
    weights, ids = route(bound(W, bias, 2.5, top_k), x, top_k)
    assert check(weights, ids, logits_of(x, W), bias, 2.5, top_k) <= max(2, num_tokens // 100)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("num_experts", [1, 2, 7, 63, 64, 65, 509])
@pytest.mark.parametrize("k", [64, 192, 1024, 1088, 6144])
def test_few_blocks_of_k_and_odd_numbers_of_experts(random, record_cases, k, num_experts, layout):
    """K = 64 is one block for all K splits together: most of them have nothing to add."""
    top_k = min(8, num_experts)
    x, W, bias = integers(random, 130, k, num_experts, layout)
    router = bound(W, bias, 1.0, top_k)
    for num_tokens in (16, 19, 70, 130):
        some = x[:num_tokens]
        weights, ids = route(router, some, top_k)
        unclear = check(weights, ids, logits_of(some, W), bias, 1.0, top_k)
        assert unclear <= (1 + num_tokens // 50 if num_experts > 60 else num_tokens)
        record_cases()


@settings(max_examples=100, deadline=None, derandomize=True)
@given(
    num_tokens=st.one_of(st.integers(0, 80), st.integers(65, 400)),
    blocks=st.integers(1, 20),
    num_experts=st.integers(1, 512),
    top_k=st.integers(1, 8),
    layout=st.sampled_from(LAYOUTS),
    spare=st.tuples(st.integers(0, 3), st.integers(0, 5)),
    x_padding=st.sampled_from([0, 8, 64]),
    w_padding=st.sampled_from([0, 8, 24]),
    number=st.integers(0, 2**31),
)
def test_any_shape(
    record_cases,
    num_tokens,
    blocks,
    num_experts,
    top_k,
    layout,
    spare,
    x_padding,
    w_padding,
    number,
):
    """Views into larger tensors, for operands and outputs alike, of any shape that is allowed."""
    random = torch.Generator(device="cuda").manual_seed(number)
    k, top_k = 64 * blocks, min(top_k, num_experts)
    x, W, bias = integers(random, num_tokens, k, num_experts, layout)
    x = torch.nn.functional.pad(x, (0, x_padding), value=torch.nan)[:, :k]
    if layout == "kmajor":
        W = torch.nn.functional.pad(W.t(), (0, w_padding), value=torch.nan)[:, :k].t()
    else:
        W = torch.nn.functional.pad(W, (0, w_padding), value=torch.nan)[:, :num_experts]
    weights, ids = route(bound(W, bias, 1.5, top_k), x, top_k, *spare)
    check(weights, ids, logits_of(x, W), bias, 1.5, top_k)
    sums = weights.double().sum(1)
    assert ((sums - 1.5).abs() < 1e-5).logical_or(sums < 1.5).all()
    record_cases()


def test_the_oracle_does_not_depend_on_the_gpu(random):
    x, W, bias = gaussian(random, 33, 4096, 132)
    here = select_reference(logits_of(x, W), bias, 1.5, 6)
    there = router_reference(x.cpu(), W.cpu(), bias.cpu(), 1.5, 6)
    assert torch.equal(here[1].cpu(), there[1])
    torch.testing.assert_close(here[0].cpu(), there[0], rtol=1e-12, atol=0)


# ------------------------------------------------------------------ odd values


def from_logits(logits, layout="kmajor", k=4096, scale_up=1.0):
    """Operands that give these logits exactly (values that BF16 holds): one-hot rows pick them.

    With `scale_up` a power of two, hidden_states carries it and W_gate its inverse, so that values
    beyond BF16's or FP32's range can be reached.
    """
    num_tokens, num_experts = logits.shape
    x = torch.zeros(num_tokens, k, dtype=BF16, device="cuda")
    # Spread over K, so that every K split has a part in it.
    rows = torch.arange(num_tokens, device="cuda")
    places = rows * (k // num_tokens)
    x[rows, places] = scale_up
    W = torch.zeros(k, num_experts, dtype=BF16, device="cuda")
    W[places] = (logits / scale_up).to(BF16)
    return x, laid_out(W, layout)


@pytest.mark.parametrize("num_tokens", [1, 16, 64, 100, 200, 300])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("value", [0.0, 1.0, -100.0, 100.0])
def test_all_ties_give_the_first_experts(value, layout, num_tokens):
    logits = torch.full((num_tokens, 384), value, dtype=torch.float64, device="cuda")
    x, W = from_logits(logits, layout)
    bias = torch.full((384,), 8.08, device="cuda")
    weights, ids = route(bound(W, bias, 2.5, 8), x, 8)
    assert (ids == torch.arange(8, device="cuda")).all()
    check(weights, ids, logits, bias, 2.5, 8)


@pytest.mark.parametrize("num_tokens", [16, 64, 100, 200, 400])
def test_extreme_logits(random, num_tokens):
    """Each score from 1e-37 to 10 within 1e-6, in every mixture, and alone against the epsilon."""
    values = [-170.0, -150.0, -100.0, -60.0, -20.0, -16.5, -15.0, -1.0, 0.0, 1.0, 15.0, 30.0, 100.0]
    values = torch.tensor(values, dtype=torch.float64, device="cuda").to(BF16).double()
    pick = torch.randint(0, len(values), (num_tokens, 144), generator=random, device="cuda")
    logits = values[pick]
    logits[0] = -100.0
    logits[1] = -170.0
    logits[2, 6:] = -170.0
    x, W = from_logits(logits)
    bias = torch.zeros(144, device="cuda")
    weights, ids = route(bound(W, bias, 1.5, 6), x, 6)
    check(weights, ids, logits, bias, 1.5, 6)


@pytest.mark.parametrize("num_tokens", [16, 64, 100, 200, 400])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_nan_rows_and_nan_experts(random, layout, num_tokens):
    x, W, bias = integers(random, num_tokens, 4096, 132, layout)
    x[num_tokens // 2, 100] = torch.nan
    W[7, 50] = W[9, 131] = torch.nan  # poisons two experts for every row
    weights, ids = route(bound(W, bias, 1.5, 8), x, 8)
    check(weights, ids, logits_of(x, W), bias, 1.5, 8)
    assert ids[num_tokens // 2].tolist() == list(range(8))
    assert (weights[num_tokens // 2] == 0).all()
    others = torch.arange(num_tokens, device="cuda") != num_tokens // 2
    assert not ((ids[others] == 50) | (ids[others] == 131)).any()


@pytest.mark.parametrize("num_tokens", [1, 40, 200, 500, 1000])
def test_nan_experts_are_chosen_last_and_weigh_nothing(random, num_tokens):
    """Eight experts, five of them NaN, and all eight wanted."""
    x, W, bias = integers(random, num_tokens, 4096, 8)
    W[:, [0, 2, 3, 5, 7]] = torch.nan
    weights, ids = route(bound(W, bias, 1.5, 8), x, 8)
    assert (ids[:, 3:] == torch.tensor([0, 2, 3, 5, 7], device="cuda")).all()
    assert (weights[:, 3:] == 0).all()
    assert (ids[:, :3].sort(1)[0] == torch.tensor([1, 4, 6], device="cuda")).all()


@pytest.mark.parametrize("num_tokens", [1, 40, 100, 200, 400])
def test_infinite_logits(num_tokens):
    """2**164 is beyond FP32: such experts come first, lower index first, and share the weight."""
    logits = torch.zeros(num_tokens, 160, dtype=torch.float64, device="cuda")
    logits[:, [150, 3]] = 2.0**164
    logits[:, [4, 151]] = -(2.0**164)
    x, W = from_logits(logits, scale_up=2.0**64)
    bias = torch.zeros(160, device="cuda")
    weights, ids = route(bound(W, bias, 2.5, 4), x, 4)
    assert (ids == torch.tensor([3, 150, 0, 1], device="cuda", dtype=torch.int32)).all()
    check(weights, ids, logits, bias, 2.5, 4)


@pytest.mark.parametrize("num_tokens", [2, 40, 100, 200, 400])
def test_rows_of_infinity(random, num_tokens):
    """inf in hidden_states: every logit of that row is inf, -inf or NaN; nothing traps."""
    x, W, bias = integers(random, num_tokens, 4096, 132)
    x[1, 0] = torch.inf
    logits = logits_of(x, W)
    weights, ids = route(bound(W, bias, 1.5, 8), x, 8)
    check(weights, ids, logits, bias, 1.5, 8)


# ------------------------------------------------------------------ streams and graphs


@pytest.mark.parametrize("pdl", [False, True])
@pytest.mark.parametrize("num_tokens", [1, 16, 40, 64, 65, 200, 400])
def test_graph_replays_with_new_inputs(random, record_cases, num_tokens, pdl):
    """Three layers in a graph, replayed on inputs that the capture never saw."""
    layers = [integers(random, num_tokens, 4096, 256) for _ in range(3)]
    routers = [bound(W, bias, 1.5, 6, pdl=pdl) for _, W, bias in layers]
    x = layers[0][0].clone()
    outs = [outputs(num_tokens, 6) for _ in layers]
    graph = captured([lambda r=r, o=o: r(x, *o) for r, o in zip(routers, outs, strict=True)])
    for new_x, _, _ in layers:
        x.copy_(new_x)
        for weights, ids in outs:
            weights.fill_(CANARY)
            ids.fill_(CANARY)
        graph.replay()
        torch.cuda.synchronize()
        for (_, W, bias), (weights, ids) in zip(layers, outs, strict=True):
            check(weights, ids, logits_of(x, W), bias, 1.5, 6)
    record_cases(len(layers) ** 2)


@pytest.mark.parametrize("num_tokens", [6, 40, 200, 400])
def test_on_a_stream_of_the_callers(random, num_tokens):
    """The call is ordered after what the stream does before: a slow product and a copy."""
    x, W, bias = integers(random, num_tokens, 4096, 256)
    router = bound(W, bias, 1.5, 6)
    stream, late = torch.cuda.Stream(), torch.zeros_like(x)
    slow = torch.zeros(4096, 4096, device="cuda")
    weights, ids = outputs(num_tokens, 6)
    torch.cuda.synchronize()
    with torch.cuda.stream(stream):
        for _ in range(10):
            slow = slow @ slow
        late.copy_(x)
        router(late, weights, ids)
    stream.synchronize()
    check(weights, ids, logits_of(x, W), bias, 1.5, 6)


@pytest.mark.parametrize(("here", "there"), [(6, 6), (40, 64), (100, 64), (130, 200), (200, 300)])
def test_two_streams_at_once(random, here, there):
    x, W, bias = integers(random, here + there, 7168, 384)
    router = bound(W, bias, 2.5, 6)
    inputs = [x[:here], x[here:]]
    expected = [route(router, rows, 6) for rows in inputs]
    streams = [torch.cuda.Stream() for _ in inputs]
    outs = [[outputs(rows.shape[0], 6) for _ in range(100)] for rows in inputs]
    torch.cuda.synchronize()
    for step in range(100):
        for stream, rows, out in zip(streams, inputs, outs, strict=True):
            with torch.cuda.stream(stream):
                router(rows, *out[step])
    torch.cuda.synchronize()
    for out, (weights, ids) in zip(outs, expected, strict=True):
        assert all(torch.equal(w, weights) and torch.equal(i, ids) for w, i in out)


@pytest.mark.parametrize("sizes", [(16, 64), (64, 128)])
def test_two_graphs_at_once(random, sizes):
    """10,000 replays of each; they count, inside the graph, the ids that are not the expected."""
    inputs = [integers(random, n, 7168, 384) for n in sizes]
    graphs, wrong = [], torch.zeros(2, dtype=torch.int64, device="cuda")
    for index, (x, W, bias) in enumerate(inputs):
        router = bound(W, bias, 2.5, 6)
        out = outputs(x.shape[0], 6)
        _, expected = route(router, x, 6)

        def step(router=router, x=x, out=out, expected=expected, index=index):
            for _ in range(10):
                out[1].fill_(CANARY)
                router(x, *out)
                wrong[index] += (out[1] != expected).sum()

        graphs.append(captured([step]))
    streams = [torch.cuda.Stream() for _ in graphs]
    for _ in range(10_000):
        for graph, stream in zip(graphs, streams, strict=True):
            with torch.cuda.stream(stream):
                graph.replay()
    torch.cuda.synchronize()
    assert wrong.tolist() == [0, 0]


def test_from_a_thread_that_never_used_cuda(random):
    x, W, bias = integers(random, 6, 4096, 256)
    router = bound(W, bias, 1.5, 6)
    out = outputs(6, 6)
    torch.cuda.synchronize()
    thread = threading.Thread(target=lambda: router(x, *out))
    thread.start()
    thread.join()
    torch.cuda.synchronize()
    check(*out, logits_of(x, W), bias, 1.5, 6)


# ------------------------------------------------------------------ bits


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("model", MODELS)
def test_a_tokens_bits_do_not_depend_on_its_batch(random, record_cases, model, layout):
    """Every token alone, and then in every number of tokens up to 64 and some more, shuffled."""
    k, num_experts, top_k, scale = MODELS[model]
    x, W, bias = gaussian(random, 64, k, num_experts, layout)
    router = bound(W, bias, scale, top_k)
    alone = [route(router, x[row : row + 1], top_k) for row in range(64)]
    weights = torch.cat([w for w, _ in alone])
    ids = torch.cat([i for _, i in alone])
    record_cases(64)
    for num_tokens in (*range(2, 65), 65, 96, 100, 128, 129, 192, 193, 256, 300, 400):
        rows = torch.randperm(max(64, num_tokens), generator=random, device="cuda") % 64
        rows = rows[:num_tokens]
        got_weights, got_ids = route(router, x[rows].contiguous(), top_k)
        assert torch.equal(got_weights, weights[rows])
        assert torch.equal(got_ids, ids[rows])
        record_cases()


SAME_BITS = (1, 8, 9, 32, 33, 64, 65, 96, 100, 128, 129, 200, 256)


class Crowd:
    """A batch in which some tokens, routed alone before, stand among others.

    The others are drawn anew by each `shuffle`: gaussian rows, some of them NaN or infinite, and
    half of those and of the rest padding.
    """

    def __init__(self, random, router, tokens, num_tokens: int) -> None:
        self.random, self.router = random, router
        self.tokens = tokens[:num_tokens]
        self.x = torch.empty(num_tokens, tokens.shape[1], dtype=BF16, device="cuda")
        self.padded = torch.empty(num_tokens, dtype=torch.bool, device="cuda")
        self.out = outputs(num_tokens, 6)

    def shuffle(self) -> None:
        """Draw the neighbours and the rows of the tokens anew."""
        random, size = self.random, len(self.x)
        drawn = torch.randn(self.x.shape, generator=random, device="cuda") * 4
        odd = torch.tensor([torch.nan, torch.inf, -torch.inf], device="cuda")
        spoiled = torch.rand(size, generator=random, device="cuda") < 0.3
        drawn[spoiled] = odd[torch.arange(int(spoiled.sum()), device="cuda") % 3][:, None]
        padded = torch.rand(size, generator=random, device="cuda") < 0.5
        self.rows = torch.randperm(size, generator=random, device="cuda")[: len(self.tokens)]
        padded[self.rows] = False
        self.x.copy_(drawn)
        self.x[self.rows] = self.tokens
        self.padded.copy_(padded)
        for out in self.out:
            out.fill_(CANARY)

    def __call__(self) -> None:
        self.router(self.x, *self.out, padding_mask=self.padded)

    def check(self, alone, about: str) -> None:
        """Compare the tokens' bits with those that they had alone."""
        torch.cuda.synchronize()
        weights, ids = self.out
        for name, got, wanted in zip(("weights", "ids"), self.out, alone, strict=True):
            wrong = got[self.rows].view(torch.int32) != wanted[: len(self.rows)].view(torch.int32)
            assert not wrong.any(), f"{about}: {name} of {int(wrong.any(1).sum())} tokens differ"
        assert (ids[self.padded] == -1).all(), about
        assert (weights[self.padded] == 0).all(), about


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(
    ("k", "num_experts"), [(7168, 384), (4096, 256), (5120, 130), (1024, 60), (2048, 512)]
)
def test_a_tokens_routing_has_the_same_bits(random, record_cases, k, num_experts, layout):
    """At every N of one launch, in any row, among any neighbours, eager and in a graph."""
    tokens, W, bias = gaussian(random, 40, k, num_experts, layout)
    router = bound(W, bias, 2.5, 6)
    alone = [route(router, tokens[row : row + 1], 6) for row in range(len(tokens))]
    alone = [torch.cat(parts) for parts in zip(*alone, strict=True)]
    record_cases(len(tokens))
    most = most_in_one_launch(num_experts)
    graphs = []
    for num_tokens in sorted({*(number for number in SAME_BITS if number < most), most}):
        crowd = Crowd(random, router, tokens, num_tokens)
        about = f"N = {num_tokens} of {num_experts} experts, {layout}"
        crowd.shuffle()
        crowd()
        crowd.check(alone, about)
        graphs.append((about, crowd, captured([crowd])))
        record_cases(3)
    # All captured before one is replayed: their scratch lies side by side.
    for about, crowd, graph in graphs * 3:
        crowd.shuffle()
        graph.replay()
        crowd.check(alone, f"{about}, in a graph")
    check_scratch()


@pytest.mark.parametrize("num_tokens", [1, 16, 64, 100, 256, 1000])
def test_every_run_gives_the_same_bits(random, num_tokens):
    x, W, bias = gaussian(random, num_tokens, 7168, 384)
    first = bound(W, bias, 2.5, 6)
    weights, ids = route(first, x, 6)
    for router in (first, first, bound(W, bias, 2.5, 6), bound(W, bias, 2.5, 6, pdl=True)):
        again = route(router, x, 6)
        assert torch.equal(again[0], weights)
        assert torch.equal(again[1], ids)


def test_back_to_back_dependents(random):
    """With pdl, each launch may start under the one before: 300 in a row, scratch shared."""
    inputs = [integers(random, n, 7168, 384) for n in (1, 16, 33, 64, 100, 200)]
    routers = [bound(W, bias, 2.5, 6, pdl=True) for _, W, bias in inputs]
    expected = [route(bound(W, bias, 2.5, 6), x, 6) for x, W, bias in inputs]
    outs = [[outputs(x.shape[0], 6) for x, _, _ in inputs] for _ in range(50)]
    torch.cuda.synchronize()
    for out in outs:
        for router, (x, _, _), one in zip(routers, inputs, out, strict=True):
            router(x, *one)
    torch.cuda.synchronize()
    for out in outs:
        for got, wanted in zip(out, expected, strict=True):
            assert torch.equal(got[0], wanted[0])
            assert torch.equal(got[1], wanted[1])


# ------------------------------------------------------------------ the callers' side


@pytest.mark.parametrize("num_tokens", [6, 40, 200, 400])
@pytest.mark.parametrize(("num_experts", "layout"), [(256, "kmajor"), (132, "emajor")])
def test_dense_router_dispatch(random, record_cases, num_experts, layout, num_tokens):
    x, W, bias = integers(random, num_tokens, 4096, num_experts, layout)
    out = outputs(num_tokens, 6)
    dense_router_dispatch(x, W, bias, 1.5, 6, *out)
    check(*out, logits_of(x, W), bias, 1.5, 6)
    W.neg_()
    bias.neg_()
    dense_router_dispatch(x, W, bias, 1.5, 6, *out)
    check(*out, logits_of(x, W), bias, 1.5, 6)
    record_cases(2)


def test_weights_changed_in_place(random):
    x, W, bias = integers(random, 16, 4096, 132, "emajor")
    copied = bound(W, bias, 1.5, 6)
    in_place = bound(laid_out(W, "kmajor"), bias, 1.5, 6)
    W.neg_()
    in_place.W_gate.neg_()
    with pytest.raises(ValueError, match="modified in place"):
        route(copied, x, 6)
    check(*route(in_place, x, 6), logits_of(x, W), bias, 1.5, 6)


def test_outputs_interleaved_in_one_buffer(random):
    x, W, bias = integers(random, 40, 4096, 256)
    buffer = torch.full((40, 16), CANARY, dtype=torch.int32, device="cuda")
    weights, ids = buffer.view(torch.float32)[:, 1:7], buffer[:, 8:14]
    bound(W, bias, 1.5, 6)(x, weights, ids)
    check(weights, ids, logits_of(x, W), bias, 1.5, 6)
    assert (buffer[:, [0, 7, 14, 15]] == CANARY).all()


def test_inference_mode_and_gradients(random):
    x, W, bias = integers(random, 400, 4096, 256)
    expected = logits_of(x, W)
    router = bound(W.requires_grad_(), bias.requires_grad_(), 1.5, 6)
    with torch.inference_mode():
        check(*route(router, x, 6), expected, bias, 1.5, 6)
    for rows in (x[:100], x[:40], x):
        check(*route(router, rows, 6), expected[: len(rows)], bias.detach(), 1.5, 6)


@pytest.mark.parametrize("num_tokens", [6, 200])
def test_refused_calls_touch_nothing(random, num_tokens):
    x, W, bias = integers(random, num_tokens, 4096, 256)
    router = bound(W, bias, 1.5, 6)
    weights, ids = outputs(num_tokens, 6)
    wrong = [
        (x.float(), weights, ids),
        (x.cpu(), weights, ids),
        (x[:, :-64], weights, ids),
        (x, weights[:-1], ids),
        (x, weights, ids.short()),
        (x, weights.cpu(), ids),
    ]
    for arguments in wrong:
        with pytest.raises((TypeError, ValueError)):
            router(*arguments)
    torch.cuda.synchronize()
    assert (weights == CANARY).all()
    assert (ids == CANARY).all()


def test_no_memory_is_allocated_per_call(random):
    x, W, bias = integers(random, 400, 4096, 256)
    router = bound(W, bias, 1.5, 6)
    out = outputs(400, 6)
    rows = [x[:n] for n in (1, 16, 64, 100, 200, 400)]
    for some in rows:
        router(some, *out)
    before = torch.cuda.memory_stats()["allocation.all.allocated"]
    for some in rows * 5:
        router(some, *out)
    assert torch.cuda.memory_stats()["allocation.all.allocated"] == before
