"""Evidence on file: what stays and what goes stale. Files by other hands: an answer or an error."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from click.testing import CliRunner
from conftest import topk_kernel
from watchdog import ends_within

from build_kernels.evidence.document import EvidenceError
from build_kernels.evidence.result import Result, not_run
from build_kernels.evidence.rungs import RUNGS, hardware, lint, protocol, rung
from build_kernels.evidence.rungs.hardware import Record, append_record, read_records, result_of
from build_kernels.evidence.rungs.rung import Checker
from build_kernels.evidence.store import (
    Evidence,
    read_evidence,
    standing,
    validated_on,
    write_evidence,
)
from build_kernels.evidence.table import cell
from dsv4_router_runtime.artifacts.evidence import read_summary
from dsv4_router_runtime.artifacts.folder import EVIDENCE_NAME
from dsv4_router_runtime.artifacts.json_reader import MAX_DEPTH, JsonNode

KERNEL = topk_kernel()
RUN = {"gpu": "NVIDIA H200", "cases": 3, "failed": []}
RECORD = {
    "artifact": KERNEL.key,
    "cubin_sha256": KERNEL.cubin_sha256,
    "ptx_sha256": KERNEL.ptx_sha256,
    "gpu": "NVIDIA H200",
    "arch": "sm_90a",
    "driver": "580.0",
    "date": "2026-01-31",
    "cases": {"test_models[n8-K=64]": 24, "test_ties": 8},
    "failed": [],
}
# By the present checker of the rung that most results here are of.
CHECKER = protocol.RUNG.present_checker()
PASSED = Result(
    status="passed",
    figures={"launches": 3},
    assumptions=("one launch at a time",),
    checker=CHECKER,
)
QUICK = replace(PASSED, scope="quick")
FAILED = Result(status="failed", reason="a race", checker=CHECKER)


def record_of(kernel=KERNEL, **changed) -> Record:
    """A record of the test run RECORD for the bytes of `kernel`."""
    own = {
        "artifact": kernel.key,
        "cubin_sha256": kernel.cubin_sha256,
        "ptx_sha256": kernel.ptx_sha256,
        "arch": kernel.arch,
    }
    return Record(**{**RECORD, "failed": (), **own, **changed})


def entry_text(rung="lint", **result) -> str:
    """An evidence file of one entry with one result, as JSON."""
    entry = {name: RECORD[name] for name in ("artifact", "cubin_sha256", "ptx_sha256")}
    entry["rungs"] = {rung: {"status": "passed", "scope": "full", **result}}
    return json.dumps({"schema_version": 1, "evidence": [entry]})


def evidence_of(tmp_path: Path, text: str | bytes) -> Evidence:
    path = tmp_path / "evidence.json"
    path.write_bytes(text if isinstance(text, bytes) else text.encode("utf-8", "surrogatepass"))
    with ends_within(5):
        return read_evidence(path)


def record_text(**changed) -> str:
    return json.dumps({"schema_version": 2, "records": [{**RECORD, **changed}]})


def test_a_right_file_is_read(tmp_path):
    evidence = evidence_of(tmp_path, entry_text("hardware", figures={"records": [RUN]}))
    assert validated_on(evidence, KERNEL) == "NVIDIA H200"
    path = tmp_path / "record.json"
    path.write_text(record_text())
    assert read_records(path)[0].cases == RECORD["cases"]
    append_record(path, read_records(path)[0])
    assert len(read_records(path)) == 2


def test_a_server_reads_what_the_builder_writes(tmp_path):
    results = Evidence({}).with_result(KERNEL, "protocol", PASSED)
    write_evidence(tmp_path / EVIDENCE_NAME, results)
    found = read_summary(tmp_path).of(KERNEL)
    assert found is not None
    assert found.rungs["protocol"] == "passed"


@pytest.mark.parametrize(
    ("text", "place"),
    [
        ("{", "$: not valid JSON"),
        ("[]", "$: expected an object"),
        ('{"schema_version": 2, "evidence": []}', "schema_version: expected 1"),
        ('{"schema_version": 1}', "evidence: missing"),
        ('{"schema_version": 1, "evidence": [{"artifact": "a"}]}', "evidence[0].cubin_sha256: m"),
        (entry_text(status="ok"), "rungs.lint.status: expected one"),
        (entry_text().replace('"status": "passed", ', ""), "rungs.lint.status: missing"),
        (entry_text("proved"), 'rungs: unknown key "proved"'),
        (entry_text("hardware"), "hardware passed without its records"),
        (
            entry_text("hardware", figures={"records": [{"cases": 3, "failed": []}]}),
            "records[0].gpu: missing",
        ),
        (entry_text(checker=7), "rungs.lint.checker: expected a checker, a string of 0 to 400"),
        (entry_text(checker=None), "rungs.lint.checker: expected a checker"),
        (entry_text(checker="x" * 401), "rungs.lint.checker: expected a checker"),
        (entry_text(applies="no"), "rungs.lint.applies: expected true or false"),
        (entry_text(assumptions="none"), "rungs.lint.assumptions: expected a list of assumptions"),
        (entry_text(assumptions=[3]), "rungs.lint.assumptions[0]: expected an assumption"),
        (entry_text(reason="\ud800"), "rungs.lint.reason: expected a reason, a string of 0 to"),
        (entry_text(colour="red"), 'rungs.lint: unknown key "colour"'),
        (entry_text(status="failed"), 'rungs.lint: a result that is "failed" gives no reason'),
        (entry_text(figures=[]), "rungs.lint.figures: expected an object"),
        (entry_text(figures={"x": 10**30}), "rungs.lint.figures.x: expected an int from -92"),
        (entry_text(figures={"x": ["\ud800"]}), "rungs.lint.figures.x[0]: expected a text"),
        (entry_text(figures={"\ud800": 1}), "rungs.lint.figures: expected a key, a string"),
        (entry_text(figures={"y" * 256: 1}), "rungs.lint.figures: expected a key, a string"),
        (entry_text(figures={"x": "HERE"}).replace('"HERE"', "NaN"), "$: not valid JSON (NaN is"),
        (entry_text(figures={"x": "HERE"}).replace('"HERE"', "1e400"), "$: not valid JSON (a num"),
        (entry_text(figures={"x": "HERE"}).replace('"HERE"', "9" * 5000), "an integer of 5000"),
        (entry_text(figures={"diagnostics": 1}), "figures.explained: expected an int from 0"),
        (entry_text("structure", figures={"registers": 1}), "paired_instructions: expected an obj"),
        (entry_text("structure", figures={"registers": "1"}), "figures.registers: expected an in"),
        (entry_text("protocol", figures={"race_free": 3}), "figures.race_free: expected a list"),
        (entry_text("emulated", figures={"cases": ["a"]}), "figures.runs: expected an int from"),
        (entry_text("hardware", figures={"records": {}}), "hardware passed without its records"),
        (entry_text("hardware", figures={"records": 1}), "records: expected a list of records"),
        (entry_text("hardware", figures={"records": [RUN | {"gpu": 3}]}), "[0].gpu: expected"),
        (entry_text("hardware", figures={"records": [RUN | {"cases": "3"}]}), "[0].cases: expect"),
        (entry_text("hardware", figures={"records": [RUN | {"tests": []}]}), "[0].tests: expected"),
        (entry_text("hardware", figures={"records": [RUN | {"failed": 1}]}), "[0].failed: expect"),
        (entry_text("hardware", figures={"records": [RUN | {"arch": "x"}]}), "[0].arch: expected"),
        (entry_text().replace(KERNEL.cubin_sha256, "0"), "cubin_sha256: expected 64 lower-case"),
        (entry_text().replace(KERNEL.key, "a"), "artifact: expected a kernel and architecture"),
        ('{"schema_version": 1, "evidence": {}}', "evidence: expected a list of entries"),
        ("[" * 100_000, "$: nested too deeply to be read"),
        (b"\xff\xfe", "$: not valid JSON ('utf-8' codec"),
        ("[" + "{}," * 3_000_000 + "{}]", "$: cannot be read"),
    ],
)
def test_what_does_not_fit_says_where(tmp_path, text, place):
    if place == "$: cannot be read":
        place = "cannot be read (9000004 bytes; at most 8388608 are read)"
    with pytest.raises(EvidenceError) as caught:
        evidence_of(tmp_path, text)
    assert place in str(caught.value)
    assert "evidence.json: " in str(caught.value)
    # To delete it would lose what GPUs did.
    assert "restore it with git" in str(caught.value)
    assert "delete" not in str(caught.value)
    assert len(str(caught.value)) <= 1024 + len(str(tmp_path))


def figures_of_depth(depth: int) -> str:
    lists = depth - 1
    return entry_text(figures={"x": "HERE"}).replace('"HERE"', "[" * lists + "]" * lists)


def test_figures_may_nest_as_deep_as_any_written_so_far_and_more(tmp_path):
    evidence = evidence_of(tmp_path, figures_of_depth(MAX_DEPTH))
    assert evidence.stored(KERNEL)["lint"].figures["x"]


@pytest.mark.parametrize("depth", [MAX_DEPTH + 1, 200, 900, 5000, 100_000])
def test_figures_may_not_nest_without_end(tmp_path, depth):
    """What can be parsed but not written again would lose the file at the next result."""
    deep = figures_of_depth(depth)
    with pytest.raises(EvidenceError, match=r"nested (more than 16 deep|too deeply)"):
        evidence_of(tmp_path, deep)


@pytest.mark.parametrize("key", ["status", "lint", "artifact", "schema_version", "deep"])
def test_a_key_written_twice_is_refused(tmp_path, key):
    text = entry_text(figures={"shallow": {"deep": 1}})
    member = {
        "status": '"status": "passed"',
        "lint": '"lint": {}',
        "artifact": f'"artifact": "{KERNEL.key}"',
        "schema_version": '"schema_version": 1',
        "deep": '"deep": 1',
    }[key]
    twice = text.replace(f'"{key}":', f'{member}, "{key}":', 1)
    with pytest.raises(EvidenceError, match=f'the key "{key}" is written twice'):
        evidence_of(tmp_path, twice)


@pytest.mark.parametrize("read", [read_evidence, read_records])
def test_the_path_of_a_message_is_as_short_as_the_rest(tmp_path, read):
    with pytest.raises(EvidenceError, match="cannot be read") as caught:
        read(Path("/x" * 3000))
    assert len(str(caught.value)) <= 1024
    folder = tmp_path.joinpath(*["y" * 200] * 3)
    folder.mkdir(parents=True)
    (folder / "file.json").write_text("{")
    with pytest.raises(EvidenceError, match="not valid JSON") as caught:
        read(folder / "file.json")
    assert len(str(caught.value)) <= 1024


def test_the_same_bytes_twice_are_refused(tmp_path):
    document = json.loads(entry_text())
    document["evidence"] *= 2
    with pytest.raises(EvidenceError, match=r"evidence\[1\]: a second entry of the bytes of"):
        evidence_of(tmp_path, json.dumps(document))


@pytest.mark.parametrize(
    ("text", "place"),
    [
        (record_text(arch="x"), "records[0].arch: expected an architecture"),
        (record_text(cases={}), "names no case"),
        (record_text(cases={"test_a": 0}), "records[0].cases.test_a: expected an int from 1"),
        (record_text(cases={"test_a": True}), "records[0].cases.test_a: expected an int"),
        (record_text(cases={"a\x1b": 1}), 'records[0].cases: the key "a\\u001b" is no name'),
        (record_text(cases=["a"]), "records[0].cases: expected an object"),
        (record_text(failed=[""]), "records[0].failed[0]: expected a test, a string of 1 to 400"),
        (record_text(failed="test_a"), "records[0].failed: expected a list of tests"),
        (record_text(gpu=None), "records[0].gpu: expected a GPU's name"),
        (record_text(gpu="\udfff"), "records[0].gpu: expected a GPU's name"),
        (record_text(colour=1), 'records[0]: unknown key "colour"'),
        (record_text(cubin_sha256="x"), "records[0].cubin_sha256: expected 64 lower-case hex"),
        (record_text().replace("24", "9" * 5000), "an integer of 5000 digits"),
        (record_text().replace('"gpu"', '"date": "x", "gpu"'), 'the key "date" is written twice'),
        ("[" * 100_000, "nested too deeply"),
        ('{"schema_version": 3}', "schema_version: expected 2"),
        ("null", "expected an object"),
    ],
)
def test_a_record_file_that_does_not_fit_says_where(tmp_path, text, place):
    path = tmp_path / "record.json"
    path.write_text(text)
    with ends_within(5), pytest.raises(EvidenceError) as caught:
        read_records(path)
    assert place in str(caught.value)
    assert "not a file of GPU test records" in str(caught.value)


def test_what_no_reader_would_take_is_not_written(tmp_path):
    path = tmp_path / "evidence.json"
    good = Evidence().with_result(KERNEL, "lint", Result(status="passed"))
    write_evidence(path, good)
    deep: list = []
    for _ in range(40):
        deep = [deep]
    for figures in ({"x": float("nan")}, {"x": deep}, {"x": 2**64}, {"x" * 300: 1}):
        bad = Evidence().with_result(KERNEL, "lint", Result(status="passed", figures=figures))
        with pytest.raises(EvidenceError):
            write_evidence(path, bad)
    assert read_evidence(path) == good


def test_a_rung_is_added_in_one_place(tmp_path, monkeypatch):
    """The store, the table and `list` take a rung from the registry alone."""
    fuzzed = replace(
        lint.RUNG,
        name="fuzzed",
        checker=Checker(number=3),
        describe=lambda figures: [f"{figures['seeds']} seeds"],
        figures={"seeds": JsonNode.integer},
    )
    monkeypatch.setitem(RUNGS, "fuzzed", fuzzed)
    evidence = evidence_of(tmp_path, entry_text("fuzzed", figures={"seeds": 7}, checker="fuzzed 3"))
    assert standing(evidence, KERNEL)["fuzzed"] == "passed"
    assert cell("fuzzed", evidence.of(KERNEL)["fuzzed"]) == "passed, 7 seeds"
    stale = evidence_of(tmp_path, entry_text("fuzzed", figures={"seeds": 7}, checker="fuzzed 2"))
    assert standing(stale, KERNEL)["fuzzed"] == "not run"
    with pytest.raises(EvidenceError, match=r"figures\.seeds: expected an int"):
        evidence_of(tmp_path, entry_text("fuzzed", figures={"seeds": "7"}))


def test_the_rungs_have_one_order_in_tables_and_one_by_cost():
    assert tuple(RUNGS) == ("structure", "lint", "protocol", "emulated", "faults", "hardware")
    assert all(RUNGS[name].name == name for name in RUNGS)
    by_cost = sorted(RUNGS, key=lambda name: -RUNGS[name].cost)
    assert by_cost == ["faults", "protocol", "emulated", "lint", "structure", "hardware"]


@pytest.mark.parametrize("rung", RUNGS)
@pytest.mark.parametrize("status", ["passed", "failed", "not run"])
def test_what_was_read_can_be_shown_and_merged(tmp_path, rung, status):
    """Names in square brackets are a terminal's markup elsewhere."""
    figures = {"records": [RUN | {"gpu": "[/red]"}]} if rung == "hardware" else {}
    text = entry_text(rung, figures=figures, status=status, reason="[/red]", checker="[bold]")
    evidence = evidence_of(tmp_path, text)
    assert standing(evidence, KERNEL)
    assert validated_on(evidence, KERNEL)
    result = evidence.stored(KERNEL)[rung]
    assert cell(rung, result)
    path = tmp_path / "record.json"
    path.write_text(record_text())
    if rung == "hardware":
        assert result_of(KERNEL, read_records(path), result)


