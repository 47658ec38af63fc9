"""Faults that take several GPUs: memory, contexts and graphs of one do not reach another."""

from __future__ import annotations

import threading

import pytest

torch = pytest.importorskip("torch", reason="torch is not installed")

from gpu_calls import captured  # noqa: E402
from gpu_layer import Layer  # noqa: E402
from gpu_neighbours import poison  # noqa: E402

import dsv4_router_runtime as runtime  # noqa: E402

COUNT = torch.cuda.device_count()
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(COUNT < 2, reason=f"not run: it takes two GPUs and there are {COUNT}"),
]
EACH = pytest.mark.parametrize("index", range(max(COUNT, 1)))


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
    for each in range(COUNT):
        runtime.check(each)


@EACH
def test_a_reset_of_one_gpu_leaves_the_others(layers, index):
    for layer in layers:
        layer()
    before = [runtime.status(each) for each in range(COUNT)]
    with torch.cuda.device(index):
        poison(0x5A)
    with pytest.raises(runtime.RouterError, match="expected zeroed scratch"):
        runtime.check(index)
    for each in range(COUNT):
        if each != index:
            runtime.check(each)
    runtime.reset(index)
    runtime.check(index)
    assert [runtime.status(each).streams for each in range(COUNT)] == [
        status.streams for status in before
    ]
    for layer in layers:
        layer.spoil()
        layer()
    check_all(layers)


@EACH
def test_a_layer_dropped_on_one_gpu_leaves_the_others(layers, index):
    for layer in layers:
        layer()
    torch.cuda.synchronize(index)
    kept = layers[:index] + layers[index + 1 :]
    layers[index] = None
    with torch.cuda.device(index):
        torch.cuda.empty_cache()
    for layer in kept:
        layer.spoil()
        layer()
        with torch.cuda.device(layer.x.device):
            layer.check()
