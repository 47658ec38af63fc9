"""The parts that checks of single arguments share, and the form of their errors.

TypeError for a wrong kind of object or dtype, ValueError for the rest; each message names the
argument, the expected value and the one that was got.
"""

from __future__ import annotations

from typing import Any

import torch

FP32_MAX = torch.finfo(torch.float32).max
FP32_LEAST_NORMAL = torch.finfo(torch.float32).tiny


def check_tensor(
    name: str, tensor: Any, *dtypes: torch.dtype, rank: int | None, device: Any = None
) -> None:
    """Refuse all but a dense tensor of one of `dtypes`, with `rank` dimensions, on `device`.

    None for a rank or a device takes any.
    """
    if not isinstance(tensor, torch.Tensor):
        raise TypeError(f"{name}: expected a torch.Tensor (got {type(tensor).__name__})")
    if tensor.dtype not in dtypes:
        expected = " or ".join(str(dtype) for dtype in dtypes)
        raise TypeError(f"{name}: expected dtype {expected} (got {tensor.dtype})")
    if rank is not None and tensor.dim() != rank:
        raise wrong(name, f"{rank} dimension{'s' if rank > 1 else ''}", shape_of(tensor))
    if tensor.layout is not torch.strided:
        raise wrong(name, "a dense tensor", f"layout {tensor.layout}")
    if device is not None and tensor.device != device:
        raise wrong(name, f"device {device}, where W_gate is", f"device {tensor.device}")
    if not tensor.is_meta:
        check_memory(name, tensor)


def check_memory(name: str, tensor: torch.Tensor) -> None:
    """Raise TypeError unless the tensor has an address.

    Tensors that torch traces with (fake, functional, batched) have none, nor has a tensor whose
    storage was freed. A launch would pass 0, and the GPU would read there.
    """
    # First, since a fake tensor's data_ptr warns, and then returns 0.
    fake = getattr(tensor, "fake_mode", None) is not None
    try:
        if not fake and (tensor.data_ptr() or not tensor.numel()):
            return
    except RuntimeError:
        fake = True
    kind = f"a {type(tensor).__name__} that torch traces with" if fake else "address 0"
    raise TypeError(
        f"{name}: expected a tensor with memory (got {kind}); a Router launches on addresses, so "
        "torch.export, and torch.compile with fullgraph=True, cannot trace it. Trace the operators "
        "of dsv4_router_runtime.integrations.torch_op, or call it through torch.compiler.disable"
    )


def check_vector(
    name: str, vector: Any, *dtypes: torch.dtype, length: int, each: str, device: Any
) -> None:
    """Refuse all but a `check_tensor` of shape [length] with unit stride, an element per `each`."""
    check_tensor(name, vector, *dtypes, rank=1, device=device)
    if vector.shape[0] != length:
        raise wrong(name, f"shape [{length}], one for each {each}", shape_of(vector))
    if vector.stride(0) != 1 and length > 1:
        raise wrong(name, "unit stride (call .contiguous())", strides_of(vector))


def check_bool(name: str, value: Any) -> None:
    """Raise TypeError unless `value` is True or False."""
    if not isinstance(value, bool):
        raise TypeError(f"{name}: expected a bool (got {type(value).__name__})")


def check_int(name: str, value: Any, low: int, high: int) -> int:
    if not isinstance(value, int) or isinstance(value, bool):
        raise TypeError(f"{name}: expected an int (got {type(value).__name__})")
    if not low <= value <= high:
        raise wrong(name, f"{low}..{high}", number(value))
    return value


def check_float(name: str, value: Any, low: float, high: float) -> float:
    if not isinstance(value, int | float) or isinstance(value, bool):
        raise TypeError(
            f"{name}: expected a float (got {type(value).__name__}); a tensor would have to be "
            "read by the host, so pass its .item()"
        )
    # An int is compared as it is: Python's float() overflows above 1.8e308. NaN fails both sides.
    if not low <= value <= high:
        allowed = f"a finite number in FP32's range, {low:.9g}..{high:.9g}"
        raise wrong(name, allowed, number(value))
    return float(value)


def wrong(argument: str, expected: str, got: str) -> ValueError:
    return ValueError(f"{argument}: expected {expected} (got {got})")


def number(value: int | float) -> str:
    # Python refuses to print an int of more than 4300 digits.
    if isinstance(value, int) and value.bit_length() > 128:
        return f"an int of {value.bit_length()} bits"
    return str(value)


def shape_of(tensor: torch.Tensor) -> str:
    return f"shape {list(tensor.shape)}"


def strides_of(tensor: torch.Tensor) -> str:
    return f"shape {list(tensor.shape)} with strides {tensor.stride()}"
