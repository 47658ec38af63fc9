"""Draw the figures: latency over N, one panel per shape, one line per contender, both floors."""

from __future__ import annotations

import io
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from build_kernels.files import replace_file

from .report import (
    BEHIND_PDL,
    BEHIND_PLAIN,
    BEHIND_READ,
    BEHIND_TORCH,
    COLD,
    EMPTY,
    MMA,
    OURS,
    OWN,
    READ,
    Problem,
    Report,
)

# Colours of equal weight, distinct to the colour-blind (Okabe and Ito); ours is the strongest.
OURS_COLOUR = "#D55E00"
OWN_COLOURS = ("#E69F00", "#CC79A7", "#8C6D1F")
PEER_COLOURS = ("#0072B2", "#009E73", "#56B4E9", "#777777", "#333333")
FLOOR_COLOUR = "#9A9A9A"
PANELS_PER_ROW = 3
PANEL_INCHES = (2.75, 3.9)
LABEL_INCHES = 1.7
DOTS_PER_INCH = 150
# Least distance between two labels, as a fraction of the axis height.
LABEL_STEP = 0.052
# Ns that an axis names: all, or, of more than these, fewer.
MAX_TICKS = 7
FEWER_TICKS = 5


def plot_report(path: Path, report: Report, mode: str | None = None) -> None:
    """Write a PNG by rename. mode: COLD if measured, else the first one measured."""
    # Slow to import, and needed by nothing else. No pyplot: it would look for a display.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    mode = mode or (COLD if COLD in report.modes else report.modes[0])
    columns = min(PANELS_PER_ROW, len(report.problems))
    rows = math.ceil(len(report.problems) / columns)
    width, height = PANEL_INCHES
    figure = Figure(figsize=(columns * width + LABEL_INCHES, rows * height), dpi=DOTS_PER_INCH)
    FigureCanvasAgg(figure)
    panels = figure.subplots(rows, columns, sharey=True, squeeze=False)
    colours = colours_of(report)
    lowest, highest = limits(report, mode)
    for at, axes in enumerate(panels.flat):
        if at >= len(report.problems):
            axes.axis("off")
            continue
        draw_panel(axes, report, report.problems[at], mode, colours)
        axes.set_ylim(lowest, highest)
        if at % columns == columns - 1:
            label_lines(axes, report, report.problems[at], mode, colours)
        if at % columns == 0:
            axes.set_ylabel("µs per call")
    separator = ":\n" if columns == 1 else ": "
    figure.suptitle(separator.join(heading(report, mode)), x=0.012, ha="left", fontsize=10.5)
    # The layout itself finds room for the labels.
    figure.tight_layout(w_pad=0.8)
    buffer = io.BytesIO()
    # No version of matplotlib in the file: the same figures give the same bytes.
    figure.savefig(buffer, format="png", metadata={"Software": None})
    replace_file(path, buffer.getvalue())


def heading(report: Report, mode: str) -> tuple[str, str]:
    words = {
        "cold": "gate weights cold, from HBM (CUDA graph)",
        "warm": "gate weight in L2 (CUDA graph)",
        "eager": "no CUDA graph, host included",
        "host": "host time until the call returns",
        BEHIND_PDL: "added behind a norm with PDL, cold",
        BEHIND_PLAIN: "added behind a norm without PDL, cold",
        BEHIND_TORCH: "added behind torch's norm, cold",
        BEHIND_READ: "added between a norm and a reader with PDL, cold",
    }
    return f"DeepSeek-V4 router on one {report.machine.gpu}", words[mode]


def colours_of(report: Report) -> dict[str, str]:
    """Return each contender's colour by name; a palette that runs out starts again."""
    counts = {OURS: 0, OWN: 0}
    colours = {}
    for contender in report.contenders:
        at = counts.setdefault(contender.role, 0)
        counts[contender.role] += 1
        palette: Sequence[str] = PEER_COLOURS
        if contender.role == OURS:
            palette = (OURS_COLOUR,)
        elif contender.role == OWN:
            palette = OWN_COLOURS
        colours[contender.name] = palette[at % len(palette)]
    return colours


def limits(report: Report, mode: str) -> tuple[float, float]:
    """Return the limits of the common axis: all figures and floors, with a margin."""
    times = [f.microseconds for f in report.figures if f.mode == mode]
    times += [f.microseconds for f in report.floors if f.mode == mode]
    known = [time for time in times if time is not None and time > 0] or [1.0]
    return min(known) / 1.4, max(known) * 1.25


