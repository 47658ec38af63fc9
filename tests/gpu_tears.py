"""Children of the faults on a GPU: inputs that other streams rewrite, several at once."""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from gpu_calls import BF16, captured, outputs
from gpu_layer import SCALE, TOP_K, VOCABULARY, E, K

import dsv4_router_runtime as runtime
from dsv4_router_runtime import Router

Tears = Sequence[tuple[torch.Tensor, Sequence[torch.Tensor]]]
INT32_MAX = 2**31 - 1
# Copies that one replay of a writer's graph makes of each of its tensors.
COPIES = 24


class _Draw:
    """Draws of one seed on the current GPU."""

    def __init__(self, seed: int) -> None:
        self._generator = torch.Generator(device="cuda").manual_seed(seed)

    def integers(self, low: int, high: int, *shape: int) -> torch.Tensor:
        drawn = torch.randint(low, high, shape, generator=self._generator, device="cuda")
        return drawn.to(torch.int32)

    def booleans(self, count: int) -> torch.Tensor:
        return self.integers(0, 2, count).bool()

    def rows_of_experts(self, count: int) -> torch.Tensor:
        """Return [count, TOP_K] of experts, none twice in a row."""
        keys = torch.rand(count, E, generator=self._generator, device="cuda")
        return keys.argsort(dim=1)[:, :TOP_K].to(torch.int32)


def _layer(kind: str, same_bits: bool, draw: _Draw) -> tuple[Router, dict[str, torch.Tensor]]:
    """Return a layer with the options of `kind`, and those of its tensors that tears may change."""
    W = draw.integers(-2, 3, E, K).to(BF16).t()
    bias, bias_vl = (draw.integers(-8, 9, E).float() / 4 for _ in range(2))
    tensors = {"bias_vl": bias_vl}
    options: dict[str, Any] = {"bias_vl": bias_vl, "same_bits": same_bits}
    if kind == "table":
        options["tid2eid"] = draw.rows_of_experts(VOCABULARY)
    else:
        options |= {"first_image_id": 3, "num_image_ids": 4}
        tensors["bias"] = bias
    if kind == "map":
        tensors |= {
            "to_physical": draw.integers(0, 1 << 20, E, 5),
            "logical_count": draw.integers(1, 6, E),
        }
        options |= {name: tensors[name] for name in ("to_physical", "logical_count")}
    given = {"top_k": TOP_K, "routed_scaling_factor": SCALE}
    return Router(W, tensors.get("bias"), **given, **options), tensors


def _call(n: int, draw: _Draw) -> dict[str, torch.Tensor]:
    return {
        "image_mask": draw.booleans(n),
        "padding_mask": draw.integers(0, 4, n) == 0,
        "num_tokens": torch.tensor([n], dtype=torch.int32, device="cuda"),
        "input_ids": draw.integers(0, VOCABULARY, n),
        "forced_ids": draw.rows_of_experts(n),
        "forced_mask": draw.booleans(n),
    }


def _changed_rows(
    x: torch.Tensor, call: Mapping[str, torch.Tensor], half: int, draw: _Draw
) -> list[tuple[torch.Tensor, list[torch.Tensor]]]:
    """Return a call's tensors, each with 8 versions of it that differ from row `half` on."""
    rest, n = len(x) - half, len(x)
    ids = torch.tensor([-1, 0, 3, 5, VOCABULARY, INT32_MAX], dtype=torch.int32, device="cuda")
    rows: dict[str, Callable[[], torch.Tensor]] = {
        "image_mask": lambda: draw.booleans(rest),
        "padding_mask": lambda: draw.booleans(rest),
        "forced_mask": lambda: draw.booleans(rest),
        "input_ids": lambda: ids[draw.integers(0, len(ids), rest).long()],
        "forced_ids": lambda: draw.integers(-1, E + 1, rest, TOP_K),
    }
    tears = []
    for name, draws in rows.items():
        versions = [call[name].clone() for _ in range(8)]
        for version in versions:
            version[half:] = draws()
        tears.append((call[name], versions))
    counts = (half, n, n + 5, INT32_MAX)
    tears.append((call["num_tokens"], [torch.full_like(call["num_tokens"], c) for c in counts]))
    states = [x.clone() for _ in range(4)]
    for state, value in zip(states, (1.0, float("nan"), float("inf"), -3.0), strict=True):
        state[half:] = value
    return [*tears, (x, states)]


def _changed_throughout(
    tensors: Mapping[str, torch.Tensor], num_tokens: torch.Tensor
) -> list[tuple[torch.Tensor, list[torch.Tensor]]]:
    """Return a layer's tensors and the count, each with versions that leave no row as it was."""
    worst = {True: float("nan"), False: INT32_MAX}
    tears = [
        (
            tensor,
            [
                tensor.clone(),
                torch.zeros_like(tensor),
                torch.full_like(tensor, worst[tensor.is_floating_point()]),
            ],
        )
        for tensor in tensors.values()
    ]
    counts = (int(num_tokens), 0, -1, 1, INT32_MAX, -(2**31))
    return [*tears, (num_tokens, [torch.full_like(num_tokens, c) for c in counts])]


