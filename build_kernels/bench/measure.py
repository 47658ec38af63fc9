"""Check the answers of each shape, mode, N and contender, then time the same calls."""

from __future__ import annotations

import math
import subprocess
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from build_kernels.building.entry import sha256
from dsv4_router_runtime.artifacts.folder import MANIFEST_NAME, ArtifactSet

from . import floors
from .check import (
    KEY_TOLERANCE,
    WEIGHT_TOLERANCE,
    Reference,
    complaint,
    exact_complaint,
    reference_of,
)
from .contenders import Entrant, Unavailable
from .inputs import Call, Inputs, make_inputs, poison
from .report import (
    BEHIND,
    COLD,
    EMPTY,
    HOST,
    READ,
    WARM,
    Figure,
    Floor,
    Machine,
    Method,
    Problem,
    Report,
    in_a_line,
)
from .stopwatch import HOST_CALLS, L2_CAPACITIES, REPLAYS, Stopwatch

SEED = 20
MIN_LAYERS = 30
MIN_WEIGHT_BYTES = 200_000_000
# Of more tokens, and for the host's time, a run calls few layers: an answer's check takes longer
# than its call.
LARGE_NUM_TOKENS = 512
FEW_LAYERS = 24

OnFigures = Callable[[Sequence[Figure]], None]
# Problem, layout, device, seed.
MakeLayers = Callable[[Problem, str, str, int], Inputs]
# Entrants, inputs, modes, stopwatch to the figures of each mode.
Rows = Callable[[Sequence[Entrant], Inputs, Sequence[str], Stopwatch], Iterator[list[Figure]]]


def make_problem(k: int, num_experts: int, top_k: int, l2_bytes: int) -> Problem:
    """Make a problem with enough layers to keep a cold run's weights out of L2."""
    least = max(MIN_WEIGHT_BYTES, L2_CAPACITIES * l2_bytes)
    return Problem(
        k=k,
        num_experts=num_experts,
        top_k=top_k,
        # V4-Pro's, and V4-Flash's.
        routed_scaling_factor=2.5 if k == 7168 else 1.5,
        layers=max(MIN_LAYERS, math.ceil(least / (k * num_experts * 2))),
    )


def rows_alone(
    entrants: Sequence[Entrant], inputs: Inputs, modes: Sequence[str], stopwatch: Stopwatch
) -> Iterator[list[Figure]]:
    """Yield the figures of each mode, and of the host, from calls with nothing between them."""
    references = References(inputs)
    calls = [made_call(entrant, inputs) for entrant in entrants]
    for mode in (*modes, HOST):
        yield [
            measure_cell(entrant, call, inputs, references, mode, stopwatch)
            for entrant, call in zip(entrants, calls, strict=True)
        ]


def measure(
    *,
    problems: Sequence[Problem],
    num_tokens: Sequence[int],
    modes: Sequence[str],
    layout: str,
    entrants: Sequence[Entrant],
    stopwatch: Stopwatch,
    machine: Machine,
    manifest_sha256: str,
    on_figures: OnFigures,
    make_layers: MakeLayers = make_inputs,
    rows: Rows = rows_alone,
) -> Report:
    """Measure every cell of the report. `on_figures` gets the figures of one shape, N and mode.

    A contender's failure does not end the run: its reason takes the place of the figure.
    """
    figures: list[Figure] = []
    measured_floors: list[Floor] = []
    for problem in problems:
        layers = make_layers(problem, layout, stopwatch.device, SEED)
        measured_floors += measure_floors(layers, modes, stopwatch)
        for count in num_tokens:
            inputs = layers.with_tokens(count, SEED)
            for row in rows(entrants, inputs, modes, stopwatch):
                figures += row
                on_figures(row)
    return Report(
        machine=machine,
        method=Method(
            date=time.strftime("%Y-%m-%d"),
            modes=tuple(modes),
            num_tokens=tuple(num_tokens),
            layout=layout,
            replays=REPLAYS,
            host_calls=HOST_CALLS,
            least_weight_bytes=min(p.weight_bytes * p.layers for p in problems),
            seed=SEED,
            key_tolerance=KEY_TOLERANCE,
            weight_tolerance=WEIGHT_TOLERANCE,
            manifest_sha256=manifest_sha256,
        ),
        problems=tuple(problems),
        contenders=tuple(entrant.contender for entrant in entrants),
        figures=tuple(figures),
        floors=tuple(measured_floors),
    )


class References(dict[int, Reference]):
    """The right answers of one shape and N, each made on first use."""

    def __init__(self, inputs: Inputs) -> None:
        super().__init__()
        self._inputs = inputs

    def __missing__(self, layer: int) -> Reference:
        self[layer] = reference_of(self._inputs, layer)
        return self[layer]


