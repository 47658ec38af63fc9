"""`same_bits` on a GPU: at every N a token has the bits that it has in a call of 64 tokens."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest

torch = pytest.importorskip("torch", reason="torch is not installed")

from gpu_calls import CANARY, captured, gaussian, outputs  # noqa: E402

from dsv4_router_runtime import Router  # noqa: E402
from dsv4_router_runtime.exact import exact_logits, exact_selection  # noqa: E402

pytestmark = pytest.mark.gpu

K, TOP_K, SCALE, VOCAB, REPLICAS, SHARED = 1024, 6, 2.5, 50, 3, 2
# One launch, whole pieces, one token more, and many pieces.
SIZES = (777, 1024, 1280, 1281, 1920, 2048, 4097, 8192, 20000)
MOST, SLICE = max(SIZES), 64
LAYERS = [(384, "kmajor"), (160, "emajor"), (512, "kmajor")]


@pytest.fixture
def random(seed):
    """A generator on the GPU, seeded by the test's own id."""
    return torch.Generator(device="cuda").manual_seed(seed)


class Batch:
    """A layer, MOST rows and their options, with the weights and logical ids of calls of 64."""

    def __init__(self, random, options: tuple, num_experts: int, layout: str) -> None:
        self.x, self.W, self.bias = gaussian(random, MOST, K, num_experts, layout)
        self.layer: dict[str, Any] = {}
        self.map: dict[str, Any] = {}
        self.call: dict[str, Any] = {}
        draw = partial(torch.randint, generator=random, device="cuda", dtype=torch.int32)
        if "images" in options or "image_ids" in options:
            self.layer["bias_vl"] = self.bias.flip(0).contiguous()
        if "images" in options:
            self.call["image_mask"] = draw(0, 2, (MOST,)).bool()
        if "hash" in options:
            self.bias = None
            order = torch.rand(VOCAB, num_experts, generator=random, device="cuda").argsort(1)
            self.layer["tid2eid"] = order[:, :TOP_K].int().contiguous()
            # Some are outside the table.
            self.call["input_ids"] = draw(0, VOCAB + 2, (MOST,))
        if "image_ids" in options:
            self.layer |= {"first_image_id": VOCAB - 9, "num_image_ids": 7}
            self.call["input_ids"] = draw(0, VOCAB, (MOST,)).long()
        if "forced" in options:
            order = torch.rand(MOST, num_experts, generator=random, device="cuda").argsort(1)
            # A few rows name an expert twice, so they are padding.
            order[::97, 0] = order[::97, 1]
            self.call["forced_ids"] = order[:, :TOP_K]
            self.call["forced_mask"] = draw(0, 2, (MOST,)).bool()
        if "shared" in options:
            self.layer |= {"num_shared_slots": SHARED, "shared_weight": 0.25}
        if "padding" in options:
            self.call["padding_mask"] = draw(0, 8, (MOST,)) == 0
            self.x[self.call["padding_mask"]] = torch.nan
        if "map" in options:
            self.map = {
                "to_physical": draw(1000, 2000, (num_experts, REPLICAS)),
                "logical_count": draw(1, REPLICAS + 1, (num_experts,)),
            }
        self.columns = TOP_K + self.layer.get("num_shared_slots", 0)
        self.weights, self.ids = outputs(MOST, self.columns)
        router = self.router(self.layer)
        for first in range(0, MOST, SLICE):
            rows = slice(first, first + SLICE)
            call = {name: tensor[rows] for name, tensor in self.call.items()}
            router(self.x[rows], self.weights[rows], self.ids[rows], **call)

    def router(self, layer: dict, **more) -> Router:
        return Router(self.W, self.bias, top_k=TOP_K, routed_scaling_factor=SCALE, **layer, **more)

    def expected(self, rows, count: int):
        """Return weights and ids of a call of these rows, of which the first `count` are valid."""
        weights, ids = self.weights[rows], self.ids[rows]
        if self.map:
            experts = ids.clamp(min=0).long()
            row = torch.arange(len(ids), device="cuda")[:, None]
            replica = row % self.map["logical_count"][experts]
            ids = torch.where(ids < 0, ids, self.map["to_physical"][experts, replica])
        weights[count:], ids[count:] = 0, -1
        return weights, ids


@pytest.mark.parametrize(("num_experts", "layout"), LAYERS)
@pytest.mark.parametrize(
    "options",
    [
        (),
        ("padding",),
        ("count",),
        ("map",),
        ("images",),
        ("hash",),
        ("image_ids",),
        ("forced",),
        ("shared",),
        ("int64",),
        ("hash", "images", "padding"),
        ("hash", "image_ids", "forced", "shared"),
        ("image_ids", "forced", "map", "padding", "int64"),
        ("images", "padding", "count", "map"),
    ],
    ids="+".join,
)
def test_a_tokens_bits_are_those_of_a_call_of_64(random, options, num_experts, layout):
    """In any row, beside any others; eager, and two calls in a row of a replayed graph, by PDL."""
    batch = Batch(random, options, num_experts, layout)
    router = batch.router(batch.layer | batch.map, same_bits=True)
    assert not any("router_topk" in key for key in router.kernels)
    for num_tokens in SIZES:
        rows = torch.randperm(MOST, generator=random, device="cuda")[:num_tokens]
        x, (weights, ids) = batch.x[rows], outputs(num_tokens, batch.columns)
        out = (weights, ids.long() if "int64" in options else ids)
        call = {name: tensor[rows] for name, tensor in batch.call.items()}
        count = num_tokens
        if "count" in options:
            count -= num_tokens // 7
            call["num_tokens"] = torch.full((1,), count, dtype=torch.int32, device="cuda")
        expected = batch.expected(rows, count)
        router(x, *out, **call)
        check(out, expected, f"eager, N = {num_tokens}")
        graph = captured(2 * [partial(router, x, *out, pdl=True, **call)])
        for tensor in out:
            tensor.fill_(CANARY)
        graph.replay()
        check(out, expected, f"replayed, N = {num_tokens}")


def check(out, expected, about: str) -> None:
    torch.cuda.synchronize()
    for name, got, wanted in zip(("weights", "ids"), out, expected, strict=True):
        wrong = (got != wanted).any(1).nonzero().flatten().tolist()
        assert not wrong, f"{about}: {name} of {len(wrong)} rows, first {wrong[0]}"


@pytest.mark.parametrize(("num_experts", "layout"), LAYERS)
def test_logits_and_ids_are_those_of_the_contract(random, num_experts, layout):
    x, W, bias = gaussian(random, MOST, K, num_experts, layout)
    logits = exact_logits(x, W)
    _, ids = exact_selection(logits, bias, SCALE, TOP_K)
    router = Router(W, bias, top_k=TOP_K, routed_scaling_factor=SCALE, same_bits=True)
    for num_tokens in SIZES:
        out, got = outputs(num_tokens, TOP_K), torch.empty_like(logits[:num_tokens])
        router(x[:num_tokens], *out, out_logits=got)
        assert torch.equal(got, logits[:num_tokens]), f"logits at N = {num_tokens}"
        assert torch.equal(out[1], ids[:num_tokens]), f"ids at N = {num_tokens}"
