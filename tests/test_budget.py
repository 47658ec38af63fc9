"""`build-kernels budget`: an excess fails and is named; `--update` writes what holds."""

from __future__ import annotations

import json
import re
import shutil
import tomllib
import zipfile
from dataclasses import replace
from pathlib import Path

import pytest

pytest.importorskip("elftools", reason="needs the builder")

from builds import CHECKOUT, TOPK, topk_set
from click.testing import CliRunner, Result

from build_kernels.bench.report import read_report, write_report
from build_kernels.cli import main as cli
from build_kernels.review import budget, measure
from build_kernels.review.budgets import (
    Measured,
    judge,
    read_budgets,
    renewed,
    write_budgets,
)
from build_kernels.specs import KERNELS
from dsv4_router_runtime.artifacts.manifest import parse_manifest

BENCH = Path(measure.__file__).parents[1] / "bench" / "h200.json"
KERNEL = ("kernels", "router_x", "sm_90a")
KNOWN = {KERNEL}
SIZES = {"registers": 64, "dynamic_shared_bytes": 1024, "cubin_bytes": 5000, "HGMMA": 4, "SYNCS": 8}
LIMITS = {(*KERNEL, name): value for name, value in SIZES.items()}
NO_LOCAL = {"spill_bytes": 0, "stack_bytes": 0, "local_instructions": 0}


def kernel(**changed: float) -> dict[tuple[str, ...], Measured]:
    return {
        (*KERNEL, name): Measured(value=value)
        for name, value in {**SIZES, **NO_LOCAL, **changed}.items()
    }


@pytest.mark.parametrize(
    ("changed", "got", "allowed"),
    [
        ({"registers": 65}, "65", "64"),
        ({"spill_bytes": 8}, "8", "0"),
        ({"stack_bytes": 16}, "16", "0"),
        ({"local_instructions": 1}, "1", "0"),
        ({"dynamic_shared_bytes": 1025}, "1025", "1024"),
        ({"static_shared_bytes": 16}, "16", "0"),
        ({"cubin_bytes": 5001}, "5001", "5000"),
        ({"HGMMA": 3}, "3", "exactly 4"),
        ({"HGMMA": 5}, "5", "exactly 4"),
        ({"HGMMA": 0}, "0", "exactly 4"),
        ({"SYNCS": 7}, "7", "exactly 8"),
        ({"UTMALDG": 1}, "1", "exactly 0"),
    ],
)
def test_a_kernel_over_its_budget_is_named(changed, got, allowed) -> None:
    assert judge(kernel(), LIMITS).exceeded == ()
    (row,) = judge(kernel(**changed), LIMITS).exceeded
    assert row.what == f"router_x.sm_90a {next(iter(changed))}"
    assert (row.got, row.allowed) == (got, allowed)


def test_an_opcode_that_no_longer_occurs_is_named() -> None:
    without = {place: got for place, got in kernel().items() if place[-1] != "HGMMA"}
    (row,) = judge(without, LIMITS).exceeded
    assert (row.what, row.got, row.allowed) == ("router_x.sm_90a HGMMA", "0", "exactly 4")


def test_less_than_a_budget_is_held_and_told() -> None:
    verdict = judge(kernel(registers=60), LIMITS)
    assert verdict.exceeded == ()
    assert verdict.loose == ("router_x.sm_90a registers",)


def test_a_kernel_without_budgets_and_budgets_without_a_kernel_fail() -> None:
    assert [row.what for row in judge(kernel(), {}).exceeded] == ["router_x.sm_90a"]
    assert [row.got for row in judge({}, LIMITS).exceeded] == ["not built"]


def test_a_time_is_over_only_beyond_its_noise() -> None:
    place = ("gpu", "NVIDIA H200", "7168x384 cold", "8")
    limits = {place: 3.6}
    assert judge({place: Measured(value=3.7, low=3.59)}, limits).exceeded == ()
    (row,) = judge({place: Measured(value=3.7, low=3.61)}, limits).exceeded
    assert row.what == "NVIDIA H200, 7168x384 cold, N = 8, microseconds"


def test_what_has_no_measurement_or_no_budget_is_told_and_fails_nothing() -> None:
    wheel, other = ("package", "wheel_bytes"), ("gpu", "NVIDIA H100", "1x1 cold", "1")
    verdict = judge({other: Measured(value=1.0)}, {wheel: 5})
    assert verdict.exceeded == ()
    assert verdict.not_measured == ("wheel_bytes",)
    assert verdict.no_budget == ("NVIDIA H100, 1x1 cold, N = 1, microseconds",)


def test_an_update_never_allows_local_memory() -> None:
    spilled = kernel(spill_bytes=8, local_instructions=2)
    limits = renewed(spilled, {}, KNOWN)
    assert {row.what.split()[-1] for row in judge(spilled, limits).exceeded} == {
        *("spill_bytes", "local_instructions")
    }


