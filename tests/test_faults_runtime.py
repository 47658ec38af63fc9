"""Faults inside the process: an interrupt at every line of a call, and first use by two threads."""

from __future__ import annotations

import contextlib
import gc
import linecache
import random
import sys
import threading
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest

pytest.importorskip("torch", reason="torch is the caller's and is not installed here")

import torch
from conftest import sample_manifest
from gpu_recorder import workspace_of
from watchdog import ends_within

import dsv4_router_runtime
from dsv4_router_runtime import Router, binding, router, status, steps
from dsv4_router_runtime.device import load, memory, tensor_map, workspace
from dsv4_router_runtime.errors import DriverError, RouterError
from dsv4_router_runtime.integrations import bound_layers

K, E, TOP_K = 512, 80, 6
PACKAGE = str(Path(dsv4_router_runtime.__file__).parent)
SEEDS = 1000


@pytest.fixture
def make(artifacts):
    def made(**more) -> Router:
        W = torch.zeros(E, K, dtype=torch.bfloat16).t()
        given = {"top_k": TOP_K, "routed_scaling_factor": 2.5, "artifacts": artifacts}
        return Router(W, torch.zeros(E), **given, **more)

    return made


def step(num_tokens: int):
    return (
        torch.zeros(num_tokens, K, dtype=torch.bfloat16),
        torch.zeros(num_tokens, TOP_K),
        torch.zeros(num_tokens, TOP_K, dtype=torch.int32),
    )


class Held(KeyboardInterrupt):
    """An interrupt whose traceback a test keeps."""


def interrupt() -> None:
    raise KeyboardInterrupt


def entered_by(frame, within: str) -> bool:
    """Return whether a frame is the beginning of a context manager that a file made."""
    if frame.f_code is not contextlib._GeneratorContextManager.__enter__.__code__:
        return False
    return frame.f_locals["self"].gen.gi_code.co_filename.startswith(within)


def call_interrupted_at(line: int, call, *, within=PACKAGE, left_out=(), handler=interrupt) -> bool:
    """Make the call, with a signal's handler at the nth line of the package; False if none came.

    The end of a `with` block is left out: it has a line event, but CPython handles a signal after
    the block's last call, which the block still covers. left_out: how further such lines begin.
    """
    seen = 0
    entered: set[tuple[object, int]] = set()

    def trace(frame, event, argument):
        nonlocal seen
        file = frame.f_code.co_filename
        if not (file.startswith(within) or entered_by(frame, within)):
            return None
        place = (frame, frame.f_lineno)
        text = linecache.getline(frame.f_code.co_filename, frame.f_lineno).lstrip()
        # A context manager of Python's may be interrupted when its block is about to begin.
        if event == ("line" if file.startswith(within) else "return") and not (
            place in entered or text.startswith(left_out)
        ):
            seen += 1
            if seen == line:
                handler()
        if text.startswith("with "):
            entered.add(place)
        return trace

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        call()
    except KeyboardInterrupt:
        return True
    finally:
        sys.settrace(before)
    return seen >= line


@contextlib.contextmanager
def collection_within(most: int, garbage):
    """Call `garbage`, and collect what it leaves after `most` allocations, or after the block."""
    before = gc.get_threshold()
    gc.disable()
    try:
        garbage()
        gc.set_threshold(gc.get_count()[0] + most)
        gc.enable()
        yield
    finally:
        gc.disable()
        gc.set_threshold(*before)
        gc.collect()
        gc.enable()


@pytest.fixture
def no_collection():
    """Collect no garbage: an exception in a finalizer is printed and interrupts no call."""
    gc.disable()
    yield
    gc.enable()


@pytest.mark.usefixtures("no_collection")
@pytest.mark.parametrize(("next_one", "interrupted"), [(5, 6), (400, 65)])
def test_an_interrupt_at_any_line_of_a_call_leaves_the_next_call_right(
    gpu, make, next_one, interrupted
):
    """Ctrl-C between two writes passes for no whole write, and leaves no lock held.

    Grids of 65 and 400 tokens differ.
    """
    bound = make(bias_vl=torch.zeros(E))
    plain, masked = step(next_one), step(interrupted)
    mask = torch.zeros(interrupted, dtype=torch.bool)

    def other() -> None:
        bound(*masked, image_mask=mask, padding_mask=mask)

    other()
    bound(*plain)
    expected = gpu.last
    line = 1
    with ends_within(120):
        while call_interrupted_at(line, other):
            bound(*plain)
            assert gpu.last == expected, line
            line += 1
    # A call has a few dozen lines; fewer would mean that the loop saw none of them.
    assert line > 20


