"""Coverage of the cases: what follows from what, the picks, and the command."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("numpy", reason="needs the extra `verify`")
pytest.importorskip("torch", reason="needs the extra `torch`")
pytest.importorskip("elftools", reason="needs dsv4-router-builder")

import numpy as np
from conftest import sample_manifest
from test_emulator import module

from build_kernels.binaries.ptx.parser import parse
from build_kernels.emulator import DeviceArray, Launch, emulate
from build_kernels.emulator.coverage import Coverage
from build_kernels.evidence import coverage_command
from build_kernels.evidence.cases import Case, second_launch, wide_cases
from build_kernels.evidence.draws import KINDS, draw, smallest
from build_kernels.evidence.goals import goals_met, goals_of
from build_kernels.evidence.inputs import make_inputs
from build_kernels.evidence.picked import cases_of, picked_numbers
from build_kernels.evidence.unreached import Unreached, unreached

KERNELS = sample_manifest(("sm_90a",)).kernels
# Those that have all picks in quick.
MEASURED = [k for k in KERNELS if "emajor" not in k.name and not k.name.endswith("n32")]


def _left(body: str) -> list[Unreached]:
    text = module(f"ld.param.u64 %rd0, [out];\nmov.u32 %r0, %tid.x;\n{body}")
    coverage = Coverage(parse(text))
    out = DeviceArray(name="out", data=np.zeros(32, np.uint32))
    emulate(text, Launch(grid=(1, 1, 1), block=(32, 1, 1), arch="sm_90a"), [out], coverage=coverage)
    return unreached(coverage)


def test_what_follows_from_another_outcome_is_not_open() -> None:
    left = _left("""
    setp.gt.u32 %p1, %r0, 40;
    setp.eq.u32 %p2, %r0, 1;
    and.pred %p3, %p2, %p1;
    selp.b32 %r1, 1, 0, %p3;
    @!%p3 bra END;
    setp.eq.u32 %p4, %r0, 2;
    @%p4 mov.u32 %r1, 2;
END:
""")
    cause, *rest = left
    assert cause.is_open
    assert (cause.kind, cause.outcome) == ("predicate", "true")
    assert cause.text == "setp.gt.u32 %p1, %r0, 40;"
    first = cause.line
    assert [(item.kind, item.outcome, item.follows - first) for item in rest] == [
        ("predicate", "true", 0),
        ("select", "true", 2),
        ("guard", "false", 2),
        ("block", "ran", 4),
        ("predicate", "true", 5),
        ("predicate", "false", 5),
        ("guard", "true", 5),
        ("guard", "false", 5),
    ]


def test_a_predicate_with_another_writer_explains_nothing() -> None:
    left = _left("""
    setp.gt.u32 %p1, %r0, 40;
    setp.eq.u32 %p2, %r0, 1;
    @%p2 mov.pred %p1, 0;
    selp.b32 %r1, 1, 0, %p1;
""")
    assert [item.kind for item in left if item.is_open] == ["predicate", "select"]


@pytest.mark.parametrize(("divisor", "is_open"), [(0, False), (1, True)])
def test_a_reason_needs_its_instructions(divisor: int, is_open: bool) -> None:
    """The correction of a floored division, and the same without the select of -1."""
    left = _left(f"""
    setp.ne.b32 %p1, %r0, 3;
    setp.lt.s32 %p2, %r0, 0;
    and.pred %p3, %p2, %p1;
    selp.b32 %r1, {-1 + divisor}, 0, %p3;
