"""Scratch, private copies and bound tensors: whose memory, how much, how long, and when refused.

The driver is a fake in host memory, see fake_driver.
"""

from __future__ import annotations

import contextlib
import copy
import ctypes
import gc
import itertools
import json
import os
import sys
import threading
from dataclasses import asdict, replace
from functools import partial
from types import SimpleNamespace

import pytest

pytest.importorskip("torch", reason="torch is the caller's and is not installed here")

import torch
from conftest import decode_kernel, sample_kernel, sample_manifest, topk_kernel
from fake_driver import GLOBAL
from gpu_recorder import (
    site_table_of,
    sites_of,
    table_of,
    w_copy_of,
    workspace_of,
)
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.multiprocessing.reductions import StorageWeakRef

from build_kernels.kernels import shapes
from build_kernels.specs import KERNELS
from dsv4_router_runtime import Router, binding, check, reset, scratch, status, steps
from dsv4_router_runtime.artifacts.folder import ArtifactSet
from dsv4_router_runtime.artifacts.kernel import Parameter, Scratch
from dsv4_router_runtime.device import workspace
from dsv4_router_runtime.device.launch_site import LaunchSite
from dsv4_router_runtime.errors import DriverError, RouterError
from dsv4_router_runtime.explain import Question, as_text, explain
from dsv4_router_runtime.integrations.bound_layers import bind_router
from dsv4_router_runtime.parameters import workspace_bytes

K, E, TOP_K = 512, 384, 6
MIB = 2**20
# The workspaces of the built kernels; a layer's has room for the larger.
DECODE_BYTES = shapes.workspace_bytes(shapes.MAX_DECODE_TOKENS)
STREAM_BYTES = shapes.workspace_bytes(shapes.MAX_PREFILL_TOKENS)


def with_workspace(kernel):
    """The sample kernel with the scratch of the built one."""
    [spec] = [spec for spec in KERNELS if spec.name == kernel.name]
    kept = [p for p in kernel.parameters if p.scratch is None]
    own = [Parameter(**vars(p), offset=0, size=8) for p in spec.parameters if p.scratch]
    return replace(kernel, parameters=tuple(kept + own))


@pytest.fixture
def artifacts(tmp_path):
    manifest = sample_manifest()
    kernels = tuple(with_workspace(kernel) for kernel in manifest.kernels)
    return ArtifactSet(folder=tmp_path, manifest=replace(manifest, kernels=kernels))


@pytest.fixture
def make(gpu, artifacts):
    def made(e=E, emajor=False, W=None, **more) -> Router:
        # No view of another tensor, which would keep the memory.
        plain = torch.empty_strided(
            (K, e), (e, 1) if emajor else (1, K), dtype=torch.bfloat16
        ).zero_()
        bias = None if "tid2eid" in more else torch.zeros(e)
        given = {"top_k": TOP_K, "routed_scaling_factor": 2.5, "artifacts": artifacts} | more
        return Router(plain if W is None else W, bias, **given)

    return made


def step(num_tokens):
    x = torch.zeros(num_tokens, K, dtype=torch.bfloat16)
    return x, torch.zeros(num_tokens, TOP_K), torch.zeros(num_tokens, TOP_K, dtype=torch.int32)


def hash_table(first=0, vocab=20):
    return torch.arange(first, first + TOP_K).repeat(vocab, 1)


# ------------------------------------------------------------------ sizes


def with_scratch(kernel, **elements):
    """The kernel with the sizes of some of its scratch parameters changed."""
    parameters = tuple(
        replace(p, scratch=Scratch(elements=elements[p.name], zeroed=p.scratch.zeroed))
        if p.name in elements
        else p
        for p in kernel.parameters
    )
    return replace(kernel, parameters=parameters)


@pytest.mark.parametrize("order", [1, -1])
def test_scratch_of_a_name_is_as_large_as_any_kernel_wants_it(order):
    """Sizes differ from kernel to kernel, and none fills its last 256 bytes."""
    small = with_scratch(decode_kernel(tile=8), partials=65, counters=3)
    large = with_scratch(decode_kernel(tile=64), partials=129, counters=65)
    layout = workspace.scratch_layout([small, topk_kernel(), large][::order])
    assert (layout.plain, layout.plain_bytes) == ((("partials", 0),), 768)
    assert (layout.zeroed, layout.zeroed_bytes) == ((("counters", 0),), 512)


def test_each_scratch_starts_on_256_bytes():
    kernel = with_scratch(decode_kernel(), partials=65, counters=3)
    renamed = tuple(
        replace(p, name={"partials": "aside", "counters": "begun"}.get(p.name, p.name))
        for p in kernel.parameters
    )
    layout = workspace.scratch_layout([kernel, replace(kernel, parameters=renamed)])
    assert layout.plain == (("aside", 0), ("partials", 512))
    assert layout.zeroed == (("begun", 0), ("counters", 256))
    assert (layout.plain_bytes, layout.zeroed_bytes) == (1024, 512)


