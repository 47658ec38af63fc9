"""Draw the numbers of a case by its kind: hidden_states and W_gate, or logits, and the bias."""

from __future__ import annotations

import math
from functools import partial
from typing import Any

from dsv4_router_runtime.artifacts.manifest import Kernel

from .cases import Case

_NEIGHBOURS = ("crowded", "spread")
# About 0, where each power of exp(-|x|) counts; where log2(exp(x / 4)) is between whole numbers;
# and far from both.
# 500 is beyond the clamp of exp(-|x|).
_NEAR = (0.03, 1.33, -1.4, -0.06, -4.1, 4.2, 500.0, -30.0)
_NUM_NEAR = 16


def draw_bias(generator: Any, case: Case) -> Any:
    """Draw FP64 biases [E] for the kind of inputs."""
    import torch

    experts = case.num_experts
    if case.kind in ("ties", *_NEIGHBOURS):
        return torch.zeros(experts).double()
    if case.kind == "near":
        # Exact sums, and keys of both signs.
        return -torch.ones(experts).double()
    if case.kind == "wide":
        bias = 5 + torch.randperm(experts, generator=generator).double() / 64
        bias[_outliers(case)] = 0.0
        return bias
    if case.kind == "low":
        # No two keys alike, and all below that of a logit of 0 without a bias.
        return -(1 + torch.randperm(experts, generator=generator)).double() / 4
    if case.kind == "biased":
        return 8.0 + torch.randint(-16, 17, (experts,), generator=generator).double() / 64
    return torch.randint(-8, 9, (experts,), generator=generator).double() / 4


def draw_factors(generator: Any, kernel: Kernel, case: Case) -> tuple[Any, Any, Any, Any]:
    """Draw hidden_states, W_gate (None for a kernel that reads logits), FP64 logits, e_bias."""
    bias = draw_bias(generator, case)
    if kernel.role == "select":
        return None, None, _draw_logits(generator, case), bias
    hidden, weight = _draw_operands(generator, kernel, case)
    return hidden, weight, hidden @ weight, bias


def _draw_logits(generator: Any, case: Case) -> Any:
    """Draw FP64 logits [N, E], exact in FP32."""
    import torch

    n, e = case.num_tokens, case.num_experts
    logits = _integers(generator, -6, 6, n, e)
    if case.kind == "extreme":
        logits *= 40
    if case.kind == "ties":
        logits[:] = 1.0
    if case.kind in _NEIGHBOURS:
        logits = _crowded(n, e, case.kind)
    if case.kind == "near":
        logits = _near(generator, n, e)
    if case.kind == "dense":
        logits = 3 * torch.randn(n, e, generator=generator).double()
        logits = logits.float().double()
    if case.kind == "wide":
        logits = 60.0 + _integers(generator, 0, 2, n, e)
        logits[torch.arange(n), _outliers(case)] = 100.0
    if case.kind == "low":
        logits[:] = -100.0 - torch.arange(e) % 8
    if case.kind == "nans":
        logits[_integers(generator, 0, 1, n, e) == 1] = torch.nan
        logits[1::2] = torch.nan
        logits[1::2, _few(generator, e)] = torch.inf
    if case.kind == "nan":
        logits[:, 1] = torch.nan
        logits[-1, 0] = torch.inf
    return logits


def _outliers(case: Case) -> list[int]:
    """Return an expert for each row of kind `wide`, in another slot of router_topk's lanes each."""
    return [(32 * row + 7 * row % 32) % case.num_experts for row in range(case.num_tokens)]


