"""A kernel's launch parameters as one NamedTuple, made from the runtime's table."""

from functools import cache
from typing import NamedTuple

import cutlass.cute as cute
from cutlass import BFloat16, Float32, Int32, Uint8, Uint32
from cutlass.cute.runtime import make_ptr

from dsv4_router_runtime.parameters import ABI, LaunchParameter

_NUMBERS = {"int32": Int32, "float32": Float32}
# DSL type and guaranteed alignment in bytes of what a pointer's elements are.
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

    A kernel takes them as one value and passes them on whole, so a new parameter appears in no
    signature. Pointers are `cute.Pointer`s to the table's element type.
    """
    fields = [
        (parameter.name, _NUMBERS.get(parameter.kind, cute.Pointer))
        for parameter in ABI[role]
        if parameter.kind != "tensor_map"
    ]
    return NamedTuple("Arguments", fields)


def trace_arguments(role: str) -> tuple:
    """Make what `__call__` of a kernel is traced with: a pointer per tensor map, then `Arguments`.

    The pointers are null: tracing reads their types only, so it needs no GPU.
    """
    maps = [_null_pointer("bfloat16") for item in ABI[role] if item.kind == "tensor_map"]
    values = [_trace_value(item) for item in ABI[role] if item.kind != "tensor_map"]
    return (*maps, arguments_of(role)(*values))


def _trace_value(parameter: LaunchParameter):
    if parameter.kind in _NUMBERS:
        return _NUMBERS[parameter.kind](1)
    return _null_pointer(parameter.element_type)


def _null_pointer(element_type: str) -> cute.Pointer:
    dtype, align = _ELEMENTS[element_type]
    # The value is no address: it is never read.
    return make_ptr(dtype, align, cute.AddressSpace.gmem, assumed_align=align)
