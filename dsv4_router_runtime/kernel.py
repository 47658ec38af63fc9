"""One artifact as the manifest lists it: what it accepts, how it is launched, what it is passed.

The values of the schema and their words; `manifest` reads and writes them, `limits` bounds them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

# Layouts of the operand that a kernel reads. kmajor: W_gate with unit stride along K. emajor: with
# unit stride along E. kmajor_rows: as kmajor, but only the chosen experts' rows are read. logits:
# FP32 logits [N, E], already multiplied out.
LAYOUTS = ("kmajor", "emajor", "kmajor_rows", "logits")
PARAMETER_KINDS = ("tensor_map", "pointer", "int32", "float32")
# (bytes, alignment in the parameter block) of each kind; a CUtensorMap is 128 bytes aligned to 64.
KIND_LAYOUT = {"tensor_map": (128, 64), "pointer": (8, 8), "int32": (4, 4), "float32": (4, 4)}
# Bytes of an element that a pointer points to.
POINTER_ELEMENT_BYTES = {
    "float32": 4,
    "int32": 4,
    "int64": 8,
    "uint32": 4,
    "uint8": 1,
    "bfloat16": 2,
}
# Bytes of an element that a tensor map reads.
TENSOR_ELEMENT_BYTES = {"bfloat16": 2}
# The dimensions of each tensor that a tensor map may be made for.
TENSOR_DIMS = {"W_gate": ("K", "E"), "hidden_states": ("N", "K", "K_in_block", "K_block")}
# Those that together are the tensor, once: another choice would leave a part of it out, or step
# along K by less than a tensor map can.
WHOLE_DIMS = {
    "W_gate": (("K", "E"),),
    "hidden_states": (("K", "N"), ("K_in_block", "N", "K_block")),
}
# Those that may come first: the ones that a call's checks find to have unit stride.
UNIT_STRIDE_DIMS = {"W_gate": ("K", "E"), "hidden_states": ("K", "K_in_block")}
# The bytes within which each swizzle permutes; a box's row must fit.
SWIZZLE_SPAN_BYTES = {"none": None, "32B": 32, "64B": 64, "128B": 128}
# The driver knows two more, with rules of their own that nothing here checks.
INTERLEAVES = ("none",)
L2_PROMOTIONS = ("none", "64B", "128B", "256B")
OOB_FILLS = ("zeros", "nan_request_zero_fma")
# What an axis of the grid may be, besides an int: see `Launch.grid`.
GRID_TERMS = ("k_splits", "expert_tiles", "token_tiles")
# Whose dtypes a problem may name, and which.
DTYPE_TENSORS = (
    "W_gate",
    "hidden_states",
    "logits",
    "e_bias",
    "bias_vl",
    "image_mask",
    "padding_mask",
    "num_valid_tokens",
    "tid2eid",
    "input_ids",
    "to_physical",
    "logical_count",
    "out_weights",
    "out_ids",
)
DTYPE_NAMES = ("bfloat16", "float32", "int32", "int64", "bool")

# What a call writes if it is not the call before's, in the order of `arguments.CallFacts`.
CALL_PARAMETERS = (
    "num_tokens",
    "out_weights",
    "out_weights_stride",
    "out_ids",
    "out_ids_stride",
    "ids_are_int64",
)
# What a call may bring, in the order of `options.CallOptions`. No kernel has all of them.
CALL_OPTION_PARAMETERS = (
    "image_mask",
    "padding_mask",
    "num_valid_tokens",
    "input_ids",
    "input_ids_are_int64",
)
# Everything else is written when a launch site is made.
_BOUND = (
    "num_experts",
    "top_k",
    "routed_scaling_factor",
    "gate_temp",
    "norm_topk_prob",
    "num_shared_slots",
    "to_physical",
    "logical_count",
    "max_replicas",
)
_EVERY_KERNEL = (*CALL_PARAMETERS, *_BOUND, "padding_mask", "num_valid_tokens")
_WITH_BIAS = ("e_bias", "bias_vl", "image_mask")
_WITH_TABLE = ("tid2eid", "vocab_size", "input_ids", "input_ids_are_int64")
# What a kernel of each layout has to take: without one of these, an option would do nothing.
PARAMETERS = {
    "kmajor": (*_EVERY_KERNEL, *_WITH_BIAS, *_WITH_TABLE, "num_k_blocks"),
    "emajor": (*_EVERY_KERNEL, *_WITH_BIAS, *_WITH_TABLE, "num_k_blocks"),
    "kmajor_rows": (*_EVERY_KERNEL, *_WITH_TABLE, "num_k_blocks", "w_gate", "w_stride"),
    "logits": (*_EVERY_KERNEL, *_WITH_BIAS, *_WITH_TABLE, "logits", "logits_stride"),
}
_ALL_PASSED = frozenset(name for names in PARAMETERS.values() for name in names)
_POINTERS = (
    *("out_weights", "out_ids", "to_physical", "logical_count", "padding_mask"),
    *("num_valid_tokens", "e_bias", "bias_vl", "image_mask", "tid2eid", "input_ids"),
    *("w_gate", "logits"),
)
_FLOATS = ("routed_scaling_factor", "gate_temp")
# The tensors that the kernels of a layout read through tensor maps.
MAPPED_TENSORS = {
    "kmajor": ("W_gate", "hidden_states"),
    "emajor": ("W_gate", "hidden_states"),
    "kmajor_rows": ("hidden_states",),
    "logits": (),
}


def parameter_kind(name: str) -> str:
    """Return the kind of a parameter that is passed by name."""
    if name in _POINTERS:
        return "pointer"
    return "float32" if name in _FLOATS else "int32"


@dataclass(frozen=True, kw_only=True)
class IntRange:
    """An inclusive range; `high` None means no upper end. JSON: [low, high]."""

    low: int
    high: int | None

    def __contains__(self, value: int) -> bool:
        return self.low <= value and (self.high is None or value <= self.high)

    def __str__(self) -> str:
        return f"{self.low}..{'' if self.high is None else self.high}"


@dataclass(frozen=True, kw_only=True)
class ProblemRange:
    """The problems a kernel accepts. `k_multiple` is 1 for kernels that read no K (logits)."""

    layout: str
    num_tokens: IntRange
    num_experts: IntRange
    top_k: IntRange
    k_multiple: int
    # tensor name -> those of torch's dtype names that it may have, e.g. {"out_ids": ("int32",)}
    dtypes: Mapping[str, tuple[str, ...]] = field(hash=False)


@dataclass(frozen=True, kw_only=True)
class Launch:
    """How the kernel is launched. The grid is counted in CTAs, as the driver counts it.

    Each of `grid`'s three axes is an int or one of
        k_splits      the field `k_splits`: CTAs that share one expert tile's K range
        expert_tiles  ceil(num_experts / expert_tile)
        token_tiles   ceil(num_tokens / token_tile)
    `pdl` says that the kernel waits with griddepcontrol, so that a programmatic dependent launch is
    legal; whether a call uses one is the caller's choice. `nonportable_cluster` asks for the
    function attribute that clusters of more than 8 CTAs need.
    """

    block: tuple[int, int, int]
    cluster: tuple[int, int, int]
    grid: tuple[int | str, int | str, int | str]
    k_splits: int
    expert_tile: int
    token_tile: int
    dynamic_shared_bytes: int
    pdl: bool
    nonportable_cluster: bool


@dataclass(frozen=True, kw_only=True)
class TensorMapRecipe:
    """How to encode one CUtensorMap. `dims` and `box` have the fastest dimension first.

    Element strides are 1. `dims` names the problem's sizes, so ("K", "E") with box (64, 64) is a
    map over W_gate with K contiguous, read in boxes of 64 K by 64 experts. "K_in_block" and
    "K_block" are K seen as blocks as wide as the box's first extent, which may be read together.
    """

    tensor: str
    element_type: str
    dims: tuple[str, ...]
    box: tuple[int, ...]
    swizzle: str
    interleave: str
    l2_promotion: str
    oob_fill: str


@dataclass(frozen=True, kw_only=True)
class Scratch:
    """Device memory that the runtime owns and hands to the kernel through a pointer parameter.

    `zeroed`: it is zero before the first launch, and every launch leaves it zero.
    """

    elements: int
    zeroed: bool


@dataclass(frozen=True, kw_only=True)
class Parameter:
    """One kernel parameter. `offset` counts bytes from the first parameter.

    `tensor_map` is there exactly for kind "tensor_map", `element_type` exactly for kind "pointer";
    `scratch` only for pointers to memory that the runtime owns.
    """

    name: str
    kind: str
    offset: int
    size: int
    element_type: str | None = None
    scratch: Scratch | None = None
    tensor_map: TensorMapRecipe | None = None


@dataclass(frozen=True, kw_only=True)
class Resources:
    """What the compiled kernel uses; dynamic shared memory is in `Launch`, stated once.

    `spill_bytes` is stores plus loads. `opcodes` counts the SASS instructions that matter, among
    them LDL and STL (local memory), which are 0 in every kernel that is shipped.
    """

    registers: int
    spill_bytes: int
    stack_bytes: int
    static_shared_bytes: int
    opcodes: Mapping[str, int] = field(hash=False)


@dataclass(frozen=True, kw_only=True)
class Kernel:
    """One artifact. (name, arch) is its identity, `file` lies beside the manifest."""

    name: str
    arch: str
    file: str
    symbol: str
    cubin_sha256: str
    ptx_sha256: str
    source_digest: str
    problem: ProblemRange
    launch: Launch
    parameters: tuple[Parameter, ...]
    resources: Resources

    @property
    def key(self) -> str:
        return f"{self.name}.{self.arch}"


def cubin_name(name: str, arch: str) -> str:
    """The file name of a kernel's cubin; the PTX beside it ends in `.ptx` instead."""
    return f"{name}.{arch}.cubin"


