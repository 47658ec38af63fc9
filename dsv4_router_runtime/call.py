"""The arguments that one call brings, checked before anything is launched.

No element of a tensor is read: the values may change on the device between two replays of a graph.
See `checks` for the form of an error.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch

from .artifacts.limits import MAP_ALIGNMENT_BYTES
from .checks import check_memory, check_tensor, check_vector, shape_of, strides_of, wrong
from .layer import BF16_BYTES, Layer


class Call(NamedTuple):
    """Tensors of one call as a launch passes them: addresses, and row strides in elements."""

    num_tokens: int
    hidden_states: int
    hidden_states_stride: int
    out_weights: int
    out_weights_stride: int
    out_ids: int
    out_ids_stride: int
    ids_are_int64: int


class CallOptions(NamedTuple):
    """Options of one call as a launch passes them: addresses, 0 for a tensor that is not given."""

    image_mask: int
    padding_mask: int
    num_valid_tokens: int
    input_ids: int
    input_ids_are_int64: int


NO_OPTIONS = CallOptions(0, 0, 0, 0, 0)
# `Call(...)` runs a Python function and costs 0.1 us more per call than this.
_new = tuple.__new__
# A name of torch's takes 0.03 us to look up.
_TENSOR = torch.Tensor
_BFLOAT16, _FLOAT32, _INT32, _INT64 = torch.bfloat16, torch.float32, torch.int32, torch.int64


def check_call(layer: Layer, hidden_states: Any, out_weights: Any, out_ids: Any) -> Call:
    """Check one call's tensors against the layer and return them as a launch passes them.

    hidden_states [N, K] BF16; out_weights FP32 and out_ids int32 or int64, of at least
    [N, layer.columns].
    """
    call = plainly_right(layer, hidden_states, out_weights, out_ids)
    if call is None:
        call = _check_call_slowly(layer, hidden_states, out_weights, out_ids)
    return call


def plainly_right(layer: Layer, x: Any, weights: Any, ids: Any) -> Call | None:
    """Check the usual call in about 1.5 us; None sends it to the full check.

    Each property is read once. A call that passes here passes the full check too (see
    test_router_arguments). Rare valid calls (a subclass of Tensor, one row of an odd stride,
    outputs interleaved in one buffer) go to the full check.
    """
    device, columns = layer.device, layer.columns
    if (
        not (type(x) is _TENSOR and type(weights) is _TENSOR and type(ids) is _TENSOR)
        or x.dtype is not _BFLOAT16
        or weights.dtype is not _FLOAT32
        or not (x.device == device and weights.device == device and ids.device == device)
    ):
        return None
    ids_dtype = ids.dtype
    if ids_dtype is _INT32:
        ids_are_int64, ids_bytes = 0, 4
    elif ids_dtype is _INT64:
        ids_are_int64, ids_bytes = 1, 8
    else:
        return None
    try:
        num_tokens, k = x.shape
        x_stride, x_unit = x.stride()
        w_rows, w_columns = weights.shape
        w_stride, w_unit = weights.stride()
        i_rows, i_columns = ids.shape
        i_stride, i_unit = ids.stride()
        x_at, w_at, i_at = x.data_ptr(), weights.data_ptr(), ids.data_ptr()
    # Not 2 dimensions; no strides, since sparse; no address, since torch traces.
    except (ValueError, RuntimeError):
        return None
    if (
        k != layer.k
        or x_stride < k
        or x_stride % 8
        or w_rows < num_tokens
        or i_rows < num_tokens
        or w_columns < columns
        or i_columns < columns
        or not (x_unit == w_unit == i_unit == 1)
        or not (columns <= w_stride < 2**31 and columns <= i_stride < 2**31)
    ):
        return None
    x_end = x_at + num_tokens * x_stride * 2
    w_end = w_at + num_tokens * w_stride * 4
    i_end = i_at + num_tokens * i_stride * ids_bytes
    if (
        (num_tokens and not (x_at and w_at and i_at))
        or x_at % MAP_ALIGNMENT_BYTES
        or (w_at < i_end and i_at < w_end)
        or (w_at < x_end and x_at < w_end)
        or (i_at < x_end and x_at < i_end)
    ):
        return None
    return _new(Call, (num_tokens, x_at, x_stride, w_at, w_stride, i_at, i_stride, ids_are_int64))


def _check_call_slowly(layer: Layer, hidden_states: Any, out_weights: Any, out_ids: Any) -> Call:
    """Check every rule of a call, in the order of the arguments."""
    device = layer.device
    check_tensor("hidden_states", hidden_states, torch.bfloat16, rank=2, device=device)
    check_tensor("out_weights", out_weights, torch.float32, rank=2, device=device)
    check_tensor("out_ids", out_ids, torch.int32, torch.int64, rank=2, device=device)
    num_tokens, k = hidden_states.shape
    if k != layer.k:
        raise wrong("hidden_states", f"shape [N, {layer.k}], W_gate's K", shape_of(hidden_states))
    _check_output("out_weights", out_weights, num_tokens, layer)
    _check_output("out_ids", out_ids, num_tokens, layer)
    if num_tokens:
        _check_rows(hidden_states)
        _check_overlap(hidden_states, out_weights, out_ids, num_tokens, layer.columns)
    return Call(
        num_tokens=num_tokens,
        hidden_states=hidden_states.data_ptr(),
        hidden_states_stride=hidden_states.stride(0),
        out_weights=out_weights.data_ptr(),
        out_weights_stride=out_weights.stride(0),
        out_ids=out_ids.data_ptr(),
        out_ids_stride=out_ids.stride(0),
        ids_are_int64=int(out_ids.dtype is torch.int64),
    )


def _check_rows(hidden_states: torch.Tensor) -> None:
    """Check unit stride along K, an aligned start, and a row stride that TMA can step by."""
    num_tokens, k = hidden_states.shape
    row_stride, along_k = hidden_states.stride()
    if along_k != 1:
        raise wrong("hidden_states", "unit stride along K", strides_of(hidden_states))
    if num_tokens > 1 and (row_stride < k or row_stride * BF16_BYTES % MAP_ALIGNMENT_BYTES):
        raise wrong(
            "hidden_states",
            f"a row stride of at least K and a multiple of {MAP_ALIGNMENT_BYTES // BF16_BYTES} "
            "elements (call .contiguous())",
            strides_of(hidden_states),
        )
    if hidden_states.data_ptr() % MAP_ALIGNMENT_BYTES:
        got = f"address {hidden_states.data_ptr():#x}"
        raise wrong("hidden_states", f"data aligned to {MAP_ALIGNMENT_BYTES} bytes", got)


def _check_output(name: str, out: torch.Tensor, num_tokens: int, layer: Layer) -> None:
    rows, columns = out.shape
    needed = layer.columns
    what = "top_k" if needed == layer.top_k else "top_k + num_shared_slots"
    if rows < num_tokens or columns < needed:
        raise wrong(name, f"at least [{num_tokens}, {needed}] (N, {what})", shape_of(out))
    row_stride, along_k = out.stride()
    if columns > 1 and along_k != 1:
        raise wrong(name, "unit stride along the last dimension", strides_of(out))
    if num_tokens > 1 and not needed <= row_stride < 2**31:
        raise wrong(name, f"a row stride of at least {what} ({needed})", strides_of(out))


def _check_overlap(
    hidden_states: torch.Tensor,
    out_weights: torch.Tensor,
    out_ids: torch.Tensor,
    num_tokens: int,
    columns: int,
) -> None:
    """Refuse an output that shares an element with the other output or with hidden_states."""
    row_stride = hidden_states.stride(0)
    x_low = hidden_states.data_ptr()
    x_high = x_low + ((num_tokens - 1) * row_stride + hidden_states.shape[1]) * BF16_BYTES
    w_low, w_high, w_stride = _extent(out_weights, num_tokens, columns)
    i_low, i_high, i_stride = _extent(out_ids, num_tokens, columns)
    if w_low < x_high and x_low < w_high:
        raise wrong("out_weights", "memory apart from hidden_states", "an overlap")
    if i_low < x_high and x_low < i_high:
        raise wrong("out_ids", "memory apart from hidden_states", "an overlap")
    if w_low < i_high and i_low < w_high:
        # Columns of one buffer interleave without meeting: same row stride, disjoint columns.
        apart = (i_low - w_low) % w_stride
        w_width, i_width = columns * out_weights.itemsize, columns * out_ids.itemsize
        if w_stride != i_stride or apart < w_width or w_stride - apart < i_width:
            raise wrong("out_ids", "memory apart from out_weights", "an overlap")


def _extent(out: torch.Tensor, num_tokens: int, columns: int) -> tuple[int, int, int]:
    """Return the first byte, the end of what a call writes, and the row stride in bytes."""
    low, width = out.data_ptr(), columns * out.itemsize
    # One row is never stepped along; any stride that holds the row describes it.
    stride = out.stride(0) * out.itemsize if num_tokens > 1 else width
    return low, low + (num_tokens - 1) * stride + width, stride


def check_call_options(
    layer: Layer,
    call: Call,
    image_mask: Any,
    padding_mask: Any,
    num_tokens: Any,
    input_ids: Any,
) -> CallOptions:
    """Check a call's options against its layer and its tensors; return them for a launch.

    image_mask and padding_mask bool [N], num_tokens int32 with one element, input_ids int32 or
    int64 [N]; all on the layer's device, with unit stride, and apart from the outputs.
    """
    num_rows = call[0]
    image_at = padding_at = valid_at = tokens_at = tokens_are_int64 = 0
    if image_mask is not None:
        if not layer.has_bias_vl:
            raise wrong("image_mask", "None, since the layer has no bias_vl", "a mask")
        image_at = _vector_at("image_mask", image_mask, torch.bool, layer, call, 1)
    if padding_mask is not None:
        padding_at = _vector_at("padding_mask", padding_mask, torch.bool, layer, call, 1)
    if num_tokens is not None:
        valid_at = _scalar_at(num_tokens, layer, call)
    if input_ids is not None:
        if not layer.hashed:
            raise wrong("input_ids", "None, since the layer has no tid2eid", "token ids")
        tokens_are_int64 = int(getattr(input_ids, "dtype", None) is torch.int64)
        if tokens_are_int64:
            tokens_at = _vector_at("input_ids", input_ids, torch.int64, layer, call, 8)
        else:
            tokens_at = _vector_at("input_ids", input_ids, torch.int32, layer, call, 4)
    elif layer.hashed:
        raise TypeError(
            f"input_ids: expected a torch.Tensor of the {num_rows} rows' token ids, which the "
            "layer's tid2eid is looked up by (got None)"
        )
    return _new(CallOptions, (image_at, padding_at, valid_at, tokens_at, tokens_are_int64))


def _vector_at(
    name: str, vector: Any, dtype: torch.dtype, layer: Layer, call: Call, size: int
) -> int:
    """Check a vector [N] of elements of `size` bytes apart from the outputs; return its address."""
    num_rows = call[0]
    if (
        type(vector) is not torch.Tensor
        or vector.dtype is not dtype
        or vector.device != layer.device
        or vector.layout is not torch.strided
        or vector.shape != (num_rows,)
        or vector.stride() != (1,)
    ):
        # Some rule is broken, or the vector is a subclass of Tensor: check rule by rule.
        dtypes = (torch.int32, torch.int64) if name == "input_ids" else (dtype,)
        each = "row of hidden_states"
        check_vector(name, vector, *dtypes, length=num_rows, each=each, device=layer.device)
    address = vector.data_ptr()
    if not address:
        check_memory(name, vector)
    _check_apart(name, address, num_rows * size, layer, call)
    return address


def _scalar_at(num_tokens: Any, layer: Layer, call: Call) -> int:
    if isinstance(num_tokens, int):
        raise TypeError(
            "num_tokens: expected a torch.Tensor on the device (got int); a number that the host "
            "knows is hidden_states[:num_tokens]"
        )
    check_tensor("num_tokens", num_tokens, torch.int32, rank=None, device=layer.device)
    if num_tokens.numel() != 1:
        raise wrong("num_tokens", "one element", shape_of(num_tokens))
    address = num_tokens.data_ptr()
    _check_apart("num_tokens", address, 4, layer, call)
    return address


def _check_apart(name: str, low: int, size: int, layer: Layer, call: Call) -> None:
    """Refuse an option that overlaps an output of the same call."""
    num_rows, _, _, w_at, w_stride, i_at, i_stride, ids_are_int64 = call
    if not num_rows:
        return
    high = low + size
    if w_at < high and low < w_at + ((num_rows - 1) * w_stride + layer.columns) * 4:
        raise wrong(name, "memory apart from out_weights", "an overlap")
    ids_end = i_at + ((num_rows - 1) * i_stride + layer.columns) * (8 if ids_are_int64 else 4)
    if i_at < high and low < ids_end:
        raise wrong(name, "memory apart from out_ids", "an overlap")
