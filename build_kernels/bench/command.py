"""`build-kernels bench`: the options, what is said on the way, and where the report goes."""

from __future__ import annotations

import re
import sys
from collections.abc import Sequence
from pathlib import Path

import click
from click.core import ParameterSource
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from build_kernels.cli.console import results, say, stop_like_interrupt, talk
from build_kernels.cli.extras import why_missing
from dsv4_router_runtime.artifacts.limits import K_MULTIPLE, MAX_EXPERTS
from dsv4_router_runtime.errors import RouterError

from .plot import plot_report
from .report import MODES, OURS, VARIANT, Figure, Report, ReportError, read_report, write_report
from .table import microseconds, print_report

ALL = "all"


class Shapes(click.ParamType):
    """Comma-separated KxE, as pairs of integers."""

    name = "shapes"

    def convert(
        self, value: object, param: click.Parameter | None, ctx: click.Context | None
    ) -> tuple[tuple[int, int], ...]:
        shapes = []
        for part in str(value).split(","):
            match = re.fullmatch(r"(\d+)x(\d+)", part.strip())
            if match is None:
                self.fail(f"expected shapes such as 7168x384 (got {part!r})", param, ctx)
            k, num_experts = int(match[1]), int(match[2])
            if k == 0 or k % K_MULTIPLE:
                self.fail(f"{part}: K must be a multiple of {K_MULTIPLE} (got {k})", param, ctx)
            if not 1 <= num_experts <= MAX_EXPERTS:
                self.fail(f"{part}: E must be 1 to {MAX_EXPERTS} (got {num_experts})", param, ctx)
            shapes.append((k, num_experts))
        return _distinct(shapes, self, param, ctx)


class TokenCounts(click.ParamType):
    """Comma-separated positive integers."""

    name = "token counts"

    def convert(
        self, value: object, param: click.Parameter | None, ctx: click.Context | None
    ) -> tuple[int, ...]:
        counts = []
        for part in str(value).split(","):
            if not part.strip().isdecimal() or int(part) < 1:
                self.fail(f"expected numbers of tokens, each at least 1 (got {part!r})", param, ctx)
            counts.append(int(part))
        return _distinct(counts, self, param, ctx)


def _distinct(values, kind, param, ctx):
    if len(set(values)) != len(values):
        kind.fail("the same one is given twice", param, ctx)
    return tuple(values)


existing_folder = click.Path(path_type=Path, file_okay=False, exists=True)
new_file = click.Path(path_type=Path, dir_okay=False, writable=True)


@click.command("bench")
@click.option("--peers", type=existing_folder, help="The peers' kernels, as staged.")
@click.option("--dsl", type=existing_folder, help="The CuTeDSL that vLLM's kernel compiles with.")
@click.option(
    "--shapes",
    type=Shapes(),
    metavar="KxE,...",
    default="7168x384,4096x256,5120x384",
    show_default=True,
    help="K x E of each W_gate.",
)
@click.option(
    "--n",
    "num_tokens",
    type=TokenCounts(),
    metavar="N,...",
    default="1,4,6,8,16,32,64",
    show_default=True,
    help="Tokens a call.",
)
@click.option("--top-k", type=click.IntRange(1, 8), default=6, show_default=True)
@click.option(
    "--mode",
    type=click.Choice([*MODES, ALL]),
    default=MODES[0],
    show_default=True,
    help="Weights from HBM, weights in L2, or no graph. The host's time is always measured.",
)
@click.option(
    "--options",
    is_flag=True,
    help="Time no peers, but ours with a server's options on, and for a hash layer.",
)
@click.option("--pdl/--no-pdl", default=True, show_default=True, help="Whether ours launches so.")
@click.option(
    "--layout", type=click.Choice(["kmajor", "emajor"]), default="kmajor", show_default=True
)
@click.option(
    "--artifacts", type=existing_folder, help="The kernels to time. Default: as Router finds them."
)
@click.option("--json", "json_file", type=new_file, help="Write the report here.")
@click.option("--plot", "plot_file", type=new_file, help="Draw the report here, as PNG.")
@click.option(
    "--render",
    "render_file",
    type=click.Path(path_type=Path, dir_okay=False, exists=True),
    help="Measure nothing: print, and draw, the report in this file.",
)
@click.pass_context
def bench_command(
    context: click.Context,
    peers: Path | None,
    dsl: Path | None,
    shapes: tuple[tuple[int, int], ...],
    num_tokens: tuple[int, ...],
    top_k: int,
    mode: str,
    options: bool,
    pdl: bool,
    layout: str,
    artifacts: Path | None,
    json_file: Path | None,
    plot_file: Path | None,
    render_file: Path | None,
) -> None:
    """Check, then time the router on this machine's GPU, beside torch and what peers are staged.

    Fails if this project's own figure is missing anywhere; a missing peer is only reported.
    """
    if render_file is not None:
        _refuse_with_render(context)
    if options and (peers or dsl):
        raise click.UsageError("--options times no peers: it goes without --peers and --dsl")
    for k, num_experts in shapes:
        if num_experts < top_k:
            raise click.UsageError(f"--top-k {top_k}: {k}x{num_experts} has fewer experts")
    stop_like_interrupt()
    try:
        for file in (json_file, plot_file):
            if file is not None and not file.parent.is_dir():
                raise BenchError(f"{file}: there is no folder {file.parent}; make it first")
        if plot_file is not None:
            _require("matplotlib", "--plot")
        if render_file is not None:
            report = read_report(render_file)
        else:
            modes = MODES if mode == ALL else (mode,)
            report = _measured(
                peers, dsl, shapes, num_tokens, top_k, modes, options, pdl, layout, artifacts
            )
        # The file first: a table that cannot be printed must not cost the figures.
        if json_file is not None:
            write_report(json_file, report)
        print_report(results(width=240), report)
        if plot_file is not None:
            plot_report(plot_file, report)
    except KeyboardInterrupt:
        say("interrupted; nothing was written")
        sys.exit(130)
    except (BenchError, ReportError, RouterError, OSError) as error:
        say(f"error: {error}")
        sys.exit(1)
    if missing := missing_of_ours(report):
        say("\n".join(missing))
        sys.exit(1)


