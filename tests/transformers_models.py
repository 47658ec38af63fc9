"""Random DeepSeek-V4 models of transformers, with the judge of their routers.

The judge is the same model with gates in FP64. transformers rounds its router's logits to BF16,
which gives some rows other experts, so that its own routers are no judge of a BF16 model.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from gpu_calls import BF16, KEY_ROUNDING
from transformers import AutoModelForCausalLM, DeepseekV4Config

from dsv4_router_runtime.integrations import transformers as served
from dsv4_router_runtime.reference import (
    router_reference,
    router_scores,
    selection_keys,
)

STOCK = (served.TopKRouter, served.HashRouter)
FUSED = (served.FusedTopKRouter, served.FusedHashRouter)
VOCABULARY = 512
# Of a weight, relative to itself, if the logits are exact.
WEIGHT_ROUNDING = 1e-6
# In a model in FP32, weights with errors of 4e-7 moved logits by at most 3e-4.
LOGIT_ROUNDING = 1e-3
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


def in_fp32(model: Any) -> Any:
    """Let the model compute in FP32, and its routers from BF16 as before.

    In BF16 the model is no judge of tokens: its experts multiply by the routers' FP32 weights and
    round once, so an error of 1e-7 in a weight flips some of these roundings, and those the experts
    of later layers. With such errors alone 3 of 16 rows left the tokens of FP64 gates within 8.
    """
    # torch's grouped matrix product is for BF16.
    model.float().set_experts_implementation("eager")
    for router in routers(model):
        router.weight.data = router.weight.data.to(BF16)
        router.register_forward_pre_hook(lambda _, given: (given[0].to(BF16), *given[1:]))
    return model


def check_tokens(
    model: Any, classes: tuple[type, type], ids: Any, num_tokens: int
) -> tuple[int, int]:
    """Compare the tokens of a model in FP32 with the judge's; return how many were compared.

    Those are the rows of greedy answers, and the positions of prompts and answers, whose next token
    the judge chooses by more than LOGIT_ROUNDING.
    """
    expected = greedy(model, JUDGE, ids, num_tokens)
    whole = torch.cat([ids, torch.tensor(expected, device=ids.device)], 1)
    with torch.no_grad():
        judged = use(model, JUDGE)(whole).logits
        logits = use(model, classes)(whole).logits
    first, second = judged.topk(2).values.unbind(-1)
    clear = first - second > LOGIT_ROUNDING
    assert torch.equal(logits.argmax(-1)[clear], judged.argmax(-1)[clear])
    clear_rows = clear[:, ids.shape[1] - 1 : -1].all(1).tolist()
    for got, wanted, is_clear in zip(
        greedy(model, classes, ids, num_tokens), expected, clear_rows, strict=True
    ):
        assert got == wanted or not is_clear
    return sum(clear_rows), int(clear.sum())


def answers(model: Any, run: Callable[[], Any]) -> list[tuple[Any, Any, Any]]:
    """Return of each call of a router within `run`: the router, its arguments and its output."""
    seen: list[tuple[Any, Any, Any]] = []
    hooks = [
        router.register_forward_hook(lambda router, given, out: seen.append((router, given, out)))
        for router in routers(model)
    ]
    with torch.no_grad():
        run()
    for hook in hooks:
        hook.remove()
    return seen


def logit_error(hidden_states: Any, weight: Any) -> Any:
    """Bound the error [N, E] of FP32 logits of BF16 operands, whose products FP32 holds exactly.

    Each of K sums is off by 2^-24 of a partial sum, which is sum |x w| at most, and such errors add
    up as a random walk does: sqrt(K) 2^-24 sum |x w|. Of normal operands at K = 7168 that is
    4.6e-4. There one sum after the other is off by 1.7e-5, and sums of 16 products that are
    truncated, as tensor cores do, by 8e-5.
    """
    magnitudes = hidden_states.double().abs() @ weight.double().abs().t()
    return hidden_states.shape[1] ** 0.5 * 2**-24 * magnitudes


def check_weights(weights: Any, chosen: Any, exact: Any, error: Any, scale: float) -> None:
    """Compare weights with those of FP64 logits, of which theirs are off by `error` at most.

    d ln sqrt(softplus(l)) / dl = sigmoid(l) / (2 softplus(l)) <= 1/2: a score is off by half of its
    logit's error, relative to itself, and the sum of scores by half of their largest.
    """
    scores = router_scores(exact).gather(1, chosen)
    expected = scores / scores.sum(1, keepdim=True) * scale
    of_scores = error.gather(1, chosen) / 2
    tolerance = WEIGHT_ROUNDING + of_scores + of_scores.amax(1, keepdim=True)
    worst = ((weights.double() / expected - 1).abs() / tolerance).max().item()
    # Not >, which NaN would pass.
    assert worst <= 1, f"a weight is off by {worst:.3g} times the tolerance"


def check_experts(model: Any, ids: Any) -> int:
    """Check every row of every layer; return in how many transformers' own router errs."""
    seen = answers(use(model, FUSED), lambda: model(ids))
    assert len(seen) == len(routers(model))
    return sum(check_call(*each) for each in seen)


def check_generation(model: Any, ids: Any, num_tokens: int) -> int:
    """Check every row of every call of a router in a greedy answer; return the number of rows."""
    seen = answers(model, lambda: greedy(model, FUSED, ids, num_tokens))
    assert len(seen) == num_tokens * len(routers(model))
    for each in seen:
        check_call(*each)
    return sum(len(weights) for _, _, (_, weights, _) in seen)


def check_call(router: Any, given: tuple[Any, ...], out: tuple[Any, ...]) -> int:
    """Check a served call against FP64 logits; return in how many rows transformers' own errs."""
    hidden_states = given[0].flatten(0, -2)
    logits, weights, chosen = out
    assert logits is None
    assert weights.dtype is torch.float32
    assert chosen.dtype is torch.int64
    exact = hidden_states.double() @ router.weight.double().t()
    error = logit_error(hidden_states, router.weight)
    check_weights(weights, chosen, exact, error, router.routed_scaling_factor)
    if isinstance(router, served.HashRouter):
        assert torch.equal(chosen, router.tid2eid[given[1].flatten()])
        return 0
    bias, top_k = router.e_score_correction_bias, router.top_k
    keys = selection_keys(exact, bias)
    # d sqrt(softplus(l)) / dl <= 1/3, so that keys this close may change places.
    lowest = keys.topk(top_k).values[:, -1] - KEY_ROUNDING - 2 / 3 * error.amax(1)

    def err(ids: Any) -> Any:
        """Return bool [N]: the rows with an expert twice, or one that is not among the best."""
        twice = (ids.sort(1).values.diff(dim=1) == 0).any(1)
        return twice | (keys.gather(1, ids).amin(1) < lowest)

    assert not err(chosen).any()
    with torch.no_grad():
        return int(err(served.TopKRouter.forward(router, hidden_states)[2]).sum())
