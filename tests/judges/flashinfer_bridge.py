"""FlashInfer's own test of its hash router, run against this one.

    DSV4_JUDGE_FLASHINFER=.../tests/moe/test_hash_topk.py \
        python -m pytest tests/judges/flashinfer_bridge.py

The test gives FP32 logits, and this router takes hidden states: see `identity_gate`. The file is
FlashInfer's, of a checkout of its repository, and its reference is in it: FlashInfer itself need
not be installed. Its function is replaced, and on a CPU the device. No line of it is kept here.

| left out | reason |
| --- | --- |
| top 31 | the kernels have up to 8 |
| test_hash_topk_invalid_args | it judges which arguments FlashInfer's function refuses |
"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from types import ModuleType
from typing import Any
from unittest import mock

import pytest

torch = pytest.importorskip("torch")

from exact_gates import identity_gate  # noqa: E402

from dsv4_router_runtime.artifacts.limits import MAX_TOP_K  # noqa: E402
from dsv4_router_runtime.integrations import torch_op  # noqa: E402

VARIABLE = "DSV4_JUDGE_FLASHINFER"
LEFT_OUT = {"test_hash_topk_invalid_args": "it judges what FlashInfer's function refuses"}
pytestmark = pytest.mark.serving


def hash_topk(
    router_logits: Any,
    input_ids: Any,
    tid2eid: Any,
    num_fused_shared_experts: int = 0,
    routed_scaling_factor: float = 1.0,
    launch_with_pdl: bool = True,
) -> tuple[Any, Any]:
    """Route with FlashInfer's arguments; skip the test if it cannot be done."""
    top_k = tid2eid.shape[1]
    if top_k > MAX_TOP_K:
        pytest.skip(f"left out: top {top_k}; the kernels have up to {MAX_TOP_K}")
    return torch_op.route_functional(
        *identity_gate(router_logits),
        None,
        # FlashInfer scales no routed weight: its factor divides that of shared experts.
        1.0,
        top_k,
        tid2eid=tid2eid,
        num_shared_slots=num_fused_shared_experts,
        shared_weight=1.0 / routed_scaling_factor,
        input_ids=input_ids,
        pdl=launch_with_pdl,
    )


def cases_of(path: Path) -> dict[str, Any]:
    """Run FlashInfer's file with this router in it; return its tests, with their parameters."""
    source = path.read_text(encoding="utf-8")
    if not torch.cuda.is_available():
        source = source.replace('torch.device("cuda")', 'torch.device("cpu")')
        source = source.replace("torch.cuda.is_available()", "True")
    stand_ins = {name: ModuleType(name) for name in ("flashinfer", "flashinfer.fused_moe")}
    vars(stand_ins["flashinfer.fused_moe"])["hash_topk"] = hash_topk
    names: dict[str, Any] = {"__name__": path.stem}
    with mock.patch.dict(sys.modules, stand_ins):
        exec(compile(source, str(path), "exec"), names)
    tests = {name: each for name, each in names.items() if name.startswith("test_")}
    for name, reason in LEFT_OUT.items():
        if name in tests:
            tests[name] = pytest.mark.skip(reason=f"left out: {reason}")(tests[name])
    return tests


if not os.environ.get(VARIABLE):
    pytest.skip(f"{VARIABLE} names no file of FlashInfer's tests", allow_module_level=True)
globals().update(cases_of(Path(os.environ[VARIABLE])))
