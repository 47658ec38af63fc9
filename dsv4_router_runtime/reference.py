"""The oracle: the router in plain torch, in FP64 (or FP32), sharing nothing with the kernels.

It runs where its tensors are, CPU included. The signature mirrors `dense_router_dispatch`, with the
outputs returned instead of written, and `Router`'s options as keywords.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple, Unpack

import torch

from .layer import OPTIONS_OFF, LayerOptions

FP32_MAX = torch.finfo(torch.float32).max
EPSILON = 1e-20


class ReferenceOptions(LayerOptions, total=False):
    """Options of `Router` and of its calls, and the dtype of the ids. Each one left out is off."""

    image_mask: torch.Tensor | None
    padding_mask: torch.Tensor | None
    num_tokens: torch.Tensor | None
    input_ids: torch.Tensor | None
    forced_ids: torch.Tensor | None
    forced_mask: torch.Tensor | None
    ids_dtype: torch.dtype


_OFF = ReferenceOptions(
    **OPTIONS_OFF,
    image_mask=None,
    padding_mask=None,
    num_tokens=None,
    input_ids=None,
    forced_ids=None,
    forced_mask=None,
    ids_dtype=torch.int32,
)


class Arithmetic(NamedTuple):
    """From a logit to a weight: the score of each logit, and the weights of the chosen scores.

    weights takes scores [N, top_k], routed_scaling_factor and norm_topk_prob.
    """

    scores: Callable[[torch.Tensor], torch.Tensor]
    weights: Callable[[torch.Tensor, float, bool], torch.Tensor]


def router_reference(
    hidden_states: torch.Tensor,
    W_gate: torch.Tensor,
    e_bias: torch.Tensor | None,
    routed_scaling_factor: float,
    top_k: int,
    *,
    dtype: torch.dtype = torch.float64,
    **options: Unpack[ReferenceOptions],
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return weights in `dtype` and ids in `ids_dtype`, both [N, top_k + num_shared_slots].

    hidden_states [N, K] and W_gate [K, E] in any float dtype and of any strides. See
    `select_reference` for the rest.
    """
    logits = hidden_states.to(dtype) @ W_gate.to(dtype)
    return select_reference(logits, e_bias, routed_scaling_factor, top_k, **options)