@pytest.mark.parametrize(
    ("num_tokens", "num_experts", "size"),
    [
        (64, 64, 0),
        (1, 65, 256 + 1024),
        (8, 384, 256 + 24576),
        (64, 512, DECODE_BYTES),
        # Prefill: 1920 tickets, then candidates of whole tiles of 128 experts.
        (65, 60, 7680 + 65 * 1024),
        (65, 384, 7680 + 65 * 3072),
        (256, 384, 7680 + 256 * 3072),
        (896, 128, 7680 + 896 * 1024),
        (128, 512, 7680 + 128 * 4096),
        # A product, whose kernel has no scratch.
        (641, 384, 0),
    ],
)
def test_scratch_is_what_explain_says(gpu, make, artifacts, num_tokens, num_experts, size):
    question = Question(num_tokens=num_tokens, k=K, num_experts=num_experts, top_k=TOP_K)
    explained = explain(artifacts, question, "sm_90a")
    bound = make(num_experts)
    gpu.capture = 1
    bound(*step(num_tokens))
    assert explained.capture_bytes == status().capture_bytes == size
    # A stream's slot serves every kernel, whichever this call takes.
    assert explained.scratch_bytes == status().bytes_per_stream == STREAM_BYTES
    assert f"scratch: {STREAM_BYTES} bytes per stream" in as_text(explained)
    assert f"scratch: {size} bytes per captured graph" in as_text(explained)


# ------------------------------------------------------------------ streams


def test_scratch_is_the_drivers_and_zeroed(gpu, make):
    """Fresh memory of the fake driver holds 0x7F, and torch's is not in its list."""
    make()(*step(4))
    address = gpu.last["workspace"]
    assert ctypes.string_at(address, STREAM_BYTES) == bytes(STREAM_BYTES)
    [start] = gpu.driver.memory
    assert start <= address < start + len(gpu.driver.memory[start])


def test_a_bind_and_a_first_call_leave_a_capture_in_another_thread_alone(gpu, make):
    gpu.driver.captured_elsewhere = True
    table = hash_table()
    bound = make(tid2eid=table, emajor=True)
    bound(*step(4), input_ids=torch.zeros(4, dtype=torch.int32))
    make()(*step(4))
    bound.reset()
    del bound
    gc.collect()
    assert gpu.driver.broken_captures == 0
    assert gpu.driver.cuThreadExchangeStreamCaptureMode(GLOBAL) == (0, GLOBAL)


FOUR = step(4)


def call_on(gpu, router, stream, given=FOUR) -> int:
    gpu.stream = stream
    gpu.foreign.add(stream)
    router(*given)
    return gpu.last["workspace"]


def test_a_stream_that_has_anothers_handle_has_scratch_of_its_own(gpu, make):
    bound = make()
    first = call_on(gpu, bound, 0x900)
    assert call_on(gpu, bound, 0x900) == first
    gpu.driver.reuse(0x900)
    assert call_on(gpu, bound, 0x900) != first


@pytest.mark.parametrize("share", [False, True])
def test_a_stream_that_has_anothers_handle_in_a_capture_has_scratch_of_its_own(gpu, make, share):
    """A handle stood for one stream, then another, whose branches of the graph may run at once.

    Graphs that share scratch never run at once: the next one has that of the first.
    """
    bound, seen = make(share_captured_scratch=share), {1: [], 2: []}
    for gpu.capture in seen:
        for _ in range(3):
            seen[gpu.capture].append(call_on(gpu, bound, 0x900))
    assert len({*seen[1]}) == len({*seen[2]}) == 3
    assert len({*seen[1], *seen[2]}) == (3 if share else 6)


def test_a_thread_that_has_anothers_identifier_has_scratch_of_its_own(gpu, make):
    bound = make()
    first = call_on(gpu, bound, 2)
    gpu.driver.reuse((2, threading.get_ident()))
    assert call_on(gpu, bound, 2) != first


@pytest.mark.slow
def test_ten_thousand_streams_do_not_keep_ten_thousand_slots(gpu, make):
    bound = make()
    for stream in range(0x1000, 0x1000 + 10_000):
        call_on(gpu, bound, stream)
    assert status().streams == workspace.KEPT_FOREIGN_SLOTS + 1
    # 33 slots, each for the 1920 tokens of a launch.
    assert status().scratch_bytes < 256 * MIB
    assert len(gpu.driver.events) == 1
    assert len(sites_of(bound)) < 300


def test_a_site_that_another_thread_adds_meanwhile_does_no_harm(gpu, make, monkeypatch):
    monkeypatch.setattr(steps, "MAX_SITES", 1)
    bound = make()
    call_on(gpu, bound, 0x900)
    sites = site_table_of(bound)
    ((key, site),) = sites.items()

    class Slot:
        """A slot that is looked at while another thread's call comes."""

        @property
        def is_evicted(self) -> bool:
            sites[len(sites), 0, False] = site
            return True

    sites[-1, 0, False] = SimpleNamespace(slot=Slot())
    call_on(gpu, bound, 0xA00)
    assert site_table_of(bound)[key] is site
    assert (-1, 0, False) not in site_table_of(bound)


def test_the_logits_of_streams_that_are_gone_are_freed(gpu, make):
    bound, given = make(), step(700)
    for gpu.stream in range(0x1000, 0x1000 + 200):
        gpu.foreign.add(gpu.stream)
        bound(*given)
    held = {id(site.slot): site.slot.logits for site in sites_of(bound)}.values()
    most = (workspace.KEPT_FOREIGN_SLOTS + 1) * 700 * E * 4
    assert sum(each.nbytes for each in held if each is not None) == most
    assert status().prefill_bytes == most


