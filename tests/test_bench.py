"""The bench without a GPU: who is checked, what is counted, what is printed, drawn and stored."""

from __future__ import annotations

import collections
import contextlib
import itertools
import json
import os
import subprocess
import sys
import textwrap
import types
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

pytest.importorskip("click", reason="needs the extra `bench`")
torch = pytest.importorskip("torch", reason="torch is the caller's and is not installed here")

from click.testing import CliRunner, Result  # noqa: E402
from conftest import sample_manifest  # noqa: E402
from hypothesis import given  # noqa: E402
from hypothesis import strategies as st  # noqa: E402
from watchdog import ends_within  # noqa: E402

import build_kernels  # noqa: E402
from build_kernels.bench import (  # noqa: E402
    command,
    contenders,
    floors,
    measure,
    model,
    options,
    partition,
    peers,
    stopwatch,
)
from build_kernels.bench.check import complaint, exact_complaint, reference_of  # noqa: E402
from build_kernels.bench.contenders import Entrant, Unavailable  # noqa: E402
from build_kernels.bench.inputs import make_inputs, poison  # noqa: E402
from build_kernels.bench.plot import limits, plot_report, spread  # noqa: E402
from build_kernels.bench.report import (  # noqa: E402
    BEHIND,
    COLD,
    EAGER,
    EMPTY,
    HOST,
    OURS,
    OWN,
    PEER,
    READ,
    VARIANT,
    WARM,
    Contender,
    Figure,
    Floor,
    Machine,
    Method,
    Problem,
    Report,
    ReportError,
    geometric_mean,
    ratio_at,
    ratios,
    read_report,
    variant_ratio,
    write_report,
)
from build_kernels.bench.stopwatch import CudaStopwatch, Timing, timing_of  # noqa: E402
from build_kernels.bench.table import places  # noqa: E402
from build_kernels.cli import main as cli  # noqa: E402
from dsv4_router_runtime.artifacts.folder import ArtifactSet  # noqa: E402
from dsv4_router_runtime.device import driver, load  # noqa: E402
from dsv4_router_runtime.device.launch import ParameterBlock  # noqa: E402
from dsv4_router_runtime.reference import router_reference, router_scores  # noqa: E402

PROBLEM = Problem(k=256, num_experts=24, top_k=6, routed_scaling_factor=2.5, layers=4)
MACHINE = Machine(
    gpu="NVIDIA H200", arch="sm_90a", driver="580", cuda="13.0", torch="2.11", triton="3.6"
)


# A report made by hand: two shapes, cold, N = 1 and 64; vllm is missing at N = 1 of the second.

TIMES = {
    ("7168x384", 1): {"ours": 4.0, "cuBLAS + router_topk": 3.9, "vllm": 6.0, "torch": 30.0},
    ("7168x384", 64): {"ours": 6.0, "cuBLAS + router_topk": 9.0, "vllm": 10.0, "torch": 36.0},
    ("4096x256", 1): {"ours": 3.0, "cuBLAS + router_topk": 8.0, "vllm": None, "torch": 30.0},
    ("4096x256", 64): {"ours": 5.0, "cuBLAS + router_topk": 9.0, "vllm": 8.0, "torch": 35.0},
}
READS = {"7168x384": 3.2, "4096x256": 2.5}
ROLES = {"ours": OURS, "cuBLAS + router_topk": OWN, "vllm": PEER, "torch": PEER}
WHY = "ModuleNotFoundError: No module named 'cutlass'"


def figure(shape: str, num_tokens: int, contender: str, time: float | None) -> Figure:
    return Figure(
        shape=shape,
        mode=COLD,
        num_tokens=num_tokens,
        contender=contender,
        microseconds=time,
        low=time,
        high=time,
        reason=WHY if time is None else None,
    )


def floor(shape: str, name: str, time: float) -> Floor:
    return Floor(shape=shape, mode=COLD, name=name, how=f"how {name} was run", microseconds=time)


@pytest.fixture
def report() -> Report:
    return Report(
        machine=MACHINE,
        method=Method(
            date="2026-01-31",
            modes=(COLD,),
            num_tokens=(1, 64),
            layout="kmajor",
            replays=20,
            host_calls=200,
            least_weight_bytes=200_000_000,
            seed=20,
            key_tolerance=1e-4,
            weight_tolerance=1e-3,
            manifest_sha256="0" * 64,
        ),
        problems=tuple(measure.make_problem(k, e, 6, 60 << 20) for k, e in SHAPES),
        contenders=tuple(
            Contender(name=name, role=role, what=f"what {name} is") for name, role in ROLES.items()
        ),
        figures=tuple(
            figure(shape, num_tokens, name, time)
            for (shape, num_tokens), row in TIMES.items()
            for name, time in row.items()
        ),
        floors=tuple(
            floor(shape, name, time)
            for shape, read in READS.items()
            for name, time in ((EMPTY, 0.7), (READ, read))
        ),
    )


SHAPES = ((7168, 384), (4096, 256))


@pytest.fixture
def report_file(report: Report, tmp_path: Path) -> Path:
    path = tmp_path / "report.json"
    write_report(path, report)
    return path


# ---- Statistics --------------------------------------------------------------------------------


def test_median_and_quartiles() -> None:
    assert timing_of([4.0, 1.0, 2.0, 3.0, 100.0]) == Timing(microseconds=3.0, low=2.0, high=4.0)


def test_geometric_mean() -> None:
    assert geometric_mean([0.5, 2.0]) == pytest.approx(1.0)
    assert geometric_mean([0.6]) == pytest.approx(0.6)
    with pytest.raises(ValueError, match="at least one value"):
        geometric_mean([])


def test_a_ratio_is_to_the_best_peer_and_own_variants_are_no_peers(report: Report) -> None:
    ratio = ratio_at(report, "7168x384", COLD, 1)
    assert ratio.best_peer == "vllm"
    assert ratio.to_peer == pytest.approx(4 / 6)
    assert ratio.to_read == pytest.approx(4 / 3.2)


def test_a_peer_without_a_figure_is_not_the_best(report: Report) -> None:
    ratio = ratio_at(report, "4096x256", COLD, 1)
    assert (ratio.best_peer, ratio.to_peer) == ("torch", pytest.approx(0.1))


def test_no_ratio_without_figures(report: Report) -> None:
    bare = replace(report, figures=tuple(f for f in report.figures if f.contender == "vllm"))
    assert {(r.to_peer, r.to_read) for r in ratios(bare, COLD)} == {(None, None)}
    bare = replace(report, figures=tuple(f for f in report.figures if f.contender == "ours"))
    assert {r.to_peer for r in ratios(bare, COLD)} == {None}


@pytest.fixture
def varied(report: Report) -> Report:
    """The same figures, of which vllm's and torch's are variants' of the contender before them."""
    roles = ROLES | {"vllm": VARIANT, "torch": VARIANT}
    changed = tuple(replace(c, role=roles[c.name]) for c in report.contenders)
    return replace(report, contenders=changed)


def test_a_variant_is_compared_with_what_it_varies(varied: Report) -> None:
    base = "cuBLAS + router_topk"
    assert varied.variants == (("vllm", base), ("torch", base))
    vllm, torch_ = (
        [variant_ratio(varied, shape, COLD, 1, pair) for shape in READS] for pair in varied.variants
    )
    assert vllm == [pytest.approx(6 / 3.9), None]
    assert torch_ == [pytest.approx(30 / 3.9), pytest.approx(30 / 8)]
    assert ratio_at(varied, "7168x384", COLD, 1).to_peer is None


# ---- JSON --------------------------------------------------------------------------------------


def test_a_report_survives_the_file(report: Report, report_file: Path) -> None:
    assert read_report(report_file) == report
    assert os.listdir(report_file.parent) == ["report.json"]
    first = report_file.read_bytes()
    write_report(report_file, read_report(report_file))
    assert report_file.read_bytes() == first


