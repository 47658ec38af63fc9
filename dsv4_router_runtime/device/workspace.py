"""Scratch memory, and which stream or capture may use it.

Launches on one stream run one after another, so they share one slot of scratch; two streams, or two
CUDA graphs, may run at once and never share. One workspace serves every layer of a device. Slots
are memory of the driver's, zeroed before their first use; a kernel leaves zeroed scratch zero.

Streams: the first call on a stream takes a slot for it. torch destroys none of its streams, 32 per
priority, so those keep their slots. Of foreign streams the first KEPT_FOREIGN_SLOTS do too;
each launch on a further one records an event, and a new stream takes over a slot whose event is
complete. So 10,000 streams, one after another, take KEPT_FOREIGN_SLOTS + 1 slots. A foreign stream
goes by its id: its handle is given out again once it is destroyed.

Captures: a slot belongs to a capture and to a stream within it, is as large as the launch needs,
and is shared by the launches there that need no more; on a foreign stream, whose handle may come
again within the capture, each launch has its own. It returns when the graph is gone. Memory is
allocated and zeroed under capture as well, on a stream that no capture joins: no graph holds a
memset of scratch. The layer's tensors are kept alive as long as the graph. Captures of layers that
share captured scratch have one slot per stream, which returns with the last of their graphs.

Logits of a matrix product are torch's: they need no zeroing, so a server that unmaps torch's
memory while it sleeps does no harm. Under capture they lie in the graph's own memory pool.

Two limits: capture with torch (torch.cuda.graph, torch.cuda.CUDAGraph), whose allocator supports
capture; and do not run two instances of one captured graph at once: they would share scratch.
"""

from __future__ import annotations

import threading
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from dsv4_router_runtime.artifacts.kernel import POINTER_ELEMENT_BYTES, Kernel
from dsv4_router_runtime.errors import RouterError
from dsv4_router_runtime.locks import is_held_here, refuse_within
from dsv4_router_runtime.parameters import WORKSPACE

from . import driver
from .capture import capture_of, this_thread
from .graph_life import GraphLife
from .memory import DeviceMemory, read, relaxed_on, wait_for_device, zero

ALIGNMENT_BYTES = 256
# The driver maps memory in pieces of 2 MB.
CHUNK_BYTES = 2 * 2**20
KEPT_FOREIGN_SLOTS = 32
# CU_STREAM_PER_THREAD, another stream in each thread and context.
PER_THREAD_STREAM = 2
# So many captures are kept before it is asked which graphs are gone; then twice those alive.
KEPT_CAPTURES = 64


@dataclass(frozen=True, kw_only=True)
class ScratchLayout:
    """Byte offsets of each scratch parameter: zeroed ones in one block, the rest in another."""

    zeroed: tuple[tuple[str, int], ...]
    plain: tuple[tuple[str, int], ...]
    zeroed_bytes: int
    plain_bytes: int

    @property
    def num_bytes(self) -> int:
        return self.zeroed_bytes + self.plain_bytes


def scratch_layout(
    kernels: Iterable[Kernel], problem: tuple[int, int] | None = None
) -> ScratchLayout:
    """Lay out every scratch parameter of `kernels` by name, each at its largest size.

    `problem` (num_tokens, num_experts) reduces the sizes to those that one launch accesses.
    """
    sizes: dict[bool, dict[str, int]] = {True: {}, False: {}}
    for kernel in kernels:
        for parameter in kernel.parameters:
            if parameter.scratch is not None and parameter.element_type is not None:
                size = parameter.scratch.elements * POINTER_ELEMENT_BYTES[parameter.element_type]
                if problem is not None and parameter.name == WORKSPACE.name:
                    size = min(size, kernel.workspace_bytes(*problem))
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


