"""A MoE layer of SGLang as its DeepSeek-V4 builds one: the real class with experts that record.

It runs on a CPU and on a GPU. Logits that a test makes itself go through SGLang's own top-k, with
all that SGLang does after it, in the same process: that is the judge.
"""

from __future__ import annotations

import os
import sys
import tempfile
import tomllib
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from functools import lru_cache
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

# torchvision registers shapes of operators that its wheel for torch without CUDA does not have.
sys.modules.setdefault("torchvision._meta_registrations", ModuleType("_meta_registrations"))

import torch  # noqa: E402
from sglang.srt import plugins, runtime_context  # noqa: E402
from sglang.srt.configs.shared_experts import SharedExpertsConfig  # noqa: E402
from sglang.srt.environ import envs  # noqa: E402
from sglang.srt.eplb.expert_location import (  # noqa: E402
    ExpertLocationMetadata,
    set_global_expert_location_metadata,
)
from sglang.srt.model_executor.forward_context import (  # noqa: E402
    ForwardContext,
    forward_context,
)
from sglang.srt.model_executor.model_runner_components.weight_updater import (  # noqa: E402
    WeightUpdater,
)
from sglang.srt.multimodal.dsv41.vl_routing import vision_topk  # noqa: E402

from dsv4_router_runtime.integrations.sglang import plugin  # noqa: E402

K, E, TOP_K, SCALE, VOCABULARY, IMAGE_TOKEN = 256, 64, 6, 1.5, 96, 7
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
BF16 = torch.bfloat16
# What would end when it is collected.
_kept = ExitStack()


@lru_cache
def start() -> None:
    """Publish a server's configuration and load the plugin by its entry point, as a server does."""
    runtime_context._CONTEXT.override_server_args().install()
    alone = SimpleNamespace(world_size=1)
    _kept.enter_context(runtime_context.get_parallel().override(tp_group=alone, tp_rank=0))
    place = Path(tempfile.mkdtemp())
    project = tomllib.loads(Path(__file__).parents[1].joinpath("pyproject.toml").read_text())
    points = project["project"]["entry-points"][plugins.GENERAL_PLUGINS_GROUP]
    info = place / "dsv4_router-0.1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: dsv4-router\nVersion: 0.1.0\n")
    lines = "".join(f"{name} = {value}\n" for name, value in points.items())
    (info / "entry_points.txt").write_text(f"[{plugins.GENERAL_PLUGINS_GROUP}]\n{lines}")
    sys.path.insert(0, str(place))
    os.environ[plugin.SWITCH] = "1"
    plugins.load_plugins()


class Experts(torch.nn.Module):
    """Experts that return their input and keep the top-k that they were given."""

    quant_method = runner_backend = routing_method_type = None
    should_fuse_routed_scaling_factor_in_topk = False
    moe_runner_config = SimpleNamespace(inplace=True)

    def __init__(self, **given: Any) -> None:
        super().__init__()
        self.given = given

    def forward(self, hidden_states: torch.Tensor, topk_output: Any) -> torch.Tensor:
        self.topk_output = topk_output
        return hidden_states


class FusingExperts(Experts):
    """Experts that leave the scale to the router."""

    should_fuse_routed_scaling_factor_in_topk = True


def build(
    seed: int,
    *,
    hashed: bool = False,
    sees: bool = False,
    fused_scale: bool = False,
    num_shared: int = 0,
    k: int = K,
    num_experts: int = E,
    device: str = DEVICE,
    **config: Any,
) -> Any:
    """Return a DeepseekV2MoE with random weights, tables of distinct experts among them."""
    start()
    from sglang.srt.models import deepseek_v2

    given = {
        "n_routed_experts": num_experts,
        "hidden_size": k,
        "num_experts_per_tok": TOP_K,
        "routed_scaling_factor": SCALE,
        "n_shared_experts": num_shared or None,
        "topk_method": "noaux_tc",
        "moe_intermediate_size": 64,
        "hidden_act": "silu",
        "num_hash_layers": 3,
        "vocab_size": VOCABULARY,
        "scoring_func": "sqrtsoftplus",
        "norm_topk_prob": True,
        "n_group": 1,
        "topk_group": 1,
        "model_type": "deepseek_v41" if sees else "deepseek_v4",
        "image_token_id": IMAGE_TOKEN,
        **config,
    }
    experts = FusingExperts if fused_scale else Experts
    kept, deepseek_v2.get_moe_impl_class = deepseek_v2.get_moe_impl_class, lambda _: experts
    before = torch.get_default_dtype()
    torch.set_default_dtype(BF16)
    shared = SharedExpertsConfig(num_fused_shared_experts=num_shared)
    try:
        with torch.device(device), runtime_context.get_model().override(shared_experts=shared):
            layer_id = 1 if hashed else 4
            moe = deepseek_v2.DeepseekV2MoE(
                SimpleNamespace(**given),
                layer_id,
                prefix=f"model.layers.{layer_id}.mlp",
                is_deepseek_v4=True,
                vl_correction_bias=sees,
            )
    finally:
        torch.set_default_dtype(before)
        deepseek_v2.get_moe_impl_class = kept
    fill(moe, seed)
    return moe


def fill(moe: Any, seed: int) -> None:
    """Write random weights in place, as SGLang's loaders do."""
    generator = torch.Generator().manual_seed(seed)

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator)

    gate = moe.gate
    num_experts, k = gate.weight.shape
    gate.weight.data.copy_(random(num_experts, k) * 2 * k**-0.5)
    for bias in (gate.e_score_correction_bias, gate.e_score_correction_bias_vl):
        if bias is not None:
            bias.data.copy_(random(num_experts))
    if moe.is_hash:
        rows, top_k = moe.topk.tid2eid.shape
        table = random(rows, num_experts).argsort(1)[:, :top_k]
        moe.topk.tid2eid.data.copy_(table)


