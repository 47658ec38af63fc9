"""`bench --behind` without a GPU: the chain is norm -> router, and a figure is less the norm."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path

import pytest

pytest.importorskip("click", reason="needs the extra `bench`")
torch = pytest.importorskip("torch", reason="torch is the caller's and is not installed here")

import test_bench  # noqa: E402
from test_bench import (  # noqa: E402
    MACHINE,
    PROBLEM,
    FloorsAside,
    ReferenceRouter,
    bench,
    entrant,
    right,
    right_answer,
)

from build_kernels.bench import behind, command, contenders, measure, plot  # noqa: E402
from build_kernels.bench.inputs import make_inputs  # noqa: E402
from build_kernels.bench.report import (  # noqa: E402
    BEHIND,
    BEHIND_PDL,
    BEHIND_PLAIN,
    BEHIND_READ,
    BEHIND_TORCH,
    OURS,
    OWN,
    PEER,
    Report,
    ratio_at,
    read_report,
    write_report,
)
from build_kernels.bench.stopwatch import Timing  # noqa: E402

gpu_aside = test_bench.gpu_aside
NORM = behind.NORM_ALONE.name
NO_TRITON = "norm: Triton takes CUDA tensors, these are on cpu"


class ChainClock(FloorsAside):
    """A norm takes 2 us, 1 more per contender timed behind it: 5, 6, ..."""

    def __init__(self) -> None:
        super().__init__()
        self.of_norms = 0

    def time(self, run, calls, mode):
        self.timed.append(mode)
        if torch.is_tensor(run()[0]):
            self.of_norms += 1
            self.next = 5.0
            return Timing(microseconds=2.0, low=1.5, high=2.5)
        time, self.next = self.next, self.next + 1
        return Timing(microseconds=time, low=time - 0.25, high=time + 0.5)


def run_behind(*entrants, modes=(BEHIND_TORCH,), stopwatch=None, num_tokens=(3,)) -> Report:
    return behind.measure_behind(
        problems=[PROBLEM],
        num_tokens=num_tokens,
        modes=modes,
        layout="kmajor",
        entrants=entrants,
        stopwatch=stopwatch or ChainClock(),
        machine=MACHINE,
        manifest_sha256="0" * 64,
        on_figures=lambda figures: None,
    )


def reasons(report: Report) -> dict[str, str | None]:
    return {figure.contender: figure.reason for figure in report.figures}


def test_a_figure_is_the_chain_less_the_norm() -> None:
    report = run_behind(entrant("ours", OURS, right), entrant("vllm", PEER, right))
    times = {f.contender: (f.microseconds, f.low, f.high) for f in report.figures}
    assert times == {"ours": (3.0, 2.75, 3.5), "vllm": (4.0, 3.75, 4.5), NORM: (2.0, 1.5, 2.5)}
    assert ratio_at(report, PROBLEM.name, BEHIND_TORCH, 3).to_peer == pytest.approx(3 / 4)
    assert [(c.name, c.role) for c in report.contenders][-1] == (NORM, OWN)
    assert report.floors == ()


def test_a_chain_reads_what_the_norm_of_its_layer_wrote() -> None:
    seen = {}

    def make(inputs):
        # As every contender does, and as a server's graph: the tensor is taken once.
        hidden_states = inputs.hidden_states

        def call(layer: int):
            seen[layer] = hidden_states.clone()
            return right(replace(inputs, hidden_states=hidden_states))(layer)

        return call

    report = run_behind(entrant("ours", OURS, make))
    assert reasons(report) == {"ours": None, NORM: None}
    inputs = make_inputs(PROBLEM, "kmajor", "cpu", measure.SEED).with_tokens(3, measure.SEED)
    stream = behind.make_stream(inputs)
    for layer in range(PROBLEM.layers):
        x, weight = stream.residual[layer].double(), stream.weight[layer].double()
        expected = x / (x.square().mean(1, keepdim=True) + behind.EPSILON).sqrt() * weight
        assert torch.allclose(seen[layer].double(), expected, rtol=2**-7, atol=0)
    assert not torch.equal(seen[0], seen[1])


@pytest.mark.parametrize("stale", ["the layer before", "the start"])
def test_a_router_that_reads_too_early_is_not_timed(stale: str) -> None:
    def make(inputs):
        kept = [inputs.hidden_states.clone()]

        def call(layer: int):
            before, now = kept[0], inputs.hidden_states.clone()
            if stale == "the layer before":
                kept[0] = now
            return right(replace(inputs, hidden_states=before))(layer)

        return call

    stopwatch = ChainClock()
    report = run_behind(entrant("ours", OURS, make), stopwatch=stopwatch)
    (ours,) = (f for f in report.figures if f.contender == "ours")
    assert ours.microseconds is ours.low is None
    assert str(ours.reason).startswith("wrong answer in layer ")
    assert stopwatch.timed == [BEHIND_TORCH]


def test_a_wrong_norm_is_the_reason_of_every_cell(monkeypatch: pytest.MonkeyPatch) -> None:
    def wrong(stream):
        norm = behind.torch_norm(stream)
        return lambda layer: norm(layer) * (1 + 2**-6 * (layer == 2))

    monkeypatch.setitem(behind.NORMS, BEHIND_PLAIN, wrong)
    report = run_behind(entrant("ours", OURS, right), modes=(BEHIND_PLAIN, BEHIND_TORCH))
    assert {(f.contender, f.mode, f.reason) for f in report.figures} == {
        (name, mode, reason)
        for name in ("ours", NORM)
        for mode, reason in (
            (BEHIND_PLAIN, "norm: wrong hidden_states in layer 2"),
            (BEHIND_TORCH, None),
        )
    }


def test_a_failing_contender_says_why_and_the_rest_go_on() -> None:
    report = run_behind(
        entrant("vllm", PEER, test_bench.cannot_be_made), entrant("ours", OURS, right)
    )
    assert reasons(report) == {"vllm": "takes 256 experts alone", "ours": None, NORM: None}


def test_each_norm_is_timed_once_and_in_every_layer() -> None:
    stopwatch = ChainClock()
    report = run_behind(
        entrant("ours", OURS, right),
        entrant("torch", PEER, right),
        stopwatch=stopwatch,
        num_tokens=(1, 3),
    )
    assert stopwatch.of_norms == 2
    assert set(stopwatch.orders) == {(BEHIND_TORCH, (0, 1, 2, 3))}
    assert report.modes == (BEHIND_TORCH,)


def test_the_norms_of_triton_differ_in_pdl_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    launches = []

    class Kernel:
        def __getitem__(self, grid):
            return lambda *operands, **options: launches.append((grid, operands, options))

    class Module:
        rms_norm_kernel = Kernel()

    monkeypatch.setitem(sys.modules, "build_kernels.bench.triton_kernels", Module)
    monkeypatch.setattr(behind, "why_no_triton", lambda device: None)
    inputs = make_inputs(replace(PROBLEM, k=7168), "kmajor", "cpu", 1).with_tokens(5, 1)
    stream = behind.make_stream(inputs)
    for mode in (BEHIND_PDL, BEHIND_PLAIN):
        behind.NORMS[mode](stream)(2)
    for (grid, operands, options), pdl in zip(launches, (True, False), strict=True):
        assert grid == (5,)
        assert torch.equal(operands[0], stream.residual[2])
        assert torch.equal(operands[1], stream.weight[2])
        assert (operands[2].shape, operands[3]) == ((5, 7168), 7168)
        assert options == {"BLOCK": 8192, "PDL": pdl, "launch_pdl": pdl, "num_warps": 16}


@pytest.fixture
def reader(monkeypatch: pytest.MonkeyPatch) -> list[tuple]:
    """The reader's launches, on a stand-in; in its mode the norm is torch's."""
    launches = []

    class Kernel:
        def __getitem__(self, grid):
            def launch(ids, taken, size, *, BLOCK, launch_pdl):
                launches.append((grid, size, BLOCK, launch_pdl))
                taken.copy_(ids)
                ids.fill_(-1)

            return launch

    class Module:
        take_ids_kernel = Kernel()

    monkeypatch.setitem(sys.modules, "build_kernels.bench.triton_kernels", Module)
    monkeypatch.setitem(behind.NORMS, BEHIND_READ, behind.torch_norm)
    return launches


def writes_once(inputs):
    """Leave the ids of the first call to the later ones."""
    outputs = [right_answer(inputs, layer) for layer in range(PROBLEM.layers)]
    return lambda layer: outputs[layer]


def test_the_answer_is_what_the_reader_read(reader: list[tuple]) -> None:
    of_ours = entrant("ours", OURS, right)
    report = run_behind(of_ours, modes=(BEHIND_READ,), stopwatch=FloorsAside(), num_tokens=(100,))
    assert reasons(report) == {"ours": None, NORM: None}
    # 600 ids.
    assert set(reader) == {((2,), 600, 512, True)}
    times = {f.contender: f.microseconds for f in report.figures}
    assert times == {"ours": 0.0, NORM: float(PROBLEM.layers)}


@pytest.mark.usefixtures("reader")
def test_ids_that_were_read_before_do_not_count() -> None:
    stale = entrant("ours", OURS, writes_once)
    reason = reasons(run_behind(stale, modes=(BEHIND_READ,), stopwatch=FloorsAside()))["ours"]
    assert reason == "wrong answer in layer 0: ids outside [0, 24) in 3 of 3 rows"


def test_the_whole_command_on_a_stand_in(
    gpu_aside: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(contenders, "Router", ReferenceRouter)
    path = tmp_path / "out.json"
    result = bench("--behind", "--json", path, "--artifacts", gpu_aside)
    # Triton's norms need a GPU.
    assert result.exit_code == 1
    assert f"ours is not measured at 256x24 {BEHIND_PDL} N=1 ({NO_TRITON})" in result.stderr
    report = read_report(path)
    assert report.method.modes == (BEHIND_PDL, BEHIND_PLAIN, BEHIND_TORCH)
    assert report.method.num_tokens == command.BEHIND_NUM_TOKENS == (1, 8, 64)
    assert [problem.name for problem in report.problems] == ["256x24", "256x24"]
    torchs = [f for f in report.figures if f.mode == BEHIND_TORCH and f.contender == "ours"]
    assert {f.reason for f in torchs} == {None}
    assert "less the norm alone" in result.stdout
    assert f"256x24 {BEHIND_TORCH} N=8: ours" in result.stderr


def test_shapes_and_n_that_are_given_stay(monkeypatch: pytest.MonkeyPatch) -> None:
    taken = []

    def note(settings: command.Settings) -> Report:
        taken.append((settings.shapes, settings.num_tokens, settings.modes))
        raise command.BenchError("enough")

    monkeypatch.setattr(command, "_measure", note)
    bench("--behind", "--n", "5")
    bench("--behind", "--shapes", "5120x384", "--reader")
    assert taken == [
        (((7168, 384), (4096, 256)), (5,), (BEHIND_PDL, BEHIND_PLAIN, BEHIND_TORCH)),
        (((5120, 384),), (1, 8, 64), BEHIND),
    ]


@pytest.mark.parametrize("arguments", [("--options",), ("--mode", "cold"), ("--mode", "warm")])
def test_behind_has_modes_of_its_own(arguments: tuple[str, ...]) -> None:
    result = bench("--behind", *arguments)
    assert result.exit_code == 2
    assert "it goes without --mode, --options" in " ".join(result.stderr.split())


def test_a_reader_needs_a_chain() -> None:
    result = bench("--reader")
    assert result.exit_code == 2
    assert "--reader reads the ids of a chain: add --behind" in " ".join(result.stderr.split())


def test_a_report_survives_the_file_and_is_printed_by_norm(tmp_path: Path) -> None:
    path = tmp_path / "r.json"
    report = run_behind(entrant("ours", OURS, right), entrant("vllm", PEER, right))
    write_report(path, report)
    assert read_report(path) == report
    out = bench("--render", path).stdout
    assert f"256x24, top 6, {BEHIND_TORCH} (CUDA graph, cold: torch's rms_norm" in out
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in out.splitlines()]
    assert ["N", "ours", "vllm", NORM, "ours / best peer"] in rows
    assert ["3", "3.00", "4.00", "2.00", "0.75 (vllm)"] in rows
    assert f"{BEHIND_TORCH}: ours / best peer: worst 0.750 (256x24, N=3, vllm)" in out
    assert f"{NORM}: {behind.NORM_ALONE.what}" in out


@pytest.mark.slow
def test_the_picture_is_of_the_first_norm(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib", reason="needs the extra `bench`")
    report = run_behind(entrant("ours", OURS, right))
    assert "torch's norm" in plot.heading(report, report.modes[0])[1]
    plot.plot_report(tmp_path / "p.png", report)
    assert (tmp_path / "p.png").read_bytes().startswith(b"\x89PNG\r\n")


@pytest.mark.gpu
def test_a_small_run_behind_every_norm(tmp_path: Path) -> None:
    """Each figure's answers were read back from the replayed chain and are right."""
    path = tmp_path / "out.json"
    options = ("--reader", "--shapes", "4096x256", "--n", "1,65,600", "--json", path)
    result = bench("--behind", *options)
    assert result.exit_code == 0, result.stderr
    report = read_report(path)
    assert {f.reason for f in report.figures} == {None}
    assert report.modes == BEHIND
    # Of the norm itself, some part is always left to subtract.
    assert all(f.microseconds is not None and f.microseconds > 0 for f in report.figures)
