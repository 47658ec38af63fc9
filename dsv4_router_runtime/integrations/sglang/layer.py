"""A DeepseekV2MoE, whether it is served, and the routers bound to its tensors."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from sglang.srt.layers.moe.topk import (
    TopKConfig,
    fused_shared_expert_weight,
    routing_simulation_enabled,
)
from sglang.srt.layers.moe.utils import has_per_rank_fused_shared_slots
from sglang.srt.runtime_context import get_exec
from sglang.srt.state_capturer.routed_experts import get_global_experts_capturer

from dsv4_router_runtime.errors import RouterError
from dsv4_router_runtime.integrations.bound_layers import bind_router
from dsv4_router_runtime.integrations.engine import report_layer
from dsv4_router_runtime.log import warn_once

from .eligibility import DISPATCH_ALGORITHMS, LayerFacts, reason_against

# The gate gets another weight when a model is loaded anew; an offloaded layer's gate each call.
MAX_REPLACEMENTS = 4


class Routed(NamedTuple):
    """The outputs of one call. mapped: the ids are physical, not logical."""

    weights: torch.Tensor
    ids: torch.Tensor
    mapped: bool


class ServedLayer:
    """The routers of one DeepseekV2MoE.

    Decides at the first call that is not captured, since SGLang sets attributes of the layer after
    it was made, and binds then. Its routers differ in their ids, which are logical, or physical by
    SGLang's maps, read in place; and in whether image rows are told by their token id.

    another_hook: why logits that are not made might be read, which decides against the layer.
    reason: why SGLang's own router serves the layer; None if this one does, or before the decision.
    """

    def __init__(self, moe: Any, name: str, another_hook: str | None = None) -> None:
        self.moe = moe
        self.name = name
        self._another_hook = another_hook
        self.config: Any = None
        self.reason: str | None = None
        self._serves: bool | None = None
        # (image rows are told, address of the map or 0) -> the router.
        self._routers: dict[tuple[bool, int], Any] = {}
        self._top_k = self._num_shared = 0
        self._tensors: list[torch.Tensor] = []
        self._bound_at: list[int] = []
        self._replacements = 0

    def serves(self, hidden_states: torch.Tensor) -> bool:
        """Return whether this layer's call with these hidden states is served; bind it if so."""
        if self._serves is None:
            self._decide(hidden_states)
        if not self._serves:
            return False
        if self.moe.gate.weight is not self._tensors[0]:
            return self._follow(hidden_states)
        if self.moe.gate._forward_hooks:
            self._warn("hook", "a hook on its gate may read the logits")
            return False
        if hidden_states.dtype is torch.bfloat16 and hidden_states.is_contiguous():
            return True
        got = f"{hidden_states.dtype} of strides {hidden_states.stride()}"
        self._warn("hidden states", f"hidden states are {got}; contiguous torch.bfloat16 is served")
        return False

    def _decide(self, hidden_states: torch.Tensor) -> None:
        if _is_capturing(hidden_states):
            self._warn("capture", "its first call is captured; a call before it would bind it")
            return
        facts = facts_of(self.moe)
        reason = self._another_hook or reason_against(facts)
        if reason is None:
            self.config = config_of(self.moe)
            self._top_k, self._num_shared = facts.top_k, facts.num_shared
            reason = self._bind_now()
        self._settle(reason)

    def _bind_now(self) -> str | None:
        """Bind the router that a call takes now; return why that failed."""
        info = self.moe.topk.routing_inputs()[1]
        return self._why_unbound(info, self.moe.gate.e_score_correction_bias_vl is not None)

    def _why_unbound(self, info: Any, images: bool) -> str | None:
        try:
            self._router(info, images)
        except (RouterError, TypeError, ValueError) as error:
            return str(error)
        return None

    def _follow(self, hidden_states: torch.Tensor) -> bool:
        """Bind a layer whose gate has another weight; return whether it is served still."""
        if _is_capturing(hidden_states):
            self._warn("moved", "its weights moved, and this call is captured")
            return False
        self._replacements += 1
        self._routers.clear()
        reason = self._bind_now()
        if self._replacements > MAX_REPLACEMENTS:
            reason = "its weights keep moving; is it offloaded?"
        if reason is not None:
            self._routers.clear()
            self._settle(reason)
        return reason is None

    def _settle(self, reason: str | None) -> None:
        self.reason = reason
        self._serves = reason is None
        report_layer("sglang", self.name, reason)

    def _warn(self, kind: str, text: str) -> None:
        name = self.name
        warn_once(f"sglang: {name}: {kind}", f"sglang: {name} takes SGLang's router now: {text}")

    def can_route(self, info: Any, *, images: bool = False) -> bool:
        """Return whether such a call is served: its router is bound, or can be bound now."""
        if info is not None and info.ep_dispatch_algorithm not in DISPATCH_ALGORITHMS:
            return False
        if self._key(info, images) in self._routers:
            return True
        if _is_capturing(self.moe.gate.weight):
            self._warn("unbound", "a call with other maps or images is captured before it is run")
            return False
        reason = self._why_unbound(info, images)
        if reason is not None:
            self._warn("bind", reason)
        return reason is None

    def route(
        self,
        hidden_states: torch.Tensor,
        num_tokens: torch.Tensor | None,
        info: Any,
        *,
        input_ids: torch.Tensor | None = None,
        images: bool = False,
    ) -> Routed:
        """Route one batch. images: rows of the image token select by the second bias."""
        router = self._router(info, images)
        num_rows, columns = hidden_states.shape[0], self._top_k + self._num_shared
        weights = hidden_states.new_empty((num_rows, columns), dtype=torch.float32)
        ids = hidden_states.new_empty((num_rows, columns), dtype=torch.int32)
        if input_ids is not None:
            input_ids = input_ids[:num_rows].contiguous()
        if num_tokens is not None:
            num_tokens = num_tokens.to(torch.int32)
        router(hidden_states, weights, ids, num_tokens=num_tokens, input_ids=input_ids)
        return Routed(weights, ids, self._is_mapped(info))

    def _is_mapped(self, info: Any) -> bool:
        """Return whether the kernel writes physical ids.

        Not beside shared columns, which SGLang places behind its own maps; not by the random
        replicas that it takes with an all-to-all; and not if the logical ids are captured.
        """
        if info is None or self.config.num_shared_topk_slots:
            return False
        if info.ep_dispatch_algorithm == "dynamic" and not info.rank_invariant:
            return False
        captured = self.config.allow_routed_experts_capture and get_global_experts_capturer()
        return not captured

    def _key(self, info: Any, images: bool) -> tuple[bool, int]:
        return images, _map_of(info).data_ptr() if self._is_mapped(info) else 0

    def _router(self, info: Any, images: bool) -> Any:
        key = self._key(info, images)
        router = self._routers.get(key)
        if router is None:
            router = self._bind(info, images)
            if at := key[1]:
                # No call takes a map that SGLang has replaced.
                self._routers = {k: old for k, old in self._routers.items() if k[1] in (0, at)}
            self._routers[key] = router
        return router

    def _bind(self, info: Any, images: bool) -> Any:
        gate, config = self.moe.gate, self.config
        e_bias, bias_vl = gate.e_score_correction_bias, gate.e_score_correction_bias_vl
        tid2eid = self.moe.topk.tid2eid if self.moe.is_hash else None
        scale, applied = config.routed_scaling_factor, config.apply_routed_scaling_factor_on_output
        options: dict[str, Any] = {}
        if images:
            image_token = self.moe.config.image_token_id
            options = {"bias_vl": bias_vl, "first_image_id": image_token, "num_image_ids": 1}
        if self._num_shared:
            options["num_shared_slots"] = self._num_shared
            options["shared_weight"] = fused_shared_expert_weight(
                routed_scaling_factor=scale, fused_in_topk=bool(applied)
            )
        if self._is_mapped(info):
            options["to_physical"] = _map_of(info)
            options["logical_count"] = _count_of(info)
        router = bind_router(
            gate.weight,
            e_bias,
            top_k=self._top_k,
            routed_scaling_factor=float(scale) if applied and scale is not None else 1.0,
            tid2eid=tid2eid,
            norm_topk_prob=bool(config.renormalize),
            # SGLang captures all graphs of layers into one memory pool, and replays one at a time.
            share_captured_scratch=True,
            same_bits=bool(get_exec().deterministic.enable_deterministic_inference),
            **options,
        )
        tensors = (gate.weight, e_bias, bias_vl, tid2eid)
        self._tensors = [tensor for tensor in tensors if tensor is not None]
        self._bound_at = [tensor.data_ptr() for tensor in self._tensors]
        return router

    def refresh(self) -> None:
        """Take the weights as they are now, after SGLang has loaded others."""
        if not self._routers:
            return
        moved = [tensor.data_ptr() for tensor in self._tensors] != self._bound_at
        if moved or not self._tensors[0].is_cuda:
            self._replacements = 0
            self._routers.clear()
            return
        for router in self._routers.values():
            router.refresh()


