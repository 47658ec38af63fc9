"""The calls whose bits a GPU records and the emulator repeats: kernels, sizes and inputs.

The inputs come from integers of torch's CPU generator by exact steps, so every machine draws the
same: `torch.randn` and `torch.exp2` differ in the last bit from one CPU to another.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
import torch
from gpu_calls import BF16, laid_out

from build_kernels.evidence.cases import Case
from build_kernels.evidence.inputs import SCALE, Inputs, make_inputs
from build_kernels.specs import KERNELS, KernelSpec
from dsv4_router_runtime import Router
from dsv4_router_runtime.artifacts.folder import ArtifactSet
from dsv4_router_runtime.artifacts.kernel import Kernel

TOP_K = 6


# ------------------------------------------------------------------ draws


def binades(random, low: int, high: int, *shape):
    """Powers of two."""
    exponents = torch.randint(low, high + 1, shape, generator=random, dtype=torch.int32)
    return (exponents + 127 << 23).view(torch.float32)


def normal(random, *shape):
    """About gaussian: the sum of 12 uniform numbers, exact in FP64."""
    return (torch.rand(12, *shape, generator=random).double().sum(0) - 6).float()


def gaussian(random, n, k, e):
    """Logits of standard deviation 2."""
    return normal(random, n, k), normal(random, k, e) * (2 / math.sqrt(k))


def wide_range(random, n, k, e):
    """24 binades of each factor."""
    x, w = normal(random, n, k), normal(random, k, e)
    return x * binades(random, -12, 12, n, k), w * binades(random, -18, 6, k, e)


def cancelling(random, n, k, e):
    """Neighbours cancel to the last bit of W_gate."""
    x, w = normal(random, n, k), normal(random, k, e)
    x[:, 1::2], w[1::2] = x[:, ::2], -w[::2]
    w[1::6] *= 1 + 2**-7
    return x, w


def not_finite(random, n, k, e):
    """A NaN or an infinity in about every second row of either factor."""
    x, w = gaussian(random, n, k, e)
    odd = torch.tensor([math.nan, math.inf, -math.inf])
    for each in (x, w):
        at = torch.rand(each.shape, generator=random) < 1 / (2 * k)
        each[at] = odd[torch.randint(0, 3, (int(at.sum()),), generator=random)]
    return x, w


Draw = Callable[..., tuple[torch.Tensor, torch.Tensor]]
DRAWS: dict[str, Draw] = {
    draw.__name__: draw for draw in (gaussian, wide_range, cancelling, not_finite)
}


# ------------------------------------------------------------------ cases


@dataclass(frozen=True, kw_only=True)
class RecordedCase:
    """A call that takes `kernel`, a name without an architecture.

    draw: a key of DRAWS, or empty for the inputs of `case`, whose sums are exact.
    layout: of W_gate; a router multiplies a K-contiguous copy if TMA cannot step by its rows.
    """

    kernel: str
    case: Case
    draw: str = ""
    layout: str = "kmajor"

    def __str__(self) -> str:
        return f"{self.kernel} {self.case} {self.draw or 'exact'} {self.layout}"

    def inputs(self, kernel: Kernel) -> Inputs:
        """Draw the inputs. Those of a draw come without their reference's outputs."""
        inputs = make_inputs(kernel, self.case)
        if not self.draw:
            return inputs
        random = torch.Generator().manual_seed(zlib.crc32(str(self).encode()))
        n, e = self.case.num_tokens, self.case.num_experts
        if kernel.role == "select":
            # As BF16, so that a product with the identity has them as they are.
            drawn = DRAWS[self.draw](random, n, e, e)[0].to(BF16).float()
            # As the product has them: NaN times 0 is NaN in every column.
            drawn[~drawn.isfinite().all(1)] = math.nan
            return replace(inputs, tensors={**inputs.tensors, "logits": drawn.numpy()})
        x, w = (each.to(BF16) for each in DRAWS[self.draw](random, n, self.case.k, e))
        tensors = {**inputs.tensors, "hidden_states": bits(x), "W_gate": bits(w)}
        return replace(inputs, tensors=tensors)


def sizes_of(spec: KernelSpec) -> list[tuple[int, int, int]]:
    """(N, E, K): at the ends of the kernel's token tile, of one expert tile and of several, of K
    that the slices share evenly and of K that they do not."""
    tile = spec.token_tile
    if spec.role == "decode":
        below = {8: 1, 32: 9, 64: 33}[tile]
        return [(below, 40, 1024), (tile, 136, 1088), (tile - 1, 200, 1024), (below + 2, 264, 2112)]
    if spec.role == "prefill":
        # Whole tiles too; up to 64 tokens are decode's.
        return [(65, 40, 1024), (tile + 1, 136, 1088), (66, 264, 1024), (128, 64, 2112)]
    if spec.role == "hash":
        return [(1, 40, 1024), (7, 136, 1088), (8, 384, 4096), (33, 200, 2112)]
    return [(70, 40, 0), (65, 136, 0), (130, 264, 0), (80, 512, 0)]


def rounded_cases() -> list[RecordedCase]:
    """Each kernel in four sizes and by four draws, with the logits of those that store them."""
    cases = []
    for spec in KERNELS:
        options = ("logits",) if spec.role in ("decode", "prefill") else ()
        layout = spec.problem.layout or "kmajor"
        for n, e, k in sizes_of(spec):
            case = Case(num_tokens=n, num_experts=e, top_k=TOP_K, k=k, options=options)
            cases += [
                RecordedCase(kernel=spec.name, case=case, draw=draw, layout=layout)
                for draw in DRAWS
            ]
    return cases