@pytest.mark.parametrize(("stream", "foreign"), [(2, True), (0x900, True), (0x70, False)])
def test_logits_that_grow_on_a_foreign_stream_are_given_back_after_its_work(
    gpu, make, monkeypatch, stream, foreign
):
    """torch keeps free memory by handle, and two threads' own streams have one."""
    bound, waits, kept = make(), [], []

    def wait(device) -> None:
        waits.append(not kept[-1].expired())

    monkeypatch.setattr(binding, "wait_for_current_stream", wait)
    # The recorder would keep the logits.
    monkeypatch.setattr(binding, "multiply", lambda x, w, out, transposed: None)
    gpu.stream = stream
    gpu.foreign = {stream} if foreign else set()
    for num_tokens in (700, 900, 700):
        bound(*step(num_tokens))
        (slot,) = {id(site.slot): site.slot for site in sites_of(bound)}.values()
        kept.append(StorageWeakRef(slot.logits.untyped_storage()))
    assert waits == [True] * foreign


@pytest.mark.parametrize(("stream", "own"), [(2, True), (0x900, True), (0x70, False)])
def test_logits_of_a_foreign_stream_are_no_memory_that_another_gave_back(
    gpu, make, monkeypatch, stream, own
):
    """The null stream of a green context has the handle of the primary context's."""
    bound, given, empty, on, seen = make(), step(700), torch.empty, [], []

    @contextlib.contextmanager
    def on_memory_stream(device):
        on.append(device)
        yield
        on.pop()

    def allocate(*size, **more):
        seen.append(bool(on))
        return empty(*size, **more)

    monkeypatch.setattr(binding, "on_memory_stream", on_memory_stream)
    monkeypatch.setattr(torch, "empty", allocate)
    gpu.stream = stream
    gpu.foreign = {stream} if own else set()
    bound(*given)
    assert seen == [own]


@pytest.mark.parametrize("fails", [False, True])
def test_a_stream_waits_for_what_an_allocation_of_its_logits_brought(monkeypatch, fails):
    """torch fills new memory with NaN if algorithms are deterministic.

    With cudaMallocAsync, the stream that allocates may wait for memory that another gives back. An
    event has to be of its stream's context, and handle 0 stands for a stream of the current one.
    """
    done, context = [], ["green"]

    def record() -> str:
        done.append(f"record in {context[-1]}")
        return "ready"

    def wait(event: str) -> None:
        done.append(f"wait for {event} in {context[-1]}")

    memory = SimpleNamespace(name="memory", record_event=record)
    current = [SimpleNamespace(name="the caller's", wait_event=wait)]

    @contextlib.contextmanager
    def within(stack, value):
        stack.append(value)
        try:
            yield
        finally:
            stack.pop()

    monkeypatch.setattr(torch.cuda, "stream", partial(within, current))
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: current[-1])
    monkeypatch.setattr(binding, "_memory_stream", lambda device: memory)
    monkeypatch.setattr(binding, "relaxed_on", lambda index: within(context, f"primary {index}"))
    with pytest.raises(MemoryError) if fails else contextlib.nullcontext():
        with binding.on_memory_stream(torch.device("cuda", 0)):
            done.append(f"allocate on {current[-1].name} in {context[-1]}")
            if fails:
                raise MemoryError
    ready = ["record in primary 0", "wait for ready in green"]
    assert done == ["allocate on memory in primary 0", *([] if fails else ready)]
    assert (len(current), context) == (1, ["green"])


@pytest.mark.parametrize("how", ["fake", "functional"])
def test_a_call_while_torch_traces_leaves_no_traced_logits_behind(gpu, make, how):
    """The stream's later calls, of every layer, would fail, or read logits at address 0."""
    bound, given = make(), step(700)

    def call(x):
        with FakeTensorMode() if how == "fake" else contextlib.nullcontext():
            bound(*given)
        return x

    traced = call if how == "fake" else torch.func.functionalize(call)
    with pytest.raises(TypeError, match="logits: expected a tensor with memory"):
        traced(torch.ones(1))
    assert gpu.launches == []
    bound(*given)
    [launch] = gpu.launches
    assert launch["logits"] != 0
    assert launch["logits"] == gpu.products[-1][2].data_ptr()


def test_an_event_that_the_driver_does_not_make_costs_no_scratch(gpu, make, monkeypatch):
    bound = make()
    for stream in range(0x1000, 0x1000 + workspace.KEPT_FOREIGN_SLOTS):
        call_on(gpu, bound, stream)
    before = status()
    monkeypatch.setattr(gpu.driver, "cuEventCreate", lambda flags: (2, None))
    for stream in range(0x5000, 0x5000 + 100):
        with pytest.raises(DriverError, match="making an event"):
            call_on(gpu, bound, stream)
    assert status() == before


def test_streams_with_work_under_way_keep_their_slots(gpu, make):
    bound = make()
    streams = range(0x1000, 0x1000 + 2 * workspace.KEPT_FOREIGN_SLOTS)
    gpu.driver.busy.update(streams)
    first = {stream: call_on(gpu, bound, stream) for stream in streams}
    assert len(set(first.values())) == len(streams)
    assert {stream: call_on(gpu, bound, stream) for stream in streams} == first
    gpu.driver.busy.clear()
    taken = call_on(gpu, bound, 0x9000)
    assert taken in first.values()
    assert status().streams == workspace.KEPT_FOREIGN_SLOTS + 1
    gpu.driver.busy.update(gpu.foreign)
    # Those that lost theirs come back, and share with nobody.
    again = [call_on(gpu, bound, stream) for stream in streams]
    assert len({*again, taken}) == len(streams) + 1


