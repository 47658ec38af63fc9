"""Scratch memory, and which stream or capture may use it.

Launches on one stream run one after another, so they share one set of scratch; two streams, or two
CUDA graphs, may run at once and never share. One workspace serves every layer of a device.

Outside capture: one slot for each stream handle, allocated and zeroed on that stream by its first
call, kept for good; the prefill logits grow when a larger N arrives.

Under capture: a slot belongs to the capture's id, which is unique in the process, and to the stream
within it. Scratch that needs no zeroing is taken from torch under capture, so it lies in the
graph's own memory pool and lives as long as the graph. Zeroed scratch comes from a reserve that was
zeroed before, outside capture: a kernel leaves it zero, so that no memset enters the graph, and no
two captures ever get the same piece (it is never given back: nothing says when a graph is gone).
The reserve is topped up when a layer is bound outside capture. A capture that finds it empty takes
memory of the graph's own and records one memset of it, which then runs in each replay before the
graph's first router: 1 or 2 us a replay slower, and as right.

Two limits: capture with torch (torch.cuda.graph, torch.cuda.CUDAGraph), whose allocator supports
capture; and do not run two instances of one captured graph at once: they would share scratch.
"""

from __future__ import annotations

import threading
from collections.abc import Iterable
from dataclasses import dataclass, field

import torch

from dsv4_router_runtime.artifacts.kernel import POINTER_ELEMENT_BYTES, Kernel

from .streams import capture_id, stream_identity, wait_for_current_stream

ALIGNMENT_BYTES = 256
# A decode workspace is 256 KB, so 128 captures take 34 MB. All layers of a capture share one, and
# a server captures each batch size once.
RESERVE_SLOTS = 128
RESERVE_LOW = 32


@dataclass(frozen=True, kw_only=True)
class ScratchLayout:
    """Byte offsets of each scratch parameter: zeroed ones in one block, the rest in another."""

    zeroed: tuple[tuple[str, int], ...]
    plain: tuple[tuple[str, int], ...]
    zeroed_bytes: int
    plain_bytes: int


def scratch_layout(kernels: Iterable[Kernel]) -> ScratchLayout:
    """Lay out every scratch parameter of `kernels` by name, each at its largest size."""
    sizes: dict[bool, dict[str, int]] = {True: {}, False: {}}
    for kernel in kernels:
        for parameter in kernel.parameters:
            if parameter.scratch is not None and parameter.element_type is not None:
                size = parameter.scratch.elements * POINTER_ELEMENT_BYTES[parameter.element_type]
                known = sizes[parameter.scratch.zeroed]
                known[parameter.name] = max(size, known.get(parameter.name, 0))
    zeroed, zeroed_bytes = _offsets(sizes[True])
    plain, plain_bytes = _offsets(sizes[False])
    return ScratchLayout(
        zeroed=zeroed, plain=plain, zeroed_bytes=zeroed_bytes, plain_bytes=plain_bytes
    )