def test_an_update_keeps_what_was_not_measured_and_drops_what_no_spec_names() -> None:
    wheel, gone = ("package", "wheel_bytes"), ("kernels", "router_gone", "sm_90a", "registers")
    there = ("kernels", "router_y", "sm_90a", "registers")
    old = {wheel: 5, gone: 1, there: 2, ("every_kernel", "stack_bytes"): 32}
    new = renewed(kernel(), old, {KERNEL, there[:3]})
    assert new[wheel] == 5
    assert new[there] == 2
    assert gone not in new
    assert new["every_kernel", "stack_bytes"] == 32, "written by hand, so kept"


def test_budgets_with_headroom_stay_while_they_fit() -> None:
    place = ("package", "import_ms")

    def of(milliseconds: float, old: float) -> float:
        return renewed({place: Measured(value=milliseconds)}, {place: old}, KNOWN)[place]

    assert of(9.0, 20) == 20
    assert of(21.0, 20) == 63
    assert of(2.0, 20) == 6


def test_what_is_written_is_read_back_and_sorted(tmp_path: Path) -> None:
    limits = {
        **renewed(kernel(), {}, KNOWN),
        ("gpu", 'odd "name"', "7168x384 cold", "8"): 3.6,
        ("gpu", 'odd "name"', "7168x384 cold", "16"): 4.125,
        ("package", "wheel_bytes"): 958000,
    }
    first, second = tmp_path / "1.toml", tmp_path / "2.toml"
    write_budgets(first, limits)
    write_budgets(second, dict(reversed(limits.items())))
    assert read_budgets(first) == limits
    assert first.read_bytes() == second.read_bytes()
    assert first.read_text().index(" 8 = ") < first.read_text().index(" 16 = ")
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".")] == []


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("[kernels", "not valid TOML"),
        ("\xff", "not valid TOML"),
        ("[kernel.x]\n", "unknown table kernel"),
        ("[package]\nwheel_bytes = '1'\n", "package.wheel_bytes: expected a number >= 0"),
        ("[package]\nwheel_bytes = -1\n", "expected a number >= 0"),
        ("[package]\nwheel_bytes = nan\n", "expected a number >= 0"),
        ("[package]\nwheel_bytes = true\n", "expected a number >= 0"),
        ("[kernels]\nregisters = 1\n", "kernels.registers: expected a number"),
        ("[kernels.x.sm_90a.registers]\nmany = 1\n", "expected a number >= 0"),
        ("package = 1\n", "package: expected a number"),
    ],
)
def test_a_file_of_another_shape_is_an_error(text: str, words: str, tmp_path: Path) -> None:
    (tmp_path / "b.toml").write_bytes(text.encode("latin-1"))
    result = call("--budgets", tmp_path / "b.toml", "--artifacts", topk_set(tmp_path / "a"))
    assert result.exit_code == 2
    assert words in " ".join(result.stderr.split())
    assert "restore it with git" in " ".join(result.stderr.split())


# --- the command


def call(*arguments: str | Path) -> Result:
    return CliRunner().invoke(cli.main, ["budget", *map(str, arguments)])


@pytest.fixture
def quick_start(monkeypatch: pytest.MonkeyPatch) -> None:
    """Measure no start of the runtime: a second."""
    times = {("package", "import_ms"): Measured(value=9.0)}
    monkeypatch.setattr(budget, "start_numbers", lambda _folder: times)


@pytest.fixture
def place(tmp_path: Path, quick_start, monkeypatch: pytest.MonkeyPatch) -> list[str | Path]:
    """Options that name a built set of router_topk, and budgets that it holds."""
    monkeypatch.setattr(budget, "SPECS", [spec for spec in KERNELS if spec.name == "router_topk"])
    options: list[str | Path] = ["--artifacts", topk_set(tmp_path / "artifacts")]
    options += ["--budgets", tmp_path / "budgets.toml"]
    assert call(*options, "--update").exit_code == 0
    return options


def test_the_budgets_that_are_written_are_held(place) -> None:
    result = call(*place)
    assert result.exit_code == 0
    assert "budgets held, 0 not" in result.stdout
    names = {at[-1] for at in read_budgets(place[-1]) if at[:3] == ("kernels", TOPK.name, "sm_90a")}
    assert names >= {"registers", "static_shared_bytes", "cubin_bytes"}
    assert f"0 budgets changed in {place[-1]}" in " ".join(call(*place, "--update").stderr.split())


def test_a_budget_that_is_exceeded_fails_in_each_form(place) -> None:
    text = place[-1].read_text()
    registers = tomllib.loads(text)["kernels"]["router_topk"]["sm_90a"]["registers"]
    assert f"registers = {registers}" in text
    place[-1].write_text(text.replace(f"registers = {registers}", f"registers = {registers - 1}"))
    for form in ((), ("--markdown",), ("--json",)):
        result = call(*place, *form)
        assert result.exit_code == 1
        assert "router_topk.sm_90a registers" in result.stdout
        assert str(registers - 1) in result.stdout
    rows = json.loads(result.stdout)["exceeded"]
    assert {"what": "router_topk.sm_90a registers"}.items() <= rows[-1].items()
    assert call(*place, "--update").exit_code == 0
    assert place[-1].read_text() == text