def test_a_failed_write_leaves_the_old_file(
    report: Report, report_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> None:
        raise OSError("no space")

    before = report_file.read_bytes()
    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(OSError, match="no space"):
        write_report(report_file, replace(report, figures=()))
    assert report_file.read_bytes() == before
    assert os.listdir(report_file.parent) == ["report.json"]


def test_a_special_file_is_no_report(tmp_path: Path) -> None:
    """Each of these made `bench --render` wait, fill the memory or end in a traceback."""
    os.mkfifo(tmp_path / "fifo")
    (tmp_path / "zero").symlink_to("/dev/zero")
    (tmp_path / "deep").write_text("[" * 100_000)
    with (tmp_path / "huge").open("wb") as huge:
        huge.truncate(2**32)
    for name in ("fifo", "zero", "deep", "huge", "absent"):
        with ends_within(20), pytest.raises(ReportError, match=name):
            read_report(tmp_path / name)


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (
            lambda d: d.update(schema_version=2),
            "schema_version: expected 1, the only schema that is read here (got 2)",
        ),
        (lambda d: d.pop("floors"), "floors: missing"),
        (lambda d: d["figures"][3].update(microseconds="4"), "figures[3].microseconds: expected"),
        (lambda d: d["figures"][1].pop("mode"), "figures[1].mode: missing"),
        (lambda d: d["method"].update(num_tokens=7), "method.num_tokens: expected a list (got 7)"),
        (lambda d: d["method"].update(replays=True), "method.replays: expected an int from"),
        (lambda d: d["contenders"][0].update(role="peer"), 'expected one with the role "ours"'),
    ],
)
def test_a_file_that_is_no_report_names_the_place(report_file: Path, spoil, words: str) -> None:
    document = json.loads(report_file.read_text())
    spoil(document)
    report_file.write_text(json.dumps(document))
    with pytest.raises(ReportError) as error:
        read_report(report_file)
    assert words in str(error.value)
    assert str(report_file) in str(error.value)


def test_a_whole_number_is_a_time_too(report_file: Path) -> None:
    report_file.write_text(
        report_file.read_text().replace('"microseconds": 4.0', '"microseconds": 4')
    )
    time = read_report(report_file).microseconds("7168x384", COLD, 1, "ours")
    assert (type(time), time) == (float, 4.0)


# ---- The command -------------------------------------------------------------------------------


def bench(*arguments: str | Path) -> Result:
    return CliRunner().invoke(cli.main, ["bench", *map(str, arguments)])


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--shapes", "7168"), "expected shapes such as 7168x384 (got '7168')"),
        (("--shapes", "7168x384,"), "expected shapes such as 7168x384 (got '')"),
        (("--shapes", "7100x384"), "7100x384: K must be a multiple of 64 (got 7100)"),
        (("--shapes", "0x384"), "K must be a multiple of 64"),
        (("--shapes", "4096x513"), "4096x513: E must be 1 to 512 (got 513)"),
        (("--shapes", "4096x256,4096x256"), "the same one is given twice"),
        (("--shapes", "4096x4"), "--top-k 6: 4096x4 has fewer experts"),
        (("--n", "1,x"), "expected numbers of tokens, each at least 1 (got 'x')"),
        (("--n", "0"), "each at least 1 (got '0')"),
        (("--n", "8,8"), "the same one is given twice"),
        (("--mode", "hot"), "'hot'"),
        (("--top-k", "9"), "9"),
        (("--layout", "rowmajor"), "'rowmajor'"),
        (("--peers", "/no/such/folder"), "does not exist"),
        (("--options", "--peers", "."), "--options times no peers: it goes without --peers"),
        (("--options", "--dsl", "."), "--options times no peers: it goes without --peers"),
        (("--render", "/no/such/file"), "does not exist"),
    ],
)
def test_wrong_arguments_are_usage_errors(arguments: tuple[str, str], words: str) -> None:
    result = bench(*arguments)
    assert result.exit_code == 2
    assert words in " ".join(result.stderr.split())
    assert result.stdout == ""


def test_render_goes_with_no_way_of_measuring(report_file: Path) -> None:
    result = bench("--render", report_file, "--n", "4")
    assert result.exit_code == 2
    assert "it goes with --plot and --json alone (got --n)" in result.stderr