def every_interrupt(act, begin, end, *, within=workspace, handler=None) -> None:
    """Begin, interrupt `act` at the nth line of a module, and end; for all n.

    handler: called with what `begin` returned, instead of an interrupt.
    """
    line = 1
    interrupted = True
    # After `try:`, and at the end of what it covers, CPython handles no signal.
    unreachable = ("try:", "slot.is_routing = False", "slot.lock.release()")
    while interrupted:
        with ends_within(20):
            given = begin()
            interrupted = call_interrupted_at(
                line,
                lambda given=given: act(*given),
                within=within.__file__,
                left_out=unreachable,
                handler=interrupt if handler is None else lambda given=given: handler(*given),
            )
            end(*given)
        line += 1
    assert line > 8


@pytest.fixture
def few_slots(gpu, monkeypatch):
    """Forget scratch and maps when called. One foreign stream keeps its slot, one call its map."""
    monkeypatch.setattr(workspace, "KEPT_FOREIGN_SLOTS", 1)
    monkeypatch.setattr(workspace, "CHUNK_BYTES", 2**16)
    monkeypatch.setattr(tensor_map, "MAX_CACHED_MAPS", 1)

    def forget() -> None:
        monkeypatch.setattr(workspace, "_workspaces", {})
        monkeypatch.setattr(tensor_map, "_map_caches", {})
        load._loaded.clear()
        gpu.stream = gpu.capture = 0
        gpu.driver.busy.clear()

    return forget


@pytest.mark.usefixtures("no_collection")
def test_an_interrupt_while_a_stream_gets_its_scratch_leaves_that_to_the_next_call(
    gpu, make, few_slots
):
    case = step(4)

    def begin():
        few_slots()
        return (make(),)

    def act(bound) -> None:
        bound(*case)

    def end(bound) -> None:
        for gpu.stream in (0, 0x70):
            bound(*case)
        first, second = (launch["counters"] for launch in gpu.launches[-2:])
        assert first != second

    every_interrupt(act, begin, end)


@pytest.mark.usefixtures("no_collection")
def test_an_interrupt_while_a_slot_changes_its_stream_leaves_both_streams_usable(
    gpu, make, few_slots
):
    case = step(4)

    def on(bound, stream: int) -> int:
        gpu.stream = stream
        gpu.foreign.add(stream)
        bound(*case)
        gpu.driver.busy.add(stream)
        return gpu.last["counters"]

    def begin():
        few_slots()
        bound = make()
        for stream in (0x900, 0xA00):
            on(bound, stream)
        gpu.driver.busy.clear()
        return (bound,)

    def act(bound) -> None:
        on(bound, 0xB00)

    def end(bound) -> None:
        # The stream that was to lose its slot comes first: it may not wait for another's call.
        assert len({on(bound, stream) for stream in (0xA00, 0x900, 0xB00, 0xC00)}) == 4

    every_interrupt(act, begin, end)


@pytest.mark.slow
@pytest.mark.usefixtures("no_collection")
def test_an_interrupt_while_a_graph_is_captured_leaves_no_scratch_to_two_graphs(
    gpu, make, few_slots
):
    """Graphs that share scratch give it back with the last of them, and not before."""
    case = step(4)

    def begin():
        few_slots()
        sharing = make(share_captured_scratch=True)
        gpu.capture = 1
        sharing(*case)
        gpu.capture = 2
        return sharing, make()

    def act(sharing, alone) -> None:
        sharing(*case)

    def end(sharing, alone) -> None:
        gpu.capture = 2
        sharing(*case)
        shared = gpu.last["counters"]
        gpu.driver.destroy_graph(1)
        status()
        gpu.capture = 3
        alone(*case)
        assert gpu.last["counters"] != shared
        for graph in (2, 3):
            gpu.driver.destroy_graph(graph)
        status()

    every_interrupt(act, begin, end)


@pytest.mark.quick(1)
@pytest.mark.usefixtures("no_collection")
@pytest.mark.parametrize("module", [workspace, memory, tensor_map])
@pytest.mark.parametrize("where", ["stream", "capture"])
def test_a_signal_handler_that_routes_at_any_line_gets_no_scratch_of_the_call_there(
    gpu, make, few_slots, module, where
):
    """It is served or refused, and never waits for the call that it interrupts. So does status."""
    first, second = 0x70, 0x71
    cases = {first: step(4), second: step(5)}

    def on(bound, name: int) -> int:
        before = getattr(gpu, where)
        setattr(gpu, where, name)
        try:
            bound(*cases[name])
        finally:
            setattr(gpu, where, before)
        return gpu.last["counters"]

    def begin():
        few_slots()
        return make(), make()

    def act(bound, other) -> None:
        on(bound, first)

    def handler(bound, other) -> None:
        with contextlib.suppress(RouterError):
            on(other, second)
        status()

    def end(bound, other) -> None:
        assert on(bound, first) != on(other, second)

    every_interrupt(act, begin, end, within=module, handler=handler)


