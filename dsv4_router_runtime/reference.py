"""The oracle: the router in plain torch, in FP64 (or FP32), sharing nothing with the kernels.

It runs where its tensors are, CPU included. The signature mirrors `dense_router_dispatch`, with the
outputs returned instead of written.
"""

from __future__ import annotations

import torch

FP32_MAX = torch.finfo(torch.float32).max
EPSILON = 1e-20


def router_reference(
    hidden_states: torch.Tensor,
    W_gate: torch.Tensor,
    e_bias: torch.Tensor,
    routed_scaling_factor: float,
    top_k: int,
    *,
    dtype: torch.dtype = torch.float64,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Weights [N, top_k] in `dtype` and ids [N, top_k] int32, from operands of any float dtype.

    hidden_states [N, K], W_gate [K, E] of any strides, e_bias [E]. See `select_reference` for the
    order of the ids and for what NaN and infinity do.
    """
    logits = hidden_states.to(dtype) @ W_gate.to(dtype)
    return select_reference(logits, e_bias, routed_scaling_factor, top_k)


def select_reference(
    logits: torch.Tensor, e_bias: torch.Tensor, routed_scaling_factor: float, top_k: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Weights in the logits' dtype and ids int32, both [N, top_k], from logits [N, E].

    Guarantees: ids descend by (score + bias) and equal keys go to the lower index. NaN keys rank
    below every number, the lower index first among them, and a NaN logit adds a score of 0. A logit
    of +inf, or one that FP32 cannot hold, counts as the largest finite FP32 number.
    """
    scores = router_scores(logits)
    order = ranking(selection_keys(logits, e_bias))
    ids = order[:, :top_k]
    chosen = scores.gather(1, ids)
    weights = chosen / (chosen.sum(1, keepdim=True) + EPSILON) * routed_scaling_factor
    return weights, ids.to(torch.int32)


def router_scores(logits: torch.Tensor) -> torch.Tensor:
    """sqrt(softplus(logits)), in the logits' dtype; NaN gives 0, +inf what FLT_MAX gives."""
    finite = logits.nan_to_num(nan=-torch.inf, posinf=FP32_MAX, neginf=-torch.inf)
    finite = finite.clamp(max=FP32_MAX)
    return (finite.clamp(min=0) + (-finite.abs()).exp().log1p()).sqrt()


def selection_keys(logits: torch.Tensor, e_bias: torch.Tensor) -> torch.Tensor:
    """score + bias, and NaN where the logit (or the bias) is NaN."""
    keys = router_scores(logits) + e_bias.to(logits.dtype)
    return keys.masked_fill(logits.isnan(), torch.nan)


def ranking(keys: torch.Tensor) -> torch.Tensor:
    """Expert indices [N, E] by descending key, the lower index first where equal, NaN last."""
    is_nan = keys.isnan()
    order = keys.masked_fill(is_nan, -torch.inf).sort(dim=1, descending=True, stable=True)[1]
    # A second stable sort puts NaN behind -inf, which the first could not tell apart.
    nan_last = is_nan.gather(1, order).to(torch.int8).sort(dim=1, stable=True)[1]
    return order.gather(1, nan_last)


def selection_margin(logits: torch.Tensor, e_bias: torch.Tensor, top_k: int) -> torch.Tensor:
    """How clear the choice is: [N], the gap between the k-th and the (k+1)-th key; inf if k = E.

    A row whose margin is below the accumulation error of its logits may rightly get other experts.
    """
    keys = selection_keys(logits, e_bias)
    if top_k == keys.shape[1]:
        return keys.new_full((keys.shape[0],), torch.inf)
    ranked = keys.gather(1, ranking(keys))
    return ranked[:, top_k - 1] - ranked[:, top_k]


def ranking_margin(logits: torch.Tensor, e_bias: torch.Tensor, top_k: int) -> torch.Tensor:
    """How clear the order is: [N], the least gap above 0 between neighbours of the first top_k + 1.

    Gaps of exactly 0 are equal keys, which the index orders; they are not counted. inf if none.
    """
    keys = selection_keys(logits, e_bias)
    ranked = keys.gather(1, ranking(keys))[:, : top_k + 1]
    gaps = ranked[:, :-1] - ranked[:, 1:]
    gaps = gaps.masked_fill(~(gaps > 0), torch.inf)
    if gaps.shape[1] == 0:
        return keys.new_full((keys.shape[0],), torch.inf)
    return gaps.amin(1)
