"""A kernel's launch parameters as one NamedTuple of DSL values, from the runtime's table."""

from functools import cache
from typing import NamedTuple

import cutlass.cute as cute
from cutlass import BFloat16, Float32, Int32, Uint8, Uint32
from cutlass.cute.runtime import make_ptr

from dsv4_router_runtime.parameters import ABI, LaunchParameter

_NUMBERS = {"int32": Int32, "float32": Float32}
# Element type of a pointer -> DSL type, and the alignment in bytes that callers guarantee.
_ELEMENTS = {
    "bfloat16": (BFloat16, 16),
    "float32": (Float32, 4),
    "int32": (Int32, 4),
    "uint8": (Uint8, 1),
    "uint32": (Uint32, 16),
}


@cache
def arguments_of(role: str) -> type[tuple]:
    """Make the `Arguments` of a kernel: its launch parameters after the tensor maps, in ABI order.

    A kernel takes and passes them as one value, so no signature lists a parameter. The names, types
    and shapes are in dsv4_router_runtime/parameters.py.
    """
    fields = [
        (parameter.name, _NUMBERS.get(parameter.kind, cute.Pointer))
        for parameter in ABI[role]
        if parameter.kind != "tensor_map"
    ]
    return NamedTuple("Arguments", fields)


def trace_arguments(role: str) -> tuple:
    """Make dummies to trace a kernel's `__call__`: a pointer per tensor map, then `Arguments`.

    Tracing uses their types only, so it needs no GPU.
    """
    maps = [_dummy_pointer("bfloat16") for item in ABI[role] if item.kind == "tensor_map"]
    values = [_trace_value(item) for item in ABI[role] if item.kind != "tensor_map"]
    return (*maps, arguments_of(role)(*values))


def _trace_value(parameter: LaunchParameter):
    if parameter.kind in _NUMBERS:
        return _NUMBERS[parameter.kind](1)
    return _dummy_pointer(parameter.element_type)


def _dummy_pointer(element_type: str) -> cute.Pointer:
    dtype, align = _ELEMENTS[element_type]
    return make_ptr(dtype, align, cute.AddressSpace.gmem, assumed_align=align)
