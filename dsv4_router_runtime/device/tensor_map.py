"""Tensor maps: a recipe and a tensor become the 128 bytes that TMA reads.

The arguments of cuTensorMapEncodeTiled are computed without the driver, by the rules of the driver
API's reference; `encode_tensor_map` calls it.
"""

from __future__ import annotations

import ctypes
import threading
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any

from dsv4_router_runtime.artifacts.kernel import (
    SWIZZLE_SPAN_BYTES,
    TENSOR_ELEMENT_BYTES,
    TensorMapRecipe,
)
from dsv4_router_runtime.artifacts.limits import BOX_ROW_ALIGNMENT_BYTES, MAP_ALIGNMENT_BYTES
from dsv4_router_runtime.errors import DriverTooOldError
from dsv4_router_runtime.locks import is_held_here

from . import driver

TENSOR_MAP_BYTES = 128
TENSOR_MAP_ALIGNMENT = 64
MAX_CACHED_MAPS = 512


@dataclass(frozen=True, kw_only=True)
class EncodeArguments:
    """Arguments of the encoder; sizes in elements, strides in bytes, fastest dimension first.

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
    """Return the arguments for hidden_states [num_tokens, k] with unit stride along K.

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
    """Return the arguments for a tensor; `sizes` and `strides` are in elements, by dimension.

    A dimension of size 1 is never stepped along, so its stride is replaced by a packed one: torch
    leaves any number there. ValueError where the driver would refuse the map.
    """
    element_bytes = TENSOR_ELEMENT_BYTES[recipe.element_type]
    name = recipe.tensor
    dims = tuple(sizes[dim] for dim in recipe.dims)
    fastest = recipe.dims[0]
    if strides[fastest] != 1:
        raise ValueError(f"{name}: expected unit stride along {fastest} (got {strides[fastest]})")
    if address % MAP_ALIGNMENT_BYTES:
        raise ValueError(f"{name}: expected an address aligned to {MAP_ALIGNMENT_BYTES} bytes")
    byte_strides: list[int] = []
    packed = dims[0] * element_bytes
    for dim, size in zip(recipe.dims[1:], dims[1:], strict=True):
        stride = strides[dim] * element_bytes
        if size == 1:
            stride = -(-packed // MAP_ALIGNMENT_BYTES) * MAP_ALIGNMENT_BYTES
        if stride % MAP_ALIGNMENT_BYTES or not 0 < stride < 2**40:
            raise ValueError(
                f"{name}: expected a stride along {dim} that is a positive multiple of "
                f"{MAP_ALIGNMENT_BYTES} bytes (got {stride})"
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


def weight_arguments(
    recipe: TensorMapRecipe, *, address: int, k: int, num_experts: int, strides: tuple[int, ...]
) -> EncodeArguments:
    """Return the arguments for W_gate [k, num_experts] with `strides` in elements."""
    along_k, along_e = strides
    return encode_arguments(
        recipe,
        address=address,
        sizes={"K": k, "E": num_experts},
        strides={"K": along_k, "E": 1 if num_experts == 1 else along_e},
    )


class TensorMap:
    """128 encoded bytes at an aligned `address`, alive as long as this object is."""

    __slots__ = ("_storage", "address")

    def __init__(self) -> None:
        self._storage = ctypes.create_string_buffer(TENSOR_MAP_BYTES + TENSOR_MAP_ALIGNMENT)
        start = ctypes.addressof(self._storage)
        self.address = -(-start // TENSOR_MAP_ALIGNMENT) * TENSOR_MAP_ALIGNMENT


def encode_tensor_map(arguments: EncodeArguments, device: int) -> TensorMap:
    """Encode a tensor map on the host, for memory of GPU `device`.

    The entry point comes from the bindings but is called through ctypes: the driver asks for
    64-byte alignment, and the bindings' own CUtensorMap lies wherever Python's allocator put it
    (seen at 48 modulo 64 with cuda-bindings 13.4; NVIDIA/cuda-python#1692).
    """
    tensor_map = TensorMap()
    rank = len(arguments.dims)
    u64, u32 = ctypes.c_uint64, ctypes.c_uint32
    given = (
        tensor_map.address,
        _enum("CUtensorMapDataType", "DATA_TYPE", arguments.element_type),
        rank,
        arguments.address,
        (u64 * rank)(*arguments.dims),
        (u64 * (rank - 1))(*arguments.strides),
        (u32 * rank)(*arguments.box),
        (u32 * rank)(*arguments.element_strides),
        _enum("CUtensorMapInterleave", "INTERLEAVE", arguments.interleave),
        _enum("CUtensorMapSwizzle", "SWIZZLE", arguments.swizzle),
        _enum("CUtensorMapL2promotion", "L2_PROMOTION", arguments.l2_promotion),
        _enum("CUtensorMapFloatOOBfill", "FLOAT_OOB_FILL", arguments.oob_fill),
    )

    def encode() -> tuple[Any, ...]:
        return (driver.bindings().CUresult(_encode_function()(*given)),)

    # The driver wants a context, which a new thread may not have.
    results = driver.in_a_context(device, encode(), encode)
    driver.checked(f"encoding the tensor map {arguments}", results)
    return tensor_map


@cache
def _encode_function() -> Any:
    cuda = driver.bindings()
    found = cuda.cuGetProcAddress(b"cuTensorMapEncodeTiled", 12000, 0)
    address, _ = driver.checked("finding cuTensorMapEncodeTiled, which CUDA 12.0 brought", found)
    if not int(address):
        raise DriverTooOldError(
            "the CUDA driver has no cuTensorMapEncodeTiled; update the NVIDIA driver"
        )
    pointer, integer = ctypes.c_void_p, ctypes.c_uint32
    return ctypes.CFUNCTYPE(
        ctypes.c_int, pointer, integer, integer, *[pointer] * 5, *[integer] * 4
    )(int(address))


# How the driver's enumerations spell the manifest's words.
_ENUM_WORDS = {
    "zeros": "NONE",
    "nan_request_zero_fma": "NAN_REQUEST_ZERO_FMA",
    "64B_l2": "L2_64B",
    "128B_l2": "L2_128B",
    "256B_l2": "L2_256B",
}


@cache
def _enum(type_name: str, stem: str, word: str) -> int:
    spelling = _ENUM_WORDS.get(f"{word}_l2" if stem == "L2_PROMOTION" else word, word.upper())
    return int(getattr(getattr(driver.bindings(), type_name), f"CU_TENSOR_MAP_{stem}_{spelling}"))


class MapCache:
    """Encoded maps of hidden_states for one recipe, by address, shape and row stride.

    Encoding takes 2 us, and a server repeats few addresses: torch's allocator returns them. The
    oldest map is dropped when the cache is full.
    """

    def __init__(self, recipe: TensorMapRecipe) -> None:
        self._recipe = recipe
        self.maps: dict[tuple[int, int, int, int], TensorMap] = {}
        self._lock = threading.RLock()

    def get(self, address: int, num_tokens: int, k: int, row_stride: int, device: int) -> TensorMap:
        """Return the map of hidden_states [num_tokens, k] at `address`, encoded at most once."""
        key = (address, num_tokens, k, row_stride)
        found = self.maps.get(key)
        if found is None:
            arguments = hidden_states_arguments(
                self._recipe, address=address, num_tokens=num_tokens, k=k, row_stride=row_stride
            )
            found = encode_tensor_map(arguments, device)
            # A call by a signal handler, within a call that changes the cache: it keeps no map.
            if is_held_here(self._lock):
                return found
            with self._lock:
                while len(self.maps) >= MAX_CACHED_MAPS:
                    del self.maps[next(iter(self.maps))]
                self.maps[key] = found
        return found


_map_caches: dict[TensorMapRecipe, MapCache] = {}


def map_cache(recipe: TensorMapRecipe) -> MapCache:
    """Return the cache that all layers share for maps made by `recipe`."""
    return _map_caches.setdefault(recipe, MapCache(recipe))
