"""The command `verify`: what is climbed, what is kept, the table and the exit status."""

from __future__ import annotations

import errno
import io
import json
import os
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest

pytest.importorskip("elftools", reason="needs dsv4-router-builder")

from builds import tasks_here, topk_set
from click.testing import CliRunner
from rich.console import Console
from test_evidence import FAILED, KERNEL, PASSED, record_of

from build_kernels.campaign.table import FAULTS
from build_kernels.campaign.trial import applies
from build_kernels.evidence import climb
from build_kernels.evidence.artifact import Artifact, ArtifactReadError, load_artifact
from build_kernels.evidence.climb import Outcome, climb_one, is_failure, verify
from build_kernels.evidence.command import verify_command
from build_kernels.evidence.result import Result, not_run
from build_kernels.evidence.rungs import RUNGS, emulated, faults, hardware, lint, rung, structure
from build_kernels.evidence.store import (
    Evidence,
    read_evidence,
    standing,
    update_evidence,
    write_evidence,
)
from build_kernels.evidence.table import cell, print_evidence
from build_kernels.evidence.tasks import join_parts, text_and_launch
from build_kernels.workers import WorkerDiedError

TOPK_KEY = "router_topk.sm_100a"


@pytest.fixture
def artifacts(tmp_path: Path) -> Path:
    return topk_set(tmp_path / "artifacts", ["sm_100a"])


@pytest.fixture
def in_this_process(monkeypatch: pytest.MonkeyPatch, disassemble_once: None) -> None:
    """Start no worker, which would import what is imported here: test_workers has them."""
    monkeypatch.setattr(climb, "run_tasks", tasks_here)


def _call(*arguments: str | Path):
    return CliRunner().invoke(verify_command, [str(argument) for argument in arguments])


@pytest.mark.slow
@pytest.mark.usefixtures("in_this_process")
def test_the_command_prints_a_table_and_keeps_the_evidence(artifacts: Path) -> None:
    result = _call("--artifacts", artifacts, "--rung", "structure")
    assert result.exit_code == 0, result.stderr
    assert "router_topk.sm_100a" in result.stdout
    assert "not run" in result.stdout
    stored = read_evidence(artifacts / "evidence.json")
    (entry,) = stored.entries.values()
    assert entry.rungs["structure"].status == "passed"
    shown = _call("--artifacts", artifacts, "--rung", "structure", "--json")
    rows = {row["rung"]: row for row in json.loads(shown.stdout)}
    assert rows["structure"]["status"] == "passed"
    assert rows["emulated"]["status"] == "not run"


