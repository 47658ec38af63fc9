"""router_topk's estimates of the keys: how close they are, and what they may not leave out."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

pytest.importorskip("elftools", reason="needs dsv4-router-builder")
np = pytest.importorskip("numpy", reason="needs the extra `verify`")
pytest.importorskip("torch", reason="the oracle needs the extra `torch`")

from builds import topk_set  # noqa: E402
from test_topk_emulated import SPEC, Options, check, ptx  # noqa: E402, F401

from build_kernels.building import compilers  # noqa: E402
from build_kernels.emulator import Schedule  # noqa: E402
from build_kernels.emulator.numerics import floats  # noqa: E402
from build_kernels.emulator.numerics.approximations import BANDS  # noqa: E402
from build_kernels.evidence.artifact import load_artifact  # noqa: E402
from build_kernels.evidence.cases import Case  # noqa: E402
from build_kernels.evidence.inputs import make_inputs  # noqa: E402
from build_kernels.evidence.rungs import emulated  # noqa: E402
from build_kernels.specs import ARCHITECTURES  # noqa: E402

SOURCE = Path(compilers.__file__).parents[1] / SPEC.source.file
TEXT = SOURCE.read_text()
F32 = np.float32


def constant(name: str) -> float:
    """Return a number of the kernel's source."""
    (text,) = re.findall(rf"\b{name} = ([-+.\dxp]+)f", TEXT)
    return float.fromhex(text) if "x" in text else float(text)


ALLOWANCE, LARGEST = constant("kAllowance"), constant("kLargest")
LOG2_E = F32(constant("log2_e"))
(ROOT_OF_LN2,) = map(F32, re.findall(r"fmaf\(root, ([.\d]+)f", TEXT))


def estimates(logits, bias, gate_temp: float):
    """The least and the greatest estimate of each key that the ISA allows."""
    y = logits * (LOG2_E if gate_temp == 1 else LOG2_E / F32(gate_temp))
    low = high = None
    for power in BANDS["ex2.approx.ftz.f32"].ends(y):
        for log2 in BANDS["lg2.approx.ftz.f32"].ends(power + F32(1)):
            for root in BANDS["sqrt.approx.ftz.f32"].ends(np.abs(log2)):
                estimate = floats.fma32(root, np.full_like(root, ROOT_OF_LN2), bias, "rn")
                low = estimate if low is None else np.minimum(low, estimate)
                high = estimate if high is None else np.maximum(high, estimate)
    return y, low, high


def keys(logits, bias, gate_temp: float):
    x = logits.astype(np.float64) / F32(gate_temp)
    return np.sqrt(np.logaddexp(0, x)) + bias


@pytest.mark.parametrize("gate_temp", [1.0, 0.37, 1e-30, 2.0**120])
@pytest.mark.parametrize("widest", [0.0, 0.1, LARGEST])
def test_an_estimate_is_within_the_allowance(gate_temp: float, widest: float) -> None:
    random = np.random.default_rng(5)
    # Most of them where the logarithm is near 0, which has the largest error.
    y = np.concatenate([random.uniform(-1, 1, 40_000) * LARGEST, random.uniform(-30, 0, 80_000)])
    logits = (y * gate_temp / LOG2_E).astype(F32)
    bias = random.uniform(-widest, widest, len(y)).astype(F32)
    y, low, high = estimates(logits, bias, gate_temp)
    inside = np.abs(y) <= LARGEST
    assert inside.sum() > 100_000
    exact = keys(logits, bias, gate_temp)
    error = np.maximum(np.abs(low - exact), np.abs(high - exact))[inside].max()
    # The key itself and the sums with twice kLargest round to 2^-17.
    assert error + 3 * 2**-17 < ALLOWANCE


def test_the_allowance_is_needed() -> None:
    """Or the test above compared nothing: some estimates are off by a third of it."""
    logits = np.linspace(-20, -10, 100_000, dtype=F32)
    bias = np.zeros_like(logits)
    _, low, high = estimates(logits, bias, 1.0)
    exact = keys(logits, bias, 1.0)
    assert np.maximum(np.abs(low - exact), np.abs(high - exact)).max() > ALLOWANCE / 3


