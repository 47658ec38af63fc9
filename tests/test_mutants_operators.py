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

pytest.importorskip("cutlass", reason="needs dsv4-router-builder")
pytest.importorskip("numpy", reason="needs the extra `verify`")
pytest.importorskip("torch", reason="needs the extra `torch`")

from builds import kernel_set
from click.testing import CliRunner

from build_kernels.emulator import Launch, emulate
from build_kernels.evidence.artifact import load_artifact
from build_kernels.evidence.document import EvidenceError
from build_kernels.mutants.command import mutants_command
from build_kernels.mutants.operators import command, run
from build_kernels.mutants.operators.edits import OPERATORS
from build_kernels.mutants.operators.equivalents import equivalents, why_equivalent
from build_kernels.mutants.operators.judge import KILLED, SURVIVED, UNREACHED, Verdict
from build_kernels.mutants.operators.judge import _cpu_limit as cpu_limit
from build_kernels.mutants.operators.judge import _TimeUp as TimeUp
from build_kernels.mutants.operators.mutation import Mutation, mutations_of, sample
from build_kernels.mutants.operators.results import Results

KEY = "router_topk.sm_90a"
MODULE = """
.version 8.0
.target sm_90a
.visible .entry k(.param .u64 out) {{
.reg .pred %p<4>;
.reg .b32 %r<8>;
.reg .f32 %f<4>;
.reg .b64 %rd<4>;
{body}
ret;
}}
"""


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
    (mutation,) = [m for m in mutations_of("k.sm_90a", text, "sm_90a") if m.operator == "dropped"][
        :1
    ]
    assert mutation.applied(text) == MODULE.format(body="")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return kernel_set(
        tmp_path_factory.mktemp("operators") / "artifacts", ["router_topk"], ["sm_90a"]
    )


@pytest.fixture(scope="module")
def all_of_topk(folder: Path) -> list[Mutation]:
    return mutations_of(KEY, load_artifact(folder, KEY).ptx, "sm_90a")


def test_the_enumeration_and_the_sample_are_deterministic(
    folder: Path, all_of_topk: list[Mutation]
) -> None:
    again = mutations_of(KEY, load_artifact(folder, KEY).ptx, "sm_90a")
    assert again == all_of_topk
    assert len({mutation.name for mutation in again}) == len(again) > 5000
    assert sample(again, 40, 7) == sample(all_of_topk, 40, 7) != sample(again, 40, 8)
    assert sample(again, None, 0) == again
    # Not an instruction without a mutant.
    assert {m.index for m in again} == set(range(max(m.index for m in again) + 1))


def of(before: str, after: str, operator: str, *, unread: bool = False) -> Mutation:
    return Mutation(
        artifact=KEY,
        line=1,
        operator=operator,
        number=1,
        before=before,
        after=after,
        span=(0, 0),
        index=0,
        unread=unread,
    )


WAIT = "mbarrier.try_wait.parity.shared.b64 P1, [%r78], %r79, {}"


@pytest.mark.parametrize(
    ("mutation", "reason"),
    [
        (of("prefetch.tensormap [%rd1]", "", "dropped"), "a prefetch has no result"),
        (of("@%p1 prefetch.global.L2 [%rd1]", "", "dropped"), "a prefetch has no result"),
        (of("ld.global.b32 %r1, [%rd1]", "", "dropped", unread=True), None),
        (of("add.s32 %r1, %r2, 1", "", "dropped", unread=True), "nothing reads the result"),
        (of("add.s32 %r1, %r2, 1", "", "dropped"), None),
        (of(WAIT.format(10000000), WAIT.format(9999999), "immediate"), "the suspend-time hint"),
        (of(WAIT.format(10000000), "", "dropped"), None),
        (
            of(WAIT.format(10000000), WAIT.format(10000000).replace("%r79", "%r80"), "register"),
            None,
        ),
    ],
)
def test_an_equivalent_has_a_reason_and_a_fault_none(
    mutation: Mutation, reason: str | None
) -> None:
    found = why_equivalent(mutation)
    assert found is None if reason is None else found is not None and found.startswith(reason)


def test_every_pattern_of_equivalents_is_of_a_part_of_the_mutants() -> None:
    """One of every text would excuse all survivors."""
    fault = of("st.global.b32 [%rd1], %r1", "", "dropped")
    for each in equivalents():
        assert each.reason
        assert not each.matches(fault)
        assert set(each.operators) <= set(OPERATORS), each.reason
        assert each.unread or each.before != ".*" or each.after != ".*", each.reason


