"""The ladder: evidence on file, what each rung refuses, and the command's exit status."""

from __future__ import annotations

import errno
import io
import json
import os
import re
import shutil
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from conftest import decode_kernel, sample_manifest, topk_kernel

pytest.importorskip("elftools", reason="needs dsv4-router-builder")

from click.testing import CliRunner
from hardware_record import Tally
from rich.console import Console

from build_kernels.binaries.ptx import count_opcodes, read_entry, without_target
from build_kernels.building import compilers
from build_kernels.building.build import run_build
from build_kernels.building.plan import make_plan
from build_kernels.evidence import (
    RUNGS,
    Evidence,
    Result,
    climb,
    read_evidence,
    standing,
    validated_on,
    verify,
    verify_command,
)
from build_kernels.evidence.artifact import Artifact, ArtifactReadError, load_artifact
from build_kernels.evidence.cases import VOCABULARY, Case, cases_of, decode_cases, topk_cases
from build_kernels.evidence.climb import Outcome, climb_one, is_failure
from build_kernels.evidence.document import EvidenceError
from build_kernels.evidence.inputs import make_inputs
from build_kernels.evidence.result import not_run
from build_kernels.evidence.rungs import emulated, hardware, lint, protocol, rung, structure
from build_kernels.evidence.store import update_evidence, write_evidence
from build_kernels.evidence.table import cell, print_evidence
from build_kernels.evidence.tasks import text_and_launch
from build_kernels.specs import KERNELS

KERNEL = topk_kernel()
TOPK_KEY = "router_topk.sm_100a"
# By the present checker of the rung that most of these tests are about.
JUDGE = protocol.RUNG.present_checker()
PASSED = Result(
    status="passed",
    figures={"launches": 3},
    assumptions=("one launch at a time",),
    checker=JUDGE,
)


