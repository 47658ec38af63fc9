"""One artifact in the manifest: the problems that it accepts, its launch, its parameters.

The values of the schema and their words; `manifest` reads and writes them, `limits` bounds them.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

from dsv4_router_runtime.parameters import ABI, NAMES_PASSED, workspace_bytes

# The step of a layer that a kernel takes: see `dispatch.plan_layer`. decode: the whole gate for few
# tokens. prefill: the same for more. hash: a hash layer's gate, which reads the rows of the chosen
# experts only. select: from FP32 logits [N, E], already multiplied out.
ROLES = tuple(ABI)
# W_gate with unit stride along K, or along E.
LAYOUTS = ("kmajor", "emajor")
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
# Values of an axis of the grid, besides an int: see `Launch.grid`.
GRID_TERMS = ("k_splits", "expert_tiles", "token_tiles")


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
    """The problems a kernel accepts.

    layout: W_gate's; None for a kernel that reads logits, whose `k_multiple` is 1. same_bits_only:
    a matrix product and router_topk are faster, so that only a layer that asks for the same bits at
    every N takes it; None for every other kernel.
    """

    layout: str | None
    num_tokens: IntRange
    num_experts: IntRange
    top_k: IntRange
    k_multiple: int
    # tensor name -> those of torch's dtype names that it may have, e.g. {"out_ids": ("int32",)}
    dtypes: Mapping[str, tuple[str, ...]] = field(hash=False)
    same_bits_only: bool | None = None


@dataclass(frozen=True, kw_only=True)
class Launch:
    """How the kernel is launched. The grid is counted in CTAs, as the driver counts it.

    Each of `grid`'s three axes is an int or one of
        k_splits      the field `k_splits`: CTAs that share one expert tile's K range
        expert_tiles  ceil(num_experts / expert_tile)
        token_tiles   ceil(num_tokens / token_tile)
    `pdl`: the kernel waits with griddepcontrol, so that a programmatic dependent launch is legal;
    whether a call uses one is the caller's choice. `nonportable_cluster`: it needs the function
    attribute that clusters of more than 8 CTAs need. `max_clusters`: the kernel is not made for a
    launch of more clusters; None is no bound. `wait_limit_ms`: a warp that has waited this long for
    another CTA's word in global memory traps; 0 for a kernel that never waits so.
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
    wait_limit_ms: int
    max_clusters: int | None = None


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
    """Resources of the compiled kernel; dynamic shared memory is in `Launch`, stated once.

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
    role: str
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

    def most_tokens(self, num_experts: int) -> int | None:
        """Return the most tokens that the kernel takes for num_experts; None is no end."""
        high, launch = self.problem.num_tokens.high, self.launch
        if launch.max_clusters is None:
            return high
        expert_tiles = -(-num_experts // launch.expert_tile)
        tokens = launch.max_clusters // expert_tiles * launch.token_tile
        return tokens if high is None else min(high, tokens)

    def workspace_bytes(self, num_tokens: int, num_experts: int) -> int:
        """Return the bytes of its workspace that a launch accesses."""
        return workspace_bytes(
            self.role, num_tokens, num_experts, expert_tile=self.launch.expert_tile
        )


def launch_sha256(kernel: Kernel) -> str:
    """Hash all that a manifest entry says about a launch: problem, launch and parameters."""
    said = [kernel.problem, kernel.launch, kernel.parameters]
    # dataclasses.asdict copies every value first: 4 times this.
    return hashlib.sha256(json.dumps(said, sort_keys=True, default=_members).encode()).hexdigest()


def _members(value: object) -> dict[str, Any]:
    """Return the members of a mapping or the fields of one of the classes above."""
    return dict(value) if isinstance(value, Mapping) else vars(value)


def cubin_name(name: str, arch: str) -> str:
    """The file name of a kernel's cubin; the PTX beside it ends in `.ptx` instead."""
    return f"{name}.{arch}.cubin"


# The name of an architecture, as `compute_capability` reads it.
ARCHITECTURE = r"sm_[1-9][0-9]{1,2}[af]?"


@lru_cache
def compute_capability(arch: str) -> int:
    """Return 10 * major + minor of an architecture: 90 for sm_90a, 103 for sm_103a."""
    return int(arch.removeprefix("sm_").rstrip("af"))


def wrong_parameter(role: str, parameters: tuple[Parameter, ...]) -> tuple[str, str] | None:
    """Find a parameter that this runtime would not fill, or not as the kernel reads it.

    Returns the place (`parameters`, `parameters[3].name`) and the problem; None if all are right.
    """
    passed = {item.name: item.kind for item in ABI[role] if item.is_passed_by_name}
    names = [parameter.name for parameter in parameters]
    for name in passed:
        if name not in names:
            return "parameters", f'none is named "{name}", which this runtime sets'
    for index, parameter in enumerate(parameters):
        name, kind = parameter.name, parameter.kind
        own = kind == "tensor_map" or parameter.scratch is not None
        if name in passed and (own or kind != passed[name]):
            problem = f'"{name}" is passed as a {passed[name]} of the call or the layer'
            return f"parameters[{index}]", problem
        # A name of another role's: scratch under it would take that one's place.
        if name not in passed and (not own or name in NAMES_PASSED):
            return f"parameters[{index}].name", f'nothing to pass as "{name}"'
    return _wrong_maps(role, parameters)


def _wrong_maps(role: str, parameters: tuple[Parameter, ...]) -> tuple[str, str] | None:
    mapped = [item.tensor_map.tensor for item in parameters if item.tensor_map is not None]
    for tensor in TENSOR_DIMS:
        wanted = any(item.tensor == tensor and item.kind == "tensor_map" for item in ABI[role])
        # A second map of hidden_states would stay null: a call encodes one.
        most = 1 if tensor == "hidden_states" else len(mapped)
        if not wanted <= mapped.count(tensor) <= (most if wanted else 0):
            number = "one" if wanted else "no"
            return "parameters", f"role {role} takes {number} tensor map of {tensor}"
    return None