class BenchError(Exception):
    """The bench cannot run here; the message says what to do."""


def missing_of_ours(report: Report) -> list[str]:
    """An error for each of this project's contenders that has not all its figures."""
    errors = []
    for name in (*report.of_role(OURS), *report.of_role(VARIANT)):
        cells = [
            f"{f.shape} {f.mode} N={f.num_tokens} ({f.reason})"
            for f in report.figures
            if f.contender == name and f.microseconds is None
        ]
        if cells:
            errors.append(f"error: {name} is not measured at {'; '.join(cells)}")
    return errors


def _refuse_with_render(context: click.Context) -> None:
    given = [
        parameter.opts[0]
        for parameter in context.command.params
        if parameter.name not in ("render_file", "plot_file", "json_file")
        and context.get_parameter_source(str(parameter.name)) is ParameterSource.COMMANDLINE
    ]
    if given:
        raise click.UsageError(
            f"--render measures nothing: it goes with --plot and --json alone (got {given[0]})"
        )


def _require(package: str, what: str) -> None:
    if (problem := why_missing(package)) is not None:
        raise BenchError(f"{what}: {problem}")


def _measured(
    peers: Path | None,
    dsl: Path | None,
    shapes: Sequence[tuple[int, int]],
    num_tokens: Sequence[int],
    top_k: int,
    modes: Sequence[str],
    options: bool,
    pdl: bool,
    layout: str,
    artifacts: Path | None,
) -> Report:
    _require("torch", "bench times kernels through torch")
    import torch

    if not torch.cuda.is_available():
        raise BenchError(
            f"torch {torch.__version__} sees no CUDA GPU; "
            "a stored report is drawn without one by --render FILE"
        )
    from dsv4_router_runtime.artifacts.folder import open_artifacts
    from dsv4_router_runtime.device.driver import arch_of_device

    from .contenders import own_entrants, torch_entrant
    from .inputs import make_inputs
    from .measure import make_problem, manifest_sha256, measure, this_machine
    from .options import make_option_inputs, option_entrants
    from .peers import peer_entrants
    from .stopwatch import CudaStopwatch

    kernels = open_artifacts(artifacts)
    entrants = [*(option_entrants if options else own_entrants)(kernels, pdl=pdl)]
    if peers is not None:
        entrants += peer_entrants(peers.resolve(), dsl.resolve() if dsl else None)
    if not options:
        entrants.append(torch_entrant())
    device = torch.cuda.current_device()
    l2_bytes = torch.cuda.get_device_properties(device).L2_cache_size
    problems = [make_problem(k, num_experts, top_k, l2_bytes) for k, num_experts in shapes]
    columns = (TextColumn("timing"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=talk) as progress:
        bar = progress.add_task("", total=len(shapes) * len(num_tokens) * (len(modes) + 1))

        def on_figures(figures: Sequence[Figure]) -> None:
            progress.console.print(progress_line(figures), markup=False, soft_wrap=True)
            progress.advance(bar)

        return measure(
            problems=problems,
            num_tokens=num_tokens,
            modes=modes,
            layout=layout,
            entrants=entrants,
            stopwatch=CudaStopwatch(),
            machine=this_machine(arch_of_device(device)),
            manifest_sha256=manifest_sha256(kernels),
            on_figures=on_figures,
            make_layers=make_option_inputs if options else make_inputs,
        )


def progress_line(figures: Sequence[Figure]) -> str:
    """One shape, mode and N: each contender's time, or the start of why it has none."""
    first = figures[0]
    cells = [
        f"{figure.contender} {microseconds(figure.microseconds)}"
        if figure.reason is None
        else f"{figure.contender} not measured: {' '.join(figure.reason.split())[:60]}"
        for figure in figures
    ]
    return f"{first.shape} {first.mode} N={first.num_tokens}: {', '.join(cells)}"
