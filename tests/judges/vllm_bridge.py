"""vLLM's own tests of the choice of experts, run against this router.

    DSV4_JUDGE_VLLM=.../tests/kernels/moe/test_topk_softplus_sqrt.py \
        python -m pytest tests/judges/vllm_bridge.py

vLLM's tests give logits, this router takes hidden states. So the gate is the identity and the
hidden states are the logits: each one is then exact. The file is vLLM's, of a checkout of its
repository. The functions under test are replaced in it, and on a CPU the device. No line of it is
kept here. Cases that are left out are skipped with their reason: top 16 (the kernels have up to 8),
and logits in FP16 or FP32, which BF16 hidden states do not hold.
"""

from __future__ import annotations

import os
import types
from pathlib import Path
from typing import Any
from unittest import mock

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("vllm", reason="vLLM is installed by .ci/serving alone")

from vllm.model_executor.layers.fused_moe.router.fused_topk_bias_router import (  # noqa: E402
    FusedTopKBiasRouter,
)
from vllm.platforms import current_platform  # noqa: E402

from dsv4_router_runtime.artifacts.limits import MAX_TOP_K  # noqa: E402
from dsv4_router_runtime.integrations.vllm import router as served  # noqa: E402
from dsv4_router_runtime.integrations.vllm.gate import no_logits  # noqa: E402

VARIABLE = "DSV4_JUDGE_VLLM"
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"

pytestmark = pytest.mark.serving


def fused_topk_bias(
    hidden_states: Any,
    gating_output: Any,
    scoring_func: str,
    e_score_correction_bias: Any,
    topk: int,
    renormalize: bool,
    indices_type: Any = None,
    input_tokens: Any = None,
    hash_indices_table: Any = None,
    routed_scaling_factor: float = 1.0,
    bias_vl: Any = None,
    image_sentinel_lo: int = 0,
) -> tuple[Any, Any]:
    """Route with vLLM's arguments and the identity as gate; skip the test if it cannot be done."""
    if gating_output.dtype is not torch.bfloat16:
        pytest.skip(f"left out: logits in {gating_output.dtype}, which hidden states are not in")
    if topk > MAX_TOP_K:
        pytest.skip(f"left out: top {topk}; the kernels have up to {MAX_TOP_K}")
    num_tokens, num_experts = gating_output.shape
    stock = FusedTopKBiasRouter(
        topk,
        num_experts,
        e_score_correction_bias,
        renormalize,
        routed_scaling_factor,
        scoring_func=scoring_func,
        hash_indices_table=hash_indices_table,
        bias_vl=bias_vl,
        image_sentinel_lo=image_sentinel_lo,
    )
    identity = torch.eye(num_experts, dtype=torch.bfloat16, device=gating_output.device)
    router = served.ServedRouter(stock, types.SimpleNamespace(weight=identity))
    return router._compute_routing(
        gating_output, no_logits(num_tokens, num_experts), indices_type, input_ids=input_tokens
    )


def dsv4_topk(
    gating_output: Any,
    correction_bias: Any,
    indices_dtype: Any,
    routed_scaling_factor: float,
    is_padding: Any = None,
    input_ids: Any = None,
    bias_vl: Any = None,
    image_sentinel_lo: int = 0,
) -> tuple[Any, Any]:
    """Route as vLLM's Triton kernel does: six experts, renormalized."""
    with mock.patch.object(served, "_get_padding_mask", return_value=is_padding):
        return fused_topk_bias(
            gating_output,
            gating_output,
            "sqrtsoftplus",
            correction_bias,
            6,
            True,
            indices_dtype,
            input_ids,
            routed_scaling_factor=routed_scaling_factor,
            bias_vl=bias_vl,
            image_sentinel_lo=image_sentinel_lo,
        )


def cases_of(path: Path) -> dict[str, Any]:
    """Run vLLM's file with this router in it; return its tests, with their parameters."""
    source = path.read_text(encoding="utf-8").replace('device="cuda"', f'device="{DEVICE}"')
    names: dict[str, Any] = {"__name__": path.stem}
    with mock.patch.object(type(current_platform), "is_cuda_alike", return_value=True):
        exec(compile(source, str(path), "exec"), names)
    replaced = {"fused_topk_bias": fused_topk_bias, "dsv4_topk": dsv4_topk}
    names |= {name: each for name, each in replaced.items() if name in names}
    return {name: each for name, each in names.items() if name.startswith("test_")}


if not os.environ.get(VARIABLE):
    pytest.skip(f"{VARIABLE} names no file of vLLM's tests", allow_module_level=True)
globals().update(cases_of(Path(os.environ[VARIABLE])))
