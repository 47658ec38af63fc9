"""Mutants by operators: what each operator makes of an instruction, and how mutants are judged."""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("elftools", reason="needs dsv4-router-builder")
pytest.importorskip("numpy", reason="needs the extra `verify`")
pytest.importorskip("torch", reason="needs the extra `torch`")

from builds import kernel_set
from click.testing import CliRunner
from small_ptx import MODULE

from build_kernels.binaries.ptx.parser import parse
from build_kernels.evidence.artifact import load_artifact
from build_kernels.evidence.cases import Case
from build_kernels.evidence.document import EvidenceError
from build_kernels.evidence.picked import cases_of
from build_kernels.mutants.command import mutants_command
from build_kernels.mutants.operators import command, run
from build_kernels.mutants.operators.edits import OPERATORS
from build_kernels.mutants.operators.judge import KILLED, SURVIVED, UNREACHED, Verdict
from build_kernels.mutants.operators.judge import _cpu_limit as cpu_limit
from build_kernels.mutants.operators.judge import _TimeUp as TimeUp
from build_kernels.mutants.operators.mutation import Mutation, mutations_of, sample
from build_kernels.mutants.operators.ranges import facts_of
from build_kernels.mutants.operators.results import Results
from build_kernels.workers import WorkerDiedError
from dsv4_router_runtime.artifacts.kernel import Kernel

KEY = "router_topk.sm_90a"


def mutated(body: str, operator: str) -> list[str]:
    """Return what an operator makes of the first instruction."""
    found = mutations_of("k.sm_90a", MODULE.format(body=body), "sm_90a")
    return [m.after_words for m in found if m.operator == operator and m.index == 0]


@pytest.mark.parametrize(
    ("operator", "statement", "expected"),
    [
        ("comparison", "setp.lt.s32 %p1, %r1, 5;", ["setp.le.s32 %p1, %r1, 5"]),
        ("comparison", "setp.ne.b32 %p1, %r1, 5;", ["setp.eq.b32 %p1, %r1, 5"]),
        ("signedness", "setp.ge.u32 %p1, %r1, 5;", ["setp.ge.s32 %p1, %r1, 5"]),
        ("signedness", "min.s32 %r1, %r2, %r3;", ["min.u32 %r1, %r2, %r3"]),
        ("signedness", "setp.eq.s32 %p1, %r1, 5;", []),
        ("immediate", "add.s32 %r1, %r2, -1;", ["add.s32 %r1, %r2, 0", "add.s32 %r1, %r2, -2"]),
        (
            "immediate",
            "mov.f32 %f1, 0f3F800000;",
            ["mov.f32 %f1, 0f40000000", "mov.f32 %f1, 0f00000000"],
        ),
        ("immediate", "mov.f32 %f1, 0fFF800000;", []),
        (
            "immediate",
            "ld.global.v2.b32 {%r1, %r2}, [%rd1+8];",
            [
                "ld.global.v2.b32 {%r1, %r2}, [%rd1+16]",
                "ld.global.v2.b32 {%r1, %r2}, [%rd1+0]",
            ],
        ),
        (
            "count",
            "mbarrier.init.shared.b64 [%r1], 4;",
            ["mbarrier.init.shared.b64 [%r1], 5", "mbarrier.init.shared.b64 [%r1], 3"],
        ),
        (
            "count",
            "mbarrier.init.shared.b64 [%r1], %r2;",
            [
                "{ .reg .b32 changed; add.s32 changed, %r2, 1; "
                "mbarrier.init.shared.b64 [%r1], changed; }",
                "{ .reg .b32 changed; add.s32 changed, %r2, -1; "
                "mbarrier.init.shared.b64 [%r1], changed; }",
            ],
        ),
        ("count", "bar.sync 1, 128;", ["bar.sync 1, 160", "bar.sync 1, 96"]),
        ("swap", "selp.b32 %r1, %r2, -1, %p1;", ["selp.b32 %r1, -1, %r2, %p1"]),
        ("swap", "max.u32 %r1, %r2, %r3;", ["min.u32 %r1, %r2, %r3"]),
        ("no-guard", "@%p1 mov.b32 %r1, 0;", ["mov.b32 %r1, 0"]),
        ("other-guard", "@%p1 mov.b32 %r1, 0;", ["@!%p1 mov.b32 %r1, 0"]),
        ("other-guard", "@!%p1 bra END;\nEND:", ["@%p1 bra END"]),
        ("no-guard", "mov.b32 %r1, 0;", []),
        ("dropped", "mov.b32 %r1, 0;", [""]),
        ("dropped", "fence.proxy.async.shared::cta;", []),
        ("no-fence", "fence.proxy.async.shared::cta;", [""]),
        ("no-fence", "mov.b32 %r1, 0;", []),
        (
            "lane",
            "shfl.sync.idx.b32 %r1, %r2, 6, 31, -1;",
            ["shfl.sync.idx.b32 %r1, %r2, 7, 31, -1"],
        ),
        (
            "lane",
            "shfl.sync.idx.b32 %r1, %r2, %r3, 31, -1;",
            [
                "{ .reg .b32 changed; xor.b32 changed, %r3, 1; "
                "shfl.sync.idx.b32 %r1, %r2, changed, 31, -1; }"
            ],
        ),
        (
            "order",
            "ld.acquire.gpu.global.b32 %r1, [%rd1];",
            ["ld.relaxed.gpu.global.b32 %r1, [%rd1]"],
        ),
        ("order", "st.relaxed.gpu.global.b32 [%rd1], %r1;", ["st.global.b32 [%rd1], %r1"]),
        ("order", "fence.acq_rel.gpu;", []),
        ("order", "barrier.cluster.arrive;", ["barrier.cluster.arrive.relaxed"]),
        ("scope", "fence.acq_rel.gpu;", ["fence.acq_rel.cta"]),
        (
            "scope",
            "ld.acquire.sys.global.b32 %r1, [%rd1];",
            ["ld.acquire.gpu.global.b32 %r1, [%rd1]"],
        ),
        ("scope", "barrier.cluster.arrive;", []),
    ],
)
def test_an_operator_changes_its_instructions(
    operator: str, statement: str, expected: list[str]
) -> None:
    assert mutated(statement, operator) == expected


