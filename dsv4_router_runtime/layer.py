"""The arguments that a layer binds once, checked before any kernel is loaded.

The checks here read no element of a tensor: see `tables` for the values that are bound, and
`checks` for the form of an error.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, TypedDict

import torch

from .artifacts.limits import (
    K_MULTIPLE,
    MAP_ALIGNMENT_BYTES,
    MAX_EXPERTS,
    MAX_SHARED_SLOTS,
    MAX_TOP_K,
)
from .checks import (
    FP32_LEAST_NORMAL,
    FP32_MAX,
    check_bool,
    check_float,
    check_int,
    check_tensor,
    check_vector,
    shape_of,
    strides_of,
    wrong,
)

BF16_BYTES = 2
# router_decode multiplies by the reciprocal, which rcp.approx.ftz flushes to 0 beyond.
MAX_GATE_TEMP = 2.0**126
MAX_MAP_BYTES = 8 * 2**30


class LayerOptions(TypedDict, total=False):
    """Keywords of `Router` beyond the plain gate. Each one left out is off."""

    bias_vl: torch.Tensor | None
    gate_temp: float
    tid2eid: torch.Tensor | None
    to_physical: torch.Tensor | None
    logical_count: torch.Tensor | None
    num_shared_slots: int
    shared_weight: float
    norm_topk_prob: bool
    first_image_id: int
    num_image_ids: int


OPTIONS_OFF = LayerOptions(
    bias_vl=None,
    gate_temp=1.0,
    tid2eid=None,
    to_physical=None,
    logical_count=None,
    num_shared_slots=0,
    shared_weight=1.0,
    norm_topk_prob=True,
    first_image_id=0,
    num_image_ids=0,
)


@dataclass(frozen=True, kw_only=True)
class Layer:
    """The properties of one layer's weights and options that its calls are checked against.

    layout: kmajor or emajor. tma_loadable: W_gate's row stride is a multiple of 16 bytes, as TMA
    requires. columns: columns of an output, top_k and the shared slots. hashed: the ids come from a
    table by token id. has_image_ids: some token ids make a row an image row.
    """

    k: int
    num_experts: int
    top_k: int
    scale: float
    layout: str
    device: torch.device
    tma_loadable: bool
    columns: int
    hashed: bool
    has_bias_vl: bool
    has_image_ids: bool
    needs_input_ids: bool


def complete_options(given: LayerOptions) -> LayerOptions:
    """Add the value "off" of every option that is not given; TypeError for an unknown name."""
    for name in given:
        if name not in OPTIONS_OFF:
            allowed = ", ".join(OPTIONS_OFF)
            raise TypeError(f"unexpected keyword argument {name!r} (options: {allowed})")
    return OPTIONS_OFF | given


def options_on(options: LayerOptions) -> str:
    """List the options that are on: tensors by name, numbers with their values."""
    pairs = ((name, options.get(name, off), off) for name, off in OPTIONS_OFF.items())
    return ", ".join(
        name if off is None else f"{name}={value}"
        for name, value, off in pairs
        if value is not off and (off is None or value != off)
    )


def check_layer(
    W_gate: Any,
    e_bias: Any,
    *,
    top_k: Any,
    routed_scaling_factor: Any,
    options: LayerOptions = OPTIONS_OFF,
) -> Layer:
    """Check the tensors and numbers of a layer.

    W_gate [K, E] BF16, e_bias [E] FP32, top_k, the scale, options.

    A layer with a hash table has no e_bias.
    """
    check_tensor("W_gate", W_gate, torch.bfloat16, rank=2)
    k, num_experts = W_gate.shape
    if k == 0 or k % K_MULTIPLE:
        what = f"K (shape[0]) in multiples of {K_MULTIPLE}"
        raise wrong("W_gate", what, shape_of(W_gate) + _transposed(k, num_experts))
    if not 1 <= num_experts <= MAX_EXPERTS:
        what = f"1..{MAX_EXPERTS} experts (shape[1])"
        raise wrong("W_gate", what, shape_of(W_gate) + _transposed(k, num_experts))
    layout = layout_of(W_gate)
    hashed = options["tid2eid"] is not None
    tma_loadable = _check_rows_of_weights(W_gate, layout)
    if hashed:
        _check_row_reads(W_gate, e_bias, layout)
    else:
        _check_bias(e_bias, num_experts, W_gate.device)
    check_int("top_k", top_k, 1, MAX_TOP_K)
    if top_k > num_experts:
        raise wrong("top_k", f"at most the {num_experts} experts of W_gate", str(top_k))
    scale = check_float("routed_scaling_factor", routed_scaling_factor, -FP32_MAX, FP32_MAX)
    _check_options(options, num_experts=num_experts, top_k=top_k, device=W_gate.device)
    return Layer(
        k=k,
        num_experts=num_experts,
        top_k=top_k,
        scale=scale,
        layout=layout,
        device=W_gate.device,
        tma_loadable=tma_loadable,
        columns=top_k + options["num_shared_slots"],
        hashed=hashed,
        has_bias_vl=options["bias_vl"] is not None,
        has_image_ids=options["num_image_ids"] > 0,
        needs_input_ids=hashed or options["num_image_ids"] > 0,
    )


def _transposed(rows: int, columns: int) -> str:
    """Return a hint if W_gate has the shape of its transpose."""
    if 1 <= rows <= MAX_EXPERTS and columns and columns % K_MULTIPLE == 0:
        return (
            ": an nn.Linear's weight is [E, K] and W_gate [K, E], so pass weight.t(), which copies "
            "nothing"
        )
    return ""


def layout_of(W_gate: torch.Tensor) -> str:
    """Read kmajor or emajor off the strides of W_gate [K, E]; ValueError if it is neither.

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


