"""Faults on a GPU, each in a process of its own with a time limit: a hang is a failed test.

They want the GPU for themselves (`-n 0`): a kernel that never ends takes every other process's time
slices, and a test beside it runs into its time limit.

DSV4_FAULT_SECONDS: how long the soak runs; 20 by default.
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import threading

import pytest
from gpu_child import child, command, environment

torch = pytest.importorskip("torch", reason="torch is not installed")

pytestmark = pytest.mark.gpu

SOAK_SECONDS = float(os.environ.get("DSV4_FAULT_SECONDS", "20"))
CLEAN = (1, 8, 9, 64, 65, 129, 300)
# Tokens of decode, of both fused tiles and of a product with its selection.
OF_EVERY_KIND = (4, 17, 64, 65, 96, 300, 640, 900)
TORN = ["padding_mask", "image_mask", "num_tokens", "num_tokens_negative", "input_ids"]


@pytest.mark.parametrize(
    ("num_tokens", "launches"), [(8, 1_000_000), (64, 1_000_000), (100, 300_000)]
)
@pytest.mark.parametrize("kind", TORN)
def test_an_input_that_is_rewritten_all_the_while(kind, num_tokens, launches):
    assert child("torn", kind, num_tokens, launches)["launches"] >= launches


@pytest.mark.parametrize("throughout", [False, True])
@pytest.mark.parametrize(
    ("kind", "num_tokens", "same_bits"),
    [
        ("plain", OF_EVERY_KIND, False),
        ("table", OF_EVERY_KIND, False),
        ("map", OF_EVERY_KIND, False),
        ("plain", (700, 1000), True),
    ],
)
def test_every_input_is_rewritten_at_once(kind, num_tokens, same_bits, throughout):
    assert child("inputs_torn", kind, num_tokens, same_bits, throughout, 0.4)["launches"] > 0


def test_the_logits_of_a_product_are_rewritten_while_they_are_read():
    assert child("logits_torn", 10.0)["launches"] > 0


@pytest.mark.parametrize("num_tokens", [64, 128])
def test_a_neighbour_on_any_number_of_sms(num_tokens):
    """At N = 128 six clusters of 16 whole SMs, which do not all fit beside most neighbours."""
    num_sms = torch.cuda.get_device_properties(0).multi_processor_count
    waited = child("spinner", num_sms, num_tokens)["waited_for_the_neighbour"]
    # With every SM taken it has to wait; with none it does not.
    assert num_sms in waited
    assert 0 not in waited


def test_threads_and_streams_and_graphs_for_a_while():
    assert child("load", SOAK_SECONDS, seconds=SOAK_SECONDS + 180)["rounds"] > 0


def test_graphs_that_are_destroyed_at_random():
    child("graphs_destroyed")


def test_one_graph_in_two_parents():
    child("one_graph_in_two_parents")


def test_nan_everywhere():
    child("nan_everywhere")


def test_a_process_that_is_killed_in_the_middle_of_a_launch():
    """The next process finds the GPU as it was."""
    victim = subprocess.Popen(
        command("launches_until_killed"), env=environment(), stdout=subprocess.PIPE, text=True
    )
    # readline would wait for ever on a child that hangs before it says anything.
    watchdog = threading.Timer(120, victim.kill)
    watchdog.start()
    try:
        assert victim.stdout.readline() == "ready\n"
        with pytest.raises(subprocess.TimeoutExpired):
            victim.wait(timeout=2)
    finally:
        watchdog.cancel()
        victim.kill()
    assert victim.wait(timeout=60) == -signal.SIGKILL
    child("clean", CLEAN)


def test_two_processes_at_once():
    """Neither knows of the other; each has scratch of its own."""
    others = [
        subprocess.Popen(
            command("load", 10.0), env=environment(), stderr=subprocess.PIPE, text=True
        )
    ]
    try:
        child("nan_everywhere")
        child("clean", CLEAN)
        _, errors = others[0].communicate(timeout=180)
        # Its device bytes are not its own alone while another process runs.
        assert others[0].returncode == 0 or "device bytes grew" in errors, errors
    finally:
        others[0].kill()


def test_a_million_tokens():
    child("a_million_tokens", seconds=300)


def test_a_chain_with_a_kernel_that_never_waits():
    child("chain_that_never_waits")


@pytest.mark.parametrize("allocator", ["", "expandable_segments:True"])
def test_empty_cache_between(allocator):
    child("empty_cache_between", env={"PYTORCH_CUDA_ALLOC_CONF": allocator} if allocator else None)


@pytest.mark.parametrize("num_tokens", [64, 100])
@pytest.mark.parametrize("byte", [1, 0xFF, 0x5A])
def test_a_launch_on_scratch_that_is_not_zero(byte, num_tokens):
    child("poisoned_launch", byte, num_tokens)


@pytest.mark.parametrize(
    ("options", "num_tokens"),
    [
        # Loading asks the driver for one parameter more than a kernel has, and expects its refusal.
        ("--tool memcheck --report-api-errors no", CLEAN),
        ("--tool racecheck", CLEAN),
        ("--tool synccheck", CLEAN),
        # initcheck does not see the TMA stores by which cuBLAS writes the logits of a product.
        ("--tool initcheck", CLEAN[:-1]),
    ],
)
def test_compute_sanitizer(options, num_tokens):
    sanitizer = shutil.which("compute-sanitizer")
    if sanitizer is None:
        pytest.skip("compute-sanitizer is not installed")
    done = subprocess.run(
        [sanitizer, *options.split(), "--error-exitcode", "9", *command("clean", num_tokens)],
        env=environment(),
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-4000:]