@pytest.fixture
def in_this_process(monkeypatch: pytest.MonkeyPatch) -> None:
    @contextmanager
    def here(
        function: Any, tasks: Mapping[Any, tuple[Any, ...]], *, jobs: int
    ) -> Iterator[Iterator[tuple[Any, Any]]]:
        yield ((key, function(*arguments)) for key, arguments in tasks.items())

    monkeypatch.setattr(run, "run_tasks", here)


def invoke(folder: Path, results: Path, *options: str) -> Any:
    fixed = ("--operators", "--quick", "--artifacts", str(folder), "--results", str(results))
    return CliRunner().invoke(mutants_command, [*fixed, *options])


def test_a_survivor_is_reported_and_fails(
    folder: Path,
    all_of_topk: list[Mutation],
    tmp_path: Path,
    in_this_process: None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    store = next(m for m in all_of_topk if m.operator == "dropped" and "st.global" in m.before)
    nothing = replace(store, operator="no-fence", after=store.before)
    monkeypatch.setattr(command, "mutations_of", lambda *_: [store, nothing])
    result = invoke(folder, tmp_path / "results")
    assert result.exit_code == 1, result.stderr
    assert f"survived: {nothing.name}: no complaint in" in result.stdout
    assert f"survived: {store.name}" not in result.stdout
    assert "1 of 2 mutants killed (0.500)" in result.stdout
    # The same command again finds both in the file, and judges none.
    monkeypatch.setattr(run, "judge_one", None)
    as_json = invoke(folder, tmp_path / "results", "--json")
    assert as_json.exit_code == 1
    document = json.loads(as_json.stdout)
    assert (document["killed"], document["not_equivalent"]) == (1, 2)
    assert [row["verdict"] for row in document["mutants"]] == [KILLED, SURVIVED]
    only = invoke(folder, tmp_path / "results", "--only", " dropped ")
    assert only.exit_code == 0, "no survivor is left"


def test_a_mutant_of_an_instruction_that_no_case_executes_survives(
    folder: Path, tmp_path: Path, in_this_process: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    beyond = replace(of("trap", "", "dropped"), index=10**6)
    monkeypatch.setattr(command, "mutations_of", lambda *_: [beyond])
    result = invoke(folder, tmp_path / "results")
    assert result.exit_code == 1
    assert f"survived: {beyond.name}: {UNREACHED}" in result.stdout


def test_results_are_of_one_text_one_checker_and_one_change(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, mutation = tmp_path / "results", of("ret", "", "dropped")
    verdict = Verdict(word=SURVIVED, scope="quick", reason="no complaint in 2 runs")
    Results(path).add("a" * 64, mutation, verdict)
    known = Results(path)
    assert known.of("a" * 64, mutation, "quick") == verdict
    assert known.of("b" * 64, mutation, "quick") is None
    assert known.of("a" * 64, replace(mutation, after="exit"), "quick") is None
    assert known.of("a" * 64, mutation, "full") is None, "the full cases may kill it"
    killed = replace(verdict, word=KILLED)
    known.add("a" * 64, mutation, killed)
    assert Results(path).of("a" * 64, mutation, "full") == killed
    monkeypatch.setattr(
        "build_kernels.evidence.rungs.rung.Rung.present_checker", lambda self: "emulated 0"
    )
    assert Results(path).of("a" * 64, mutation, "quick") is None


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


def test_a_name_that_no_mutant_has_is_refused(folder: Path, tmp_path: Path) -> None:
    result = invoke(folder, tmp_path / "results", "--only", "no such")
    assert result.exit_code == 2
    assert "no mutant's name contains it" in result.stderr


def test_a_mutant_that_does_not_end_is_stopped() -> None:
    with pytest.raises(TimeUp), cpu_limit(0.05):
        for _ in itertools.count():
            pass


def test_the_emulator_notes_what_is_executed() -> None:
    body = """
    mov.u32 %r1, 1;
    setp.eq.s32 %p1, %r1, 1;
    @%p1 bra END;
    mov.b32 %r2, 0;
    add.s32 %r2, %r2, 1;
    END:
    """
    reached: set[int] = set()
    launch = Launch(grid=(1, 1, 1), block=(32, 1, 1), arch="sm_90a")
    emulate(MODULE.format(body=body), launch, [0], reached=reached)
    assert reached == {0, 1, 2, 5}
