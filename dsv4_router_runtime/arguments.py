"""Checks of a call's arguments, before anything is launched.

TypeError for a wrong kind of object or dtype, ValueError for the rest; each message names the
argument, what was expected and what was got.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from .manifest import K_MULTIPLE, MAX_EXPERTS, MAX_TOP_K

ALIGNMENT_BYTES = 16
BF16_BYTES = 2
FP32_MAX = torch.finfo(torch.float32).max


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


def check_layer(W_gate: Any, e_bias: Any, *, top_k: Any, routed_scaling_factor: Any) -> LayerFacts:
    """Check what a layer binds: W_gate [K, E] BF16, e_bias [E] FP32, top_k and the scale."""
    _check_tensor("W_gate", W_gate, torch.bfloat16, rank=2)
    k, num_experts = W_gate.shape
    if k == 0 or k % K_MULTIPLE:
        raise _wrong("W_gate", f"K (shape[0]) in multiples of {K_MULTIPLE}", _shape(W_gate))
    if not 1 <= num_experts <= MAX_EXPERTS:
        raise _wrong("W_gate", f"1..{MAX_EXPERTS} experts (shape[1])", _shape(W_gate))
    layout = layout_of(W_gate)
    if W_gate.data_ptr() % ALIGNMENT_BYTES:
        got = f"address {W_gate.data_ptr():#x}"
        raise _wrong("W_gate", f"data aligned to {ALIGNMENT_BYTES} bytes", got)
    row_stride = W_gate.stride(1 if layout == "kmajor" else 0)
    rows = num_experts if layout == "kmajor" else k
    loadable = rows == 1 or row_stride * BF16_BYTES % ALIGNMENT_BYTES == 0
    if layout == "kmajor" and not loadable:
        raise _wrong("W_gate", "a stride along E in multiples of 8 elements", _strides(W_gate))

    _check_tensor("e_bias", e_bias, torch.float32, rank=1, device=W_gate.device)
    if e_bias.shape[0] != num_experts:
        raise _wrong("e_bias", f"shape [{num_experts}], one for each expert", _shape(e_bias))
    if e_bias.stride(0) != 1 and num_experts > 1:
        raise _wrong("e_bias", "unit stride (call .contiguous())", _strides(e_bias))

    return LayerFacts(
        k=k,
        num_experts=num_experts,
        top_k=_check_top_k(top_k, num_experts),
        scale=_check_scale(routed_scaling_factor),
        layout=layout,
        device=W_gate.device,
        loadable=loadable,
    )


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
    raise _wrong(
        "W_gate",
        "unit stride along K (strides (1, >= K), a checkpoint's [E, K] weight transposed) or along "
        "E (strides (>= E, 1)), rows not overlapping",
        _strides(W_gate),
    )


def _check_top_k(top_k: Any, num_experts: int) -> int:
    if not isinstance(top_k, int) or isinstance(top_k, bool):
        raise TypeError(f"top_k: expected an int (got {type(top_k).__name__})")
    if not 1 <= top_k <= MAX_TOP_K:
        raise _wrong("top_k", f"1..{MAX_TOP_K}", _number(top_k))
    if top_k > num_experts:
        raise _wrong("top_k", f"at most the {num_experts} experts of W_gate", str(top_k))
    return top_k


def _check_scale(scale: Any) -> float:
    if not isinstance(scale, int | float) or isinstance(scale, bool):
        raise TypeError(
            f"routed_scaling_factor: expected a float (got {type(scale).__name__}); a tensor would "
            "have to be read by the host, so pass its .item()"
        )
    # An int is compared as it is: Python's float() overflows above 1.8e308. NaN fails both sides.
    if not -FP32_MAX <= scale <= FP32_MAX:
        allowed = f"a finite number in FP32's range, -{FP32_MAX:.9g}..{FP32_MAX:.9g}"
        raise _wrong("routed_scaling_factor", allowed, _number(scale))
    return float(scale)


# N, then address and row stride (in elements) of hidden_states, out_weights and out_ids. A plain
# tuple: it is made on every call.
CallFacts = tuple[int, int, int, int, int, int, int]


def check_call(facts: LayerFacts, hidden_states: Any, out_weights: Any, out_ids: Any) -> CallFacts:
    """Check one call's tensors against the layer; returns what a launch needs of them.

    hidden_states [N, K] BF16; out_weights FP32 and out_ids int32, at least [N, top_k].
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
    tensor, device, top_k = torch.Tensor, facts.device, facts.top_k
    if (
        not (type(x) is tensor and type(weights) is tensor and type(ids) is tensor)
        or x.dtype is not torch.bfloat16
        or weights.dtype is not torch.float32
        or ids.dtype is not torch.int32
        or not (x.ndim == weights.ndim == ids.ndim == 2)
        or not (x.device == device and weights.device == device and ids.device == device)
        or x.layout is not torch.strided
    ):
        return None
    num_tokens, k = x.shape
    x_stride, x_unit = x.stride()
    if k != facts.k or x_unit != 1 or x_stride < k or x_stride % 8:
        return None
    w_rows, w_columns = weights.shape
    i_rows, i_columns = ids.shape
    w_stride, w_unit = weights.stride()
    i_stride, i_unit = ids.stride()
    if (
        w_rows < num_tokens
        or i_rows < num_tokens
        or w_columns < top_k
        or i_columns < top_k
        or not (w_unit == i_unit == 1)
        or not (top_k <= w_stride < 2**31 and top_k <= i_stride < 2**31)
    ):
        return None
    x_at, w_at, i_at = x.data_ptr(), weights.data_ptr(), ids.data_ptr()
    x_end = x_at + num_tokens * x_stride * 2
    w_end = w_at + num_tokens * w_stride * 4
    i_end = i_at + num_tokens * i_stride * 4
    if (
        x_at % ALIGNMENT_BYTES
        or (w_at < i_end and i_at < w_end)
        or (w_at < x_end and x_at < w_end)
        or (i_at < x_end and x_at < i_end)
    ):
        return None
    return num_tokens, x_at, x_stride, w_at, w_stride, i_at, i_stride