def test_a_file_by_other_hands_is_an_error_of_the_command(tmp_path):
    from build_kernels.cli.main import main

    folder = tmp_path / "artifacts"
    folder.mkdir()
    (folder / "evidence.json").write_text(entry_text(checker=7))
    shown = CliRunner().invoke(main, ["list", "--artifacts", str(folder)])
    assert shown.exit_code == 1
    assert "rungs.lint.checker: expected a checker" in shown.stderr
    assert "Traceback" not in shown.stderr


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


@pytest.mark.parametrize(
    "part", [{"launch": {"token_tile": 64}}, {"problem": {"k_multiple": 3}}, {"parameters": ()}]
)
def test_evidence_does_not_outlive_the_launch(part: dict, tmp_path: Path) -> None:
    path = tmp_path / "evidence.json"
    record = result_of(KERNEL, [record_of()])
    assert record is not None
    evidence = Evidence().with_result(KERNEL, "protocol", PASSED)
    write_evidence(path, evidence.with_result(KERNEL, "hardware", record))
    evidence = read_evidence(path)
    assert validated_on(evidence, KERNEL) == "NVIDIA H200"
    ((name, value),) = part.items()
    changed = replace(getattr(KERNEL, name), **value) if value else value
    edited = replace(KERNEL, **{name: changed})
    assert evidence.of(edited) == {}
    assert validated_on(evidence, edited) == "nowhere"
    assert set(evidence.with_result(edited, "lint", PASSED).stored(edited)) == {"lint"}


