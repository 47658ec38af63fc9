"""The schema of `artifacts/manifest.json`: what the builder writes and the runtime reads.

This is the only statement of the format. The builder imports it to write, the runtime to read; it
uses nothing but the standard library, so importing it costs neither CUDA nor torch.

JSON keys are the field names below. Optional keys are left out when they are None. An unknown key,
kind or schema version, and whatever could only fail later, at a launch, is an error at parse time
that names the place in the JSON (see `json_reader`).
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from math import prod
from typing import Any

from .json_reader import JsonNode, read_json

SCHEMA_VERSION = 2

# Layouts of the operand that a kernel reads. kmajor: W_gate with unit stride along K. emajor: with
# unit stride along E. kmajor_rows: as kmajor, but only the chosen experts' rows are read. logits:
# FP32 logits [N, E], already multiplied out.
LAYOUTS = ("kmajor", "emajor", "kmajor_rows", "logits")
PARAMETER_KINDS = ("tensor_map", "pointer", "int32", "float32")
# (bytes, alignment in the parameter block) of each kind; a CUtensorMap is 128 bytes aligned to 64.
KIND_LAYOUT = {"tensor_map": (128, 64), "pointer": (8, 8), "int32": (4, 4), "float32": (4, 4)}
POINTER_ELEMENTS = ("float32", "int32", "int64", "uint32", "uint8", "bfloat16")
# Bytes of an element that a tensor map reads.
TENSOR_ELEMENT_BYTES = {"bfloat16": 2}
# The dimensions of each tensor that a tensor map may be made for.
TENSOR_DIMS = {"W_gate": ("K", "E"), "hidden_states": ("N", "K", "K_in_block", "K_block")}
# Those that may come first: the ones that a call's checks find to have unit stride.
UNIT_STRIDE_DIMS = {"W_gate": ("K", "E"), "hidden_states": ("K", "K_in_block")}
# The bytes within which each swizzle permutes; a box's row must fit.
SWIZZLE_SPAN_BYTES = {"none": None, "32B": 32, "64B": 64, "128B": 128}
BOX_ROW_ALIGNMENT_BYTES = 16
# Whose dtypes a problem may name.
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
INTERLEAVES = ("none", "16B", "32B")
L2_PROMOTIONS = ("none", "64B", "128B", "256B")
OOB_FILLS = ("zeros", "nan_request_zero_fma")
# What an axis of the grid may be, besides an int: see `Launch.grid`.
GRID_TERMS = ("k_splits", "expert_tiles", "token_tiles")

# The largest problem that kernels are made for, and that a call may bring.
MAX_EXPERTS = 512
MAX_TOP_K = 8
MAX_SHARED_SLOTS = 8
K_MULTIPLE = 64

# The driver's limits, the same for every architecture from sm_90 on.
MAX_CLUSTER_CTAS = 16
MAX_PORTABLE_CLUSTER_CTAS = 8
MAX_THREADS_PER_CTA = 1024
MAX_GRID = (2**31 - 1, 65535, 65535)
# A CTA may have 227 KB: 228 KB of a multiprocessor less the 1 KB that the driver keeps.
MAX_DYNAMIC_SHARED_BYTES = 227 * 1024


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


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """Every artifact of one build, sorted by (name, arch), and the tools that made them."""

    toolchain: Mapping[str, str] = field(hash=False)
    kernels: tuple[Kernel, ...]

    def for_arch(self, arch: str) -> tuple[Kernel, ...]:
        return tuple(kernel for kernel in self.kernels if kernel.arch == arch)


def cubin_name(name: str, arch: str) -> str:
    """The file name of a kernel's cubin; the PTX beside it ends in `.ptx` instead."""
    return f"{name}.{arch}.cubin"


def compute_capability(arch: str) -> int:
    """10 * major + minor of an architecture's name: 90 for sm_90a, 103 for sm_103a."""
    return int(arch.removeprefix("sm_").rstrip("af"))


