"""`build-kernels budget`: hold the kernels and the package to budgets.toml."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path

import click
from rich.markup import escape
from rich.table import Table

from build_kernels.bench.report import read_report
from build_kernels.building.entry import sha256
from build_kernels.cli.console import results, say
from build_kernels.cli.errors import reported_errors
from build_kernels.cli.options import json_option, shown_option
from build_kernels.specs import KERNELS as SPECS
from dsv4_router_runtime.artifacts.files import MAX_JSON_BYTES, read_file
from dsv4_router_runtime.artifacts.folder import MANIFEST_NAME, find_artifacts, open_artifacts

from .budgets import KERNELS, Verdict, changes, judge, read_budgets, renewed, write_budgets
from .measure import gpu_numbers, kernel_numbers, start_numbers, wheel_numbers
from .render import markdown_safe

BUDGETS = Path(__file__).parents[1] / "budgets.toml"


@click.command("budget")
@click.option("--update", is_flag=True, help="Write the budgets that what was measured holds.")
@click.option(
    "--wheel",
    type=click.Path(path_type=Path, exists=True, dir_okay=False),
    help="Measure this wheel's bytes.",
)
@click.option(
    "--bench",
    type=click.Path(path_type=Path, exists=True, dir_okay=False),
    help="Take GPU times from this file of `build-kernels bench --json`.",
)
@click.option(
    "--budgets",
    type=click.Path(path_type=Path, dir_okay=False),
    default=BUDGETS,
    help="The file of budgets. Default: budgets.toml of build_kernels.",
)
@click.option(
    "--since",
    type=click.Path(path_type=Path, exists=True, dir_okay=False),
    help="List what changed since this older file of budgets.",
)
@shown_option
@json_option
@click.option("--markdown", is_flag=True, help="Print Markdown on stdout, as for a review.")
def budget_command(
    update: bool,
    wheel: Path | None,
    bench: Path | None,
    budgets: Path,
    since: Path | None,
    artifacts: Path | None,
    as_json: bool,
    markdown: bool,
) -> None:
    """Hold registers, local and shared memory, opcodes, bytes and times to their budgets.

    Exit status: 0 if all that was measured is within its budget, 1 if not, 2 if something cannot be
    read.
    """
    if as_json and markdown:
        raise click.UsageError("--json and --markdown are two forms of output: leave one out")
    with reported_errors(status=2):
        limits = {} if update and not budgets.exists() else read_budgets(budgets)
        opened = open_artifacts(artifacts or find_artifacts())
        report = read_report(bench) if bench else None
        measured = kernel_numbers(opened) | start_numbers(opened.folder)
        measured |= wheel_numbers(wheel) if wheel else {}
        measured |= gpu_numbers(report) if report else {}
        if update:
            known = {(KERNELS, spec.name, arch) for spec in SPECS for arch in spec.archs}
            old, limits = limits, renewed(measured, limits, known)
            write_budgets(budgets, limits)
            changed = sum(old.get(p) != limits.get(p) for p in old.keys() | limits.keys())
            say(f"{changed} budgets changed in {budgets}")
        verdict = judge(measured, limits)
        if since:
            verdict = replace(verdict, changed=changes(read_budgets(since), limits))
        if report and report.method.manifest_sha256 != _manifest_sha256(opened.folder):
            note = f"{bench} measured the kernels of another manifest than that of {opened.folder}"
            verdict = replace(verdict, notes=(note,))
    if as_json:
        print(json.dumps(asdict(verdict), indent=1, sort_keys=True))
    elif markdown:
        print(to_markdown(verdict))
    else:
        print_verdict(verdict)
    if verdict.exceeded:
        sys.exit(1)


def print_verdict(verdict: Verdict) -> None:
    """Print the budgets that are not held, those that changed, and what was not measured."""
    for heads, rows in _tables(verdict):
        table = Table(*heads)
        for row in rows:
            table.add_row(*map(escape, row))
        results(width=120).print(table)
    for line in _summary(verdict):
        print(line)


def to_markdown(verdict: Verdict) -> str:
    """Return the verdict as a reviewer reads it."""
    lines = ["## Budgets", ""]
    for heads, rows in _tables(verdict):
        lines += [f"| {' | '.join(heads)} |", "| --- | --- | --- |"]
        lines += (f"| {' | '.join(map(markdown_safe, row))} |" for row in rows)
        lines.append("")
    lines += (f"- {markdown_safe(line)}" for line in _summary(verdict))
    return "\n".join(lines)


_Row = tuple[str, str, str]


def _tables(verdict: Verdict) -> Iterator[tuple[_Row, list[_Row]]]:
    """Yield the heads and the rows of each table that has any."""
    if verdict.exceeded:
        yield ("what", "got", "allowed"), [(e.what, e.got, e.allowed) for e in verdict.exceeded]
    if verdict.changed:
        yield ("budget", "before", "now"), [(c.what, c.before, c.now) for c in verdict.changed]


def _summary(verdict: Verdict) -> list[str]:
    lines = [f"{verdict.held} budgets held, {len(verdict.exceeded)} not"]
    if verdict.exceeded:
        lines.append("to allow what this set has, in a review: build-kernels budget --update")
    for found, words in (
        (verdict.loose, "higher than needed: build-kernels budget --update lowers them"),
        (
            verdict.not_measured,
            "not measured: --wheel FILE and --bench FILE bring what they are of",
        ),
        (verdict.no_budget, "without a budget: build-kernels budget --update writes them"),
    ):
        if found:
            more = f" and {len(found) - 1} more" if found[1:] else ""
            lines.append(f"{len(found)} {words} ({found[0]}{more})")
    return [*lines, *(f"note: {note}" for note in verdict.notes)]


def _manifest_sha256(folder: Path) -> str:
    return sha256(read_file(folder / MANIFEST_NAME, most_bytes=MAX_JSON_BYTES))
