"""The schema of `artifacts/manifest.json`, which the builder writes and the runtime reads.

Pure: the standard library alone. JSON keys are the field names in `kernel`; optional keys are left
out if they are None. An error at parse time names the place in the JSON (see `json_reader`). It is
raised for an unknown key, kind or schema version, for a number outside `limits`, and for a launch,
parameters or tensor maps that this runtime cannot fill or that the driver always refuses. Bytes are
checked when a cubin is read, its parameters against the driver's when it is loaded.

A runtime reads exactly one version, SCHEMA_VERSION; any other is refused with the command that
builds or installs the set anew. A change that adds, drops or renames a key, or gives a key or a
word another meaning, raises it. A tighter bound does not if nothing that could run is refused.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from functools import lru_cache
from math import prod
from typing import Any

from dsv4_router_runtime.parameters import DTYPES, TICKETS, TILE_EXPERTS, WORKSPACE

from .json_reader import SHA256, JsonNode, read_json
from .kernel import (
    ARCHITECTURE,
    GRID_TERMS,
    LAYOUTS,
    POINTER_ELEMENT_BYTES,
    ROLES,
    IntRange,
    Kernel,
    Launch,
    Parameter,
    ProblemRange,
    Resources,
    compute_capability,
    cubin_name,
    wrong_parameter,
)
from .limits import (
    MAX_BLOCK,
    MAX_CLUSTER_CTAS,
    MAX_COMPUTE_CAPABILITY,
    MAX_DRIVER,
    MAX_DYNAMIC_SHARED_BYTES,
    MAX_EXPERTS,
    MAX_FIXED_CTAS,
    MAX_GRID,
    MAX_K_BLOCKS,
    MAX_LOCAL_BYTES,
    MAX_PORTABLE_CLUSTER_CTAS,
    MAX_REGISTERS_PER_CTA,
    MAX_REGISTERS_PER_THREAD,
    MAX_SCRATCH_BYTES,
    MAX_STATIC_SHARED_BYTES,
    MAX_THREADS_PER_CTA,
    MAX_TOKENS,
    MAX_TOP_K,
    MAX_WAIT_LIMIT_MS,
    MIN_COMPUTE_CAPABILITY,
    MIN_DRIVER,
    REGISTER_UNIT,
    THREADS_PER_WARP,
)
from .parameter_schema import NAME, read_parameters

SCHEMA_VERSION = 5

# Counts of instructions and of bytes spilled: bounded only so that they stay numbers.
MAX_COUNT = 2**31 - 1
_DTYPE_NAMES = tuple(sorted({name for dtypes in DTYPES.values() for name in dtypes}))
_DISTRIBUTION = r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}"
_VERSION = r"[A-Za-z0-9][A-Za-z0-9.+!_ -]{0,127}"
_OPCODE = r"[A-Z][A-Z0-9_.]{0,31}"


@dataclass(frozen=True, kw_only=True, repr=False)
class Manifest:
    """Every artifact of one build, sorted by (name, arch), and the tools that made them.

    driver: for each architecture the oldest CUDA driver that its kernels are launched with, as
    cuDriverGetVersion counts: 12040 for CUDA 12.4.
    """

    toolchain: Mapping[str, str] = field(hash=False)
    driver: Mapping[str, int] = field(hash=False)
    kernels: tuple[Kernel, ...]

    def for_arch(self, arch: str) -> tuple[Kernel, ...]:
        return tuple(kernel for kernel in self.kernels if kernel.arch == arch)

    def __repr__(self) -> str:
        """Return one line: every field of every kernel would be 120,000 characters."""
        archs = ", ".join(sorted({kernel.arch for kernel in self.kernels}))
        return f"Manifest({len(self.kernels)} kernels{f' for {archs}' if archs else ''})"


def serialise_manifest(manifest: Manifest) -> str:
    """Return the manifest's text: keys and kernels sorted, one newline at the end, no timestamps.

    The text is parsed first: a manifest beyond the schema is a ManifestError in the builder.
    """
    kernels = sorted(manifest.kernels, key=lambda kernel: (kernel.name, kernel.arch))
    document = {
        "schema_version": SCHEMA_VERSION,
        "toolchain": dict(manifest.toolchain),
        "driver": dict(manifest.driver),
        "kernels": [_to_json(kernel) for kernel in kernels],
    }
    text = json.dumps(document, indent=1, sort_keys=True, ensure_ascii=True) + "\n"
    parse_manifest(text, source="manifest to be written")
    return text


def parse_manifest(text: str | bytes, *, source: str = "manifest.json") -> Manifest:
    """Read a manifest; a ManifestError names `source`, the path in the JSON, expected and got.

    The results of the last texts are kept: nothing can change them.
    """
    if not isinstance(text, str | bytes):
        raise TypeError(f"text: expected str or bytes (got {type(text).__name__})")
    return _parse(_Text(text, source))


@dataclass(frozen=True)
class _Text:
    """A manifest's text, which is equal to the same text from elsewhere."""

    text: str | bytes
    source: str = field(compare=False)