@pytest.fixture(scope="module")
def pristine(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """router_topk for sm_100a, really built: it takes a fraction of a second. Not to be changed."""
    folder = tmp_path_factory.mktemp("verify") / "artifacts"
    run_build(folder, make_plan(folder, ["router_topk"], ["sm_100a"]), jobs=1)
    return folder


@pytest.fixture
def artifacts(pristine: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy for one test to keep evidence in, or to spoil."""
    return Path(shutil.copytree(pristine, tmp_path_factory.mktemp("verify") / "artifacts"))


@pytest.fixture
def topk(pristine: Path) -> Artifact:
    return load_artifact(pristine, "router_topk.sm_100a")


# ---------------------------------------------------------------- evidence on file


def test_evidence_comes_back_as_it_was_written(tmp_path: Path) -> None:
    path = tmp_path / "evidence.json"
    evidence = Evidence().with_result(KERNEL, "protocol", PASSED)
    evidence = evidence.with_result(KERNEL, "lint", not_run("a CUDA kernel", applies=False))
    write_evidence(path, evidence)
    assert read_evidence(path) == evidence
    first = path.read_bytes()
    write_evidence(path, read_evidence(path))
    assert path.read_bytes() == first
    assert [item.name for item in tmp_path.iterdir()] == ["evidence.json"]


def test_no_file_is_no_evidence(tmp_path: Path) -> None:
    assert read_evidence(tmp_path / "evidence.json") == Evidence()
    assert standing(Evidence(), KERNEL) == dict.fromkeys(
        ("structure", "lint", "protocol", "emulated", "faults", "hardware"), "not run"
    )


@pytest.mark.parametrize("hash_name", ["cubin_sha256", "ptx_sha256"])
def test_evidence_does_not_outlive_the_bytes(hash_name: str) -> None:
    evidence = Evidence().with_result(KERNEL, "protocol", PASSED)
    rebuilt = replace(KERNEL, **{hash_name: "f" * 64})
    assert standing(evidence, KERNEL)["protocol"] == "passed"
    assert standing(evidence, rebuilt)["protocol"] == "not run"
    assert evidence.only([rebuilt]) == Evidence()


QUICK = replace(PASSED, scope="quick")
FAILED = Result(status="failed", reason="a race", checker=JUDGE)


@pytest.mark.parametrize(
    ("old", "new", "kept"),
    [
        (PASSED, QUICK, PASSED),
        (PASSED, not_run("no SentryWard"), PASSED),
        (FAILED, not_run("no SentryWard"), FAILED),
        (PASSED, FAILED, FAILED),
        (QUICK, PASSED, PASSED),
        (FAILED, QUICK, FAILED),
        (replace(FAILED, scope="quick"), QUICK, QUICK),
        (FAILED, PASSED, PASSED),
        (QUICK, FAILED, FAILED),
        (not_run("no SentryWard"), not_run("out of time"), not_run("out of time")),
    ],
)
def test_a_run_that_says_less_does_not_erase_one_that_says_more(
    old: Result, new: Result, kept: Result
) -> None:
    evidence = Evidence().with_result(KERNEL, "protocol", old)
    assert evidence.with_result(KERNEL, "protocol", new).stored(KERNEL)["protocol"] == kept


@pytest.mark.parametrize(
    "judge",
    ["", "protocol 0, sentryward 0.1.1", "emulated 1", "protocol 1, sentryward 0.0.9"],
)
@pytest.mark.parametrize("old", [PASSED, FAILED])
def test_evidence_does_not_outlive_its_checker(
    old: Result, judge: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(rung, "installed_version", lambda distribution: "0.1.1")
    stale = replace(old, checker=judge)
    evidence = Evidence().with_result(KERNEL, "protocol", stale)
    assert standing(evidence, KERNEL)["protocol"] == "not run"
    assert evidence.of(KERNEL) == {}
    assert evidence.stored(KERNEL)["protocol"] == stale
    for new in (QUICK, not_run("out of time"), PASSED):
        new = replace(new, checker=protocol.RUNG.present_checker())
        assert evidence.with_result(KERNEL, "protocol", new).of(KERNEL)["protocol"] == new
    # What GPUs did stays done, whoever reads the records.
    assert hardware.RUNG.checker is None
    ran = hardware.result_of(KERNEL, [_record()])
    assert ran is not None
    assert Evidence().with_result(KERNEL, "hardware", ran).of(KERNEL)["hardware"] == ran


def test_a_tool_that_is_not_installed_makes_no_evidence_stale(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A machine that only lists the evidence need not have the tools that made it."""
    assert {name for name in RUNGS if RUNGS[name].checker is None} == {"hardware"}
    monkeypatch.setattr(rung, "installed_version", lambda distribution: None)
    assert protocol.RUNG.present_checker() == "protocol 1"
    assert protocol.RUNG.is_present("protocol 1, sentryward 0.1.1")
    assert not protocol.RUNG.is_present("protocol 0, sentryward 0.1.1")


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


def test_a_result_that_shows_nothing_says_why() -> None:
    with pytest.raises(ValueError, match="says why"):
        Result(status="not run")
    with pytest.raises(ValueError, match="expected one of"):
        Result(status="ok")
    with pytest.raises(ValueError, match="rung: expected one of"):
        Evidence().with_result(KERNEL, "proved", PASSED)


def _entry_text(rung: str, result: dict) -> str:
    entry = {"artifact": KERNEL.key, "cubin_sha256": "0" * 64, "ptx_sha256": "1" * 64}
    document = {"schema_version": 1, "evidence": [entry | {"rungs": {rung: result}}]}
    return json.dumps(document)


FULL_PASS = {"status": "passed", "scope": "full"}


@pytest.mark.parametrize(
    ("text", "place"),
    [
        ("{", r"\$: not valid JSON"),
        ("[]", r"\$: expected an object"),
        ('{"schema_version": 2, "evidence": []}', "schema_version: expected 1"),
        ('{"schema_version": 1}', "evidence: missing"),
        ('{"schema_version": 1, "evidence": [{"artifact": "a"}]}', r"evidence\[0\]\.\w+: missing"),
        (_entry_text("lint", FULL_PASS | {"status": "ok"}), r"rungs\.lint\.status: expected one"),
        (_entry_text("lint", {"scope": "full"}), r"rungs\.lint\.status: missing"),
        (_entry_text("proved", FULL_PASS), 'rungs: unknown key "proved"'),
        (_entry_text("hardware", FULL_PASS), "hardware passed without its records"),
        (
            _entry_text(
                "hardware",
                {"status": "failed", "scope": "full", "reason": "x"}
                | {"figures": {"records": [{"cases": 3, "failed": []}]}},
            ),
            r"records\[0\]\.gpu: missing",
        ),
    ],
)
def test_an_unreadable_evidence_file_is_an_error_and_not_no_evidence(
    tmp_path: Path, text: str, place: str
) -> None:
    path = tmp_path / "evidence.json"
    path.write_text(text)
    with pytest.raises(EvidenceError, match=rf"evidence\.json: .*{place}") as caught:
        read_evidence(path)
    # To delete it would lose what GPUs did.
    assert "restore it with git" in str(caught.value)
    assert "delete" not in str(caught.value)


ADD_ONE = """
import sys
from pathlib import Path
from conftest import topk_kernel
from dataclasses import replace
from build_kernels.evidence.result import Result
from build_kernels.evidence.store import update_evidence
path, number = Path(sys.argv[1]), int(sys.argv[2])
for step in range(40):
    kernel = replace(topk_kernel(), cubin_sha256=f"{number * 1000 + step:064d}")
    add = lambda known: known.with_result(kernel, "lint", Result(status="passed"))
    update_evidence(path, add)
"""


def test_two_runs_on_one_folder_keep_what_both_found(tmp_path: Path) -> None:
    folder = tmp_path / "artifacts"
    folder.mkdir()
    path = folder / "evidence.json"
    runs = [
        subprocess.Popen(
            [sys.executable, "-c", ADD_ONE, str(path), str(number)],
            env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
        )
        for number in (1, 2, 3)
    ]
    assert [run.wait(timeout=60) for run in runs] == [0, 0, 0]
    assert len(read_evidence(path).entries) == 3 * 40
    assert [item.name for item in folder.iterdir()] == ["evidence.json"]


# ---------------------------------------------------------------- structure


def test_a_kernel_as_built_passes_the_structure_rung(topk: Artifact) -> None:
    result = structure.climb(topk, quick=True)
    assert (result.status, result.reason) == ("passed", "")
    assert result.figures["registers"] == topk.kernel.resources.registers
    assert result.figures["local_memory_instructions"] == 0
    assert result.figures["paired_instructions"]["griddepcontrol.wait"] == 1


def _spoiled(topk: Artifact, what: str) -> Artifact:
    kernel = topk.kernel
    if what == "registers":
        resources = replace(kernel.resources, registers=7)
        return replace(topk, kernel=replace(kernel, resources=resources))
    if what == "cubin sha256":
        return replace(topk, cubin=topk.cubin + b"\0")
    if what == "PTX .target":
        return replace(topk, ptx=topk.ptx.replace("sm_100a", "sm_103a"))
    if what == "ELF compute capability":
        return replace(topk, kernel=replace(kernel, arch="sm_103a"))
    if what == "parameters in .nv.info":
        return replace(topk, kernel=replace(kernel, parameters=kernel.parameters[:-1]))
    if what == "symbol":
        return replace(topk, kernel=replace(kernel, symbol="another"))
    if what == "opcode counts":
        resources = replace(kernel.resources, opcodes=dict(kernel.resources.opcodes, LDG=1))
        return replace(topk, kernel=replace(kernel, resources=resources))
    wait = re.search(r"griddepcontrol\.wait;", topk.ptx)
    assert what == "griddepcontrol.wait"
    assert wait is not None
    return replace(topk, ptx=topk.ptx.replace(wait.group(), ""))


@pytest.mark.parametrize(
    "what",
    [
        "registers",
        "cubin sha256",
        "PTX .target",
        "ELF compute capability",
        "parameters in .nv.info",
        "symbol",
        "opcode counts",
        "griddepcontrol.wait",
    ],
)
def test_the_structure_rung_names_what_differs(topk: Artifact, what: str) -> None:
    result = structure.climb(_spoiled(topk, what), quick=True)
    assert result.status == "failed"
    assert what in result.reason


def test_a_disassembler_that_hangs_is_not_run_and_not_failed(
    topk: Artifact, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    slow = tmp_path / "nvdisasm"
    slow.write_text("#!/bin/sh\nexec sleep 60\n")
    slow.chmod(0o755)
    monkeypatch.setattr(structure.nvdisasm, "wheel_file", lambda *_: slow)
    monkeypatch.setattr(structure.nvdisasm, "TIMEOUT_SECONDS", 0.2)
    result = structure.climb(topk, quick=True)
    assert (result.status, result.applies) == ("not run", True)
    assert "nvdisasm took more than" in result.reason


def test_a_missing_disassembler_is_not_run_and_an_unreadable_cubin_failed(
    topk: Artifact, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever the words of the error are."""
    broken = replace(topk, cubin=b"is missing: it comes with the wheel")
    assert structure.climb(broken, quick=True).status == "failed"

    def missing(*_: str) -> Path:
        raise structure.ToolError("no such tool")

    monkeypatch.setattr(structure.nvdisasm, "wheel_file", missing)
    assert structure.climb(topk, quick=True).status == "not run"
    monkeypatch.setattr(structure.nvdisasm, "wheel_file", lambda *_: Path(__file__))
    result = structure.climb(topk, quick=True)
    assert (result.status, "not executable" in result.reason) == ("not run", True)


def test_ptx_instructions_are_counted_with_their_modifiers() -> None:
    ptx = """
.target sm_100a
.visible .entry k(.param .align 64 .b8 k_param_0[128], .param .u64 .ptr .global .align 4 k_param_1,
    .param .f32 k_param_2)
{   .reg .pred %p<3>;  // tcgen05.mma in a comment
    @%p1 tcgen05.mma.cta_group::1.kind::f16 [%r1], %rd1, %rd2, %r2, %p2;
    @!%p1 bra $L__BB0_1;
    { mbarrier.try_wait.parity.shared.b64 P1, [%r1], %r2; @P1 bra DONE; }
$L__BB0_1: tcgen05.mma.cta_group::1.kind::f16 [%r1], %rd1, %rd2, %r2, %p2;
    ret;
}"""
    counts = count_opcodes(ptx)
    assert counts["tcgen05.mma.cta_group::1.kind::f16"] == 2
    assert counts["mbarrier.try_wait.parity.shared.b64"] == 1
    symbol, parameters = read_entry(ptx)
    assert symbol == "k"
    assert [(p.type, p.size) for p in parameters] == [("b8", 128), ("u64", 8), ("f32", 4)]


# ---------------------------------------------------------------- lint

OUTPUT = """\x1b[93mwarning[W0015]:\x1b[0m tcgen05.dealloc is not ordered

  --> kernel.py:69:12
      in function `\x1b[92m{function}\x1b[0m(...)`:
   |
  \x1b[93mwarning:\x1b[0m More words about it.
\x1b[93mremark[R0001]:\x1b[0m something without a place
"""


def test_diagnostics_are_read_with_code_and_function() -> None:
    first, second = lint.parse_diagnostics(OUTPUT.format(function="free_accumulator"))
    assert (first.code, first.function) == ("W0015", "free_accumulator")
    assert first.message == "tcgen05.dealloc is not ordered"
    assert (second.code, second.function) == ("R0001", "")


def test_a_diagnostic_without_an_explanation_fails() -> None:
    (known, _) = lint.parse_diagnostics(OUTPUT.format(function="free_accumulator"))
    assert lint.judge(()).status == "passed"
    explained = lint.judge((known,))
    assert explained.status == "passed"
    assert "named barrier" in explained.assumptions[0]
    elsewhere = replace(known, function="issue_mma")
    assert lint.judge((known, elsewhere)).status == "failed"
    assert "issue_mma" in lint.judge((known, elsewhere)).reason


def test_what_an_explanation_rests_on_is_there() -> None:
    """W0015's backing is a mutant that two rungs reject."""
    pytest.importorskip("numpy", reason="needs the extra `verify`")
    from build_kernels.mutants.faults import MUTANTS

    (explanation,) = lint.EXPLANATIONS
    (named,) = (mutant for mutant in MUTANTS if f"mutant '{mutant.name}'" in explanation.reason)
    assert set(named.rejected_by) == {"emulated", "protocol"}


def test_the_lint_rung_refuses_sources_that_do_not_make_the_artifact(tmp_path: Path) -> None:
    pytest.importorskip("cutlass", reason="needs dsv4-router-builder")
    kernel = decode_kernel("sm_100a")
    result = lint.climb(
        Artifact(kernel=kernel, cubin_path=tmp_path / "x", cubin=b"", ptx="another kernel"),
        quick=True,
    )
    assert result.status == "failed"
    assert "do not compile to the artifact's PTX" in result.reason


# ---------------------------------------------------------------- protocol


def test_the_input_names_every_integer_and_every_tensor_map() -> None:
    kernel = decode_kernel("sm_100a", "emajor", 32)
    sizes = {"tensor_map": "b8", "pointer": "u64", "int32": "u32", "float32": "f32"}
    declared = ",".join(
        f".param .{sizes[p.kind]} p{i}" + ("[128]" if p.kind == "tensor_map" else "")
        for i, p in enumerate(kernel.parameters)
    )
    case = protocol.ProofCase(num_tokens=6, num_experts=132, top_k=4, k=2048)
    given = protocol.kernel_input(kernel, f".visible .entry k({declared})\n{{ ret; }}", case, {})
    by_index = {item["parameter"]: item["value"] for item in given["arguments"]}
    named = {kernel.parameters[index].name: value for index, value in by_index.items()}
    assert named["num_k_blocks"] == 32
    assert named["num_experts"] == 132
    assert named["out_ids_stride"] == 4
    assert given["launch"]["grid_dim"] == [16, 3, 1]
    w_map, x_map = given["tma_descriptors"]
    assert (w_map["global_shape"], w_map["global_strides_bytes"]) == ([132, 2048], [272])
    assert (x_map["global_shape"], x_map["box_shape"]) == ([64, 6, 32], [64, 32, 2])


def test_a_rewrite_that_finds_nothing_is_an_error() -> None:
    assert protocol.rewritten("x.collector::a::discard", (protocol.NO_COLLECTOR,)) == "x"
    with pytest.raises(protocol.ProtocolError, match="matches nothing"):
        protocol.rewritten("x", (protocol.NO_COLLECTOR,))


def test_full_decode_cases_wrap_every_ring_twice_and_reach_the_tile() -> None:
    for tile in (8, 32, 64):
        kernel = decode_kernel("sm_100a", "kmajor", tile)
        cases = protocol.decode_cases(kernel, quick=False)
        blocks = [case.k // 64 // 16 for case in cases]
        assert max(blocks) > 2 * 8
        assert {case.num_tokens for case in cases} >= {tile}
        assert any(case.num_tokens < tile for case in cases)
        assert any(case.num_experts % 64 for case in cases)


def test_sentryward_proves_topk_and_finds_its_missing_barrier(topk: Artifact) -> None:
    pytest.importorskip("sentryward", reason="needs the extra `verify`")
    proven = protocol.climb(topk, quick=True)
    assert (proven.status, proven.reason) == ("passed", "")
    assert any("sampled winners" in text for text in proven.assumptions)
    text, count = re.subn(r"bar\.warp\.sync\s+-1;", "", topk.ptx)
    assert count
    faulty = protocol.climb(replace(topk, ptx=text), quick=True)
    assert faulty.status == "failed"
    assert "potential_race" in faulty.reason


def test_without_sentryward_the_rung_is_not_run(
    topk: Artifact, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "sentryward", None)
    result = protocol.climb(topk, quick=True)
    assert result.status == "not run"
    assert "it comes with `pip install 'dsv4-router-builder[verify]'`" in result.reason
    assert result.applies


def test_out_of_time_is_not_run_and_not_failed(
    topk: Artifact, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("sentryward", reason="needs the extra `verify`")
    monkeypatch.setattr(protocol, "TIMEOUT_SECONDS", 1e-3)
    result = protocol.climb(topk, quick=True)
    assert result.status == "not run"
    assert "timeout" in result.reason


def test_wgmma_is_beyond_the_protocol_rung(topk: Artifact) -> None:
    ptx = topk.ptx.replace("ret;", "wgmma.fence.sync.aligned; ret;")
    result = protocol.climb(replace(topk, ptx=ptx), quick=True)
    assert (result.status, result.applies) == ("not run", False)


# ---------------------------------------------------------------- hardware


def _record(kernel=KERNEL, **changed) -> hardware.Record:
    facts = {
        "artifact": kernel.key,
        "cubin_sha256": kernel.cubin_sha256,
        "ptx_sha256": kernel.ptx_sha256,
        "gpu": "NVIDIA H200",
        "arch": kernel.arch,
        "driver": "580.0",
        "date": "2026-01-31",
        "cases": {"test_models": 24, "test_ties": 8},
    }
    return hardware.Record(**{**facts, **changed})


def test_records_are_appended_and_read_back(tmp_path: Path) -> None:
    path = tmp_path / "record.json"
    records = (_record(), _record(gpu="NVIDIA H100", failed=("test_ties[1]",)))
    for record in records:
        hardware.append_record(path, record)
    assert hardware.read_records(path) == records
    for damaged in (
        '{"schema_version": 2, "records": [{"gpu": "H200"}]}',
        '{"schema_version": 2, "records": [{"gpu": "H200", "cases": ["a"], "failed": []}]}',
        '{"schema_version": 1, "records": []}',
    ):
        path.write_text(damaged)
        with pytest.raises(EvidenceError, match=r"not a file of GPU test records|expected 2"):
            hardware.read_records(path)


def test_a_record_validates_its_own_bytes_only() -> None:
    result = hardware.result_of(KERNEL, [_record()])
    assert result is not None
    assert result.figures["cases"] == 32, "cases are summed, not the tests that ran them"
    evidence = Evidence().with_result(KERNEL, "hardware", result)
    assert validated_on(evidence, KERNEL) == "NVIDIA H200"
    assert validated_on(evidence, replace(KERNEL, cubin_sha256="f" * 64)) == "nowhere"
    assert hardware.result_of(replace(KERNEL, ptx_sha256="f" * 64), [_record()]) is None
    failed = hardware.result_of(KERNEL, [_record(), _record(failed=("test_models[1]",))])
    assert failed is not None
    assert (failed.status, failed.reason) == ("failed", "test_models[1]")
    assert validated_on(Evidence().with_result(KERNEL, "hardware", failed), KERNEL) == "nowhere"


@pytest.mark.parametrize(
    ("changed", "records", "cases"),
    [
        # The same run told twice, and a part of it run again: nothing is counted twice.
        ({}, 1, 32),
        ({"cases": {"test_ties": 8, "test_graphs": 5}}, 1, 37),
        ({"date": "2026-02-01"}, 2, 64),
        ({"gpu": "NVIDIA H100"}, 2, 64),
        ({"driver": "590.0"}, 2, 64),
    ],
)
def test_records_add_up(changed: dict, records: int, cases: int) -> None:
    first = hardware.result_of(KERNEL, [_record()])
    both = hardware.result_of(KERNEL, [_record(**changed)], first)
    assert both is not None
    assert len(both.figures["records"]) == records
    assert both.figures["cases"] == cases
    assert hardware.result_of(KERNEL, [_record(), _record(**changed)]) == both


def test_cases_are_counted_by_what_was_launched() -> None:
    tally = Tally()
    tally.launched("a")
    tally.launched("b")
    tally.end("test_one", "test_one[1]", failed=False)
    for artifact in ("a", "a", "b"):
        tally.launched(artifact)
        tally.count()
    tally.launched("a")  # no case of its own: the test counts
    tally.launched("c")
    tally.end("test_many", "test_many[2]", failed=True)
    tally.launched("a")  # by a fixture's teardown
    tally.forget()
    tally.end("test_nothing", "test_nothing", failed=True)
    tally.launched("a")
    tally.count(9)
    tally.end("test_one", "test_one[2]", failed=False)
    assert tally.cases == {
        "a": {"test_one": 10, "test_many": 2},
        "b": {"test_one": 1, "test_many": 1},
        "c": {"test_many": 1},
    }
    assert tally.failed == {artifact: {"test_many[2]"} for artifact in "abc"}


def test_a_failure_on_record_stays_visible() -> None:
    first = hardware.result_of(KERNEL, [_record(failed=("test_ties[2]",))])
    for later in (_record(), _record(date="2026-02-01"), _record(gpu="NVIDIA H100")):
        again = hardware.result_of(KERNEL, [later], first)
        assert again is not None
        assert (again.status, again.reason) == ("failed", "test_ties[2]")


def test_a_record_of_before_there_were_counts_is_kept() -> None:
    old = {"gpu": "NVIDIA H200", "driver": "580.0", "date": "2026-01-31", "cases": 24, "failed": []}
    stored = Result(status="passed", figures={"records": [old], "cases": ["test_models: 24"]})
    both = hardware.result_of(KERNEL, [_record()], stored)
    assert both is not None
    assert old in both.figures["records"]
    assert both.figures["cases"] == 24 + 32


# ---------------------------------------------------------------- the climb and the command


def _call(*arguments: str | Path):
    return CliRunner().invoke(verify_command, [str(argument) for argument in arguments])


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


def test_a_rung_asked_for_and_not_run_is_a_failure(artifacts: Path) -> None:
    result = _call("--artifacts", artifacts, "--rung", "hardware")
    assert result.exit_code == 1
    assert "router_topk.sm_100a hardware" in result.stderr
    lint_result = _call("--artifacts", artifacts, "--rung", "lint")
    assert lint_result.exit_code == 0, "the lint rung does not apply to a CUDA kernel"


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


def test_a_gpu_record_is_merged_and_a_stale_one_refused(artifacts: Path, tmp_path: Path) -> None:
    kernel = load_artifact(artifacts, "router_topk.sm_100a").kernel
    good, stale = tmp_path / "good.json", tmp_path / "stale.json"
    hardware.append_record(good, _record(kernel))
    hardware.append_record(stale, _record(kernel, cubin_sha256="f" * 64))
    refused = _call("--artifacts", artifacts, "--rung", "hardware", "--record", stale)
    assert refused.exit_code == 1
    assert "stale" in refused.stderr
    elsewhere = tmp_path / "elsewhere.json"
    hardware.append_record(elsewhere, _record(kernel, arch="sm_90a"))
    impossible = _call("--artifacts", artifacts, "--rung", "hardware", "--record", elsewhere)
    assert impossible.exit_code == 1
    assert "where a cubin for sm_100a cannot load" in impossible.stderr
    merged = _call("--artifacts", artifacts, "--rung", "hardware", "--record", good)
    assert merged.exit_code == 0, merged.stderr
    assert "NVIDIA H200, 32 cases" in merged.stdout
    second = tmp_path / "second.json"
    hardware.append_record(second, _record(kernel, date="2026-02-01"))
    again = _call("--artifacts", artifacts, "--rung", "structure", "--record", second, "--json")
    assert again.exit_code == 0, again.stderr
    (row,) = (row for row in json.loads(again.stdout) if row["rung"] == "hardware")
    assert [run["date"] for run in row["figures"]["records"]] == ["2026-01-31", "2026-02-01"]


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
    folder = tmp_path / "artifacts"
    run_build(folder, make_plan(folder, ["router_topk"], ["sm_90a", "sm_100a"]), jobs=2)
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
        assert "has none of the kernels asked for; it has router_topk.sm_100a" in result.stderr


def _read_only(path: Path, change: object) -> Evidence:
    raise OSError(errno.EROFS, os.strerror(errno.EROFS), str(path))


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
    hardware.append_record(record, _record(load_artifact(artifacts, TOPK_KEY).kernel))
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
    ran = hardware.result_of(kernel, [_record(kernel, gpu="[/red] [bold]H200")])
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

    monkeypatch.setitem(RUNGS, "structure", replace(structure.RUNG, climb=refused))
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


def test_a_record_without_cases_is_refused(tmp_path: Path) -> None:
    hardware.append_record(tmp_path / "record.json", _record(cases={}))
    with pytest.raises(EvidenceError, match="names no case"):
        hardware.read_records(tmp_path / "record.json")


def test_every_artifact_gets_every_rung(tmp_path: Path) -> None:
    folder = tmp_path / "artifacts"
    run_build(folder, make_plan(folder, ["router_topk"], ["sm_90a", "sm_100a"]), jobs=2)
    outcomes = verify(folder, rungs=["structure"], jobs=2)
    names = [item.artifact for item in outcomes[:: len(RUNGS)]]
    assert names == ["router_topk.sm_100a", "router_topk.sm_90a"]
    assert len(outcomes) == 2 * len(RUNGS)
    assert [item.rung for item in outcomes if item.climbed] == ["structure"] * 2
    only = verify(folder, archs=["sm_90a"], rungs=["lint"])
    assert {item.artifact for item in only} == {"router_topk.sm_90a"}
    assert {item.rung: item.result.status for item in only}["structure"] == "passed"


def test_a_stop_does_not_wait_for_the_workers(artifacts: Path) -> None:
    """The full emulated rung of router_topk takes tens of seconds."""
    pytest.importorskip("torch")
    code = "from build_kernels.evidence import verify_command as c; c()"
    options = ["--artifacts", str(artifacts), "--rung", "emulated"]
    process = subprocess.Popen(
        [sys.executable, "-c", code, *options], stderr=subprocess.PIPE, start_new_session=True
    )
    time.sleep(4)
    process.terminate()
    _, stderr = process.communicate(timeout=10)
    assert process.returncode == 130
    assert b"what was found so far is kept" in stderr


def test_importing_the_package_is_cheap() -> None:
    """`list` asks it for the evidence: no torch, no DSL, no emulator."""
    code = (
        "import sys, build_kernels.evidence;"
        "print([m for m in ('torch', 'cutlass', 'sentryward', 'numpy') if m in sys.modules])"
    )
    process = subprocess.run([sys.executable, "-c", code], capture_output=True, check=True)
    assert process.stdout.strip() == b"[]"


def test_the_lint_rung_knows_every_dsl_kernel() -> None:
    names = {spec.name for spec in KERNELS}
    assert {kernel.name for kernel in sample_manifest().kernels} <= names
    assert compilers.NVRTC_OPTIONS, "the CUDA kernels are compiled by NVRTC, not linted"


def test_one_climb_serves_ptx_that_differs_in_its_target_alone(tmp_path: Path) -> None:
    pytest.importorskip("sentryward", reason="needs the extra `verify`")
    folder = tmp_path / "artifacts"
    run_build(folder, make_plan(folder, ["router_topk"], ["sm_100a", "sm_103a"]), jobs=2)
    first, twin = (load_artifact(folder, f"router_topk.sm_{n}a") for n in (100, 103))
    assert without_target(first.ptx) == without_target(twin.ptx)
    assert without_target(first.ptx) != without_target(first.ptx.replace("ret;", "trap;"))
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


# ---------------------------------------------------------------- emulated


@pytest.mark.parametrize("kind", ["integers", "ties", "biased", "extreme", "low", "nan"])
def test_inputs_are_exact_and_reproducible(topk: Artifact, kind: str) -> None:
    pytest.importorskip("torch")
    for kernel, k in ((topk.kernel, 0), (decode_kernel("sm_100a", "emajor"), 1024)):
        case = Case(num_tokens=3, num_experts=70, top_k=4, k=k, kind=kind)
        first, again = (make_inputs(kernel, case) for _ in range(2))
        for name, tensor in first.tensors.items():
            assert tensor.tobytes() == again.tensors[name].tobytes()
        assert first.ids.shape == (3, 4)
        if kind == "ties":
            assert first.ids.tolist() == [[0, 1, 2, 3]] * 3


@pytest.mark.parametrize("name", ["out_weights", "out_ids"])
def test_a_store_beside_either_output_is_a_problem(topk: Artifact, name: str) -> None:
    np = pytest.importorskip("numpy")
    pytest.importorskip("torch")
    inputs = make_inputs(topk.kernel, Case(num_tokens=3, num_experts=70, top_k=4))
    beside = {
        "out_weights": np.full((3, emulated.WEIGHT_CANARIES), emulated.CANARY_FLOAT),
        "out_ids": np.full((3, emulated.ID_CANARIES), emulated.CANARY_INT),
    }
    right = {"out_weights": inputs.weights, "out_ids": inputs.ids}

    def problems() -> list[str]:
        memory = {each: np.hstack([right[each], beside[each]]) for each in right}
        return emulated.against_reference(inputs, memory)[0]

    assert problems() == []
    beside[name][2, -1] = 0
    assert problems() == ["something was written beside the outputs"]


def _named(topk: Artifact, name: str) -> str:
    """A parameter of router_topk as the PTX's loads write it."""
    (index,) = (i for i, item in enumerate(topk.kernel.parameters) if item.name == name)
    return f"[router_topk_param_{index}]"


def test_the_emulated_rung_passes_topk_and_names_what_is_wrong(topk: Artifact) -> None:
    pytest.importorskip("torch")
    pytest.importorskip("build_kernels.emulator")
    result = emulated.climb(topk, quick=True)
    assert (result.status, result.reason) == ("passed", "")
    cases = topk_cases(topk.kernel, quick=True)
    assert result.figures["runs"] == len(cases) * len(emulated.QUICK_SCHEDULES)
    # The weights are multiplied by gate_temp, which is 1, instead of the scale.
    scale, one = (_named(topk, name) for name in ("routed_scaling_factor", "gate_temp"))
    assert scale in topk.ptx
    wrong = emulated.climb(replace(topk, ptx=topk.ptx.replace(scale, one)), quick=True)
    assert wrong.status == "failed"
    assert "a weight is off" in wrong.reason


def test_the_emulated_rung_tells_the_outputs_strides_apart(topk: Artifact) -> None:
    pytest.importorskip("torch")
    one, other = (_named(topk, f"{name}_stride") for name in ("out_weights", "out_ids"))
    assert one in topk.ptx
    assert other in topk.ptx
    swapped = topk.ptx.replace(one, "[it]").replace(other, one).replace("[it]", other)
    result = emulated.climb(replace(topk, ptx=swapped), quick=True)
    assert result.status == "failed"
    assert "ids" in result.reason


def test_the_emulated_rung_sees_the_denominators_epsilon(topk: Artifact) -> None:
    """1e-20 left out: all scores are near 1e-22."""
    pytest.importorskip("torch")
    assert "0f1E3CE508" in topk.ptx
    text = topk.ptx.replace("0f1E3CE508", "0f00000000")
    result = emulated.climb(replace(topk, ptx=text), quick=True)
    assert result.status == "failed"
    assert "a weight is off" in result.reason


@pytest.mark.parametrize("kernel", [*sample_manifest().for_arch("sm_100a")], ids=lambda k: k.name)
@pytest.mark.parametrize("quick", [True, False])
def test_every_case_is_one_that_its_kernel_takes(kernel: Any, quick: bool) -> None:
    for case in cases_of(kernel, quick=quick):
        assert case.num_tokens in kernel.problem.num_tokens, str(case)


def test_decode_cases_are_those_that_the_evidence_promises() -> None:
    cases = [
        case
        for layout in ("kmajor", "emajor")
        for tile in (8, 32, 64)
        for case in decode_cases(decode_kernel("sm_100a", layout, tile), quick=False)
    ]
    assert len(cases) >= 20
    assert {case.num_tokens for case in cases} >= {1, 6, 7, 16, 64}
    assert len({case.k for case in cases}) >= 2
    assert any(case.num_experts % 64 for case in cases)
    assert len(emulated.FULL_SCHEDULES) >= 5


# What the artifact's manifest may have wrong, and the word of the error that names it.
MISFITS = {
    "block": {"block": (64, 1, 1)},
    "cluster": {"cluster": (8, 1, 1)},
    "grid": {"grid": ("k_splits", 1, 1)},
    "token_tile": {"token_tile": 64},
    "dynamic_shared_bytes": {"dynamic_shared_bytes": 50_000},
}


@pytest.fixture(scope="module")
def dsl_artifacts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A decode kernel and the hash kernel, really built: seconds."""
    pytest.importorskip("cutlass", reason="needs dsv4-router-builder")
    pytest.importorskip("torch")
    folder = tmp_path_factory.mktemp("dsl") / "artifacts"
    names = ["router_decode_kmajor_n8", "router_hash"]
    run_build(folder, make_plan(folder, names, ["sm_100a"]), jobs=2)
    return folder


@pytest.fixture
def decode(dsl_artifacts: Path) -> Artifact:
    return load_artifact(dsl_artifacts, "router_decode_kmajor_n8.sm_100a")


@pytest.fixture
def hashed(dsl_artifacts: Path) -> Artifact:
    return load_artifact(dsl_artifacts, "router_hash.sm_100a")


def test_the_hash_kernel_gives_the_tables_experts(
    hashed: Artifact, monkeypatch: pytest.MonkeyPatch
) -> None:
    case = Case(num_tokens=9, num_experts=60, top_k=6, k=1024)
    monkeypatch.setattr(emulated, "cases_of", lambda kernel, quick: (case,))
    inputs = make_inputs(hashed.kernel, case)
    table, tokens = inputs.tensors["tid2eid"], inputs.tensors["input_ids"]
    assert inputs.ids.tolist() == table[tokens].tolist()
    result = emulated.climb(hashed, quick=True)
    assert (result.status, result.reason) == ("passed", "")
    # A row of the table is taken to be one expert long.
    text, count = re.subn(r"(mad\.lo\.s64 \t%rd\d+, %rd\d+, )%rd\d+, (%rd\d+);", r"\g<1>1, \2;",
                          hashed.ptx)  # fmt: skip
    assert count
    wrong = emulated.climb(replace(hashed, ptx=text), quick=True)
    assert wrong.status == "failed"
    assert "ids are wrong" in wrong.reason


def test_what_sentryward_is_told_of_the_hash_kernel(hashed: Artifact) -> None:
    (case,) = protocol.hash_cases(hashed.kernel, quick=True)
    given = protocol.kernel_input(hashed.kernel, hashed.ptx, case, {})
    names = {
        hashed.kernel.parameters[item["parameter"]].name: item["value"]
        for item in given["arguments"]
    }
    assert (names["w_stride"], names["vocab_size"]) == (case.k, VOCABULARY)
    text = protocol.rewritten(hashed.ptx, case.rewrites)
    assert "ld.global.s32" not in text
    loads = re.findall(r"ld\.param\.b64\s+%rd\d+, \[router_hash_0_param_(\d+)\];", text)
    read = {hashed.kernel.parameters[int(index)].name for index in loads}
    assert read == {"w_gate", "tid2eid", "input_ids", "out_weights", "out_ids"}


def _refusal(artifact: Artifact, kernel, monkeypatch, inputs=None) -> str:
    """What a run of this kernel says before anything was emulated."""
    from build_kernels.emulator import LaunchError, Schedule
    from build_kernels.emulator.execution.machine import Machine

    monkeypatch.setattr(Machine, "run", lambda machine: pytest.fail("the emulation began"))
    case = Case(num_tokens=7, num_experts=100, top_k=6, k=1024)
    inputs = inputs or make_inputs(kernel, case)
    with pytest.raises(LaunchError) as caught:
        emulated.run(kernel, artifact.ptx, inputs, Schedule())
    return str(caught.value)


@pytest.mark.parametrize("what", MISFITS)
def test_a_launch_that_does_not_fit_is_refused_before_it_starts(
    decode: Artifact, what: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    kernel = replace(decode.kernel, launch=replace(decode.kernel.launch, **MISFITS[what]))
    assert f"launch.{what}" in _refusal(decode, kernel, monkeypatch)
    monkeypatch.undo()
    result = emulated.climb(replace(decode, kernel=kernel), quick=True)
    assert result.status == "failed"
    assert "refused: " in result.reason


def test_half_a_box_is_refused_before_it_starts(
    decode: Artifact, monkeypatch: pytest.MonkeyPatch
) -> None:
    first, *others = decode.kernel.parameters
    assert first.tensor_map is not None
    width, height = first.tensor_map.box
    half = replace(first, tensor_map=replace(first.tensor_map, box=(width, height // 2)))
    kernel = replace(decode.kernel, parameters=(half, *others))
    assert "parameters.w_map.tensor_map" in _refusal(decode, kernel, monkeypatch)


@pytest.mark.parametrize("name", ["e_bias", "W_gate", "hidden_states"])
def test_an_array_of_another_shape_is_refused_before_it_starts(
    decode: Artifact, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    case = Case(num_tokens=7, num_experts=100, top_k=6, k=1024)
    inputs = make_inputs(decode.kernel, case)
    short = inputs.tensors[name][:-1]
    inputs = replace(inputs, tensors={**inputs.tensors, name: short})
    message = _refusal(decode, decode.kernel, monkeypatch, inputs)
    assert f"{name}: expected the shape" in message


@pytest.mark.parametrize(
    ("what", "changed"),
    [("num_tokens", {"num_tokens": 17}), ("num_experts", {"num_experts": 513}), ("k", {"k": 100})],
)
def test_a_case_out_of_range_is_refused(decode: Artifact, what: str, changed: dict) -> None:
    from build_kernels.emulator import LaunchError

    case = Case(num_tokens=7, num_experts=100, top_k=6, k=1024)
    emulated.check_fit(decode.kernel, decode.ptx, case)
    with pytest.raises(LaunchError, match=rf"{what}: expected"):
        emulated.check_fit(decode.kernel, decode.ptx, replace(case, **changed))


def test_a_ptx_file_of_another_target_is_refused(
    decode: Artifact, monkeypatch: pytest.MonkeyPatch
) -> None:
    kernel = replace(decode.kernel, arch="sm_90a")
    assert "the PTX is for .target sm_100a" in _refusal(decode, kernel, monkeypatch)