def _offsets(sizes: dict[str, int]) -> tuple[tuple[tuple[str, int], ...], int]:
    placed = []
    end = 0
    for name, size in sorted(sizes.items()):
        placed.append((name, end))
        end += -(-size // ALIGNMENT_BYTES) * ALIGNMENT_BYTES
    return tuple(placed), end


@dataclass(kw_only=True)
class Slot:
    """Scratch for the launches of one stream: the address of each scratch parameter.

    `lock` is held from writing `logits` to launching what reads them, so that two threads on one
    stream do not come between.
    """

    addresses: dict[str, int]
    # What keeps the addresses alive.
    tensors: list[torch.Tensor] = field(default_factory=list)
    logits: torch.Tensor | None = None
    lock: threading.Lock = field(default_factory=threading.Lock)


class Workspace:
    """The scratch of one device. Safe to use from several threads."""

    def __init__(self, device: torch.device, layout: ScratchLayout) -> None:
        self.device = device
        self.layout = layout
        self._lock = threading.Lock()
        self._slots: dict[int, Slot] = {}
        self._captured: dict[tuple[int, int], int] = {}
        # By stream, the capture that found the reserve empty and the memory it zeroes by itself:
        # kept until another capture on the stream, so that torch does not hand it out within this.
        self._recorded: dict[int, tuple[int, torch.Tensor]] = {}
        self._reserve: list[torch.Tensor] = []
        self._free: list[int] = []

    def refill(self) -> None:
        """Top up the zeroed reserve; outside capture only, since it waits for the zeroing."""
        with self._lock:
            if self.layout.zeroed_bytes == 0 or len(self._free) >= RESERVE_LOW:
                return
            size = self.layout.zeroed_bytes
            chunk = self._zeros(RESERVE_SLOTS * size)
            wait_for_current_stream(self.device)
            self._reserve.append(chunk)
            self._free += range(chunk.data_ptr(), chunk.data_ptr() + chunk.numel(), size)

    def eager_slot(self, stream: int) -> Slot:
        """Return the slot of `stream`, the current one; the stream's first call makes it."""
        identity = stream_identity(stream)
        slot = self._slots.get(identity)
        if slot is None:
            # Zeroed on the stream that will use it, so no other synchronisation is needed.
            zeroed, plain = self._zeros(self.layout.zeroed_bytes), self._empty_plain()
            addresses = self._addresses(zeroed.data_ptr(), plain.data_ptr())
            slot = Slot(addresses=addresses, tensors=[zeroed, plain])
            with self._lock:
                slot = self._slots.setdefault(identity, slot)
            self.refill()
        return slot

    def captured_slot(self, stream: int) -> Slot:
        """Return a slot for one launch that `stream`, the current one, records into a graph."""
        plain = self._empty_plain()
        with self._lock:
            zeroed = self._captured_zeroed(stream, capture_id(stream))
        return Slot(addresses=self._addresses(zeroed, plain.data_ptr()), tensors=[plain])

    def _captured_zeroed(self, stream: int, capture: int) -> int:
        """Return the zeroed scratch of `stream` in `capture`, one address for all its layers."""
        known = self._captured.get((stream, capture))
        if known is not None:
            return known
        recorded = self._recorded.get(stream)
        if recorded is not None and recorded[0] == capture:
            return recorded[1].data_ptr()
        if self._free:
            return self._captured.setdefault((stream, capture), self._free.pop())
        memory = self._zeros(self.layout.zeroed_bytes)
        self._recorded[stream] = (capture, memory)
        return memory.data_ptr()

    def logits(self, slot: Slot, num_tokens: int, num_experts: int) -> torch.Tensor:
        """Return FP32 [num_tokens, num_experts], uninitialised; call it under `slot.lock`."""
        size = num_tokens * num_experts
        if slot.logits is None or slot.logits.numel() < size:
            slot.logits = self._empty(size, torch.float32)
        return slot.logits[:size].view(num_tokens, num_experts)

    def _addresses(self, zeroed: int, plain: int) -> dict[str, int]:
        return {name: zeroed + offset for name, offset in self.layout.zeroed} | {
            name: plain + offset for name, offset in self.layout.plain
        }

    def _empty_plain(self) -> torch.Tensor:
        return self._empty(self.layout.plain_bytes)

    # Made outside inference mode, whatever the caller's mode: an inference tensor could not be
    # written by a later call that is not in that mode.
    def _empty(self, size: int, dtype: torch.dtype = torch.uint8) -> torch.Tensor:
        with torch.inference_mode(False):
            return torch.empty(size, dtype=dtype, device=self.device)

    def _zeros(self, size: int) -> torch.Tensor:
        with torch.inference_mode(False):
            return torch.zeros(size, dtype=torch.uint8, device=self.device)


_workspaces: dict[tuple[torch.device, ScratchLayout], Workspace] = {}
_workspaces_lock = threading.Lock()


def workspace_for(device: torch.device, kernels: Iterable[Kernel]) -> Workspace:
    """Return the workspace that all layers on `device` with such kernels share."""
    layout = scratch_layout(kernels)
    with _workspaces_lock:
        workspace = _workspaces.get((device, layout))
        if workspace is None:
            workspace = _workspaces[device, layout] = Workspace(device, layout)
    return workspace