def test_without_a_gpu_it_says_so_and_names_render(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    result = bench()
    assert result.exit_code == 1
    assert "sees no CUDA GPU" in result.stderr
    assert "--render FILE" in result.stderr
    assert result.stdout == ""


@pytest.mark.parametrize("option", ["--json", "--plot"])
def test_a_missing_folder_is_found_before_measuring(tmp_path: Path, option: str) -> None:
    result = bench(option, tmp_path / "no" / "file")
    assert result.exit_code == 1
    assert f"there is no folder {tmp_path / 'no'}" in result.stderr.replace("\n", "")


def test_a_run_writes_the_file_and_prints_the_table(
    report: Report, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(command, "_measure", lambda *_: report)
    result = bench("--json", tmp_path / "out.json")
    assert (result.exit_code, result.stderr) == (0, "")
    assert read_report(tmp_path / "out.json") == report
    assert "| ours |" in result.stdout


def test_a_figure_of_ours_that_is_missing_fails_the_run(
    report: Report, monkeypatch: pytest.MonkeyPatch
) -> None:
    wrong = replace(report.figures[0], microseconds=None, reason="wrong ids in 3 of 64 rows")
    broken = replace(report, figures=(wrong, *report.figures[1:]))
    monkeypatch.setattr(command, "_measure", lambda *_: broken)
    result = bench()
    assert result.exit_code == 1
    assert "ours is not measured at 7168x384 cold N=1 (wrong ids in 3 of 64 rows)" in result.stderr
    assert "not measured: ours (7168x384; cold; N=1): wrong ids in 3 of 64 rows" in result.stdout


def test_so_does_a_variants(varied: Report, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(command, "_measure", lambda *_: varied)
    result = bench("--options")
    assert result.exit_code == 1
    assert result.stderr == f"error: vllm is not measured at 4096x256 cold N=1 ({WHY})\n"


def test_no_pdl_names_ours_without_it() -> None:
    artifacts = ArtifactSet(folder=Path(), manifest=sample_manifest())
    with_pdl = contenders.own_entrants(artifacts, pdl=True)
    without = contenders.own_entrants(artifacts, pdl=False)
    assert [(e.contender.name, e.contender.role) for e in with_pdl] == [
        ("ours", OURS),
        ("ours, no PDL", OWN),
        ("cuBLAS + router_topk", OWN),
    ]
    assert [(e.contender.name, e.contender.role) for e in without] == [
        ("ours", OURS),
        ("cuBLAS + router_topk", OWN),
    ]


# ---- What it needs to run ----------------------------------------------------------------------


def python(code: str, *arguments: str | Path) -> subprocess.CompletedProcess[str]:
    place = str(Path(build_kernels.__file__).parents[1])
    return subprocess.run(
        [sys.executable, "-c", code, *map(str, arguments)],
        env={**os.environ, "PYTHONPATH": place},
        capture_output=True,
        text=True,
        check=False,
    )


COMPILERS = ("cutlass", "elftools", "sentryward", "hatchling")
WITHOUT = """
import sys
for name in {names}:
    sys.modules[name] = None
from build_kernels.__main__ import main
main()
"""


def test_the_command_needs_no_compiler_and_no_elf_reader() -> None:
    done = python(WITHOUT.format(names=COMPILERS), "bench", "--help")
    assert done.returncode == 0, done.stderr
    assert "--render" in done.stdout


@pytest.mark.slow
def test_measuring_imports_no_compiler() -> None:
    code = f"""
import sys
import build_kernels.bench.measure, build_kernels.bench.peers, build_kernels.bench.stopwatch
print([name for name in {(*COMPILERS, "triton", "matplotlib")} if name in sys.modules])
"""
    assert python(code).stdout.strip() == "[]"


def test_a_stored_report_needs_neither_torch_nor_a_driver(report_file: Path) -> None:
    names = (*COMPILERS, "torch", "numpy", "triton", "cuda", "matplotlib")
    done = python(WITHOUT.format(names=names), "bench", "--render", report_file)
    assert done.returncode == 0, done.stderr
    assert "| ours |" in done.stdout


def test_a_picture_without_matplotlib_names_the_extra(report_file: Path, tmp_path: Path) -> None:
    code = WITHOUT.format(names=("matplotlib",))
    done = python(code, "bench", "--render", report_file, "--plot", tmp_path / "p.png")
    assert done.returncode == 1
    assert "pip install 'dsv4-router-builder[bench]'" in done.stderr
    assert done.stdout == ""


# ---- Rendering ---------------------------------------------------------------------------------


def test_the_table_is_markdown_with_every_figure(report_file: Path) -> None:
    result = bench("--render", report_file)
    assert result.exit_code == 0
    assert result.stderr == ""
    lines = result.stdout.splitlines()
    head = next(line for line in lines if line.startswith("|  N |"))
    assert [cell.strip() for cell in head.strip("|").split("|")] == [
        *("N", "ours", "cuBLAS + router_topk", "vllm", "torch"),
        *("ours / best peer", "ours / read W"),
    ]
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    assert ["1", "4.00", "3.90", "6.00", "30.0", "0.67 (vllm)", "1.25"] in rows
    assert ["1", "3.00", "8.00", "-", "30.0", "0.10 (torch)", "1.20"] in rows
    assert any("empty 0.70; read W 3.20" in line for line in lines)


def test_worst_and_mean_are_printed(report_file: Path) -> None:
    out = bench("--render", report_file).stdout
    mean = geometric_mean([4 / 6, 6 / 10, 3 / 30, 5 / 8])
    expected = (
        f"cold: ours / best peer: worst 0.667 (7168x384, N=1, vllm), geometric mean {mean:.3f}"
    )
    assert f"{expected} of 4 points" in out
    assert "cold: ours / read W: worst 2.000 (4096x256, N=64)" in out


def test_variants_have_a_column_and_a_worst(varied: Report, tmp_path: Path) -> None:
    write_report(tmp_path / "r.json", varied)
    out = bench("--render", tmp_path / "r.json").stdout
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in out.splitlines()]
    base = "cuBLAS + router_topk"
    names = ["N", "ours", base, "vllm", "torch"]
    assert [*names, f"vllm / {base}", f"torch / {base}", "ours / read W"] in rows
    assert ["1", "3.00", "8.00", "-", "30.0", "-", "3.75", "1.20"] in rows
    mean = geometric_mean([6 / 3.9, 10 / 9, 8 / 9])
    expected = f"cold: vllm / {base}: worst 1.538 (7168x384, N=1), geometric mean {mean:.3f}"
    assert expected in out


def test_what_is_not_measured_says_why(report_file: Path) -> None:
    out = bench("--render", report_file).stdout
    assert f"not measured: vllm (4096x256; cold; N=1): {WHY}" in out


def test_places_are_short_where_they_are_a_product() -> None:
    cells = [("a", mode, n) for mode in ("cold", "warm") for n in ("N=1", "N=4")]
    assert places(cells) == "a; cold, warm; N=1, N=4"
    assert places(cells[:3]) == "a cold N=1; a cold N=4; a warm N=1"


def test_a_floor_names_the_kernel_that_was_run(report_file: Path) -> None:
    out = bench("--render", report_file).stdout
    assert "read W: how read W was run" in out


def test_words_in_brackets_are_not_markup(report: Report, tmp_path: Path) -> None:
    failed = replace(report.figures[2], microseconds=None, reason="[bold]no kernel[/bold]")
    figures = (*report.figures[:2], failed, *report.figures[3:])
    write_report(tmp_path / "r.json", replace(report, figures=figures))
    assert "[bold]no kernel[/bold]" in bench("--render", tmp_path / "r.json").stdout


@pytest.mark.slow
def test_the_picture_is_a_png_and_the_same_each_time(report: Report, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib", reason="needs the extra `bench`")
    for name in ("one.png", "two.png"):
        plot_report(tmp_path / name, report)
    data = (tmp_path / "one.png").read_bytes()
    assert data.startswith(b"\x89PNG\r\n")
    assert data == (tmp_path / "two.png").read_bytes()
    assert sorted(os.listdir(tmp_path)) == ["one.png", "two.png"]


@pytest.mark.quick(1)
@pytest.mark.parametrize("count", [1, 2, 4, 5])
def test_any_number_of_shapes_is_drawn(report: Report, tmp_path: Path, count: int) -> None:
    pytest.importorskip("matplotlib", reason="needs the extra `bench`")
    shapes = [measure.make_problem(64 * (at + 1), 384, 6, 0) for at in range(count)]
    figures = tuple(figure(shape.name, 64, "ours", 5.0) for shape in shapes)
    drawn = replace(report, problems=tuple(shapes), figures=figures, floors=())
    plot_report(tmp_path / "p.png", drawn)
    assert (tmp_path / "p.png").stat().st_size > 1000


def test_the_axis_holds_figures_and_floors(report: Report) -> None:
    low, high = limits(report, COLD)
    assert low < 0.7
    assert high > 36


@given(st.lists(st.floats(0, 1), max_size=9))
def test_labels_are_moved_apart_in_order(wanted: list[float]) -> None:
    places = spread(wanted, 0.05)
    ranked = sorted(range(len(wanted)), key=lambda at: (places[at], wanted[at]))
    gaps = [places[b] - places[a] for a, b in itertools.pairwise(ranked)]
    assert all(gap >= 0.05 - 1e-9 for gap in gaps)
    assert all(wanted[a] <= wanted[b] for a, b in itertools.pairwise(ranked))


def test_labels_with_room_stay() -> None:
    assert spread([0.9, 0.1, 0.5], 0.05) == [0.9, 0.1, 0.5]


# ---- The model ---------------------------------------------------------------------------------


def test_the_model_is_the_sum_of_its_terms(report: Report) -> None:
    first, last = model.predict(report, "7168x384")
    bytes_of_w = 7168 * 384 * 2
    fraction = bytes_of_w / 2.5e-6 / 4.8e12
    assert model.attained_fraction(bytes_of_w, 3.2, 0.7) == pytest.approx(fraction)
    # 2.5 us of reading at 4.8 TB/s are 1.5 us at 8 TB/s.
    assert first.read == pytest.approx(2.5 * 4.8 / 8)
    assert (first.launch, first.exchange, first.tokens) == (0.7, pytest.approx(0.8), 0)
    assert first.total == pytest.approx(0.7 + 1.5 + 0.8)
    assert (last.exchange, last.tokens) == (pytest.approx(0.8), 2)
    assert last.total == pytest.approx(first.total + 2)


def test_on_the_h200s_own_bandwidth_the_model_is_the_measurement(
    report: Report, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(model, "B200_BANDWIDTH", model.H200_BANDWIDTH)
    for prediction in model.predict(report, "4096x256"):
        assert prediction.total == pytest.approx(prediction.measured)


def test_overlap_beyond_the_read_counts_as_no_exchange(report: Report) -> None:
    fast = replace(report.figures[0], microseconds=2.9)
    first, _ = model.predict(replace(report, figures=(fast, *report.figures[1:])), "7168x384")
    assert first.exchange == 0


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"machine": replace(MACHINE, gpu="NVIDIA B200")}, "measured: NVIDIA B200"),
        ({"floors": ()}, "needs cold figures of ours, an empty kernel and read W"),
        ({"figures": ()}, "needs cold figures of ours"),
    ],
)
def test_no_model_without_its_measurements(report: Report, change: dict, words: str) -> None:
    with pytest.raises(model.NoModelError, match=words):
        model.predict(replace(report, **change), "7168x384")


def test_the_model_is_printed_as_one(report_file: Path) -> None:
    out = bench("--render", report_file).stdout
    assert "7168x384 on a B200, sm_100a: MODEL, NOT MEASURED" in out
    assert "sum (model, not measured)" in out
    assert "The model assumes: " in out


