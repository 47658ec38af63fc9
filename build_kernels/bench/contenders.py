"""Make the calls of this project's kernels and of torch, or raise Unavailable with the reason."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from dsv4_router_runtime.artifacts.dispatch import kernels_on
from dsv4_router_runtime.artifacts.folder import ArtifactSet
from dsv4_router_runtime.device import driver
from dsv4_router_runtime.device.launch import grid_of
from dsv4_router_runtime.device.launch_site import LaunchSite
from dsv4_router_runtime.device.load import load_once
from dsv4_router_runtime.device.streams import current_stream
from dsv4_router_runtime.parameters import PARAMETERS_OFF
from dsv4_router_runtime.router import Router

from .inputs import Call, Inputs, Result
from .report import OURS, OWN, PEER, Contender


class Unavailable(Exception):
    """A contender cannot be timed, here or at this problem; the message gives the reason."""


@dataclass(frozen=True, kw_only=True)
class Entrant:
    """A contender that can be called.

    make: prepares its calls for one shape and N. Any exception is reported in place of a figure.
    """

    contender: Contender
    make: Callable[[Inputs], Call]
    # A layer's answer if each id is determined; else any answer that `complaint` accepts.
    expected: Callable[[Any, int], Result] | None = None


def entrant(
    name: str,
    role: str,
    what: str,
    make: Callable[[Inputs], Call],
    expected: Callable[[Any, int], Result] | None = None,
) -> Entrant:
    """Return a contender that `make` calls; see `Contender` and `Entrant`."""
    contender = Contender(name=name, role=role, what=what)
    return Entrant(contender=contender, make=make, expected=expected)


def own_entrants(artifacts: ArtifactSet, *, pdl: bool) -> tuple[Entrant, ...]:
    """Return this project's contenders; the ratios are of the first."""
    plain = entrant(
        *(("ours, no PDL", OWN) if pdl else ("ours", OURS)),
        "Router without programmatic dependent launch",
        lambda inputs: router_call(inputs, artifacts, pdl=False),
    )
    composed = entrant(
        *("cuBLAS + router_topk", OWN),
        "torch.mm(out_dtype=float32), then this project's router_topk",
        lambda inputs: composed_call(inputs, artifacts, pdl=pdl),
    )
    if not pdl:
        return plain, composed
    dependent = entrant(
        *("ours", OURS),
        "Router with programmatic dependent launch",
        lambda inputs: router_call(inputs, artifacts, pdl=True),
    )
    return dependent, plain, composed


def torch_entrant() -> Entrant:
    return entrant("torch", PEER, "eager torch operations, FP32 logits", torch_call)


def router_call(
    inputs: Inputs,
    artifacts: ArtifactSet,
    *,
    pdl: bool,
    layers: Sequence[Mapping[str, Any]] = (),
    brings: Mapping[str, Any] | None = None,
) -> Call:
    """Make the call of one Router per layer.

    layers: each Router's arguments beside W_gate; the bias alone by default. brings: options of
    every call.
    """
    problem = inputs.problem
    layers = layers or [{"e_bias": inputs.bias}] * problem.layers
    routers = [
        Router(
            gate,
            top_k=problem.top_k,
            routed_scaling_factor=problem.routed_scaling_factor,
            pdl=pdl,
            artifacts=artifacts,
            **binds,
        )
        for gate, binds in zip(inputs.gates, layers, strict=True)
    ]
    outputs = [inputs.new_outputs() for _ in routers]
    hidden_states, options = inputs.hidden_states, dict(brings or {})

    def call(layer: int) -> Result:
        weights, ids = outputs[layer]
        routers[layer](hidden_states, weights, ids, **options)
        return weights, ids

    return call


def composed_call(inputs: Inputs, artifacts: ArtifactSet, *, pdl: bool) -> Call:
    select = TopkLauncher(inputs, artifacts, pdl=pdl)
    outputs = [inputs.new_outputs() for _ in inputs.gates]
    hidden_states, gates = inputs.hidden_states, inputs.gates

    def call(layer: int) -> Result:
        logits = torch.mm(hidden_states, gates[layer], out_dtype=torch.float32)
        select(logits, outputs[layer])
        return outputs[layer]

    return call


class TopkLauncher:
    """Launch router_topk alone, also for the tokens that `Router` gives to fused kernels."""

    def __init__(self, inputs: Inputs, artifacts: ArtifactSet, *, pdl: bool) -> None:
        device = inputs.bias.device.index or 0
        arch = driver.arch_of_device(device)
        kernels = [k for k in kernels_on(artifacts.manifest, arch) if k.role == "select"]
        if not kernels:
            raise Unavailable(f"the artifacts hold no router_topk for {arch}")
        self._device = device
        self._loaded = load_once(artifacts, kernels[0], device)
        self._pdl = pdl
        self._sites: dict[int, LaunchSite] = {}
        self._grid = grid_of(
            kernels[0].launch,
            num_tokens=inputs.num_tokens,
            num_experts=inputs.problem.num_experts,
        )
        self._constants = {
            **PARAMETERS_OFF,
            "e_bias": inputs.bias.data_ptr(),
            "num_tokens": inputs.num_tokens,
            "num_experts": inputs.problem.num_experts,
            "top_k": inputs.problem.top_k,
            "routed_scaling_factor": inputs.problem.routed_scaling_factor,
        }

    def __call__(self, logits: torch.Tensor, outputs: Result) -> None:
        site = self._site(current_stream(self._device))
        weights, ids = outputs
        cells = site.block.cells
        cells["logits"].value = logits.data_ptr()
        cells["out_weights"].value = weights.data_ptr()
        cells["out_ids"].value = ids.data_ptr()
        cells["logits_stride"].value = logits.stride(0)
        cells["out_weights_stride"].value = weights.stride(0)
        cells["out_ids_stride"].value = ids.stride(0)
        site.launch()

    def _site(self, stream: int) -> LaunchSite:
        site = self._sites.get(stream)
        if site is None:
            site = LaunchSite(self._loaded, stream=stream, grid=self._grid, pdl=self._pdl)
            cells = site.block.cells
            site.block.set({name: each for name, each in self._constants.items() if name in cells})
            self._sites[stream] = site
        return site


def torch_call(inputs: Inputs) -> Call:
    problem, bias = inputs.problem, inputs.bias
    hidden_states, gates = inputs.hidden_states, inputs.gates

    def call(layer: int) -> Result:
        logits: Any = torch.mm(hidden_states, gates[layer], out_dtype=torch.float32)
        scores = torch.nn.functional.softplus(logits).sqrt()
        ids = (scores + bias).topk(problem.top_k, dim=1)[1]
        weights = scores.gather(1, ids)
        weights = weights / (weights.sum(1, keepdim=True) + 1e-20) * problem.routed_scaling_factor
        return weights, ids.to(torch.int32)

    return call