def _check_rows_of_weights(W_gate: torch.Tensor, layout: str) -> bool:
    """Check W_gate's alignment; return whether TMA can step by its row stride."""
    if W_gate.data_ptr() % MAP_ALIGNMENT_BYTES:
        got = f"address {W_gate.data_ptr():#x}"
        raise wrong("W_gate", f"data aligned to {MAP_ALIGNMENT_BYTES} bytes", got)
    row_stride = W_gate.stride(1 if layout == "kmajor" else 0)
    rows = W_gate.shape[1 if layout == "kmajor" else 0]
    loadable = rows == 1 or row_stride * BF16_BYTES % MAP_ALIGNMENT_BYTES == 0
    if layout == "kmajor" and not loadable:
        raise wrong("W_gate", "a stride along E in multiples of 8 elements", strides_of(W_gate))
    return loadable


def _check_bias(e_bias: Any, num_experts: int, device: torch.device) -> None:
    if e_bias is None:
        raise TypeError(
            "e_bias: expected a torch.Tensor (got None); only a layer with tid2eid has no bias"
        )
    check_vector("e_bias", e_bias, torch.float32, length=num_experts, each="expert", device=device)


def _check_row_reads(W_gate: torch.Tensor, e_bias: Any, layout: str) -> None:
    """Check the rules of hash layers alone: no bias, and rows that an int32 can step by."""
    if e_bias is not None:
        raise wrong("e_bias", "None beside tid2eid, whose ids need no bias", "a bias")
    if layout == "kmajor" and W_gate.shape[1] > 1 and W_gate.stride(1) >= 2**31:
        raise wrong("W_gate", "a stride along E below 2**31 elements", strides_of(W_gate))


def _check_options(
    options: LayerOptions, *, num_experts: int, top_k: int, device: torch.device
) -> None:
    bias_vl, tid2eid = options["bias_vl"], options["tid2eid"]
    if bias_vl is not None:
        check_vector(
            "bias_vl", bias_vl, torch.float32, length=num_experts, each="expert", device=device
        )
    check_float("gate_temp", options["gate_temp"], FP32_LEAST_NORMAL, MAX_GATE_TEMP)
    if tid2eid is not None:
        _check_hash_table(tid2eid, top_k, device)
    _check_physical_map(options["to_physical"], options["logical_count"], num_experts, device)
    check_int("num_shared_slots", options["num_shared_slots"], 0, MAX_SHARED_SLOTS)
    check_float("shared_weight", options["shared_weight"], -FP32_MAX, FP32_MAX)
    check_bool("norm_topk_prob", options["norm_topk_prob"])
    _check_image_ids(options)


def _check_image_ids(options: LayerOptions) -> None:
    first = check_int("first_image_id", options["first_image_id"], -(2**31), 2**31 - 1)
    count = check_int("num_image_ids", options["num_image_ids"], 0, 2**31 - 1)
    if first + count > 2**31:
        allowed = "token ids that int32 holds, first_image_id + num_image_ids up to 2**31"
        raise wrong("num_image_ids", allowed, f"{first} + {count}")
    if count and options["bias_vl"] is None:
        allowed = "0 without bias_vl, which image rows select with; pass both or neither"
        raise wrong("num_image_ids", allowed, str(count))


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
    check_tensor("to_physical", to_physical, torch.int32, torch.int64, rank=2, device=device)
    rows, replicas = to_physical.shape
    # router_decode counts the 32-bit words of the whole map in an int32.
    if rows != num_experts or replicas == 0 or to_physical.nbytes >= MAX_MAP_BYTES:
        allowed = (
            f"shape [{num_experts}, max_replicas], at least 1 replica for each expert and below "
            f"{MAX_MAP_BYTES >> 30} GiB"
        )
        raise wrong("to_physical", allowed, shape_of(to_physical))
    if not to_physical.is_contiguous():
        raise wrong("to_physical", "a contiguous tensor, read in place", strides_of(to_physical))
    check_vector(
        "logical_count",
        logical_count,
        *(torch.int32, torch.int64),
        length=num_experts,
        each="expert",
        device=device,
    )
    if logical_count.dtype != to_physical.dtype:
        raise TypeError(
            f"logical_count: expected dtype {to_physical.dtype}, to_physical's (got "
            f"{logical_count.dtype}); convert one of them"
        )
