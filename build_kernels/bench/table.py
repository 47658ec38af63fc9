"""Print the figures as tables: boxes on a terminal, Markdown elsewhere."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from build_kernels.kernels.shapes import MAX_DECODE_TOKENS
from dsv4_router_runtime.artifacts.limits import MAX_TOKENS

from .model import ASSUMPTIONS, H200_NAME, NoModelError, attained_fraction, predict
from .report import (
    COLD,
    EMPTY,
    HOST,
    MMA,
    MMA_CEILINGS,
    MODE_WORDS,
    OURS,
    PEER,
    READ,
    Problem,
    Ratio,
    Report,
    geometric_mean,
    ratio_at,
    ratios,
    variant_ratio,
)

NOTHING = "-"
README_NUM_TOKENS = (1, 8, 64, 128, 512, 2048, 8192, 32768)
PEER_NAMES = {
    "vllm": "vLLM",
    "cuBLAS + dsv4_topk": "cuBLAS",
    "sglang": "SGLang",
    "torch": "PyTorch",
}
# The decode kernels', the prefill kernels' of most shapes, and beyond.
BANDS = (
    (1, MAX_DECODE_TOKENS, f"N <= {MAX_DECODE_TOKENS}"),
    (MAX_DECODE_TOKENS + 1, 512, f"N = {MAX_DECODE_TOKENS + 1}..512"),
    (513, MAX_TOKENS, "N > 512"),
)


def print_report(console: Console, report: Report) -> None:
    """Print every table, the overall ratios, the missing figures, and the model."""
    machine, method = report.machine, report.method
    _line(
        console,
        f"{machine.gpu} ({machine.arch}), driver {machine.driver}, torch {machine.torch}, CUDA "
        f"{machine.cuda}, Triton {machine.triton or 'absent'}; {method.date}; W_gate "
        f"{method.layout}; microseconds per call, median of {method.replays} (host: of "
        f"{method.host_calls}); every answer checked against FP64 before it was timed",
    )
    for problem, mode in itertools.product(report.problems, report.modes):
        _line(console, "")
        _line(console, title(report, problem, mode))
        _line(console, "")
        print_figures(console, report, problem, mode)
    _line(console, "")
    for line in (*summary(report), *contender_lines(report), *missing_lines(report)):
        _line(console, line)
    if COLD in report.modes:
        print_model(console, report)


def title(report: Report, problem: Problem, mode: str) -> str:
    shape = problem.name
    parts = [f"{shape}, top {problem.top_k}, {mode} ({MODE_WORDS[mode]})"]
    for name in (EMPTY, READ):
        if (time := report.floor(shape, mode, name)) is not None:
            parts.append(f"{name} {microseconds(time)}")
    return "; ".join(parts)


def print_figures(console: Console, report: Report, problem: Problem, mode: str) -> None:
    names = [contender.name for contender in report.contenders]
    has_peer = mode != HOST and bool(report.of_role(PEER))
    has_read = report.floor(problem.name, mode, READ) is not None
    has_mma = mode != HOST and report.has_prefill and report.mma_floor(problem, 1) is not None
    variants = () if mode == HOST else report.variants
    columns = ["N", *names, *(" / ".join(pair) for pair in variants)]
    columns += [MMA] * has_mma + ["ours / best peer"] * has_peer + ["ours / read W"] * has_read
    rows = []
    for num_tokens in report.method.num_tokens:
        ratio = ratio_at(report, problem.name, mode, num_tokens)
        times = (report.microseconds(problem.name, mode, num_tokens, name) for name in names)
        row = [str(num_tokens), *(microseconds(time) for time in times)]
        for pair in variants:
            row.append(ratio_text(variant_ratio(report, problem.name, mode, num_tokens, pair)))
        if has_mma:
            row.append(microseconds(report.mma_floor(problem, num_tokens)))
        if has_peer:
            shown = ratio_text(ratio.to_peer)
            row.append(shown if ratio.to_peer is None else f"{shown} ({ratio.best_peer})")
        if has_read:
            row.append(ratio_text(ratio.to_read))
        rows.append(row)
    print_grid(console, columns, rows)


def summary(report: Report) -> Iterator[str]:
    """Yield the worst value and the geometric mean of each ratio, in each mode and band of N."""
    for mode in (mode for mode in report.modes if mode != HOST):
        everywhere = ratios(report, mode)
        for low, high, words in BANDS:
            found = [ratio for ratio in everywhere if low <= ratio.num_tokens <= high]
            name = mode if len(found) == len(everywhere) else f"{mode}, {words}"
            yield from _summary(report, mode, found, name)


def _summary(report: Report, mode: str, found: Sequence[Ratio], name: str) -> Iterator[str]:
    kinds = {"ours / best peer": [(r.to_peer, r, f", {r.best_peer}") for r in found]}
    for pair in report.variants:
        kinds[" / ".join(pair)] = [
            (variant_ratio(report, r.shape, mode, r.num_tokens, pair), r, "") for r in found
        ]
    kinds["ours / read W"] = [(r.to_read, r, "") for r in found]
    for kind, values in kinds.items():
        known = [(ratio, at, peer) for ratio, at, peer in values if ratio is not None]
        if known:
            worst, at, peer = max(known, key=lambda value: value[0])
            yield (
                f"{name}: {kind}: worst {worst:.3f} ({at.shape}, N={at.num_tokens}{peer}), "
                f"geometric mean {geometric_mean(ratio for ratio, _, _ in known):.3f} of "
                f"{len(known)} points"
            )


def contender_lines(report: Report) -> Iterator[str]:
    for contender in report.contenders:
        mark = {OURS: ", the numerator of the ratios", PEER: ", a peer"}.get(contender.role, "")
        yield f"{contender.name}{mark}: {contender.what}"
    for name in (EMPTY, READ):
        ways = sorted({floor.how for floor in report.floors if floor.name == name and floor.how})
        if ways:
            yield f"{name}: {' | '.join(ways)}"
    ceiling = MMA_CEILINGS.get(report.machine.gpu)
    if ceiling is not None and report.has_prefill:
        yield (
            f"{MMA}: computed, 2 N K E operations at {ceiling / 1e12:.0f} TFLOP/s, the fastest "
            f"BF16 matrix product measured on an {report.machine.gpu}"
        )


def missing_lines(report: Report) -> Iterator[str]:
    """Yield a line per contender and reason, with the cells that share it."""
    shared: dict[tuple[str, str], list[tuple[str, ...]]] = {}
    for figure in report.figures:
        if figure.reason is not None:
            shared.setdefault((figure.contender, figure.reason), []).append(
                (figure.shape, figure.mode, f"N={figure.num_tokens}")
            )
    for floor in report.floors:
        if floor.reason is not None:
            shared.setdefault((floor.name, floor.reason), []).append((floor.shape, floor.mode))
    for (name, reason), cells in shared.items():
        yield f"not measured: {name} ({places(cells)}): {' '.join(reason.split())}"


def places(cells: Sequence[tuple[str, ...]]) -> str:
    """Name cells; in short if they are all combinations of some shapes, modes and Ns."""
    axes = [list(dict.fromkeys(axis)) for axis in zip(*cells, strict=True)]
    if set(itertools.product(*axes)) == set(cells):
        return "; ".join(", ".join(axis) for axis in axes)
    return "; ".join(" ".join(cell) for cell in cells)


def print_model(console: Console, report: Report) -> None:
    for problem in report.problems:
        _line(console, "")
        try:
            predictions = predict(report, problem.name)
        except NoModelError as error:
            _line(console, f"sm_100a, model: none ({error})")
            continue
        empty = report.floor(problem.name, COLD, EMPTY) or 0.0
        read = report.floor(problem.name, COLD, READ) or 0.0
        fraction = attained_fraction(problem.weight_bytes, read, empty)
        _line(
            console,
            f"{problem.name} on a B200, sm_100a: MODEL, NOT MEASURED; read at {fraction:.2f} of "
            "the datasheet's bandwidth",
        )
        _line(console, "")
        columns = ["N", f"measured, {H200_NAME}"]
        columns += ["launch", "read", "exchange", "tokens", "sum (model, not measured)"]
        rows = []
        for p in predictions:
            terms = (p.measured, p.launch, p.read, p.exchange, p.tokens, p.total)
            rows.append([str(p.num_tokens), *(microseconds(term) for term in terms)])
        print_grid(console, columns, rows)
    _line(console, "")
    _line(console, f"The model assumes: {'; '.join(ASSUMPTIONS)}.")


def readme_table(*reports: Report) -> str:
    """Return the README's table: ours at each N, in bold, beside the fastest peer; cold.

    An N is the first report's that has it. The floor is the first report's.
    """
    of = {count: report for report in reversed(reports) for count in report.method.num_tokens}
    shapes = [problem.name for problem in reports[0].problems]
    lines = [f"| N | {' | '.join(shape.replace('x', ' x ') for shape in shapes)} |"]
    lines.append(f"| -: |{' --- |' * len(shapes)}")
    for num_tokens in (count for count in README_NUM_TOKENS if count in of):
        report, cells = of[num_tokens], [str(num_tokens)]
        (ours,) = report.of_role(OURS)
        for shape in shapes:
            time = report.microseconds(shape, COLD, num_tokens, ours)
            peer = ratio_at(report, shape, COLD, num_tokens).best_peer or NOTHING
            best = report.microseconds(shape, COLD, num_tokens, peer)
            known = PEER_NAMES.get(peer, peer)
            cells.append(f"**{microseconds(time)}** ({known} {microseconds(best)})")
        lines.append(f"| {' | '.join(cells)} |")
    reads = [microseconds(reports[0].floor(shape, COLD, READ)) for shape in shapes]
    return "\n".join([*lines, f"| read W_gate only | {' | '.join(reads)} |"])


def print_grid(console: Console, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    if not console.is_terminal:
        for line in markdown(columns, rows):
            _line(console, line)
        return
    table = Table()
    for column in columns:
        table.add_column(escape(column), justify="right")
    for row in rows:
        table.add_row(*(escape(cell) for cell in row))
    console.print(table)


def markdown(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> Iterator[str]:
    """Yield a Markdown table with right-aligned columns, padded to read as plain text."""
    widths = [max(len(cell) for cell in column) for column in zip(columns, *rows, strict=True)]
    rule = [f"{'-' * (width - 1)}:" for width in widths]
    for cells in (columns, rule, *rows):
        padded = (cell.rjust(width) for cell, width in zip(cells, widths, strict=True))
        yield f"| {' | '.join(padded)} |"


def microseconds(time: float | None) -> str:
    if time is None:
        return NOTHING
    return f"{time:.2f}" if time < 20 else f"{time:.1f}"


def ratio_text(ratio: float | None) -> str:
    return NOTHING if ratio is None else f"{ratio:.2f}"


def _line(console: Console, text: str) -> None:
    console.print(text, markup=False, highlight=False, soft_wrap=True)
