"""Serve the routers of transformers' DeepSeek-V4 models, versions 5.17 to 5.23.

    register()                    # models built from now on; `unregister` ends it
    write_kernel_folder(folder)   # a folder of layers for the kernels library
    summary(model)                # which router serves each layer, and why

A served router returns `(None, weights, ids)`: it has no logits. Weights are FP32, which every
experts implementation of transformers promotes or casts. The model's own forward runs if router
logits are recorded, if a gradient may be wanted, and for tensors that the kernels do not take; each
of these reasons is logged once. See TRANSFORMERS.md beside this file.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import monkey_patching
from transformers.activations import SqrtSoftplusActivation
from transformers.models.deepseek_v4.modeling_deepseek_v4 import (
    DeepseekV4HashRouter as HashRouter,
)
from transformers.models.deepseek_v4.modeling_deepseek_v4 import (
    DeepseekV4PreTrainedModel as PreTrainedModel,
)
from transformers.models.deepseek_v4.modeling_deepseek_v4 import (
    DeepseekV4TopKRouter as TopKRouter,
)
from transformers.utils import output_capturing

from dsv4_router_runtime.artifacts.folder import open_artifacts
from dsv4_router_runtime.artifacts.limits import MAP_ALIGNMENT_BYTES
from dsv4_router_runtime.log import info_once, warn_once

from . import torch_op
from .engine import limits_against

Output = tuple[torch.Tensor | None, torch.Tensor, torch.Tensor]


def route_top_k(self: Any, hidden_states: torch.Tensor) -> Output:
    """Route as DeepseekV4TopKRouter's forward does, with logits in FP32."""
    if _model_routes(self, hidden_states):
        return TopKRouter.forward(self, hidden_states)
    return None, *torch_op.route_functional(
        hidden_states.reshape(-1, self.hidden_dim),
        self.weight,
        self.e_score_correction_bias,
        self.routed_scaling_factor,
        self.top_k,
        ids_dtype=torch.int64,
    )


def route_hash(self: Any, hidden_states: torch.Tensor, input_ids: torch.Tensor) -> Output:
    """Route as DeepseekV4HashRouter's forward does, with logits in FP32."""
    if _model_routes(self, hidden_states):
        return HashRouter.forward(self, hidden_states, input_ids)
    return None, *torch_op.route_functional(
        hidden_states.reshape(-1, self.hidden_dim),
        self.weight,
        None,
        self.routed_scaling_factor,
        self.top_k,
        tid2eid=self.tid2eid,
        input_ids=input_ids.reshape(-1),
        ids_dtype=torch.int64,
    )


def _model_routes(module: Any, hidden_states: torch.Tensor) -> bool:
    """Return whether the model's own forward has to run, and log why, once per reason."""
    weight = module.weight
    reason = _reason_of_layer(module)
    if _logits_are_recorded(module):
        reason = "router logits are recorded"
    elif torch.is_grad_enabled() and (weight.requires_grad or hidden_states.requires_grad):
        reason = "a gradient may be wanted; call the model under torch.no_grad()"
    elif hidden_states.dtype is not weight.dtype:
        reason = f"hidden_states are {hidden_states.dtype} and the weight is {weight.dtype}"
    # Logging breaks a traced graph.
    if not torch.compiler.is_compiling():
        if reason:
            warn_once(f"transformers: {reason}", f"transformers routes by itself: {reason}")
        else:
            info_once("transformers", "dsv4_router serves transformers' routers")
    return reason is not None


def _reason_of_layer(module: Any) -> str | None:
    """Return why the kernels do not take this layer's tensors and numbers; None if they do."""
    weight = module.weight
    bias = getattr(module, "e_score_correction_bias", None)
    if weight.device.type not in ("cuda", "cpu"):
        return f"the weight is on {weight.device}; a GPU, or a CPU for tests, is served"
    if weight.dtype is not torch.bfloat16:
        return f"the weight is {weight.dtype}; load the model with dtype=torch.bfloat16"
    if bias is not None and bias.dtype is not torch.float32:
        return f"e_score_correction_bias is {bias.dtype}; from_pretrained keeps it torch.float32"
    # A traced tensor has no address.
    if not torch.compiler.is_compiling() and weight.data_ptr() % MAP_ALIGNMENT_BYTES:
        return f"the weight's address is no multiple of {MAP_ALIGNMENT_BYTES}; clone the weight"
    if not isinstance(module.score_fn, SqrtSoftplusActivation):
        return f"the scores are {type(module.score_fn).__name__}; sqrtsoftplus is served"
    limits = limits_against(
        hidden_size=module.hidden_dim, num_experts=module.num_experts, top_k=module.top_k
    )
    return next(limits, None)


