"""A driver that fails, is too old, or has another context current, below a whole Router."""

from __future__ import annotations

import contextlib
import logging
import subprocess
import sys
import textwrap
from dataclasses import replace

import pytest

pytest.importorskip("torch", reason="torch is the caller's and is not installed here")
pytest.importorskip("cuda.bindings.driver", reason="cuda-bindings is not installed")

import torch
from conftest import decode_kernel, sample_manifest, topk_kernel
from cuda.bindings.driver import CUresult
from failing_driver import FOREIGN, GREEN, PRIMARY, plug_in, replace_driver
from gpu_recorder import (
    held_locks,
    keep_first_step,
    pretend_many_devices,
    sites_of,
    workspace_of,
)
from watchdog import ends_within

from dsv4_router_runtime import (
    Router,
    binding,
    check,
    dense_router_dispatch,
    reset,
    status,
)
from dsv4_router_runtime.artifacts.dispatch import LayerProblem, plan_layer, without
from dsv4_router_runtime.artifacts.folder import open_artifacts
from dsv4_router_runtime.artifacts.kernel import LAYOUTS
from dsv4_router_runtime.device import driver, load, occupancy, tensor_map, workspace
from dsv4_router_runtime.errors import (
    DriverError,
    DriverTooOldError,
    NoKernelError,
    RouterError,
)
from dsv4_router_runtime.parameters import DTYPES

K, E, TOP_K = 128, 80, 6
# First one of each outcome: see test_each_call_in_turn_fails.
CODES = (1, 912, 700, 2, 3, 101, 200, 201, 209, 400, 719, 801, 900, 999)


@pytest.fixture
def artifacts(write_artifacts):
    """One decode kernel and router_topk: the fewest driver calls that have every kind of them."""
    manifest = replace(sample_manifest(("sm_90a",)), kernels=(decode_kernel(), topk_kernel()))
    return open_artifacts(write_artifacts(manifest))


@pytest.fixture
def fake(monkeypatch, artifacts):
    yield replace_driver(monkeypatch, artifacts.manifest.kernels)
    for cached in (driver.driver_version, driver._primary_context, tensor_map._encode_function):
        cached.cache_clear()


@pytest.fixture
def bind(artifacts):
    def bound() -> Router:
        W = torch.zeros(E, K, dtype=torch.bfloat16).t()
        bias = torch.zeros(E)
        return Router(W, bias, top_k=TOP_K, routed_scaling_factor=1.0, artifacts=artifacts)

    return bound


# Kept, so that every try makes the same tensor maps.
X, OUT = torch.zeros(70, K, dtype=torch.bfloat16), torch.empty(70, TOP_K)
IDS = OUT.to(torch.int32)


def call(bound: Router, n: int = 3) -> None:
    bound(X[:n], OUT, IDS)


def use(bind) -> None:
    """Bind a layer and call each of its steps twice."""
    bound = bind()
    for n in (3, 3, 70, 70):
        call(bound, n)


def locks_are_free() -> bool:
    return not any(lock._is_owned() for lock in (load._load_lock, occupancy._lock))


def test_a_healthy_driver(fake, bind):
    use(bind)
    assert len(fake.launched) == 4
    assert fake.stack == [PRIMARY]


@pytest.mark.quick(1)
@pytest.mark.parametrize("code", CODES)
def test_each_call_in_turn_fails(monkeypatch, fake, bind, code):
    """Every failure is an error of this package, and leaves nothing that the next try trips over.

    What is no failure: 912 says that no cluster fits, so another step takes the call; INVALID_VALUE
    is the answer for the parameter after the last one.
    """
    use(bind)
    names = tuple(fake.calls)
    passed = []
    for index, name in enumerate(names):
        fake = plug_in(monkeypatch, type(fake)(fake.kernels.values()))
        fake.fail = (index, code)
        try:
            use(bind)
            passed.append(name)
        except RouterError:
            pass
        assert fake.calls[index] == name
        assert locks_are_free()
        if name not in ("cuCtxPopCurrent", "cuCtxSetCurrent"):
            assert fake.stack == [PRIMARY]
        fake.fail, fake.stack, fake.launched = None, [PRIMARY], []
        use(bind)
        assert len(fake.launched) == 4
    fit = {"cuOccupancyMaxActiveClusters", "cuLaunchKernelEx"}
    assert set(passed) == {1: {"cuKernelGetParamInfo"}, 912: fit}.get(code, set())


