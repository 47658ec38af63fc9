"""Children of the tests on several GPUs: one process for all GPUs, or one for each with NCCL."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from functools import partial
from statistics import median
from typing import Any

import torch
from gpu_calls import BF16, captured
from gpu_layer import Layer
from gpu_neighbours import poison
from torch import distributed

import dsv4_router_runtime as runtime
from dsv4_router_runtime.doctor.finding import out_of_service

# The routers of a model. Their weights, 5.5 MB each, do not stay in a GPU's L2.
LAYERS, HIDDEN = 40, 7168
REPLAYS = 200
# The all-reduces of a loop take several times as long as the routers beside it.
REDUCTIONS, REDUCED_TOKENS = 200, 64
# Threads of torch and NCCL ask for their events meanwhile, which a global capture forbids.
MODE = "thread_local"


def names_of_gpus() -> list[dict[str, str]]:
    """Return each visible GPU's identity by torch, and doctor's next step for it."""
    return [
        {
            "uuid": str(torch.cuda.get_device_properties(index).uuid),
            "doctor": out_of_service(index),
        }
        for index in range(torch.cuda.device_count())
    ]


def every_gpu() -> dict[str, Any]:
    """Call, poison and reset on each visible GPU, and return their names."""
    gpus = range(torch.cuda.device_count())
    layers = []
    for index in gpus:
        with torch.cuda.device(index):
            layers.append(Layer(64, seed=index))
    for current in gpus:
        with torch.cuda.device(current):
            _call_all(layers)
    for index in gpus:
        status = runtime.status(index)
        assert status.device == f"cuda:{index}"
        assert status.streams == 1
        with torch.cuda.device(index):
            poison(0x5A)
        assert poisoned_gpus() == [index]
        runtime.reset(index)
        runtime.check(index)
        _call_all(layers)
    return {"gpus": names_of_gpus()}


def _call_all(layers: Sequence[Layer]) -> None:
    for layer in layers:
        layer.spoil()
        layer()
    for layer in layers:
        with torch.cuda.device(layer.x.device):
            layer.check()


def poisoned_gpus() -> list[int]:
    """Return the GPUs whose scratch `check` refuses."""
    return [index for index in range(torch.cuda.device_count()) if _is_poisoned(index)]


def _is_poisoned(index: int) -> bool:
    try:
        runtime.check(index)
    except runtime.RouterError as error:
        if "expected zeroed scratch" not in str(error):
            raise
        return True
    return False


def routers_with_nccl(
    kind: str, num_tokens: int, rank: int, world: int, meeting: str
) -> dict[str, Any]:
    """Replay the routers of a model beside all-reduces, or with one before each.

    Returns the medians in microseconds per layer. meeting: a file that the processes share.
    """
    torch.cuda.set_device(rank)
    distributed.init_process_group(
        "nccl",
        init_method=f"file://{meeting}",
        rank=rank,
        world_size=world,
        timeout=timedelta(seconds=60),
        device_id=torch.device("cuda", rank),
    )
    # It destroys its graphs: the end of the group waits for those that hold calls of NCCL.
    times = {"beside": _beside, "between": _between}[kind](num_tokens, rank, world)
    runtime.check()
    torch.cuda.synchronize()
    distributed.destroy_process_group()
    return {"gpu": rank, **times}


def _beside(num_tokens: int, rank: int, world: int) -> dict[str, Any]:
    """Time the routers alone, and beside a loop of all-reduces on another stream."""
    layers = [Layer(num_tokens, seed=seed, k=HIDDEN) for seed in range(LAYERS)]
    mine = torch.full((REDUCED_TOKENS, HIDDEN), rank + 1, dtype=BF16, device="cuda")
    total = torch.empty_like(mine)
    with _graphs(layers, [partial(_reduce, mine, total)] * REDUCTIONS) as (routers, loop):
        alone = _times(routers, layers)
        total.zero_()
        beside = _times(routers, layers, loop)
    assert (total == world * (world + 1) // 2).all(), "a sum is wrong"
    assert len(beside) > REPLAYS // 2, "the loop ends before the routers do"
    return {"alone_us": _middle(alone), "beside_us": _middle(beside), "replays": len(beside)}


def _between(num_tokens: int, rank: int, world: int) -> dict[str, Any]:
    """Time the routers alone, the all-reduces of their inputs alone, and both in turn."""
    layers = [Layer(num_tokens, seed=seed, k=HIDDEN) for seed in range(LAYERS)]
    # Each process has every world-th row: a router before its all-reduce has lost the others.
    others = torch.arange(num_tokens, device="cuda") % world != rank
    parts = [layer.x.masked_fill(others[:, None], 0) for layer in layers]
    reductions = [partial(_reduce, p, layer.x) for p, layer in zip(parts, layers, strict=True)]
    pairs = zip(reductions, layers, strict=True)
    both = [call for pair in pairs for call in pair]
    with _graphs(layers, reductions, both) as (routers, reduced, in_turn):
        times = {
            "alone_us": _middle(_times(routers, layers)),
            "reductions_us": _middle(_times(reduced, [])),
            "both_us": _middle(_times(in_turn, layers, inputs=[layer.x for layer in layers])),
        }
    return times


def _reduce(part: torch.Tensor, total: torch.Tensor) -> None:
    total.copy_(part)
    distributed.all_reduce(total)


@contextmanager
def _graphs(*calls: Sequence[Any]) -> Iterator[list[torch.cuda.CUDAGraph]]:
    """Capture each list of calls; afterwards the graphs are destroyed, whatever refers to them."""
    graphs = [captured(each, mode=MODE) for each in calls]
    yield graphs
    torch.cuda.synchronize()
    for graph in graphs:
        graph.reset()


def _times(
    graph: torch.cuda.CUDAGraph,
    layers: Sequence[Layer],
    loop: torch.cuda.CUDAGraph | None = None,
    inputs: Sequence[torch.Tensor] = (),
) -> list[float]:
    """Replay a graph and check its layers each time; return microseconds per layer.

    loop: replayed on another stream; a replay that outlasts it is checked, and left out.
    inputs: tensors that the graph writes and its layers read; zeroed before each replay.
    """
    side = torch.cuda.Stream()
    begin, end, loop_end = (torch.cuda.Event(enable_timing=True) for _ in range(3))
    wrong = torch.zeros((), dtype=torch.bool, device="cuda")
    times = []
    for _ in range(REPLAYS):
        for layer in layers:
            layer.spoil()
        for tensor in inputs:
            tensor.zero_()
        # All processes start together: an all-reduce that waits for a peer is no load.
        distributed.barrier()
        torch.cuda.synchronize()
        if loop is not None:
            with torch.cuda.stream(side):
                loop.replay()
                loop_end.record()
        begin.record()
        graph.replay()
        end.record()
        torch.cuda.synchronize()
        for layer in layers:
            wrong.logical_or_(layer.differs(slice(None)))
        if loop is None or end.elapsed_time(loop_end) > 0:
            times.append(begin.elapsed_time(end) * 1000 / LAYERS)
    assert not wrong.item(), "a row is wrong"
    return times


def _middle(times: Sequence[float]) -> float:
    return round(median(times), 2)
