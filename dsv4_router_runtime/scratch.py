"""The memory that this package holds on a GPU: its sizes, its check and its reset.

A server calls these after sleep and wake, after a fault, or to see the routers' memory.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from .device import driver
from .device.capture import CALL_OUTSIDE, refuse_under_capture
from .device.memory import allocated_bytes, zero
from .device.occupancy import Fallback, fallbacks
from .device.workspace import check_zeroed, idle_workspaces, workspaces_on


@dataclass(frozen=True, kw_only=True)
class Status:
    """Memory of this package on one GPU; `dataclasses.asdict` of it is JSON.

    streams             streams that have a slot of scratch
    bytes_per_stream    bytes of one such slot
    captures            graphs that are alive, or may be, and hold scratch or a layer's tensors
    capture_slots       slots of scratch that these hold, a shared one counted once
    capture_bytes       bytes of these slots
    scratch_bytes       bytes of all scratch, also of that free for the next capture
    prefill_bytes       bytes of the logits of matrix products, outside graphs
    driver_bytes        bytes taken from the driver: scratch, and private copies of layers
    fallbacks           kernels whose cluster did not fit a context, and those taken instead

    A graph holds launches alone; of calls that take a matrix product, and after a fallback, it
    holds the nodes of torch.mm too.
    """

    device: str
    streams: int
    bytes_per_stream: int
    captures: int
    capture_slots: int
    capture_bytes: int
    scratch_bytes: int
    prefill_bytes: int
    driver_bytes: int
    fallbacks: tuple[Fallback, ...]


def status(device: torch.device | int | str | None = None) -> Status:
    """Return the memory of this package on a GPU (torch's current one if None)."""
    index = _usable_gpu(device)
    spaces = workspaces_on(index)
    for space in spaces:
        space.release_ended()
    slots = [slot for space in spaces for slot in list(space.slots.values())]
    captures = [capture for space in spaces for capture in list(space.captures.values())]
    pieces = {piece for capture in captures for piece in capture.pieces}
    layouts = [space.layout for space in spaces]
    pools = [pool for space in spaces for pool in space.pools.values()]
    return Status(
        device=f"cuda:{index}",
        streams=len(slots),
        bytes_per_stream=max((each.num_bytes for each in layouts), default=0),
        captures=len(captures),
        capture_slots=len(pieces),
        capture_bytes=sum(piece.size for piece in pieces),
        scratch_bytes=sum(chunk.size for pool in pools for chunk in pool.chunks),
        prefill_bytes=sum(slot.logits.nbytes for slot in slots if slot.logits is not None),
        driver_bytes=allocated_bytes(index),
        fallbacks=tuple(each for each in fallbacks() if each.device == index),
    )


def check(device: torch.device | int | str | None = None) -> None:
    """Wait for a GPU (torch's current one if None), and check that all zeroed scratch is zero.

    RouterError names the first slot that is not. Words that are left there can only come from a
    fault: memory that was unmapped and mapped anew, a write by another kernel, or a launch that was
    ended. `reset` repairs it. No graph may be under capture meanwhile, in any thread, and no call.
    """
    index = _usable_gpu(device)
    refuse_under_capture("scratch would have to be read", CALL_OUTSIDE)
    check_zeroed(index)


def reset(device: torch.device | int | str | None = None) -> None:
    """Wait for a GPU (torch's current one if None), and zero all scratch where it lies.

    Addresses stay, so captured graphs stay valid. Prefill logits outside graphs are freed. No graph
    may be under capture meanwhile, in any thread, and no call. Copies of weights are the layers':
    see `Router.reset`.
    """
    index = _usable_gpu(device)
    refuse_under_capture("scratch would have to be zeroed", CALL_OUTSIDE)
    for space in idle_workspaces(index):
        zero(
            index,
            *((chunk.address, chunk.size) for chunk in space.pools[True].chunks),
        )
        for slot in list(space.slots.values()):
            with slot.lock:
                slot.logits = None


def _usable_gpu(device: torch.device | int | str | None) -> int:
    driver.refuse_forked_child()
    return gpu_index(device)


def gpu_index(device: torch.device | int | str | None) -> int:
    """Return the index of a GPU that is given as torch takes it; None is torch's current one."""
    if device is None:
        return torch.cuda.current_device()
    if isinstance(device, bool) or not isinstance(device, int | str | torch.device):
        raise TypeError(
            f"device: expected a torch.device, an int, a str or None (got {type(device).__name__})"
        )
    if isinstance(device, int):
        index = device
    else:
        given = torch.device(device)
        if given.type != "cuda":
            raise ValueError(f"device: expected a CUDA device (got {given})")
        index = torch.cuda.current_device() if given.index is None else given.index
    # torch takes any number; nothing lies on a GPU that is not there, so that a check would pass.
    count = torch.cuda.device_count()
    if not 0 <= index < count:
        allowed = f"one of the {count} GPUs that this process sees, counted from 0"
        raise ValueError(f"device: expected {allowed} (got {index})")
    return index