def batch(seed: int, num_tokens: int, k: int = K, device: str = DEVICE) -> tuple[Any, Any]:
    """Return hidden states and token ids, of which every third is the image token."""
    generator = torch.Generator().manual_seed(seed)
    hidden_states = torch.randn(num_tokens, k, generator=generator).to(BF16)
    input_ids = torch.randint(VOCABULARY, (num_tokens,), generator=generator)
    input_ids[::3] = IMAGE_TOKEN
    return hidden_states.to(device), input_ids.to(device)


def logits_of(moe: Any, hidden_states: torch.Tensor) -> torch.Tensor:
    return (hidden_states.double() @ moe.gate.weight.double().t()).float()


def routed(moe: Any, hidden_states: torch.Tensor, input_ids: torch.Tensor) -> Any:
    """Run the layer; return the top-k that its experts were given."""
    with torch.inference_mode():
        moe(hidden_states.clone(), input_ids_global=input_ids, skip_shared_experts=True)
    return moe.experts.topk_output


def judged(moe: Any, hidden_states: torch.Tensor, input_ids: torch.Tensor) -> Any:
    """Return what SGLang's own definition in torch makes of FP32 logits."""
    logits = logits_of(moe, hidden_states)
    with torch.inference_mode():
        if moe.is_hash:
            with envs.SGLANG_OPT_USE_FUSED_HASH_TOPK.override(False):
                return moe.topk(hidden_states, logits, input_ids)
        if moe.gate.e_score_correction_bias_vl is not None:
            return vision_topk(moe, logits, input_ids)
        return moe.topk.forward_native(hidden_states, logits)


def check(moe: Any, hidden_states: torch.Tensor, input_ids: torch.Tensor) -> Any:
    """Compare a call with the judge's, row by row and in any order of experts; return it."""
    got, expected = (run(moe, hidden_states, input_ids) for run in (routed, judged))
    assert hasattr(got.router_logits, "dsv4_router"), "SGLang's own router ran"
    assert got.topk_ids.dtype is torch.int32
    assert got.topk_weights.dtype is torch.float32
    assert got.router_logits.shape == (len(hidden_states), moe.gate.weight.shape[0])
    (weights, ids), (judge_weights, judge_ids) = (in_order(each) for each in (got, expected))
    assert torch.equal(ids, judge_ids.int())
    padded = ids < 0
    torch.testing.assert_close(weights, judge_weights.masked_fill(padded, 0), rtol=2e-6, atol=1e-7)
    return got


def in_order(output: Any) -> tuple[torch.Tensor, torch.Tensor]:
    ids, order = output.topk_ids.sort(1)
    return output.topk_weights.gather(1, order), ids


@contextmanager
def padded_to(num_tokens: int | None) -> Iterator[None]:
    """Let SGLang say, on the device, how many rows are no padding."""
    bound = None if num_tokens is None else torch.tensor(num_tokens, dtype=torch.int32).to(DEVICE)
    with forward_context(ForwardContext(None, lambda: bound)):  # type: ignore[arg-type]
        yield


@contextmanager
def balanced(
    seed: int, algorithm: str, *, num_experts: int = E, backend: str = "none"
) -> Iterator[ExpertLocationMetadata]:
    """Let SGLang dispatch by maps with up to three replicas of an expert."""
    start()
    resources = runtime_context.get_resources()
    kept = resources.expert_location_metadata
    moe = runtime_context.get_exec().moe
    with moe.override(ep_dispatch_algorithm=algorithm, moe_a2a_backend=backend):
        metadata = maps(seed, num_experts)
        set_global_expert_location_metadata(metadata, allow_overwrite=True)
        try:
            yield metadata
        finally:
            set_global_expert_location_metadata(kept, allow_overwrite=True)


def maps(seed: int, num_experts: int = E, num_layers: int = 6) -> ExpertLocationMetadata:
    """Return maps in which half as many experts again have replicas."""
    generator = torch.Generator().manual_seed(seed)
    num_physical = num_experts * 3 // 2
    to_physical = torch.full((num_layers, num_experts, 3), -1)
    to_logical = torch.empty((num_layers, num_physical), dtype=torch.int64)
    for layer in range(num_layers):
        slots = torch.randperm(num_physical, generator=generator)
        copies = torch.randint(num_experts, (num_physical - num_experts,), generator=generator)
        used = [0] * num_experts
        for slot, expert in zip(slots, [*range(num_experts), *copies.tolist()], strict=True):
            if used[expert] == 3:
                expert = used.index(1)
            to_physical[layer, expert, used[expert]] = slot
            to_logical[layer, slot] = expert
            used[expert] += 1
    return ExpertLocationMetadata._init_raw(
        1, to_logical.to(DEVICE), to_physical.to(DEVICE), moe_ep_rank=0
    )


def updater_of(moe: Any) -> WeightUpdater:
    """Return SGLang's updater of a model that is this layer alone."""
    model = torch.nn.Module()
    model.mlp = moe
    return WeightUpdater(
        tp_rank=0,
        device=DEVICE,
        gpu_id=0,
        model_config=None,
        custom_weight_loaders={},
        get_model=lambda: model,
        update_model_fields=None,
        recapture_cuda_graph=None,
        get_model_runner=None,
        _model_update_group={},
    )
