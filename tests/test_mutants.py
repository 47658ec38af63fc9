"""The checks can fail: faults put into the project's own PTX are rejected, the kernels are not."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

pytest.importorskip("cutlass", reason="needs the extra `build`")
pytest.importorskip("elftools", reason="needs the extra `build`")
pytest.importorskip("numpy", reason="needs the extra `verify`")
pytest.importorskip("torch", reason="needs the extra `torch`")

from click.testing import CliRunner

from build_kernels.build import make_plan, run_build
from build_kernels.emulator import Schedule
from build_kernels.mutants import (
    MUTANTS,
    RUNGS,
    Edit,
    Mutant,
    MutantError,
    judge,
    mutant_table,
    mutants_command,
    mutated,
)
from build_kernels.verify import emulated
from build_kernels.verify.artifact import Artifact, load_artifact

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
}
# One of each class is enough for every run of the tests; `build_kernels.mutants` runs them all.
FIRST_OF_CLASS = tuple({mutant.kind: mutant for mutant in reversed(MUTANTS)}.values())
EMULATED = tuple(mutant for mutant in FIRST_OF_CLASS if "emulated" in mutant.rejected_by)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The kernels that the mutants are made from, built."""
    made = tmp_path_factory.mktemp("mutants") / "artifacts"
    keys = {mutant.artifact for mutant in MUTANTS}
    names = sorted({key.partition(".")[0] for key in keys})
    archs = sorted({key.partition(".")[2] for key in keys})
    run_build(made, make_plan(made, names, archs), jobs=2)
    return made


@pytest.fixture(scope="module")
def artifacts(folder: Path) -> dict[str, Artifact]:
    return {key: load_artifact(folder, key) for key in {mutant.artifact for mutant in MUTANTS}}


def test_there_are_enough_mutants_of_enough_classes() -> None:
    assert len(MUTANTS) >= 25
    assert {mutant.kind for mutant in MUTANTS} >= WANTED
    assert len({mutant.name for mutant in MUTANTS}) == len(MUTANTS)
    for mutant in MUTANTS:
        assert bool(mutant.rejected_by) != bool(mutant.harmless), mutant.name
        assert set(mutant.rejected_by) <= set(RUNGS)


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda mutant: mutant.name)
def test_every_mutant_still_changes_the_kernel(
    mutant: Mutant, artifacts: dict[str, Artifact]
) -> None:
    ptx = artifacts[mutant.artifact].ptx
    assert mutated(mutant, ptx) != ptx or mutant.maps


@pytest.mark.parametrize("mutant", EMULATED, ids=lambda mutant: mutant.name)
def test_the_emulated_rung_rejects(mutant: Mutant, artifacts: dict[str, Artifact]) -> None:
    verdict = judge(mutant, artifacts[mutant.artifact], "emulated")
    assert verdict.word == "rejected", verdict.reason


def test_the_kernels_themselves_are_accepted_on_the_same_cases(
    artifacts: dict[str, Artifact],
) -> None:
    """Or the mutants would prove nothing."""
    asked = {(mutant.artifact, mutant.case) for mutant in EMULATED}
    for key, case in sorted(asked, key=str):
        kernel, ptx = artifacts[key].kernel, artifacts[key].ptx
        inputs = emulated.make_inputs(kernel, case)
        outcome = emulated.run(kernel, ptx, inputs, Schedule(policy="random", seed=1))
        assert outcome.problems == (), f"{key} on {case}"


def test_the_protocol_rung_rejects(artifacts: dict[str, Artifact]) -> None:
    """Two that take seconds; the table of all is made by the command."""
    pytest.importorskip("sentryward", reason="needs the extra `verify`")
    by_name = {mutant.name: mutant for mutant in MUTANTS}
    barrier = "top-k: no barrier between writing keys and reading them"
    for name in (barrier, "full needs two arrivals"):
        mutant = by_name[name]
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


def test_the_command_fails_for_a_survivor(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = next(m for m in MUTANTS if m.artifact.startswith("router_topk"))
    harmless = replace(
        first,
        name="nothing changed",
        edits=(Edit(pattern="ret;", replacement="ret;"),),
        rejected_by=("emulated",),
    )
    monkeypatch.setattr("build_kernels.mutants.MUTANTS", (harmless,))
    options = ["--artifacts", str(folder), "--rung", "emulated", "--json"]
    result = CliRunner().invoke(mutants_command, options)
    assert result.exit_code == 1
    assert "not rejected by emulated: nothing changed" in result.stderr
    (row,) = json.loads(result.stdout)
    assert row["verdicts"]["emulated"]["word"] == "accepted"
    assert mutant_table([row]).row_count == 1
