"""The names and signatures of vLLM that this adapter uses, and the release that they are of."""

from __future__ import annotations

# A release with another beginning is declined.
RELEASE = "0.33."

_MOE = "vllm.model_executor.layers.fused_moe"
_ROUTER = "(self, hidden_states, router_logits, {dtype}, *, input_ids)"

# "module:name" -> the parameters without annotations and defaults; None if it only has to exist.
CONTRACT: dict[str, str | None] = {
    "vllm.model_executor.custom_op:PluggableLayer.register_oot": "(_decorated_layer_cls, name)",
    "vllm.model_executor.custom_op:op_registry_oot": None,
    f"{_MOE}.runner.moe_runner:MoERunner._forward_impl": (
        "(self, hidden_states, router_logits, shared_experts_input, input_ids)"
    ),
    f"{_MOE}.runner.moe_runner:MoERunner.is_monolithic": None,
    f"{_MOE}.runner.moe_runner:MoERunner.do_naive_dispatch_combine": None,
    f"{_MOE}.router.base_router:BaseRouter": "(top_k, global_num_experts, eplb_state)",
    f"{_MOE}.router.base_router:BaseRouter.set_capture_fn": "(self, capture_fn)",
    f"{_MOE}.router.base_router:BaseRouter._select_experts": _ROUTER.format(
        dtype="topk_indices_dtype"
    ),
    f"{_MOE}.router.base_router:BaseRouter._compute_routing": _ROUTER.format(dtype="indices_type"),
    f"{_MOE}.router.base_router:BaseRouter._convert_indices_dtype": (
        "(self, topk_ids, indices_type)"
    ),
    f"{_MOE}.router.fused_moe_router:FusedMoERouter.routing_method_type": None,
    f"{_MOE}.router.fused_topk_bias_router:FusedTopKBiasRouter": (
        "(top_k, global_num_experts, e_score_correction_bias, renormalize, routed_scaling_factor, "
        "eplb_state, *, scoring_func, hash_indices_table, num_fused_shared_experts, "
        "shared_expert_weight, bias_vl, image_sentinel_lo)"
    ),
    f"{_MOE}.router.fused_topk_bias_router:FusedTopKBiasRouter._compute_routing": _ROUTER.format(
        dtype="indices_type"
    ),
    f"{_MOE}.router.fused_topk_bias_router:_get_padding_mask": "(num_tokens)",
    f"{_MOE}.router.gate_linear:GateLinear": (
        "(input_size, output_size, bias, out_dtype, params_dtype, force_fp32_compute, "
        "skip_bias_add, quant_config, prefix, return_bias)"
    ),
    f"{_MOE}.router.gate_linear:GateLinear.forward": "(self, x)",
    f"{_MOE}.router.gate_linear:GateLinear._return": "(self, output)",
    "vllm.model_executor.layers.linear:UnquantizedLinearMethod": "()",
    "vllm.model_executor.layers.linear:"
    "UnquantizedLinearMethod.process_weights_after_loading": "(self, layer)",
    f"{_MOE}.config:FusedMoEParallelConfig.use_all2all_kernels": None,
    "vllm.config:get_current_vllm_config_or_none": "()",
    "vllm.config.offload:UVAOffloadConfig": "(cpu_offload_gb, cpu_offload_params)",
    "vllm.config.offload:PrefetchOffloadConfig": (
        "(offload_group_size, offload_num_in_group, offload_prefetch_step, offload_params)"
    ),
    "vllm.envs:VLLM_BATCH_INVARIANT": None,
}