def _writers(tears: Tears, seed: int) -> Callable[[], None]:
    """Return a function that starts two streams rewriting the tensors in an order of their own."""
    choice = random.Random(seed)
    streams = [torch.cuda.Stream() for _ in range(2)]
    graphs = []
    for at, stream in enumerate(streams):
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=stream):
            for _ in range(COPIES):
                for tensor, versions in tears[at::2]:
                    tensor.copy_(choice.choice(versions))
        graphs.append(graph)

    def start() -> None:
        for stream, graph in zip(streams, graphs, strict=True):
            with torch.cuda.stream(stream):
                graph.replay()

    return start


def inputs_torn(
    kind: str, num_tokens: Sequence[int], same_bits: bool, throughout: bool, seconds: float
) -> dict[str, Any]:
    """Launch at each N while two streams rewrite every input of the call; return the launches."""
    each = [_torn_at(n, kind, same_bits, throughout, seconds) for n in num_tokens]
    runtime.check()
    return {"launches": sum(each)}


def _torn_at(n: int, kind: str, same_bits: bool, throughout: bool, seconds: float) -> int:
    """Launch, eagerly and in graphs, for some seconds while two streams rewrite the inputs.

    kind: "plain", "table" or "map". The rows before the half keep their inputs, so they must keep
    the bits of a quiet call; with `throughout` the layer's tensors are rewritten too, and each row
    must be written, with weights that are finite or the bias's NaN kept out of them.
    """
    draw, half = _Draw(n), max(1, n // 2)
    router, tensors = _layer(kind, same_bits, draw)
    x, call = draw.integers(-2, 3, n, K).to(BF16), _call(n, draw)
    out = outputs(n, TOP_K)

    def launch() -> None:
        router(x, *out, **call)

    launch()
    quiet = [each.clone() for each in out]
    graph = captured([launch] * 8)
    tears = _changed_rows(x, call, half, draw)
    if throughout:
        tears += _changed_throughout(tensors, call["num_tokens"])
    start = _writers(tears, seed=n)
    changed, unwritten, infinite = torch.zeros(3, dtype=torch.bool, device="cuda").unbind()
    launches, until = 0, time.monotonic() + seconds
    while time.monotonic() < until:
        start()
        for run, count in ((launch, 1), (graph.replay, 8)) * 4:
            for each in out:
                each.fill_(-77)
            run()
            launches += count
            if not throughout:
                for each, before in zip(out, quiet, strict=True):
                    changed.logical_or_((each[:half] != before[:half]).any())
            unwritten.logical_or_((out[1] == -77).any())
            infinite.logical_or_(~torch.isfinite(out[0]).all())
        torch.cuda.synchronize()
    assert not changed.item(), "a row whose inputs are not torn has other bits"
    assert not unwritten.item(), "a torn row was not written"
    assert not infinite.item(), "a weight is not finite"
    return launches


def logits_torn(seconds: float) -> dict[str, Any]:
    """Route by `router_topk` while three streams rewrite the logits and a bias that it reads twice.

    The logits are the caller's `out_logits`, of a call with more tokens than one launch takes. Each
    row must name TOP_K experts, none twice, with finite weights.
    """
    draw, n = _Draw(2), 4096
    generator = torch.Generator(device="cuda").manual_seed(2)
    x, W = (torch.randn(rows, K, generator=generator, device="cuda").to(BF16) for rows in (n, E))
    bias = torch.randn(E, generator=generator, device="cuda")
    router = Router(W.t(), bias, top_k=TOP_K, routed_scaling_factor=SCALE)
    logits, out = torch.empty(n, E, device="cuda"), outputs(n, TOP_K)

    def launch() -> None:
        router(x, *out, out_logits=logits)

    launch()
    before, clean = logits.clone(), bias.clone()
    half_equal = before.clone()
    half_equal[:, ::2] = 97.0
    versions = [
        *(torch.full_like(before, value) for value in (float("nan"), float("inf"), 1.0)),
        *(half_equal, -before, before),
    ]
    start = _writers(
        [
            (logits, versions),
            (bias, [clean, torch.full_like(bias, float("-inf"))]),
            (logits, versions),
            (bias, [clean, draw.integers(-8, 9, E).float()]),
        ],
        seed=2,
    )
    wrong = torch.zeros((), dtype=torch.bool, device="cuda")
    launches, until = 0, time.monotonic() + seconds
    while time.monotonic() < until:
        start()
        for _ in range(12):
            for each in out:
                each.fill_(-77)
            launch()
            launches += 1
            ids = out[1].sort(dim=1).values
            named = (ids[:, 0] >= 0) & (ids[:, -1] < E) & (ids[:, 1:] != ids[:, :-1]).all(1)
            wrong.logical_or_(~(named & torch.isfinite(out[0]).all(1)).all())
        torch.cuda.synchronize()
    assert not wrong.item(), "a row names an expert twice, or none, or a weight is not finite"
    bias.copy_(clean)
    launch()
    assert torch.equal(logits, before)
    runtime.check()
    return {"launches": launches, "rows": launches * n}