def select_reference(
    logits: torch.Tensor,
    e_bias: torch.Tensor | None,
    routed_scaling_factor: float,
    top_k: int,
    **options: Unpack[ReferenceOptions],
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return weights in the logits' dtype and ids in `ids_dtype` from logits [N, E].

    Both are [N, top_k + num_shared_slots]. Guarantees: ids descend by (score + bias) and equal keys
    go to the lower index. NaN keys rank below every number, the lower index first among them, and a
    NaN logit adds a score of 0. A logit of +inf, or one that FP32 cannot hold, counts as the
    largest finite FP32 number.

    bias_vl [E], image_mask [N] bool: image rows select with bias_vl instead of e_bias, or instead
        of the table. first_image_id, num_image_ids: see `image_rows`.
    gate_temp: see `tempered`.
    padding_mask [N] bool, num_tokens (one element): the mask's rows, and those from num_tokens on,
        get id -1 and weight 0 in every column.
    tid2eid [vocab, top_k], input_ids [N]: ids are the token's row of the table, in its order, and
        no bias is used (e_bias None). A token id outside the table makes a row like a padded one.
        The table is not used for an image row.
    forced_ids [N, top_k], forced_mask [N] bool: the ids of the mask's rows, or of all without one.
        One outside 0..E - 1, or one twice, makes the row like a padded one.
    to_physical [E, replicas], logical_count [E]: id e of row r becomes
        to_physical[e, r % count], the count held within 1..replicas. Of an int64 the low word.
    num_shared_slots: columns top_k + j hold id E + j and weight shared_weight.
    norm_topk_prob: False leaves out the division by the sum.
    """
    return select_with(PLAIN, logits, e_bias, routed_scaling_factor, top_k, options)


def select_with(
    arithmetic: Arithmetic,
    logits: torch.Tensor,
    e_bias: torch.Tensor | None,
    routed_scaling_factor: float,
    top_k: int,
    options: ReferenceOptions,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return weights and ids from logits [N, E]; see `select_reference`."""
    unknown = sorted(options.keys() - _OFF.keys())
    if unknown:
        raise TypeError(f"unexpected keyword arguments {unknown} (options: {', '.join(_OFF)})")
    given = _OFF | options
    num_rows, num_experts = logits.shape
    scores = arithmetic.scores(tempered(logits, given["gate_temp"]))
    # So that its key is NaN too. It counts as 0 in the weights.
    scores = scores.masked_fill(logits.isnan(), torch.nan)
    ids, padded = _chosen(scores, e_bias, top_k, given)
    if (forced_ids := given["forced_ids"]) is not None:
        wrong, forced = _not_a_choice(forced_ids, num_experts), given["forced_mask"]
        forced = torch.ones_like(wrong) if forced is None else forced
        ids = torch.where((forced & ~wrong)[:, None], forced_ids.long(), ids)
        padded = torch.where(forced, wrong, padded)
    padding = given["padding_mask"], given["num_tokens"]
    padded = padded | padded_rows(num_rows, logits.device, *padding)

    chosen = scores.gather(1, ids).nan_to_num(nan=0.0)
    weights = arithmetic.weights(chosen, routed_scaling_factor, given["norm_topk_prob"])

    ids = _physical(ids, given["to_physical"], given["logical_count"])
    num_shared_slots = given["num_shared_slots"]
    shared = num_experts + torch.arange(num_shared_slots, device=logits.device)
    ids = torch.cat([ids, shared.expand(num_rows, -1)], 1)
    of_shared = weights.new_full((num_rows, num_shared_slots), given["shared_weight"])
    weights = torch.cat([weights, of_shared], 1)

    ids = ids.masked_fill(padded[:, None], -1)
    # Filled, not multiplied: a padded row may hold NaN.
    weights = weights.masked_fill(padded[:, None], 0)
    return weights, ids.to(given["ids_dtype"])


def _chosen(
    scores: torch.Tensor, e_bias: torch.Tensor | None, top_k: int, given: ReferenceOptions
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the logical ids [N, top_k], and the rows [N] that have none in the table."""
    tid2eid, input_ids, bias_vl = given["tid2eid"], given["input_ids"], given["bias_vl"]
    ids_range = given["first_image_id"], given["num_image_ids"]
    images = image_rows(len(scores), scores.device, given["image_mask"], input_ids, *ids_range)
    if tid2eid is not None and input_ids is not None:
        outside = (input_ids < 0) | (input_ids >= tid2eid.shape[0])
        ids = tid2eid[input_ids.masked_fill(outside, 0).long()].long()
        if bias_vl is None:
            return ids, outside
        of_images = ranking(scores + bias_vl.to(scores.dtype))[:, :top_k]
        return torch.where(images[:, None], of_images, ids), outside & ~images
    if e_bias is None:
        raise ValueError("expected e_bias, or tid2eid and input_ids (got neither)")
    bias = selection_bias(e_bias, bias_vl, images)
    return ranking(scores + bias.to(scores.dtype))[:, :top_k], torch.zeros_like(images)


def _not_a_choice(ids: torch.Tensor, num_experts: int) -> torch.Tensor:
    """Mark the rows of ids [N, top_k] with one outside 0..num_experts - 1, or one twice: [N]."""
    outside = (ids < 0) | (ids >= num_experts)
    twice = ids.sort(1)[0].diff(dim=1) == 0
    return outside.any(1) | twice.any(1)


def _physical(
    ids: torch.Tensor, to_physical: torch.Tensor | None, logical_count: torch.Tensor | None
) -> torch.Tensor:
    """Replace logical ids [N, top_k] by physical ones, if there is a map."""
    if to_physical is None or logical_count is None:
        return ids
    # To int32 first, which keeps the low word.
    count = logical_count.int().long().clamp(1, to_physical.shape[1])[ids]
    rows = torch.arange(len(ids), device=ids.device)[:, None]
    return to_physical.int().long()[ids, rows % count]


def image_rows(
    num_rows: int,
    device: torch.device,
    image_mask: torch.Tensor | None,
    input_ids: torch.Tensor | None,
    first_image_id: int = 0,
    num_image_ids: int = 0,
) -> torch.Tensor:
    """Mark the rows of image_mask and those whose token id is an image's: bool [num_rows].

    These are first_image_id and those after it, num_image_ids of them.
    """
    images = torch.zeros(num_rows, dtype=torch.bool, device=device)
    if image_mask is not None:
        images = images | image_mask
    if num_image_ids and input_ids is not None:
        place = input_ids.long() - first_image_id
        images = images | ((place >= 0) & (place < num_image_ids))
    return images


def tempered(logits: torch.Tensor, gate_temp: float) -> torch.Tensor:
    """Return logits / gate_temp, both and the quotient rounded to FP32, in the logits' dtype.

    The rounding is part of the definition, since the router's logits are FP32: far below zero it
    shows in a score (3e-6 of it at -100). A temperature of 1 leaves the logits as they are.
    """
    if gate_temp == 1.0:
        return logits
    # A tensor on the logits' device: torch's CUDA kernels multiply by the inverse of a number.
    divisor = torch.tensor(gate_temp, dtype=torch.float32, device=logits.device)
    return (logits.float() / divisor).to(logits.dtype)


def selection_bias(
    e_bias: torch.Tensor, bias_vl: torch.Tensor | None, image_mask: torch.Tensor | None
) -> torch.Tensor:
    """Return the bias of each row's scores: e_bias [E] or, with an image_mask, [N, E]."""
    if bias_vl is None or image_mask is None:
        return e_bias
    return torch.where(image_mask[:, None], bias_vl, e_bias)


def padded_rows(
    num_rows: int,
    device: torch.device,
    padding_mask: torch.Tensor | None,
    num_tokens: torch.Tensor | None,
) -> torch.Tensor:
    """Mark the rows of padding_mask and those from num_tokens on: bool [num_rows]."""
    padded = torch.zeros(num_rows, dtype=torch.bool, device=device)
    if padding_mask is not None:
        padded = padded | padding_mask
    if num_tokens is not None:
        padded = padded | (torch.arange(num_rows, device=device) >= num_tokens.reshape(()))
    return padded


def router_scores(logits: torch.Tensor) -> torch.Tensor:
    """Return sqrt(softplus(logits)) in their dtype; NaN gives 0, +inf the score of FLT_MAX."""
    finite = logits.nan_to_num(nan=-torch.inf, posinf=FP32_MAX, neginf=-torch.inf)
    finite = finite.clamp(max=FP32_MAX)
    return (finite.clamp(min=0) + (-finite.abs()).exp().log1p()).sqrt()


def _plain_weights(scores: torch.Tensor, scale: float, norm_topk_prob: bool) -> torch.Tensor:
    if norm_topk_prob:
        scores = scores / (scores.sum(1, keepdim=True) + EPSILON)
    return scores * scale


PLAIN = Arithmetic(scores=router_scores, weights=_plain_weights)


def selection_keys(logits: torch.Tensor, e_bias: torch.Tensor) -> torch.Tensor:
    """Return score + bias, NaN if the logit or the bias is; e_bias [E], or [N, E] by row."""
    keys = router_scores(logits) + e_bias.to(logits.dtype)
    return keys.masked_fill(logits.isnan(), torch.nan)


def ranking(keys: torch.Tensor) -> torch.Tensor:
    """Sort experts by descending key, the lower index first if equal, NaN last: [N, E]."""
    is_nan = keys.isnan()
    order = keys.masked_fill(is_nan, -torch.inf).sort(dim=1, descending=True, stable=True)[1]
    # A second stable sort puts NaN behind -inf, which the first could not tell apart.
    nan_last = is_nan.gather(1, order).to(torch.int8).sort(dim=1, stable=True)[1]
    return order.gather(1, nan_last)


def selection_margin(logits: torch.Tensor, e_bias: torch.Tensor, top_k: int) -> torch.Tensor:
    """Return the gap between the k-th and the (k+1)-th key: [N]; inf if k = E.

    A row whose margin is below the accumulation error of its logits may rightly get other experts.
    """
    keys = selection_keys(logits, e_bias)
    if top_k == keys.shape[1]:
        return keys.new_full((keys.shape[0],), torch.inf)
    ranked = keys.gather(1, ranking(keys))
    return ranked[:, top_k - 1] - ranked[:, top_k]


def ranking_margin(logits: torch.Tensor, e_bias: torch.Tensor, top_k: int) -> torch.Tensor:
    """Return the least gap above 0 between neighbours of the first top_k + 1 keys: [N].

    Gaps of exactly 0 are equal keys, which the index orders; they are not counted. inf if none.
    """
    keys = selection_keys(logits, e_bias)
    ranked = keys.gather(1, ranking(keys))[:, : top_k + 1]
    gaps = ranked[:, :-1] - ranked[:, 1:]
    gaps = gaps.masked_fill(~(gaps > 0), torch.inf)
    if gaps.shape[1] == 0:
        return keys.new_full((keys.shape[0],), torch.inf)
    return gaps.amin(1)
