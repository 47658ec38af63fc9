"""Errors and values outlive a process boundary, and an error names the command that repairs it."""

from __future__ import annotations

import copy
import json
import multiprocessing
import pickle
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from pathlib import Path

import pytest
from watchdog import ends_within

import dsv4_router_runtime
from build_kernels.evidence.artifact import ArtifactReadError
from build_kernels.evidence.document import EvidenceError
from build_kernels.evidence.result import Result
from build_kernels.evidence.rungs.hardware import Record
from build_kernels.evidence.store import Evidence
from dsv4_router_runtime import errors
from dsv4_router_runtime.artifacts.dispatch import LayerProblem, Problem, plan_layer, resolve
from dsv4_router_runtime.artifacts.folder import MANIFEST_NAME, ArtifactSet, open_artifacts
from dsv4_router_runtime.artifacts.manifest import parse_manifest, serialise_manifest
from dsv4_router_runtime.device.tensor_map import hidden_states_arguments

PROTOCOLS = range(pickle.HIGHEST_PROTOCOL + 1)
WAYS = [
    *(
        pytest.param(lambda value, p=p: pickle.loads(pickle.dumps(value, p)), id=f"pickle {p}")
        for p in PROTOCOLS
    ),
    pytest.param(copy.copy, id="copy"),
    pytest.param(copy.deepcopy, id="deepcopy"),
]


class HouseError(errors.ArtifactError):
    """A caller's own subclass, with a constructor of its own."""

    def __init__(self, tenant: str) -> None:
        super().__init__(file=f"/models/{tenant}", problem="is not there")
        self.tenant = tenant


MADE = [
    errors.RouterError("a message"),
    errors.ManifestError(source="a/manifest.json", path="kernels[1]", problem="missing"),
    errors.ArtifactError(file="a/b.cubin", problem="missing"),
    errors.ArtifactError(file="a/b.txt", problem="surplus", next_step="move it away"),
    errors.NoKernelError("no kernel\n  one\n  two"),
    errors.DriverError("launching x: the CUDA driver answered y", code="y"),
    errors.DriverMissingError("no CUDA driver"),
    errors.DriverTooOldError("the CUDA driver has no x"),
    HouseError("seven"),
    EvidenceError("evidence.json: not valid JSON"),
    ArtifactReadError("no kernel x"),
]


def test_every_public_error_is_tried():
    public = {
        getattr(errors, name) for name in dsv4_router_runtime.__all__ if name.endswith("Error")
    }
    assert public <= {type(error) for error in MADE}


@pytest.mark.parametrize("survive", WAYS)
@pytest.mark.parametrize("error", MADE, ids=lambda error: type(error).__name__)
def test_an_error_comes_back_whole(error, survive):
    try:
        raise error from OSError(5, "Input/output error", "a/b.cubin")
    except Exception as raised:
        raised.where = "worker 3"
        back = survive(raised)
    assert type(back) is type(error)
    assert (str(back), back.args, vars(back)) == (str(error), error.args, vars(error))
    if isinstance(error, errors.RouterError):
        assert (type(back.__cause__), str(back.__cause__)) == (OSError, str(error.__cause__))
        assert back.__suppress_context__


def test_an_error_without_a_cause_gets_none():
    back = pickle.loads(pickle.dumps(errors.ArtifactError(file="a", problem="b")))
    assert back.__cause__ is None
    assert not back.__suppress_context__


def test_an_error_that_is_its_own_cause_is_no_endless_loop():
    error = errors.RouterError("round")
    error.__cause__ = error
    with ends_within(5):
        back = pickle.loads(pickle.dumps(error))
    assert back.__cause__ is back


def fail_in_a_worker(folder: str) -> None:
    open_artifacts(folder)


def fail_to_parse_in_a_worker(text: str) -> None:
    parse_manifest(text)


def asked_of_an_executor(work, argument):
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as executor:
        return executor.submit(work, argument).result(timeout=50)


def asked_of_a_pool(work, argument):
    with multiprocessing.get_context("spawn").Pool(1) as workers:
        return workers.map_async(work, [argument]).get(timeout=50)


@pytest.mark.quick(1)
@pytest.mark.parametrize("pool", ["executor", "multiprocessing"])
def test_a_spawned_workers_error_reaches_its_parent_whole(pool, tmp_path):
    missing = str(tmp_path / "nowhere")
    with pytest.raises(errors.ArtifactError) as expected:
        open_artifacts(missing)
    ask = asked_of_an_executor if pool == "executor" else asked_of_a_pool
    with ends_within(60), pytest.raises(errors.ArtifactError) as caught:
        ask(fail_in_a_worker, missing)
    assert str(caught.value) == str(expected.value)
    assert vars(caught.value) == vars(expected.value)
    assert caught.value.file == f"{missing}/manifest.json"


def test_a_worker_that_failed_goes_on_working():
    context = multiprocessing.get_context("spawn")
    with ends_within(60), ProcessPoolExecutor(1, mp_context=context) as executor:
        for _ in range(2):
            failed = executor.submit(fail_to_parse_in_a_worker, "{").exception(timeout=50)
            assert isinstance(failed, errors.ManifestError)
            assert failed.path == "$"


