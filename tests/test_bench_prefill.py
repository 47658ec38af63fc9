"""`bench --prefill` without a GPU: its N, the floor of the products, the README's table."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

pytest.importorskip("click", reason="needs the extra `bench`")
pytest.importorskip("torch", reason="torch is the caller's and is not installed here")

import test_bench
from test_bench import (
    MACHINE,
    PROBLEM,
    FloorsAside,
    bench,
    entrant,
    figure,
    right,
    run_bench,
)

from build_kernels.bench import command, contenders, measure, model, plot
from build_kernels.bench.report import (
    COLD,
    HOST,
    MMA,
    OURS,
    WARM,
    Report,
    geometric_mean,
    read_report,
    write_report,
)
from build_kernels.bench.table import readme_table

gpu_aside = test_bench.gpu_aside
report = test_bench.report

LARGE = {128: (7.0, 11.0), 512: (12.0, 12.5), 8192: (80.0, 81.0)}


@pytest.fixture
def both(report: Report) -> Report:
    """The report of 1 and 64 tokens, with figures of ours and vllm's at more."""
    more = tuple(
        figure(problem.name, count, name, time)
        for problem in report.problems
        for count, times in LARGE.items()
        for name, time in zip(("ours", "vllm"), times, strict=True)
    )
    method = replace(report.method, num_tokens=(*report.method.num_tokens, *LARGE))
    return replace(report, method=method, figures=(*report.figures, *more))


def rows_of(report: Report, tmp_path: Path) -> list[list[str]]:
    write_report(tmp_path / "r.json", report)
    out = bench("--render", tmp_path / "r.json").stdout
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in out.splitlines()]


