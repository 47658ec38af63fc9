"""`build-kernels bench`: parse the options, show progress, write and print the report."""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from click.core import ParameterSource
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from build_kernels.cli.console import results, say, stop_like_interrupt, talk
from build_kernels.cli.extras import why_missing
from dsv4_router_runtime.artifacts.folder import ArtifactSet, open_artifacts
from dsv4_router_runtime.artifacts.limits import K_MULTIPLE, MAX_EXPERTS
from dsv4_router_runtime.errors import RouterError

from .plot import plot_report
from .report import (
    BEHIND,
    BEHIND_READ,
    MODES,
    OURS,
    VARIANT,
    Figure,
    Report,
    ReportError,
    read_report,
    write_report,
)
from .table import microseconds, print_report

if TYPE_CHECKING:
    from .contenders import Entrant

ALL = "all"
BEHIND_SHAPES = ((7168, 384), (4096, 256))
BEHIND_NUM_TOKENS = (1, 8, 64)
PREFILL_NUM_TOKENS = (65, 96, 128, 192, 256, 384, 512, 1024, 2048, 4096, 8192)


class Distinct(click.ParamType):
    """Parse comma-separated items. `parse` raises ValueError for text that is not an item."""

    def __init__(self, name: str, parse: Callable[[str], Any]) -> None:
        self.name = name
        self._parse = parse

    def convert(
        self, value: object, param: click.Parameter | None, ctx: click.Context | None
    ) -> tuple[Any, ...]:
        try:
            items = tuple(self._parse(part) for part in str(value).split(","))
        except ValueError as error:
            self.fail(str(error), param, ctx)
        if len(set(items)) != len(items):
            self.fail("the same one is given twice", param, ctx)
        return items


def _shape(text: str) -> tuple[int, int]:
    """Parse KxE."""
    match = re.fullmatch(r"(\d+)x(\d+)", text.strip())
    if match is None:
        raise ValueError(f"expected shapes such as 7168x384 (got {text!r})")
    k, num_experts = int(match[1]), int(match[2])
    if k == 0 or k % K_MULTIPLE:
        raise ValueError(f"{text}: K must be a multiple of {K_MULTIPLE} (got {k})")
    if not 1 <= num_experts <= MAX_EXPERTS:
        raise ValueError(f"{text}: E must be 1 to {MAX_EXPERTS} (got {num_experts})")
    return k, num_experts


def _token_count(text: str) -> int:
    if not text.strip().isdecimal() or int(text) < 1:
        raise ValueError(f"expected numbers of tokens, each at least 1 (got {text!r})")
    return int(text)


@dataclass(frozen=True, kw_only=True)
class Settings:
    """The command line; each field is an option's."""

    peers: Path | None
    dsl: Path | None
    shapes: tuple[tuple[int, int], ...]
    num_tokens: tuple[int, ...]
    top_k: int
    mode: str
    prefill: bool
    options: bool
    behind: bool
    reader: bool
    pdl: bool
    layout: str
    sms: int | None
    large_clusters: bool
    artifacts: Path | None
    json_file: Path | None
    plot_file: Path | None
    render_file: Path | None

    @property
    def modes(self) -> tuple[str, ...]:
        if self.behind:
            return tuple(mode for mode in BEHIND if self.reader or mode != BEHIND_READ)
        return MODES if self.mode == ALL else (self.mode,)


existing_folder = click.Path(path_type=Path, file_okay=False, exists=True)
new_file = click.Path(path_type=Path, dir_okay=False, writable=True)