@pytest.fixture
def values(manifest, write_artifacts):
    opened = open_artifacts(write_artifacts(manifest))
    layer = LayerProblem(
        layout="kmajor", tma_loadable=True, hashed=False, num_experts=384, top_k=6, k=7168
    )
    problem = Problem(
        role="decode",
        layout="kmajor",
        num_tokens=1,
        num_experts=384,
        top_k=6,
        k=7168,
        dtypes={"out_ids": ("int32",)},
    )
    recipe = opened.manifest.kernels[0].parameters[1].tensor_map
    return [
        opened,
        opened.manifest,
        opened.manifest.kernels[0],
        problem,
        resolve(opened.manifest, problem, "sm_90a"),
        plan_layer(opened.manifest, layer, "sm_90a"),
        hidden_states_arguments(recipe, address=256, num_tokens=3, k=512, row_stride=512),
        Evidence().with_result(manifest.kernels[0], "lint", Result(status="passed")),
        Record(
            **dict.fromkeys(("artifact", "cubin_sha256", "ptx_sha256", "gpu", "arch"), "x"),
            driver="580",
            date="2026-01-31",
            cases={"test_a": 1},
        ),
    ]


@pytest.mark.parametrize("survive", WAYS)
def test_a_value_comes_back_equal(values, survive):
    for value in values:
        back = survive(value)
        assert type(back) is type(value)
        assert back == value
    opened = survive(values[0])
    assert opened.read(opened.manifest.kernels[0])
    assert serialise_manifest(opened.manifest) == (opened.folder / MANIFEST_NAME).read_text()


def test_what_was_parsed_cannot_be_changed(manifest):
    parsed = parse_manifest(serialise_manifest(manifest))
    for mapping in (parsed.toolchain, parsed.kernels[0].problem.dtypes):
        assert mapping == dict(mapping)
        assert {**mapping} == dict(mapping)
        assert mapping.items() >= dict(mapping).items()
        with pytest.raises(TypeError):
            mapping["new"] = "value"
        with pytest.raises(AttributeError):
            mapping.new = "value"


def test_a_set_of_artifacts_is_shown_in_a_line(values):
    opened = values[0]
    assert repr(opened) == f"ArtifactSet(folder={opened.folder!r}, manifest={opened.manifest!r})"
    assert repr(opened.manifest) == "Manifest(32 kernels for sm_100a, sm_90a)"
    assert repr(replace(opened.manifest, kernels=())) == "Manifest(0 kernels)"


# ---------------------------------------------------------------- which command repairs

BUILD = "build-kernels build"
REINSTALL = "pip install --force-reinstall dsv4-router"
ROOT = Path(dsv4_router_runtime.__file__).resolve().parents[1]


@pytest.mark.parametrize(
    ("file", "command"),
    [
        (f"{ROOT}/artifacts/manifest.json", BUILD),
        (f"{ROOT}/artifacts", BUILD),
        (f"{ROOT}/tests/../artifacts/x.cubin", BUILD),
        ("/x/site-packages/dsv4_router_runtime/_artifacts/manifest.json", REINSTALL),
        ("/x/site-packages/dsv4_router_runtime/_artifacts", REINSTALL),
        ("/srv/_artifacts/manifest.json", f"{BUILD} --artifacts /srv/_artifacts"),
        ("/nonexistent/manifest.json", f"{BUILD} --artifacts /nonexistent"),
        ("/srv/my set/x.cubin", f"{BUILD} --artifacts '/srv/my set'"),
        ("./manifest.json", f"{BUILD} --artifacts ."),
        ("out/manifest.json", f"{BUILD} --artifacts out"),
        ("manifest.json", BUILD),
        ("manifest to be written", BUILD),
        (f"/{'long/' * 100}manifest.json", f"{BUILD} --artifacts FOLDER"),
    ],
)
def test_the_repair_names_the_folder_that_is_broken(file, command):
    assert errors.repair_command(file) == command
    told = (
        errors.ArtifactError(file=file, problem="missing"),
        errors.ManifestError(source=file, path="$", problem="missing"),
    )
    for error in told:
        assert str(error).endswith(f"; repair it with `{command}`")


def test_the_default_folder_by_a_relative_path_is_the_default(monkeypatch):
    monkeypatch.chdir(ROOT)
    assert errors.repair_command("artifacts/manifest.json") == BUILD
    monkeypatch.chdir(ROOT / "tests")
    assert errors.repair_command("artifacts/manifest.json") == f"{BUILD} --artifacts artifacts"


def test_no_message_is_long_or_hides_control_characters():
    name = "a\x1b[2J\ud800\n" + "x" * 4000
    told = (
        errors.ArtifactError(file=f"/set/{name}", problem=f"surplus {name}"),
        errors.ManifestError(source=f"/set/{name}", path=name, problem=name),
    )
    for error in told:
        assert len(str(error)) <= 1024
        assert str(error).isprintable()
        json.dumps(str(error)).encode()
    assert told[0].file == f"/set/{name}"


def test_an_artifact_set_made_by_hand_is_equal_to_one_opened(values):
    opened = values[0]
    assert ArtifactSet(folder=opened.folder, manifest=opened.manifest) == opened