def compute_capability(arch: str) -> int:
    """10 * major + minor of an architecture's name: 90 for sm_90a, 103 for sm_103a."""
    return int(arch.removeprefix("sm_").rstrip("af"))


def wrong_parameter(layout: str, parameters: tuple[Parameter, ...]) -> tuple[str, str] | None:
    """Find a parameter that this runtime would not fill, or not as the kernel reads it.

    Returns the place (`parameters`, `parameters[3].name`) and the problem; None if all is right.
    """
    passed = PARAMETERS[layout]
    names = [parameter.name for parameter in parameters]
    for name in passed:
        if name not in names:
            return "parameters", f'none is named "{name}", which this runtime sets'
    for index, parameter in enumerate(parameters):
        name, kind = parameter.name, parameter.kind
        own = kind == "tensor_map" or parameter.scratch is not None
        if name in passed and (own or kind != parameter_kind(name)):
            problem = f'"{name}" is passed as a {parameter_kind(name)} of the call or the layer'
            return f"parameters[{index}]", problem
        # A name of another layout's: scratch under it would take that one's place.
        if name not in passed and (not own or name in _ALL_PASSED):
            return f"parameters[{index}].name", f'nothing to pass as "{name}"'
    return _wrong_maps(layout, parameters)


def _wrong_maps(layout: str, parameters: tuple[Parameter, ...]) -> tuple[str, str] | None:
    mapped = [item.tensor_map.tensor for item in parameters if item.tensor_map is not None]
    for tensor in TENSOR_DIMS:
        wanted = tensor in MAPPED_TENSORS[layout]
        # A second map of hidden_states would stay null: a call encodes one.
        most = 1 if tensor == "hidden_states" else len(mapped)
        if not wanted <= mapped.count(tensor) <= (most if wanted else 0):
            number = "one" if wanted else "no"
            return "parameters", f"layout {layout} takes {number} tensor map of {tensor}"
    return None
