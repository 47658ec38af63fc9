"""A GPU's recording, without the GPU: the exact oracle and the emulator give the same bits.

`--bits FILE` names a file of `test_gpu_recording.py`; the emulator then repeats every case of it.
Without it the recording is h200_bits.json, and the emulator repeats one case of each kernel.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

pytest.importorskip("elftools", reason="needs dsv4-router-builder")
pytest.importorskip("numpy", reason="needs the extra `verify`")
torch = pytest.importorskip("torch", reason="the cases need the extra `torch`")

import numpy as np  # noqa: E402
from bit_recording import Recording, differences, read_recording  # noqa: E402
from builds import topk_set  # noqa: E402
from conftest import sample_manifest  # noqa: E402
from recorded_cases import DRAWS, RECORDED, call, factors  # noqa: E402

from build_kernels.emulator import Schedule  # noqa: E402
from build_kernels.evidence.artifact import load_artifact  # noqa: E402
from build_kernels.evidence.inputs import SCALE  # noqa: E402
from build_kernels.evidence.outputs import against_reference, scratch_not_zero  # noqa: E402
from build_kernels.evidence.rungs import emulated  # noqa: E402
from build_kernels.specs import KERNELS  # noqa: E402
from dsv4_router_runtime.artifacts.folder import find_artifacts  # noqa: E402
from dsv4_router_runtime.exact import exact_logits, exact_selection  # noqa: E402

MACHINE = {"gpu": "none", "arch": "sm_90a", "torch": torch.__version__}
SAMPLE_FIRST = sorted(RECORDED, key=lambda each: RECORDED.index(each) % 7 != 0)
H200 = Path(__file__).with_name("h200_bits.json")
FIRST = {each.kernel: each for each in reversed(RECORDED)}


@pytest.fixture(scope="session")
def recording(request):
    return read_recording(request.config.getoption("--bits") or H200)


def recorded_artifact(recorded, recording):
    """The kernel of a recorded case; the test is skipped if the recording is of another PTX."""
    if str(recorded) not in recording.outputs:
        pytest.skip("the recording has no such case")
    artifact = load_artifact(find_artifacts(), f"{recorded.kernel}.{recording.machine['arch']}")
    if artifact.ptx_sha256 != recording.kernels[recorded.kernel]:
        pytest.skip(f"{recorded.kernel}: recorded with another PTX")
    return artifact


def exact_outputs(artifact, inputs) -> dict[str, np.ndarray]:
    """The outputs of the exact oracle."""
    tensors = inputs.tensors
    if "logits" in tensors:
        logits = torch.from_numpy(tensors["logits"])
    else:
        logits = exact_logits(*factors(inputs))
    bias, options = None, {}
    if artifact.kernel.role == "hash":
        options = {name: torch.from_numpy(tensors[name]) for name in ("tid2eid", "input_ids")}
    else:
        bias = torch.from_numpy(tensors["e_bias"])
    weights, ids = exact_selection(logits, bias, SCALE, inputs.case.top_k, **options)
    outputs = {"weights": weights.numpy(), "ids": ids.to(torch.int32).numpy()}
    if "logits" in inputs.case.options:
        outputs["logits"] = logits.numpy()
    return outputs


def repeated(artifact, recorded, inputs) -> dict[str, np.ndarray]:
    """The outputs of the emulator, which takes nothing from a GPU."""
    schedule = Schedule(policy="random", seed=1)
    result = emulated.emulate_case(artifact.kernel, artifact.ptx, inputs, schedule)
    assert [str(finding) for finding in result.findings] == []
    assert scratch_not_zero(artifact.kernel, result.memory) == []
    if not recorded.draw:
        wrong, _ = against_reference(inputs, result.memory)
        assert wrong == []
    columns = {"ids": inputs.case.top_k, "weights": inputs.case.top_k}
    if "logits" in inputs.case.options:
        columns["logits"] = inputs.case.num_experts
    return {name: result.memory[f"out_{name}"][:, :end] for name, end in columns.items()}


def given(inputs) -> dict:
    return {**inputs.tensors, **inputs.numbers}


@pytest.mark.slow
@pytest.mark.parametrize("recorded", RECORDED, ids=str)
def test_the_emulator_gives_the_bits_of_the_gpu(recorded, recording, pytestconfig):
    if recorded is not FIRST[recorded.kernel] and not pytestconfig.getoption("--bits"):
        pytest.skip("one case of each kernel is repeated without --bits")
    artifact = recorded_artifact(recorded, recording)
    inputs = recorded.inputs(artifact.kernel)
    outputs = repeated(artifact, recorded, inputs)
    assert differences(recording, str(recorded), given(inputs), outputs) == []


@pytest.mark.quick(6)
@pytest.mark.parametrize("recorded", SAMPLE_FIRST, ids=str)
def test_the_exact_oracle_gives_the_bits_of_the_gpu(recorded, recording):
    artifact = recorded_artifact(recorded, recording)
    inputs = recorded.inputs(artifact.kernel)
    outputs = exact_outputs(artifact, inputs)
    assert differences(recording, str(recorded), given(inputs), outputs) == []


# ------------------------------------------------------------------ the recording itself


@pytest.fixture(scope="module")
def case():
    return next(each for each in RECORDED if each.kernel == "router_topk" and each.draw)


@pytest.fixture(scope="module")
def made(case, tmp_path_factory):
    """A recording of one case, by the emulator; its inputs and its outputs."""
    folder = topk_set(tmp_path_factory.mktemp("recorded") / "artifacts", ["sm_90a"])
    artifact = load_artifact(folder, "router_topk.sm_90a")
    inputs = case.inputs(artifact.kernel)
    outputs = repeated(artifact, case, inputs)
    recording = Recording(machine=MACHINE, kernels={"router_topk": artifact.ptx_sha256})
    recording.add(str(case), given(inputs), outputs)
    return recording, given(inputs), outputs


@pytest.mark.parametrize("suffix", ["json", "npz"])
def test_a_recording_is_read_as_it_was_written(made, case, tmp_path, suffix):
    recording, inputs, outputs = made
    path = tmp_path / f"h200.{suffix}"
    recording.write(path)
    read = read_recording(path)
    assert replace(read, arrays={}) == replace(recording, arrays={})
    assert set(read.arrays) == (set() if suffix == "json" else {str(case)})
    assert differences(read, str(case), inputs, outputs) == []


def test_one_bit_of_one_output_is_a_difference(made, case):
    recording, inputs, outputs = made
    weights = outputs["weights"].copy()
    weights[3, 1] = np.nextafter(weights[3, 1], np.float32(9))
    (line,) = differences(recording, str(case), inputs, {**outputs, "weights": weights})
    assert line.startswith("weights: other bits in 1 of ")
    assert "first (3, 1)" in line
    without = replace(recording, arrays={})
    changed = {**outputs, "weights": weights}
    assert differences(without, str(case), inputs, changed) == ["weights: other bits"]


def test_an_output_that_is_not_given_is_a_difference(made, case):
    recording, inputs, outputs = made
    ids = {"ids": outputs["ids"]}
    assert differences(recording, str(case), inputs, ids) == ["weights: recorded and not given"]


def test_other_inputs_are_named_before_their_outputs(made, case):
    recording, inputs, outputs = made
    other = {**inputs, "e_bias": inputs["e_bias"] + 1}
    (line,) = differences(recording, str(case), other, outputs)
    assert line.startswith("inputs: not those of the recording")


def test_the_pattern_of_a_nan_is_no_difference(made, case):
    _, inputs, outputs = made
    weights = outputs["weights"].copy()
    weights[0, 0] = np.nan
    noted = Recording(machine=MACHINE)
    noted.add(str(case), inputs, {"weights": weights})
    weights.view(np.uint32)[0, 0] = 0x7FFFFFFF
    assert differences(noted, str(case), inputs, {"weights": weights}) == []


def test_names_of_cases_are_unique_and_every_kernel_and_draw_has_some():
    assert len({str(each) for each in RECORDED}) == len(RECORDED)
    assert {each.kernel for each in RECORDED} == {spec.name for spec in KERNELS}
    assert {each.draw for each in RECORDED} == {*DRAWS, ""}


@pytest.mark.quick(6)
@pytest.mark.parametrize("recorded", SAMPLE_FIRST, ids=str)
def test_a_call_takes_the_kernel_of_its_case(recorded, gpu, artifacts):
    key = f"{recorded.kernel}.sm_90a"
    (kernel,) = (each for each in sample_manifest().kernels if each.key == key)
    call(artifacts, kernel, recorded.inputs(kernel), recorded.layout, "cpu")
    assert key in [launch["kernel"] for launch in gpu.launches]
