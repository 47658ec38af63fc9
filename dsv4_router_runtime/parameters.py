"""Describe the launch parameters of every kernel: ABI order, types, origins and off values.

Each parameter is described once, in a group that kernels share. The kernel specs, the kernels'
`Arguments`, and the tables of the runtime and of the evidence are derived from this table. Pure.

Every option is a parameter: a pointer that may be null, or a number. So no option multiplies the
artifacts.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

# `LaunchParameter.given`: with a layer's weights, by a call, or by the runtime for one launch.
BOUND, BROUGHT, LAUNCH = "bound", "brought", "launch"

_BFLOAT16, _FLOAT32, _INT32, _MASK = ("bfloat16",), ("float32",), ("int32",), ("bool",)
_INTEGERS = ("int32", "int64")
_WEIGHTS = ("float32", "bfloat16")


@dataclass(frozen=True, kw_only=True)
class LaunchParameter:
    """One launch parameter. `kind` is one of the manifest's PARAMETER_KINDS.

    given        BOUND, BROUGHT or LAUNCH
    element_type the element type that a kernel reads through a pointer
    argument     the caller's keyword for it, if that differs from `name`
    tensor       the caller's tensor behind a pointer or a tensor map; None for scratch
    dtypes       torch dtypes that `tensor` may have
    shape        sizes of `tensor`, slowest first
    off          value that disables the option; None for a parameter that every launch sets
    after_wait   accessed only after griddepcontrol.wait: the kernel before may still use it
    other_dtype  the parameter that is 1 if `tensor` holds the second of `dtypes`
    """

    name: str
    kind: str
    given: str
    element_type: str | None = None
    argument: str | None = None
    tensor: str | None = None
    dtypes: tuple[str, ...] = ()
    shape: tuple[str, ...] = ()
    off: int | float | None = None
    after_wait: bool = False
    other_dtype: str | None = None

    @property
    def keyword(self) -> str:
        """The caller's keyword for it."""
        return self.argument or self.name

    @property
    def is_passed_by_name(self) -> bool:
        """Whether a layer or a call gives the value; a tensor map and scratch have addresses."""
        return self.kind != "tensor_map" and (self.kind != "pointer" or self.tensor is not None)


def _map(name: str, tensor: str, *shape: str, **more: Any) -> LaunchParameter:
    return LaunchParameter(
        name=name, kind="tensor_map", tensor=tensor, dtypes=_BFLOAT16, shape=shape, **more
    )


def _pointer(
    name: str, element_type: str, dtypes: tuple[str, ...], *shape: str, **more: Any
) -> LaunchParameter:
    more.setdefault("tensor", name)
    return LaunchParameter(
        name=name, kind="pointer", element_type=element_type, dtypes=dtypes, shape=shape, **more
    )


def _int32(name: str, given: str, off: int | None = None) -> LaunchParameter:
    return LaunchParameter(name=name, kind="int32", given=given, off=off)


def _float32(name: str, given: str, off: float | None = None) -> LaunchParameter:
    return LaunchParameter(name=name, kind="float32", given=given, off=off)


# An optional tensor of a call that the kernel before may write.
_PRODUCED: dict[str, Any] = {"given": BROUGHT, "off": 0, "after_wait": True}