def _draw_operands(generator: Any, kernel: Kernel, case: Case) -> tuple[Any, Any]:
    """Draw hidden_states [N, K] and W_gate [K, E], exact in BF16."""
    import torch

    n, e, k = case.num_tokens, case.num_experts, case.k
    integers = partial(_integers, generator)
    # Sparse, so that logits stay within a few units at any K.
    sparse = (torch.rand(n, k, generator=generator) < 16 / k).double()
    hidden, weight = integers(-1, 1, n, k) * sparse, integers(-2, 2, k, e)
    if case.kind == "extreme":
        # A table may choose an expert with a logit below -174, whose score would be denormal.
        hidden *= 5 if kernel.role == "hash" else 16
    if case.kind == "ties":
        weight[:] = weight[:, :1]
    if case.kind in _NEIGHBOURS:
        hidden[:], weight[:] = 0.0, 0.0
        hidden[:, :n], weight[:n] = torch.eye(n), _crowded(n, e, case.kind)
    if case.kind == "near":
        hidden, weight = _factors_of(generator, _near(generator, n, e), k)
    if case.kind == "dense":
        # Logits of a few units at any K, and so exact: whole numbers of so small a power of two.
        hidden = 2.0 * integers(0, 1, n, k) - 1
        weight = integers(1, 3, k, e) * (2 * integers(0, 1, k, e) - 1)
        weight *= 2.0 ** -round(math.log2(k) / 2)
    if case.kind == "low":
        hidden[:], weight[:] = 0.0, 0.0
        hidden[:, 0], weight[0] = 1.0, -100.0 - torch.arange(e) % 8
    if case.kind == "nans":
        weight[:, integers(0, 1, e) == 1] = torch.nan
        # 0 times infinity is NaN.
        weight[0] *= 0
        weight[0, _few(generator, e)] = 1.0
        hidden[:, 0] = 0.0
        hidden[1::2] = 0.0
        hidden[1::2, 0] = torch.inf
    if case.kind == "nan":
        weight[:, 1] = torch.nan
        hidden[-1, :] = 0.0
        hidden[-1, 0] = torch.inf
        weight[0] = weight[0].abs() + 1
    return hidden, weight


def _integers(generator: Any, low: int, high: int, *shape: int) -> Any:
    """Draw whole numbers from `low` to `high`, in FP64."""
    import torch

    return torch.randint(low, high + 1, shape, generator=generator).double()


def _few(generator: Any, e: int) -> Any:
    """Return three experts, fewer than most cases choose."""
    import torch

    return torch.randperm(e, generator=generator)[:3]


def _near(generator: Any, n: int, e: int) -> Any:
    """Return FP64 [n, e]: in each row 16 experts, an equal part of all each, are the best by far.

    Their logits are FP32 numbers that follow each other, in random order, so that a score that is
    off by a unit in the last place changes the ranking.
    """
    import torch

    first = int(torch.randint(len(_NEAR), (1,), generator=generator))
    logits = torch.full((n, e), -40.0).double()
    count = min(_NUM_NEAR, e)
    for row in range(n):
        about = _NEAR[(first + row) % len(_NEAR)]
        # FP32's distance of two numbers there, but no less than for 1: about 0 a score has others.
        step = 2.0 ** (math.frexp(max(abs(about), 1.0))[1] - 24)
        within = torch.rand(count, generator=generator) * (e / count)
        experts = (torch.arange(count) * (e / count) + within).long().clamp(max=e - 1)
        order = torch.randperm(count, generator=generator)
        logits[row, experts] = round(about / step) * step + order.double() * step
    return logits


def _factors_of(generator: Any, logits: Any, k: int) -> tuple[Any, Any]:
    """Return hidden_states [N, K] and W_gate [K, E] whose products are FP32 logits, in any order.

    Row r has three ones, at random places of K, where W_gate holds 8 bits of its logits each.
    """
    import torch

    n, e = logits.shape
    places = torch.randperm(k, generator=generator)[: 3 * n].view(n, 3)
    hidden, weight = torch.zeros(n, k).double(), torch.zeros(k, e).double()
    rest = logits.clone()
    for piece in range(3):
        # The sign, the exponent and the first bits of the rest: a BF16 number.
        cut = (rest.float().view(torch.int32) & -(1 << 16)).view(torch.float32).double()
        hidden[torch.arange(n), places[:, piece]] = 1.0
        weight[places[:, piece]] = cut
        rest -= cut
    return hidden, weight


def _crowded(n: int, e: int, kind: str) -> Any:
    """Return FP64 [n, e]: the best twelve logits of each row are neighbours, some of them equal.

    Row 0 has equal ones with a larger and a smaller one between them, row 1 in twos from an odd
    expert on, so of two lanes, row 2 none, row 3 all. `spread`: a twelfth of all experts apart.
    """
    import torch

    rows = (
        (8, 1, 9, 8, 1, 1, 7, 6, 4, 1, 5, 4),
        [12 - i // 2 for i in range(12)],
        range(12, 0, -1),
        [8] * 12,
    )
    best = torch.tensor([list(row) for row in rows])
    row, expert = torch.arange(n)[:, None], torch.arange(e)
    place, apart = (expert - 5 * row) % e, max(1, e // 12) if kind == "spread" else 1
    is_best = (place % apart == 0) & (place < 12 * apart)
    return torch.where(is_best, best[row % 4, (place // apart).clamp(max=11)], -1).double()