# ---- Checking answers --------------------------------------------------------------------------


@pytest.fixture
def inputs(seed: int):
    return make_inputs(PROBLEM, "kmajor", "cpu", seed).with_tokens(5, seed)


def right_answer(inputs, layer: int):
    problem = inputs.problem
    weights, ids = router_reference(
        inputs.hidden_states,
        inputs.gates[layer],
        inputs.bias,
        problem.routed_scaling_factor,
        problem.top_k,
    )
    return weights.float(), ids


def test_layouts_hold_the_same_weights(seed: int) -> None:
    one, other = (make_inputs(PROBLEM, layout, "cpu", seed) for layout in ("kmajor", "emajor"))
    assert one.gates[2].stride() == (1, 256)
    assert other.gates[2].stride() == (24, 1)
    assert torch.equal(one.gates[2], other.gates[2])
    assert torch.equal(one.weights[2].t(), one.gates[2])
    assert not torch.equal(one.weights[2], one.weights[3])
    assert all(weights.count_nonzero() > 0.99 * weights.numel() for weights in one.weights)


def test_the_right_answer_is_right(inputs) -> None:
    assert complaint(right_answer(inputs, 1), reference_of(inputs, 1), 6) is None


def test_another_order_of_the_same_ids_is_right(inputs) -> None:
    weights, ids = right_answer(inputs, 1)
    assert complaint((weights.flip(1), ids.flip(1)), reference_of(inputs, 1), 6) is None


def spoiled(name: str, weights, ids):
    if name == "another layer":
        return weights, (ids + 1) % PROBLEM.num_experts
    if name == "poison":
        poison((weights, ids))
    elif name == "twice":
        ids[3, 2] = ids[3, 5]
    elif name == "range":
        ids[0, 0] = PROBLEM.num_experts
    elif name == "scale":
        weights *= 1.01
    elif name == "nan":
        weights[2, 2] = torch.nan
    elif name == "rows":
        return weights[:-1], ids[:-1]
    return weights, ids


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("another layer", "wrong ids in"),
        ("poison", "ids outside [0, 24) in 5 of 5 rows"),
        ("twice", "an id twice in 1 of 5 rows"),
        ("range", "ids outside [0, 24) in 1 of 5 rows"),
        ("scale", "weights off by up to 1 % in 5 of 5 rows"),
        ("nan", "weights off by up to nan % in 1 of 5 rows"),
        ("rows", "outputs: expected shape [5, 6] (got [4, 6] and [4, 6])"),
    ],
)
def test_wrong_answers_are_named(inputs, name: str, words: str) -> None:
    result = spoiled(name, *right_answer(inputs, 1))
    assert words in str(complaint(result, reference_of(inputs, 1), 6))


def test_experts_too_close_to_call_may_change_places(inputs) -> None:
    close = replace(inputs, weights=tuple(w[:1].expand(24, -1) for w in inputs.weights))
    close = replace(close, bias=inputs.bias.new_full((24,), 8.0))
    weights = torch.full((5, 6), 2.5 / 6)
    ids = torch.arange(10, 16, dtype=torch.int32).expand(5, 6)
    assert complaint((weights, ids), reference_of(close, 0), 6) is None
    steered = replace(close, bias=close.bias.index_fill(0, torch.tensor([3]), 8.001))
    assert "wrong ids in 5 of 5" in str(complaint((weights, ids), reference_of(steered, 0), 6))


# ---- The run -----------------------------------------------------------------------------------


class FakeStopwatch:
    """Calls once what is to be timed; the time is the number of calls."""

    device = "cpu"

    def __init__(self, stream: object = None) -> None:
        self.timed: list[str] = []
        self.orders: list[tuple[str, tuple[int, ...]]] = []

    def prepare(self, call, order, mode):
        self.orders.append((mode, tuple(order)))
        results = [call(layer) for layer in order]
        if mode in (EAGER, HOST):
            return lambda: [call(layer) for layer in order]

        def replay():
            # A replay writes again to where the recorded calls wrote.
            for held, layer in zip(results, order, strict=True):
                for to, made in zip(held, call(layer), strict=True):
                    to.copy_(made)
            return results

        return replay

    def time(self, run, calls, mode):
        run()
        self.timed.append("graph or eager")
        return Timing(microseconds=float(calls), low=float(calls), high=float(calls))

    def time_host(self, call, order):
        call(order[0])
        self.timed.append("host")
        return Timing(microseconds=1.0, low=1.0, high=1.0)

    def wait(self) -> None:
        self.waited = True


class FloorsAside(FakeStopwatch):
    """Floors give no pair of outputs to write back."""

    def prepare(self, call, order, mode):
        if isinstance(call(0), tuple):
            return super().prepare(call, order, mode)
        return lambda: [call(layer) for layer in order]


def right(inputs):
    return lambda layer: right_answer(inputs, layer)


def wrong_in_the_last_layer(inputs):
    def call(layer: int):
        weights, ids = right_answer(inputs, layer)
        return weights, (ids + 1) % 24 if layer == PROBLEM.layers - 1 else ids

    return call


def writes_nothing(inputs):
    outputs = inputs.new_outputs()
    outputs[0].copy_(right_answer(inputs, 0)[0])
    outputs[1].copy_(right_answer(inputs, 0)[1])
    return lambda layer: outputs


def cannot_be_made(inputs):
    raise Unavailable("takes 256 experts alone")


def fails_when_called(inputs):
    def call(layer: int):
        raise RuntimeError("CUDA error: an illegal memory access")

    return call


def entrant(name: str, role: str, make) -> Entrant:
    return Entrant(contender=Contender(name=name, role=role, what=name), make=make)


def run_bench(
    *entrants: Entrant,
    modes=(COLD, WARM, EAGER),
    stopwatch=None,
    num_tokens=(2, 3),
    make_layers=make_inputs,
):
    return measure.measure(
        problems=[PROBLEM],
        num_tokens=num_tokens,
        modes=modes,
        layout="kmajor",
        entrants=entrants,
        stopwatch=stopwatch or FloorsAside(),
        machine=MACHINE,
        manifest_sha256="0" * 64,
        on_figures=lambda figures: None,
        make_layers=make_layers,
    )


def test_a_right_contender_has_every_figure() -> None:
    report = run_bench(entrant("ours", OURS, right))
    assert [(f.mode, f.num_tokens, f.reason) for f in report.figures] == [
        (mode, n, None) for n in (2, 3) for mode in (COLD, WARM, EAGER, HOST)
    ]
    assert report.modes == (COLD, WARM, EAGER, HOST)
    assert report.microseconds(PROBLEM.name, COLD, 3, "ours") == PROBLEM.layers


def test_a_wrong_contender_is_reported_and_excluded() -> None:
    stopwatch = FloorsAside()
    report = run_bench(
        entrant("ours", OURS, right),
        entrant("wrong", PEER, wrong_in_the_last_layer),
        entrant("torch", PEER, right),
        modes=(COLD,),
        stopwatch=stopwatch,
        num_tokens=(2,),
    )
    (cold,) = (f for f in report.figures if f.contender == "wrong" and f.mode == COLD)
    assert cold.microseconds is None
    assert cold.reason == "wrong answer in layer 3: wrong ids in 2 of 2 rows"
    assert ratio_at(report, PROBLEM.name, COLD, 2).best_peer == "torch"
    # Two contenders in two modes and two floors: the wrong one was never timed.
    assert stopwatch.timed.count("host") == 2
    assert len(stopwatch.timed) == 2 + 2 + 2