@click.command("bench")
@click.option("--peers", type=existing_folder, help="Folder of the peers' staged kernels.")
@click.option("--dsl", type=existing_folder, help="The CuTeDSL that vLLM's kernel compiles with.")
@click.option(
    "--shapes",
    type=Distinct("shapes", _shape),
    metavar="KxE,...",
    default="7168x384,4096x256,5120x384",
    show_default=True,
    help="K x E of each W_gate.",
)
@click.option(
    "--n",
    "num_tokens",
    type=Distinct("token counts", _token_count),
    metavar="N,...",
    default="1,4,6,8,16,32,64",
    show_default=True,
    help="Tokens per call.",
)
@click.option("--top-k", type=click.IntRange(1, 8), default=6, show_default=True)
@click.option(
    "--mode",
    type=click.Choice([*MODES, ALL]),
    default=MODES[0],
    show_default=True,
    help="Weights from HBM, weights in L2, or no CUDA graph. Host time is always measured.",
)
@click.option(
    "--prefill",
    is_flag=True,
    help="More tokens per call. Default: N = 65 to 8192.",
)
@click.option(
    "--options",
    is_flag=True,
    help="Time this project's kernels alone: with a server's options on, and for a hash layer.",
)
@click.option(
    "--behind",
    is_flag=True,
    help="Time what every contender adds behind an RMSNorm: one with PDL, one without, torch's. "
    "Default: shapes 7168x384 and 4096x256, N = 1, 8, 64.",
)
@click.option(
    "--reader",
    is_flag=True,
    help="With --behind: also a chain that ends in a reader of the ids, with PDL.",
)
@click.option(
    "--pdl/--no-pdl",
    default=True,
    show_default=True,
    help="Launch this project's kernels with programmatic dependent launch.",
)
@click.option(
    "--layout", type=click.Choice(["kmajor", "emajor"]), default="kmajor", show_default=True
)
@click.option(
    "--sms",
    type=click.IntRange(min=1),
    help="Time on so many of the GPU's SMs, as a green context; the driver may round up.",
)
@click.option(
    "--large-clusters",
    is_flag=True,
    help="With --sms: of SMs that may hold clusters of 16 CTAs.",
)
@click.option(
    "--artifacts",
    type=existing_folder,
    help="Folder of the kernels to time. Default: the one that Router finds.",
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
def bench_command(context: click.Context, **values: Any) -> None:
    """Check, then time the router on this machine's GPU, beside torch and the staged peers.

    Fails if a figure of this project's own is missing; a missing peer is only reported.
    """
    defaults: dict[str, Any] = {}
    if values["prefill"]:
        defaults = {"num_tokens": PREFILL_NUM_TOKENS}
    if values["behind"]:
        defaults = {"shapes": BEHIND_SHAPES, "num_tokens": BEHIND_NUM_TOKENS}
    given = {name: value for name, value in values.items() if _is_given(context, name)}
    settings = Settings(**{**values, **defaults, **given})
    _check_usage(context, settings)
    stop_like_interrupt()
    try:
        _check_outputs(settings)
        if settings.render_file is not None:
            report = read_report(settings.render_file)
        else:
            report = _measure(settings)
        # The file first: a table that cannot be printed must not cost the figures.
        if settings.json_file is not None:
            write_report(settings.json_file, report)
        print_report(results(width=240), report)
        if settings.plot_file is not None:
            plot_report(settings.plot_file, report)
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
    """The bench cannot run here; the message gives the next step."""


def missing_of_ours(report: Report) -> list[str]:
    """Return an error for each of this project's contenders that lacks a figure."""
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


def _check_usage(context: click.Context, settings: Settings) -> None:
    """Raise UsageError for options that do not go together."""
    if settings.render_file is not None:
        _refuse_with_render(context)
    if settings.options and (settings.peers or settings.dsl):
        raise click.UsageError("--options times no peers: it goes without --peers and --dsl")
    if settings.behind and (settings.options or _is_given(context, "mode")):
        raise click.UsageError("--behind has modes of its own: it goes without --mode, --options")
    if settings.behind and settings.prefill:
        raise click.UsageError("--prefill and --behind choose N: give --behind and --n")
    if settings.large_clusters and settings.sms is None:
        raise click.UsageError("--large-clusters chooses the SMs of a part: add --sms")
    if settings.reader and not settings.behind:
        raise click.UsageError("--reader reads the ids of a chain: add --behind")
    for k, num_experts in settings.shapes:
        if num_experts < settings.top_k:
            raise click.UsageError(f"--top-k {settings.top_k}: {k}x{num_experts} has fewer experts")


def _refuse_with_render(context: click.Context) -> None:
    given = [
        parameter.opts[0]
        for parameter in context.command.params
        if parameter.name not in ("render_file", "plot_file", "json_file")
        and _is_given(context, str(parameter.name))
    ]
    if given:
        raise click.UsageError(
            f"--render measures nothing: it goes with --plot and --json alone (got {given[0]})"
        )


def _is_given(context: click.Context, name: str) -> bool:
    return context.get_parameter_source(name) is ParameterSource.COMMANDLINE


def _check_outputs(settings: Settings) -> None:
    """Raise BenchError before the run if its results could not be written after it."""
    for file in (settings.json_file, settings.plot_file):
        if file is not None and not file.parent.is_dir():
            raise BenchError(f"{file}: there is no folder {file.parent}; make it first")
    if settings.plot_file is not None:
        _require("matplotlib", "--plot")


def _require(package: str, what: str) -> None:
    if (problem := why_missing(package)) is not None:
        raise BenchError(f"{what}: {problem}")


def _measure(settings: Settings) -> Report:
    """Time every contender, with a progress bar on stderr."""
    _require("torch", "bench times kernels through torch")
    import torch

    if not torch.cuda.is_available():
        raise BenchError(
            f"torch {torch.__version__} sees no CUDA GPU; "
            "a stored report is drawn without one by --render FILE"
        )
    from dsv4_router_runtime.device.driver import arch_of_device

    from .behind import measure_behind
    from .inputs import make_inputs
    from .measure import make_problem, manifest_sha256, measure, this_machine
    from .options import make_option_inputs
    from .partition import PartitionError, make_partition
    from .stopwatch import CudaStopwatch

    kernels = open_artifacts(settings.artifacts)
    entrants = _entrants(settings, kernels)
    device = torch.cuda.current_device()
    stream, sms = None, None
    if settings.sms is not None:
        try:
            part = make_partition(
                settings.sms, large_clusters=settings.large_clusters, device=device
            )
        except PartitionError as error:
            raise BenchError(f"--sms: {error}; ask for another number") from None
        stream, sms = torch.cuda.ExternalStream(part.stream), part.sms
    l2_bytes = torch.cuda.get_device_properties(device).L2_cache_size
    problems = [make_problem(k, e, settings.top_k, l2_bytes) for k, e in settings.shapes]
    run = measure_behind if settings.behind else measure
    # Behind a norm, the host's time is not measured.
    rows_per_point = len(settings.modes) + (not settings.behind)
    with _progress(len(problems) * len(settings.num_tokens) * rows_per_point) as on_figures:
        return run(
            problems=problems,
            num_tokens=settings.num_tokens,
            modes=settings.modes,
            layout=settings.layout,
            entrants=entrants,
            stopwatch=CudaStopwatch(stream),
            machine=this_machine(arch_of_device(device), sms),
            manifest_sha256=manifest_sha256(kernels),
            on_figures=on_figures,
            make_layers=make_option_inputs if settings.options else make_inputs,
        )


def _entrants(settings: Settings, kernels: ArtifactSet) -> list[Entrant]:
    from .contenders import own_entrants, torch_entrant
    from .options import option_entrants
    from .peers import peer_entrants

    if settings.options:
        return [*option_entrants(kernels, pdl=settings.pdl)]
    entrants = [*own_entrants(kernels, pdl=settings.pdl)]
    if settings.peers is not None:
        dsl = settings.dsl.resolve() if settings.dsl else None
        entrants += peer_entrants(settings.peers.resolve(), dsl)
    return [*entrants, torch_entrant()]


@contextmanager
def _progress(rows: int) -> Iterator[Callable[[Sequence[Figure]], None]]:
    """Show a progress bar; yield the function to call with the figures of each row."""
    columns = (TextColumn("timing"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=talk) as progress:
        bar = progress.add_task("", total=rows)

        def on_figures(figures: Sequence[Figure]) -> None:
            progress.console.print(progress_line(figures), markup=False, soft_wrap=True)
            progress.advance(bar)

        yield on_figures


def progress_line(figures: Sequence[Figure]) -> str:
    """Return one row's line: each contender's time, or the start of the reason why it has none."""
    first = figures[0]
    cells = [
        f"{figure.contender} {microseconds(figure.microseconds)}"
        if figure.reason is None
        else f"{figure.contender} not measured: {' '.join(figure.reason.split())[:60]}"
        for figure in figures
    ]
    return f"{first.shape} {first.mode} N={first.num_tokens}: {', '.join(cells)}"