def test_a_slot_is_not_taken_over_between_lease_and_launch(gpu, make, monkeypatch):
    """Its last launch has ended, and the next one is about to start."""
    bound = make()
    for stream in range(0x1000, 0x1000 + workspace.KEPT_FOREIGN_SLOTS):
        call_on(gpu, bound, stream)
    taken = call_on(gpu, bound, 0x5000)
    launch, others = LaunchSite.launch, []

    def late(site):
        monkeypatch.setattr(LaunchSite, "launch", launch)
        other = make()
        thread = threading.Thread(target=lambda: others.append(call_on(gpu, other, 0x6000)))
        thread.start()
        thread.join()
        launch(site)

    monkeypatch.setattr(LaunchSite, "launch", late)
    call_on(gpu, bound, 0x5000)
    assert gpu.last["workspace"] == taken
    assert others
    assert taken not in others


def test_a_slot_that_was_taken_over_just_before_it_was_locked_is_not_used(gpu, make):
    bound, other = make(), make()
    for stream in range(0x1000, 0x1000 + workspace.KEPT_FOREIGN_SLOTS):
        call_on(gpu, bound, stream)
    taken = call_on(gpu, bound, 0x5000)
    slot = list(workspace_of(bound).slots.values())[-1]
    lock = slot.lock

    class Late:
        """The lock, before which another thread's call comes."""

        acquire, release, __exit__ = lock.acquire, lock.release, lock.__exit__

        def __enter__(self):
            slot.lock = lock
            thread = threading.Thread(target=call_on, args=(gpu, other, 0x6000))
            thread.start()
            thread.join()
            gpu.driver.busy.add(0x6000)
            gpu.stream = 0x5000
            return lock.__enter__()

    slot.lock = Late()
    call_on(gpu, bound, 0x5000)
    between, late = gpu.launches[-2:]
    assert (between["stream"], late["stream"]) == (0x6000, 0x5000)
    assert between["workspace"] == taken != late["workspace"]


# ------------------------------------------------------------------ captures


def used(gpu, num_tokens, e=E) -> int:
    """Return the bytes of the workspace that the last launch accesses."""
    return sample_kernel(*gpu.last["kernel"].split(".")).workspace_bytes(num_tokens, e)


def capture_piecewise(gpu, bound, order) -> list[tuple[int, int]]:
    """Capture calls of these sizes, each a graph, as vLLM does; return the slots of scratch."""
    steps, slots = {num_tokens: step(num_tokens) for num_tokens in set(order)}, []
    for gpu.capture, num_tokens in enumerate(order, start=1):
        bound(*steps[num_tokens])
        if num_tokens <= 640:
            slots.append((gpu.last["workspace"], used(gpu, num_tokens)))
    assert gpu.capture == status().captures == len(order)
    assert all(ctypes.string_at(address, size) == bytes(size) for address, size in slots)
    assert (gpu.driver.memsets, gpu.driver.broken_captures) == (0, 0)
    return sorted(slots)


# Sizes of batches, as vLLM captures them for each layer.
PIECEWISE = [1, 2, 4, *range(8, 65, 8), *range(80, 80 + 16 * 72, 16)]


@pytest.mark.slow
def test_piecewise_graphs_hold_no_memset_and_little_scratch(gpu, make):
    slots = capture_piecewise(gpu, make(), PIECEWISE * 61)
    assert all(low + size <= high for (low, size), (high, _) in itertools.pairwise(slots))
    held = status()
    assert held.capture_slots == 61 * 47
    assert held.capture_bytes == sum(size for _, size in slots)
    # Most of it for prefill, which keeps 3 KB per token where a product keeps no scratch.
    assert sum(size for _, size in slots if size <= 64 * 3072 + 256) <= 64 * MIB
    assert held.driver_bytes == held.scratch_bytes <= 2490 * MIB


@pytest.mark.quick(1)
@pytest.mark.parametrize("largest_first", [True, False])
def test_piecewise_graphs_that_share_hold_less_scratch(gpu, make, largest_first):
    bound = make(share_captured_scratch=True)
    slots = capture_piecewise(gpu, bound, sorted(PIECEWISE * 8, reverse=largest_first))
    held = status()
    sizes = [max(size for _, size in slots)] if largest_first else {size for _, size in slots}
    assert len({address for address, _ in slots}) == held.capture_slots == len(sizes)
    assert held.capture_bytes == sum(sizes)
    # Largest first, as engines capture, one chunk of the driver's memory is enough.
    assert held.driver_bytes == held.scratch_bytes <= (2 if largest_first else 52) * MIB


@pytest.mark.parametrize(("e", "num_tokens"), [(64, 4), (384, 641)])
def test_captures_that_use_no_zeroed_scratch_take_none(gpu, make, e, num_tokens):
    bound = make(e)
    gpu.capture = 1
    bound(*step(num_tokens))
    assert not gpu.last.get("workspace")
    assert status().capture_slots == status().scratch_bytes == 0


def test_launches_of_a_capture_share_the_largest_slot_so_far(gpu, make):
    bound = make()
    gpu.capture = 1
    sizes = []
    for num_tokens in (8, 4, 16, 8, 65, 129, 64):
        bound(*step(num_tokens))
        sizes.append(used(gpu, num_tokens))
    first, smaller, larger, again, *prefill, decode = (item["workspace"] for item in gpu.launches)
    assert first == smaller != larger == again
    assert len({first, larger, *prefill}) == 4
    assert decode == prefill[1]
    assert status().capture_bytes == sizes[0] + sizes[2] + sizes[4] + sizes[5]