@pytest.mark.parametrize("lacking", ["lacks", "unbound"])
def test_each_function_in_turn_is_missing(monkeypatch, fake, bind, lacking):
    """An older driver lacks the function, an older cuda-bindings its name."""
    fake.fail = (10**6, 0)
    use(bind)
    for name in sorted(set(fake.calls) - {"cuTensorMapEncodeTiled"}):
        fake = plug_in(monkeypatch, type(fake)(fake.kernels.values()))
        getattr(fake, lacking).add(name)
        with pytest.raises(DriverTooOldError, match=f"{name}.*; update the"):
            use(bind)
        assert locks_are_free()
        getattr(fake, lacking).clear()
        fake.stack = [PRIMARY]
        plug_in(monkeypatch, fake)
        use(bind)


def test_a_driver_without_tensor_maps_is_refused_before_a_null_call(monkeypatch, fake, bind):
    monkeypatch.setattr(fake, "_cuGetProcAddress", lambda *given: (0, 1))
    with pytest.raises(DriverTooOldError, match="has no cuTensorMapEncodeTiled"):
        bind()


@pytest.mark.parametrize("stack", [[], [PRIMARY], [FOREIGN, PRIMARY], [FOREIGN, GREEN]])
def test_the_callers_contexts_are_as_before(fake, bind, stack):
    fake.stack = list(stack)
    use(bind)
    assert fake.stack == stack
    assert len(fake.launched) == 4


@pytest.mark.parametrize("fails", [False, True])
def test_a_change_of_torchs_device_ends_in_the_callers_context(monkeypatch, fake, bind, fails):
    """As cudaSetDevice does, torch makes the primary context of a device current for good."""

    @contextlib.contextmanager
    def device(index):
        fake.stack[-1:] = [PRIMARY]
        yield

    monkeypatch.setattr(torch.cuda, "device", device)
    fake.stack = [GREEN]
    bound = bind()
    assert fake.stack == [GREEN]
    pretend_many_devices(monkeypatch, bound)
    fake.launch_code = 700 * fails
    monkeypatch.setattr(torch.cuda, "current_device", iter([1, None]).__next__)
    with pytest.raises(DriverError) if fails else contextlib.nullcontext():
        call(bound)
    assert (fake.stack, len(fake.launched)) == ([GREEN], 0 if fails else 1)


def test_a_thread_without_a_context_binds_and_makes_the_first_call(fake, bind):
    """Both encode tensor maps, for which the driver wants a context."""
    fake.stack = []
    call(bind())
    assert (fake.stack, len(fake.launched)) == ([], 1)