class Pool:
    """Zeroed device memory in chunks, carved into pieces; a piece that returns is zero again."""

    def __init__(self, index: int) -> None:
        self.index = index
        self.chunks: list[DeviceMemory] = []
        # Bytes in use from the start of each chunk, none if it is not there, and pieces given back,
        # by size. An interrupt may leave a chunk without its entry here.
        self._used: dict[DeviceMemory, int] = {}
        self._free: dict[int, list[int]] = {}

    def take(self, size: int) -> int:
        """Return the address of `size` zeroed bytes, a multiple of 256; 0 if `size` is."""
        if size == 0:
            return 0
        if free := self._free.get(size):
            return free.pop()
        for chunk in self.chunks:
            if size <= self._room(chunk):
                break
        else:
            chunk = DeviceMemory(self.index, max(size, CHUNK_BYTES))
            zero(self.index, (chunk.address, chunk.size))
            self.chunks.append(chunk)
        start = self._used.get(chunk, 0)
        self._used[chunk] = start + size
        return chunk.address + start

    def _room(self, chunk: DeviceMemory) -> int:
        return chunk.size - self._used.get(chunk, 0)

    def has(self, size: int) -> bool:
        """Return whether `take` needs no new chunk."""
        return bool(self._free.get(size)) or any(size <= self._room(at) for at in self.chunks)

    def give_back(self, address: int, size: int) -> None:
        if size:
            self._free.setdefault(size, []).append(address)


@dataclass(kw_only=True, eq=False)
class Slot:
    """Scratch for the launches of one stream: the address of each scratch parameter.

    `lock` is held from writing `logits` to launching their reader, so that two threads on one
    stream do not come between. It lets its own thread in again: `is_routing` refuses that.
    """

    addresses: dict[str, int]
    zeroed: int
    plain: int = 0
    # torch's tensor, which the layer's side makes.
    logits: Any = None
    lock: threading.RLock = field(default_factory=threading.RLock)
    # Complete once the last launch is; None for a slot that its stream keeps.
    event: Any = None
    is_evicted: bool = False
    # Whether a launch may have begun that `event` does not tell.
    is_leased: bool = False
    is_routing: bool = False

    def end_lease(self, stream: int) -> None:
        """Let another stream take over the slot once what `stream` has now is complete."""
        if self.event is not None:
            stream = driver.torch_stream(stream)
            recorded = driver.bindings().cuEventRecord(self.event, stream)
            driver.checked("recording the end of a launch", recorded)
        # Not if it was not recorded: the slot then waits for the next call on its stream.
        self.is_leased = False


@dataclass(kw_only=True, eq=False)
class Piece:
    """Memory of a pool for launches that captures recorded on one stream, until they are gone."""

    zeroed: bool
    # A handle, or ~ the thread's number for its own stream, will do: captures that share never run
    # at once. Under capture the driver gives no ids.
    stream: int
    # A launch's on a foreign stream, from 1: its handle may stand for another stream later in the
    # capture, whose branch of the graph runs beside. Launches on a lasting stream have 0 in common,
    # those on a thread's own stream the handle of the context that it belongs to.
    turn: int
    address: int
    size: int
    num_captures: int = 0


# By (zeroed, stream, turn): the largest piece so far.
_Largest = dict[tuple[bool, int, int], Piece]


@dataclass(kw_only=True, eq=False)
class Capture:
    """Memory of a captured graph until it is gone: pieces, its own or shared, and objects."""

    life: GraphLife
    pieces: list[Piece] = field(default_factory=list)
    # Of the pieces that no other capture shares.
    largest: _Largest = field(default_factory=dict)
    # Launches so far on each foreign stream.
    turns: dict[int, int] = field(default_factory=dict)
    pins: dict[int, object] = field(default_factory=dict)


