"""`build-kernels verify`: climb the ladder and print the table artifact x rung."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path

import click
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from build_kernels.cli.console import fits, results, say, stop_like_interrupt
from build_kernels.specs import ARCHITECTURES, KERNELS
from dsv4_router_runtime.artifacts.folder import find_artifacts
from dsv4_router_runtime.errors import RouterError

from .artifact import ArtifactReadError
from .climb import Outcome, is_failure, verify
from .rungs.hardware import read_records
from .store import (
    DOES_NOT_APPLY,
    FAILED,
    NOT_RUN,
    PASSED,
    QUICK,
    RUNGS,
    EvidenceError,
    Result,
    result_json,
)

NOT_PROVEN = (
    "Not proven by any rung but hardware: that ptxas translated rightly, what undocumented "
    "hardware does, rounding order, speed."
)
_STYLES = {PASSED: "green", FAILED: "bold red", NOT_RUN: "yellow"}


@click.command("verify")
@click.option(
    "--arch",
    "archs",
    multiple=True,
    type=click.Choice([arch.name for arch in ARCHITECTURES]),
    help="Only this architecture; repeatable. Default: all.",
)
@click.option(
    "--kernel",
    "kernels",
    multiple=True,
    type=click.Choice([spec.name for spec in KERNELS]),
    help="Only this kernel; repeatable. Default: all.",
)
@click.option(
    "--rung",
    "rungs",
    multiple=True,
    type=click.Choice(RUNGS),
    help="Climb only this rung, and fail where it cannot be climbed; repeatable. Default: all.",
)
@click.option("--quick", is_flag=True, help="Fewer cases and schedules: minutes, not tens of them.")
@click.option(
    "--record",
    "record_files",
    multiple=True,
    type=click.Path(path_type=Path, dir_okay=False, exists=True),
    help="Merge what the gpu tests recorded in this file; repeatable.",
)
@click.option(
    "--artifacts",
    type=click.Path(path_type=Path, file_okay=False),
    help="The set to verify. Default: artifacts/ of this checkout, or the installed wheel's set.",
)
@click.option("--jobs", type=click.IntRange(min=1), help="Processes. Default: one per CPU.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON on stdout.")
def verify_command(
    archs: tuple[str, ...],
    kernels: tuple[str, ...],
    rungs: tuple[str, ...],
    quick: bool,
    record_files: tuple[Path, ...],
    artifacts: Path | None,
    jobs: int | None,
    as_json: bool,
) -> None:
    """Show, rung by rung, that the artifacts are right, and keep the evidence beside them."""
    unkept: list[str] = []

    def on_unkept(reason: str) -> None:
        unkept.append(reason)
        say(f"the evidence is printed and not kept: {reason}")

    stop_like_interrupt()
    try:
        outcomes = verify(
            artifacts or find_artifacts(),
            archs,
            kernels,
            rungs,
            quick=quick,
            records=[record for path in record_files for record in read_records(path)],
            jobs=jobs or len(os.sched_getaffinity(0)),
            on_done=_say,
            on_unkept=on_unkept,
        )
    except (ArtifactReadError, EvidenceError, RouterError, OSError) as error:
        say(f"error: {error}")
        sys.exit(1)
    except KeyboardInterrupt:
        say(f"interrupted; what was found so far is {'not ' if unkept else ''}kept")
        sys.exit(130)
    if as_json:
        print(json.dumps([_row(outcome) for outcome in outcomes], indent=1, sort_keys=True))
    else:
        console = results(width=200)
        print_evidence(console, outcomes)
        for line in explanations(outcomes):
            console.print(line, markup=False, soft_wrap=True)
        console.print(NOT_PROVEN, markup=False, soft_wrap=True)
    failures = [outcome for outcome in outcomes if is_failure(outcome, rungs)]
    if failures:
        names = ", ".join(f"{outcome.artifact} {outcome.rung}" for outcome in failures)
        say(f"{len(failures)} not shown: {names}")
        sys.exit(1)


def _say(outcome: Outcome) -> None:
    result = outcome.result
    reason = f": {result.reason.splitlines()[-1]}" if result.reason else ""
    say(f"{outcome.artifact} {outcome.rung}: {result.status}{reason}")


def _row(outcome: Outcome) -> dict:
    row = {"artifact": outcome.artifact, "rung": outcome.rung, "climbed_now": outcome.climbed}
    return row | result_json(outcome.result)


def print_evidence(console: Console, outcomes: Sequence[Outcome]) -> None:
    """Print one row per artifact and one column per rung, or a line per rung if that is too wide.

    Cells are quoted: what evidence and records say of a GPU is no markup.
    """
    rows: dict[str, dict[str, str]] = {}
    for outcome in outcomes:
        style = _STYLES[outcome.result.status]
        text = escape(cell(outcome.rung, outcome.result))
        rows.setdefault(outcome.artifact, {})[outcome.rung] = f"[{style}]{text}[/]"
    table = Table("artifact", *RUNGS)
    for artifact, cells in rows.items():
        table.add_row(artifact, *(cells[rung] for rung in RUNGS))
    if fits(console, table):
        console.print(table)
        return
    for artifact, cells in rows.items():
        console.print(artifact)
        for rung in RUNGS:
            console.print(f"  {rung:<10} {cells[rung]}")


def cell(rung: str, result: Result) -> str:
    """The status with its figures in a few words: "passed, 24 cases, 120 runs"."""
    if result.status == NOT_RUN:
        return NOT_RUN if result.applies else DOES_NOT_APPLY
    figures, details = result.figures, []
    if result.status == PASSED and result.scope == QUICK:
        details.append("quick")
    if rung == "structure" and "registers" in figures:
        details.append(f"{figures['registers']} regs")
        if paired := sum(figures["paired_instructions"].values()):
            details[-1] += f", {paired} pairs"
    if rung == "lint" and "diagnostics" in figures:
        details.append(f"{figures['explained']} of {figures['diagnostics']} explained")
    if rung == "protocol" and "race_free" in figures:
        details.append(_counted(len(figures["race_free"]), "launch", "launches"))
    if rung == "emulated" and "cases" in figures:
        details.append(_counted(len(figures["cases"]), "case", "cases"))
        details.append(_counted(figures["runs"], "run", "runs"))
    if rung == "hardware":
        runs = figures["records"]
        details += [f"{run['gpu']}, {_counted(run['cases'], 'case', 'cases')}" for run in runs]
    return ", ".join((result.status, *details))


def _counted(number: int, one: str, many: str) -> str:
    return f"{number} {one if number == 1 else many}"


def explanations(outcomes: Sequence[Outcome]) -> list[str]:
    """A line for each reason and each assumption, with the artifacts that share it."""
    reasons: dict[str, list[str]] = {}
    assumptions: dict[str, list[str]] = {}
    for outcome in outcomes:
        rung, result = outcome.rung, outcome.result
        if result.reason:
            text = f"{rung} {result.status}: {result.reason}"
            reasons.setdefault(text, []).append(outcome.artifact)
        for assumption in result.assumptions:
            text = f"{rung} assumes: {assumption}"
            assumptions.setdefault(text, []).append(outcome.artifact)
    return [
        f"{text} [{names[0] if len(names) == 1 else f'{len(names)} artifacts'}]"
        for sharing in (reasons, assumptions)
        for text, names in sorted(sharing.items())
    ]
