"""From a recipe and a tensor to the arguments of cuTensorMapEncodeTiled.

Pure: nothing is encoded here. The rules checked are those that the CUDA driver API's reference
gives for that call.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from dsv4_router_runtime.artifacts.kernel import (
    SWIZZLE_SPAN_BYTES,
    TENSOR_ELEMENT_BYTES,
    TensorMapRecipe,
)
from dsv4_router_runtime.artifacts.limits import BOX_ROW_ALIGNMENT_BYTES

ALIGNMENT_BYTES = 16


@dataclass(frozen=True, kw_only=True)
class EncodeArguments:
    """What the driver is asked for; sizes in elements, strides in bytes, fastest dimension first.

    `strides` leaves out the fastest dimension, as the driver does.
    """

    element_type: str
    address: int
    dims: tuple[int, ...]
    strides: tuple[int, ...]
    box: tuple[int, ...]
    element_strides: tuple[int, ...]
    interleave: str
    swizzle: str
    l2_promotion: str
    oob_fill: str


def hidden_states_arguments(
    recipe: TensorMapRecipe, *, address: int, num_tokens: int, k: int, row_stride: int
) -> EncodeArguments:
    """The arguments for hidden_states [num_tokens, k] with unit stride along K.

    A recipe may see K whole or as blocks as wide as its box, "K_in_block" by "K_block": then one
    read can bring several blocks, each of which lies in shared memory as a box of its own.
    """
    block = recipe.box[0]
    if "K_block" in recipe.dims and k % block:
        raise ValueError(f"hidden_states: expected K in multiples of {block} (got {k})")
    return encode_arguments(
        recipe,
        address=address,
        sizes={"N": num_tokens, "K": k, "K_in_block": block, "K_block": k // block},
        strides={"N": row_stride, "K": 1, "K_in_block": 1, "K_block": block},
    )


def encode_arguments(
    recipe: TensorMapRecipe,
    *,
    address: int,
    sizes: Mapping[str, int],
    strides: Mapping[str, int],
) -> EncodeArguments:
    """The arguments for a tensor at `address`; `sizes` and `strides` are in elements, by dimension.

    A dimension of size 1 is never stepped along, so its stride is replaced by a packed one: torch
    leaves any number there. ValueError where the driver would refuse the map.
    """
    element_bytes = TENSOR_ELEMENT_BYTES[recipe.element_type]
    name = recipe.tensor
    dims = tuple(sizes[dim] for dim in recipe.dims)
    fastest = recipe.dims[0]
    if strides[fastest] != 1:
        raise ValueError(f"{name}: expected unit stride along {fastest} (got {strides[fastest]})")
    if address % ALIGNMENT_BYTES:
        raise ValueError(f"{name}: expected an address aligned to {ALIGNMENT_BYTES} bytes")
    byte_strides: list[int] = []
    packed = dims[0] * element_bytes
    for dim, size in zip(recipe.dims[1:], dims[1:], strict=True):
        stride = strides[dim] * element_bytes
        if size == 1:
            stride = -(-packed // ALIGNMENT_BYTES) * ALIGNMENT_BYTES
        if stride % ALIGNMENT_BYTES or not 0 < stride < 2**40:
            raise ValueError(
                f"{name}: expected a stride along {dim} that is a positive multiple of "
                f"{ALIGNMENT_BYTES} bytes (got {stride})"
            )
        byte_strides.append(stride)
        packed = stride * size
    if not all(1 <= size <= 2**32 for size in dims):
        raise ValueError(f"{name}: expected sizes from 1 to 2**32 (got {dims})")
    span = SWIZZLE_SPAN_BYTES[recipe.swizzle]
    row_bytes = recipe.box[0] * element_bytes
    if row_bytes % BOX_ROW_ALIGNMENT_BYTES or (span is not None and row_bytes > span):
        raise ValueError(
            f"{name}: expected box rows in multiples of {BOX_ROW_ALIGNMENT_BYTES} bytes within the "
            f"swizzle {recipe.swizzle} (got {row_bytes} bytes)"
        )
    return EncodeArguments(
        element_type=recipe.element_type,
        address=address,
        dims=dims,
        strides=tuple(byte_strides),
        box=recipe.box,
        element_strides=(1,) * len(dims),
        interleave=recipe.interleave,
        swizzle=recipe.swizzle,
        l2_promotion=recipe.l2_promotion,
        oob_fill=recipe.oob_fill,
    )
