"""The arguments of one call as a launch passes them: numbers and addresses."""

from __future__ import annotations

from typing import NamedTuple


class Call(NamedTuple):
    """Tensors of one call as a launch passes them: addresses, and row strides in elements."""

    num_tokens: int
    hidden_states: int
    hidden_states_stride: int
    out_weights: int
    out_weights_stride: int
    out_ids: int
    out_ids_stride: int
    weights_are_bfloat16: int
    ids_are_int64: int


class RareOptions(NamedTuple):
    """The rare options of one call as a launch passes them: addresses, and strides in elements."""

    forced_ids: int
    forced_ids_stride: int
    forced_ids_are_int64: int
    forced_mask: int
    out_logical_ids: int
    out_logical_ids_stride: int
    out_logits: int
    out_logits_stride: int


class CallOptions(NamedTuple):
    """Options of one call as a launch passes them: addresses, 0 for a tensor that is not given."""

    image_mask: int
    padding_mask: int
    num_valid_tokens: int
    input_ids: int
    input_ids_are_int64: int
    rare: RareOptions


NO_RARE = RareOptions(0, 0, 0, 0, 0, 0, 0, 0)
NO_OPTIONS = CallOptions(0, 0, 0, 0, 0, NO_RARE)