def test_the_whole_command_on_a_stand_in(
    gpu_aside: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(contenders, "router_call", lambda inputs, artifacts, *, pdl: right(inputs))
    monkeypatch.setattr(command, "PREFILL_NUM_TOKENS", (65, 600))
    options = ("--prefill", "--shapes", "256x24", "--json", tmp_path / "out.json")
    result = bench(*options, "--artifacts", gpu_aside)
    assert result.exit_code == 0, result.stderr
    stored = read_report(tmp_path / "out.json")
    assert (stored.method.modes, stored.method.num_tokens) == ((COLD,), (65, 600))
    assert {f.reason for f in stored.figures if f.contender == "ours"} == {None}


def test_prefill_chooses_n_unless_it_is_given(monkeypatch: pytest.MonkeyPatch) -> None:
    taken = []

    def note(settings: command.Settings) -> Report:
        taken.append(settings.num_tokens)
        raise command.BenchError("enough")

    monkeypatch.setattr(command, "_measure", note)
    for options in ((), ("--prefill",), ("--prefill", "--n", "70,9000")):
        bench(*options)
    assert taken == [
        (1, 4, 6, 8, 16, 32, 64),
        (65, 96, 128, 192, 256, 384, 512, 1024, 2048, 4096, 8192),
        (70, 9000),
    ]


def test_prefill_goes_without_behind() -> None:
    result = bench("--prefill", "--behind")
    assert result.exit_code == 2
    assert "--prefill and --behind choose N: give --behind and --n" in result.stderr


def test_more_tokens_and_the_host_take_fewer_layers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(measure, "FEW_LAYERS", 3)
    stopwatch = FloorsAside()
    run_bench(
        entrant("ours", OURS, right),
        modes=(COLD, WARM),
        stopwatch=stopwatch,
        num_tokens=(512, 513),
    )
    assert PROBLEM.layers == 4
    assert [order for order in stopwatch.orders if order[0] in (COLD, HOST)] == [
        (COLD, (0, 1, 2, 3)),
        (HOST, (0, 1, 2)),
        (COLD, (0, 1, 2)),
        (HOST, (0, 1, 2)),
    ]
    assert (WARM, (0, 0, 0)) in stopwatch.orders


def test_the_products_have_a_floor_on_a_gpu_whose_ceiling_is_known(report: Report) -> None:
    problem = report.problems[0]
    # 2 * 7168 * 384 * 8192 operations at 790e12 per second.
    assert report.mma_floor(problem, 8192) == pytest.approx(57.086, abs=1e-3)
    other = replace(report, machine=replace(MACHINE, gpu="NVIDIA B200"))
    assert other.mma_floor(problem, 8192) is None


def test_its_column_is_there_beyond_decode_alone(
    report: Report, both: Report, tmp_path: Path
) -> None:
    rows = rows_of(both, tmp_path)
    tail = [MMA, "ours / best peer", "ours / read W"]
    assert any(row[-3:] == tail for row in rows)
    assert any(row[0] == "8192" and row[-3:] == ["57.1", "0.99 (vllm)", "25.00"] for row in rows)
    assert any(cell.startswith(f"{MMA}: computed") for row in rows for cell in row)
    other = replace(both, machine=replace(MACHINE, gpu="NVIDIA B200"))
    for without in (report, other):
        assert not any(MMA in cell for row in rows_of(without, tmp_path) for cell in row)


def test_each_band_of_n_has_its_worst_and_its_mean(both: Report, tmp_path: Path) -> None:
    lines = [row[0] for row in rows_of(both, tmp_path)]
    middle = geometric_mean([7 / 11, 12 / 12.5])
    for words in (
        "cold, N <= 64: ours / best peer: worst 0.667 (7168x384, N=1, vllm)",
        "cold, N = 65..512: ours / best peer: worst 0.960 (7168x384, N=512, vllm), geometric "
        f"mean {middle:.3f} of 4 points",
        "cold, N > 512: ours / best peer: worst 0.988 (7168x384, N=8192, vllm)",
    ):
        assert any(line.startswith(words) for line in lines), words


def test_the_model_is_of_decode_alone(report: Report, both: Report) -> None:
    assert model.predict(both, "7168x384") == model.predict(report, "7168x384")
    prefill = replace(both, method=replace(both.method, num_tokens=tuple(LARGE)))
    with pytest.raises(model.NoModelError, match="read W at N <= 64"):
        model.predict(prefill, "7168x384")


@pytest.mark.parametrize(
    ("num_tokens", "named"),
    [
        ((64, 1, 4, 6, 8, 16, 32), [1, 4, 6, 8, 16, 32, 64]),
        (command.PREFILL_NUM_TOKENS, [65, 192, 512, 2048, 8192]),
        (
            (1, 4, 6, 8, 16, 32, 64, *command.PREFILL_NUM_TOKENS),
            [1, 8, 64, 512, 4096],
        ),
    ],
)
def test_the_axis_names_as_many_n_as_have_room(num_tokens, named: list[int]) -> None:
    assert plot.ticks(num_tokens) == named


@pytest.mark.slow
def test_one_picture_holds_decode_and_prefill(
    both: Report, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("matplotlib", reason="needs the extra `bench`")
    drawn = []
    draw = plot.draw_mma_floor

    def note(axes, *arguments) -> None:
        draw(axes, *arguments)
        drawn.append([text.get_text() for text in axes.texts])

    monkeypatch.setattr(plot, "draw_mma_floor", note)
    plot.plot_report(tmp_path / "p.png", both)
    assert [texts.count(MMA) for texts in drawn] == [1, 1]
    assert (tmp_path / "p.png").read_bytes().startswith(b"\x89PNG\r\n")


def test_the_readmes_table_is_of_the_n_that_it_names(both: Report) -> None:
    assert readme_table(both).splitlines() == [
        "| N | 7168 x 384 | 4096 x 256 |",
        "| -: | --- | --- |",
        "| 1 | **4.00** (vLLM 6.00) | **3.00** (PyTorch 30.0) |",
        "| 64 | **6.00** (vLLM 10.00) | **5.00** (vLLM 8.00) |",
        "| 128 | **7.00** (vLLM 11.00) | **7.00** (vLLM 11.00) |",
        "| 512 | **12.00** (vLLM 12.50) | **12.00** (vLLM 12.50) |",
        "| 8192 | **80.0** (vLLM 81.0) | **80.0** (vLLM 81.0) |",
        "| read W_gate only | 3.20 | 2.50 |",
    ]


def test_the_readmes_table_takes_an_n_from_the_first_report_that_has_it(
    report: Report, both: Report
) -> None:
    """As of a run of few tokens and one of many."""
    many = replace(
        both,
        method=replace(both.method, num_tokens=(64, 512)),
        figures=tuple(replace(each, microseconds=50.0) for each in both.figures),
        floors=(),
    )
    rows = [line.split(" | ")[1] for line in readme_table(report, many).splitlines()[2:]]
    assert rows == ["**4.00** (vLLM 6.00)", "**6.00** (vLLM 10.00)", "**50.0** (vLLM 50.0)", "3.20"]
