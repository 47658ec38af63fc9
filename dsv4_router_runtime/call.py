"""The arguments that one call brings, checked before anything is launched.

No element of a tensor is read: the values may change on the device between two replays of a graph.
See `checks` for the form of an error.
"""

from __future__ import annotations

from typing import Any, NamedTuple, TypedDict

import torch

from .artifacts.limits import MAP_ALIGNMENT_BYTES
from .checks import check_memory, check_tensor, check_vector, shape_of, strides_of, wrong
from .device.arguments import NO_RARE, Call, CallOptions, RareOptions
from .layer import BF16_BYTES, Layer


class RareKeywords(TypedDict, total=False):
    """Keywords of a call that most calls leave out as a whole, at next to no cost."""

    forced_ids: torch.Tensor | None
    forced_mask: torch.Tensor | None
    out_logical_ids: torch.Tensor | None
    out_logits: torch.Tensor | None


class _Span(NamedTuple):
    """The memory of a tensor's rows, in bytes: first, end, and the stride and width of a row."""

    name: str
    low: int
    high: int
    stride: int
    width: int


# `Call(...)` runs a Python function and costs 0.1 us more per call than this.
_new = tuple.__new__
# A name of torch's takes 0.03 us to look up.
_TENSOR = torch.Tensor
_STRIDED = torch.strided
_BFLOAT16, _FLOAT32 = torch.bfloat16, torch.float32
_BOOL, _INT32, _INT64 = torch.bool, torch.int32, torch.int64


def check_call(layer: Layer, hidden_states: Any, out_weights: Any, out_ids: Any) -> Call:
    """Check one call's tensors against the layer and return them as a launch passes them.

    hidden_states [N, K] BF16; out_weights FP32 or BF16 and out_ids int32 or int64, of at least
    [N, layer.columns].
    """
    call = plainly_right(layer, hidden_states, out_weights, out_ids)
    if call is None:
        call = _check_call_slowly(layer, hidden_states, out_weights, out_ids)
    return call


def plainly_right(layer: Layer, x: Any, weights: Any, ids: Any) -> Call | None:
    """Check the usual call in about 1.5 us; None sends it to the full check, which allows more.

    Each property is read once. Not usual: a subclass of Tensor, one row of any stride, one buffer.
    """
    device, columns = layer.device, layer.columns
    if (
        not (type(x) is type(weights) is type(ids) is _TENSOR)
        or x.dtype is not _BFLOAT16
        or not (x.device == device and weights.device == device and ids.device == device)
    ):
        return None
    weights_dtype, ids_dtype = weights.dtype, ids.dtype
    if weights_dtype is _FLOAT32:
        narrow, weights_bytes = 0, 4
    elif weights_dtype is _BFLOAT16:
        narrow, weights_bytes = 1, 2
    else:
        return None
    if ids_dtype is _INT32:
        wide, ids_bytes = 0, 4
    elif ids_dtype is _INT64:
        wide, ids_bytes = 1, 8
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
    w_end = w_at + num_tokens * w_stride * weights_bytes
    i_end = i_at + num_tokens * i_stride * ids_bytes
    if (
        (num_tokens and not (x_at and w_at and i_at))
        or x_at % MAP_ALIGNMENT_BYTES
        or (w_at < i_end and i_at < w_end)
        or (w_at < x_end and x_at < w_end)
        or (i_at < x_end and x_at < i_end)
    ):
        return None
    return _new(Call, (num_tokens, x_at, x_stride, w_at, w_stride, i_at, i_stride, narrow, wide))


def _check_call_slowly(layer: Layer, hidden_states: Any, out_weights: Any, out_ids: Any) -> Call:
    """Check every rule of a call, in the order of the arguments."""
    device = layer.device
    check_tensor("hidden_states", hidden_states, torch.bfloat16, rank=2, device=device)
    check_tensor("out_weights", out_weights, _FLOAT32, _BFLOAT16, rank=2, device=device)
    check_tensor("out_ids", out_ids, torch.int32, torch.int64, rank=2, device=device)
    num_tokens, k = hidden_states.shape
    if k != layer.k:
        raise wrong("hidden_states", f"shape [N, {layer.k}], W_gate's K", shape_of(hidden_states))
    what = "top_k" if layer.columns == layer.top_k else "top_k + num_shared_slots"
    for name, out in (("out_weights", out_weights), ("out_ids", out_ids)):
        _check_output(name, out, num_tokens, layer.columns, what)
    if num_tokens:
        _check_rows(hidden_states)
    call = Call(
        num_tokens=num_tokens,
        hidden_states=hidden_states.data_ptr(),
        hidden_states_stride=hidden_states.stride(0),
        out_weights=out_weights.data_ptr(),
        out_weights_stride=out_weights.stride(0),
        out_ids=out_ids.data_ptr(),
        out_ids_stride=out_ids.stride(0),
        weights_are_bfloat16=int(out_weights.dtype is _BFLOAT16),
        ids_are_int64=int(out_ids.dtype is _INT64),
    )
    if num_tokens:
        weights_span, ids_span = _spans_of_outputs(layer, call)
        for span in (weights_span, ids_span):
            _refuse_overlap(span, _span_of_rows(layer, call))
        _refuse_overlap(ids_span, weights_span)
    return call


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