def test_two_kinds_of_gpu_are_two_records() -> None:
    h200 = result_of(KERNEL, [record_of()])
    both = result_of(KERNEL, [record_of(gpu="NVIDIA H100 80GB HBM3")], h200)
    assert both is not None
    evidence = Evidence().with_result(KERNEL, "hardware", both)
    assert validated_on(evidence, KERNEL) == "NVIDIA H100 80GB HBM3, NVIDIA H200"
    assert [run["gpu"] for run in both.figures["records"]] == [
        "NVIDIA H100 80GB HBM3",
        "NVIDIA H200",
    ]


@pytest.mark.parametrize("hash_name", ["cubin_sha256", "ptx_sha256"])
def test_evidence_does_not_outlive_the_bytes(hash_name: str) -> None:
    evidence = Evidence().with_result(KERNEL, "protocol", PASSED)
    rebuilt = replace(KERNEL, **{hash_name: "f" * 64})
    assert standing(evidence, KERNEL)["protocol"] == "passed"
    assert standing(evidence, rebuilt)["protocol"] == "not run"
    assert evidence.only([rebuilt]) == Evidence()


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
    ran = result_of(KERNEL, [record_of()])
    assert ran is not None
    assert Evidence().with_result(KERNEL, "hardware", ran).of(KERNEL)["hardware"] == ran


def test_a_tool_that_is_not_installed_makes_no_evidence_stale(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A machine that only lists the evidence need not have the tools that made it."""
    assert {name for name in RUNGS if RUNGS[name].checker is None} == {"hardware"}
    monkeypatch.setattr(rung, "installed_version", lambda distribution: None)
    assert protocol.RUNG.present_checker() == "protocol 2"
    assert protocol.RUNG.is_present("protocol 2, sentryward 0.1.1")
    assert not protocol.RUNG.is_present("protocol 1, sentryward 0.1.1")


def test_a_result_that_shows_nothing_says_why() -> None:
    with pytest.raises(ValueError, match="expected a text"):
        Result(status="not run")
    with pytest.raises(ValueError, match="expected one of"):
        Result(status="ok")
    with pytest.raises(ValueError, match="rung: expected one of"):
        Evidence().with_result(KERNEL, "proved", PASSED)


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


@pytest.mark.slow
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
