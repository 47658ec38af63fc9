"""The hooks on SGLang: where it makes logits, chooses experts, and loads weights.

The gate of a served layer launches nothing: its logits are memory that is not written, which
carries the layer and the hidden states to the top-k. That makes the one launch. If it cannot serve
a call, it has SGLang's gate make the logits. Nothing reads the logits of a served call but their
shape. Code that torch compiles takes SGLang's own path.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from sglang.srt.distributed.device_communicators.pynccl_allocator import use_symmetric_memory
from sglang.srt.eplb.expert_distribution import get_global_expert_distribution_recorder
from sglang.srt.layers.dp_attention import is_allocation_symmetric
from sglang.srt.layers.moe.topk import (
    StandardTopKOutput,
    _post_process_topk_ids,
    build_precomputed_topk_output,
    resolve_routing_inputs,
)
from sglang.srt.multimodal.dsv41.vl_routing import _finish_vision_topk
from sglang.srt.plugins.hook_registry import HookRegistry
from sglang.srt.runtime_context import get_parallel

from .layer import Routed, ServedLayer

# The attribute of a MoEGate that is its ServedLayer, and of logits that is their Pending.
MARK = "dsv4_router"


class Pending(NamedTuple):
    """The gate's call that logits without values stand for. gate_forward: SGLang's own."""

    layer: ServedLayer
    hidden_states: torch.Tensor
    gate_forward: Any

    def logits(self) -> torch.Tensor:
        """Make the logits by SGLang's gate, for a call that its router serves after all."""
        return self.gate_forward(self.layer.moe.gate, self.hidden_states)


def pending_of(logits: Any) -> Pending | None:
    return None if torch.compiler.is_compiling() else getattr(logits, MARK, None)


def after_moe_init(_: None, moe: Any, *args: Any, **kwargs: Any) -> None:
    """Tie the gate and the top-k of a layer together."""
    name = kwargs.get("prefix") or f"layer {moe.layer_id}"
    setattr(moe.gate, MARK, ServedLayer(moe, name, _another_hook()))


def _another_hook() -> str | None:
    """Return why logits that are not made may be read, past the hooks here; None if they cannot."""
    for target, (kind, hook) in HOOKS.items():
        if kind != "AROUND":
            continue
        if target not in HookRegistry._patched:
            return f"SGLang has not applied the hook on {target}"
        for _, other, source in HookRegistry._hooks[target]:
            if other is not hook:
                return f"another plugin hooks {target} ({source})"
    return None


def around_gate(
    gate_forward: Any, gate: Any, hidden_states: torch.Tensor, *args: Any, **kwargs: Any
) -> torch.Tensor:
    """Leave the logits to the top-k."""
    layer = gate.__dict__.get(MARK)
    if layer is None or torch.compiler.is_compiling() or not layer.serves(hidden_states):
        return gate_forward(gate, hidden_states, *args, **kwargs)
    shape = (hidden_states.shape[0], gate.weight.shape[0])
    logits = hidden_states.new_empty(shape, dtype=torch.float32)
    setattr(logits, MARK, Pending(layer, hidden_states, gate_forward))
    return logits


def around_topk(
    topk_forward: Any, topk: Any, hidden_states: Any, router_logits: Any, **kwargs: Any
) -> Any:
    """Serve TopK's call."""
    pending = pending_of(router_logits)
    if pending is None:
        return topk_forward(topk, hidden_states, router_logits, **kwargs)
    given = {name: value for name, value in kwargs.items() if value is not None}
    num_tokens, info = resolve_routing_inputs(
        layer_id=topk.layer_id,
        is_draft=topk.is_draft,
        num_token_non_padded=given.pop("num_token_non_padded", None),
        expert_location_dispatch_info=given.pop("expert_location_dispatch_info", None),
    )
    if given or not pending.layer.can_route(info):
        return topk_forward(topk, hidden_states, pending.logits(), **kwargs)
    with use_symmetric_memory(get_parallel().tp_group, disabled=not is_allocation_symmetric()):
        routed = pending.layer.route(pending.hidden_states, num_tokens, info)
        return _finish(pending.layer, routed, router_logits, num_tokens, info)