@pytest.mark.slow
def test_a_result_names_its_checker_and_a_stale_one_says_so(
    artifacts: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (kernel,) = {item.artifact for item in verify(artifacts, rungs=["structure"])}
    path = artifacts / "evidence.json"
    (entry,) = read_evidence(path).entries.values()
    assert entry.rungs["structure"].checker == structure.RUNG.present_checker()
    newer = replace(structure.RUNG, checker=rung.Checker(number=99))
    monkeypatch.setitem(RUNGS, "structure", newer)
    by_rung = {item.rung: item.result for item in verify(artifacts, rungs=["hardware"])}
    assert by_rung["structure"].status == "not run"
    assert f"{entry.rungs['structure'].checker} is not the present checker" in (
        by_rung["structure"].reason
    )
    assert kernel == "router_topk.sm_100a"


@pytest.mark.usefixtures("in_this_process")
def test_a_rung_asked_for_and_not_run_is_a_failure(artifacts: Path) -> None:
    result = _call("--artifacts", artifacts, "--rung", "hardware")
    assert result.exit_code == 1
    assert "router_topk.sm_100a hardware" in result.stderr
    lint_result = _call("--artifacts", artifacts, "--rung", "lint")
    assert lint_result.exit_code == 0, "the lint rung does not apply to a CUDA kernel"


@pytest.mark.slow
def test_a_quick_pass_does_not_clear_a_failure_of_a_full_climb(artifacts: Path) -> None:
    kernel = load_artifact(artifacts, "router_topk.sm_100a").kernel
    failed = Result(
        status="failed", scope="full", reason="a race", checker=emulated.RUNG.present_checker()
    )
    update_evidence(
        artifacts / "evidence.json", lambda known: known.with_result(kernel, "emulated", failed)
    )
    result = _call("--artifacts", artifacts, "--rung", "emulated", "--quick")
    assert result.exit_code == 1
    assert "a race" in result.stdout


def test_what_counts_as_failure() -> None:
    def outcome(result: Result) -> Outcome:
        return Outcome(artifact="a", rung="protocol", result=result, climbed=True)

    missing = not_run("no SentryWard")
    assert not is_failure(outcome(PASSED), ("protocol",))
    assert is_failure(outcome(FAILED), ())
    assert is_failure(outcome(missing), ("protocol",))
    assert not is_failure(outcome(missing), ())
    assert not is_failure(outcome(replace(missing, applies=False)), ("protocol",))


@pytest.mark.usefixtures("in_this_process")
def test_a_gpu_record_is_merged_and_a_stale_one_refused(artifacts: Path, tmp_path: Path) -> None:
    kernel = load_artifact(artifacts, "router_topk.sm_100a").kernel
    good, stale = tmp_path / "good.json", tmp_path / "stale.json"
    hardware.append_record(good, record_of(kernel))
    hardware.append_record(stale, record_of(kernel, cubin_sha256="f" * 64))
    refused = _call("--artifacts", artifacts, "--rung", "hardware", "--record", stale)
    assert refused.exit_code == 1
    assert "stale" in refused.stderr
    elsewhere = tmp_path / "elsewhere.json"
    hardware.append_record(elsewhere, record_of(kernel, arch="sm_90a"))
    impossible = _call("--artifacts", artifacts, "--rung", "hardware", "--record", elsewhere)
    assert impossible.exit_code == 1
    assert "which cannot load a cubin for sm_100a" in impossible.stderr
    merged = _call("--artifacts", artifacts, "--rung", "hardware", "--record", good)
    assert merged.exit_code == 0, merged.stderr
    assert "NVIDIA H200, 32 cases" in merged.stdout
    second = tmp_path / "second.json"
    hardware.append_record(second, record_of(kernel, date="2026-02-01"))
    again = _call("--artifacts", artifacts, "--rung", "structure", "--record", second, "--json")
    assert again.exit_code == 0, again.stderr
    (row,) = (row for row in json.loads(again.stdout) if row["rung"] == "hardware")
    assert [run["date"] for run in row["figures"]["records"]] == ["2026-01-31", "2026-02-01"]


@pytest.mark.usefixtures("in_this_process")
def test_evidence_of_another_machine_is_merged_and_a_stale_one_refused(
    artifacts: Path, tmp_path: Path
) -> None:
    kernel = load_artifact(artifacts, TOPK_KEY).kernel
    other = tmp_path / "other.json"

    def merge(kernel, rung: str, result: Result):
        write_evidence(other, Evidence().with_result(kernel, rung, result))
        return _call("--artifacts", artifacts, "--rung", "lint", "--evidence", other, "--json")

    passed = replace(PASSED, figures={}, checker=faults.RUNG.present_checker())
    merged = merge(kernel, "faults", passed)
    assert merged.exit_code == 0, merged.stderr
    assert read_evidence(artifacts / "evidence.json").of(kernel)["faults"] == passed
    merge(kernel, "faults", replace(passed, scope="quick"))
    assert read_evidence(artifacts / "evidence.json").of(kernel)["faults"] == passed
    old = merge(kernel, "faults", replace(passed, checker="faults 1"))
    assert old.exit_code == 1
    assert "is of faults 1, which is not the present checker" in old.stderr
    strange = merge(replace(kernel, cubin_sha256="f" * 64), "faults", passed)
    assert strange.exit_code == 1
    assert "is of cubin ffffffffffff, which is not among the artifacts" in strange.stderr


def test_the_parts_of_a_climb_make_one_result() -> None:
    parts = [
        replace(PASSED, figures={"faults": [name], "runs": runs})
        for name, runs in (("b", 2), ("a", 3))
    ]
    whole = join_parts("faults", parts)
    assert whole == replace(PASSED, figures={"faults": ["a", "b"], "runs": 5})
    lost = not_run("no torch")
    assert join_parts("faults", [parts[0], lost]) == lost
    assert join_parts("faults", [lost, FAILED, parts[0]]) == FAILED
    died = WorkerDiedError()
    assert join_parts("faults", [parts[0], died]) is died


@pytest.mark.slow
def test_a_rung_of_parts_climbs_each_of_them(artifacts: Path) -> None:
    pytest.importorskip("torch")
    (climbed,) = (o for o in verify(artifacts, rungs=["faults"], quick=True, jobs=2) if o.climbed)
    kernel = load_artifact(artifacts, TOPK_KEY)
    assert climbed.result.status == "passed"
    assert climbed.result.figures["faults"] == sorted(
        fault.name for fault in FAULTS if applies(fault, kernel, quick=True)
    )


def test_the_cells_of_the_table() -> None:
    launch = replace(PASSED, scope="quick", figures={"race_free": ["N=1"]})
    assert cell("protocol", launch) == "passed, quick, 1 launch"
    assert cell("protocol", replace(PASSED, figures={"race_free": ["a", "b"]})) == (
        "passed, 2 launches"
    )
    emulation = replace(PASSED, figures={"cases": ["a"], "runs": 2})
    assert cell("emulated", emulation) == "passed, 1 case, 2 runs"
    assert cell("lint", not_run("a CUDA kernel", applies=False)) == "does not apply"
    assert cell("lint", not_run("no compiler")) == "not run"
    shown = replace(not_run("CUDA", applies=False), checker=lint.RUNG.present_checker())
    evidence = Evidence().with_result(KERNEL, "lint", shown)
    assert standing(evidence, KERNEL)["lint"] == "does not apply"


def test_a_damaged_artifact_is_not_climbed(tmp_path: Path) -> None:
    folder = topk_set(tmp_path / "artifacts", ["sm_90a", "sm_100a"])
    ptx = folder / "router_topk.sm_100a.ptx"
    for text in (ptx.read_text() + "\n// one line more\n", ""):
        ptx.write_text(text)
        result = _call("--artifacts", folder, "--rung", "structure")
        assert result.exit_code == 1
        assert "not the one that the manifest records" in result.stderr
    ptx.unlink()
    with pytest.raises(ArtifactReadError, match="build-kernels build"):
        verify(folder, rungs=["structure"])


def test_a_kernel_that_the_set_lacks_is_an_error(artifacts: Path) -> None:
    """An empty table and exit status 0 would look like a pass."""
    for options in (("--kernel", "router_hash"), ("--arch", "sm_90a")):
        result = _call("--artifacts", artifacts, *options)
        assert result.exit_code == 1
        assert "has none of the requested kernels; it has router_topk.sm_100a" in result.stderr


def _read_only(path: Path, change: object) -> Evidence:
    raise OSError(errno.EROFS, os.strerror(errno.EROFS), str(path))


@pytest.mark.slow
def test_a_read_only_folder_is_verified_and_its_evidence_not_kept(
    artifacts: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(climb, "update_evidence", _read_only)
    result = _call("--artifacts", artifacts, "--rung", "structure", "--json")
    assert result.exit_code == 0
    rows = {row["rung"]: row["status"] for row in json.loads(result.stdout)}
    assert rows["structure"] == "passed"
    assert "printed and not kept" in result.stderr
    assert "Read-only file system" in result.stderr
    record = artifacts.parent / "record.json"
    hardware.append_record(record, record_of(load_artifact(artifacts, TOPK_KEY).kernel))
    refused = _call("--artifacts", artifacts, "--record", record)
    assert refused.exit_code == 1
    assert "the records cannot be merged" in refused.stderr


def test_a_full_disk_is_an_error(artifacts: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What was to be kept, and could be but for its size, must not be dropped."""

    def full(path: Path, change: object) -> Evidence:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))

    monkeypatch.setattr(climb, "update_evidence", full)
    result = _call("--artifacts", artifacts, "--rung", "structure")
    assert result.exit_code == 1
    assert "error: [Errno 28] No space left on device" in result.stderr


@pytest.mark.parametrize("width", [80, 240])
def test_what_evidence_says_of_a_gpu_is_no_markup(artifacts: Path, width: int) -> None:
    kernel = load_artifact(artifacts, TOPK_KEY).kernel
    ran = hardware.result_of(kernel, [record_of(kernel, gpu="[/red] [bold]H200")])
    assert ran is not None
    outcomes = [
        Outcome(artifact=kernel.key, rung=rung, result=ran if rung == "hardware" else PASSED,
                climbed=False)
        for rung in RUNGS
    ]  # fmt: skip
    output = io.StringIO()
    print_evidence(Console(file=output, width=width), outcomes)
    lines = output.getvalue().splitlines()
    assert max(map(len, lines)) <= width
    assert any("[/red] [bold]H200, 32 cases" in line for line in lines)
    for words in (kernel.key, *RUNGS):
        assert any(words in line for line in lines)


def test_a_rung_that_breaks_off_is_a_failure_without_paths(
    artifacts: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refused(artifact: Artifact, *, quick: bool) -> Result:
        raise LookupError("no such figure")

    monkeypatch.setitem(RUNGS, "structure", replace(structure.RUNG, climbs=(refused,)))
    kernel = load_artifact(artifacts, "router_topk.sm_100a").kernel
    expected = (kernel.cubin_sha256, kernel.ptx_sha256)
    result = climb_one(artifacts, kernel.key, expected, "structure", True)
    assert result.status == "failed"
    assert result.reason == "the rung broke off: LookupError: no such figure"


def test_bytes_built_anew_during_a_run_get_no_evidence(artifacts: Path) -> None:
    kernel = load_artifact(artifacts, "router_topk.sm_100a").kernel
    expected = ("f" * 64, kernel.ptx_sha256)
    result = climb_one(artifacts, kernel.key, expected, "structure", True)
    assert (result.status, "built anew" in result.reason) == ("not run", True)


@pytest.mark.slow
def test_every_artifact_gets_every_rung(tmp_path: Path) -> None:
    folder = topk_set(tmp_path / "artifacts", ["sm_90a", "sm_100a"])
    outcomes = verify(folder, rungs=["structure"], jobs=2)
    names = [item.artifact for item in outcomes[:: len(RUNGS)]]
    assert names == ["router_topk.sm_100a", "router_topk.sm_90a"]
    assert len(outcomes) == 2 * len(RUNGS)
    assert [item.rung for item in outcomes if item.climbed] == ["structure"] * 2
    only = verify(folder, archs=["sm_90a"], rungs=["lint"])
    assert {item.artifact for item in only} == {"router_topk.sm_90a"}
    assert {item.rung: item.result.status for item in only}["structure"] == "passed"


@pytest.mark.slow
def test_a_stop_does_not_wait_for_the_workers(artifacts: Path) -> None:
    """The full emulated rung of router_topk takes tens of seconds."""
    pytest.importorskip("torch")
    code = "from build_kernels.evidence.command import verify_command as c; c()"
    options = ["--artifacts", str(artifacts), "--rung", "emulated"]
    process = subprocess.Popen(
        [sys.executable, "-c", code, *options], stderr=subprocess.PIPE, start_new_session=True
    )
    time.sleep(4)
    process.terminate()
    _, stderr = process.communicate(timeout=10)
    assert process.returncode == 130
    assert b"what was found so far is kept" in stderr


def test_importing_the_command_is_cheap() -> None:
    """And `list`, which asks for the evidence: no torch, no DSL, no emulator."""
    code = (
        "import sys, build_kernels.evidence.command, build_kernels.cli.list;"
        "print([m for m in ('torch', 'cutlass', 'sentryward', 'numpy') if m in sys.modules])"
    )
    process = subprocess.run([sys.executable, "-c", code], capture_output=True, check=True)
    assert process.stdout.strip() == b"[]"


@pytest.mark.slow
def test_one_climb_serves_ptx_that_differs_in_its_target_alone(tmp_path: Path) -> None:
    pytest.importorskip("sentryward", reason="needs the extra `verify`")
    folder = topk_set(tmp_path / "artifacts", ["sm_100a", "sm_103a"])
    first, twin = (load_artifact(folder, f"router_topk.sm_{n}a") for n in (100, 103))
    trap = replace(first, ptx=first.ptx.replace("ret;", "trap;"))
    assert text_and_launch(trap) != text_and_launch(twin)
    assert text_and_launch(first) == text_and_launch(twin)
    for changed in (
        {"launch": replace(twin.kernel.launch, block=(64, 1, 1))},
        {"parameters": twin.kernel.parameters[::-1]},
        {"problem": replace(twin.kernel.problem, k_multiple=128)},
    ):
        other = replace(twin, kernel=replace(twin.kernel, **changed))
        assert text_and_launch(first) != text_and_launch(other), changed
    outcomes = [item for item in verify(folder, rungs=["protocol"], quick=True) if item.climbed]
    assert [item.result.status for item in outcomes] == ["passed", "passed"]
    shared = [any(".target line alone" in a for a in o.result.assumptions) for o in outcomes]
    assert shared == [False, True]