""")
    (root,) = (item for item in left if item.kind == "predicate" and not item.follows)
    assert root.is_open == is_open
    assert bool(root.reason) != is_open


def test_the_smallest_set_reaches_all_and_has_nothing_superfluous() -> None:
    reached = {1: {"a", "b"}, 2: {"c"}, 3: {"a", "b", "c"}, 4: {"d"}, 5: {"a"}}
    assert sorted(smallest(reached, dict.fromkeys(reached, 1.0))) == [3, 4]
    # The dear one is not taken.
    assert sorted(smallest(reached, dict.fromkeys(reached, 1.0) | {3: 9.0})) == [1, 2, 4]
    # 1 is taken first for its gain, and then 2 and 3 reach it all.
    overlapping = {1: {"a", "b", "c"}, 2: {"a", "b", "x"}, 3: {"c", "y"}}
    assert sorted(smallest(overlapping, dict.fromkeys(overlapping, 1.0))) == [2, 3]


@pytest.mark.parametrize("kernel", KERNELS, ids=lambda kernel: kernel.name)
def test_every_draw_is_a_case_that_its_kernel_takes(kernel: Any) -> None:
    draws = [draw(kernel, number) for number in range(300)]
    for case in draws:
        assert case.num_tokens in kernel.problem.num_tokens
        assert case.num_experts in kernel.problem.num_experts
        assert case.top_k in kernel.problem.top_k
        assert case.top_k <= case.num_experts
        assert case.k % kernel.problem.k_multiple == 0
    assert draws == [draw(kernel, number) for number in range(300)]
    assert {case.kind for case in draws} == set(KINDS)


@pytest.mark.quick(3)
@pytest.mark.parametrize("kernel", MEASURED, ids=lambda kernel: kernel.name)
def test_the_quick_cases_meet_every_goal(kernel: Any) -> None:
    met = set[str]()
    for case in cases_of(kernel, quick=True):
        met |= goals_met(kernel, make_inputs(kernel, case))
    assert met == set(goals_of(kernel))


def test_a_goal_is_not_met_by_a_case_beside_it() -> None:
    kernel = next(kernel for kernel in KERNELS if kernel.role == "select")
    plain = Case(num_tokens=5, num_experts=160, top_k=6)
    assert goals_met(kernel, make_inputs(kernel, plain)) == set()


def test_the_quick_cases_are_the_picks_and_the_full_ones_have_them_too() -> None:
    for kernel in KERNELS:
        quick, full = cases_of(kernel, quick=True), cases_of(kernel, quick=False)
        numbers = picked_numbers()[kernel.role]
        drawn = tuple(draw(kernel, number) for number in numbers)
        drawn += wide_cases() if kernel.role == "select" else ()
        assert len(set(drawn)) == len(drawn)
        assert full[: len(drawn)] == drawn
        assert len(full) > len(drawn)
        if kernel in MEASURED:
            second = (second_launch(kernel),) if kernel.role == "prefill" else ()
            assert quick == drawn + second
        else:
            assert quick
            assert set(quick) < set(drawn)


@pytest.fixture
def topk_folder(tmp_path: Path) -> Path:
    builds = pytest.importorskip("builds")
    return builds.kernel_set(tmp_path / "artifacts", ["router_topk"], ["sm_90a"])


def _call(*arguments: Any) -> Any:
    from click.testing import CliRunner

    from build_kernels.cli.main import main

    return CliRunner().invoke(main, ["coverage", *map(str, arguments), "--jobs", "1"])


@pytest.mark.slow
def test_the_command_lists_what_is_open_and_fails(
    topk_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In this process: a worker would import torch again."""
    from builds import tasks_here

    monkeypatch.setattr(coverage_command, "run_tasks", tasks_here)
    outcome = _call("--quick", "--artifacts", topk_folder, "--json")
    (found,) = json.loads(outcome.stdout)
    assert found["artifact"] == "router_topk.sm_90a"
    assert found["cases"] == len(picked_numbers()["select"]) + len(wide_cases())
    reached, every = found["counts"]["block"]
    assert reached == every > 100
    assert found["counts"]["goal"][0] == found["counts"]["goal"][1]
    is_open = [item for item in found["unreached"] if not (item["follows"] or item["reason"])]
    assert outcome.exit_code == (1 if is_open else 0)
    assert is_open == []


def test_the_command_says_what_a_set_lacks(topk_folder: Path) -> None:
    outcome = _call("--kernel", "router_hash", "--artifacts", topk_folder)
    assert outcome.exit_code == 1
    for ptx in topk_folder.glob("*.ptx"):
        ptx.unlink()
    outcome = _call("--artifacts", topk_folder)
    assert outcome.exit_code == 1
    assert "the set carries no PTX" in outcome.stderr