class Workspace:
    """The scratch of GPU `index`. Safe to use from several threads."""

    def __init__(self, index: int, layout: ScratchLayout) -> None:
        self.index = index
        self.layout = layout
        # By the need of zeroing: pieces of plain scratch come back as they are.
        self.pools = {zeroed: Pool(index) for zeroed in (True, False)}
        # Streams of torch's by handle, foreign ones by ~id, the oldest first.
        self.slots: dict[int, Slot] = {}
        self.captures: dict[int, Capture] = {}
        # Of the pieces that captures share.
        self._largest_shared: _Largest = {}
        self._most_captures = KEPT_CAPTURES
        self._lock = threading.RLock()

    def stream_slot(self, stream: int) -> Slot:
        """Return the slot of one of torch's streams; the stream's first call makes it."""
        refuse_within(self._lock)
        with self._lock:
            slot = self.slots.get(stream)
            if slot is None:
                slot = self.slots[stream] = self._new_slot()
        return slot

    def foreign_slot(self, stream: int, identity: int) -> Slot:
        """Return the slot of a foreign stream, which may lose it until the slot is locked.

        Launch with its lock held and `is_leased` set, unless it is evicted, and end the lease.
        """
        refuse_within(self._lock)
        with self._lock:
            slot = self.slots.get(~identity)
            if slot is None:
                slot = self.slots[~identity] = self._foreign_slot(stream)
        return slot

    def _foreign_slot(self, stream: int) -> Slot:
        foreign = [key for key in self.slots if key < 0]
        if len(foreign) < KEPT_FOREIGN_SLOTS:
            return self._new_slot()
        with relaxed_on(self.index) as cuda:
            for key in foreign:
                self._evict_if_done(cuda, key)
        # Made first: if the driver makes none, no scratch has been taken.
        event = _event_on(stream)
        slot = self._new_slot()
        slot.event = event
        return slot

    def _evict_if_done(self, cuda: Any, key: int) -> None:
        """Give a slot back if its last launch has ended, whether or not its stream is alive."""
        slot = self.slots[key]
        # This thread's own, within whose call a signal handler makes another?
        if slot.event is None or is_held_here(slot.lock):
            return
        try:
            if not slot.lock.acquire(blocking=False) or slot.is_leased:
                return
            if int(cuda.cuEventQuery(slot.event)[0]) == 0:
                # In this order: after an interrupt a slot that is found is not evicted, for which
                # its stream would look again and again.
                del self.slots[key]
                slot.is_evicted = True
                # Launch sites of the stream that is gone still hold the slot.
                slot.logits = None
                cuda.cuEventDestroy(slot.event)
                self.pools[True].give_back(slot.zeroed, self.layout.zeroed_bytes)
                self.pools[False].give_back(slot.plain, self.layout.plain_bytes)
        finally:
            # An interrupt may come right after `acquire`, and into a function of Python's here.
            if slot.lock._is_owned():  # type: ignore[attr-defined]
                slot.lock.release()

    def _new_slot(self) -> Slot:
        zeroed = self._take(True, self.layout.zeroed_bytes)
        plain = self._take(False, self.layout.plain_bytes)
        return _slot(self.layout, zeroed, plain)

    def _take(self, zeroed: bool, size: int) -> int:
        pool = self.pools[zeroed]
        if not pool.has(size):
            self._release_ended()
        return pool.take(size)

    def captured_slot(
        self,
        stream: int,
        kernel: Kernel,
        problem: tuple[int, int],
        pins: tuple[object, ...],
        *,
        shared: bool,
        is_lasting: bool,
    ) -> Slot:
        """Return a slot for one launch of `problem` that `stream`, the current one, records.

        `pins` stay alive as long as the graph. shared: with the other captures that share.
        is_lasting: the stream's handle never stands for another one.
        """
        layout = scratch_layout([kernel], problem)
        if not (layout.num_bytes or pins):
            return _slot(layout, 0, 0)
        identifier, graph = capture_of(stream)
        refuse_within(self._lock)
        with self._lock:
            capture = self.captures.get(identifier)
            if capture is None:
                # Captures that take no scratch would pile up, and what they keep alive with them.
                if len(self.captures) >= self._most_captures:
                    self._release_ended()
                    self._most_captures = max(KEPT_CAPTURES, 2 * len(self.captures))
                capture = self.captures[identifier] = Capture(life=GraphLife(graph))
            capture.pins.update((id(pin), pin) for pin in pins)
            largest = self._largest_shared if shared else capture.largest
            turn = 0
            if stream == PER_THREAD_STREAM:
                # Two threads' streams may join one capture, and one thread's of two contexts.
                stream, turn = ~this_thread.number, driver.current_context()
            elif not is_lasting:
                turn = capture.turns[stream] = capture.turns.get(stream, 0) + 1
            at = stream, turn
            zeroed = self._captured_piece(capture, largest, (True, *at), layout.zeroed_bytes)
            plain = self._captured_piece(capture, largest, (False, *at), layout.plain_bytes)
        return _slot(layout, zeroed, plain)

    def _captured_piece(
        self, capture: Capture, largest: _Largest, key: tuple[bool, int, int], size: int
    ) -> int:
        """Return the address of `size` bytes of the largest piece, or of a new one, for a capture.

        A graph that was recorded with a smaller piece keeps it.
        """
        if size == 0:
            return 0
        zeroed, stream, turn = key
        piece = largest.get(key)
        if piece is None or piece.size < size:
            address = self._take(zeroed, size)
            piece = Piece(zeroed=zeroed, stream=stream, turn=turn, address=address, size=size)
            largest[key] = piece
        if piece not in capture.pieces:
            # In this order: an interrupt may keep a piece too long, and gives none back too early.
            piece.num_captures += 1
            capture.pieces.append(piece)
        return piece.address

    def release_ended(self) -> None:
        """Take back the memory of graphs that are gone, but not within a call that takes some."""
        if is_held_here(self._lock):
            return
        with self._lock:
            self._release_ended()

    def _release_ended(self) -> None:
        ended = [key for key, capture in self.captures.items() if capture.life.has_ended()]
        for key in ended:
            for piece in self.captures.pop(key).pieces:
                piece.num_captures -= 1
                if piece.num_captures == 0:
                    self._give_back(piece)

    def _give_back(self, piece: Piece) -> None:
        key = piece.zeroed, piece.stream, piece.turn
        if self._largest_shared.get(key) is piece:
            del self._largest_shared[key]
        self.pools[piece.zeroed].give_back(piece.address, piece.size)