@pytest.mark.usefixtures("no_collection")
@pytest.mark.parametrize("module", [workspace, steps])
def test_a_signal_handler_that_routes_on_a_new_stream_gets_no_scratch_in_use(
    gpu, make, few_slots, module
):
    """A foreign stream's slot is idle between two calls, and not within one."""
    case = step(4)

    def on(bound, stream: int) -> int:
        before, gpu.stream = gpu.stream, stream
        gpu.foreign.add(stream)
        try:
            bound(*case)
        finally:
            gpu.stream = before
        # The last launch may be the handler's.
        launch = next(each for each in reversed(gpu.launches) if each["stream"] == stream)
        return launch["counters"]

    def begin():
        few_slots()
        bound, other, found = make(), make(), []
        for stream in (0x900, 0xA00):
            on(bound, stream)
        gpu.launches.clear()
        return bound, other, found

    def act(bound, other, found) -> None:
        found.append(on(bound, 0xA00))

    def handler(bound, other, found) -> None:
        gpu.driver.busy |= {each["stream"] for each in gpu.launches}
        with contextlib.suppress(RouterError):
            found.append(on(other, 0xB00))
            gpu.driver.busy.add(0xB00)

    def end(bound, other, found) -> None:
        assert len(found) == len(set(found))

    every_interrupt(act, begin, end, within=module, handler=handler)


@pytest.mark.usefixtures("no_collection")
@pytest.mark.parametrize("stops", ["an interrupt", "the driver"])
def test_a_launch_whose_end_is_not_recorded_keeps_its_scratch(
    gpu, make, few_slots, monkeypatch, stops
):
    case = step(4)
    few_slots()
    bound = make()

    def on(stream: int) -> int:
        gpu.stream = stream
        gpu.foreign.add(stream)
        bound(*case)
        return gpu.last["counters"]

    def record(event, stream):
        if stops == "an interrupt":
            raise KeyboardInterrupt
        return (1,)

    on(0x900)
    mine = on(0xA00)
    with monkeypatch.context() as patch:
        patch.setattr(gpu.driver, "cuEventRecord", record)
        with pytest.raises((KeyboardInterrupt, DriverError)):
            on(0xA00)
    # 0xA00 still runs, which its event does not say.
    assert on(0xB00) != mine
    assert on(0xA00) == mine
    # Recorded again: once it is done, another stream may have its slot.
    gpu.driver.busy.add(0xB00)
    assert on(0xC00) == mine


@pytest.mark.quick(2)
@pytest.mark.usefixtures("no_collection")
@pytest.mark.parametrize("where", ["torch's stream", "a foreign stream", "a new stream"])
@pytest.mark.parametrize("num_tokens", [4, 400], ids=["one launch", "a product"])
def test_an_interrupt_that_is_being_handled_holds_no_lock(gpu, make, few_slots, where, num_tokens):
    """Its traceback keeps every frame, and a server may wait for its threads meanwhile."""
    case, held = step(num_tokens), []

    def on(bound, stream: int) -> None:
        gpu.stream = stream
        bound(*case)

    def begin():
        few_slots()
        bound, stream = make(bias_vl=torch.zeros(E)), 0x70
        if where != "torch's stream":
            stream = 0xB00
            gpu.foreign |= {0x900, 0xA00, 0xB00}
            for each in (0x900, 0xA00):
                on(bound, each)
        if where == "a foreign stream":
            on(bound, stream)
        return bound, stream

    def handler(bound, stream) -> None:
        raise Held

    def act(bound, stream) -> None:
        held.clear()
        try:
            on(bound, stream)
        except Held as interrupted:
            held.append(interrupted)
            raise KeyboardInterrupt from None

    def end(bound, stream) -> None:
        # In another thread first, which would wait for the lock; in this one it would be refused.
        worker = threading.Thread(target=on, args=(bound, stream), daemon=True)
        worker.start()
        worker.join(10)
        assert not worker.is_alive()
        on(bound, stream)

    every_interrupt(act, begin, end, within=workspace, handler=handler)
    every_interrupt(act, begin, end, within=steps, handler=handler)


@pytest.mark.usefixtures("no_collection")
@pytest.mark.parametrize("module", [load, pytest.param(workspace, marks=pytest.mark.slow)])
def test_a_signal_handler_that_binds_at_any_line_of_a_bind_is_served(gpu, make, few_slots, module):
    case, bound = step(4), []

    def begin():
        few_slots()
        bound.clear()
        return ()

    def act() -> None:
        make()

    def handler() -> None:
        bound.append(make())

    def end() -> None:
        for each in (*bound, make()):
            each(*case)

    every_interrupt(act, begin, end, within=module, handler=handler)


