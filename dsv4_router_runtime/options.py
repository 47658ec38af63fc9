"""What a layer may bind, and a call may bring, beyond what every router has; all of it may be off.

The checks here read no element of a tensor: see `tables` for the values that are bound. What a call
brings changes on the device between two replays of a graph, so its values are the kernels' matter.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any

import torch

from .artifacts.limits import MAX_SHARED_SLOTS
from .checks import (
    FP32_LEAST_NORMAL,
    FP32_MAX,
    check_float,
    check_int,
    check_tensor,
    check_vector,
    shape_of,
    strides_of,
    wrong,
)

if TYPE_CHECKING:
    from .arguments import CallFacts, LayerFacts


@dataclass(frozen=True, kw_only=True, eq=False)
class LayerOptions:
    """The options that a layer binds, as they are given; the defaults are "off"."""

    bias_vl: Any = None
    gate_temp: Any = 1.0
    tid2eid: Any = None
    to_physical: Any = None
    logical_count: Any = None
    num_shared_slots: Any = 0
    norm_topk_prob: Any = True

    def __str__(self) -> str:
        """Those that are on: tensors by name, numbers with their values."""
        given = ((item.name, getattr(self, item.name), item.default) for item in fields(self))
        return ", ".join(
            name if default is None else f"{name}={value}"
            for name, value, default in given
            if value is not default and (default is None or value != default)
        )


PLAIN_LAYER = LayerOptions()


def check_layer_options(
    options: LayerOptions, *, num_experts: int, top_k: int, device: torch.device
) -> None:
    """Check the options of a layer of `num_experts` experts; e_bias is `check_layer`'s matter."""
    if options.bias_vl is not None:
        if options.tid2eid is not None:
            raise wrong("bias_vl", "None beside tid2eid, whose ids need no bias", "a bias")
        check_vector(
            "bias_vl",
            options.bias_vl,
            torch.float32,
            length=num_experts,
            each="expert",
            device=device,
        )
    check_float("gate_temp", options.gate_temp, FP32_LEAST_NORMAL, FP32_MAX)
    if options.tid2eid is not None:
        _check_hash_table(options.tid2eid, top_k, device)
    _check_physical_map(options.to_physical, options.logical_count, num_experts, device)
    check_int("num_shared_slots", options.num_shared_slots, 0, MAX_SHARED_SLOTS)
    if not isinstance(options.norm_topk_prob, bool):
        got = type(options.norm_topk_prob).__name__
        raise TypeError(f"norm_topk_prob: expected a bool (got {got})")


def _check_hash_table(tid2eid: Any, top_k: int, device: torch.device) -> None:
    check_tensor("tid2eid", tid2eid, torch.int32, torch.int64, rank=2, device=device)
    rows, columns = tid2eid.shape
    if columns != top_k:
        raise wrong("tid2eid", f"shape [vocab, {top_k}], top_k columns", shape_of(tid2eid))
    if not 1 <= rows * columns < 2**31:
        allowed = "at least one row, and fewer than 2**31 elements"
        raise wrong("tid2eid", allowed, shape_of(tid2eid))


def _check_physical_map(
    to_physical: Any, logical_count: Any, num_experts: int, device: torch.device
) -> None:
    if to_physical is None and logical_count is None:
        return
    for name, tensor, other in (
        ("to_physical", to_physical, "logical_count"),
        ("logical_count", logical_count, "to_physical"),
    ):
        if tensor is None:
            raise TypeError(
                f"{name}: expected a torch.Tensor beside {other} (got None); pass both or neither"
            )
    check_tensor("to_physical", to_physical, torch.int32, rank=2, device=device)
    rows, replicas = to_physical.shape
    if rows != num_experts or not 1 <= replicas < 2**31:
        allowed = f"shape [{num_experts}, max_replicas], at least 1 replica for each expert"
        raise wrong("to_physical", allowed, shape_of(to_physical))
    if not to_physical.is_contiguous():
        raise wrong("to_physical", "a contiguous tensor, read in place", strides_of(to_physical))
    check_vector(
        "logical_count",
        logical_count,
        torch.int32,
        length=num_experts,
        each="expert",
        device=device,
    )