# A Router of each layer opens the folder that it is given: 20 ms a time for 48 kernels.
@lru_cache(maxsize=4)
def _parse(given: _Text) -> Manifest:
    return read_json(given.text, _manifest, source=given.source)


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
    version = node.member("schema_version")
    if not version.is_int() or version.value != SCHEMA_VERSION:
        raise version.expected(f"{SCHEMA_VERSION}, the only schema this runtime reads")
    at = node.members("schema_version", "toolchain", "driver", "kernels")
    nodes = at["kernels"].items("a list of kernels")
    known: dict[str, Parameter] = {}
    kernels = tuple(_kernel(item, known) for item in nodes)
    for index, kernel in enumerate(kernels[1:], start=1):
        before = kernels[index - 1]
        if (before.name, before.arch) >= (kernel.name, kernel.arch):
            order = f"{kernel.key} after {before.key}"
            raise nodes[index].error(f"not unique and sorted by (name, arch): {order}")
    toolchain = at["toolchain"].mapping(
        lambda item: item.string(_VERSION, "a version"), keys=_DISTRIBUTION
    )
    driver = at["driver"].mapping(
        lambda item: item.integer(low=MIN_DRIVER, high=MAX_DRIVER), keys=ARCHITECTURE
    )
    for arch in {kernel.arch for kernel in kernels} - driver.keys():
        raise at["driver"].error(f"{arch} is missing, which kernels are listed for")
    return Manifest(toolchain=toolchain, driver=driver, kernels=kernels)


def _kernel(node: JsonNode, known: dict[str, Parameter]) -> Kernel:
    at = node.members(*(item.name for item in fields(Kernel)))
    name = at["name"].string(NAME, "a kernel name (a-z, 0-9, _; at most 64)")
    arch = _architecture(at["arch"])
    role = at["role"].choice(ROLES)
    file = cubin_name(name, arch)
    if at["file"].value != file:
        raise at["file"].expected(f'"{file}"')
    kernel = Kernel(
        name=name,
        arch=arch,
        role=role,
        file=file,
        symbol=at["symbol"].string(r"[A-Za-z_$][A-Za-z0-9_$]{0,255}", "a symbol name"),
        cubin_sha256=at["cubin_sha256"].string(*SHA256),
        ptx_sha256=at["ptx_sha256"].string(*SHA256),
        source_digest=at["source_digest"].string(*SHA256),
        problem=_problem(at["problem"], role),
        launch=_launch(at["launch"]),
        parameters=read_parameters(at["parameters"], known),
        resources=_resources(at["resources"]),
    )
    _check_parameters(node, kernel)
    _check_workspace(node, kernel)
    _check_grid(at["launch"], kernel)
    _check_maps(at["parameters"], kernel)
    _check_fits(node, kernel.launch, kernel.resources)
    return kernel


def _architecture(node: JsonNode) -> str:
    what = f"an architecture such as sm_90a, from sm_{MIN_COMPUTE_CAPABILITY} on"
    arch = node.string(ARCHITECTURE, what)
    if not MIN_COMPUTE_CAPABILITY <= compute_capability(arch) <= MAX_COMPUTE_CAPABILITY:
        raise node.expected(what)
    return arch


def _check_parameters(node: JsonNode, kernel: Kernel) -> None:
    """Refuse parameters that this runtime does not fill as the kernel reads them."""
    wrong = wrong_parameter(kernel.role, kernel.parameters)
    if wrong is not None:
        place, problem = wrong
        raise JsonNode(None, f"{node.path}.{place}", node.source).error(problem)
    scratch = sum(
        item.scratch.elements * POINTER_ELEMENT_BYTES[item.element_type]
        for item in kernel.parameters
        if item.scratch is not None and item.element_type is not None
    )
    if scratch > MAX_SCRATCH_BYTES:
        problem = f"expected at most {MAX_SCRATCH_BYTES} bytes of scratch (got {scratch})"
        raise JsonNode(None, f"{node.path}.parameters", node.source).error(problem)