@pytest.mark.quick(1)
@pytest.mark.parametrize("arch", [arch.name for arch in ARCHITECTURES][:2])
def test_a_logit_out_of_range_leaves_no_expert_out(ptx: dict[str, str], arch: str) -> None:  # noqa: F811
    """2^(100 log2 e) overflows, so the estimate is infinite and says nothing of lower logits."""
    random = np.random.default_rng(3)
    logits = random.choice(np.array([60, 64, 100, 120], F32), (6, 132))
    bias = np.where(logits[0] < 99, 5, 0).astype(F32) + random.permutation(132).astype(F32) / 64
    check(ptx, arch, logits, bias, 6)


@pytest.mark.parametrize("worst", [-np.inf, np.nan, -3e38])
def test_experts_of_the_worst_bias_are_chosen_if_no_others_are_left(
    ptx: dict[str, str],  # noqa: F811
    worst: float,
) -> None:
    random = np.random.default_rng(4)
    logits = random.integers(-8, 8, (4, 40)).astype(F32)
    bias = np.full(40, worst, F32)
    bias[[3, 17, 33, 35]] = [1, 1, 2, 0]
    check(ptx, "sm_90a", logits, bias, 8)


def test_a_small_and_a_large_gate_temp(ptx: dict[str, str]) -> None:  # noqa: F811
    random = np.random.default_rng(6)
    for gate_temp in (2.0**-126, 2.0**126):
        logits = (random.integers(-3, 4, (3, 70)) * gate_temp).astype(F32)
        check(ptx, "sm_90a", logits, np.zeros(70, F32), 6, Options(gate_temp=gate_temp))


@pytest.mark.parametrize("num_experts", [25, 32, 49, 384])
def test_more_candidates_than_a_batch(ptx: dict[str, str], num_experts: int) -> None:  # noqa: F811
    """A batch has 24. Keys closer than the allowance, so that all experts are candidates."""
    random = np.random.default_rng(num_experts)
    logits = 1 + random.permutation(num_experts).astype(F32)[None] * F32(2**-20)
    check(ptx, "sm_90a", logits, np.zeros(num_experts, F32), 8)


E = 60
TEARS = {
    "NaN": {"logits": dict.fromkeys(range(E), np.nan)},
    "equal": {"logits": dict.fromkeys(range(E), 1.0)},
    "the other way round": {"logits": {i: float(i % 7) - 3 for i in range(E)}},
    "infinite": {"logits": dict.fromkeys(range(E), np.inf)},
    "bias": {"e_bias": dict.fromkeys(range(E), -np.inf)},
}


@pytest.mark.quick(1)
@pytest.mark.parametrize("name", TEARS)
def test_logits_that_change_between_an_estimate_and_a_score_give_experts(tmp_path, name) -> None:
    """Before every load, those of the first row or the biases; the other row is right."""
    artifact = load_artifact(topk_set(tmp_path / "artifacts", ["sm_90a"]), f"{SPEC.name}.sm_90a")
    inputs = make_inputs(artifact.kernel, Case(num_tokens=2, num_experts=E, top_k=6, kind="biased"))

    def run(moment: int):
        loads = []

        def on_load(array, offsets, depends):
            loads.append(array)
            return TEARS[name] if len(loads) == moment else {}

        schedule = Schedule(policy="random", seed=1)
        result = emulated.emulate_case(
            artifact.kernel, artifact.ptx, inputs, schedule, on_load=on_load
        )
        assert result.findings == ()
        return result.memory, len(loads)

    untorn, num_loads = run(0)
    assert num_loads > 8
    for moment in range(1, num_loads + 1):
        memory, _ = run(moment)
        weights, ids = memory["out_weights"][:, :6], memory["out_ids"][:, :6]
        assert np.isfinite(weights).all()
        for row in ids:
            assert len(set(row)) == 6
            assert set(row) <= set(range(E))
        if "logits" in TEARS[name]:
            assert (ids[1] == untorn["out_ids"][1, :6]).all()
            assert (weights[1] == untorn["out_weights"][1, :6]).all()
