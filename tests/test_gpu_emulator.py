"""Compare the emulator with a GPU: the same PTX and integer inputs give the same bits.

This checks the emulator itself; its results for other architectures rest on it. The inputs are
integers, so that no order of summation can excuse a difference. The last bits of ex2.approx and
its like, which the ISA leaves open, are taken from the GPU.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest

torch = pytest.importorskip("torch", reason="torch is not installed")
np = pytest.importorskip("numpy", reason="needs the extra `verify`")

from gpu_calls import approximation  # noqa: E402

from build_kernels.emulator import Schedule  # noqa: E402
from build_kernels.evidence.artifact import load_artifact  # noqa: E402
from build_kernels.evidence.cases import Case  # noqa: E402
from build_kernels.evidence.inputs import SCALE, Inputs, make_inputs  # noqa: E402
from build_kernels.evidence.rungs import emulated  # noqa: E402
from build_kernels.specs import DECODE_TILES  # noqa: E402
from dsv4_router_runtime import Router  # noqa: E402
from dsv4_router_runtime.artifacts.folder import (  # noqa: E402
    ArtifactSet,
    find_artifacts,
    open_artifacts,
)
from dsv4_router_runtime.device.driver import arch_of_device  # noqa: E402

pytestmark = pytest.mark.gpu

SCHEDULE = Schedule(policy="random", seed=1)
TILES = sorted(DECODE_TILES)


APPROXIMATE = ("ex2", "rcp", "rsqrt")


def on_this_gpu(name: str) -> Callable[[np.ndarray], np.ndarray]:
    """Return `name`.approx.ftz.f32 as this GPU computes it."""
    compiled = approximation(name)

    def run(values: np.ndarray) -> np.ndarray:
        given = torch.from_numpy(np.ascontiguousarray(values, dtype=np.float32)).cuda()
        return compiled(given).cpu().numpy()

    return run


@pytest.fixture(scope="module")
def approximate() -> dict[str, Callable[[np.ndarray], np.ndarray]]:
    return {f"{name}.approx.ftz.f32": on_this_gpu(name) for name in APPROXIMATE}


def decode_case(num_tokens: int, num_experts: int, k: int, kind: str) -> Case:
    return Case(num_tokens=num_tokens, num_experts=num_experts, top_k=6, k=k, kind=kind)


# Ragged E, one and several expert tiles, K of one block and of four a CTA.
DECODE_CASES = [
    decode_case(num_tokens, num_experts, k, kind)
    for num_tokens, kind in ((1, "biased"), (6, "integers"), (7, "biased"), (16, "integers"))
    for num_experts, k in ((60, 1024), (132, 4096))
] + [
    decode_case(64, 60, 4096, "biased"),
    decode_case(64, 132, 1024, "integers"),
    decode_case(31, 256, 4096, "biased"),
    decode_case(3, 96, 1024, "extreme"),
]
# Of each kernel, by layout: two token tiles of few experts, or two expert tiles.
PREFILL_CASES = [
    ("n64", "kmajor", decode_case(65, 60, 1024, "biased")),
    ("n64", "emajor", decode_case(65, 136, 1024, "integers")),
    ("n64_k8", "emajor", decode_case(65, 56, 1024, "biased")),
    ("n64_k8", "kmajor", decode_case(70, 132, 2048, "biased")),
    ("n64_k4", "kmajor", decode_case(65, 60, 2048, "biased")),
    ("n64_k4", "emajor", decode_case(70, 136, 1024, "biased")),
    ("n128_k4", "emajor", decode_case(129, 56, 1024, "biased")),
    ("n128_k4", "kmajor", decode_case(100, 132, 2048, "biased")),
]
TOPK_CASES = [decode_case(70, num_experts, 1024, "biased") for num_experts in (60, 132, 256, 512)]


def only_prefill(*names: str) -> ArtifactSet:
    """The artifacts without prefill kernels, but for those named."""
    found = open_artifacts(find_artifacts())
    kernels = tuple(
        kernel
        for kernel in found.manifest.kernels
        if kernel.role != "prefill" or kernel.name in names
    )
    return replace(found, manifest=replace(found.manifest, kernels=kernels))


def on_gpu(inputs: Inputs, layout: str, *prefill: str) -> tuple[np.ndarray, np.ndarray]:
    """Weights and ids that the GPU gives for a case; of the prefill kernels only those named."""
    case = inputs.case

    def bfloat16(name: str) -> torch.Tensor:
        bits = torch.from_numpy(inputs.tensors[name].view(np.int16).copy())
        return bits.view(torch.bfloat16).cuda()

    hidden, weight = bfloat16("hidden_states"), bfloat16("W_gate")
    if layout == "kmajor":
        weight = weight.t().contiguous().t()
    bias = torch.from_numpy(inputs.tensors["e_bias"]).cuda()
    weights = torch.empty(case.num_tokens, case.top_k, dtype=torch.float32, device="cuda")
    ids = torch.empty(case.num_tokens, case.top_k, dtype=torch.int32, device="cuda")
    router = Router(
        *(weight, bias),
        top_k=case.top_k,
        routed_scaling_factor=SCALE,
        artifacts=only_prefill(*prefill),
        same_bits=bool(prefill),
    )
    assert set(prefill) <= {key.split(".")[0] for key in router.kernels}
    router(hidden, weights, ids)
    torch.cuda.synchronize()
    return weights.cpu().numpy(), ids.cpu().numpy()


def assert_same_bits(
    emulated_run: emulated.Emulation, weights: np.ndarray, ids: np.ndarray
) -> None:
    assert emulated_run.problems == ()
    np.testing.assert_array_equal(emulated_run.ids, ids)
    np.testing.assert_array_equal(emulated_run.weights.view(np.uint32), weights.view(np.uint32))


@pytest.mark.parametrize("layout", ["kmajor", "emajor"])
@pytest.mark.parametrize("case", DECODE_CASES, ids=str)
def test_decode_gives_the_bits_that_the_emulator_gives(
    case: Case, layout: str, approximate: dict
) -> None:
    tile = next(tile for tile in TILES if case.num_tokens <= tile)
    # E = 132: rows that TMA cannot step by, so the router multiplies a K-contiguous copy.
    built = "kmajor" if case.num_experts % 8 else layout
    arch = arch_of_device(0)
    artifact = load_artifact(find_artifacts(), f"router_decode_{built}_n{tile}.{arch}")
    inputs = make_inputs(artifact.kernel, case)
    emulation = emulated.run(
        artifact.kernel, artifact.ptx, inputs, SCHEDULE, approximate=approximate
    )
    assert_same_bits(emulation, *on_gpu(inputs, layout))


@pytest.mark.parametrize(("shape", "layout", "case"), PREFILL_CASES, ids=str)
def test_prefill_gives_the_bits_that_the_emulator_gives(
    shape: str, layout: str, case: Case, approximate: dict
) -> None:
    name = f"router_prefill_{layout}_{shape}"
    artifact = load_artifact(find_artifacts(), f"{name}.{arch_of_device(0)}")
    inputs = make_inputs(artifact.kernel, case)
    emulation = emulated.run(
        artifact.kernel, artifact.ptx, inputs, SCHEDULE, approximate=approximate
    )
    assert_same_bits(emulation, *on_gpu(inputs, layout, name))


@pytest.mark.parametrize("case", TOPK_CASES, ids=str)
def test_topk_gives_the_bits_that_the_emulator_gives(case: Case, approximate: dict) -> None:
    """Without prefill kernels: torch multiplies, exactly for integers, and router_topk selects."""
    arch = arch_of_device(0)
    decode = load_artifact(find_artifacts(), f"router_decode_kmajor_n64.{arch}")
    topk = load_artifact(find_artifacts(), f"router_topk.{arch}")
    inputs = make_inputs(decode.kernel, case)
    hidden, weight = (
        torch.from_numpy(inputs.tensors[name].view(np.int16).copy()).view(torch.bfloat16).double()
        for name in ("hidden_states", "W_gate")
    )
    logits = (hidden @ weight).float().numpy()
    given = replace(inputs, tensors={"logits": logits, "e_bias": inputs.tensors["e_bias"]})
    emulation = emulated.run(topk.kernel, topk.ptx, given, SCHEDULE, approximate=approximate)
    assert_same_bits(emulation, *on_gpu(inputs, "kmajor"))
