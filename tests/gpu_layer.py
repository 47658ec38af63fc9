"""A layer and a batch on the current GPU, with the rows that its router must give."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from cuda.bindings import driver as cuda
from gpu_calls import integers, logits_of, outputs

from dsv4_router_runtime import Router
from dsv4_router_runtime.reference import select_reference

K, E, TOP_K, SCALE, VOCABULARY = 1024, 384, 6, 2.5, 50


def checked(answer: tuple) -> Any:
    """Return the value of a driver call that succeeded."""
    assert answer[0] == cuda.CUresult.CUDA_SUCCESS, answer[0]
    return answer[1] if len(answer) > 1 else None


class Layer:
    """A layer and a batch on the current GPU, with the rows that it must give."""

    def __init__(
        self,
        num_tokens: int,
        seed: int = 0,
        *,
        k: int = K,
        hashed: bool = False,
        images: bool = False,
        call: Mapping[str, torch.Tensor] | None = None,
    ) -> None:
        generator = torch.Generator(device="cuda").manual_seed(seed)
        self.x, self.W, self.bias = integers(generator, num_tokens, k, E)
        self.call = call or {}
        options: dict[str, Any] = {}
        if images:
            options["bias_vl"] = self.bias.flip(0).contiguous()
        if hashed:
            rows = [torch.randperm(E)[:TOP_K] for _ in range(VOCABULARY)]
            options["tid2eid"] = torch.stack(rows).to("cuda", torch.int32)
        bias = None if hashed else self.bias
        given = {"top_k": TOP_K, "routed_scaling_factor": SCALE}
        self.router = Router(self.W, bias, **given, **options)
        self.out = outputs(num_tokens, TOP_K)
        self.expected = select_reference(
            logits_of(self.x, self.W), bias, SCALE, TOP_K, **options, **self.call
        )

    def __call__(self, **more: Any) -> None:
        self.router(self.x, *self.out, **self.call, **more)

    def check(self, rows: slice | Sequence[int] = slice(None)) -> None:
        """Compare the outputs with the reference, after the current stream's work."""
        torch.cuda.current_stream().synchronize()
        weights, ids = self.out
        expected_weights, expected_ids = self.expected
        assert torch.equal(ids[rows], expected_ids[rows].to(ids.dtype)), "ids are wrong"
        torch.testing.assert_close(
            weights[rows].double(), expected_weights[rows].double(), rtol=1e-5, atol=1e-6
        )

    def differs(self, rows: slice) -> torch.Tensor:
        """Return whether `check` would fail, on the GPU and without waiting for it."""
        weights, ids = self.out
        expected_weights, expected_ids = self.expected
        close = torch.isclose(weights[rows].double(), expected_weights[rows], rtol=1e-5, atol=1e-6)
        return (ids[rows] != expected_ids[rows]).any() | ~close.all()

    def spoil(self) -> None:
        for out in self.out:
            out.fill_(-77)