def test_every_operator_is_tested() -> None:
    (parameters,) = test_an_operator_changes_its_instructions.pytestmark
    assert {case[0] for case in parameters.args[1]} | {"register"} == set(OPERATORS)


def test_another_register_is_one_of_the_type_that_is_written_before_and_read_after() -> None:
    body = """
    mov.b32 %r1, 1; mov.b32 %r2, 2; mov.b32 %r3, 3; mov.f32 %f1, 0f00000000;
    add.s32 %r5, %r2, 7;
    add.s32 %r6, %r5, %r3;
    st.global.b32 [%rd1], %r6;
    """
    found = mutations_of("k.sm_90a", MODULE.format(body=body), "sm_90a")
    texts = [m.after_words for m in found if m.operator == "register"]
    assert texts == ["add.s32 %r5, %r3, 7"], "%r1 is not read, %f1 of another type"


def test_a_change_that_cannot_be_decoded_is_no_mutant() -> None:
    body = "wgmma.wait_group.sync.aligned 0;"
    assert mutated(body, "immediate") == ["wgmma.wait_group.sync.aligned 1"], "-1 is none"


def test_a_dropped_instruction_leaves_no_semicolon() -> None:
    """As ptxas refuses one that stands alone."""
    text = MODULE.format(body="mov.b32 %r1, 0;")
    (first,) = [m for m in mutations_of("k.sm_90a", text, "sm_90a") if m.operator == "dropped"][:1]
    assert first.applied(text) == MODULE.format(body="")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return kernel_set(
        tmp_path_factory.mktemp("operators") / "artifacts", ["router_topk"], ["sm_90a"]
    )


def test_the_enumeration_and_the_sample_are_deterministic() -> None:
    text = MODULE.format(body="@%p1 add.s32 %r1, %r2, 3;\n" * 9)
    first = mutations_of(KEY, text, "sm_90a")
    again = mutations_of(KEY, text, "sm_90a")
    assert again == first
    assert len({mutation.name for mutation in again}) == len(again) > 40
    assert sample(again, 20, 7) == sample(first, 20, 7) != sample(again, 20, 8)
    assert sample(again, None, 0) == again


@pytest.mark.slow
def test_every_instruction_of_a_kernel_has_a_mutant(folder: Path) -> None:
    artifact = load_artifact(folder, KEY)
    found = mutations_of(KEY, artifact.ptx, "sm_90a", facts_of(artifact.kernel))
    assert {m.index for m in found} == set(range(max(m.index for m in found) + 1))
    assert len({mutation.name for mutation in found}) == len(found) > 5000
    text = sample(found, 1, 0)[0].applied(artifact.ptx)
    assert text != artifact.ptx
    assert parse(text).name == parse(artifact.ptx).name


def mutation(before: str, after: str, operator: str) -> Mutation:
    return Mutation(
        artifact=KEY,
        line=1,
        operator=operator,
        number=1,
        before=before,
        after=after,
        span=(0, 0),
        index=0,
        unread=False,
        rounded=False,
        same_result=False,
        around="",
    )


@pytest.fixture
def in_this_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """Run the tasks here, on the two smallest quick cases that store logical ids: all take 5 s."""

    @contextmanager
    def here(
        function: Any, tasks: Mapping[Any, tuple[Any, ...]], *, jobs: int
    ) -> Iterator[Iterator[tuple[Any, Any]]]:
        yield ((key, function(*arguments)) for key, arguments in tasks.items())

    def few(kernel: Kernel, *, quick: bool) -> tuple[Case, ...]:
        assert quick
        stored = [case for case in cases_of(kernel, quick=quick) if "logical" in str(case)]
        return tuple(sorted(stored, key=lambda case: case.num_tokens * case.num_experts)[:2])

    monkeypatch.setattr(run, "run_tasks", here)
    monkeypatch.setattr(run, "cases_of", few)


