"""A kernel of each role in the emulator, with approximate instructions moved to their ends.

Its outputs stay as they are, so the emulator's own choice gives the bits of every GPU.
`test_approximations.py` has all seeds, and three arguments for which this does not hold;
`test_approximations_sass.py` shows that no architecture has their seeds.
"""

from __future__ import annotations

import re
from dataclasses import replace

import pytest

pytest.importorskip("elftools", reason="needs dsv4-router-builder")
pytest.importorskip("numpy", reason="needs the extra `verify`")
pytest.importorskip("torch", reason="the cases need the extra `torch`")

import numpy as np
from builds import kernel_set
from test_approximations import RECIPROCAL_EXCEPTIONS, ROOT_EXCEPTIONS

from build_kernels.emulator import Schedule
from build_kernels.emulator.numerics.approximations import BANDS, at_the_ends
from build_kernels.evidence.artifact import load_artifact
from build_kernels.evidence.cases import Case
from build_kernels.evidence.inputs import SCALE, make_inputs
from build_kernels.evidence.rungs import emulated

ARCH = "sm_90a"
OPTIONS = ("temperature",)
# Keys as near as FP32 has them: a score that is two units off changes ids.
CASES = {
    "router_topk": Case(num_tokens=9, num_experts=132, top_k=6, kind="near", options=OPTIONS),
    "router_hash": Case(
        num_tokens=7, num_experts=136, top_k=6, k=1024, kind="dense", options=OPTIONS
    ),
    "router_decode_kmajor_n8": Case(
        num_tokens=7, num_experts=132, top_k=6, k=1088, kind="near", options=OPTIONS
    ),
    "router_prefill_kmajor_n64": Case(
        num_tokens=65, num_experts=60, top_k=6, k=1024, kind="near", options=OPTIONS
    ),
}
RSQRT, RCP = "rsqrt.approx.ftz.f32", "rcp.approx.ftz.f32"


@pytest.fixture(scope="module")
def artifacts(tmp_path_factory):
    return kernel_set(tmp_path_factory.mktemp("ends") / "artifacts", list(CASES), [ARCH])


def outputs(artifact, inputs, approximate=None) -> dict[str, np.ndarray]:
    schedule = Schedule(policy="random", seed=1)
    given = {"approximate": approximate}
    result = emulated.emulate_case(artifact.kernel, artifact.ptx, inputs, schedule, **given)
    assert [str(finding) for finding in result.findings] == []
    return {
        name: np.ascontiguousarray(values).view(np.uint32)
        for name, values in result.memory.items()
        if name.startswith("out_")
    }


def of_kernel(artifacts, name):
    artifact = load_artifact(artifacts, f"{name}.{ARCH}")
    return artifact, make_inputs(artifact.kernel, CASES[name])


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
def test_outputs_do_not_change_at_the_ends_of_the_bands(artifacts, name, seed):
    artifact, inputs = of_kernel(artifacts, name)
    expected = outputs(artifact, inputs)
    assert expected.keys() >= {"out_weights", "out_ids"}
    moved = outputs(artifact, inputs, at_the_ends(np.random.default_rng(seed)))
    for output, bits in expected.items():
        np.testing.assert_array_equal(moved[output], bits)


@pytest.mark.slow
@pytest.mark.parametrize(("name", "opcode"), [("router_topk", RSQRT), ("router_hash", RCP)])
def test_outputs_change_far_beyond_the_bands(artifacts, name, opcode):
    artifact, inputs = of_kernel(artifacts, name)

    def beyond(values):
        return BANDS[opcode].nearest(values) * np.float32(1 + 2**-4)

    moved = outputs(artifact, inputs, {opcode: beyond})
    assert (moved["out_weights"] != outputs(artifact, inputs)["out_weights"]).any()


@pytest.mark.parametrize("name", CASES)
def test_every_approximate_instruction_has_a_band(artifacts, name):
    text = load_artifact(artifacts, f"{name}.{ARCH}").ptx
    found = set(re.findall(r"^\s*(?:@\S+\s+)?(\S+\.(?:approx|full)\.\S*)\s", text, re.MULTILINE))
    assert found
    assert found <= BANDS.keys()


@pytest.mark.quick(1)
@pytest.mark.parametrize(("argument", "seed"), sorted(ROOT_EXCEPTIONS))
def test_two_roots_of_a_kernel_depend_on_the_seed(artifacts, argument, seed):
    """Logits 4^4 times the arguments of `ROOT_EXCEPTIONS`: exp(-x) is 0, and z is the logit."""
    artifact = load_artifact(artifacts, f"router_topk.{ARCH}")
    case = Case(num_tokens=1, num_experts=4, top_k=1, options=("unnormed",))
    inputs = make_inputs(artifact.kernel, case)
    logits = np.zeros((1, 4), np.float32)
    logits[0, 2] = z = np.uint32(argument).view(np.float32) * 2**8
    tensors = {"logits": logits, "e_bias": np.zeros(4, np.float32)}
    given = np.uint32(seed).view(np.float32) / 2**4

    def rsqrt(values):
        return np.where(values == z, given, BANDS[RSQRT].nearest(values))

    weight, other = (
        outputs(artifact, replace(inputs, tensors=tensors), approximate)["out_weights"][0, 0]
        for approximate in (None, {RSQRT: rsqrt})
    )
    root = np.sqrt(z.astype(np.float64)).astype(np.float32)
    below = np.nextafter(root, np.float32(0))
    assert [weight, other] == [(each * np.float32(SCALE)).view(np.uint32) for each in (root, below)]


@pytest.mark.slow
def test_one_quotient_of_a_kernel_depends_on_the_seed(artifacts):
    """Logits of 256, divided by 2 - 2^-23: exp(-x) is 0, and the score is the root of x."""
    artifact = load_artifact(artifacts, f"router_hash.{ARCH}")
    case = Case(num_tokens=1, num_experts=40, top_k=1, k=64, options=("unnormed", "temperature"))
    inputs = make_inputs(artifact.kernel, case)
    ((argument, seed),) = RECIPROCAL_EXCEPTIONS
    divisor = np.uint32(argument).view(np.float32)
    hidden, weight = (np.zeros_like(inputs.tensors[name]) for name in ("hidden_states", "W_gate"))
    hidden[:, 0], weight[0] = 0x3F80, 0x4380  # 1 and 256
    tensors = {**inputs.tensors, "hidden_states": hidden, "W_gate": weight}
    given = replace(inputs, tensors=tensors, numbers={**inputs.numbers, "gate_temp": divisor})

    def rcp(values):
        return np.where(
            values == divisor, np.uint32(seed).view(np.float32), BANDS[RCP].nearest(values)
        )

    weight, other = (
        outputs(artifact, given, approximate)["out_weights"][0, 0]
        for approximate in (None, {RCP: rcp})
    )
    quotient = np.float32(256 / np.float64(divisor))
    below = np.nextafter(quotient, np.float32(0))
    roots = (np.float32(np.sqrt(np.float64(each))) for each in (quotient, below))
    expected = [(root * np.float32(SCALE)).view(np.uint32) for root in roots]
    assert [weight, other] == expected
    assert weight != other