def serialise_manifest(manifest: Manifest) -> str:
    """The manifest's text: sorted keys, kernels sorted, one newline at the end; no timestamps.

    The text is parsed before it is returned, so what does not fit the schema is a ManifestError
    here, in the builder, and not later in a server.
    """
    kernels = sorted(manifest.kernels, key=lambda kernel: (kernel.name, kernel.arch))
    document = {
        "schema_version": SCHEMA_VERSION,
        "toolchain": dict(manifest.toolchain),
        "kernels": [_to_json(kernel) for kernel in kernels],
    }
    text = json.dumps(document, indent=1, sort_keys=True, ensure_ascii=True) + "\n"
    parse_manifest(text, source="manifest to be written")
    return text


def parse_manifest(text: str | bytes, *, source: str = "manifest.json") -> Manifest:
    """Read a manifest; a ManifestError names `source`, the path in the JSON, expected and got."""
    return read_json(text, _manifest, source=source)


def _to_json(value: Any) -> Any:
    if isinstance(value, IntRange):
        return [value.low, value.high]
    if hasattr(value, "__dataclass_fields__"):
        pairs = ((item.name, getattr(value, item.name)) for item in fields(value))
        return {name: _to_json(member) for name, member in pairs if member is not None}
    if isinstance(value, Mapping):
        return {key: _to_json(member) for key, member in value.items()}
    if isinstance(value, tuple | list):
        return [_to_json(member) for member in value]
    return value


def _manifest(node: JsonNode) -> Manifest:
    if not isinstance(node.value, dict):
        raise node.expected("an object")
    # The version first: a newer schema has other keys, and "unknown key" would hide the cause.
    version = JsonNode(node.value.get("schema_version"), "schema_version", node.source)
    if not version.is_int() or version.value != SCHEMA_VERSION:
        raise version.expected(f"{SCHEMA_VERSION}, the only schema this runtime reads")
    at = node.members("schema_version", "toolchain", "kernels")
    nodes = at["kernels"].items("a list of kernels")
    kernels = tuple(_kernel(item) for item in nodes)
    for index, kernel in enumerate(kernels[1:], start=1):
        before = kernels[index - 1]
        if (before.name, before.arch) >= (kernel.name, kernel.arch):
            order = f"{kernel.key} after {before.key}"
            raise nodes[index].error(f"not unique and sorted by (name, arch): {order}")
    toolchain = at["toolchain"].mapping(lambda item: item.string(r".+", "a version"))
    return Manifest(toolchain=toolchain, kernels=kernels)


def _kernel(node: JsonNode) -> Kernel:
    at = node.members(*(item.name for item in fields(Kernel)))
    name = at["name"].string(r"[a-z][a-z0-9_]*", "a kernel name (a-z, 0-9, _)")
    arch = at["arch"].string(r"sm_[0-9]{2,3}[af]?", "an architecture such as sm_90a")
    file = cubin_name(name, arch)
    if at["file"].value != file:
        raise at["file"].expected(f'"{file}"')
    sha256 = r"[0-9a-f]{64}", "64 lower-case hex digits"
    problem = _problem(at["problem"])
    parameters = _parameters(at["parameters"])
    _check_maps(at["parameters"], parameters, problem)
    return Kernel(
        name=name,
        arch=arch,
        file=file,
        symbol=at["symbol"].string(r"[A-Za-z_$][A-Za-z0-9_$]*", "a symbol name"),
        cubin_sha256=at["cubin_sha256"].string(*sha256),
        ptx_sha256=at["ptx_sha256"].string(*sha256),
        source_digest=at["source_digest"].string(*sha256),
        problem=problem,
        launch=_launch(at["launch"]),
        parameters=parameters,
        resources=_resources(at["resources"]),
    )


def _check_maps(node: JsonNode, parameters: tuple[Parameter, ...], problem: ProblemRange) -> None:
    """Maps fit the problem: W_gate's the layout, hidden_states' blocks every K that is accepted."""
    fastest = {"kmajor": "K", "emajor": "E"}.get(problem.layout)
    for index, parameter in enumerate(parameters):
        recipe = parameter.tensor_map
        if recipe is None:
            continue
        path = f"{node.path}[{index}].tensor_map"
        if recipe.tensor == "W_gate" and recipe.dims[0] != fastest:
            raise JsonNode(None, f"{path}.dims", node.source).error(
                f'W_gate first along "{recipe.dims[0]}" does not fit layout "{problem.layout}"'
            )
        if "K_block" in recipe.dims and problem.k_multiple % recipe.box[0]:
            raise JsonNode(None, f"{path}.box", node.source).error(
                f"K blocks of {recipe.box[0]} do not divide k_multiple {problem.k_multiple}"
            )