def test_an_answer_that_was_there_before_does_not_count() -> None:
    report = run_bench(entrant("ours", OURS, writes_nothing), modes=(EAGER,), num_tokens=(2,))
    assert {f.reason for f in report.figures} == {
        "wrong answer in layer 0: ids outside [0, 24) in 2 of 2 rows"
    }


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (cannot_be_made, "takes 256 experts alone"),
        (fails_when_called, "RuntimeError: CUDA error: an illegal memory access"),
    ],
)
def test_a_failing_contender_says_why_and_the_rest_go_on(make, reason: str) -> None:
    report = run_bench(entrant("failing", PEER, make), entrant("ours", OURS, right))
    assert {f.reason for f in report.figures if f.contender == "failing"} == {reason}
    assert {f.reason for f in report.figures if f.contender == "ours"} == {None}


def test_cold_takes_each_weight_once_and_warm_one() -> None:
    stopwatch = FloorsAside()
    run_bench(entrant("ours", OURS, right), modes=(COLD, WARM), stopwatch=stopwatch)
    assert set(stopwatch.orders) == {
        (COLD, (0, 1, 2, 3)),
        (WARM, (0, 0, 0, 0)),
        (HOST, (0, 1, 2, 3)),
    }


def test_cold_weights_are_several_times_the_l2() -> None:
    h200 = measure.make_problem(7168, 384, 6, 60 << 20)
    assert h200.layers * h200.weight_bytes >= 4 * (60 << 20)
    assert h200.routed_scaling_factor == 2.5
    small_l2 = measure.make_problem(4096, 256, 6, 1 << 20)
    assert 200_000_000 <= small_l2.layers * small_l2.weight_bytes < 203_000_000
    assert measure.make_problem(65536, 512, 6, 0).layers == 30


@pytest.fixture
def fake_triton(monkeypatch: pytest.MonkeyPatch) -> Callable[[Callable[[], object]], None]:
    """Install a Triton whose active driver answers with `target`, whether or not a real one is."""

    def install(target: Callable[[], object]) -> None:
        active = types.SimpleNamespace(get_current_target=target)
        runtime = types.ModuleType("triton.runtime")
        runtime.driver = types.SimpleNamespace(active=active)
        triton = types.ModuleType("triton")
        triton.__version__, triton.runtime = "3.7.1", runtime
        monkeypatch.setitem(sys.modules, "triton", triton)
        monkeypatch.setitem(sys.modules, "triton.runtime", runtime)

    return install


def no_active_driver() -> object:
    raise RuntimeError("0 active drivers ([]). There should only be one.\nmore")


def test_triton_without_a_driver_is_no_candidate(fake_triton) -> None:
    fake_triton(no_active_driver)
    assert floors.why_no_triton(torch.device("cuda")) == (
        "Triton has no active driver: "
        "RuntimeError: 0 active drivers ([]). There should only be one."
    )


def test_triton_with_a_driver_is_one_for_cuda_tensors_alone(fake_triton) -> None:
    fake_triton(object)
    assert floors.why_no_triton(torch.device("cuda")) is None
    reason = "Triton takes CUDA tensors, these are on cpu"
    assert floors.why_no_triton(torch.device("cpu")) == reason


def test_triton_that_is_not_installed_is_no_candidate(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in sys.modules if name.partition(".")[0] == "triton"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "triton", None)
    assert str(floors.why_no_triton(torch.device("cuda"))).startswith("no Triton: ")


def test_floors_that_triton_cannot_time_are_torchs_and_say_why(fake_triton) -> None:
    fake_triton(no_active_driver)
    report = run_bench(entrant("ours", OURS, right))
    why = "(Triton takes CUDA tensors, these are on cpu)"
    found = {(f.mode, f.name, f.how, f.reason) for f in report.floors}
    empty, read = f"torch zero_ of one element {why}", f"torch sum of int32 {why}"
    assert found == {
        (COLD, EMPTY, empty, None),
        (COLD, READ, read, None),
        (WARM, EMPTY, empty, None),
        (WARM, READ, read, None),
        (EAGER, EMPTY, empty, None),
    }


def test_floors_that_triton_can_time_are_tritons(monkeypatch: pytest.MonkeyPatch) -> None:
    launched = []
    kernel = types.SimpleNamespace(
        empty_kernel={(1,): lambda sink: launched.append("empty")},
        read_kernel=collections.defaultdict(lambda: lambda *_, **__: launched.append("read")),
    )
    monkeypatch.setitem(sys.modules, "build_kernels.bench.triton_kernels", kernel)
    monkeypatch.setattr(floors, "why_no_triton", lambda device: None)
    report = run_bench(entrant("ours", OURS, right), modes=(COLD,), num_tokens=(2,))
    assert [(f.name, f.how.split()[0]) for f in report.floors] == [
        (EMPTY, "Triton,"),
        (READ, "Triton,"),
    ]
    blocks = len(floors.READ_BLOCKS) * len(floors.READ_WARPS)
    calls = launched.count("empty")
    assert calls >= PROBLEM.layers
    assert launched == ["empty"] * calls + ["read"] * (calls * blocks)


def test_the_fastest_way_is_the_floor() -> None:
    class Clock(FloorsAside):
        times = iter([3.0, 2.0, 5.0])

        def time(self, run, calls, mode):
            time = next(self.times)
            return Timing(microseconds=time, low=time, high=time)

    ways = [floors.Candidate(how=how, call=lambda layer: layer) for how in ("a", "b", "c")]
    made = make_inputs(PROBLEM, "kmajor", "cpu", 1)
    floor = measure.measure_floor(READ, ways, made, COLD, Clock())
    assert (floor.how, floor.microseconds) == ("b", 2.0)


def test_a_floor_that_fails_says_why() -> None:
    def fail(layer: int):
        raise RuntimeError("no kernel image")

    made = make_inputs(PROBLEM, "kmajor", "cpu", 1)
    ways = [floors.Candidate(how="a", call=fail)]
    floor = measure.measure_floor(READ, ways, made, COLD, FloorsAside())
    assert (floor.microseconds, floor.reason) == (None, "RuntimeError: no kernel image")


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (ValueError("one\ntwo"), "ValueError: one"),
        (AssertionError(), "AssertionError"),
        (RuntimeError("x" * 1000), "RuntimeError: " + "x" * 300),
    ],
)
def test_a_reason_is_one_line(error: Exception, words: str) -> None:
    assert measure.in_a_line(error) == words


def test_progress_is_one_line_a_row() -> None:
    row = (figure("7168x384", 4, "ours", 4.2), figure("7168x384", 4, "vllm", None))
    line = command.progress_line(row)
    assert line == f"7168x384 cold N=4: ours 4.20, vllm not measured: {WHY}"


# ---- The shell around the GPU, on a stand-in ---------------------------------------------------