@pytest.mark.slow
def test_first_use_by_two_threads(gpu, make):
    """Whichever comes first, both launch with their own arguments, on one stream's one scratch."""
    cases = [step(3), step(4)]
    scratch = {
        parameter.name
        for kernel in sample_manifest().kernels
        for parameter in kernel.parameters
        if parameter.scratch is not None
    }
    interval = sys.getswitchinterval()
    try:
        for seed in range(SEEDS):
            # Threads change places within a call, after another number of instructions each time.
            sys.setswitchinterval(random.Random(seed).choice((1e-6, 3e-6, 1e-5, 1e-4)))
            bound, together = make(), threading.Barrier(2)
            gpu.stream = 100 + seed
            gpu.launches.clear()

            def work(case, bound=bound, together=together) -> None:
                together.wait()
                bound(*case)

            threads = [threading.Thread(target=work, args=(case,)) for case in cases]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
            assert {(each["num_tokens"], each["out_ids"]) for each in gpu.launches} == {
                (len(case[0]), case[2].data_ptr()) for case in cases
            }
            used = [{name: each[name] for name in scratch if name in each} for each in gpu.launches]
            assert used[0] == used[1]
    finally:
        sys.setswitchinterval(interval)


def test_memory_is_counted_while_garbage_with_memory_is_collected(gpu):
    """A collection may begin at any allocation, also within the count."""
    kept = [memory.DeviceMemory(0, 256) for _ in range(8)]

    def garbage() -> None:
        ring: list = [memory.DeviceMemory(0, 256)]
        ring.append(ring)

    for most in range(2, 40):
        with collection_within(most, garbage):
            held = memory.allocated_bytes(0)
        assert held in (8 * 256, 9 * 256), most
    assert memory.allocated_bytes(0) == len(kept) * 256


def test_layers_are_dropped_while_garbage_that_drops_one_is_collected(gpu):
    """As a weight's finalizer does, which a collection may run within the loop over the layers."""

    class Weight:
        def __init__(self, table: dict) -> None:
            self.table, self.itself = table, self

        def __del__(self) -> None:
            self.table.popitem()

    for most in range(2, 40):
        table: dict = dict.fromkeys(range(60), SimpleNamespace(weight=None))
        with collection_within(most, partial(Weight, table)):
            bound_layers._drop(table, lambda bound: bound.weight is not None)
        assert len(table) == 59


def test_workspaces_are_listed_while_a_signal_handler_makes_one(gpu):
    def layout(size: int) -> workspace.ScratchLayout:
        return workspace.ScratchLayout(zeroed=(), plain=(), zeroed_bytes=size, plain_bytes=0)

    def new(size: int) -> None:
        spaces = workspace._workspaces
        spaces.setdefault((0, layout(size)), workspace.Workspace(0, layout(size)))

    for line in range(1, 12):
        workspace._workspaces.clear()
        for size in range(4):
            new(size)
        call_interrupted_at(
            line,
            lambda: workspace.workspaces_on(0),
            within=workspace.__file__,
            handler=lambda: new(99),
        )


def test_the_null_stream_has_one_id_and_its_events_if_the_bindings_have_another(
    gpu, make, few_slots, monkeypatch
):
    """In a green context, say, whose null stream is leased its slot as a foreign one is."""
    monkeypatch.setenv("CUDA_PYTHON_CUDA_PER_THREAD_DEFAULT_STREAM", "1")
    few_slots()
    bound = make()
    gpu.foreign |= {0, 0x900}
    for gpu.stream in (0x900, 0):
        bound(*step(4))
    assert set(gpu.driver.ids) == {0x900, 1}
    assert list(gpu.driver.events.values()) == [1]


@pytest.mark.usefixtures("no_collection")
@pytest.mark.parametrize("module", [binding, router])
def test_an_interrupt_of_a_reset_lets_no_graph_lose_the_layers_tensors(gpu, make, module):
    """A call after it is refused, or its graph keeps what it reads."""
    case = step(4)

    def begin():
        gpu.capture = 0
        bound = make()
        bound(*case)
        return (bound,)

    def end(bound) -> None:
        gpu.capture = 1
        bound(*case)
        (capture,) = workspace_of(bound).captures.values()
        kept = {tensor.data_ptr() for tensor in capture.pins.values()}
        assert {bound.W_gate.data_ptr(), bound.e_bias.data_ptr()} <= kept
        gpu.driver.destroy_graph(1)
        status()

    every_interrupt(lambda bound: bound.reset(), begin, end, within=module)