def _slot(layout: ScratchLayout, zeroed: int, plain: int) -> Slot:
    addresses = {name: zeroed + offset for name, offset in layout.zeroed}
    addresses |= {name: plain + offset for name, offset in layout.plain}
    return Slot(addresses=addresses, zeroed=zeroed, plain=plain)


def _event_on(stream: int) -> Any:
    """Return an event for `stream`, which has to come from the stream's own context."""
    cuda = driver.bindings()
    context = driver.checked(
        "asking for the stream's context", cuda.cuStreamGetCtx(driver.torch_stream(stream))
    )
    driver.checked("making the stream's context current", cuda.cuCtxPushCurrent(context))
    try:
        flag = cuda.CUevent_flags.CU_EVENT_DISABLE_TIMING
        return driver.checked("making an event", cuda.cuEventCreate(flag))
    finally:
        cuda.cuCtxPopCurrent()


_workspaces: dict[tuple[int, ScratchLayout], Workspace] = {}
_workspaces_lock = threading.RLock()


def workspace_for(index: int, kernels: Iterable[Kernel]) -> Workspace:
    """Return the workspace that all layers on GPU `index` with such kernels share."""
    layout = scratch_layout(kernels)
    with _workspaces_lock:
        return _workspaces.setdefault((index, layout), Workspace(index, layout))


def workspaces_on(index: int) -> list[Workspace]:
    """Return the workspaces of GPU `index`, one for each set of kernels."""
    with _workspaces_lock:
        # A copy: a signal handler may bind within this loop.
        return [each for each in list(_workspaces.values()) if each.index == index]


def idle_workspaces(index: int) -> list[Workspace]:
    """Wait for GPU `index`, and return its workspaces without the scratch of ended graphs."""
    spaces = workspaces_on(index)
    if spaces:
        wait_for_device(index)
    for space in spaces:
        space.release_ended()
    return spaces


def check_zeroed(index: int) -> None:
    """Wait for GPU `index`; RouterError names the first slot whose zeroed scratch is not zero."""
    for space in idle_workspaces(index):
        for chunk in space.pools[True].chunks:
            content = read(index, chunk.address, chunk.size)
            if content.count(0) != chunk.size:
                at = next(at for at, byte in enumerate(content) if byte)
                raise RouterError(
                    f"{_owner(space, chunk.address + at)}: expected zeroed scratch (got byte "
                    f"{content[at]:#04x} at address {chunk.address + at:#x}); a launch would route "
                    "wrongly or fail: call dsv4_router_runtime.reset()"
                )


def _owner(space: Workspace, address: int) -> str:
    """Name the slot that `address` lies in."""
    for key, slot in space.slots.items():
        if slot.zeroed <= address < slot.zeroed + space.layout.zeroed_bytes:
            return f"stream {key:#x}" if key >= 0 else f"foreign stream with id {~key}"
    for identifier, capture in space.captures.items():
        for piece in capture.pieces:
            if piece.address <= address < piece.address + piece.size:
                sharing = piece.num_captures
                share = "" if sharing == 1 else f", whose scratch {sharing} captures share"
                return f"capture {identifier}{share}"
    return "scratch of no stream and no capture"