def test_a_bind_that_fails_leaves_the_callers_context(monkeypatch, fake, bind):
    fake.stack = [FOREIGN, GREEN]
    monkeypatch.setattr(fake, "_cuKernelGetFunction", lambda handle: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        bind()
    assert fake.stack == [FOREIGN, GREEN]


@pytest.mark.parametrize("stream", [0, 5])
def test_a_foreign_context_is_refused_before_anything_is_launched(monkeypatch, fake, bind, stream):
    """On another stream of torch's too, whose site is found without a look at the context."""
    monkeypatch.setattr(binding, "is_lasting", lambda index, stream: True)
    bound = bind()
    fake.gpu.stream = stream
    for n in (3, 70):
        call(bound, n)
    fake.gpu.products.clear()
    fake.launched, fake.stack = [], [FOREIGN]
    for n in (3, 70):
        with pytest.raises(RouterError, match="allowed: the primary context, or a green context"):
            call(bound, n)
    with pytest.raises(RouterError, match="call cuCtxPopCurrent before"):
        bind()
    assert (fake.launched, fake.gpu.products, fake.stack) == ([], [], [FOREIGN])


@pytest.mark.quick(3)
@pytest.mark.parametrize("code", [700, 719, 214, 702, 710, 714, 715, 716, 717, 718, 999])
def test_a_lost_context_is_not_blamed_on_this_launch(fake, bind, code):
    bound = bind()
    fake.launch_code = code
    with pytest.raises(DriverError) as caught:
        call(bound)
    message = str(caught.value)
    assert "launching router_decode_kmajor_n8.sm_90a: the CUDA driver answered" in message
    assert "an earlier kernel, of any library, may be to blame" in message
    assert message.endswith("the GPU's context is lost: restart the process")
    # Both causes of a trap, of which only one waits.
    for cause in ("wait_limit_ms", "scratch was not zero"):
        assert (cause in message) == (code in (715, 719))
    assert caught.value.code == CUresult(code).name


@pytest.mark.parametrize(
    ("code", "name", "is_lost"),
    [
        (719, "CUDA_ERROR_LAUNCH_FAILED", True),
        (700, "CUDA_ERROR_ILLEGAL_ADDRESS", True),
        (None, "CUDA_ERROR_UNKNOWN", True),
        (900, "CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED", False),
        (901, "CUDA_ERROR_STREAM_CAPTURE_INVALIDATED", False),
        (801, "CUDA_ERROR_NOT_SUPPORTED", False),
        (12345, "12345", False),
    ],
)
@pytest.mark.parametrize("at", ["call", "bind"])
def test_what_torch_meets_first_is_said_alike(monkeypatch, fake, bind, at, code, name, is_lost):
    error = torch.AcceleratorError("CUDA error: in words\nSearch for ...")
    if code is not None:
        error.error_code = code

    def meet(*given):
        raise error

    # Of these only a call asks the first, and only a bind the second.
    monkeypatch.setattr(binding, "is_capturing" if at == "call" else "_checked_table", meet)
    bound = bind() if at == "call" else None
    with pytest.raises(DriverError) as caught:
        call(bound) if at == "call" else bind()
    message = str(caught.value)
    assert message.startswith("torch's call of the CUDA driver: CUDA error: in words")
    assert message.endswith("restart the process" if is_lost else "in words")
    assert caught.value.code == name


@pytest.mark.parametrize("code", [4, 400, 709])
def test_a_reset_context_asks_for_a_restart(fake, bind, code):
    bound = bind()
    fake.launch_code = code
    with pytest.raises(DriverError, match="after cudaDeviceReset restart the process"):
        call(bound)


class TestWithoutRoomForACluster:
    def test_the_context_is_asked_once_a_stream_and_the_next_step_taken(self, fake, bind, caplog):
        fake.room = 0
        bound = bind()
        with caplog.at_level(logging.WARNING, "dsv4_router_runtime"):
            for _ in range(3):
                call(bound)
        assert [fake.handles[handle].name for handle in fake.launched] == ["router_topk"] * 3
        # With an SM for each CTA, and without.
        assert fake.calls.count("cuOccupancyMaxActiveClusters") == 2
        assert [record.getMessage() for record in caplog.records] == [
            "router_decode_kmajor_n8.sm_90a is not launched: no room for a cluster of 16 CTAs of "
            "100000 bytes of shared memory in this context of GPU None; such calls take "
            "router_topk.sm_90a"
        ]
        (fallback,) = occupancy.fallbacks()
        assert (fallback.instead, fallback.times) == ("router_topk.sm_90a", 1)
        assert status().fallbacks == (fallback,)

    def test_in_a_thread_without_a_context_the_primary_one_is_asked(self, fake, bind):
        bound = bind()
        fake.stack = []
        call(bound)
        names = [fake.handles[handle].name for handle in fake.launched]
        assert (names, fake.stack) == (["router_decode_kmajor_n8"], [])

    def test_a_refused_launch_takes_the_next_step_too(self, fake, bind, caplog):
        """The current context may have changed since its room was asked for."""
        bound = bind()
        fake.launch_code = 912
        for _ in range(3):
            call(bound)
        fake.launch_code = 0
        call(bound)
        names = [fake.handles[handle].name for handle in fake.launched]
        assert names == ["router_topk"] * 3 + ["router_decode_kmajor_n8"]
        assert len(caplog.records) == 1
        assert occupancy.fallbacks()[0].times == 3

    def test_a_warning_that_was_switched_off_comes_with_the_next_one(self, fake, bind, caplog):
        fake.room = 0
        for level, number in ((logging.ERROR, 0), (logging.WARNING, 1)):
            with caplog.at_level(level, "dsv4_router_runtime"):
                call(bind())
            assert len(caplog.records) == number

    def test_a_null_stream_of_a_green_context_is_asked_for_again(self, fake, bind):
        bound = bind()
        fake.stack, fake.room = [GREEN], 0
        call(bound)
        fake.stack, fake.room = [PRIMARY], 7
        call(bound)
        names = [fake.handles[handle].name for handle in fake.launched]
        assert names == ["router_topk", "router_decode_kmajor_n8"]

    def test_a_null_stream_of_a_green_context_has_a_site_and_scratch_of_its_own(self, fake, bind):
        """The handle is 0 in every context, and the streams may run at once."""
        bound = bind()
        for fake.stack in ([PRIMARY], [GREEN], [PRIMARY], [GREEN]):
            for n in (3, 70):
                call(bound, n)
        slots = [site.slot for site in sites_of(bound)]
        assert slots == [slots[0], slots[0], slots[2], slots[2]]
        assert list(workspace_of(bound).slots) == [0, ~GREEN]
        primary, green = slots[0].addresses, slots[2].addresses
        assert all(primary[name] != green[name] for name in primary)

    def test_a_capture_takes_the_next_step_too(self, fake, bind):
        bound = bind()
        fake.gpu.capture, fake.room = 5, 0
        for _ in range(2):
            call(bound)
        assert [fake.handles[handle].name for handle in fake.launched] == ["router_topk"] * 2
        assert occupancy.fallbacks()[0].times == 2

    def test_no_step_is_left(self, monkeypatch, fake, bind):
        bound = bind()
        keep_first_step(monkeypatch, bound)
        fake.room = 0
        with pytest.raises(NoKernelError, match="the last step of this layer: no room for a clu"):
            call(bound)

    @pytest.mark.parametrize("hashed", [False, True])
    def test_the_plan_without_it_is_what_calls_take(self, hashed):
        """Whichever kernels do not fit, a call takes the step that `without` leaves it."""
        layer = LayerProblem(
            layout=LAYOUTS[0], tma_loadable=True, hashed=hashed,
            num_experts=E, top_k=TOP_K, k=K, dtypes=DTYPES,
        )  # fmt: skip
        plan = plan_layer(sample_manifest(), layer, "sm_90a")
        clustered = [step.kernel.key for step in plan.steps[:-1]]
        for chosen in range(2 ** len(clustered)):
            unfit = {key: "full" for at, key in enumerate(clustered) if chosen >> at & 1}
            left = without(plan, unfit)
            assert {item.kernel.key: item.reason for item in left.rejected} == unfit
            for n in (1, 8, 9, 32, 33, 56, 57, 64, 65):
                assert step_for(left, n) == next(
                    step.kernel.key
                    for step in plan.steps
                    if n <= (step.max_tokens or n) and step.kernel.key not in unfit
                )
                assert n in kernel_of(plan, step_for(left, n)).problem.num_tokens
        with pytest.raises(NoKernelError, match=r"(?s)no kernel of this layer fits:.*_n64.*: full"):
            without(plan, {step.kernel.key: "full" for step in plan.steps})


def step_for(plan, n: int) -> str:
    return next(step.kernel.key for step in plan.steps if n <= (step.max_tokens or n))


def kernel_of(plan, key: str):
    return next(step.kernel for step in plan.steps if step.kernel.key == key)


class TestFork:
    def test_a_child_is_refused_before_it_waits_for_a_lock(self, monkeypatch, fake, bind):
        bound = bind()
        monkeypatch.undo()
        monkeypatch.setattr(driver, "forked", True)
        driver.bindings.cache_clear()
        W, bias = torch.zeros(E, K, dtype=torch.bfloat16).t(), torch.zeros(E)
        with ends_within(5), held_locks(bound):
            with pytest.raises(RouterError, match='start it with the method "spawn"'):
                call(bound)
            with pytest.raises(RouterError, match='start it with the method "spawn"'):
                dense_router_dispatch(X, W, bias, 1.0, TOP_K, OUT, IDS)
        with ends_within(5), workspace._workspaces_lock:
            for act in (status, check, reset):
                with pytest.raises(RouterError, match='start it with the method "spawn"'):
                    act(0)

    def test_a_fork_after_the_driver_was_used_is_noticed(self):
        program = """
            import os
            from cuda.bindings import driver as real
            from dsv4_router_runtime.device import driver
            real.cuInit = lambda flags: (real.CUresult.CUDA_SUCCESS,)
            if os.fork() == 0:
                driver.bindings()
                os._exit(7)
            print(os.waitstatus_to_exitcode(os.wait()[1]), flush=True)
            driver.bindings()
            if os.fork() == 0:
                try:
                    driver.bindings()
                except driver.RouterError as error:
                    print(error, flush=True)
                os._exit(0)
            os.wait()
            driver.bindings()
        """
        ran = subprocess.run(
            [sys.executable, "-c", textwrap.dedent(program)],
            capture_output=True, text=True, timeout=60, check=True,
        )  # fmt: skip
        first, second = ran.stdout.splitlines()
        assert first == "7"
        assert second.startswith("this process was forked from one that had used CUDA")
