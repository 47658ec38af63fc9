"""What the tests of faults run in a process of its own, since it may hang or lose the GPU.

    python tests/gpu_fault_children.py NAME [JSON arguments]

Prints JSON figures as its last line. An exception, or a wrong row, is a nonzero exit status.
"""

from __future__ import annotations

import gc
import json
import os
import random
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from cuda.bindings import driver as cuda
from gpu_calls import captured, integers, logits_of
from gpu_layer import SCALE, TOP_K, VOCABULARY, E, Layer, checked
from gpu_neighbours import launch_that_never_waits, poison, rewriting, spinning
from gpu_tears import inputs_torn, logits_torn
from gpus_children import every_gpu, routers_with_nccl

import dsv4_router_runtime as runtime
from dsv4_router_runtime import Router
from dsv4_router_runtime.reference import select_reference

LAUNCHES_OF_A_GRAPH = 200
CHECKED_AT_ONCE = 50
# How the driver's codes of a trap read in this package's errors, and in torch's.
TRAPS = (
    *("CUDA_ERROR_LAUNCH_FAILED", "unspecified launch failure"),
    *("CUDA_ERROR_ILLEGAL_INSTRUCTION", "illegal instruction"),
)


def torn(kind: str, num_tokens: int, launches: int) -> dict[str, Any]:
    """Launch, eagerly and in graphs, beside a kernel that rewrites an input all the while."""
    n, whole = num_tokens, slice(3, None, 4)
    mask = torch.zeros(n, dtype=torch.bool, device="cuda")
    count = torch.full((1,), n, dtype=torch.int32, device="cuda")
    ids = (torch.arange(n, device="cuda") % VOCABULARY).to(torch.int32)
    # Every fourth byte of a mask stays 0; the first half of the rows is never beyond the count.
    cases: Mapping[str, tuple[dict, torch.Tensor, Sequence[int], slice]] = {
        "padding_mask": ({"padding_mask": mask}, mask, (0, 0x010101, 0x0100), whole),
        "image_mask": ({"image_mask": mask}, mask, (0, 0x010101, 0x0100), whole),
        "num_tokens": ({"num_tokens": count}, count, (n, n // 2, 2**31 - 1), slice(0, n // 2)),
        # No row is whole: only that each launch ends and writes every row is checked.
        "num_tokens_negative": ({"num_tokens": count}, count, (n, -1, 0), slice(0, 0)),
        "input_ids": ({"input_ids": ids}, ids[: n // 2], (0, -1, VOCABULARY, 7), slice(n // 2, n)),
    }
    call, words, values, rows = cases[kind]
    hashed, images = kind == "input_ids", kind == "image_mask"
    layer = Layer(n, hashed=hashed, images=images, call=call)
    clean = words.clone()
    graph = captured([layer] * LAUNCHES_OF_A_GRAPH)

    # Kept on the GPU: the host waits once per CHECKED_AT_ONCE graphs, since each wait may take a
    # time slice of a GPU that processes share.
    wrong, unwritten = torch.zeros(2, dtype=torch.bool, device="cuda").unbind()

    def launch() -> None:
        layer.spoil()
        graph.replay()
        layer(pdl=True)
        wrong.logical_or_(layer.differs(rows))
        unwritten.logical_or_((layer.out[1] == -77).any())

    # Once before: the driver loads a kernel at its first use, which waits for all others to end.
    launch()
    assert not (wrong | unwritten).item()
    done, started = 0, time.monotonic()
    with rewriting(words, values):
        while done < launches:
            for _ in range(CHECKED_AT_ONCE):
                launch()
            done += CHECKED_AT_ONCE * (LAUNCHES_OF_A_GRAPH + 1)
            assert not wrong.item(), "a row whose inputs are not torn is wrong"
            assert not unwritten.item(), "a torn row was not written"
    words.copy_(clean)
    runtime.check()
    layer.spoil()
    layer()
    layer.check()
    return {"launches": done, "seconds": round(time.monotonic() - started, 1)}


def spinner(most: int, num_tokens: int) -> dict[str, Any]:
    """Call beside a kernel that holds k SMs, for every k, and again after it has ended."""
    layer, waited = Layer(num_tokens), []
    layer()
    layer.check()
    for num_sms in range(most + 1):
        layer.spoil()
        with spinning(num_sms) as stop:
            layer()
            done = torch.cuda.Event()
            done.record()
            until = time.monotonic() + 0.05
            while not done.query() and time.monotonic() < until:
                time.sleep(0.001)
            if not done.query():
                waited.append(num_sms)
            stop[0] = 1
            layer.check()
    runtime.check()
    return {"waited_for_the_neighbour": waited}


def load(seconds: float) -> dict[str, Any]:
    """Call from 8 threads on 4 streams each, eagerly and by graphs; memory stays as it is."""
    layers = [[Layer(n, seed=n + 10 * thread) for n in (1, 7, 33, 64, 100)] for thread in range(8)]
    errors: list[BaseException] = []
    rounds = [0] * len(layers)

    def work(thread: int, until: float) -> None:
        try:
            torch.cuda.set_device(0)
            streams = [torch.cuda.Stream() for _ in layers[thread]]
            while time.monotonic() < until:
                for layer, stream in zip(layers[thread], streams, strict=True):
                    with torch.cuda.stream(stream):
                        layer.spoil()
                        layer()
                        layer.check()
                        graphs[thread, layer.x.shape[0]].replay()
                        layer.check()
                rounds[thread] += 1
        except BaseException as error:
            errors.append(error)

    graphs = {
        (thread, layer.x.shape[0]): captured([layer] * 20)
        for thread, mine in enumerate(layers)
        for layer in mine
    }
    sizes = []
    for _ in range(4):
        until = time.monotonic() + seconds / 4
        threads = [threading.Thread(target=work, args=(i, until)) for i in range(len(layers))]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        if errors:
            raise errors[0]
        torch.cuda.synchronize()
        gc.collect()
        sizes.append((_resident_bytes(), torch.cuda.mem_get_info()[0]))
    runtime.check()
    # The first quarter warms up streams, allocator and threads.
    (resident, free), (resident_after, free_after) = sizes[1], sizes[-1]
    assert resident_after < 1.05 * resident, f"resident bytes grew: {sizes}"
    assert free - free_after < 8 << 20, f"device bytes grew: {sizes}"
    return {"rounds": sum(rounds), "resident": resident_after, "device_free": free_after}


def _resident_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGESIZE")


def graphs_destroyed() -> dict[str, Any]:
    """Make 200 graphs and destroy them in a random order, with calls and replays between."""
    choice = random.Random(0)
    layers = [Layer(n, seed=n) for n in (1, 8, 64, 100)]
    alive: list[tuple[Layer, Any]] = []
    for _ in range(200):
        layer = choice.choice(layers)
        alive.append((layer, captured([layer, layer])))
        if len(alive) > 8:
            del alive[choice.randrange(len(alive))]
        layer, graph = choice.choice(alive)
        layer.spoil()
        graph.replay()
        layer.check()
    alive.clear()
    gc.collect()
    runtime.check()
    for layer in layers:
        layer()
        layer.check()
    return {}


def one_graph_in_two_parents() -> dict[str, Any]:
    """Put one captured graph into two parent graphs, and launch them in turn on one stream."""
    layer = Layer(64)
    layer()
    graph = torch.cuda.CUDAGraph(keep_graph=True)
    with torch.cuda.graph(graph):
        layer()
    child = cuda.CUgraph(graph.raw_cuda_graph())
    parents = []
    for _ in range(2):
        parent = checked(cuda.cuGraphCreate(0))
        checked(cuda.cuGraphAddChildGraphNode(parent, None, 0, child))
        parents.append(checked(cuda.cuGraphInstantiate(parent, 0)))
    stream = cuda.CUstream(torch.cuda.current_stream().cuda_stream)
    for turn in range(2000):
        layer.spoil()
        checked(cuda.cuGraphLaunch(parents[turn % 2], stream))
        layer.check()
    runtime.check()
    return {}


def nan_everywhere() -> dict[str, Any]:
    """Route NaN by NaN; then a clean call."""
    for n in (1, 8, 64, 100, 300):
        layer = Layer(n)
        clean = [tensor.clone() for tensor in (layer.x, layer.W, layer.bias)]
        for tensor in (layer.x, layer.W, layer.bias):
            tensor.fill_(float("nan"))
        layer()
        torch.cuda.synchronize()
        ids = layer.out[1]
        assert ((ids >= 0) & (ids < E)).all(), "a row of NaN names no expert"
        assert all(len(set(row)) == TOP_K for row in ids.tolist()), "an expert was taken twice"
        for tensor, values in zip((layer.x, layer.W, layer.bias), clean, strict=True):
            tensor.copy_(values)
        layer.spoil()
        layer()
        layer.check()
    runtime.check()
    return {}


def launches_until_killed() -> dict[str, Any]:
    """Launch for ever, for a parent that kills this process."""
    layer = Layer(64)
    graph = captured([layer] * LAUNCHES_OF_A_GRAPH)
    print("ready", flush=True)
    while True:
        graph.replay()
        layer()


def clean(num_tokens: Sequence[int]) -> dict[str, Any]:
    """Make one right call at each N."""
    for n in num_tokens:
        layer = Layer(n)
        layer()
        layer.check()
    runtime.check()
    return {}


def a_million_tokens() -> dict[str, Any]:
    """Route 2^20 tokens into rows of two outputs of 4 GiB."""
    n, k, experts = 1 << 20, 64, 64
    generator = torch.Generator(device="cuda").manual_seed(0)
    x, W, bias = integers(generator, n, k, experts)
    weights = torch.zeros(n, 1024, device="cuda")
    ids = torch.zeros(n, 1024, dtype=torch.int32, device="cuda")
    Router(W, bias, top_k=TOP_K, routed_scaling_factor=SCALE)(x, weights, ids)
    for rows in (slice(0, 512), slice(n // 2, n // 2 + 512), slice(n - 512, n)):
        expected = select_reference(logits_of(x[rows], W), bias, SCALE, TOP_K)
        assert torch.equal(ids[rows, :TOP_K], expected[1].int()), rows
    assert not ids[:, TOP_K:].any(), "something was written beside the outputs"
    return {}


def chain_that_never_waits() -> dict[str, Any]:
    """Call, a dependent kernel that never waits, and call again, without pdl: in order.

    The chain that the contract forbids, a second call with pdl, is not made.
    """
    first, second = Layer(64, seed=1), Layer(64, seed=2)
    turns = torch.zeros(1, dtype=torch.int32, device="cuda")
    for _ in range(5000):
        first()
        launch_that_never_waits(turns, 5)
        second()
    first.check()
    second.check()
    assert turns.item() == 5000
    runtime.check()
    return {}


def empty_cache_between() -> dict[str, Any]:
    """Empty torch's cache between calls and replays; scratch is none of torch's."""
    layer = Layer(64)
    graph = captured([layer])
    for _ in range(200):
        torch.cuda.empty_cache()
        filler = torch.full((1 << 22,), 0x5A, dtype=torch.uint8, device="cuda")
        layer.spoil()
        layer()
        layer.check()
        graph.replay()
        layer.check()
        del filler
    runtime.check()
    return {}


def poisoned_launch(byte: int, num_tokens: int) -> dict[str, Any]:
    """Launch on scratch that is not zero: a trap, or the right rows; never others in silence."""
    layer = Layer(num_tokens)
    layer()
    layer.check()
    poison(byte)
    layer.spoil()
    try:
        layer()
        torch.cuda.synchronize()
    except RuntimeError as error:
        if not any(word in str(error) for word in TRAPS):
            raise
        print(json.dumps({"said": str(error)[:300]}), flush=True)
        os._exit(0)
    layer.check()
    return {"said": "right"}


CHILDREN: dict[str, Callable[..., dict[str, Any]]] = {
    child.__name__: child
    for child in (
        *(torn, spinner, load, graphs_destroyed, one_graph_in_two_parents, nan_everywhere),
        *(launches_until_killed, clean, a_million_tokens, chain_that_never_waits),
        *(empty_cache_between, poisoned_launch, inputs_torn, logits_torn),
        *(every_gpu, routers_with_nccl),
    )
}

if __name__ == "__main__":
    print(json.dumps(CHILDREN[sys.argv[1]](*json.loads(sys.argv[2]))))