def _problem(node: JsonNode) -> ProblemRange:
    at = node.members(*(item.name for item in fields(ProblemRange)))
    return ProblemRange(
        layout=at["layout"].choice(LAYOUTS),
        num_tokens=_int_range(at["num_tokens"]),
        num_experts=_int_range(at["num_experts"]),
        top_k=_int_range(at["top_k"]),
        k_multiple=at["k_multiple"].integer(low=1),
        dtypes=at["dtypes"].mapping(_dtype_names, keys=DTYPE_TENSORS),
    )


def _dtype_names(node: JsonNode) -> tuple[str, ...]:
    what = "a list of distinct dtype names"
    names = tuple(item.string(r"[a-z0-9]+", "a dtype name") for item in node.items(what))
    if not names or len(set(names)) != len(names):
        raise node.expected(what)
    return names


def _int_range(node: JsonNode) -> IntRange:
    what = "[low, high] with 1 <= low <= high, or high null"
    low, high = node.items(what, 2)
    ends = [low] if high.value is None else [low, high]
    if not all(end.is_int() for end in ends) or not 1 <= low.value <= ends[-1].value:
        raise node.expected(what)
    return IntRange(low=low.value, high=high.value)


def _launch(node: JsonNode) -> Launch:
    at = node.members(*(item.name for item in fields(Launch)))
    block, cluster = at["block"].int3(), at["cluster"].int3()
    nonportable = at["nonportable_cluster"].boolean()
    if prod(block) > MAX_THREADS_PER_CTA:
        raise at["block"].expected(f"at most {MAX_THREADS_PER_CTA} threads")
    limit = MAX_CLUSTER_CTAS if nonportable else MAX_PORTABLE_CLUSTER_CTAS
    if prod(cluster) > limit:
        raise at["cluster"].expected(f"at most {limit} CTAs with nonportable_cluster {nonportable}")
    k_splits = at["k_splits"].integer(low=1)
    x, y, z = (
        _grid_axis(item, k_splits, *limits)
        for item, *limits in zip(at["grid"].items("3 grid axes", 3), cluster, MAX_GRID, strict=True)
    )
    return Launch(
        block=block,
        cluster=cluster,
        grid=(x, y, z),
        k_splits=k_splits,
        expert_tile=at["expert_tile"].integer(low=1),
        token_tile=at["token_tile"].integer(low=1),
        dynamic_shared_bytes=at["dynamic_shared_bytes"].integer(high=MAX_DYNAMIC_SHARED_BYTES),
        pdl=at["pdl"].boolean(),
        nonportable_cluster=nonportable,
    )


def _grid_axis(node: JsonNode, k_splits: int, cluster: int, limit: int) -> int | str:
    """An axis of the grid, whole clusters of `cluster` CTAs whatever the problem's size is."""
    axis = node.value
    if not (isinstance(axis, str) and axis in GRID_TERMS) and not (node.is_int() and axis >= 1):
        raise node.expected("an int >= 1 or one of " + ", ".join(GRID_TERMS))
    if axis in ("expert_tiles", "token_tiles"):
        if cluster != 1:
            raise node.expected(f"whole clusters of {cluster}, which no number of tiles promises")
        return str(axis)
    size = k_splits if axis == "k_splits" else axis
    if size % cluster or size > limit:
        where = f" with k_splits {k_splits}" if axis == "k_splits" else ""
        raise node.expected(f"a multiple of the cluster's {cluster}, at most {limit}{where}")
    return axis if isinstance(axis, str) else int(axis)


def _parameters(node: JsonNode) -> tuple[Parameter, ...]:
    nodes = node.items("a list of parameters")
    parameters = tuple(_parameter(item) for item in nodes)
    end = 0
    names: set[str] = set()
    for item, parameter in zip(nodes, parameters, strict=True):
        if parameter.offset < end:
            raise item.error(f"offset {parameter.offset} is inside the one before (ends at {end})")
        if parameter.name in names:
            raise item.error(f'the name "{parameter.name}" is used twice')
        end = parameter.offset + parameter.size
        names.add(parameter.name)
    return parameters