def _check_workspace(node: JsonNode, kernel: Kernel) -> None:
    """Refuse a workspace without a place for every token and expert of a launch.

    A launch of more would write to the scratch of another stream.
    """
    held = [
        item.scratch.elements * POINTER_ELEMENT_BYTES[item.element_type]
        for item in kernel.parameters
        if item.name == WORKSPACE.name and item.scratch is not None and item.element_type
    ]
    place = JsonNode(None, f"{node.path}.parameters", node.source)
    if held and kernel.role not in TICKETS:
        raise place.error(f"role {kernel.role} takes no scratch named {WORKSPACE.name}")
    if not held:
        return
    highest, tile = kernel.problem.num_experts.high or MAX_EXPERTS, kernel.launch.expert_tile
    for num_experts in (*range(tile, highest, tile), highest):
        most, tickets = kernel.most_tokens(num_experts), TICKETS[kernel.role]
        if most is None or most > tickets:
            got = "without an end" if most is None else most
            raise place.error(f"expected at most {tickets} tokens, a ticket for each (got {got})")
        needed = kernel.workspace_bytes(most, num_experts)
        if held[0] < needed:
            launch = f"{most} tokens of {num_experts} experts"
            raise place.error(
                f"expected at least {needed} bytes of {WORKSPACE.name}, which {launch} take "
                f"(got {held[0]})"
            )


def _check_grid(node: JsonNode, kernel: Kernel) -> None:
    """Refuse a grid without a CTA for every accepted token and expert, or beyond the driver's."""
    launch, problem = kernel.launch, kernel.problem
    most_tokens = MAX_TOKENS if problem.num_tokens.high is None else problem.num_tokens.high
    if "token_tiles" not in launch.grid and most_tokens > launch.token_tile:
        path = f"{node.path}.token_tile"
        raise JsonNode(launch.token_tile, path, node.source).expected(
            f"at least the {most_tokens} tokens accepted, since the grid has no token_tiles"
        )
    # A CTA of a kernel that reads chosen rows takes slots, whatever expert each is.
    most_experts = problem.num_experts.high or MAX_EXPERTS
    reads_all = kernel.role != "hash"
    if reads_all and "expert_tiles" not in launch.grid and most_experts > launch.expert_tile:
        path = f"{node.path}.expert_tile"
        raise JsonNode(launch.expert_tile, path, node.source).expected(
            f"at least the {most_experts} experts accepted, since the grid has no expert_tiles"
        )
    for axis, (term, limit) in enumerate(zip(launch.grid, MAX_GRID, strict=True)):
        if term == "token_tiles" and most_tokens > limit * launch.token_tile:
            tiles = f"{most_tokens} tokens in tiles of {launch.token_tile}"
            raise JsonNode(term, f"{node.path}.grid[{axis}]", node.source).expected(
                f"at most {limit} CTAs, not {tiles}"
            )