def _exact(n: int, e: int, k: int, kind: str) -> Case:
    return Case(num_tokens=n, num_experts=e, top_k=TOP_K, k=k, kind=kind)


# Ragged E, one and several expert tiles, K of one block and of four a CTA.
EXACT_DECODE = [
    _exact(n, e, k, kind)
    for n, kind in ((1, "biased"), (6, "integers"), (7, "biased"), (16, "integers"))
    for e, k in ((60, 1024), (132, 4096))
] + [
    _exact(64, 60, 4096, "biased"),
    _exact(64, 132, 1024, "integers"),
    _exact(31, 256, 4096, "biased"),
    _exact(3, 96, 1024, "extreme"),
]
# Of each kernel, by layout: two token tiles of few experts, or two expert tiles.
EXACT_PREFILL = [
    ("n64", "kmajor", _exact(65, 60, 1024, "biased")),
    ("n64", "emajor", _exact(65, 136, 1024, "integers")),
    ("n64_k8", "emajor", _exact(65, 56, 1024, "biased")),
    ("n64_k8", "kmajor", _exact(70, 132, 2048, "biased")),
    ("n64_k4", "kmajor", _exact(65, 60, 2048, "biased")),
    ("n64_k4", "emajor", _exact(70, 136, 1024, "biased")),
    ("n128_k4", "emajor", _exact(129, 56, 1024, "biased")),
    ("n128_k4", "kmajor", _exact(100, 132, 2048, "biased")),
]


def exact_cases() -> list[RecordedCase]:
    """Integers, so that no order of summation can excuse a difference."""
    tiles = sorted(spec.token_tile for spec in KERNELS if spec.role == "decode")
    cases = []
    for case in EXACT_DECODE:
        tile = next(tile for tile in tiles if case.num_tokens <= tile)
        for layout in ("kmajor", "emajor"):
            # E = 132: rows that TMA cannot step by.
            built = "kmajor" if case.num_experts % 8 else layout
            name = f"router_decode_{built}_n{tile}"
            cases.append(RecordedCase(kernel=name, case=case, layout=layout))
    for shape, layout, case in EXACT_PREFILL:
        name = f"router_prefill_{layout}_{shape}"
        cases.append(RecordedCase(kernel=name, case=case, layout=layout))
    for e in (60, 132, 256, 512):
        cases.append(RecordedCase(kernel="router_topk", case=_exact(70, e, 0, "biased")))
    return cases


RECORDED = (*rounded_cases(), *exact_cases())


# ------------------------------------------------------------------ calls


def bits(tensor: torch.Tensor) -> np.ndarray:
    return tensor.contiguous().view(torch.int16).numpy().view(np.uint16)


def bfloat16(array: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(array.view(np.int16).copy()).view(BF16)


def factors(inputs: Inputs) -> tuple[torch.Tensor, torch.Tensor]:
    """hidden_states and W_gate; of logits those whose product they are."""
    if "logits" in inputs.tensors:
        logits = torch.from_numpy(inputs.tensors["logits"])
        # K is a multiple of 64.
        rows = -(-logits.shape[1] // 64) * 64
        padded = torch.zeros(len(logits), rows)
        padded[:, : logits.shape[1]] = logits
        return padded.to(BF16), torch.eye(rows, logits.shape[1]).to(BF16)
    return bfloat16(inputs.tensors["hidden_states"]), bfloat16(inputs.tensors["W_gate"])


def only_prefill(found: ArtifactSet, *names: str) -> ArtifactSet:
    """The artifacts without prefill kernels, but for those named."""
    kernels = tuple(
        kernel
        for kernel in found.manifest.kernels
        if kernel.role != "prefill" or kernel.name in names
    )
    return replace(found, manifest=replace(found.manifest, kernels=kernels))


def call(
    found: ArtifactSet, kernel: Kernel, inputs: Inputs, layout: str, device: str
) -> dict[str, np.ndarray]:
    """The outputs of a router's call that takes this kernel: ids, weights, and logits if asked."""
    case = inputs.case
    x, w = (each.to(device) for each in factors(inputs))
    given, brought = {}, {}
    if kernel.role == "hash":
        given["tid2eid"] = torch.from_numpy(inputs.tensors["tid2eid"]).to(device)
        brought["input_ids"] = torch.from_numpy(inputs.tensors["input_ids"]).to(device)
    else:
        given["e_bias"] = torch.from_numpy(inputs.tensors["e_bias"]).to(device)
    weights = torch.empty(case.num_tokens, case.top_k, device=device)
    ids = torch.empty(case.num_tokens, case.top_k, dtype=torch.int32, device=device)
    outputs = {"ids": ids, "weights": weights}
    if "logits" in case.options:
        outputs["logits"] = torch.empty(case.num_tokens, case.num_experts, device=device)
        brought["out_logits"] = outputs["logits"]
    named = (kernel.name,) if kernel.role == "prefill" else ()
    router = Router(
        laid_out(w, layout),
        top_k=case.top_k,
        routed_scaling_factor=SCALE,
        artifacts=only_prefill(found, *named),
        same_bits=bool(named),
        **given,
    )
    if kernel.key not in router.kernels:
        raise LookupError(f"{kernel.key}: not among the kernels of the call: {router.kernels}")
    router(x, weights, ids, **brought)
    return {name: tensor.cpu().numpy() for name, tensor in outputs.items()}
