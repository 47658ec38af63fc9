"""Checks of what every layer binds and every call brings, before anything is launched.

See `options` for what may be left out, and `checks` for how errors read.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from .checks import (
    FP32_MAX,
    check_float,
    check_int,
    check_tensor,
    check_vector,
    shape_of,
    strides_of,
    wrong,
)
from .limits import K_MULTIPLE, MAX_EXPERTS, MAX_TOP_K
from .options import PLAIN_LAYER, LayerOptions, check_layer_options

ALIGNMENT_BYTES = 16
BF16_BYTES = 2


@dataclass(frozen=True, kw_only=True)
class LayerFacts:
    """What the weights of one layer settle for every call on them."""

    k: int
    num_experts: int
    top_k: int
    scale: float
    layout: str  # kmajor or emajor
    device: torch.device
    # W_gate's row stride is one that TMA can step by (a multiple of 16 bytes)
    loadable: bool
    # columns of an output: top_k and the shared slots
    columns: int
    # ids come from a table by token id
    hashed: bool
    has_bias_vl: bool


def check_layer(
    W_gate: Any,
    e_bias: Any,
    *,
    top_k: Any,
    routed_scaling_factor: Any,
    options: LayerOptions = PLAIN_LAYER,
) -> LayerFacts:
    """Check what a layer binds: W_gate [K, E] BF16, e_bias [E] FP32, top_k, the scale, options.

    A layer with a hash table has no e_bias. The values in tables are not looked at: see `tables`.
    """
    check_tensor("W_gate", W_gate, torch.bfloat16, rank=2)
    k, num_experts = W_gate.shape
    if k == 0 or k % K_MULTIPLE:
        what = f"K (shape[0]) in multiples of {K_MULTIPLE}"
        raise wrong("W_gate", what, shape_of(W_gate) + _turned(k, num_experts))
    if not 1 <= num_experts <= MAX_EXPERTS:
        what = f"1..{MAX_EXPERTS} experts (shape[1])"
        raise wrong("W_gate", what, shape_of(W_gate) + _turned(k, num_experts))
    layout = layout_of(W_gate)
    if W_gate.data_ptr() % ALIGNMENT_BYTES:
        got = f"address {W_gate.data_ptr():#x}"
        raise wrong("W_gate", f"data aligned to {ALIGNMENT_BYTES} bytes", got)
    row_stride = W_gate.stride(1 if layout == "kmajor" else 0)
    rows = num_experts if layout == "kmajor" else k
    loadable = rows == 1 or row_stride * BF16_BYTES % ALIGNMENT_BYTES == 0
    if layout == "kmajor" and not loadable:
        raise wrong("W_gate", "a stride along E in multiples of 8 elements", strides_of(W_gate))

    hashed = options.tid2eid is not None
    if hashed:
        _check_row_reads(W_gate, e_bias, layout)
    else:
        _check_bias(e_bias, num_experts, W_gate.device)
    check_int("top_k", top_k, 1, MAX_TOP_K)
    if top_k > num_experts:
        raise wrong("top_k", f"at most the {num_experts} experts of W_gate", str(top_k))
    scale = check_float("routed_scaling_factor", routed_scaling_factor, -FP32_MAX, FP32_MAX)
    check_layer_options(options, num_experts=num_experts, top_k=top_k, device=W_gate.device)

    return LayerFacts(
        k=k,
        num_experts=num_experts,
        top_k=top_k,
        scale=scale,
        layout=layout,
        device=W_gate.device,
        loadable=loadable,
        columns=top_k + options.num_shared_slots,
        hashed=hashed,
        has_bias_vl=options.bias_vl is not None,
    )


def _turned(rows: int, columns: int) -> str:
    """Return a hint if W_gate would be right transposed, and nothing if it would not."""
    if 1 <= rows <= MAX_EXPERTS and columns and columns % K_MULTIPLE == 0:
        return (
            ": an nn.Linear's weight is [E, K] and W_gate [K, E], so pass weight.t(), which copies "
            "nothing"
        )
    return ""


def layout_of(W_gate: torch.Tensor) -> str:
    """kmajor or emajor, read off the strides of W_gate [K, E]; ValueError if it is neither.

    With E = 1 and unit stride along K both readings hold; kmajor is taken.
    """
    k, num_experts = W_gate.shape
    along_k, along_e = W_gate.stride()
    if along_k == 1 and (num_experts == 1 or along_e >= k):
        return "kmajor"
    if (along_e == 1 or num_experts == 1) and along_k >= num_experts:
        return "emajor"
    raise wrong(
        "W_gate",
        "unit stride along K (strides (1, >= K), a checkpoint's [E, K] weight transposed) or along "
        "E (strides (>= E, 1)), rows not overlapping",
        strides_of(W_gate),
    )


def _check_bias(e_bias: Any, num_experts: int, device: torch.device) -> None:
    if e_bias is None:
        raise TypeError(
            "e_bias: expected a torch.Tensor (got None); only a layer with tid2eid has no bias"
        )
    check_vector("e_bias", e_bias, torch.float32, length=num_experts, each="expert", device=device)


def _check_row_reads(W_gate: torch.Tensor, e_bias: Any, layout: str) -> None:
    """What a hash layer asks for besides: no bias, and rows that an int32 can step by."""
    if e_bias is not None:
        raise wrong("e_bias", "None beside tid2eid, whose ids need no bias", "a bias")
    if layout == "kmajor" and W_gate.shape[1] > 1 and W_gate.stride(1) >= 2**31:
        raise wrong("W_gate", "a stride along E below 2**31 elements", strides_of(W_gate))


# N, then address and row stride (in elements) of hidden_states, out_weights and out_ids, and
# whether out_ids is int64. A plain tuple: it is made on every call.
CallFacts = tuple[int, int, int, int, int, int, int, int]


def check_call(facts: LayerFacts, hidden_states: Any, out_weights: Any, out_ids: Any) -> CallFacts:
    """Check one call's tensors against the layer; returns what a launch needs of them.

    hidden_states [N, K] BF16; out_weights FP32 and out_ids int32 or int64, of at least
    [N, facts.columns].
    """
    call = _plainly_right(facts, hidden_states, out_weights, out_ids)
    if call is None:
        call = _check_call_slowly(facts, hidden_states, out_weights, out_ids)
    return call


def _plainly_right(facts: LayerFacts, x: Any, weights: Any, ids: Any) -> CallFacts | None:
    """The usual call in about 1.5 us, each fact read once; None sends it to the full check.

    What passes here passes there: see test_router_arguments. Rare but right calls (a subclass of
    Tensor, one row of an odd stride, outputs interleaved in one buffer) are left to it too.
    """
    tensor, device, columns = torch.Tensor, facts.device, facts.columns
    if (
        not (type(x) is tensor and type(weights) is tensor and type(ids) is tensor)
        or x.dtype is not torch.bfloat16
        or weights.dtype is not torch.float32
        or not (x.device == device and weights.device == device and ids.device == device)
        or x.layout is not torch.strided
    ):
        return None
    ids_dtype = ids.dtype
    if ids_dtype is torch.int32:
        ids_are_int64, ids_bytes = 0, 4
    elif ids_dtype is torch.int64:
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
        k != facts.k
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
        x_at % ALIGNMENT_BYTES
        or (w_at < i_end and i_at < w_end)
        or (w_at < x_end and x_at < w_end)
        or (i_at < x_end and x_at < i_end)
    ):
        return None
    return num_tokens, x_at, x_stride, w_at, w_stride, i_at, i_stride, ids_are_int64


def _check_call_slowly(
    facts: LayerFacts, hidden_states: Any, out_weights: Any, out_ids: Any
) -> CallFacts:
    """The rules themselves, in the order in which a caller wants to hear of them."""
    device = facts.device
    check_tensor("hidden_states", hidden_states, torch.bfloat16, rank=2, device=device)
    check_tensor("out_weights", out_weights, torch.float32, rank=2, device=device)
    check_tensor("out_ids", out_ids, torch.int32, torch.int64, rank=2, device=device)
    num_tokens, k = hidden_states.shape
    if k != facts.k:
        raise wrong("hidden_states", f"shape [N, {facts.k}], W_gate's K", shape_of(hidden_states))
    _check_output("out_weights", out_weights, num_tokens, facts)
    _check_output("out_ids", out_ids, num_tokens, facts)
    if num_tokens:
        _check_rows(hidden_states)
        _check_overlap(hidden_states, out_weights, out_ids, num_tokens, facts.columns)
    return (
        num_tokens,
        hidden_states.data_ptr(),
        hidden_states.stride(0),
        out_weights.data_ptr(),
        out_weights.stride(0),
        out_ids.data_ptr(),
        out_ids.stride(0),
        int(out_ids.dtype is torch.int64),
    )


def _check_rows(hidden_states: torch.Tensor) -> None:
    """Unit stride along K, and rows that TMA can step by, from an aligned start."""
    num_tokens, k = hidden_states.shape
    row_stride, along_k = hidden_states.stride()
    if along_k != 1:
        raise wrong("hidden_states", "unit stride along K", strides_of(hidden_states))
    if num_tokens > 1 and (row_stride < k or row_stride * BF16_BYTES % ALIGNMENT_BYTES):
        raise wrong(
            "hidden_states",
            f"a row stride of at least K and a multiple of {ALIGNMENT_BYTES // BF16_BYTES} "
            "elements (call .contiguous())",
            strides_of(hidden_states),
        )
    if hidden_states.data_ptr() % ALIGNMENT_BYTES:
        got = f"address {hidden_states.data_ptr():#x}"
        raise wrong("hidden_states", f"data aligned to {ALIGNMENT_BYTES} bytes", got)


def _check_output(name: str, out: torch.Tensor, num_tokens: int, facts: LayerFacts) -> None:
    rows, columns = out.shape
    needed = facts.columns
    what = "top_k" if needed == facts.top_k else "top_k + num_shared_slots"
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
    """No output may share an element with the other output or with hidden_states."""
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
    """First byte, one past the last byte that a call writes, and the row stride in bytes."""
    low, width = out.data_ptr(), columns * out.itemsize
    # One row is never stepped along; any stride that holds the row describes it.
    stride = out.stride(0) * out.itemsize if num_tokens > 1 else width
    return low, low + (num_tokens - 1) * stride + width, stride