def _check_fits(node: JsonNode, launch: Launch, resources: Resources) -> None:
    """Refuse a CTA of more registers or shared memory than an SM has."""
    shared = launch.dynamic_shared_bytes + resources.static_shared_bytes
    if shared > MAX_DYNAMIC_SHARED_BYTES:
        raise node.error(
            f"expected at most {MAX_DYNAMIC_SHARED_BYTES} bytes of shared memory (got {shared}, "
            "launch.dynamic_shared_bytes and resources.static_shared_bytes)"
        )
    threads = -(-prod(launch.block) // THREADS_PER_WARP) * THREADS_PER_WARP
    registers = -(-resources.registers // REGISTER_UNIT) * REGISTER_UNIT * threads
    if registers > MAX_REGISTERS_PER_CTA:
        raise node.error(
            f"expected at most {MAX_REGISTERS_PER_CTA} registers per CTA (got {registers}: "
            f"resources.registers in units of {REGISTER_UNIT}, launch.block of {threads} threads)"
        )


def _check_maps(node: JsonNode, kernel: Kernel) -> None:
    """Check that maps fit the kernel: its layout, its tiles, and every K that it accepts.

    A kernel waits for the bytes of whole tiles, so a smaller box would keep it waiting.
    """
    problem, launch = kernel.problem, kernel.launch
    fastest = "E" if problem.layout == "emajor" else "K"
    for index, parameter in enumerate(kernel.parameters):
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
        # A box of W_gate that is contiguous along E is 64 experts wide, by its swizzle.
        experts = launch.expert_tile
        boxes = {
            "E": min(experts, TILE_EXPERTS) if fastest == "E" else experts,
            "N": launch.token_tile,
        }
        for dim, name in (("E", "expert_tile"), ("N", "token_tile")):
            tile = boxes[dim]
            if dim in recipe.dims and recipe.box[recipe.dims.index(dim)] != tile:
                raise JsonNode(list(recipe.box), f"{path}.box", node.source).expected(
                    f"{tile} along {dim}, launch.{name}"
                )


def _problem(node: JsonNode, role: str) -> ProblemRange:
    names = {item.name for item in fields(ProblemRange)} - {"same_bits_only"}
    # The layout is W_gate's, which a kernel that selects from logits does not read.
    names -= {"layout"} if role == "select" else set()
    at = node.members(*names, optional=("same_bits_only",))
    return ProblemRange(
        layout=at["layout"].choice(LAYOUTS) if "layout" in at else None,
        num_tokens=_int_range(at["num_tokens"], MAX_TOKENS, endless=True),
        num_experts=_int_range(at["num_experts"], MAX_EXPERTS),
        top_k=_int_range(at["top_k"], MAX_TOP_K),
        k_multiple=at["k_multiple"].integer(low=1, high=MAX_K_BLOCKS),
        dtypes=at["dtypes"].mapping(_dtype_names, keys=tuple(DTYPES)),
        same_bits_only=at["same_bits_only"].boolean() if "same_bits_only" in at else None,
    )


def _dtype_names(node: JsonNode) -> tuple[str, ...]:
    what = "a list of distinct dtype names"
    names = tuple(item.choice(_DTYPE_NAMES) for item in node.items(what))
    if not names or len(set(names)) != len(names):
        raise node.expected(what)
    return names


def _int_range(node: JsonNode, most: int, *, endless: bool = False) -> IntRange:
    what = f"[low, high] with 1 <= low <= high <= {most}{', or high null' if endless else ''}"
    low, high = node.items(what, 2)
    ends = [low] if endless and high.value is None else [low, high]
    if not all(end.is_int() for end in ends) or not 1 <= low.value <= ends[-1].value <= most:
        raise node.expected(what)
    return IntRange(low=low.value, high=high.value)


def _launch(node: JsonNode) -> Launch:
    required = {item.name for item in fields(Launch)} - {"max_clusters"}
    at = node.members(*required, optional=("max_clusters",))
    block, cluster = at["block"].int3(), at["cluster"].int3()
    nonportable = at["nonportable_cluster"].boolean()
    if prod(block) > MAX_THREADS_PER_CTA or block[2] > MAX_BLOCK[2]:
        limits = f"at most {MAX_THREADS_PER_CTA} threads, in at most {list(MAX_BLOCK)}"
        raise at["block"].expected(limits)
    limit = MAX_CLUSTER_CTAS if nonportable else MAX_PORTABLE_CLUSTER_CTAS
    if prod(cluster) > limit:
        raise at["cluster"].expected(f"at most {limit} CTAs with nonportable_cluster {nonportable}")
    k_splits = at["k_splits"].integer(low=1, high=MAX_FIXED_CTAS)
    x, y, z = (
        _grid_axis(item, k_splits, *limits)
        for item, *limits in zip(at["grid"].items("3 grid axes", 3), cluster, MAX_GRID, strict=True)
    )
    return Launch(
        block=block,
        cluster=cluster,
        grid=(x, y, z),
        k_splits=k_splits,
        expert_tile=at["expert_tile"].integer(low=1, high=MAX_EXPERTS),
        token_tile=at["token_tile"].integer(low=1, high=MAX_TOKENS),
        dynamic_shared_bytes=at["dynamic_shared_bytes"].integer(high=MAX_DYNAMIC_SHARED_BYTES),
        pdl=at["pdl"].boolean(),
        nonportable_cluster=nonportable,
        max_clusters=(
            at["max_clusters"].integer(low=1, high=MAX_FIXED_CTAS) if "max_clusters" in at else None
        ),
        wait_limit_ms=at["wait_limit_ms"].integer(high=MAX_WAIT_LIMIT_MS),
    )


def _grid_axis(node: JsonNode, k_splits: int, cluster: int, limit: int) -> int | str:
    """Read an axis of the grid: whole clusters of `cluster` CTAs for any size of the problem."""
    axis = node.value
    if not (isinstance(axis, str) and axis in GRID_TERMS) and not (node.is_int() and axis >= 1):
        raise node.expected("an int >= 1 or one of " + ", ".join(GRID_TERMS))
    if axis in ("expert_tiles", "token_tiles"):
        if cluster != 1:
            raise node.expected(f"whole clusters of {cluster}, which no number of tiles promises")
        return str(axis)
    size = k_splits if axis == "k_splits" else axis
    most = min(limit, MAX_FIXED_CTAS)
    if size % cluster or size > most:
        where = f" with k_splits {k_splits}" if axis == "k_splits" else ""
        raise node.expected(f"a multiple of the cluster's {cluster}, at most {most}{where}")
    return axis if isinstance(axis, str) else int(axis)


def _resources(node: JsonNode) -> Resources:
    at = node.members(*(item.name for item in fields(Resources)))
    return Resources(
        registers=at["registers"].integer(low=1, high=MAX_REGISTERS_PER_THREAD),
        spill_bytes=at["spill_bytes"].integer(high=MAX_COUNT),
        stack_bytes=at["stack_bytes"].integer(high=MAX_LOCAL_BYTES),
        static_shared_bytes=at["static_shared_bytes"].integer(high=MAX_STATIC_SHARED_BYTES),
        opcodes=at["opcodes"].mapping(lambda item: item.integer(high=MAX_COUNT), keys=_OPCODE),
    )
