"""The fault campaign: its table, its command, and that its rows can fail."""

from __future__ import annotations

import ast
import json
import re
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from functools import lru_cache
from pathlib import Path

import pytest

pytest.importorskip("elftools", reason="needs dsv4-router-builder")
pytest.importorskip("numpy", reason="needs the extra `verify`")
pytest.importorskip("torch", reason="needs the extra `torch`")

from builds import kernel_set
from click.testing import CliRunner

from build_kernels.campaign import run
from build_kernels.campaign.command import faults_command
from build_kernels.campaign.fault import Expected, Fault, Place
from build_kernels.campaign.guards import GUARDS
from build_kernels.campaign.run import AS_EXPECTED, NOT_RUN, WRONG, Outcome, run_together
from build_kernels.campaign.table import BY_NAME, FAULTS
from build_kernels.campaign.trial import Trial, applies, together, try_faults
from build_kernels.emulator import Schedule
from build_kernels.evidence.artifact import Artifact, load_artifact
from build_kernels.evidence.cases import Case
from build_kernels.evidence.inputs import make_inputs
from build_kernels.evidence.rungs.emulated import emulate_case
from build_kernels.workers import WorkerDiedError
from dsv4_router_runtime.artifacts.folder import open_artifacts

ROOT = Path(__file__).parents[1]
KEY = "router_decode_kmajor_n8.sm_90a"
PREFILL_KEY = "router_prefill_kmajor_n64.sm_90a"
SCENARIOS = {fault.name: fault.scenario for fault in FAULTS if fault.scenario is not None}
EMULATED = tuple(name for name, scenario in SCENARIOS.items() if "decode" in scenario.roles)
PREFILL = tuple(name for name, scenario in SCENARIOS.items() if "prefill" in scenario.roles)
# Half a second to a second each.
QUICK = ("random-left",)


def built(tmp_path_factory: pytest.TempPathFactory, key: str) -> Artifact:
    """One kernel, built."""
    name, _, arch = key.partition(".")
    folder = kernel_set(tmp_path_factory.mktemp("faults") / "artifacts", [name], [arch])
    return load_artifact(folder, key)


@pytest.fixture(scope="module")
def decode(tmp_path_factory: pytest.TempPathFactory) -> Artifact:
    return built(tmp_path_factory, KEY)


@pytest.fixture(scope="module")
def prefill(tmp_path_factory: pytest.TempPathFactory) -> Artifact:
    return built(tmp_path_factory, PREFILL_KEY)


def put(fault: Fault, artifact: Artifact, *, quick: bool = True) -> Trial:
    """Try one fault on a kernel, also one that a quick run leaves out."""
    if quick and fault.scenario is not None and not fault.scenario.quick:
        fault = replace(fault, scenario=replace(fault.scenario, quick=(65,)))
    return try_faults([fault], artifact, quick=quick)[fault.name]


@lru_cache
def names_in(path: Path) -> set[str]:
    """Return the names of a module's tests and test classes."""
    found = set()
    for node in ast.parse(path.read_text()).body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            found.add(node.name)
    return found


def test_the_table_has_every_hazard_and_a_proof_for_each_row() -> None:
    assert len(FAULTS) >= 65
    assert len(BY_NAME) == len(FAULTS)
    assert {fault.hazard for fault in FAULTS} == {"", *(f"H{n}" for n in range(1, 12))}
    for fault in FAULTS:
        assert (fault.scenario is None) == bool(fault.tests), fault.name
        assert fault.what, fault.name
    places = [fault.place for fault in FAULTS]
    assert places.count(Place.CPU) >= 38
    assert places.count(Place.GPU) >= 25
    assert places.count(Place.GPUS) >= 10


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.name)
def test_every_named_test_exists(fault: Fault) -> None:
    for test in fault.tests:
        module, _, name = test.partition("::")
        assert (ROOT / module).is_file(), test
        assert re.sub(r"\[.*", "", name) in names_in(ROOT / module), test