def _map_of(info: Any) -> torch.Tensor:
    """Return the physical ids [E, replicas]."""
    if info.ep_dispatch_algorithm == "static":
        return info.partial_logical_to_rank_dispatch_physical_map[:, None]
    return info.partial_logical_to_all_physical_map


def _count_of(info: Any) -> torch.Tensor:
    """Return how many physical ids of each expert are in use."""
    count = info.partial_logical_to_all_physical_map_num_valid
    return torch.ones_like(count) if info.ep_dispatch_algorithm == "static" else count


def _is_capturing(tensor: torch.Tensor) -> bool:
    return tensor.is_cuda and torch.cuda.is_current_stream_capturing()


def config_of(moe: Any) -> Any:
    """Return the TopKConfig; a hash layer has none, and gets that of SGLang's mega gate."""
    topk = moe.topk
    if not moe.is_hash:
        return topk.topk_config
    return TopKConfig(
        top_k=topk.topk,
        shared_experts=topk.shared_experts,
        routed_scaling_factor=topk.routed_scaling_factor,
        apply_routed_scaling_factor_on_output=topk.apply_routed_scaling_factor_on_output,
        scoring_func=topk.score_func,
        allow_routed_experts_capture=False,
    )


def facts_of(moe: Any) -> LayerFacts:
    """Read the inputs of `reason_against` off a DeepseekV2MoE and the server's configuration."""
    gate, topk, config = moe.gate, moe.topk, config_of(moe)
    weight, e_bias = gate.weight, gate.e_score_correction_bias
    num_slots = config.num_shared_topk_slots
    output_format = config.output_format
    return LayerFacts(
        is_deepseek_v4=moe.is_deepseek_v4,
        gate=type(gate).__name__,
        topk=type(topk).__name__,
        experts=type(getattr(moe.experts, "quant_method", None)).__name__,
        device="hip" if weight.is_cuda and torch.version.hip else weight.device.type,
        weight=str(weight.dtype),
        weight_shape=tuple(weight.shape),
        contiguous=weight.is_contiguous(),
        e_bias=None if e_bias is None else str(e_bias.dtype),
        hashed=moe.is_hash,
        sees=gate.e_score_correction_bias_vl is not None,
        num_experts=moe.config.n_routed_experts,
        hidden_size=moe.config.hidden_size,
        top_k=config.top_k - num_slots,
        # With slots per rank, SGLang appends the columns behind the router.
        num_shared=0 if has_per_rank_fused_shared_slots(num_slots) else num_slots,
        scoring_func=config.scoring_func,
        grouped=config.use_grouped_topk,
        custom=config.custom_routing_function is not None,
        renormalize=bool(config.renormalize),
        output_format=None if output_format is None else output_format.name,
        waterfill=topk.enable_waterfill,
        simulated=routing_simulation_enabled(),
        dispatch=get_exec().moe.ep_dispatch_algorithm,
    )