class FakeCuda:
    """torch.cuda as the stopwatch uses it: capturing calls, replaying counts, events tick."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.log: list[str] = []
        self.clock = 0.0
        cuda = self

        class Stream:
            def wait_stream(self, other) -> None:
                cuda.log.append("side waits")

        class Graph:
            def replay(self) -> None:
                cuda.log.append("replay")
                cuda.clock += 0.5

        class Event:
            def __init__(self, *, enable_timing: bool) -> None:
                assert enable_timing

            def record(self) -> None:
                self.at = cuda.clock

            def elapsed_time(self, later) -> float:
                return later.at - self.at

        @contextlib.contextmanager
        def inside(what: str):
            cuda.log.append(what)
            yield
            cuda.log.append(f"end of {what}")

        fakes = {
            "Stream": Stream,
            "CUDAGraph": Graph,
            "Event": Event,
            "current_stream": lambda: Stream(),
            "stream": lambda stream: inside("side stream"),
            "graph": lambda graph, stream: inside(f"capture on {stream}" if stream else "capture"),
            "synchronize": lambda: cuda.log.append("wait"),
        }
        for name, fake in fakes.items():
            monkeypatch.setattr(torch.cuda, name, fake)


@pytest.fixture
def cuda(monkeypatch: pytest.MonkeyPatch) -> FakeCuda:
    monkeypatch.setattr(stopwatch, "WARM_UP_SECONDS", 1e-9)
    return FakeCuda(monkeypatch)


def test_a_graph_is_recorded_after_a_warm_up_and_replayed(cuda: FakeCuda) -> None:
    def call(layer: int) -> int:
        cuda.log.append(f"call {layer}")
        return layer

    run = CudaStopwatch().prepare(call, [0, 1, 2, 3], COLD)
    warm_up = ["side stream", "call 0", "call 1", "call 2", "end of side stream"]
    calls = [f"call {layer}" for layer in range(4)]
    capture = ["capture", *calls, "end of capture"]
    assert cuda.log == ["side waits", *warm_up, "wait", *capture]
    assert run() == [0, 1, 2, 3]
    assert cuda.log[-1] == "replay"


@pytest.mark.parametrize("mode", [EAGER, HOST])
def test_without_a_graph_each_run_calls_again(cuda: FakeCuda, mode: str) -> None:
    calls: list[int] = []
    run = CudaStopwatch().prepare(lambda layer: calls.append(layer), [0, 1, 2, 3], mode)
    run()
    assert "capture" not in cuda.log
    assert calls == [0, 1, 2, 0, 1, 2, 3]


def test_a_replays_time_is_shared_among_its_calls(cuda: FakeCuda) -> None:
    watch = CudaStopwatch()
    run = watch.prepare(lambda layer: layer, [0] * 50, WARM)
    timing = watch.time(run, 50, WARM)
    # 0.5 ms a replay of 50 calls.
    assert timing == Timing(microseconds=10.0, low=10.0, high=10.0)
    assert cuda.log.count("replay") == 1 + stopwatch.REPLAYS


@pytest.mark.parametrize("mode", [COLD, *BEHIND])
def test_cold_is_what_an_emptied_l2_gives(
    cuda: FakeCuda, monkeypatch: pytest.MonkeyPatch, mode: str
) -> None:
    filler = types.SimpleNamespace(sum=lambda: cuda.log.append("fill"))
    properties = types.SimpleNamespace(L2_cache_size=1 << 10)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
    sizes = []
    monkeypatch.setattr(torch, "zeros", lambda size, **_: sizes.append(size) or filler)
    watch = CudaStopwatch()
    run = watch.prepare(lambda layer: layer, [0, 1, 2], mode)
    cuda.log.clear()
    watch.time(run, 3, mode)
    # Once before each of the replays that count, done before the clock starts.
    assert cuda.log[-4 * stopwatch.REPLAYS :] == ["fill", "wait", "replay", "wait"] * (
        stopwatch.REPLAYS
    )
    assert cuda.log.count("fill") == stopwatch.REPLAYS
    assert sizes == [4 * (1 << 10) // 4]


def test_a_stream_that_was_given_has_every_call(cuda: FakeCuda) -> None:
    given = torch.cuda.Stream()

    def call(layer: int) -> None:
        cuda.log.append("call")

    watch = CudaStopwatch(given)
    run = watch.prepare(call, [0, 1, 2, 3], WARM)
    assert cuda.log[:2] == ["side waits", "side stream"]
    assert f"capture on {given}" in cuda.log
    for act in (lambda: watch.time(run, 4, WARM), lambda: watch.time_host(call, [0, 1])):
        cuda.log.clear()
        act()
        depth, outside = 0, 0
        for what in cuda.log:
            depth += {"side stream": 1, "end of side stream": -1}.get(what, 0)
            outside += what in ("call", "replay") and not depth
        assert {"call", "replay"} & set(cuda.log)
        assert outside == 0


@pytest.mark.usefixtures("cuda")
def test_host_time_is_that_of_single_calls(monkeypatch: pytest.MonkeyPatch) -> None:
    ticks = itertools.count(0, 7_000)
    monkeypatch.setattr(stopwatch.time, "perf_counter_ns", lambda: next(ticks))
    calls: list[int] = []
    timing = CudaStopwatch().time_host(lambda layer: calls.append(layer), [0, 1, 2])
    assert timing.microseconds == 7.0
    assert len(calls) == stopwatch.HOST_CALLS
    assert calls[:4] == [0, 1, 2, 0]


@pytest.fixture
def gpu_aside(monkeypatch: pytest.MonkeyPatch, write_artifacts) -> Path:
    """What the command asks a GPU for, from elsewhere; returns the artifacts."""
    properties = types.SimpleNamespace(L2_cache_size=60 << 20)
    for name, fake in {
        "is_available": lambda: True,
        "current_device": lambda: 0,
        "get_device_properties": lambda device: properties,
        "get_device_name": lambda: "NVIDIA H200",
        "get_device_capability": lambda: (9, 0),
    }.items():
        monkeypatch.setattr(torch.cuda, name, fake)
    monkeypatch.setattr(driver, "arch_of_device", lambda index: "sm_90a")
    monkeypatch.setattr(stopwatch, "CudaStopwatch", FloorsAside)
    monkeypatch.setattr(measure, "make_problem", lambda k, e, top_k, l2: PROBLEM)
    folder: Path = write_artifacts(sample_manifest())
    return folder


def test_the_whole_command_on_a_stand_in(
    gpu_aside: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(contenders, "router_call", lambda inputs, artifacts, *, pdl: right(inputs))
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.setattr(peers, "stand_in_for_packages", lambda: None)
    (tmp_path / "peers").mkdir()
    path = tmp_path / "out.json"
    options = ("--shapes", "256x24", "--n", "1,3", "--mode", "all", "--json", path)
    result = bench(*options, "--artifacts", gpu_aside, "--peers", tmp_path / "peers")
    assert result.exit_code == 0, result.stderr
    report = read_report(path)
    assert (report.machine.gpu, report.machine.arch) == ("NVIDIA H200", "sm_90a")
    assert report.method.modes == (COLD, WARM, EAGER)
    assert [c.name for c in report.contenders] == [
        *("ours", "ours, no PDL", "cuBLAS + router_topk"),
        *("vllm", "cuBLAS + dsv4_topk", "sglang", "torch"),
    ]
    reasons = {f.contender: f.reason for f in report.figures}
    assert reasons["ours"] is None
    assert reasons["vllm"] == "ll_bf16.py is not in peers/ (stage it there)"
    # This torch has no product of BF16 with an FP32 result on a CPU.
    assert str(reasons["torch"]).startswith("NotImplementedError: ")
    assert "256x24 warm N=3: ours 4.00" in result.stderr


def test_a_part_of_a_gpu_is_named_in_the_report(
    gpu_aside: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = []

    def make(sms: int, *, large_clusters: bool, device: int) -> partition.Partition:
        asked.append((sms, large_clusters, device))
        if sms > 132:
            raise partition.PartitionError(f"no green context of {sms} SMs: CUDA_ERROR_X")
        return partition.Partition(sms=sms + 4, context=1, stream=2)

    monkeypatch.setattr(partition, "make_partition", make)
    monkeypatch.setattr(torch.cuda, "ExternalStream", lambda handle: handle)
    streams = []
    watch = FloorsAside()
    monkeypatch.setattr(stopwatch, "CudaStopwatch", lambda on: streams.append(on) or watch)
    monkeypatch.setattr(contenders, "router_call", lambda inputs, artifacts, *, pdl: right(inputs))
    path = tmp_path / "out.json"
    options = ("--shapes", "256x24", "--n", "1", "--artifacts", gpu_aside, "--json", path)
    result = bench(*options, "--sms", "60", "--large-clusters")
    assert result.exit_code == 0, result.stderr
    assert read_report(path).machine.gpu == "NVIDIA H200, a green context of 64 SMs"
    refused = bench(*options, "--sms", "400")
    assert refused.exit_code == 1
    assert "--sms: no green context of 400 SMs: CUDA_ERROR_X; ask for" in refused.stderr
    assert asked == [(60, True, 0), (400, False, 0)]
    assert streams == [2]
    alone = bench(*options, "--large-clusters")
    assert alone.exit_code == 2
    assert "add --sms" in alone.stderr


# ---- Options -----------------------------------------------------------------------------------


class ReferenceRouter:
    """A Router that answers with the reference; `forgets` is an option that it does not know."""

    forgets: str | None = None

    def __init__(self, W_gate, *, pdl, artifacts, **binds):
        self.W_gate, self.binds = W_gate, {"e_bias": None} | binds

    def __call__(self, hidden_states, out_weights, out_ids, **brings):
        given = {k: v for k, v in (self.binds | brings).items() if k != self.forgets}
        weights, ids = router_reference(hidden_states, self.W_gate, **given)
        out_weights.copy_(weights)
        out_ids.copy_(ids)


@pytest.fixture
def reference_router(monkeypatch: pytest.MonkeyPatch) -> type[ReferenceRouter]:
    class OfThisTest(ReferenceRouter):
        pass

    monkeypatch.setattr(contenders, "Router", OfThisTest)
    monkeypatch.setattr(options, "VOCAB_SIZE", 50)
    return OfThisTest


NAMES = ("ours", "options", "hash layer")
NO_PDL = ("ours, no PDL", "options, no PDL", "hash layer, no PDL")


@pytest.mark.usefixtures("reference_router")
def test_the_options_on_a_stand_in(gpu_aside: Path, tmp_path: Path) -> None:
    path = tmp_path / "out.json"
    arguments = ("--shapes", "256x24", "--n", "1,9", "--json", path, "--artifacts", gpu_aside)
    result = bench("--options", *arguments)
    assert result.exit_code == 0, result.stderr
    report = read_report(path)
    assert [c.name for c in report.contenders] == [*NAMES, *NO_PDL]
    roles = [c.role for c in report.contenders]
    assert roles == [OURS, VARIANT, VARIANT, OWN, VARIANT, VARIANT]
    pairs = [(name, three[0]) for three in (NAMES, NO_PDL) for name in three[1:]]
    assert report.variants == tuple(pairs)
    assert {f.reason for f in report.figures} == {None}
    assert (
        "| options / ours | hash layer / ours | options, no PDL / ours, no PDL |" in result.stdout
    )
    assert "256x24 cold N=9: ours 4.00, options 4.00, hash layer 4.00, ours" in result.stderr
    assert "token ids are shared by the layers, and warm" in result.stdout


def test_without_pdl_the_options_are_timed_once() -> None:
    artifacts = ArtifactSet(folder=Path(), manifest=sample_manifest())
    entrants = options.option_entrants(artifacts, pdl=False)
    assert tuple(e.contender.name for e in entrants) == NAMES


@pytest.mark.quick(1)
@pytest.mark.parametrize(
    ("forgets", "words"),
    [
        ("bias_vl", "wrong ids in "),
        ("image_mask", "wrong ids in "),
        ("padding_mask", "wrong ids in 2 of 17 rows"),
        ("logical_count", "wrong ids in 15 of 17 rows"),
    ],
)
def test_options_that_do_nothing_are_not_timed(reference_router, forgets: str, words: str) -> None:
    reference_router.forgets = forgets
    artifacts = ArtifactSet(folder=Path(), manifest=sample_manifest())
    report = run_bench(
        *options.option_entrants(artifacts, pdl=False),
        modes=(COLD,),
        num_tokens=(17,),
        make_layers=options.make_option_inputs,
    )
    reasons = {f.contender: f.reason for f in report.figures if f.mode == COLD}
    assert words in str(reasons.pop("options"))
    assert reasons == {"ours": None, "hash layer": None}


@pytest.mark.parametrize("layout", ["kmajor", "emajor"])
def test_operands_of_the_options(seed: int, layout: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(options, "VOCAB_SIZE", 50)
    inputs = options.make_option_inputs(PROBLEM, layout, "cpu", seed).with_tokens(9, seed)
    for weights, gate in zip(inputs.weights, inputs.gates, strict=True):
        assert torch.equal(weights.t(), gate)
        assert weights.unique().tolist() == [-1, 1]
    assert inputs.hidden_states.unique().tolist() == [-1, 0, 1]
    assert inputs.hidden_states.dtype is torch.bfloat16
    own = (inputs.biases, inputs.biases_vl, inputs.to_physical, inputs.logical_count)
    assert [len({t.data_ptr() for t in tensors}) for tensors in own] == [PROBLEM.layers] * 4
    assert [len(table) for table in inputs.tables] == [50] * options.NUM_TABLES
    assert all(ids.unique().numel() == 24 * 4 for ids in inputs.to_physical)
    assert (inputs.image_mask.sum(), inputs.padding_mask.tolist().index(True)) == (5, 7)
    assert inputs.input_ids.dtype is torch.int64


def test_no_two_keys_are_nearly_equal() -> None:
    scores = router_scores(torch.arange(-10, 128, dtype=torch.float64))
    for steps in range(3):
        gaps = (scores[:, None] - scores - steps * options.BIAS_STEP).abs()
        assert gaps[gaps != 0].min() > 1e-5


def test_exact_answers_are_exact() -> None:
    ids = torch.tensor([[3, 1], [-1, -1]], dtype=torch.int32)
    weights = torch.tensor([[1.0, 0.5], [0.0, 0.0]])
    right = (weights.double(), ids)
    assert exact_complaint((weights, ids), right) is None
    assert exact_complaint((weights, ids.flip(1)), right) == "wrong ids in 1 of 2 rows"
    off = weights + torch.tensor([[0.0], [1e-9]])
    assert exact_complaint((off, ids), right) == "weights off by up to inf % in 1 of 2 rows"
    poison((off, ids.clone()))
    assert "weights off by up to nan % in 2 of 2" in str(exact_complaint((off, ids), right))


# ---- Contenders --------------------------------------------------------------------------------


@pytest.fixture
def mm_on_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """torch.mm with out_dtype, which torch has for GPUs alone."""

    def mm(a, b, *, out_dtype):
        assert out_dtype is torch.float32
        return a.float() @ b.float()

    monkeypatch.setattr(torch, "mm", mm)


@pytest.mark.usefixtures("mm_on_cpu")
def test_the_torch_contender_is_right(inputs) -> None:
    call = contenders.torch_call(inputs)
    for layer in range(PROBLEM.layers):
        assert complaint(call(layer), reference_of(inputs, layer), 6) is None


def test_ours_is_one_router_a_layer(inputs, monkeypatch: pytest.MonkeyPatch) -> None:
    made = []

    class FakeRouter:
        def __init__(self, W_gate, e_bias, **options):
            self.W_gate, self.e_bias = W_gate, e_bias
            made.append(options)

        def __call__(self, hidden_states, out_weights, out_ids):
            weights, ids = router_reference(hidden_states, self.W_gate, self.e_bias, 2.5, 6)
            out_weights.copy_(weights)
            out_ids.copy_(ids)

    monkeypatch.setattr(contenders, "Router", FakeRouter)
    artifacts = ArtifactSet(folder=Path(), manifest=sample_manifest())
    call = contenders.router_call(inputs, artifacts, pdl=True)
    options = {"top_k": 6, "routed_scaling_factor": 2.5, "pdl": True, "artifacts": artifacts}
    assert made == [options] * PROBLEM.layers
    results = [call(layer) for layer in range(PROBLEM.layers)]
    for layer, result in enumerate(results):
        assert complaint(result, reference_of(inputs, layer), 6) is None


@pytest.fixture
def launches(monkeypatch: pytest.MonkeyPatch) -> list[dict]:
    """What is launched, by a driver that only writes it down."""
    noted: list[dict] = []

    class Site:
        def __init__(self, loaded, *, stream, grid, pdl):
            self.block = ParameterBlock(loaded.kernel)
            self.facts = {"stream": stream, "grid": grid, "pdl": pdl}

        def launch(self):
            values = {name: cell.value for name, cell in self.block.cells.items()}
            noted.append(self.facts | values)

    def loaded(artifacts, kernel, device):
        return load.LoadedKernel(
            kernel=kernel, device=device, library=None, handle=None, function=None
        )

    monkeypatch.setattr(driver, "arch_of_device", lambda index: "sm_90a")
    monkeypatch.setattr(contenders, "LaunchSite", Site)
    monkeypatch.setattr(contenders, "load_once", loaded)
    monkeypatch.setattr(contenders, "current_stream", lambda index: 7)
    return noted


@pytest.mark.usefixtures("mm_on_cpu")
def test_cublas_and_router_topk_launch_with_every_parameter(inputs, launches: list[dict]) -> None:
    artifacts = ArtifactSet(folder=Path(), manifest=sample_manifest())
    call = contenders.composed_call(inputs, artifacts, pdl=True)
    weights, ids = call(2)
    (launch,) = launches
    assert launch.pop("logits") != 0
    assert launch.pop("routed_scaling_factor") == 2.5
    assert launch.pop("gate_temp") == 1.0
    assert launch.pop("norm_topk_prob") == 1
    assert launch.pop("shared_weight") == 1.0
    # Options that are off are null.
    assert {name: value for name, value in launch.items() if value} == {
        "stream": 7,
        "grid": (2, 1, 1),
        "pdl": True,
        "e_bias": inputs.bias.data_ptr(),
        "out_weights": weights.data_ptr(),
        "out_ids": ids.data_ptr(),
        "num_tokens": 5,
        "num_experts": 24,
        "top_k": 6,
        "logits_stride": 24,
        "out_weights_stride": 6,
        "out_ids_stride": 6,
    }


@pytest.mark.usefixtures("launches")
def test_without_a_selection_kernel_the_contender_says_so(inputs) -> None:
    artifacts = ArtifactSet(folder=Path(), manifest=sample_manifest(archs=("sm_100a",)))
    with pytest.raises(Unavailable, match="hold no router_topk for sm_90a"):
        contenders.composed_call(inputs, artifacts, pdl=True)


# ---- Peers -------------------------------------------------------------------------------------

# Stand-ins with the peers' names and signatures, which import what the peers import.
TOPK_FILE = """
import torch
from vllm.platforms import current_platform
assert current_platform.is_cuda() and current_platform.is_arch_support_pdl()