def draw_panel(
    axes: Any, report: Report, problem: Problem, mode: str, colours: Mapping[str, str]
) -> None:
    from matplotlib.ticker import FixedLocator, FuncFormatter, NullFormatter, NullLocator

    axes.set_xscale("log", base=2)
    axes.set_yscale("log", base=2)
    # Peers below, ours on top.
    for contender in reversed(report.contenders):
        points = points_of(report, problem, mode, contender.name)
        if not points:
            continue
        ours = contender.role == OURS
        axes.plot(
            *zip(*points, strict=True),
            color=colours[contender.name],
            linewidth=2.6 if ours else 1.5,
            linestyle="--" if contender.role == OWN else "-",
            marker="o",
            markersize=4.5 if ours else 3,
            zorder=4 if ours else 3,
        )
    for name, style in ((READ, (0, (5, 2))), (EMPTY, (0, (1, 1.5)))):
        if (time := report.floor(problem.name, mode, name)) is not None:
            axes.axhline(time, color=FLOOR_COLOUR, linewidth=1.3, linestyle=style, zorder=2)
            axes.annotate(
                f"{name} {time:.1f}",
                (0.985, time),
                xycoords=("axes fraction", "data"),
                xytext=(0, -2),
                textcoords="offset points",
                ha="right",
                va="top",
                fontsize=8,
                color="#707070",
            )
    draw_mma_floor(axes, report, problem, mode)
    axes.set_title(f"K {problem.k}, E {problem.num_experts}", fontsize=10, loc="left")
    axes.set_xlabel("tokens N")
    axes.xaxis.set_major_locator(FixedLocator(ticks(report.method.num_tokens)))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _at: f"{value:g}"))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _at: f"{value:g}"))
    axes.yaxis.set_minor_formatter(NullFormatter())
    axes.tick_params(labelsize=9)
    axes.grid(axis="y", color="#E4E4E4", linewidth=0.8)
    axes.spines[["top", "right"]].set_visible(False)


def draw_mma_floor(axes: Any, report: Report, problem: Problem, mode: str) -> None:
    """Draw the time of the products alone, if the report goes beyond the decode kernels' N."""
    lowest, _ = limits(report, mode)
    times = (
        (count, report.mma_floor(problem, count)) for count in sorted(report.method.num_tokens)
    )
    points = [(count, time) for count, time in times if time is not None and time >= lowest]
    if not points or not report.has_prefill:
        return
    axes.plot(*zip(*points, strict=True), color=FLOOR_COLOUR, linewidth=1.3, zorder=2)
    # Between the floors that do not rise, where no figure is.
    count, time = points[-1]
    height = 2.5 * lowest
    axes.annotate(
        MMA,
        (count * height / time, height),
        xytext=(-4, 0),
        textcoords="offset points",
        ha="right",
        fontsize=8,
        color="#707070",
    )


def ticks(num_tokens: Sequence[int]) -> list[int]:
    """Return the Ns that the axis names: all, or those far enough apart for their labels."""
    ordered = sorted(num_tokens)
    if len(ordered) <= MAX_TICKS:
        return ordered
    step = math.log2(ordered[-1] / ordered[0]) / FEWER_TICKS
    named = ordered[:1]
    for count in ordered:
        if math.log2(count / named[-1]) >= step:
            named.append(count)
    return named


def points_of(
    report: Report, problem: Problem, mode: str, contender: str
) -> list[tuple[int, float]]:
    return [
        (num_tokens, time)
        for num_tokens in sorted(report.method.num_tokens)
        if (time := report.microseconds(problem.name, mode, num_tokens, contender)) is not None
    ]


def label_lines(
    axes: Any, report: Report, problem: Problem, mode: str, colours: Mapping[str, str]
) -> None:
    """Write each line's name beside its last point, moved apart if lines end close together."""
    ends = []
    for contender in report.contenders:
        if points := points_of(report, problem, mode, contender.name):
            ends.append((contender, points[-1]))
    transform = axes.transAxes.inverted()
    heights = [transform.transform(axes.transData.transform(point))[1] for _, point in ends]
    places = spread(heights, LABEL_STEP)
    for (contender, point), place in zip(ends, places, strict=True):
        axes.annotate(
            contender.name,
            point,
            xytext=(1.075, place),
            textcoords="axes fraction",
            annotation_clip=False,
            va="center",
            fontsize=9.5,
            fontweight="bold" if contender.role == OURS else "normal",
            color=colours[contender.name],
            arrowprops={
                "arrowstyle": "-",
                "color": colours[contender.name],
                "linewidth": 0.7,
                "alpha": 0.6,
                "shrinkA": 1,
                "shrinkB": 3,
            },
        )


def spread(ends: Sequence[float], step: float) -> list[float]:
    """Return places at least `step` apart, in the order of `ends` and near them.

    Neighbours that are too close become one block, centred on the mean of its members.
    """
    order = sorted(range(len(ends)), key=lambda at: ends[at])
    blocks: list[list[int]] = []

    def bottom(block: list[int]) -> float:
        centre = sum(ends[at] for at in block) / len(block)
        return centre - step * (len(block) - 1) / 2

    for at in order:
        blocks.append([at])
        while len(blocks) > 1:
            below, above = blocks[-2], blocks[-1]
            if bottom(above) - (bottom(below) + step * (len(below) - 1)) >= step - 1e-12:
                break
            blocks[-2:] = [below + above]
    places = [0.0] * len(ends)
    for block in blocks:
        start = bottom(block)
        for rank, at in enumerate(block):
            places[at] = start + rank * step
    return places