def test_pieces_of_a_captured_call_share_a_slot_as_large_as_one_needs(gpu, make, artifacts):
    question = Question(num_tokens=8000, k=K, num_experts=E, top_k=TOP_K, same_bits=True)
    explained = explain(artifacts, question, "sm_90a")
    bound = make(same_bits=True)
    gpu.capture = 1
    for num_tokens in (8000, 4000, explained.step.piece_tokens):
        bound(*step(num_tokens))
    assert len(gpu.launches) > 8
    assert len({each["workspace"] for each in gpu.launches}) == 1
    held = status()
    assert (held.capture_slots, held.capture_bytes) == (1, explained.capture_bytes)
    assert explained.capture_bytes < explained.scratch_bytes
    assert (held.streams, gpu.products) == (0, [])


def call_in(gpu, capture, router, num_tokens=64, stream=0) -> int:
    """Capture a call; return the address of its scratch."""
    gpu.capture, gpu.stream = capture, stream
    router(*step(num_tokens))
    return gpu.last["workspace"]


def test_captures_share_if_their_layers_do_and_on_one_stream(gpu, make):
    sharing = [make(share_captured_scratch=True) for _ in range(2)]
    first = call_in(gpu, 1, sharing[0])
    assert [call_in(gpu, at, router) for at, router in enumerate(sharing, 1)] == [first, first]
    on_another = call_in(gpu, 1, sharing[0], stream=0x70)
    assert call_in(gpu, 3, sharing[1], stream=0x70) == on_another != first
    alone = [call_in(gpu, at, make()) for at in (1, 2, 4)]
    gpu.capture = gpu.stream = 0
    sharing[0](*step(64))
    assert len({*alone, gpu.last["workspace"], first, on_another}) == 6
    held = status()
    assert (held.captures, held.capture_slots, held.streams) == (4, 5, 1)
    assert held.capture_bytes == 5 * used(gpu, 64)


@pytest.mark.parametrize("given", ["no", 1, None])
def test_sharing_is_a_bool(make, given):
    expected = rf"^share_captured_scratch: expected a bool \(got {type(given).__name__}\)"
    layer = torch.zeros(E, K).bfloat16(), torch.zeros(E)
    on_cpu = partial(bind_router, *layer, top_k=TOP_K, routed_scaling_factor=1.0)
    for bind in (make, on_cpu):
        with pytest.raises(TypeError, match=expected):
            bind(share_captured_scratch=given)


def test_a_shared_slot_grows_and_a_graph_keeps_the_smaller_one(gpu, make):
    router = make(share_captured_scratch=True)
    sizes = (8, 4, 16, 8, 65, 64)
    slots = [call_in(gpu, at, router, num_tokens) for at, num_tokens in enumerate(sizes, 1)]
    assert slots[0] == slots[1]
    assert slots[2] == slots[3]
    assert slots[4] == slots[5]
    assert len(set(slots)) == status().capture_slots == 3
    # The first two graphs read the smaller slot until they are gone.
    gpu.driver.destroy_graph(1)
    assert status().capture_slots == 3
    gpu.driver.destroy_graph(2)
    assert (status().captures, status().capture_slots) == (4, 2)
    assert call_in(gpu, 7, make(), 8) == slots[0]
    assert call_in(gpu, 8, router, 8) == slots[4]


def test_a_shared_slot_returns_when_the_last_graph_that_uses_it_is_gone(gpu, make):
    router, alone = make(share_captured_scratch=True), make()
    [shared] = {call_in(gpu, capture, router) for capture in (1, 2, 3)}
    for capture in (1, 3):
        gpu.driver.destroy_graph(capture)
    assert (status().captures, status().capture_slots) == (1, 1)
    assert call_in(gpu, 4, alone) != shared
    assert call_in(gpu, 5, router) == shared
    for capture in (2, 5):
        gpu.driver.destroy_graph(capture)
    assert (status().captures, status().capture_slots) == (1, 1)
    assert call_in(gpu, 6, alone) == shared
    assert call_in(gpu, 7, router) != shared


def test_a_slot_returns_when_its_graph_is_gone(gpu, make):
    bound = make()
    for gpu.capture in range(1, 301):
        bound(*step(64))
    held = status()
    used = {item["workspace"] for item in gpu.launches}
    for capture in range(1, 301):
        gpu.driver.destroy_graph(capture)
    assert (status().captures, status().capture_bytes) == (0, 0)
    for gpu.capture in range(301, 601):
        bound(*step(64))
    assert {item["workspace"] for item in gpu.launches[300:]} == used
    assert status().scratch_bytes == held.scratch_bytes


def test_scratch_of_graphs_that_are_gone_is_taken_before_new(gpu, make):
    bound = make()
    most = workspace.CHUNK_BYTES // workspace_bytes("decode", 64, E, expert_tile=64)
    assert 1 < most < workspace.KEPT_CAPTURES
    for gpu.capture in range(1, 4 * most):
        bound(*step(64))
        gpu.driver.destroy_graph(gpu.capture)
    assert len(gpu.driver.memory) == 1


@pytest.mark.parametrize("num_tokens", [64, 65])
def test_graphs_that_are_gone_do_not_pile_up(gpu, make, num_tokens):
    """With more than 64 tokens none is found gone for want of scratch."""
    bound = make()
    bound(*step(64))
    most = 0
    for gpu.capture in range(1, 2001):
        bound(*step(num_tokens))
        gpu.driver.destroy_graph(gpu.capture)
        most = max(most, len(workspace_of(bound).captures))
    assert most <= workspace.KEPT_CAPTURES


