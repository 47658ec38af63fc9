"""The emulator against a GPU on inputs whose sums are rounded: the same bits of every output.

Every kernel of the GPU's architecture gets gaussian factors, factors of 24 binades, ones that
cancel, and NaN and infinity, in several sizes. `test_gpu_emulator.py` has the integers, and says
what is taken from the GPU.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import pytest

torch = pytest.importorskip("torch", reason="torch is not installed")
np = pytest.importorskip("numpy", reason="needs the extra `verify`")

from gpu_calls import BF16, laid_out  # noqa: E402
from test_gpu_emulator import SCHEDULE, approximate, only_prefill  # noqa: E402, F401

from build_kernels.evidence.artifact import load_artifact  # noqa: E402
from build_kernels.evidence.cases import Case  # noqa: E402
from build_kernels.evidence.inputs import SCALE, Inputs, make_inputs  # noqa: E402
from build_kernels.evidence.rungs import emulated  # noqa: E402
from build_kernels.specs import KERNELS, KernelSpec  # noqa: E402
from dsv4_router_runtime import Router  # noqa: E402
from dsv4_router_runtime.artifacts.folder import find_artifacts  # noqa: E402
from dsv4_router_runtime.device.driver import arch_of_device  # noqa: E402

pytestmark = pytest.mark.gpu

TOP_K = 6


@dataclass(frozen=True)
class Outputs:
    """What a call wrote: weights, ids, and logits if the kernel stores any."""

    weights: np.ndarray
    ids: np.ndarray
    logits: np.ndarray | None


def binades(random, low: int, high: int, *shape):
    return torch.exp2(torch.randint(low, high + 1, shape, generator=random))


def gaussian(random, n, k, e):
    """Logits of standard deviation 2."""
    return torch.randn(n, k, generator=random), torch.randn(k, e, generator=random) * 2 / k**0.5


def wide_range(random, n, k, e):
    """24 binades of each factor."""
    x, w = torch.randn(n, k, generator=random), torch.randn(k, e, generator=random)
    return x * binades(random, -12, 12, n, k), w * binades(random, -18, 6, k, e)


def cancelling(random, n, k, e):
    """Neighbours cancel to the last bit of W_gate."""
    x, w = torch.randn(n, k, generator=random), torch.randn(k, e, generator=random)
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


DRAWS = (gaussian, wide_range, cancelling, not_finite)


def sizes_of(spec: KernelSpec) -> list[tuple[int, int, int]]:
    """(N, E, K): at the ends of the kernel's token tile, of one expert tile and of several, of K
    that the slices share evenly and of K that they do not."""
    tile = spec.token_tile
    if spec.role == "decode":
        below = {8: 1, 32: 9, 64: 33}[tile]
        return [(below, 40, 1024), (tile, 136, 1088), (tile - 1, 200, 1024), (below + 2, 264, 2112)]
    if spec.role == "prefill":
        return [(65, 40, 1024), (tile + 1, 136, 1088), (66, 264, 1024), (tile, 64, 2112)]
    if spec.role == "hash":
        return [(1, 40, 1024), (7, 136, 1088), (8, 384, 4096), (33, 200, 2112)]
    return [(70, 40, 0), (65, 136, 0), (130, 264, 0), (80, 512, 0)]


def case_inputs(kernel, draw, num_tokens: int, num_experts: int, k: int, random) -> Inputs:
    """A case's inputs with factors, or logits, of `draw`; the reference's outputs are stale."""
    logits = ("logits",) if kernel.role in ("decode", "prefill") else ()
    case = Case(num_tokens=num_tokens, num_experts=num_experts, top_k=TOP_K, k=k, options=logits)
    inputs = make_inputs(kernel, case)
    if kernel.role == "select":
        # As BF16, so that a product with the identity has them as they are.
        drawn = draw(random, num_tokens, num_experts, num_experts)[0].to(BF16).float()
        # As the product has them: NaN times 0 is NaN in every column.
        drawn[~drawn.isfinite().all(1)] = math.nan
        return replace(inputs, tensors={**inputs.tensors, "logits": drawn.numpy()})
    x, w = (each.to(BF16) for each in draw(random, num_tokens, k, num_experts))
    tensors = {**inputs.tensors, "hidden_states": bits(x), "W_gate": bits(w)}
    return replace(inputs, tensors=tensors)


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


def on_gpu(kernel, inputs: Inputs) -> Outputs:
    """The outputs of the GPU's call that takes this kernel."""
    case = inputs.case
    x, w = (each.cuda() for each in factors(inputs))
    layer, call = {}, {}
    if kernel.role == "hash":
        layer["tid2eid"] = torch.from_numpy(inputs.tensors["tid2eid"]).cuda()
        call["input_ids"] = torch.from_numpy(inputs.tensors["input_ids"]).cuda()
    else:
        layer["e_bias"] = torch.from_numpy(inputs.tensors["e_bias"]).cuda()
    weights = torch.empty(case.num_tokens, TOP_K, device="cuda")
    ids = torch.empty(case.num_tokens, TOP_K, dtype=torch.int32, device="cuda")
    if "logits" in case.options:
        call["out_logits"] = torch.empty(case.num_tokens, case.num_experts, device="cuda")
    named = (kernel.name,) if kernel.role == "prefill" else ()
    router = Router(
        laid_out(w, kernel.problem.layout or "kmajor"),
        top_k=TOP_K,
        routed_scaling_factor=SCALE,
        artifacts=only_prefill(*named),
        same_bits=bool(named),
        **layer,
    )
    assert any(key.startswith(f"{kernel.name}.") for key in router.kernels)
    router(x, weights, ids, **call)
    torch.cuda.synchronize()
    logits = call["out_logits"].cpu().numpy() if "out_logits" in call else None
    return Outputs(weights.cpu().numpy(), ids.cpu().numpy(), logits)


@pytest.mark.parametrize("draw", DRAWS, ids=lambda draw: draw.__name__)
@pytest.mark.parametrize("size", range(4))
@pytest.mark.parametrize("spec", KERNELS, ids=lambda spec: spec.name)
def test_emulator_and_gpu_give_the_same_bits(spec, size, draw, seed, approximate):  # noqa: F811
    artifact = load_artifact(find_artifacts(), f"{spec.name}.{arch_of_device(0)}")
    random = torch.Generator().manual_seed(seed)
    inputs = case_inputs(artifact.kernel, draw, *sizes_of(spec)[size], random)
    got = on_gpu(artifact.kernel, inputs)
    result = emulated.emulate_case(
        artifact.kernel, artifact.ptx, inputs, SCHEDULE, approximate=approximate
    )
    assert [str(finding) for finding in result.findings] == []
    memory, case = result.memory, inputs.case
    np.testing.assert_array_equal(memory["out_ids"][:, :TOP_K], got.ids)
    assert_bits(memory["out_weights"][:, :TOP_K], got.weights)
    if got.logits is not None:
        assert_bits(memory["out_logits"][:, : case.num_experts], got.logits)


def assert_bits(emulated_values: np.ndarray, gpu_values: np.ndarray) -> None:
    """Equal bits, any NaN alike."""
    pairs = [
        np.where(np.isnan(each), 0x7FC00000, np.ascontiguousarray(each).view(np.uint32))
        for each in (emulated_values, gpu_values)
    ]
    np.testing.assert_array_equal(*pairs)
