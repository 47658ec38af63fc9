"""What the tests on a GPU route, into what, and how a call of theirs is captured."""

from __future__ import annotations

import torch

BF16 = torch.bfloat16
CANARY = -77  # no id, no weight
# A key of about 10 in FP32 is good to 1e-6; two keys this close may rightly change places.
KEY_ROUNDING = 4e-6


def laid_out(W, layout: str):
    """W [K, E] in a layout: K contiguous (a checkpoint's weight, transposed) or E contiguous."""
    return W.t().contiguous().t() if layout == "kmajor" else W.contiguous()


def integers(random, num_tokens: int, k: int, num_experts: int, layout: str = "kmajor"):
    """Operands whose products and sums are exact in FP32: about 2 % of hidden_states is not 0.

    Equal keys are common, nearly equal ones rare: no two square roots of whole numbers below 100
    are as close to 5/16 or 5/8 apart as FP32 would need to confuse them.
    """
    x = torch.randint(-2, 3, (num_tokens, k), generator=random, device="cuda").to(BF16)
    x *= torch.rand(num_tokens, k, generator=random, device="cuda") < max(0.02, 8 / k)
    W = torch.randint(-2, 3, (k, num_experts), generator=random, device="cuda").to(BF16)
    bias = torch.randint(0, 3, (num_experts,), generator=random, device="cuda") * 0.3125
    return x, laid_out(W, layout), bias


def gaussian(random, num_tokens: int, k: int, num_experts: int, layout: str = "kmajor"):
    """Logits of standard deviation 2, and biases as V4's checkpoints have them: 8.08 and noise."""
    x = torch.randn(num_tokens, k, generator=random, device="cuda").to(BF16)
    W = torch.randn(k, num_experts, generator=random, device="cuda") * (2 / k**0.5)
    bias = 8.08 + 0.05 * torch.randn(num_experts, generator=random, device="cuda")
    return x, laid_out(W.to(BF16), layout), bias


def most_in_one_launch(num_experts: int) -> int:
    """Return the largest N of one launch: 30 clusters of 128 experts by 64 tokens."""
    return 30 // -(-num_experts // 128) * 64


def logits_of(x, W):
    return x.double() @ W.double()


def approximation(name: str):
    """`name`.approx.ftz.f32 as this GPU computes it, of a tensor."""
    return torch.cuda.jiterator._create_jit_fn(f"""
        template <typename T> T {name}_of(T x) {{
            T y;
            asm("{name}.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
            return y;
        }}""")


def captured(calls, stream=None, *, mode="global"):
    """A graph of the calls, after one eager run of each. mode: torch's capture_error_mode."""
    side = stream or torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for call in calls:
            call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=side, capture_error_mode=mode):
        for call in calls:
            call()
    return graph


def outputs(num_tokens: int, top_k: int):
    return (
        torch.full((num_tokens, top_k), float(CANARY), device="cuda"),
        torch.full((num_tokens, top_k), CANARY, dtype=torch.int32, device="cuda"),
    )
