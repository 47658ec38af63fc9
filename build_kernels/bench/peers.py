"""Load other projects' kernels, each from one staged file without its package.

A few stand-in modules replace the imports of those files from their packages that do not matter to
a kernel. A peer that cannot be loaded stays a contender: each of its cells gives the reason.
"""

from __future__ import annotations

import importlib
import sys
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from .contenders import Entrant, Unavailable, entrant
from .inputs import Call, Inputs
from .report import PEER

# vLLM uses its low-latency GEMM up to here, and cuBLAS above.
VLLM_LL_MAX_TOKENS = 16


def peer_entrants(peers: Path, dsl: Path | None) -> tuple[Entrant, ...]:
    """Return the peers staged in `peers`; `dsl` is the unpacked CuTeDSL of vLLM's GEMM.

    Changes sys.path and sys.modules, for good: the peers import more when they first run.
    """
    sys.path.insert(0, str(peers))
    if dsl is not None:
        sys.path[1:1] = [str(dsl), str(dsl / "nvidia_cutlass_dsl" / "dsl_packages")]
    stand_in_for_packages()
    dsv4_topk = loaded("dsv4_topk", peers)
    return (
        entrant(
            *("vllm", PEER),
            f"vLLM: ll_bf16 GEMM (CuTeDSL) up to {VLLM_LL_MAX_TOKENS} tokens, cuBLAS above; then "
            "dsv4_topk (Triton), with PDL",
            lambda inputs: vllm_call(inputs, dsv4_topk, loaded("ll_bf16", peers)),
        ),
        entrant(
            *("cuBLAS + dsv4_topk", PEER),
            "torch.mm(out_dtype=float32), then vLLM's dsv4_topk (Triton)",
            lambda inputs: dsv4_call(inputs, dsv4_topk, product),
        ),
        entrant(
            *("sglang", PEER),
            "SGLang: torch.mm(out_dtype=float32), then moe_fused_gate (Triton)",
            lambda inputs: sglang_call(inputs, loaded("moe_fused_gate", peers)),
        ),
    )


def loaded(name: str, peers: Path) -> types.ModuleType | Unavailable:
    """Return the peer's module, or the reason why there is none."""
    if not (peers / f"{name}.py").is_file():
        return Unavailable(f"{name}.py is not in {peers.name}/ (stage it there)")
    try:
        return importlib.import_module(name)
    # A peer's import may fail in any way, and none of them may stop the others.
    except Exception as error:
        return Unavailable(f"importing {name}: {type(error).__name__}: {error}")


def required(module: types.ModuleType | Unavailable) -> Any:
    if isinstance(module, Unavailable):
        raise module
    return module


def product(hidden_states: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """Compute FP32 logits by cuBLAS, from weights [E, K]."""
    return torch.mm(hidden_states, weights.t(), out_dtype=torch.float32)


def vllm_call(inputs: Inputs, dsv4_topk: Any, ll_bf16: Any) -> Call:
    if inputs.num_tokens > VLLM_LL_MAX_TOKENS:
        return dsv4_call(inputs, dsv4_topk, product)
    return dsv4_call(inputs, dsv4_topk, required(ll_bf16).ll_bf16_gemm)


def dsv4_call(
    inputs: Inputs,
    dsv4_topk: Any,
    gemm: Callable[[torch.Tensor, torch.Tensor], torch.Tensor],
) -> Call:
    module = required(dsv4_topk)
    select, problem, bias = module.dsv4_topk, inputs.problem, inputs.bias
    hidden_states, weights = inputs.hidden_states, inputs.weights
    # can_use_dsv4_topk reads its shape and dtype only.
    logits = torch.empty((inputs.num_tokens, problem.num_experts), device=bias.device)
    if not module.can_use_dsv4_topk(logits, bias, problem.top_k, True, torch.int32):
        raise Unavailable(
            f"dsv4_topk does not take num_experts={problem.num_experts}, top_k={problem.top_k}"
        )
    scale = problem.routed_scaling_factor
    return lambda layer: select(gemm(hidden_states, weights[layer]), bias, torch.int32, scale)


def sglang_call(inputs: Inputs, moe_fused_gate: Any) -> Call:
    gate, problem, bias = required(moe_fused_gate).moe_fused_gate, inputs.problem, inputs.bias
    hidden_states, weights = inputs.hidden_states, inputs.weights
    return lambda layer: gate(
        product(hidden_states, weights[layer]),
        bias,
        problem.top_k,
        scoring_func="sqrtsoftplus",
        renormalize=True,
        routed_scaling_factor=problem.routed_scaling_factor,
        apply_routed_scaling_factor_on_output=True,
    )


def stand_in_for_packages() -> None:
    """Add stand-in modules under the names that the peers' files import."""
    major, minor = torch.cuda.get_device_capability()
    platform = types.SimpleNamespace(
        is_cuda=lambda: True,
        is_arch_support_pdl=lambda: major >= 9,
        is_device_capability_family=lambda capability: major == capability // 10,
        is_device_capability=lambda capability: major * 10 + minor == capability,
    )
    _stand_in("vllm.platforms", current_platform=platform)
    _stand_in("vllm.utils.torch_utils", current_stream=torch.cuda.current_stream)
    _stand_in(
        "sglang.kernels.jit.utils",
        get_jit_cuda_arch=lambda: types.SimpleNamespace(major=major, minor=minor),
        is_arch_support_pdl=lambda: major >= 9,
    )
    _stand_in("sglang.kernels.kernel_api_logging", debug_kernel_api=lambda function: function)
    _stand_in("sglang.kernels.ops.moe", moe_route_radix=None)
    _stand_in("sglang.srt.environ", envs=_AllSwitchesOff())
    try:
        import triton
    except ImportError:
        # A peer that needs Triton reports that itself.
        return
    _stand_in("vllm.triton_utils", tl=importlib.import_module("triton.language"), triton=triton)


class _AllSwitchesOff:
    """SGLang's environment switches, each of them off."""

    def __getattr__(self, _name: str) -> types.SimpleNamespace:
        return types.SimpleNamespace(get=lambda: False)


def _stand_in(name: str, **members: Any) -> None:
    """Put a module with these members under `name`, and empty packages above it."""
    module = types.ModuleType(name)
    module.__dict__.update(members)
    sys.modules[name] = module
    parent, _, leaf = name.rpartition(".")
    if parent:
        if parent not in sys.modules:
            _stand_in(parent)
        setattr(sys.modules[parent], leaf, module)