def test_what_changed_since_older_budgets_is_listed_in_each_form(place, tmp_path: Path) -> None:
    before = tmp_path / "before.toml"
    text = place[-1].read_text()
    size = tomllib.loads(text)["kernels"]["router_topk"]["sm_90a"]["cubin_bytes"]
    before.write_text(text.replace(f"cubin_bytes = {size}", "cubin_bytes = 7"))
    for form in ((), ("--markdown",), ("--json",)):
        result = call(*place, *form, "--since", before)
        assert result.exit_code == 0
        words = re.findall(r"router_topk\.sm_90a cubin_bytes|\b7\b|\b\d{5}\b", result.stdout)
        assert sorted(words) == sorted(["7", str(size), "router_topk.sm_90a cubin_bytes"])
    assert "cubin_bytes" not in call(*place, "--since", place[-1]).stdout


def write_wheel(path: Path, size: int) -> Path:
    """Write what counts of a wheel of dsv4-router."""
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("dsv4_router_runtime/_artifacts/manifest.json", "0" * size)
    return path


def test_without_a_wheel_and_a_bench_it_says_what_was_not_measured(place, tmp_path: Path) -> None:
    wheel = write_wheel(tmp_path / "x.whl", 1000)
    assert call(*place, "--update", "--wheel", wheel, "--bench", BENCH).exit_code == 0
    assert "not measured: --wheel FILE and --bench FILE" in call(*place).stdout
    assert "not measured" not in call(*place, "--wheel", wheel, "--bench", BENCH).stdout
    write_wheel(wheel, 1200)
    grown = call(*place, "--wheel", wheel)
    assert grown.exit_code == 1
    assert "wheel_bytes" in grown.stdout


def test_a_slower_run_of_the_bench_fails(place, tmp_path: Path) -> None:
    report = read_report(BENCH)
    assert call(*place, "--update", "--bench", BENCH).exit_code == 0
    slower = [
        replace(figure, low=2 * figure.low, microseconds=2 * figure.low, high=2 * figure.high)
        if (figure.contender, figure.mode, figure.num_tokens) == ("ours", "cold", 8)
        else figure
        for figure in report.figures
    ]
    write_report(tmp_path / "slow.json", replace(report, figures=tuple(slower)))
    result = call(*place, "--bench", tmp_path / "slow.json")
    assert result.exit_code == 1
    assert result.stdout.count("N = 8, microseconds") == len(report.problems)


def test_a_bench_of_another_manifest_is_noted(place) -> None:
    for form in ((), ("--markdown",)):
        assert "the kernels of another manifest" in call(*place, "--bench", BENCH, *form).stdout


def test_bad_places_exit_2(place, tmp_path: Path) -> None:
    (tmp_path / "bench.json").write_text("{}")
    for arguments in (
        ("--artifacts", tmp_path / "absent"),
        ("--budgets", tmp_path / "absent.toml"),
        ("--bench", tmp_path / "bench.json"),
        ("--wheel", tmp_path / "absent.whl"),
        ("--wheel", tmp_path / "bench.json"),
        ("--json", "--markdown"),
    ):
        result = call(*place, *arguments)
        assert result.exit_code == 2, arguments
        assert isinstance(result.exception, SystemExit), "no traceback"
    cubin = place[1] / "router_topk.sm_90a.cubin"
    cubin.write_bytes(cubin.read_bytes()[:-1])
    assert "altered or truncated" in " ".join(call(*place).stderr.split())


@pytest.mark.slow
def test_the_start_of_the_runtime_is_measured_in_new_processes(tmp_path: Path) -> None:
    folder = topk_set(tmp_path / "artifacts")
    numbers = measure.start_numbers(folder)
    assert numbers.keys() == {("package", "import_ms"), ("package", "load_ms")}
    assert all(0 < number.value < 5000 for number in numbers.values())
    shutil.rmtree(folder)
    with pytest.raises(measure.BudgetError, match="the runtime does not load"):
        measure.start_numbers(folder)


def test_the_tracked_budgets_are_those_of_the_tracked_manifest() -> None:
    """The bytes of cubins are `.ci/run`'s to hold: a manifest does not state them."""
    manifest = parse_manifest((CHECKOUT / "manifest.json").read_bytes())
    budgets = read_budgets(budget.BUDGETS)
    for kernel in manifest.kernels:
        stated = budgets["kernels", kernel.name, kernel.arch, "registers"]
        assert kernel.resources.registers <= stated, kernel.key