def _logits_are_recorded(module: nn.Module) -> bool:
    """Return whether transformers records router logits of the forward that runs now."""
    collector = output_capturing._active_collector
    # Dynamo traces `get` only in a compiled model, where it returns `global_var`. Elsewhere it
    # breaks the graph, which a recorder's hook on this module does anyway.
    traced = torch.compiler.is_compiling() and not module._forward_hooks
    recorded = collector.global_var if traced else collector.get()
    return recorded is not None and "router_logits" in recorded


class FusedTopKRouter(TopKRouter):
    """transformers' learned router, with its parameters and `route_top_k` as forward."""

    forward = route_top_k


class FusedHashRouter(HashRouter):
    """transformers' hash router, with its parameters and `route_hash` as forward."""

    forward = route_hash


class TopKRouterLayer(nn.Module):
    """`route_top_k` as a stateless layer of the kernels library."""

    can_torch_compile = True
    forward = route_top_k


class HashRouterLayer(nn.Module):
    """`route_hash` as a stateless layer of the kernels library."""

    can_torch_compile = True
    forward = route_hash


_PATCHES = {"DeepseekV4TopKRouter": FusedTopKRouter, "DeepseekV4HashRouter": FusedHashRouter}
_LAYERS = {"DeepseekV4TopKRouter": TopKRouterLayer, "DeepseekV4HashRouter": HashRouterLayer}


def register() -> None:
    """Build both routers of later DeepSeek-V4 models from the classes of this module.

    `from_pretrained` and `from_config` apply it. Calling it again changes nothing. ValueError if
    another package has replaced either class.
    """
    present = monkey_patching.get_patch_mapping()
    for name, replacement in _PATCHES.items():
        other = present.get(name, replacement)
        if other is not replacement:
            raise ValueError(
                f"{name}: expected no replacement or {replacement.__name__} (got "
                f"{other.__module__}.{other.__qualname__}); remove it with "
                "transformers.monkey_patching.unregister_patch_mapping first"
            )
    monkey_patching.register_patch_mapping(_PATCHES, overwrite=True)


def unregister() -> None:
    """Let later models use transformers' own routers. Models that exist keep theirs."""
    present = monkey_patching.get_patch_mapping()
    monkey_patching.unregister_patch_mapping(
        [name for name, replacement in _PATCHES.items() if present.get(name) is replacement]
    )
    # transformers leaves the replacement in this class attribute, and then records no logits of
    # models with its own router. Its own class stands for both.
    recorder = PreTrainedModel._can_record_outputs["router_logits"]
    recorder.target_class = TopKRouter


def summary(model: nn.Module) -> dict[str, str]:
    """Return which router serves each layer: "dsv4_router", or "transformers" and the reason.

    Layers are named as `named_modules` does. Reasons of one call are not in it: a gradient, or
    recorded logits.
    """
    served = {}
    for name, module in model.named_modules():
        if isinstance(module, TopKRouter | HashRouter):
            kernelized = getattr(module.forward, "__func__", None) in (route_top_k, route_hash)
            # accelerate (`device_map`) and expert parallelism put forwards before the class's own.
            if not (kernelized or isinstance(module, FusedTopKRouter | FusedHashRouter)):
                reason: str | None = "built without register() or kernelize"
            else:
                reason = _reason_of_layer(module)
            served[name] = f"transformers: {reason}" if reason else "dsv4_router"
    return served


def write_kernel_folder(folder: Path) -> None:
    """Write build/torch-cuda and build/torch-cpu below `folder`, for kernels.get_local_kernel.

    The layers in it import this module, so that the folder holds no copy of code or cubins.
    """
    archs = [f"{arch[3:-2]}.{arch[-2:]}" for arch in sorted(open_artifacts().manifest.driver)]
    imports = "".join(
        f"from {__package__}.transformers import {layer.__name__} as {name}\n"
        for name, layer in _LAYERS.items()
    )
    for backend in ({"type": "cuda", "archs": archs}, {"type": "cpu"}):
        variant = folder / "build" / f"torch-{backend['type']}"
        variant.mkdir(parents=True, exist_ok=True)
        metadata = {
            "id": f"dsv4_router_{backend['type']}",
            "name": "dsv4-router",
            "version": 1,
            "license": "Apache-2.0",
            "python-depends": [],
            "backend": backend,
        }
        (variant / "metadata.json").write_text(json.dumps(metadata, indent=2) + "\n")
        (variant / "__init__.py").write_text("from . import layers\n")
        (variant / "layers.py").write_text(imports)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Write a folder for kernels.get_local_kernel.")
    parser.add_argument("folder", type=Path)
    write_kernel_folder(parser.parse_args().folder)