@pytest.mark.quick(len(QUICK))
@pytest.mark.parametrize("name", sorted(EMULATED, key=lambda name: name not in QUICK))
def test_a_decode_kernel_survives(decode: Artifact, name: str) -> None:
    fault = BY_NAME[name]
    assert applies(fault, decode, quick=True)
    trial = put(fault, decode)
    assert trial.problems == ()
    assert trial.runs > 0


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(PREFILL))
def test_a_prefill_kernel_survives(prefill: Artifact, name: str) -> None:
    assert put(BY_NAME[name], prefill).problems == ()


def test_a_quick_run_lists_no_row_that_it_leaves_out(prefill: Artifact) -> None:
    fault = BY_NAME["second-padding-torn"]
    assert applies(fault, prefill, quick=False)
    assert not applies(fault, prefill, quick=True)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("guard", "name", "role"),
    [
        (guard, name, role)
        for guard in GUARDS
        for name in guard.faults
        for role in ("decode", "prefill")
        if role in SCENARIOS[name].roles
    ],
    ids=lambda part: part if isinstance(part, str) else part.name,
)
def test_a_row_fails_without_its_guard(
    request: pytest.FixtureRequest, guard, name: str, role: str
) -> None:
    artifact = request.getfixturevalue(role)
    ptx = artifact.ptx
    for edit in guard.edits:
        ptx = edit(ptx)
    assert put(BY_NAME[name], replace(artifact, ptx=ptx)).problems


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in SCENARIOS if SCENARIOS[name].tears])
def test_every_tear_has_a_guard(name: str) -> None:
    assert any(name in guard.faults for guard in GUARDS)


@pytest.mark.slow
def test_a_full_run_tears_at_every_load(decode: Artifact) -> None:
    """The count is one element, which each owner loads; every load but the first is a moment."""
    fault = BY_NAME["count-up"]
    assert fault.scenario is not None
    few = replace(fault, scenario=replace(fault.scenario, experts=(65,), between=(66, 67)))
    case = Case(num_tokens=6, num_experts=65, top_k=6, k=64, options=few.scenario.options)
    inputs = make_inputs(decode.kernel, case)
    loads: Counter[str] = Counter()

    def count(array: str, offsets: object, depends: object) -> dict[str, dict[int, int]]:
        loads[array] += 1
        return {}

    emulate_case(decode.kernel, decode.ptx, inputs, Schedule(), on_load=count)
    assert loads["num_valid_tokens"] == 6
    assert put(few, decode, quick=False) == Trial(runs=6 - 1 + 2, problems=())


@pytest.mark.slow
def test_faults_that_share_a_launch_have_the_trials_of_each_alone(decode: Artifact) -> None:
    # The guard's absence traps whatever is torn, which one of the three allows.
    ends = replace(BY_NAME["hash-image-set"], expected=Expected.ENDS)
    faults = [BY_NAME["padding-set"], ends, BY_NAME["padding-clear"]]
    assert len(together(faults)) == 1
    guard = next(guard for guard in GUARDS if "padding-set" in guard.faults)
    (edit,) = guard.edits
    broken = replace(decode, ptx=edit(decode.ptx))
    trials = try_faults(faults, broken, quick=True)
    assert trials == {fault.name: put(fault, broken) for fault in faults}
    assert trials["padding-set"].problems
    assert not trials["hash-image-set"].problems


@pytest.mark.slow
def test_a_trap_is_no_way_to_survive_a_torn_input(decode: Artifact) -> None:
    """ENDS allows the trap; a torn input must not lead to it."""
    ptx = decode.ptx.replace("griddepcontrol.wait;", "trap;", 1)
    trapping = replace(decode, ptx=ptx)
    assert "trapped" in put(BY_NAME["image-set"], trapping).problems[0]
    ends = replace(BY_NAME["image-set"], expected=Expected.ENDS)
    assert put(ends, trapping).problems == ()