def _check_output(name: str, out: torch.Tensor, num_tokens: int, needed: int, what: str) -> None:
    rows, columns = out.shape
    if rows < num_tokens or columns < needed:
        raise wrong(name, f"at least [{num_tokens}, {needed}] (N, {what})", shape_of(out))
    row_stride, along_k = out.stride()
    if columns > 1 and along_k != 1:
        raise wrong(name, "unit stride along the last dimension", strides_of(out))
    if num_tokens > 1 and not needed <= row_stride < 2**31:
        allowed = f"a row stride of at least {what} ({needed}) and below 2**31 elements"
        raise wrong(name, allowed, strides_of(out))


def _span(name: str, at: int, num_rows: int, stride: int, columns: int, size: int) -> _Span:
    """Return the memory of rows of `columns` elements of `size` bytes; there is at least one."""
    width = columns * size
    # One row is never stepped along; any stride that holds the row describes it.
    step = stride * size if num_rows > 1 else width
    return _Span(name, at, at + (num_rows - 1) * step + width, step, width)


def _span_of_rows(layer: Layer, call: Call) -> _Span:
    """Return the memory of hidden_states, as one row: the gaps between its rows are not free."""
    extent = (call.num_tokens - 1) * call.hidden_states_stride + layer.k
    return _span("hidden_states", call.hidden_states, 1, 0, extent, BF16_BYTES)


def _spans_of_outputs(layer: Layer, call: Call) -> tuple[_Span, _Span]:
    """Return the memory that a call writes of out_weights and of out_ids."""
    num_rows, _, _, w_at, w_stride, i_at, i_stride, weights_are_bfloat16, ids_are_int64 = call
    columns, w_size, i_size = layer.columns, 2 if weights_are_bfloat16 else 4, 4 << ids_are_int64
    return (
        _span("out_weights", w_at, num_rows, w_stride, columns, w_size),
        _span("out_ids", i_at, num_rows, i_stride, columns, i_size),
    )


def _refuse_overlap(span: _Span, other: _Span) -> None:
    """Raise ValueError about `span` if it may share an element with `other`."""
    if span.low < other.high and other.low < span.high:
        # Columns of one buffer interleave without meeting: same row stride, disjoint columns.
        stride, apart = other.stride, (span.low - other.low) % other.stride
        if span.stride != stride or apart < other.width or stride - apart < span.width:
            raise wrong(span.name, f"memory apart from {other.name}", "an overlap")


def check_call_options(
    layer: Layer,
    call: Call,
    image_mask: Any,
    padding_mask: Any,
    num_tokens: Any,
    input_ids: Any,
    rare: RareKeywords,
) -> CallOptions:
    """Check a call's options against its layer and its tensors; return them for a launch.

    image_mask and padding_mask bool [N], num_tokens int32 with one element, input_ids int32 or
    int64 [N]; all on the layer's device, with unit stride, and apart from the outputs. rare: see
    `_checked_rare`.
    """
    num_rows = call[0]
    image_at = padding_at = valid_at = tokens_at = tokens_are_int64 = 0
    if image_mask is not None:
        if not layer.has_bias_vl:
            raise wrong("image_mask", "None, since the layer has no bias_vl", "a mask")
        image_at = _vector_at("image_mask", image_mask, _BOOL, layer, call, 1)
    if padding_mask is not None:
        padding_at = _vector_at("padding_mask", padding_mask, _BOOL, layer, call, 1)
    if num_tokens is not None:
        valid_at = _scalar_at(num_tokens, layer, call)
    if input_ids is not None:
        if not layer.needs_input_ids:
            allowed = "None, since the layer has no tid2eid and no num_image_ids"
            raise wrong("input_ids", allowed, "token ids")
        tokens_are_int64 = int(getattr(input_ids, "dtype", None) is _INT64)
        if tokens_are_int64:
            tokens_at = _vector_at("input_ids", input_ids, _INT64, layer, call, 8)
        else:
            tokens_at = _vector_at("input_ids", input_ids, _INT32, layer, call, 4)
    elif layer.needs_input_ids:
        use = "tid2eid is looked up by" if layer.hashed else "num_image_ids tells image rows by"
        raise TypeError(
            f"input_ids: expected a torch.Tensor of the {num_rows} rows' token ids, which the "
            f"layer's {use} (got None)"
        )
    rare_at = NO_RARE
    if rare:
        vectors = image_at, padding_at, valid_at, tokens_at, tokens_are_int64
        rare_at = _checked_rare(layer, call, _spans_of_vectors(num_rows, *vectors), **rare)
    return _new(CallOptions, (image_at, padding_at, valid_at, tokens_at, tokens_are_int64, rare_at))