def test_no_memory_under_capture_is_an_error_in_words(gpu, make):
    bound = make()
    gpu.capture = 1
    gpu.driver.full = True
    with pytest.raises(DriverError, match="allocating 2097152 bytes on GPU"):
        bound(*step(4))
    gpu.driver.full = False
    bound(*step(4))
    assert len(gpu.launches) == 1


def test_an_invalidated_capture_is_an_error_in_words(gpu, make, monkeypatch):
    bound = make()
    gpu.capture = 1
    invalidated = (0, 2, 0, 0, (), (), 0)
    monkeypatch.setattr(gpu.driver, "cuStreamGetCaptureInfo", lambda stream: invalidated)
    with pytest.raises(RouterError, match="capture has been invalidated"):
        bound(*step(4))


# ------------------------------------------------------------------ memory's life


@pytest.mark.parametrize("kind", ["weights", "table"])
def test_a_private_copy_lives_as_long_as_a_graph_that_reads_it(gpu, make, kind):
    bound = make(132, emajor=True) if kind == "weights" else make(tid2eid=hash_table())
    given = {} if kind == "weights" else {"input_ids": torch.zeros(4, dtype=torch.int64)}
    address = (w_copy_of if kind == "weights" else table_of)(bound).data_ptr()
    gpu.capture = 7
    bound(*step(4), **given)
    gpu.capture = 0
    del bound
    gc.collect()
    assert address in gpu.driver.memory
    gpu.driver.destroy_graph(7)
    status()
    gc.collect()
    assert address in gpu.driver.freed


def test_a_graph_that_takes_no_user_object_leaves_none_behind(gpu, make, monkeypatch):
    bound = make()
    gpu.capture = 7
    with monkeypatch.context() as patch:
        patch.setattr(gpu.driver, "cuGraphRetainUserObject", lambda *given: (2,))
        with pytest.raises(DriverError, match="giving the captured graph a user object"):
            bound(*step(4))
    assert not gpu.driver.objects
    bound(*step(4))
    assert status().captures == 1


@pytest.mark.parametrize("num_tokens", [4, 100, 300])
@pytest.mark.parametrize("act", ["status", "check", "reset", "a new Router"])
def test_a_graph_keeps_the_tensors_of_a_dropped_router(gpu, make, act, num_tokens):
    bound = make()
    storage = StorageWeakRef(bound.W_gate.untyped_storage())
    gpu.capture = 7
    bound(*step(num_tokens))
    gpu.capture = 0
    del bound
    gpu.products.clear()
    gc.collect()
    assert not storage.expired()
    gpu.driver.destroy_graph(7)
    acts = {"status": status, "check": check, "reset": reset, "a new Router": make}
    acts[act]()
    gc.collect()
    assert storage.expired()


def test_a_graph_keeps_the_tensors_of_each_layer_that_it_calls(gpu, make):
    layers = [make(), make(132, emajor=True), make()]
    storages = [StorageWeakRef(layer.W_gate.untyped_storage()) for layer in layers]
    copy = w_copy_of(layers[1]).data_ptr()
    gpu.capture = 7
    for layer in layers:
        layer(*FOUR)
    gpu.capture = 0
    del layers, layer
    gc.collect()
    assert not any(storage.expired() for storage in storages)
    assert copy in gpu.driver.memory


def test_a_copy_is_complete_when_a_bind_or_a_refresh_returns(gpu, make, monkeypatch):
    """Another stream may read it from then on."""
    waited = []
    monkeypatch.setattr(binding, "wait_for_current_stream", waited.append)
    bound = make(132, emajor=True)
    assert len(waited) == 1
    bound.refresh()
    assert len(waited) == 2


def test_a_copy_dropped_under_capture_is_freed_afterwards(gpu, make):
    bound = make(132, emajor=True)
    address = w_copy_of(bound).data_ptr()
    gpu.capture = 1
    del bound
    gc.collect()
    assert address not in gpu.driver.freed
    gpu.capture = 0
    make(132, emajor=True)
    assert address in gpu.driver.freed
    assert gpu.driver.broken_captures == 0


def test_a_forked_child_frees_nothing(gpu, make, monkeypatch):
    bound = make(132, emajor=True)
    address = w_copy_of(bound).data_ptr()
    monkeypatch.setattr(os, "getpid", lambda: -1)
    del bound
    gc.collect()
    assert address in gpu.driver.memory


def test_a_driver_that_frees_nothing_is_no_exception(gpu, make, monkeypatch):
    """After a sticky error every call fails; the error that says so is another call's."""
    raised = []
    monkeypatch.setattr(sys, "unraisablehook", raised.append)
    bound = make(132, emajor=True)
    monkeypatch.setattr(gpu.driver, "cuCtxPushCurrent", lambda context: (719,))
    del bound
    gc.collect()
    assert raised == []


# ------------------------------------------------------------------ tensors that moved

BOUND = ("W_gate", "e_bias", "bias_vl", "to_physical", "logical_count")


def with_options(make) -> Router:
    to_physical, count = torch.zeros(E, 2, dtype=torch.int32), torch.ones(E, dtype=torch.int32)
    more = {"bias_vl": torch.zeros(E), "to_physical": to_physical, "logical_count": count}
    return make(**more)