def invoke(folder: Path, results: Path, *options: str) -> Any:
    fixed = ("--operators", "--quick", "--artifacts", str(folder), "--results", str(results))
    return CliRunner().invoke(mutants_command, [*fixed, *options])


@pytest.mark.slow
def test_a_survivor_is_reported_and_fails(
    folder: Path,
    tmp_path: Path,
    in_this_process: None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    instructions = parse(load_artifact(folder, KEY).ptx).instructions
    last = [each for each in instructions if each.opcode == "st.global.u32"][-1]
    store = replace(
        mutation(last.text[:-1], "", "dropped"), span=last.span, index=last.index, line=last.line
    )
    nothing = replace(store, operator="no-fence", after=store.before)
    monkeypatch.setattr(command, "mutations_of", lambda *_, **__: [store, nothing])
    result = invoke(folder, tmp_path / "results")
    assert result.exit_code == 1, result.stderr
    assert f"survived: {nothing.name}: no complaint in" in result.stdout
    assert f"survived: {store.name}" not in result.stdout
    assert "1 of 2 mutants killed (0.500)" in result.stdout
    # The same command again finds both in the file, and judges none.
    monkeypatch.setattr(run, "judge", None)
    as_json = invoke(folder, tmp_path / "results", "--json")
    assert as_json.exit_code == 1
    document = json.loads(as_json.stdout)
    assert (document["killed"], document["not_equivalent"]) == (1, 2)
    assert [row["verdict"] for row in document["mutants"]] == [KILLED, SURVIVED]
    only = invoke(folder, tmp_path / "results", "--only", " dropped ")
    assert only.exit_code == 0, "no survivor is left"


@pytest.mark.slow
def test_a_mutant_of_an_instruction_that_no_case_executes_survives(
    folder: Path, tmp_path: Path, in_this_process: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    beyond = replace(mutation("trap", "", "dropped"), index=10**6)
    monkeypatch.setattr(command, "mutations_of", lambda *_, **__: [beyond])
    result = invoke(folder, tmp_path / "results")
    assert result.exit_code == 1
    assert f"survived: {beyond.name}: {UNREACHED}" in result.stdout


def test_a_mutant_whose_process_died_survives_and_is_judged_again(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    @contextmanager
    def all_die(function: Any, tasks: Mapping[Any, Any], *, jobs: int) -> Iterator[Any]:
        yield ((key, WorkerDiedError()) for key in tasks)

    monkeypatch.setattr(command, "mutations_of", lambda *_, **__: [mutation("ret", "", "dropped")])
    monkeypatch.setattr(run, "_record", lambda *_, **__: {KEY: []})
    monkeypatch.setattr(run, "run_tasks", all_die)
    for _ in range(2):
        result = invoke(folder, tmp_path / "results")
        assert result.exit_code == 1
        assert "1 of them to judge" in result.stderr
        assert (
            "survived: router_topk.sm_90a:1 dropped 1: not judged: its process died"
            in result.stdout
        )


def test_results_are_of_one_text_one_checker_and_one_change(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, known_one = tmp_path / "results", mutation("ret", "", "dropped")
    verdict = Verdict(word=SURVIVED, scope="quick", reason="no complaint in 2 runs")
    Results(path).add("a" * 64, known_one, verdict)
    known = Results(path)
    assert known.of("a" * 64, known_one, "quick") == verdict
    assert known.of("b" * 64, known_one, "quick") is None
    assert known.of("a" * 64, replace(known_one, after="exit"), "quick") is None
    assert known.of("a" * 64, known_one, "full") is None, "the full cases may kill it"
    killed = replace(verdict, word=KILLED)
    known.add("a" * 64, known_one, killed)
    assert Results(path).of("a" * 64, known_one, "full") == killed
    monkeypatch.setattr(
        "build_kernels.evidence.rungs.rung.Rung.present_checker", lambda self: "emulated 0"
    )
    assert Results(path).of("a" * 64, known_one, "quick") is None


@pytest.mark.parametrize("line", ["{", "[]", '{"word": "killed"}'])
def test_a_line_of_results_that_cannot_be_read_is_named(tmp_path: Path, line: str) -> None:
    (tmp_path / "results").write_text(line + "\n")
    with pytest.raises(EvidenceError, match=r"line 1: expected an object.*delete the line"):
        Results(tmp_path / "results")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--sample", "3"], "go with --operators"),
        (["--kernel", "router_topk"], "go with --operators"),
        (["--operators", "--rung", "emulated"], "leave --rung out"),
    ],
)
def test_options_that_do_not_fit_are_refused(options: list[str], message: str) -> None:
    result = CliRunner().invoke(mutants_command, options)
    assert result.exit_code == 2
    assert message in result.stderr


def test_a_name_that_no_mutant_has_is_refused(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(command, "mutations_of", lambda *_, **__: [mutation("ret", "", "dropped")])
    result = invoke(folder, tmp_path / "results", "--only", "no such")
    assert result.exit_code == 2
    assert "no mutant's name contains it" in result.stderr


def test_a_mutant_that_does_not_end_is_stopped() -> None:
    with pytest.raises(TimeUp), cpu_limit(0.05):
        for _ in itertools.count():
            pass
