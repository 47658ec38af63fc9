"""The schema of a kernel's parameters: kinds, offsets, scratch and tensor maps.

`manifest` reads the rest of a kernel, and holds these against its problem and its launch.
"""

from __future__ import annotations

from dataclasses import fields

from .json_reader import JsonNode
from .kernel import (
    INTERLEAVES,
    KIND_LAYOUT,
    L2_PROMOTIONS,
    OOB_FILLS,
    PARAMETER_KINDS,
    POINTER_ELEMENT_BYTES,
    SWIZZLE_SPAN_BYTES,
    TENSOR_DIMS,
    TENSOR_ELEMENT_BYTES,
    UNIT_STRIDE_DIMS,
    WHOLE_DIMS,
    Parameter,
    Scratch,
    TensorMapRecipe,
)
from .limits import (
    BOX_ROW_ALIGNMENT_BYTES,
    MAX_BOX_EXTENT,
    MAX_MAP_DIMS,
    MAX_PARAMETER_BYTES,
    MAX_SCRATCH_BYTES,
)

NAME = r"[a-z][a-z0-9_]{0,63}"


def read_parameters(node: JsonNode, known: dict[str, Parameter]) -> tuple[Parameter, ...]:
    """Read the list of parameters: in ABI order, none inside another, no name twice.

    known: the manifest's parameters that were read before, by their JSON. Kernels share most.
    """
    nodes = node.items("a list of parameters")
    parameters = tuple(_known_parameter(item, known) for item in nodes)
    end = 0
    names: set[str] = set()
    for item, parameter in zip(nodes, parameters, strict=True):
        if parameter.offset < end:
            raise item.error(f"offset {parameter.offset} is inside the one before (ends at {end})")
        if parameter.offset + parameter.size > MAX_PARAMETER_BYTES:
            raise item.error(f"ends after the {MAX_PARAMETER_BYTES} bytes that a launch may pass")
        if parameter.name in names:
            raise item.error(f'the name "{parameter.name}" is used twice')
        end = parameter.offset + parameter.size
        names.add(parameter.name)
    return parameters


def _known_parameter(node: JsonNode, known: dict[str, Parameter]) -> Parameter:
    key = repr(node.value)
    if key not in known:
        known[key] = _parameter(node)
    return known[key]


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
    offset = at["offset"].integer(high=MAX_PARAMETER_BYTES)
    if offset % alignment:
        raise at["offset"].expected(f"a multiple of {alignment}, the alignment of a {kind}")
    return Parameter(
        name=at["name"].string(NAME, "a parameter name (a-z, 0-9, _; at most 64)"),
        kind=kind,
        offset=offset,
        size=size,
        element_type=(
            at["element_type"].choice(tuple(POINTER_ELEMENT_BYTES))
            if "element_type" in at
            else None
        ),
        scratch=_scratch(at["scratch"]) if "scratch" in at else None,
        tensor_map=_recipe(at["tensor_map"]) if "tensor_map" in at else None,
    )


def _scratch(node: JsonNode) -> Scratch:
    at = node.members("elements", "zeroed")
    elements = at["elements"].integer(low=1, high=MAX_SCRATCH_BYTES)
    return Scratch(elements=elements, zeroed=at["zeroed"].boolean())


def _recipe(node: JsonNode) -> TensorMapRecipe:
    at = node.members(*(item.name for item in fields(TensorMapRecipe)))
    tensor = at["tensor"].choice(tuple(TENSOR_DIMS))
    element_type = at["element_type"].choice(tuple(TENSOR_ELEMENT_BYTES))
    swizzle = at["swizzle"].choice(tuple(SWIZZLE_SPAN_BYTES))
    dim_nodes = at["dims"].items("a list of dimensions")
    dims = tuple(item.choice(TENSOR_DIMS[tensor]) for item in dim_nodes)
    box = tuple(item.integer(low=1) for item in at["box"].items("a list of ints"))
    if not 2 <= len(dims) <= MAX_MAP_DIMS or len(set(dims)) != len(dims):
        raise at["dims"].expected(f"2 to {MAX_MAP_DIMS} distinct dimensions")
    dim_nodes[0].choice(UNIT_STRIDE_DIMS[tensor])
    if sorted(dims) not in [sorted(whole) for whole in WHOLE_DIMS[tensor]]:
        choices = " or ".join(", ".join(whole) for whole in WHOLE_DIMS[tensor])
        raise at["dims"].expected(f"{choices}: the whole {tensor}, once")
    if len(box) != len(dims) or max(box) > MAX_BOX_EXTENT:
        what = f"{len(dims)} ints from 1 to {MAX_BOX_EXTENT}, one for each of dims"
        raise at["box"].expected(what)
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