def _checked_rare(
    layer: Layer,
    call: Call,
    read: list[_Span],
    *,
    forced_ids: Any = None,
    forced_mask: Any = None,
    out_logical_ids: Any = None,
    out_logits: Any = None,
    **unknown: Any,
) -> RareOptions:
    """Check the rare options of a call that reads hidden_states and the vectors of `read`.

    forced_ids int32 or int64 [N, top_k], forced_mask bool [N]; out_logical_ids int32 of at least
    [N, top_k], out_logits FP32 of at least [N, num_experts]. Rows may be strided. Outputs
    lie apart from the rest.
    """
    for name in unknown:
        allowed = ", ".join(RareKeywords.__annotations__)
        raise TypeError(f"unexpected keyword argument {name!r} (beside the others: {allowed})")
    num_rows = call[0]
    spans = list(_spans_of_outputs(layer, call)) if num_rows else []
    forced, mask_at = (0, 0, 0), 0
    if forced_ids is not None:
        forced = _forced_at(forced_ids, num_rows, layer)
        if num_rows:
            form = forced[1], layer.top_k, forced_ids.itemsize
            read.append(_span("forced_ids", forced[0], num_rows, *form))
        for span in spans:
            _refuse_overlap(read[-1], span)
    if forced_mask is not None:
        if forced_ids is None:
            raise TypeError(
                "forced_ids: expected a torch.Tensor beside forced_mask (got None); pass the ids "
                "of the mask's rows, or no mask"
            )
        mask_at = _vector_at("forced_mask", forced_mask, _BOOL, layer, call, 1)
        read.append(_span("forced_mask", mask_at, 1, 0, num_rows, 1))
    if out_logits is not None and layer.hashed and not layer.has_bias_vl:
        reason = "a hash layer without bias_vl computes the logits of its own experts alone"
        raise wrong("out_logits", f"None, since {reason}", "a tensor")
    written = [0, 0, 0, 0]
    for at, (name, out, dtype, columns, what) in enumerate(
        (
            ("out_logical_ids", out_logical_ids, _INT32, layer.top_k, "top_k"),
            ("out_logits", out_logits, _FLOAT32, layer.num_experts, "num_experts"),
        )
    ):
        if out is None:
            continue
        check_tensor(name, out, dtype, rank=2, device=layer.device)
        _check_output(name, out, num_rows, columns, what)
        written[2 * at : 2 * at + 2] = out.data_ptr(), out.stride(0)
        if num_rows:
            span = _span(name, out.data_ptr(), num_rows, out.stride(0), columns, out.itemsize)
            for other in (_span_of_rows(layer, call), *read, *spans):
                _refuse_overlap(span, other)
            spans.append(span)
    return RareOptions(*forced, mask_at, *written)


def _forced_at(forced_ids: Any, num_rows: int, layer: Layer) -> tuple[int, int, int]:
    """Check forced_ids; return its address, its row stride, and whether it holds int64."""
    check_tensor("forced_ids", forced_ids, _INT32, _INT64, rank=2, device=layer.device)
    if forced_ids.shape != (num_rows, layer.top_k):
        allowed = f"shape [{num_rows}, {layer.top_k}] (N, top_k)"
        raise wrong("forced_ids", allowed, shape_of(forced_ids))
    _check_output("forced_ids", forced_ids, num_rows, layer.top_k, "top_k")
    return forced_ids.data_ptr(), forced_ids.stride(0), int(forced_ids.dtype is _INT64)


def _spans_of_vectors(
    num_rows: int,
    image_mask: int,
    padding_mask: int,
    num_valid_tokens: int,
    input_ids: int,
    input_ids_are_int64: int,
) -> list[_Span]:
    """Return the memory of the options that are one row; an address of 0 is none."""
    vectors = (
        ("image_mask", image_mask, num_rows, 1),
        ("padding_mask", padding_mask, num_rows, 1),
        ("num_tokens", num_valid_tokens, 1, 4),
        ("input_ids", input_ids, num_rows, 4 << input_ids_are_int64),
    )
    return [_span(name, at, 1, 0, length, size) for name, at, length, size in vectors if at]


def _vector_at(
    name: str, vector: Any, dtype: torch.dtype, layer: Layer, call: Call, size: int
) -> int:
    """Check a vector [N] of elements of `size` bytes apart from the outputs; return its address."""
    num_rows = call[0]
    if (
        type(vector) is not _TENSOR
        or vector.dtype is not dtype
        or vector.device != layer.device
        or vector.layout is not _STRIDED
        or vector.shape != (num_rows,)
        or vector.stride() != (1,)
    ):
        # Some rule is broken, or the vector is a subclass of Tensor: check rule by rule.
        dtypes = (_INT32, _INT64) if name == "input_ids" else (dtype,)
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
    num_rows, _, _, w_at, w_stride, i_at, i_stride, weights_are_bfloat16, ids_are_int64 = call
    if not num_rows:
        return
    high = low + size
    weights_bytes = 2 if weights_are_bfloat16 else 4
    if w_at < high and low < w_at + ((num_rows - 1) * w_stride + layer.columns) * weights_bytes:
        raise wrong(name, "memory apart from out_weights", "an overlap")
    ids_end = i_at + ((num_rows - 1) * i_stride + layer.columns) * (8 if ids_are_int64 else 4)
    if i_at < high and low < ids_end:
        raise wrong(name, "memory apart from out_ids", "an overlap")