def can_use_dsv4_topk(logits, bias, topk, renormalize, dtype):
    return logits.shape[1] == 24 and topk == 6 and renormalize and dtype is torch.int32

def dsv4_topk(logits, bias, dtype, scale):
    scores = torch.nn.functional.softplus(logits).sqrt()
    ids = (scores + bias).topk(6)[1]
    weights = scores.gather(1, ids)
    return weights / weights.sum(1, keepdim=True) * scale, ids.to(dtype)
"""
GEMM_FILE = """
from vllm.utils.torch_utils import current_stream
calls = []

def ll_bf16_gemm(x, w):
    calls.append(x.shape[0])
    return x.float() @ w.float().t()
"""
GATE_FILE = """
import torch
from sglang.kernels.jit.utils import get_jit_cuda_arch, is_arch_support_pdl
from sglang.kernels.kernel_api_logging import debug_kernel_api
from sglang.kernels.ops.moe import moe_route_radix
from sglang.srt.environ import envs

@debug_kernel_api
def moe_fused_gate(logits, bias, topk, scoring_func, renormalize, routed_scaling_factor,
                   apply_routed_scaling_factor_on_output):
    assert scoring_func == "sqrtsoftplus" and renormalize
    assert apply_routed_scaling_factor_on_output and not envs.SGLANG_ANY.get()
    scores = torch.nn.functional.softplus(logits).sqrt()
    ids = (scores + bias).topk(topk)[1]
    weights = scores.gather(1, ids)
    return weights / weights.sum(1, keepdim=True) * routed_scaling_factor, ids.int()