def around_hash_topk(
    topk_forward: Any,
    topk: Any,
    hidden_states: Any,
    router_logits: Any,
    input_ids: torch.Tensor,
    num_token_non_padded: torch.Tensor | None = None,
    expert_location_dispatch_info: Any = None,
) -> Any:
    """Serve HashTopK's call."""
    pending = pending_of(router_logits)
    if pending is None:
        return topk_forward(
            topk,
            hidden_states,
            router_logits,
            input_ids,
            num_token_non_padded,
            expert_location_dispatch_info,
        )
    num_tokens, info = resolve_routing_inputs(
        layer_id=topk.layer_id,
        is_draft=topk.is_draft,
        num_token_non_padded=num_token_non_padded,
        expert_location_dispatch_info=expert_location_dispatch_info,
    )
    if not pending.layer.can_route(info):
        logits = pending.logits()
        return topk_forward(topk, hidden_states, logits, input_ids, num_tokens, info)
    routed = pending.layer.route(pending.hidden_states, num_tokens, info, input_ids=input_ids)
    return _finish(pending.layer, routed, router_logits, num_tokens, info)


def around_vision_topk(
    topk: Any,
    moe: Any,
    logits: Any,
    input_ids: torch.Tensor | None,
    num_token_non_padded: torch.Tensor | None = None,
    expert_location_dispatch_info: Any = None,
) -> Any:
    """Serve the top-k of a layer with a second bias, for the rows of image tokens.

    SGLang's own fails in a hash layer. vLLM's is the definition there: the table, but for the rows
    of images.
    """
    pending = pending_of(logits)
    if pending is None:
        return topk(moe, logits, input_ids, num_token_non_padded, expert_location_dispatch_info)
    num_tokens, info = resolve_routing_inputs(
        layer_id=moe.topk.layer_id,
        is_draft=moe.topk.is_draft,
        num_token_non_padded=num_token_non_padded,
        expert_location_dispatch_info=expert_location_dispatch_info,
    )
    images = input_ids is not None
    if not pending.layer.can_route(info, images=images):
        return topk(moe, pending.logits(), input_ids, num_tokens, info)
    routed = pending.layer.route(
        pending.hidden_states, num_tokens, info, input_ids=input_ids, images=images
    )
    if moe.is_hash or _is_complete(pending.layer, routed, info):
        return _finish(pending.layer, routed, logits, num_tokens, info)
    weights, ids = _finish_vision_topk(
        moe, logits, routed.weights, routed.ids, num_tokens, info, padded_rows_masked=True
    )
    return StandardTopKOutput(weights, ids, logits)


def _is_complete(layer: ServedLayer, routed: Routed, info: Any) -> bool:
    """Return whether SGLang has no shared columns to place and no ids to map."""
    return not layer.config.num_shared_topk_slots and (info is None or routed.mapped)


def _finish(
    layer: ServedLayer,
    routed: Routed,
    logits: torch.Tensor,
    num_tokens: torch.Tensor | None,
    info: Any,
) -> Any:
    """Take SGLang's steps after the choice: capture, map, place shared columns, record."""
    config, layer_id = layer.config, layer.moe.layer_id
    if _is_complete(layer, routed, info):
        out = build_precomputed_topk_output(routed.weights, routed.ids, config, layer_id)
        # Marlin's experts compare the number of rows of the logits.
        return out._replace(router_logits=logits)
    ids, weights, recorded = _post_process_topk_ids(
        routed.ids,
        routed.weights,
        config,
        logits,
        layer_id,
        num_token_non_padded=num_tokens,
        expert_location_dispatch_info=info,
        padded_rows_masked=True,
    )
    if recorded is not None:
        get_global_expert_distribution_recorder().on_select_experts(topk_ids=recorded)
    return StandardTopKOutput(weights, ids, logits)


def after_weights(_: Any, updater: Any, *args: Any, **kwargs: Any) -> None:
    """Take new weights, in the memory that captured graphs read."""
    for module in updater.get_model().modules():
        layer = module.__dict__.get(MARK)
        if layer is not None:
            layer.refresh()


_UPDATER = "sglang.srt.model_executor.model_runner_components.weight_updater.WeightUpdater"
HOOKS: dict[str, tuple[str, Any]] = {
    "sglang.srt.models.deepseek_v2.DeepseekV2MoE.__init__": ("AFTER", after_moe_init),
    "sglang.srt.models.deepseek_v2.MoEGate.forward": ("AROUND", around_gate),
    "sglang.srt.layers.moe.topk.TopK.forward": ("AROUND", around_topk),
    "sglang.srt.layers.moe.hash_topk.HashTopK.forward": ("AROUND", around_hash_topk),
    "sglang.srt.multimodal.dsv41.vl_routing.vision_topk": ("AROUND", around_vision_topk),
    f"{_UPDATER}.update_weights_from_disk": ("AFTER", after_weights),
    f"{_UPDATER}.load_weights_from_distributed": ("AFTER", after_weights),
    f"{_UPDATER}.update_weights_from_tensor": ("AFTER", after_weights),
    f"{_UPDATER}.update_weights_from_ipc": ("AFTER", after_weights),
    f"{_UPDATER}.end_weight_update": ("AFTER", after_weights),
}
