"""Time each contender behind an RMSNorm, as in a model's layer (`--behind`).

A figure is the time of the chain norm -> router less that of the norm alone, each in a CUDA graph
over all layers, with W_gate, the residual stream and the norm's weight cold. Every layer has a
residual stream of its own values: a router that reads before the norm has written is wrong. In
BEHIND_READ, a reader of the ids ends the chain, and the norm and the reader are subtracted.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from .check import Reference, reference_of
from .contenders import Entrant, Unavailable
from .floors import why_no_triton
from .inputs import Call, Inputs, Result
from .measure import SEED, call_order, made_call, measure, measure_cell
from .report import (
    BEHIND_PDL,
    BEHIND_PLAIN,
    BEHIND_READ,
    BEHIND_TORCH,
    OWN,
    Contender,
    Figure,
    Report,
    in_a_line,
)
from .stopwatch import Stopwatch, Timing

EPSILON = 1e-6
# Relative: a norm may round to BF16 before it multiplies by its weight and after, by 2^-8 each.
NORM_TOLERANCE = 0.01
NORM_WARPS = 16
READER_BLOCK = 512
NORM_ALONE = Contender(
    name="norm alone", role=OWN, what="the chain without its router: subtracted from every figure"
)

# The layer's number to hidden_states [N, K].
NormCall = Callable[[int], torch.Tensor]


@dataclass(frozen=True, kw_only=True)
class Stream:
    """Operands of the norms, BF16. residual: [layers, N, K]. weight: [layers, K]."""

    residual: torch.Tensor
    weight: torch.Tensor


def make_stream(inputs: Inputs) -> Stream:
    """Make residuals of standard deviation 3 and weights near 1: hidden_states near 1, as usual."""
    problem, device = inputs.problem, inputs.bias.device
    random = torch.Generator(device=device).manual_seed(SEED + inputs.num_tokens)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=random, device=device)

    return Stream(
        residual=(3 * normal(problem.layers, inputs.num_tokens, problem.k)).bfloat16(),
        weight=(1 + 0.1 * normal(problem.layers, problem.k)).bfloat16(),
    )


def torch_norm(stream: Stream) -> NormCall:
    k = stream.residual.shape[-1]
    return lambda layer: torch.nn.functional.rms_norm(
        stream.residual[layer], (k,), stream.weight[layer], EPSILON
    )


def triton_norm(stream: Stream, *, pdl: bool) -> NormCall:
    """Return one kernel, a CTA per row. pdl: it waits for its predecessor, then triggers at once.

    Without `pdl` it is launched as usual and has neither.
    """
    if reason := why_no_triton(stream.residual.device):
        raise Unavailable(reason)
    from .triton_kernels import rms_norm_kernel

    _, num_tokens, k = stream.residual.shape
    block = 1 << (k - 1).bit_length()
    hidden_states = torch.empty_like(stream.residual[0])

    def norm(layer: int) -> torch.Tensor:
        rms_norm_kernel[(num_tokens,)](
            stream.residual[layer],
            stream.weight[layer],
            hidden_states,
            k,
            EPSILON,
            BLOCK=block,
            PDL=pdl,
            num_warps=NORM_WARPS,
            launch_pdl=pdl,
        )
        return hidden_states

    return norm


NORMS: dict[str, Callable[[Stream], NormCall]] = {
    BEHIND_PDL: lambda stream: triton_norm(stream, pdl=True),
    BEHIND_PLAIN: lambda stream: triton_norm(stream, pdl=False),
    BEHIND_TORCH: torch_norm,
    BEHIND_READ: lambda stream: triton_norm(stream, pdl=True),
}


def measure_behind(**settings: Any) -> Report:
    """Measure every contender behind every norm; the settings are those of `measure`."""
    report = measure(rows=rows_behind, **settings)
    return replace(report, contenders=(*report.contenders, NORM_ALONE))


def rows_behind(
    entrants: Sequence[Entrant], inputs: Inputs, modes: Sequence[str], stopwatch: Stopwatch
) -> Iterator[list[Figure]]:
    """Yield the figures of each norm."""
    stream = make_stream(inputs)
    calls = [made_call(entrant, inputs) for entrant in entrants]
    for mode in modes:
        yield row_behind(entrants, calls, inputs, stream, mode, stopwatch)


def row_behind(
    entrants: Sequence[Entrant],
    calls: Sequence[Call | Exception],
    inputs: Inputs,
    stream: Stream,
    mode: str,
    stopwatch: Stopwatch,
) -> list[Figure]:
    """Time the norm, then every contender behind it; without a norm, each cell gives the reason."""
    order = call_order(inputs, mode)
    norm_figure = Figure(
        shape=inputs.problem.name,
        mode=mode,
        num_tokens=inputs.num_tokens,
        contender=NORM_ALONE.name,
    )
    try:
        norm = NORMS[mode](stream)
        references = references_behind(norm, stream, inputs)
        bare: Callable[[int], Any] = norm
        if mode == BEHIND_READ:
            unrouted = inputs.new_outputs()
            bare = chained(norm, read_call(lambda _layer: unrouted, inputs), inputs.hidden_states)
        alone = stopwatch.time(stopwatch.prepare(bare, order, mode), len(order), mode)
    # Whatever a norm raises, the other ones are still measured.
    except Exception as error:
        reason = f"norm: {error if isinstance(error, Unavailable) else in_a_line(error)}"
        names = (*(entrant.contender.name for entrant in entrants), NORM_ALONE.name)
        return [replace(norm_figure, contender=name, reason=reason) for name in names]
    row = []
    for entrant, call in zip(entrants, calls, strict=True):
        if not isinstance(call, Exception):
            last = read_call(call, inputs) if mode == BEHIND_READ else call
            call = chained(norm, last, inputs.hidden_states)
        figure = measure_cell(entrant, call, inputs, references, mode, stopwatch)
        row.append(less(figure, alone))
    return [*row, replace(norm_figure, **vars(alone))]


def references_behind(norm: NormCall, stream: Stream, inputs: Inputs) -> Mapping[int, Reference]:
    """Check the norm of every layer, then evaluate the router in FP64 from its output.

    From the norm's own bits: another rounding of hidden_states would be another answer.
    """
    references = {}
    for layer in range(inputs.problem.layers):
        hidden_states = norm(layer).clone()
        residual = stream.residual[layer].double()
        scale = (residual.square().mean(1, keepdim=True) + EPSILON).rsqrt()
        expected = residual * scale * stream.weight[layer].double()
        if not torch.allclose(hidden_states.double(), expected, rtol=NORM_TOLERANCE, atol=0):
            raise Unavailable(f"wrong hidden_states in layer {layer}")
        references[layer] = reference_of(replace(inputs, hidden_states=hidden_states), layer)
    return references


def chained(norm: NormCall, call: Call, hidden_states: torch.Tensor) -> Call:
    """Return the norm of a layer, then the call.

    The contenders hold `hidden_states`: it is made a view of the norm's output, without a copy.
    """

    def chain(layer: int) -> Result:
        hidden_states.data = norm(layer)
        return call(layer)

    return chain


def read_call(call: Call, inputs: Inputs) -> Call:
    """Return the call, then a reader of its ids: the answer is the ids that it read."""
    from .triton_kernels import take_ids_kernel

    taken = [inputs.new_outputs()[1] for _ in inputs.gates]
    size = taken[0].numel()
    grid = (-(-size // READER_BLOCK),)

    def read(layer: int) -> Result:
        weights, ids = call(layer)
        take_ids_kernel[grid](ids, taken[layer], size, BLOCK=READER_BLOCK, launch_pdl=True)
        return weights, taken[layer]

    return read


def less(figure: Figure, alone: Timing) -> Figure:
    """Subtract the norm's median from a chain's median and quartiles."""
    times = {name: getattr(figure, name) for name in vars(alone)}
    return replace(figure, **{n: t - alone.microseconds for n, t in times.items() if t is not None})
