"""Faults that take several GPUs: memory, contexts and graphs of one do not reach another."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
import time
import weakref
from collections.abc import Mapping
from typing import Any

import pytest

torch = pytest.importorskip("torch", reason="torch is not installed")

from gpu_calls import captured  # noqa: E402
from gpu_child import child, command, environment, together  # noqa: E402
from gpu_layer import Layer  # noqa: E402
from gpu_neighbours import poison  # noqa: E402
from gpus_children import names_of_gpus, poisoned_gpus  # noqa: E402

import dsv4_router_runtime as runtime  # noqa: E402

COUNT = torch.cuda.device_count()
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(COUNT < 2, reason=f"not run: it takes two GPUs and there are {COUNT}"),
]
EACH = pytest.mark.parametrize("index", range(max(COUNT, 1)))
# NVLink multicast stays off: a fault in it can put all GPUs of a host out of service.
NCCL = {"NCCL_NVLS_ENABLE": "0"}


@pytest.fixture
def layers():
    """One layer and batch of the same values on each GPU."""
    made = []
    for index in range(COUNT):
        with torch.cuda.device(index):
            made.append(Layer(64))
    return made


def check_all(layers) -> None:
    for index, layer in enumerate(layers):
        with torch.cuda.device(index):
            layer.check()
        runtime.check(index)


@EACH
def test_a_call_runs_on_its_layers_gpu_whatever_the_current_one(layers, index):
    with torch.cuda.device(index):
        for layer in layers:
            layer()
        assert torch.cuda.current_device() == index
    check_all(layers)


@EACH
def test_tensors_of_another_gpu_are_refused(layers, index):
    here, there = layers[index], layers[(index + 1) % COUNT]
    with pytest.raises(ValueError, match="device"):
        here.router(there.x, *here.out)
    with pytest.raises(ValueError, match="device"):
        here.router(here.x, *there.out)


def test_a_thread_for_each_gpu(layers):
    errors = []

    def work(index: int) -> None:
        try:
            torch.cuda.set_device(index)
            for _ in range(500):
                layers[index].spoil()
                layers[index]()
                layers[index].check()
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=work, args=(index,)) for index in range(COUNT)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert errors == []


@EACH
def test_a_graph_of_one_gpu_while_the_others_work(layers, index):
    with torch.cuda.device(index):
        graph = captured([layers[index]] * 10)
        layers[index].spoil()
        for _ in range(200):
            graph.replay()
            for layer in layers[:index] + layers[index + 1 :]:
                layer()
    check_all(layers)


@EACH
def test_a_reset_of_one_gpu_leaves_the_others(layers, index):
    for layer in layers:
        layer()
    before = [runtime.status(each) for each in range(COUNT)]
    others = [each for each in range(COUNT) if each != index]
    with torch.cuda.device(index):
        poison(0x5A)
    assert poisoned_gpus() == [index]
    for each in others:
        with torch.cuda.device(each):
            poison(0x5A)
    runtime.reset(index)
    assert poisoned_gpus() == others
    for each in others:
        runtime.reset(each)
    assert [runtime.status(each).streams for each in range(COUNT)] == [
        status.streams for status in before
    ]
    for layer in layers:
        layer.spoil()
        layer()
    check_all(layers)


@EACH
def test_a_layer_dropped_on_one_gpu_leaves_the_others(layers, index):
    # A loop's variable would keep the last layer.
    for each in range(COUNT):
        layers[each]()
    torch.cuda.synchronize(index)
    kept = layers[:index] + layers[index + 1 :]
    dropped = weakref.ref(layers[index])
    layers[index] = None
    assert dropped() is None
    with torch.cuda.device(index):
        torch.cuda.empty_cache()
    for layer in kept:
        layer.spoil()
        layer()
        with torch.cuda.device(layer.x.device):
            layer.check()


def doctor(*arguments: str, **env: str) -> list[dict[str, str]]:
    """Return doctor's findings, none of which is a FAIL."""
    start = time.perf_counter()
    done = subprocess.run(
        [sys.executable, "-m", "dsv4_router_runtime", "doctor", "--json", *arguments],
        env=environment(**env),
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode in (0, 1), done.stdout + done.stderr
    print(f"doctor {' '.join(arguments)}: {time.perf_counter() - start:.2f} s")
    return json.loads(done.stdout)["findings"]


def check_blocks(findings: list[dict[str, str]], gpus: Mapping[int, int]) -> None:
    """Expect one block per GPU. gpus: doctor's number of each, and torch's number here."""
    found = {each["check"]: each["found"] for each in findings}
    assert len(found) == len(findings), "a check is there twice"
    assert [check for check in found if check.startswith("gpu ")] == [f"gpu {n}" for n in gpus]
    first: dict[Any, int] = {}
    for number, index in gpus.items():
        gpu = torch.cuda.get_device_properties(index)
        what = f"{gpu.name}, sm_{gpu.major}{gpu.minor}a, {gpu.multi_processor_count} SMs, "
        assert found[f"gpu {number}"].startswith(what)
        loaded = [c for c in found if c.startswith("kernel ") and c.endswith(f" gpu {number}")]
        like = first.setdefault(what, number)
        if like == number:
            assert loaded
            assert f"self-test gpu {number}" in found
        else:
            assert not loaded
            assert found[f"kernels gpu {number}"] == f"checked on GPU {like}, which is alike"


def test_doctor_gives_each_gpu_its_block():
    findings = doctor()
    check_blocks(findings, {index: index for index in range(COUNT)})
    (driver,) = (each["found"] for each in findings if each["check"] == "driver")
    assert driver.endswith(f", {COUNT} GPUs")


@EACH
def test_doctor_tests_the_gpu_that_is_named(index):
    findings = doctor("--device", str(index))
    check_blocks(findings, {index: index})
    found = {each["check"]: each["status"] for each in findings}
    assert found[f"self-test gpu {index}"] == found[f"workspace gpu {index}"] == "OK"


@pytest.mark.parametrize("first", range(1, max(COUNT, 2)))
def test_gpus_in_another_order(first):
    """A child with CUDA_VISIBLE_DEVICES in another order names the GPUs that it uses."""
    order = [*range(first, COUNT), *range(first)]
    given = os.environ.get("CUDA_VISIBLE_DEVICES") or ",".join(map(str, range(COUNT)))
    names = given.split(",")
    env = {"CUDA_VISIBLE_DEVICES": ",".join(names[index] for index in order)}
    here = names_of_gpus()
    for key in ("uuid", "doctor"):
        assert len({each[key] for each in here}) == COUNT
    assert child("every_gpu", env=env)["gpus"] == [here[index] for index in order]
    check_blocks(doctor("--quick", **env), dict(enumerate(order)))


@pytest.mark.parametrize("num_tokens", [1, 64])
@pytest.mark.parametrize("kind", ["beside", "between"])
def test_routers_with_all_reduces(tmp_path, kind, num_tokens):
    """One process per GPU, all-reduces beside the routers of a graph or before each of them."""
    call = ("routers_with_nccl", kind, num_tokens)
    commands = [command(*call, rank, COUNT, str(tmp_path / "meeting")) for rank in range(COUNT)]
    figures = together(commands, seconds=240, env=NCCL)
    line = json.dumps({"all_reduces": kind, "num_tokens": num_tokens, "gpus": figures})
    print(f"\n{line}")
    assert [each["gpu"] for each in figures] == list(range(COUNT))