def test_a_weight_that_moved_is_refused_through_its_view(gpu, make):
    """weight.t() stays with the memory that the module no longer has."""
    weight = torch.nn.Linear(K, E, bias=False).to(torch.bfloat16).weight
    bound = make(W=weight.t())
    bound(*FOUR)
    weight.data = weight.data.clone()
    refused = "W_gate: expected the memory of the tensor that it is a view of as it was bound"
    for act in (lambda: bound(*FOUR), bound.reset, bound.refresh):
        with pytest.raises(ValueError, match=rf"{refused}.*say\); make a new Router"):
            act()
    assert len(gpu.launches) == 1


@pytest.mark.parametrize("name", BOUND)
@pytest.mark.parametrize("num_tokens", [4, 100, 300])
def test_a_bound_tensor_that_moved_is_refused(gpu, make, name, num_tokens):
    bound = with_options(make)
    bound(*step(num_tokens))
    tensor = getattr(bound, name)
    was = tensor.data_ptr()
    tensor.data = tensor.data.clone()
    refused = rf"{name}: expected the memory .* at {was:#x} \(got {tensor.data_ptr():#x}: moved"
    for act in (lambda: bound(*step(num_tokens)), bound.refresh):
        with pytest.raises(ValueError, match=rf"{refused}.*reset\(\), or make a new Router"):
            act()
    assert len(gpu.launches) == 1
    bound.reset()
    bound(*step(num_tokens))
    assert len(gpu.launches) == 2


@pytest.mark.parametrize("of_twin", [False, True])
def test_a_tensor_that_moved_back_after_a_reset_is_refused_by_each_copy(gpu, make, of_twin):
    """A copy shares its launch sites: a reset of one gives the other its addresses."""
    bound = make()
    twin = copy.copy(bound)
    reset_one, other = (twin, bound) if of_twin else (bound, twin)
    first, second = bound.W_gate.data, bound.W_gate.data.clone()
    bound.W_gate.data = second
    reset_one.reset()
    other(*FOUR)
    bound.W_gate.data = first
    for each in (reset_one, other):
        with pytest.raises(ValueError, match="moved since"):
            each(*FOUR)
    assert len(gpu.launches) == 1


def test_the_memory_that_was_bound_is_kept(gpu, make):
    bound = make()
    storage = StorageWeakRef(bound.W_gate.untyped_storage())
    bound.W_gate.data = bound.W_gate.data.clone()
    gc.collect()
    assert not storage.expired()
    bound.reset()
    gc.collect()
    assert storage.expired()


def test_after_reset_every_launch_has_the_new_addresses(gpu, make):
    bound = with_options(make)
    for num_tokens in (4, 100, 300):
        bound(*step(num_tokens))
    for name in BOUND:
        tensor = getattr(bound, name)
        tensor.data = tensor.data.clone(memory_format=torch.preserve_format)
    bound.reset()
    for num_tokens in (4, 100, 300):
        bound(*step(num_tokens))
        for name in BOUND[1:]:
            assert gpu.last[name] == getattr(bound, name).data_ptr()
    assert [m.address for m in gpu.maps if m.dims == (K, E)][-1] == bound.W_gate.data_ptr()
    for before, after in zip(gpu.launches[:2], gpu.launches[3:], strict=False):
        assert before["w_map"] != after["w_map"]
    assert gpu.driver.waits == 1


@pytest.mark.parametrize("how", [Router.reset, Router.refresh])
def test_private_copies_are_taken_again_where_they_lie(gpu, make, how):
    table = hash_table()
    bound, copied = make(tid2eid=table, emajor=True), make(132, emajor=True)
    lie = [tensor.data_ptr() for tensor in (table_of(bound), w_copy_of(bound), w_copy_of(copied))]
    table += 1
    bound.W_gate.fill_(2)
    copied.W_gate.fill_(3)
    with pytest.raises(ValueError, match=r"modified in place.*call refresh\(\)"):
        copied(*step(4))
    for router in (bound, copied):
        how(router)
    copied(*step(4))
    assert torch.equal(table_of(bound), hash_table(first=1).int())
    assert (w_copy_of(bound) == 2).all()
    assert (w_copy_of(copied) == 3).all()
    copies = (table_of(bound), w_copy_of(bound), w_copy_of(copied))
    assert [tensor.data_ptr() for tensor in copies] == lie
    # A refresh does not wait for replays on other streams: the caller orders them.
    assert gpu.driver.waits == (2 if how is Router.reset else 0)


def test_refresh_refuses_a_table_that_moved(gpu, make):
    table, base = hash_table(), torch.nn.Parameter(hash_table().int(), requires_grad=False)
    bound, of_view = make(tid2eid=table), make(tid2eid=base[:10])
    table.data = hash_table(first=1)
    with pytest.raises(ValueError, match=r"tid2eid: expected the memory as it was bound.*reset"):
        bound.refresh()
    bound.reset()
    assert torch.equal(table_of(bound), hash_table(first=1).int())
    base.data = hash_table(first=1).int()
    for act in (of_view.refresh, of_view.reset):
        with pytest.raises(ValueError, match="tid2eid: expected the memory of the tensor that it"):
            act()
    assert torch.equal(table_of(of_view), hash_table(vocab=10).int())


