"""Time a CUDA graph's replay between two events, calls without a graph, and the host."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Protocol, TypeVar

import torch

from .report import BEHIND, COLD, EAGER, HOST

REPLAYS = 20
HOST_CALLS = 200
WARM_UP_CALLS = 3
# Before timing: an idle GPU's clocks take milliseconds to rise.
WARM_UP_SECONDS = 0.01
# Host-timed calls between two waits: far below the depth of the driver's launch queue.
HOST_BATCH = 20
# How many times the size of L2 is read to empty it.
L2_CAPACITIES = 4

Result = TypeVar("Result")


@dataclass(frozen=True, kw_only=True)
class Timing:
    """Microseconds per call: median and quartiles of the repetitions."""

    microseconds: float
    low: float
    high: float


class Stopwatch(Protocol):
    """The clock that `measure` uses. device: torch's device of the operands."""

    device: str

    def prepare(
        self, call: Callable[[int], Result], order: Sequence[int], mode: str
    ) -> Callable[[], list[Result]]:
        """Return a function that makes every call of `order` once and returns their results."""
        ...

    def time(self, run: Callable[[], object], calls: int, mode: str) -> Timing: ...

    def time_host(self, call: Callable[[int], object], order: Sequence[int]) -> Timing: ...

    def wait(self) -> None: ...


class CudaStopwatch:
    """Time calls on torch's current GPU. stream: the one to make them on; torch's own if None."""

    device = "cuda"

    def __init__(self, stream: torch.cuda.Stream | None = None) -> None:
        self._stream = stream

    def prepare(
        self, call: Callable[[int], Result], order: Sequence[int], mode: str
    ) -> Callable[[], list[Result]]:
        """Warm up, then record one graph of all calls; EAGER and HOST have nothing to record."""
        side = self._stream or torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for layer in order[:WARM_UP_CALLS]:
                call(layer)
        self.wait()
        if mode in (EAGER, HOST):
            return lambda: [call(layer) for layer in order]
        graph = torch.cuda.CUDAGraph()
        # A graph's kernels keep the context of the stream that was captured.
        with torch.cuda.graph(graph, stream=self._stream):
            results = [call(layer) for layer in order]

        def run() -> list[Result]:
            graph.replay()
            return results

        return run

    def time(self, run: Callable[[], object], calls: int, mode: str) -> Timing:
        """Time all calls between two events; in COLD and BEHIND, empty the L2 before each run."""
        with self._on_stream():
            return self._time(run, calls, mode)

    def _time(self, run: Callable[[], object], calls: int, mode: str) -> Timing:
        end = time.perf_counter() + WARM_UP_SECONDS
        run()
        self.wait()
        while time.perf_counter() < end:
            run()
            self.wait()
        samples = []
        for _ in range(REPLAYS):
            if mode in (COLD, *BEHIND):
                # Weights beyond the L2 empty it themselves, if all of them are read. Of a hash
                # layer's, few are: those of all layers would stay.
                self._l2_filler.sum()
                self.wait()
            start = torch.cuda.Event(enable_timing=True)
            stop = torch.cuda.Event(enable_timing=True)
            start.record()
            run()
            stop.record()
            self.wait()
            samples.append(start.elapsed_time(stop) * 1e3 / calls)
        return timing_of(samples)

    def time_host(self, call: Callable[[int], object], order: Sequence[int]) -> Timing:
        """Time each call by the host's clock; waits between batches are not counted."""
        samples = []
        with self._on_stream():
            for at in range(HOST_CALLS):
                if at % HOST_BATCH == 0:
                    self.wait()
                layer = order[at % len(order)]
                start = time.perf_counter_ns()
                call(layer)
                samples.append((time.perf_counter_ns() - start) / 1e3)
        self.wait()
        return timing_of(samples)

    def wait(self) -> None:
        torch.cuda.synchronize()

    def _on_stream(self) -> AbstractContextManager[Any]:
        return nullcontext() if self._stream is None else torch.cuda.stream(self._stream)

    @cached_property
    def _l2_filler(self) -> torch.Tensor:
        l2_bytes = torch.cuda.get_device_properties(torch.cuda.current_device()).L2_cache_size
        return torch.zeros(L2_CAPACITIES * l2_bytes // 4, dtype=torch.int32, device=self.device)


def timing_of(samples: Sequence[float]) -> Timing:
    """Compute median and quartiles of at least two samples."""
    low, median, high = statistics.quantiles(samples, n=4, method="inclusive")
    return Timing(microseconds=median, low=low, high=high)