def _check_call_slowly(
    facts: LayerFacts, hidden_states: Any, out_weights: Any, out_ids: Any
) -> CallFacts:
    """The rules themselves, in the order in which a caller wants to hear of them."""
    device = facts.device
    _check_tensor("hidden_states", hidden_states, torch.bfloat16, rank=2, device=device)
    _check_tensor("out_weights", out_weights, torch.float32, rank=2, device=device)
    _check_tensor("out_ids", out_ids, torch.int32, rank=2, device=device)
    num_tokens, k = hidden_states.shape
    if k != facts.k:
        raise _wrong("hidden_states", f"shape [N, {facts.k}], W_gate's K", _shape(hidden_states))
    _check_output("out_weights", out_weights, num_tokens, facts.top_k)
    _check_output("out_ids", out_ids, num_tokens, facts.top_k)
    if num_tokens:
        _check_rows(hidden_states)
        _check_overlap(hidden_states, out_weights, out_ids, num_tokens, facts.top_k)
    return (
        num_tokens,
        hidden_states.data_ptr(),
        hidden_states.stride(0),
        out_weights.data_ptr(),
        out_weights.stride(0),
        out_ids.data_ptr(),
        out_ids.stride(0),
    )


def _check_tensor(name: str, tensor: Any, dtype: Any, *, rank: int, device: Any = None) -> None:
    if not isinstance(tensor, torch.Tensor):
        raise TypeError(f"{name}: expected a torch.Tensor (got {type(tensor).__name__})")
    if tensor.dtype is not dtype:
        raise TypeError(f"{name}: expected dtype {dtype} (got {tensor.dtype})")
    if tensor.dim() != rank:
        raise _wrong(name, f"{rank} dimension{'s' if rank > 1 else ''}", _shape(tensor))
    if tensor.layout is not torch.strided:
        raise _wrong(name, "a dense tensor", f"layout {tensor.layout}")
    if device is not None and tensor.device != device:
        raise _wrong(name, f"device {device}, where W_gate is", f"device {tensor.device}")


