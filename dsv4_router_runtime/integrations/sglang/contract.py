"""Each name of SGLang 0.5.23 that this plugin uses, with its parameters; see `mismatches`."""

from __future__ import annotations

_TOPK = "sglang.srt.layers.moe.topk"
_HASH_TOPK = "sglang.srt.layers.moe.hash_topk:HashTopK"
_VISION = "sglang.srt.multimodal.dsv41.vl_routing"
_MODEL = "sglang.srt.models.deepseek_v2"
_EPLB = "sglang.srt.eplb"
_UPDATER = "sglang.srt.model_executor.model_runner_components.weight_updater:WeightUpdater"

CONTRACT: dict[str, str | None] = {
    "sglang.srt.plugins.hook_registry:HookRegistry.register": (
        "(target, hook, hook_type, *, source)"
    ),
    "sglang.srt.plugins.hook_registry:HookRegistry._hooks": None,
    "sglang.srt.plugins.hook_registry:HookRegistry._patched": None,
    "sglang.srt.plugins.hook_registry:HookType.AFTER": None,
    "sglang.srt.plugins.hook_registry:HookType.AROUND": None,
    # Hooked.
    f"{_MODEL}:DeepseekV2MoE.__init__": (
        "(self, config, layer_id, quant_config, prefix, alt_stream, routed_quant_stream, "
        "is_nextn, is_deepseek_v4, vl_correction_bias, reduce_results)"
    ),
    f"{_MODEL}:MoEGate.forward": (
        "(self, hidden_states, gemm_output_zero_allocator, forward_batch)"
    ),
    f"{_TOPK}:TopK.forward": "(self, *args, backend, **kwargs)",
    f"{_TOPK}:TopK.forward_cuda": (
        "(self, hidden_states, router_logits, *, num_token_non_padded, "
        "expert_location_dispatch_info, dynamic_expert_bias, router_logits_partials)"
    ),
    f"{_HASH_TOPK}.forward": (
        "(self, hidden_states, router_logits, input_ids, num_token_non_padded, "
        "expert_location_dispatch_info)"
    ),
    f"{_VISION}:vision_topk": (
        "(moe, logits, input_ids, num_token_non_padded, expert_location_dispatch_info)"
    ),
    f"{_UPDATER}.update_weights_from_disk": (
        "(self, model_path, load_format, weight_name_filter, recapture_cuda_graph)"
    ),
    f"{_UPDATER}.load_weights_from_distributed": "(self, named_tensors)",
    f"{_UPDATER}.update_weights_from_tensor": "(self, named_tensors, load_format)",
    f"{_UPDATER}.update_weights_from_ipc": "(self, recv_req)",
    f"{_UPDATER}.end_weight_update": "(self, *, run_post_load)",
    # Called or read.
    _UPDATER: (
        "(*, tp_rank, device, gpu_id, model_config, custom_weight_loaders, get_model, "
        "update_model_fields, recapture_cuda_graph, get_model_runner, _model_update_group)"
    ),
    f"{_TOPK}:TopKConfig": (
        "(top_k, use_grouped_topk, topk_group, num_expert_group, renormalize, shared_experts, "
        "custom_routing_function, correction_bias, torch_native, routed_scaling_factor, "
        "apply_routed_scaling_factor_on_output, fused_shared_experts_scaling_factor, "
        "output_format, runner_backend, routing_method_type, scoring_func, sqrtsoftplus_log1p, "
        "fused_gate_packed_ids, allow_routed_experts_capture, layer_id)"
    ),
    f"{_TOPK}:TopKConfig.num_shared_topk_slots": None,
    f"{_TOPK}:TopKOutputFormat.STANDARD": None,
    f"{_TOPK}:StandardTopKOutput": "(topk_weights, topk_ids, router_logits)",
    f"{_TOPK}:resolve_routing_inputs": (
        "(*, layer_id, is_draft, num_token_non_padded, expert_location_dispatch_info)"
    ),
    f"{_TOPK}:build_precomputed_topk_output": "(topk_weights, topk_ids, topk_config, layer_id)",
    f"{_TOPK}:_post_process_topk_ids": (
        "(topk_ids, topk_weights, topk_config, router_logits, layer_id, num_token_non_padded, "
        "expert_location_dispatch_info, padded_rows_masked)"
    ),
    f"{_TOPK}:fused_shared_expert_weight": "(*, routed_scaling_factor, fused_in_topk)",
    f"{_TOPK}:routing_simulation_enabled": "()",
    f"{_HASH_TOPK}.num_shared_topk_slots": None,
    f"{_HASH_TOPK}": (
        "(topk, num_experts, *, vocab_size, scoring_func, routed_scaling_factor, "
        "apply_routed_scaling_factor_on_output, layer_id, is_draft)"
    ),
    f"{_VISION}:_finish_vision_topk": (
        "(moe, logits, weights, indices, num_token_non_padded, expert_location_dispatch_info, "
        "padded_rows_masked)"
    ),
    f"{_EPLB}.expert_location_dispatch:ExpertLocationDispatchInfo": (
        "(ep_dispatch_algorithm, partial_logical_to_rank_dispatch_physical_map, "
        "partial_logical_to_all_physical_map, partial_logical_to_all_physical_map_num_valid, "
        "num_physical_experts, rank_invariant)"
    ),
    f"{_EPLB}.expert_distribution:get_global_expert_distribution_recorder": "()",
    "sglang.srt.state_capturer.routed_experts:get_global_experts_capturer": "()",
    "sglang.srt.layers.moe.utils:has_per_rank_fused_shared_slots": "(num_shared)",
    "sglang.srt.layers.moe.kt_ep_wrapper:KTEPWrapperMethod": None,
    "sglang.srt.layers.dp_attention:is_allocation_symmetric": "()",
    "sglang.srt.distributed.device_communicators.pynccl_allocator:use_symmetric_memory": (
        "(group_coordinator, disabled)"
    ),
    "sglang.srt.runtime_context:get_exec": "()",
    "sglang.srt.runtime_context:get_parallel": "()",
}