def test_a_refused_refresh_has_changed_no_copy(gpu, make):
    table = hash_table()
    bound, copied = make(tid2eid=table, emajor=True), make(132, emajor=True)
    whole = table.data
    bound.W_gate.fill_(2)
    for first, data, words in (
        (1, whole[:10], r"tid2eid: expected shape \[20, 6\], as it was bound"),
        (1, whole[:, :5], r"tid2eid: expected shape \[vocab, 6\]"),
        (E, whole, "tid2eid: expected ids in"),
    ):
        table.data = data
        whole.copy_(hash_table(first))
        with pytest.raises(ValueError, match=words):
            bound.refresh()
    copied.W_gate.data = copied.W_gate.data[: K // 2]
    with pytest.raises(ValueError, match="W_gate: expected a layer as it was bound"):
        copied.refresh()
    assert torch.equal(table_of(bound), hash_table().int())
    assert (w_copy_of(bound) == 0).all()


def test_reset_refuses_what_is_another_layer(gpu, make):
    table = hash_table()
    bound, hashed = make(), make(tid2eid=table)
    bound.W_gate.data = torch.zeros(E, 2 * K, dtype=torch.bfloat16).t()
    with pytest.raises(
        ValueError, match=r"W_gate: expected a layer as it was bound, .* new Router"
    ):
        bound.reset()
    table.data = hash_table(vocab=30)
    with pytest.raises(ValueError, match=r"tid2eid: expected shape \[20, 6\], as it was bound"):
        hashed.reset()
    table.data = hash_table(first=E)
    with pytest.raises(ValueError, match=r"tid2eid: expected ids in 0..383"):
        hashed.reset()
    assert torch.equal(table_of(hashed), hash_table().int())


# ------------------------------------------------------------------ status, check, reset


def test_status_counts_and_is_json(gpu, make):
    bound = make(132, emajor=True)
    for gpu.stream in (0, 0x70):
        bound(*step(1000))
    gpu.capture = 1
    bound(*step(8))
    held = status()
    assert json.loads(json.dumps(asdict(held))) == {**asdict(held), "fallbacks": []}
    assert (held.streams, held.bytes_per_stream) == (2, STREAM_BYTES)
    assert (held.captures, held.capture_slots) == (1, 1)
    assert held.capture_bytes == used(gpu, 8, 132)
    # Pieces that no chunk has room for get one of their own size.
    assert held.scratch_bytes == 2 * STREAM_BYTES + 2 * MIB
    # The logits of two streams, and as much to compute them transposed.
    assert held.prefill_bytes == 2 * 2 * 1000 * 132 * 4
    assert held.driver_bytes == held.scratch_bytes + 132 * K * 2


SHARED = "capture 6, whose scratch 2 captures share:"


@pytest.mark.parametrize(
    "where", ["stream 0x0", "foreign stream with id 77", "capture 5:", SHARED, "of no"]
)
def test_scratch_that_is_not_zero_is_found_named_and_reset(gpu, make, where):
    bound = make()
    bound(*step(4))
    gpu.driver.ids[0x900] = 77
    call_on(gpu, bound, 0x900)
    gpu.capture = 5
    bound(*step(4))
    for capture in (6, 7):
        call_in(gpu, capture, make(share_captured_scratch=True), 4)
    gpu.capture = 0
    check()
    assert gpu.driver.waits == 1, "launches under way hold words"
    at = ["stream 0x0", "foreign stream with id 77", "capture 5:", SHARED].index
    launch = gpu.launches[-1 if where == "of no" else at(where)]
    past = MIB if where == "of no" else 0
    address = launch["workspace"] + past + 300
    ctypes.memset(address, 0xFF, 1)
    with pytest.raises(
        RouterError, match=rf"{where}.*got byte 0xff at address {address:#x}.*reset"
    ):
        check()
    reset()
    assert gpu.driver.waits == 3
    check()
    gpu.stream = 0
    bound(*step(4))
    assert gpu.last["workspace"] == gpu.launches[0]["workspace"]


def test_reset_frees_the_logits_of_prefill_outside_graphs(gpu, make):
    bound = make()
    bound(*step(1000))
    assert status().prefill_bytes == 1000 * E * 4
    reset()
    assert status().prefill_bytes == 0
    bound(*step(700))
    assert status().prefill_bytes == 700 * E * 4


@pytest.mark.parametrize("what", [check, reset])
def test_nothing_waits_for_the_gpu_under_capture(gpu, make, what):
    bound = make()
    bound(*step(4))
    gpu.capture = 1
    for act in (what, bound.reset, bound.refresh):
        with pytest.raises(RouterError, match=r"being captured and .*; call it before .* or after"):
            act()
    assert gpu.driver.broken_captures == gpu.driver.waits == 0


@pytest.mark.parametrize(
    ("device", "error", "message"),
    [
        ("cpu", ValueError, r"device: expected a CUDA device \(got cpu\)"),
        (True, TypeError, r"device: expected a torch.device, an int, a str or None \(got bool\)"),
        (1.0, TypeError, r"\(got float\)"),
    ],
)
def test_a_device_that_is_no_gpu_is_refused(device, error, message):
    for act in (status, check, reset):
        with pytest.raises(error, match=message):
            act(device)


@pytest.mark.parametrize(
    ("device", "got"), [(2, 2), (-1, -1), (256, 256), ("cuda:2", 2), (torch.device("cuda:7"), 7)]
)
def test_a_gpu_that_is_not_there_is_refused(monkeypatch, device, got):
    """An int is asked before torch, which takes 256 for 0."""
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    for act in (status, check, reset):
        with pytest.raises(ValueError, match=rf"one of the 2 GPUs .* \(got {got}\)"):
            act(device)


def test_a_device_is_given_as_torch_takes_it(monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    for given in (1, "cuda:1", torch.device("cuda:1")):
        assert scratch.gpu_index(given) == 1
