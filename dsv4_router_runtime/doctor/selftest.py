"""The self-test: a layer of small integers, routed eagerly and in a replayed CUDA graph.

The products and sums are exact in FP32, so that the ids must be the reference's, bit for bit. The
reference runs on the CPU: not on the GPU in doubt, which would also have to load torch's kernels.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

import dsv4_router_runtime
from dsv4_router_runtime.artifacts.folder import ArtifactSet
from dsv4_router_runtime.artifacts.kernel import LAYOUTS
from dsv4_router_runtime.reference import router_reference

from .finding import RIGHT_OUTPUTS, Finding, fail, ok, out_of_service

K, EXPERTS, TOP_K, SCALE = 512, 384, 6, 2.5
# N = 1, the largest of each step of these layers, and the smallest that takes torch.mm.
TOKENS = (1, 8, 32, 64, 128, 256, 257)
# Few, so that no logit is so low that two keys are nearly equal; of more than a tile of tokens.
DISTINCT_ROWS = 65
VOCABULARY = 128
# Of an FP32 weight against FP64: 2e-7 is the worst that the evidence records.
TOLERANCE = 1e-5
CANARY = -77


@dataclass(frozen=True, kw_only=True)
class Case:
    """One layer and its input: layout of W_gate, and whether the ids come from a table."""

    layout: str
    hashed: bool

    def __str__(self) -> str:
        return f"{self.layout}{' hash' if self.hashed else ''}"


CASES = tuple(Case(layout=layout, hashed=hashed) for layout in LAYOUTS for hashed in (False, True))


@dataclass(frozen=True, kw_only=True)
class Inputs:
    """Tensors of a case. A hash layer has table and token_ids, others have e_bias."""

    x: torch.Tensor
    W_gate: torch.Tensor
    e_bias: torch.Tensor | None
    table: torch.Tensor | None
    token_ids: torch.Tensor | None

    def on(self, device: str) -> Inputs:
        """Return copies on a device, with the same strides."""
        copies: dict[str, Any] = dict(vars(self))
        for name, tensor in vars(self).items():
            copies[name] = None if tensor is None else tensor.to(device)
        return Inputs(**copies)


def make_inputs(case: Case) -> Inputs:
    """Draw a case's tensors on the CPU, so that every machine tests the same numbers."""
    random = torch.Generator().manual_seed(1)
    x = torch.randint(-2, 3, (DISTINCT_ROWS, K), generator=random)
    x *= torch.rand(x.shape, generator=random) < 0.02
    x = x[torch.arange(max(TOKENS)) % DISTINCT_ROWS]
    W = torch.randint(-2, 3, (EXPERTS, K), generator=random).to(torch.bfloat16)
    bias = torch.randint(0, 3, (EXPERTS,), generator=random) * 0.3125
    rows = [torch.randperm(EXPERTS, generator=random)[:TOP_K] for _ in range(VOCABULARY)]
    token_ids = torch.randint(0, VOCABULARY, (max(TOKENS),), generator=random)
    return Inputs(
        x=x.to(torch.bfloat16),
        W_gate=W.t() if case.layout == "kmajor" else W.t().contiguous(),
        e_bias=None if case.hashed else bias,
        table=torch.stack(rows).to(torch.int32) if case.hashed else None,
        token_ids=token_ids if case.hashed else None,
    )


def device_name(index: int) -> str:
    """Return torch's name of GPU `index`."""
    return f"cuda:{index}"


def self_test(artifacts: ArtifactSet, index: int) -> Finding:
    """Route every case on GPU `index`, eagerly and replayed, and compare with the reference."""
    check = f"self-test gpu {index}"
    if not torch.cuda.is_available():
        found = f"torch {torch.__version__} sees no GPU, and the driver does"
        repair = "install a torch that is built for CUDA: https://pytorch.org"
        return fail(check, found, needed="a torch that sees the GPU", repair=repair)
    with torch.cuda.device(index):
        for case in CASES:
            drawn = make_inputs(case)
            inputs = drawn.on(device_name(index))
            router = dsv4_router_runtime.Router(
                inputs.W_gate,
                inputs.e_bias,
                top_k=TOP_K,
                routed_scaling_factor=SCALE,
                artifacts=artifacts,
                tid2eid=inputs.table,
            )
            expected = router_reference(
                *(drawn.x, drawn.W_gate, drawn.e_bias, SCALE, TOP_K),
                tid2eid=drawn.table,
                input_ids=drawn.token_ids,
            )
            wrong = _find_wrong(router, inputs, expected)
            if wrong:
                repair = out_of_service(index)
                return fail(check, f"{case}, {wrong}", needed=RIGHT_OUTPUTS, repair=repair)
    calls = len(CASES) * len(TOKENS)
    return ok(check, f"{calls} calls right, and {calls} replayed")


def _find_wrong(
    router: dsv4_router_runtime.Router,
    inputs: Inputs,
    expected: tuple[torch.Tensor, torch.Tensor],
) -> str | None:
    """Return the first eager or replayed call that is wrong, None if all are right."""
    device = inputs.x.device
    outputs = {
        n: (
            torch.empty(n, TOP_K, device=device),
            torch.empty(n, TOP_K, dtype=torch.int32, device=device),
        )
        for n in TOKENS
    }
    token_ids = inputs.token_ids

    def route_all() -> None:
        for n, out in outputs.items():
            router(inputs.x[:n], *out, input_ids=None if token_ids is None else token_ids[:n])

    for way, run in (("eager", run_eagerly), ("replayed", run_replayed)):
        for weights, ids in outputs.values():
            weights.fill_(CANARY)
            ids.fill_(CANARY)
        run(route_all)
        for n, (weights, ids) in outputs.items():
            wrong = _compare((weights.cpu(), ids.cpu()), (expected[0][:n], expected[1][:n]))
            if wrong:
                return f"N={n}, {way}: {wrong}"
    return None


def _compare(
    out: tuple[torch.Tensor, torch.Tensor], expected: tuple[torch.Tensor, torch.Tensor]
) -> str | None:
    rows = int((out[1] != expected[1]).any(dim=1).sum())
    if rows:
        return f"{rows} of {len(out[1])} rows have other ids"
    worst = (out[0].double() / expected[0] - 1).abs().max().item()
    # Not >, which NaN would pass.
    return None if worst <= TOLERANCE else f"a weight is off by {worst:.2g} of itself"


def run_eagerly(calls: Callable[[], None]) -> None:
    """Make the calls on the current stream and wait."""
    calls()
    torch.cuda.synchronize()


def run_replayed(calls: Callable[[], None]) -> None:
    """Capture the calls into a CUDA graph, replay it once, and wait."""
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        calls()
    graph.replay()
    torch.cuda.synchronize()


def check_workspace(index: int) -> Finding:
    """Look whether the launches so far left their scratch zero."""
    check = f"workspace gpu {index}"
    dsv4_router_runtime.check(index)
    return ok(check, "zero after the launches of this process")