# Addresses of image_mask, padding_mask, num_tokens and input_ids, 0 where one is not given, and
# whether input_ids is int64. A plain tuple: it is made on every call that has options.
CallOptions = tuple[int, int, int, int, int]
NO_OPTIONS: CallOptions = (0, 0, 0, 0, 0)


def check_call_options(
    facts: LayerFacts,
    call: CallFacts,
    image_mask: Any,
    padding_mask: Any,
    num_tokens: Any,
    input_ids: Any,
) -> CallOptions:
    """Check a call's options against its layer and its other tensors; returns what a launch needs.

    image_mask and padding_mask bool [N], num_tokens int32 with one element, input_ids int32 or
    int64 [N]; all on the layer's device, with unit stride, and apart from the outputs.
    """
    num_rows = call[0]
    image_at = padding_at = valid_at = tokens_at = tokens_are_int64 = 0
    if image_mask is not None:
        if not facts.has_bias_vl:
            raise wrong("image_mask", "None, since the layer has no bias_vl", "a mask")
        image_at = _vector_at("image_mask", image_mask, torch.bool, facts, call, 1)
    if padding_mask is not None:
        padding_at = _vector_at("padding_mask", padding_mask, torch.bool, facts, call, 1)
    if num_tokens is not None:
        valid_at = _scalar_at(num_tokens, facts, call)
    if input_ids is not None:
        if not facts.hashed:
            raise wrong("input_ids", "None, since the layer has no tid2eid", "token ids")
        tokens_are_int64 = int(getattr(input_ids, "dtype", None) is torch.int64)
        if tokens_are_int64:
            tokens_at = _vector_at("input_ids", input_ids, torch.int64, facts, call, 8)
        else:
            tokens_at = _vector_at("input_ids", input_ids, torch.int32, facts, call, 4)
    elif facts.hashed:
        raise TypeError(
            f"input_ids: expected a torch.Tensor of the {num_rows} rows' token ids, which the "
            "layer's tid2eid is looked up by (got None)"
        )
    return image_at, padding_at, valid_at, tokens_at, tokens_are_int64


def _vector_at(
    name: str, vector: Any, dtype: torch.dtype, facts: LayerFacts, call: CallFacts, size: int
) -> int:
    """The address of a right vector [N] of elements of `size` bytes, apart from the outputs."""
    num_rows = call[0]
    if (
        type(vector) is not torch.Tensor
        or vector.dtype is not dtype
        or vector.device != facts.device
        or vector.layout is not torch.strided
        or vector.shape != (num_rows,)
        or vector.stride() != (1,)
    ):
        # The rules, in the order in which a caller wants to hear of them.
        dtypes = (torch.int32, torch.int64) if name == "input_ids" else (dtype,)
        each = "row of hidden_states"
        check_vector(name, vector, *dtypes, length=num_rows, each=each, device=facts.device)
    address = vector.data_ptr()
    _check_apart(name, address, num_rows * size, facts, call)
    return address


def _scalar_at(num_tokens: Any, facts: LayerFacts, call: CallFacts) -> int:
    if isinstance(num_tokens, int):
        raise TypeError(
            "num_tokens: expected a torch.Tensor on the device (got int); a number that the host "
            "knows is hidden_states[:num_tokens]"
        )
    check_tensor("num_tokens", num_tokens, torch.int32, rank=None, device=facts.device)
    if num_tokens.numel() != 1:
        raise wrong("num_tokens", "one element", shape_of(num_tokens))
    address = num_tokens.data_ptr()
    _check_apart("num_tokens", address, 4, facts, call)
    return address


def _check_apart(name: str, low: int, size: int, facts: LayerFacts, call: CallFacts) -> None:
    """What a call reads while it writes must not lie in what it writes."""
    num_rows, _, _, w_at, w_stride, i_at, i_stride, ids_are_int64 = call
    if not num_rows:
        return
    high = low + size
    if w_at < high and low < w_at + ((num_rows - 1) * w_stride + facts.columns) * 4:
        raise wrong(name, "memory apart from out_weights", "an overlap")
    ids_end = i_at + ((num_rows - 1) * i_stride + facts.columns) * (8 if ids_are_int64 else 4)
    if i_at < high and low < ids_end:
        raise wrong(name, "memory apart from out_ids", "an overlap")