def _parameter(node: JsonNode) -> Parameter:
    at = node.members(
        "name", "kind", "offset", "size", optional=("element_type", "scratch", "tensor_map")
    )
    kind = at["kind"].choice(PARAMETER_KINDS)
    for key, owner in (("tensor_map", "tensor_map"), ("element_type", "pointer")):
        if (key in at) != (kind == owner):
            verb = "needs" if kind == owner else "has no"
            raise node.error(f'a parameter of kind "{kind}" {verb} "{key}"')
    if "scratch" in at and kind != "pointer":
        raise node.error(f'a parameter of kind "{kind}" has no "scratch"')
    size, alignment = KIND_LAYOUT[kind]
    if at["size"].integer() != size:
        raise at["size"].expected(f"{size}, the size of a {kind}")
    offset = at["offset"].integer()
    if offset % alignment:
        raise at["offset"].expected(f"a multiple of {alignment}, the alignment of a {kind}")
    return Parameter(
        name=at["name"].string(r"[a-z][a-z0-9_]*", "a parameter name (a-z, 0-9, _)"),
        kind=kind,
        offset=offset,
        size=size,
        element_type=at["element_type"].choice(POINTER_ELEMENTS) if "element_type" in at else None,
        scratch=_scratch(at["scratch"]) if "scratch" in at else None,
        tensor_map=_recipe(at["tensor_map"]) if "tensor_map" in at else None,
    )


def _scratch(node: JsonNode) -> Scratch:
    at = node.members("elements", "zeroed")
    return Scratch(elements=at["elements"].integer(low=1), zeroed=at["zeroed"].boolean())


def _recipe(node: JsonNode) -> TensorMapRecipe:
    at = node.members(*(item.name for item in fields(TensorMapRecipe)))
    tensor = at["tensor"].choice(tuple(TENSOR_DIMS))
    element_type = at["element_type"].choice(tuple(TENSOR_ELEMENT_BYTES))
    swizzle = at["swizzle"].choice(tuple(SWIZZLE_SPAN_BYTES))
    dim_nodes = at["dims"].items("a list of dimensions")
    dims = tuple(item.choice(TENSOR_DIMS[tensor]) for item in dim_nodes)
    box = tuple(item.integer(low=1) for item in at["box"].items("a list of ints"))
    if not 2 <= len(dims) <= 5 or len(set(dims)) != len(dims):
        raise at["dims"].expected("2 to 5 distinct dimensions")
    dim_nodes[0].choice(UNIT_STRIDE_DIMS[tensor])
    if len(box) != len(dims) or max(box) > 256:
        raise at["box"].expected(f"{len(dims)} ints from 1 to 256, one for each of dims")
    row_bytes, span = box[0] * TENSOR_ELEMENT_BYTES[element_type], SWIZZLE_SPAN_BYTES[swizzle]
    if row_bytes % BOX_ROW_ALIGNMENT_BYTES or (span is not None and row_bytes > span):
        raise at["box"].expected(
            f"rows in multiples of {BOX_ROW_ALIGNMENT_BYTES} bytes within the swizzle {swizzle}, "
            f"not {row_bytes} bytes"
        )
    return TensorMapRecipe(
        tensor=tensor,
        element_type=element_type,
        dims=dims,
        box=box,
        swizzle=swizzle,
        interleave=at["interleave"].choice(INTERLEAVES),
        l2_promotion=at["l2_promotion"].choice(L2_PROMOTIONS),
        oob_fill=at["oob_fill"].choice(OOB_FILLS),
    )


def _resources(node: JsonNode) -> Resources:
    at = node.members(*(item.name for item in fields(Resources)))
    return Resources(
        registers=at["registers"].integer(low=1),
        spill_bytes=at["spill_bytes"].integer(),
        stack_bytes=at["stack_bytes"].integer(),
        static_shared_bytes=at["static_shared_bytes"].integer(),
        opcodes=at["opcodes"].mapping(lambda item: item.integer()),
    )