"""
PEER_MODULES = ("dsv4_topk", "ll_bf16", "moe_fused_gate")


@pytest.fixture
def stage(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Write peers' files and load them; what that puts into the process is taken out again."""
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))
    monkeypatch.setattr(sys, "path", list(sys.path))
    before = set(sys.modules)

    def staged(**files: str) -> dict[str, Entrant]:
        for name, text in files.items():
            (tmp_path / f"{name}.py").write_text(textwrap.dedent(text))
        return {e.contender.name: e for e in peers.peer_entrants(tmp_path, tmp_path / "dsl")}

    yield staged
    for name in set(sys.modules) - before:
        if name in PEER_MODULES or name.split(".")[0] in ("vllm", "sglang"):
            del sys.modules[name]


@pytest.mark.usefixtures("mm_on_cpu")
def test_staged_peers_are_loaded_and_right(stage, inputs) -> None:
    found = stage(dsv4_topk=TOPK_FILE, ll_bf16=GEMM_FILE, moe_fused_gate=GATE_FILE)
    assert list(found) == ["vllm", "cuBLAS + dsv4_topk", "sglang"]
    for peer in found.values():
        assert peer.contender.role == PEER
        result = peer.make(inputs)(1)
        assert complaint(result, reference_of(inputs, 1), 6) is None
    assert sys.modules["ll_bf16"].calls == [5]


@pytest.mark.usefixtures("mm_on_cpu")
def test_vllm_takes_cublas_above_16_tokens(stage, inputs) -> None:
    found = stage(dsv4_topk=TOPK_FILE, ll_bf16=GEMM_FILE, moe_fused_gate=GATE_FILE)
    for num_tokens in (16, 17):
        found["vllm"].make(inputs.with_tokens(num_tokens, 1))(0)
    assert sys.modules["ll_bf16"].calls == [16]


def test_a_peer_that_cannot_be_imported_says_why(stage, inputs) -> None:
    broken = "import cutlass_that_is_not_there"
    found = stage(dsv4_topk=TOPK_FILE, ll_bf16=broken)
    with pytest.raises(Unavailable, match="importing ll_bf16: ModuleNotFoundError: No module"):
        found["vllm"].make(inputs)
    with pytest.raises(Unavailable, match=r"moe_fused_gate\.py is not in"):
        found["sglang"].make(inputs)
    assert callable(found["cuBLAS + dsv4_topk"].make(inputs))


def test_a_peer_is_not_given_what_it_refuses(stage, inputs) -> None:
    found = stage(dsv4_topk=TOPK_FILE, ll_bf16=GEMM_FILE, moe_fused_gate=GATE_FILE)
    three = replace(inputs, problem=replace(PROBLEM, top_k=3))
    for name in ("vllm", "cuBLAS + dsv4_topk"):
        with pytest.raises(Unavailable, match="does not take num_experts=24, top_k=3"):
            found[name].make(three)


def test_the_dsl_is_looked_for_after_the_peers(stage, tmp_path: Path) -> None:
    stage(dsv4_topk=TOPK_FILE)
    dsl = tmp_path / "dsl"
    expected = [tmp_path, dsl, dsl / "nvidia_cutlass_dsl" / "dsl_packages"]
    assert sys.path[:3] == [str(place) for place in expected]


def test_stand_ins_answer_for_the_gpu(stage) -> None:
    stage()
    platform = sys.modules["vllm.platforms"].current_platform
    assert platform.is_device_capability(90)
    assert platform.is_device_capability_family(90)
    assert not platform.is_device_capability_family(100)
    arch = sys.modules["sglang.kernels.jit.utils"].get_jit_cuda_arch()
    assert (arch.major, arch.minor) == (9, 0)
    assert isinstance(sys.modules["vllm"], types.ModuleType)


# ---- On a GPU ----------------------------------------------------------------------------------


@pytest.mark.gpu
def test_a_small_run(tmp_path: Path) -> None:
    path = tmp_path / "out.json"
    result = bench("--shapes", "4096x256", "--n", "1,65,600", "--mode", "all", "--json", path)
    assert result.exit_code == 0, result.stderr
    assert {f.reason for f in read_report(path).figures} == {None}


@pytest.mark.gpu
def test_a_small_run_of_the_options(tmp_path: Path) -> None:
    path = tmp_path / "out.json"
    options = ("--options", "--shapes", "4096x256", "--n", "1,65,600", "--json", path)
    result = bench(*options)
    assert result.exit_code == 0, result.stderr
    assert {f.reason for f in read_report(path).figures} == {None}