W_MAP = _map("w_map", "W_gate", "K", "E", given=BOUND)
X_MAP = _map("x_map", "hidden_states", "N", "K", given=BROUGHT, after_wait=True)
W_GATE = _pointer("w_gate", "bfloat16", _BFLOAT16, "K", "E", given=BOUND, tensor="W_gate")
LOGITS = _pointer("logits", "float32", _FLOAT32, "N", "E", given=LAUNCH, after_wait=True)
# Scratch, zero between launches. The builder sets its size.
WORKSPACE = LaunchParameter(
    name="workspace", kind="pointer", given=LAUNCH, element_type="uint32", after_wait=True
)
# Tickets come first, one per token that a launch of some kernel of the role takes, then the
# candidates of each token, those of the last CTA's whole tile among them.
TICKETS = {"decode": 64, "prefill": 1920}
TICKET_BYTES, TILE_EXPERTS, CANDIDATE_BYTES = 4, 64, 8
BIASES = (
    # Null in a hash layer.
    _pointer("e_bias", "float32", _FLOAT32, "E", given=BOUND),
    _pointer("bias_vl", "float32", _FLOAT32, "E", given=BOUND, off=0),
    _pointer("image_mask", "uint8", _MASK, "N", **_PRODUCED),
)
PADDING = (
    _pointer("padding_mask", "uint8", _MASK, "N", **_PRODUCED),
    _pointer("num_valid_tokens", "int32", _INT32, "1", argument="num_tokens", **_PRODUCED),
)
TABLE = (
    _pointer("tid2eid", "int32", _INT32, "vocab_size", "top_k", given=BOUND, off=0),
    _pointer(
        *("input_ids", "int32", _INTEGERS, "N"),
        given=BROUGHT,
        off=0,
        other_dtype="input_ids_are_int64",
    ),
)
# Ids that the caller chose, for the rows of a mask: they are weighed, and not selected.
FORCED = (
    _pointer(
        *("forced_ids", "int32", _INTEGERS, "N", "top_k"),
        **_PRODUCED,
        other_dtype="forced_ids_are_int64",
    ),
    _pointer("forced_mask", "uint8", _MASK, "N", **_PRODUCED),
)
_MAP: dict[str, Any] = {"given": BOUND, "off": 0, "other_dtype": "map_is_int64"}
OUTPUTS = (
    _pointer("to_physical", "int32", _INTEGERS, "E", "max_replicas", **_MAP),
    _pointer("logical_count", "int32", _INTEGERS, "E", **_MAP),
    _pointer(
        *("out_weights", "float32", _WEIGHTS, "N", "columns"),
        given=BROUGHT,
        after_wait=True,
        other_dtype="weights_are_bfloat16",
    ),
    _pointer(
        *("out_ids", "int32", _INTEGERS, "N", "columns"),
        given=BROUGHT,
        after_wait=True,
        other_dtype="ids_are_int64",
    ),
    _pointer("out_logical_ids", "int32", _INT32, "N", "top_k", **_PRODUCED),
)
# The whole gate's logits. A kernel that reads logits has them from the caller's own tensor.
OUT_LOGITS = _pointer("out_logits", "float32", _FLOAT32, "N", "E", **_PRODUCED)
NUM_TOKENS = _int32("num_tokens", BROUGHT)
# The first token of a launch that routes a part of a call's tokens, a multiple of its token tile.
FIRST_TOKEN = _int32("first_token", LAUNCH, off=0)
NUM_EXPERTS = _int32("num_experts", BOUND)
NUM_K_BLOCKS = _int32("num_k_blocks", BOUND)
TOP_K = _int32("top_k", BOUND)
# Elements between two experts' rows of W_gate.
W_STRIDE = _int32("w_stride", BOUND)
LOGITS_STRIDE = _int32("logits_stride", LAUNCH)
WEIGHING = (
    _float32("routed_scaling_factor", BOUND),
    _float32("gate_temp", BOUND, off=1.0),
    _int32("norm_topk_prob", BOUND, off=1),
    # The weight of a shared expert.
    _float32("shared_weight", BOUND, off=1.0),
)
# Extents and element widths of the tensors above.
FORMATS = (
    _int32("vocab_size", BOUND, off=0),
    _int32("input_ids_are_int64", BROUGHT, off=0),
    _int32("max_replicas", BOUND, off=0),
    _int32("map_is_int64", BOUND, off=0),
    _int32("num_shared_slots", BOUND, off=0),
    _int32("weights_are_bfloat16", BROUGHT, off=0),
    _int32("ids_are_int64", BROUGHT, off=0),
    _int32("forced_ids_are_int64", BROUGHT, off=0),
)
# Token ids from first_image_id on, num_image_ids of them, make a row an image row.
IMAGE_IDS = (_int32("first_image_id", BOUND, off=0), _int32("num_image_ids", BOUND, off=0))
STRIDES = (
    _int32("out_weights_stride", BROUGHT),
    _int32("out_ids_stride", BROUGHT),
    _int32("out_logical_ids_stride", BROUGHT, off=0),
    _int32("forced_ids_stride", BROUGHT, off=0),
)
OUT_LOGITS_STRIDE = _int32("out_logits_stride", BROUGHT, off=0)

