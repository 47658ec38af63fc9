"""The checks can fail: faults put into the project's own PTX are rejected, the kernels are not."""

from __future__ import annotations

import json
import subprocess
import sys
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest

pytest.importorskip("elftools", reason="needs dsv4-router-builder")
pytest.importorskip("numpy", reason="needs the extra `verify`")
pytest.importorskip("torch", reason="needs the extra `torch`")

from builds import kernel_set
from click.testing import CliRunner

from build_kernels.emulator import Schedule
from build_kernels.evidence.artifact import Artifact, load_artifact
from build_kernels.evidence.inputs import make_inputs
from build_kernels.evidence.rungs import emulated
from build_kernels.mutants import faults
from build_kernels.mutants.command import judge_one, mutants_command, table
from build_kernels.mutants.faults import (
    MUTANTS,
    selection,
)
from build_kernels.mutants.judge import JUDGES, Verdict, is_right, judge
from build_kernels.mutants.mutant import Edit, Mutant, MutantError, mutated
from build_kernels.workers import WorkerDiedError

# The classes that the evidence has to cover, by the names that this suite gives them.
WANTED = {
    "dropped wait",
    "dropped commit",
    "wrong parity",
    "wrong tx-count",
    "wrong arrive count",
    "missing proxy fence",
    "missing tcgen05 fence",
    "missing wait::ld",
    "stage off by one",
    "wrong descriptor swizzle",
    "wrong descriptor stride",
    "wrong TMEM lane",
    "wrong TMEM column",
    "wrong tensor-map box",
    "early dealloc",
    "missing cluster barrier",
    "tie rule reversed",
    "bias in the weight",
    "missing grid dependency",
    "wrong physical id",
    "option ignored",
    "half of an id",
    "unchecked token id",
    "wrong rank",
    "wrong row of W_gate",
    "store beside the outputs",
}
# One of each class is enough for the tests; the command runs them all.
FIRST_OF_CLASS = tuple({mutant.kind: mutant for mutant in reversed(MUTANTS)}.values())
EMULATED = tuple(mutant for mutant in FIRST_OF_CLASS if "emulated" in mutant.rejected_by)
HARMLESS = tuple(mutant for mutant in MUTANTS if mutant.harmless)
BY_NAME = {mutant.name: mutant for mutant in MUTANTS}
TABLE = Path(judge_one.__code__.co_filename).with_name("table.txt")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The kernels that the mutants are made from, built."""
    keys = {mutant.artifact for mutant in MUTANTS}
    names = sorted({key.partition(".")[0] for key in keys})
    archs = sorted({key.partition(".")[2] for key in keys})
    return kernel_set(tmp_path_factory.mktemp("mutants") / "artifacts", names, archs)


@pytest.fixture(scope="module")
def artifacts(folder: Path) -> dict[str, Artifact]:
    return {key: load_artifact(folder, key) for key in {mutant.artifact for mutant in MUTANTS}}


def test_there_are_enough_mutants_of_enough_classes() -> None:
    assert len(MUTANTS) - len(HARMLESS) >= 25
    assert {mutant.kind for mutant in MUTANTS} >= WANTED
    assert len({mutant.name for mutant in MUTANTS}) == len(MUTANTS)
    for mutant in MUTANTS:
        assert bool(mutant.rejected_by) != bool(mutant.harmless), mutant.name
        assert set(mutant.rejected_by) <= set(JUDGES)


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda mutant: mutant.name)
def test_every_mutant_still_changes_the_kernel(
    mutant: Mutant, artifacts: dict[str, Artifact]
) -> None:
    ptx = artifacts[mutant.artifact].ptx
    assert mutated(mutant, ptx) != ptx or mutant.maps


@pytest.mark.quick(1)
@pytest.mark.parametrize(
    "mutant",
    # The others take a second each.
    sorted(EMULATED, key=lambda each: each != selection.TOPK_STORE),
    ids=lambda each: each.name,
)
def test_the_emulated_rung_rejects(mutant: Mutant, artifacts: dict[str, Artifact]) -> None:
    verdict = judge(mutant, artifacts[mutant.artifact], "emulated")
    assert verdict.word == "rejected", verdict.reason


@pytest.mark.slow
@pytest.mark.parametrize("mutant", HARMLESS, ids=lambda mutant: mutant.name)
def test_what_does_no_harm_is_accepted(mutant: Mutant, artifacts: dict[str, Artifact]) -> None:
    quicker = replace(mutant, schedules=(("random", 1),))
    verdict = judge(quicker, artifacts[mutant.artifact], "emulated")
    assert verdict.word == "accepted", verdict.reason


@pytest.mark.slow
def test_a_complaint_about_another_fault_is_no_rejection(artifacts: dict[str, Artifact]) -> None:
    """The tie rule must fail by wrong ids; a kernel that breaks off elsewhere tells nothing."""
    mutant = BY_NAME["top-k: equal keys go to the higher expert"]
    # Experts of slots that no lane has, which are then read from outside the logits.
    slot = r"(bfind\.shiftamt\.u32 \t(%r\d+), %r\d+;)"
    edit = Edit(pattern=slot, replacement=r"\1 add.s32 \2, \2, 99;")
    broken = replace(mutant, edits=(edit,), complaint="out-of-bounds")
    artifact = artifacts[mutant.artifact]
    assert judge(broken, artifact, "emulated").word == "rejected"
    other = judge(replace(broken, complaint="a deadlock"), artifact, "emulated")
    assert other.word == "undecided"
    assert "another fault: out-of-bounds" in other.reason
    assert not is_right(broken, other)


@pytest.mark.slow
def test_the_kernels_themselves_are_accepted_on_the_same_cases(
    artifacts: dict[str, Artifact],
) -> None:
    """Or the mutants would prove nothing."""
    asked = {(mutant.artifact, mutant.case) for mutant in EMULATED}
    for key, case in sorted(asked, key=str):
        kernel, ptx = artifacts[key].kernel, artifacts[key].ptx
        inputs = make_inputs(kernel, case)
        outcome = emulated.run(kernel, ptx, inputs, Schedule(policy="random", seed=1))
        assert outcome.problems == (), f"{key} on {case}"


@pytest.mark.slow
def test_the_protocol_rung_rejects(artifacts: dict[str, Artifact]) -> None:
    """Two that take seconds; the table of all is made by the command."""
    pytest.importorskip("sentryward", reason="needs the extra `verify`")
    barrier = "top-k: no barrier between writing keys and reading them"
    for name in (barrier, "no cluster barrier"):
        mutant = BY_NAME[name]
        verdict = judge(mutant, artifacts[mutant.artifact], "protocol")
        assert verdict.word == "rejected", verdict.reason


def test_a_mutant_that_the_kernel_has_outgrown_is_an_error() -> None:
    with pytest.raises(MutantError, match="is not in the PTX"):
        Edit(pattern="no such text", replacement="")("ret;")
    with pytest.raises(MutantError, match="match 2"):
        Edit(pattern="a", replacement="b", nth=2)("a a")
    assert Edit(pattern="a", replacement="b", nth=1)("a a") == "a b"
    with pytest.raises(MutantError, match=MUTANTS[0].name):
        mutated(MUTANTS[0], "ret;")


def test_what_is_right() -> None:
    fault, harmless = BY_NAME["no dealloc"], HARMLESS[0]

    def said(word: str, rung: str = "emulated") -> Verdict:
        return Verdict(mutant="", rung=rung, word=word, reason="")

    assert is_right(fault, said("rejected"))
    assert not is_right(fault, said("accepted"))
    assert not is_right(fault, said("undecided"))
    assert is_right(fault, said("accepted", "protocol")), "not one of the rungs to reject it"
    assert is_right(harmless, said("accepted"))
    assert not is_right(harmless, said("rejected"))


@pytest.mark.quick(1)
@pytest.mark.parametrize("as_json", [True, False])
def test_the_command_fails_for_a_survivor(
    folder: Path, monkeypatch: pytest.MonkeyPatch, as_json: bool
) -> None:
    survivor = replace(
        next(m for m in MUTANTS if m.artifact.startswith("router_topk")),
        name="nothing changed",
        edits=(Edit(pattern="ret;", replacement="ret;"),),
        rejected_by=("emulated",),
    )
    monkeypatch.setattr(faults, "MUTANTS", (survivor,))

    def here(folder: Path, asked, *, jobs: int, on_verdict) -> None:
        for mutant, rung in asked:
            on_verdict(judge_one(folder, mutant.name, rung))

    monkeypatch.setattr("build_kernels.mutants.command.judge_all", here)
    options = ["--artifacts", str(folder), *(["--json"] if as_json else [])]
    result = CliRunner().invoke(mutants_command, options)
    assert result.exit_code == 1
    assert "[1/1] accepted by emulated: nothing changed" in result.stderr
    assert "not as it must be, by emulated: nothing changed" in result.stderr
    if as_json:
        (row,) = json.loads(result.stdout)
        assert row["verdicts"]["emulated"]["word"] == "accepted"
    else:
        assert "0 of 1 faults rejected" in result.stdout


@pytest.mark.slow
def test_the_command_runs_a_mutant_in_processes(folder: Path) -> None:
    name = "top-k: logits read before the grid dependency"
    options = ["--artifacts", str(folder), "--only", name, "--jobs", "1"]
    result = CliRunner().invoke(mutants_command, options)
    assert result.exit_code == 0, result.stderr
    assert "1 of 1 faults rejected, of 1 classes" in result.stdout


def test_an_interrupted_run_prints_what_was_found(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def one_and_stop(folder: Path, asked, *, jobs: int, on_verdict) -> None:
        mutant, rung = asked[0]
        on_verdict(Verdict(mutant=mutant.name, rung=rung, word="rejected", reason="a race"))
        raise KeyboardInterrupt

    monkeypatch.setattr("build_kernels.mutants.command.judge_all", one_and_stop)
    result = CliRunner().invoke(mutants_command, ["--artifacts", str(folder), "--json"])
    assert result.exit_code == 130
    assert "interrupted; these are the 1 verdicts until then" in result.stderr
    (row,) = json.loads(result.stdout)
    assert row["mutant"] == MUTANTS[0].name


def test_a_worker_that_dies_leaves_its_mutant_undecided(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    @contextmanager
    def all_die(function, tasks, *, jobs: int):
        yield ((key, WorkerDiedError()) for key in tasks)

    monkeypatch.setattr("build_kernels.mutants.command.run_tasks", all_die)
    name = "top-k: logits read before the grid dependency"
    result = CliRunner().invoke(mutants_command, ["--artifacts", str(folder), "--only", name])
    assert result.exit_code == 1
    assert f"undecided by emulated: {name}: its process died" in result.stderr


def test_a_name_that_no_mutant_has_is_refused() -> None:
    result = CliRunner().invoke(mutants_command, ["--only", "no dealoc"])
    assert result.exit_code == 2
    assert result.stdout == ""
    assert "--only 'no dealoc': no mutant's name contains it; the nearest are:" in result.stderr
    assert "\n  no dealloc\n" in result.stderr
    assert CliRunner().invoke(mutants_command, ["--only", "nosuch"]).exit_code == 2


@pytest.mark.quick(1)
@pytest.mark.parametrize(
    ("package", "requirement"),
    [
        ("click", "dsv4-router-builder"),
        ("numpy", "dsv4-router-builder[verify]"),
        ("sentryward", "dsv4-router-builder[verify]"),
        ("torch", "dsv4-router[torch]"),
    ],
)
def test_without_a_package_it_names_what_brings_it(package: str, requirement: str) -> None:
    code = (
        f"import sys, runpy; sys.modules[{package!r}] = None; sys.argv[1:] = []; "
        "runpy.run_module('build_kernels.mutants', run_name='__main__')"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert done.stdout == ""
    assert "Traceback" not in done.stderr
    assert f"the package {package}" in done.stderr
    assert f"pip install '{requirement}'" in done.stderr


def test_the_kept_table_is_of_these_mutants() -> None:
    """`python -m build_kernels.mutants > build_kernels/mutants/table.txt` makes it anew."""
    kept = TABLE.read_text().splitlines()
    verdicts = {
        (mutant.name, rung): Verdict(mutant=mutant.name, rung=rung, word="rejected", reason="")
        for mutant in MUTANTS
        for rung in mutant.rejected_by
    }
    verdicts |= {
        (mutant.name, "emulated"): Verdict(
            mutant=mutant.name, rung="emulated", word="accepted", reason=""
        )
        for mutant in HARMLESS
    }
    assert kept[: len(MUTANTS) + 2] == table(MUTANTS, verdicts)[: len(MUTANTS) + 2]