def made_call(entrant: Entrant, inputs: Inputs) -> Call | Exception:
    """Return the contender's call for these inputs, or its exception."""
    try:
        return entrant.make(inputs)
    except Exception as error:
        return error


def measure_cell(
    entrant: Entrant,
    call: Call | Exception,
    inputs: Inputs,
    references: Mapping[int, Reference],
    mode: str,
    stopwatch: Stopwatch,
) -> Figure:
    """Check every call of the run that is then timed; a wrong answer is not timed."""
    shape, num_tokens = inputs.problem.name, inputs.num_tokens

    def figure(**more: Any) -> Figure:
        return Figure(
            shape=shape, mode=mode, num_tokens=num_tokens, contender=entrant.contender.name, **more
        )

    order = call_order(inputs, mode)
    try:
        if isinstance(call, Exception):
            raise call
        run = stopwatch.prepare(call, order, mode)
        # A contender that allocates its outputs gets these poisoned blocks.
        for result in run():
            poison(result)
        results = run()
        stopwatch.wait()
        for layer, result in zip(order, results, strict=True):
            if entrant.expected is None:
                problem = complaint(result, references[layer], inputs.problem.top_k)
            else:
                problem = exact_complaint(result, entrant.expected(inputs, layer))
            if problem:
                return figure(reason=f"wrong answer in layer {layer}: {problem}")
        del results
        if mode == HOST:
            timing = stopwatch.time_host(call, order)
        else:
            timing = stopwatch.time(run, len(order), mode)
    except Unavailable as error:
        return figure(reason=str(error))
    # Whatever a contender raises, the others are still measured.
    except Exception as error:
        return figure(reason=in_a_line(error))
    return figure(microseconds=timing.microseconds, low=timing.low, high=timing.high)


def call_order(inputs: Inputs, mode: str) -> list[int]:
    """Return the layer of each call; always the same one if its weight is to stay in L2."""
    layers = inputs.problem.layers
    if inputs.num_tokens > LARGE_NUM_TOKENS or mode == HOST:
        layers = min(layers, FEW_LAYERS)
    return [0] * layers if mode == WARM else list(range(layers))


def measure_floors(inputs: Inputs, modes: Sequence[str], stopwatch: Stopwatch) -> Iterator[Floor]:
    """Time an empty kernel in every mode, and the read of the weights in a graph.

    None in BEHIND: a launch and a read that the norm hides are below both.
    """
    for mode in (mode for mode in modes if mode not in BEHIND):
        yield measure_floor(EMPTY, floors.empty_candidates(inputs), inputs, mode, stopwatch)
        if mode in (COLD, WARM):
            yield measure_floor(READ, floors.read_candidates(inputs), inputs, mode, stopwatch)


def measure_floor(
    name: str,
    candidates: Iterable[floors.Candidate],
    inputs: Inputs,
    mode: str,
    stopwatch: Stopwatch,
) -> Floor:
    """Time every candidate and return the fastest."""
    shape, order = inputs.problem.name, call_order(inputs, mode)
    times: list[tuple[float, str]] = []
    try:
        for candidate in candidates:
            run = stopwatch.prepare(candidate.call, order, mode)
            times.append((stopwatch.time(run, len(order), mode).microseconds, candidate.how))
    # A floor that cannot be measured is reported like a contender that cannot.
    except Exception as error:
        if not times:
            return Floor(shape=shape, mode=mode, name=name, how="", reason=in_a_line(error))
    microseconds, how = min(times)
    return Floor(shape=shape, mode=mode, name=name, how=how, microseconds=microseconds)


def this_machine(arch: str, sms: int | None = None) -> Machine:
    """Describe torch's current GPU, or a green context of so many of its SMs, and the software."""
    part = "" if sms is None else f", a green context of {sms} SMs"
    return Machine(
        gpu=f"{torch.cuda.get_device_name()}{part}",
        arch=arch,
        driver=driver_version(),
        cuda=str(torch.version.cuda),
        torch=torch.__version__,
        triton=floors.triton_version(),
    )


def driver_version() -> str:
    """Return the kernel module's version by nvidia-smi; "unknown" if that fails."""
    query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        done = subprocess.run(query, capture_output=True, text=True, timeout=30, check=True)
    except (OSError, subprocess.SubprocessError):
        return "unknown"
    return done.stdout.splitlines()[0].strip() if done.stdout.strip() else "unknown"


def manifest_sha256(artifacts: ArtifactSet) -> str:
    return sha256((Path(artifacts.folder) / MANIFEST_NAME).read_bytes())