_GATE = (
    *(W_MAP, X_MAP, WORKSPACE),
    *(*BIASES, *PADDING, *TABLE, *FORCED, *OUTPUTS, OUT_LOGITS),
    *(NUM_TOKENS, NUM_EXPERTS, NUM_K_BLOCKS, TOP_K),
    *(*WEIGHING, *FORMATS, *IMAGE_IDS, *STRIDES, OUT_LOGITS_STRIDE),
)
# Role of a kernel -> its parameters in ABI order.
ABI: Mapping[str, tuple[LaunchParameter, ...]] = {
    "decode": _GATE,
    "prefill": (*_GATE, FIRST_TOKEN),
    "hash": (
        *(X_MAP, W_GATE),
        *(*PADDING, *TABLE, *FORCED, *OUTPUTS),
        *(NUM_TOKENS, NUM_EXPERTS, NUM_K_BLOCKS, TOP_K, W_STRIDE),
        *(*WEIGHING, *FORMATS, *STRIDES),
    ),
    "select": (
        LOGITS,
        *(*BIASES, *PADDING, *TABLE, *FORCED, *OUTPUTS),
        *(NUM_TOKENS, NUM_EXPERTS, TOP_K),
        *(*WEIGHING, *FORMATS, *IMAGE_IDS, LOGITS_STRIDE, *STRIDES),
    ),
}


def workspace_bytes(role: str, num_tokens: int, num_experts: int, *, expert_tile: int) -> int:
    """Return the bytes of WORKSPACE that a launch accesses: none if a tile of 64 experts is all.

    expert_tile: the experts of a CTA.
    """
    experts = -(-num_experts // expert_tile) * expert_tile
    candidates = num_tokens * experts * CANDIDATE_BYTES
    return TICKET_BYTES * TICKETS[role] + candidates if experts > TILE_EXPERTS else 0


def tensor_dtypes(role: str) -> dict[str, tuple[str, ...]]:
    """Return the torch dtypes that each of a kernel's tensors may have, by tensor."""
    return {item.tensor: item.dtypes for item in ABI[role] if item.tensor is not None}


_ALL = tuple(dict.fromkeys(item for abi in ABI.values() for item in abi))
# The description of every tensor that a layer binds or a call brings.
TENSORS = {item.tensor: item for item in _ALL if item.tensor is not None}
# The torch dtypes of these tensors: a kernel takes them all.
DTYPES = {name: item.dtypes for name, item in TENSORS.items()}
# Every parameter that the runtime passes by name. Tensor maps and scratch are passed by address.
NAMES_PASSED = frozenset(item.name for item in _ALL if item.is_passed_by_name)
# The parameters of the options, and their values if every option is off.
OPTIONS = tuple(item for item in _ALL if item.off is not None)
# The tensor and the axis that a size of an option's tensor is of, such as vocab_size.
SIZES = {
    size: (item.tensor, axis)
    for item in OPTIONS
    if item.tensor is not None
    for axis, size in enumerate(item.shape)
}
# The table whose dtype a flag of a layer is about.
INT64_TABLES = {
    item.other_dtype: item.tensor
    for item in OPTIONS
    if item.given == BOUND and item.other_dtype is not None and item.tensor is not None
}
PARAMETERS_OFF = {item.name: item.off for item in OPTIONS if item.off is not None}