@pytest.mark.quick(1)
@pytest.mark.parametrize(
    ("body", "status", "detail"),
    [
        ("def test_it(): assert False", WRONG, "1 failed"),
        ("def test_it(): pass", AS_EXPECTED, "1 passed"),
        ("import pytest\ndef test_it(): pytest.skip('no driver')", NOT_RUN, "1 skipped"),
        ("def test_other(): pass", WRONG, ""),
    ],
)
def test_the_outcome_of_a_row_is_that_of_its_tests(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, body: str, status: str, detail: str
) -> None:
    (tmp_path / "test_row.py").write_text(body)
    fault = replace(BY_NAME["first-use-twice"], tests=("test_row.py::test_it",))
    monkeypatch.setattr(run, "ROOT", tmp_path)
    monkeypatch.setitem(BY_NAME, fault.name, fault)
    (outcome,) = run_together(tmp_path, [fault.name], "", True)
    assert outcome.status == status
    assert detail in outcome.detail


def test_a_checkout_without_the_tests_runs_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(run, "ROOT", tmp_path)
    (outcome,) = run_together(tmp_path, ["first-use-twice"], "", True)
    assert outcome.status == NOT_RUN
    assert "the checkout has no tests/test_faults_runtime.py" in outcome.detail


def test_a_kernel_that_is_not_there_is_no_success(tmp_path: Path) -> None:
    (outcome,) = run_together(tmp_path, ["padding-set"], KEY, True)
    assert outcome.status == WRONG


def test_a_row_whose_process_dies_is_not_as_expected(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A crash or a kernel that eats all memory may be the fault itself."""

    @contextmanager
    def dying(task: object, calls: Mapping[object, object], *, jobs: int) -> Iterator[object]:
        yield iter([(key, WorkerDiedError()) for key in calls])

    monkeypatch.setattr(run, "run_tasks", dying)
    monkeypatch.setattr(run, "_distinct", lambda folder: [])
    outcomes: list[Outcome] = []
    faults = [BY_NAME["first-use-twice"]]
    run.run_faults(tmp_path, faults, quick=True, jobs=1, on_outcome=outcomes.append)
    assert [outcome.status for outcome in outcomes] == [WRONG]
    assert str(WorkerDiedError()) in outcomes[0].detail


def test_the_bound_of_a_wait_is_the_manifests() -> None:
    """A kernel that never asks for the time has none, which the manifest states as 0."""
    folder = ROOT / "artifacts"
    kernels = open_artifacts(folder).manifest.kernels
    for kernel in kernels:
        ptx = (folder / f"{kernel.key}.ptx").read_text()
        bound = kernel.launch.wait_limit_ms * 1_000_000
        waits = re.findall(r"globaltimer;(?:[^;]*;){3}\s*setp\.gt\.u64\s+\S+ \S+ (\d+);", ptx)
        assert len(waits) == ptx.count("globaltimer;"), kernel.key
        assert {int(wait) for wait in waits} == ({bound} if bound else set()), kernel.key
    assert any(kernel.launch.wait_limit_ms for kernel in kernels)


def test_the_list_names_every_row_and_runs_none() -> None:
    shown = CliRunner().invoke(faults_command, ["--list", "--json"])
    rows = json.loads(shown.stdout)
    assert [row["id"] for row in rows] == [fault.name for fault in FAULTS]
    assert {row["status"] for row in rows} == {NOT_RUN}
    listed = CliRunner().invoke(faults_command, ["--list"]).stdout
    assert "gpu-soak" in listed
    # As if no record had it.
    assert NOT_RUN not in listed


def test_an_unknown_row_is_a_usage_error() -> None:
    shown = CliRunner().invoke(faults_command, ["--only", "padding-sat"])
    assert shown.exit_code == 2
    assert "padding-set" in shown.stderr


def test_a_row_for_a_gpu_is_not_run_and_its_command_is_printed(decode: Artifact) -> None:
    folder = str(decode.cubin_path.parent)
    arguments = ["--only", "gpu-nan", "--only", "gpus-reset", "--artifacts", folder]
    shown = CliRunner().invoke(faults_command, arguments)
    assert shown.exit_code == 0
    assert "python -m pytest -m gpu tests/test_gpu_faults.py::test_nan_everywhere" in shown.stdout
    assert "0 not as expected, 2 not run" in shown.stdout