def _check_rows(hidden_states: torch.Tensor) -> None:
    """Unit stride along K, and rows that TMA can step by, from an aligned start."""
    num_tokens, k = hidden_states.shape
    row_stride, along_k = hidden_states.stride()
    if along_k != 1:
        raise _wrong("hidden_states", "unit stride along K", _strides(hidden_states))
    if num_tokens > 1 and (row_stride < k or row_stride * BF16_BYTES % ALIGNMENT_BYTES):
        raise _wrong(
            "hidden_states",
            f"a row stride of at least K and a multiple of {ALIGNMENT_BYTES // BF16_BYTES} "
            "elements (call .contiguous())",
            _strides(hidden_states),
        )
    if hidden_states.data_ptr() % ALIGNMENT_BYTES:
        got = f"address {hidden_states.data_ptr():#x}"
        raise _wrong("hidden_states", f"data aligned to {ALIGNMENT_BYTES} bytes", got)


def _check_output(name: str, out: torch.Tensor, num_tokens: int, top_k: int) -> None:
    rows, columns = out.shape
    if rows < num_tokens or columns < top_k:
        raise _wrong(name, f"at least [{num_tokens}, {top_k}] (N, top_k)", _shape(out))
    row_stride, along_k = out.stride()
    if columns > 1 and along_k != 1:
        raise _wrong(name, "unit stride along the last dimension", _strides(out))
    if num_tokens > 1 and not top_k <= row_stride < 2**31:
        raise _wrong(name, f"a row stride of at least top_k ({top_k})", _strides(out))


def _check_overlap(
    hidden_states: torch.Tensor,
    out_weights: torch.Tensor,
    out_ids: torch.Tensor,
    num_tokens: int,
    top_k: int,
) -> None:
    """No output may share an element with the other output or with hidden_states."""
    row_stride = hidden_states.stride(0)
    x_low = hidden_states.data_ptr()
    x_high = x_low + ((num_tokens - 1) * row_stride + hidden_states.shape[1]) * BF16_BYTES
    w_low, w_high, w_stride = _extent(out_weights, num_tokens, top_k)
    i_low, i_high, i_stride = _extent(out_ids, num_tokens, top_k)
    if w_low < x_high and x_low < w_high:
        raise _wrong("out_weights", "memory apart from hidden_states", "an overlap")
    if i_low < x_high and x_low < i_high:
        raise _wrong("out_ids", "memory apart from hidden_states", "an overlap")
    if w_low < i_high and i_low < w_high:
        # Columns of one buffer interleave without meeting: same row stride, disjoint columns.
        apart = (i_low - w_low) % w_stride
        width = top_k * 4
        if w_stride != i_stride or apart < width or w_stride - apart < width:
            raise _wrong("out_ids", "memory apart from out_weights", "an overlap")


def _extent(out: torch.Tensor, num_tokens: int, top_k: int) -> tuple[int, int, int]:
    """First byte, one past the last byte that a call writes, and the row stride in bytes."""
    low = out.data_ptr()
    # One row is never stepped along; any stride that holds the row describes it.
    stride = out.stride(0) * 4 if num_tokens > 1 else top_k * 4
    return low, low + (num_tokens - 1) * stride + top_k * 4, stride


def _wrong(argument: str, expected: str, got: str) -> ValueError:
    return ValueError(f"{argument}: expected {expected} (got {got})")


def _number(value: int | float) -> str:
    # Python refuses to print an int of more than 4300 digits, and nobody would read it.
    if isinstance(value, int) and value.bit_length() > 128:
        return f"an int of {value.bit_length()} bits"
    return str(value)


def _shape(tensor: torch.Tensor) -> str:
    return f"shape {list(tensor.shape)}"


def _strides(tensor: torch.Tensor) -> str:
    return f"shape {list(tensor.shape)} with strides {tensor.stride()}"
