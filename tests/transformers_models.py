"""Random DeepSeek-V4 models of transformers, with the judge of their routers.

The judge is the same model with gates in FP64. transformers rounds its router's logits to BF16,
which gives some rows other experts, so that its own routers are no judge of a BF16 model.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from gpu_calls import BF16, KEY_ROUNDING
from transformers import AutoModelForCausalLM, DeepseekV4Config

from dsv4_router_runtime.integrations import transformers as served
from dsv4_router_runtime.reference import (
    router_reference,
    select_reference,
    selection_margin,
)

STOCK = (served.TopKRouter, served.HashRouter)
FUSED = (served.FusedTopKRouter, served.FusedHashRouter)
VOCABULARY = 512
SMALL = {
    "vocab_size": VOCABULARY,
    "hidden_size": 256,
    "moe_intermediate_size": 64,
    "num_attention_heads": 4,
    "num_key_value_heads": 1,
    "head_dim": 64,
    "q_lora_rank": 64,
    "num_experts_per_tok": 6,
    "n_routed_experts": 32,
    "sliding_window": 16,
    "o_groups": 2,
    "o_lora_rank": 32,
    "index_n_heads": 2,
    "index_head_dim": 32,
    "index_topk": 8,
    "partial_rotary_factor": 0.5,
    "hc_mult": 2,
    "hc_sinkhorn_iters": 4,
}


class Fp64TopKRouter(served.TopKRouter):
    """The judge's learned router; weights in FP32, as a kernel writes them."""

    def forward(self, hidden_states):
        flat = hidden_states.reshape(-1, self.hidden_dim)
        return None, *_fp64(self, flat, self.e_score_correction_bias)


class Fp64HashRouter(served.HashRouter):
    """The judge's hash router."""

    def forward(self, hidden_states, input_ids):
        flat = hidden_states.reshape(-1, self.hidden_dim)
        ids = input_ids.reshape(-1)
        return None, *_fp64(self, flat, None, tid2eid=self.tid2eid, input_ids=ids)


def _fp64(router: Any, flat: Any, bias: Any, **options: Any) -> tuple[Any, Any]:
    scale, top_k = router.routed_scaling_factor, router.top_k
    weights, ids = router_reference(flat, router.weight.t(), bias, scale, top_k, **options)
    return weights.float(), ids.long()


JUDGE = (Fp64TopKRouter, Fp64HashRouter)


def build(seed: int, device: str = "cpu", dtype: Any = BF16, num_layers: int = 4, **more: Any):
    """Return a random model: a hash layer, then learned ones with biases like V4's."""
    layer_types = ["sliding_attention", "heavily_compressed_attention"]
    layer_types += ["compressed_sparse_attention"] * 2
    config = DeepseekV4Config(
        **SMALL | more,
        num_hidden_layers=num_layers,
        layer_types=layer_types[:num_layers],
        mlp_layer_types=["hash_moe", *["moe"] * (num_layers - 1)],
    )
    torch.manual_seed(seed)
    with torch.device(device):
        model = AutoModelForCausalLM.from_config(config, dtype=dtype).to(dtype).eval()
        for router in routers(model):
            shape = router.num_experts, router.top_k
            if isinstance(router, served.HashRouter):
                rows = torch.rand(VOCABULARY, shape[0]).argsort(1)[:, : shape[1]]
                router.tid2eid.copy_(rows)
            else:
                # from_config makes this buffer BF16; from_pretrained keeps it FP32.
                router.e_score_correction_bias = 8.08 + 0.05 * torch.randn(shape[0])
    return model


def load(folder: Path) -> Any:
    """Return the model of a folder, its parameters in BF16 as `build` has them.

    5.17 loads the norms in FP32, with which a BF16 model does not run. On a CPU, parameters lie in
    the mapped file at addresses that are no multiple of 16; these are copies.
    """
    return in_bf16(AutoModelForCausalLM.from_pretrained(folder, dtype=BF16).eval())


def in_bf16(model: Any) -> Any:
    """Copy every parameter into BF16, and leave the buffers."""
    for parameter in model.parameters():
        parameter.data = parameter.data.to(BF16, copy=True)
    return model


def routers(model: Any) -> list[Any]:
    return [module for module in model.modules() if isinstance(module, STOCK)]


def use(model: Any, classes: tuple[type, type]) -> Any:
    """Let every router of the model be of these classes, with the weights that it has."""
    for router in routers(model):
        router.__class__ = classes[isinstance(router, served.HashRouter)]
    return model


def prompts(seed: int, *shape: int, device: str = "cpu"):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(2, VOCABULARY, shape, generator=generator).to(device)


def greedy(model: Any, classes: tuple[type, type], ids: Any, num_tokens: int) -> list[list[int]]:
    answer = use(model, classes).generate(
        ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=num_tokens,
        min_new_tokens=num_tokens,
        do_sample=False,
    )
    return answer[:, ids.shape[1] :].tolist()


def answers(model: Any, ids: Any) -> list[tuple[Any, Any, Any]]:
    """Return of each router, in one forward: itself, its hidden states [N, K] and its output."""
    seen: list[tuple[Any, Any, Any]] = []
    hooks = [
        router.register_forward_hook(
            lambda router, given, out: seen.append((router, given[0].flatten(0, -2), out))
        )
        for router in routers(model)
    ]
    with torch.no_grad():
        model(ids)
    for hook in hooks:
        hook.remove()
    return seen


def other_experts(ids: Any, expected: Any) -> Any:
    """Return bool [N]: the rows whose sets of experts differ."""
    return (ids.sort(1).values != expected.sort(1).values).any(1)


def check_experts(model: Any, ids: Any) -> int:
    """Check every row of every learned layer; return in how many transformers' own router errs."""
    wrong_of_stock = 0
    seen = answers(use(model, FUSED), ids)
    assert len(seen) == len(routers(model))
    for router, hidden_states, (logits, weights, chosen) in seen:
        assert logits is None
        assert weights.dtype is torch.float32
        assert chosen.dtype is torch.int64
        if isinstance(router, served.HashRouter):
            assert torch.equal(chosen, router.tid2eid[ids.flatten()])
            continue
        exact = hidden_states.double() @ router.weight.double().t()
        bias, top_k = router.e_score_correction_bias, router.top_k
        expected_weights, expected = select_reference(
            exact, bias, router.routed_scaling_factor, top_k
        )
        clear = selection_margin(exact, bias, top_k) > KEY_ROUNDING
        assert clear.sum() >= len(clear) - 1
        assert not (other_experts(chosen, expected) & clear).any()
        total, expected_total = weights.double().sum(1), expected_weights.sum(1)
        torch.testing.assert_close(total, expected_total, rtol=1e-5, atol=0)
        with torch.no_grad():
            stock = served.TopKRouter.forward(router, hidden_states)[2]
        wrong_of_stock += int((other_experts(stock, expected) & clear).sum())
    return wrong_of_stock
