"""Run the fault campaign and print its table: the command `build-kernels faults`."""

from __future__ import annotations

import difflib
import json
import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import click

from build_kernels.cli.console import say, stop_like_interrupt
from build_kernels.cli.errors import reported_errors
from build_kernels.cli.extras import why_missing
from build_kernels.cli.options import jobs_option, json_option
from build_kernels.evidence.artifact import NO_PTX, ArtifactReadError, carries_ptx
from dsv4_router_runtime.artifacts.folder import find_artifacts

from .fault import Fault
from .run import NOT_RUN, WRONG, Outcome, run_faults, test_command
from .table import BY_NAME, FAULTS


@click.command("faults")
@click.option("--list", "only_list", is_flag=True, help="Print the table and run nothing.")
@click.option("--only", "names", multiple=True, metavar="ID", help="Only this row; repeatable.")
@click.option("--quick", is_flag=True, help="Fewer numbers of experts and loads: minutes.")
@click.option(
    "--artifacts",
    type=click.Path(path_type=Path, file_okay=False),
    help="The folder of built kernels and their PTX. Default: artifacts/ of this checkout.",
)
@jobs_option
@json_option
def faults_command(
    only_list: bool,
    names: tuple[str, ...],
    quick: bool,
    artifacts: Path | None,
    jobs: int | None,
    as_json: bool,
) -> None:
    """Make every fault happen that this machine can, and print the outcomes.

    A row that needs a GPU is not run here; its command is printed. Fails if the outcome of a row
    is not the expected one.
    """
    chosen = choose(names)
    outcomes: dict[str, Outcome] = {}

    def on_outcome(outcome: Outcome) -> None:
        outcomes[outcome.fault] = outcome
        say(f"[{len(outcomes)}/{len(chosen)}] {outcome.status}: {outcome.fault}")

    if not only_list:
        stop_like_interrupt()
        for package in ("numpy", "torch"):
            if (problem := why_missing(package)) is not None:
                raise click.ClickException(problem)
        with reported_errors():
            folder = artifacts or find_artifacts()
            if not carries_ptx(folder):
                raise ArtifactReadError(f"{folder}: {NO_PTX}")
            processes = jobs or len(os.sched_getaffinity(0))
            run_faults(folder, chosen, quick=quick, jobs=processes, on_outcome=on_outcome)
    if as_json:
        print(json.dumps([row(fault, outcomes.get(fault.name)) for fault in chosen], indent=1))
    else:
        print("\n".join(table(chosen, outcomes)))
    if any(outcome.status == WRONG for outcome in outcomes.values()):
        sys.exit(1)


def choose(names: Sequence[str]) -> list[Fault]:
    """Return the rows of these names in the table's order, all if there are none; UsageError."""
    for name in names:
        if name not in BY_NAME:
            near = difflib.get_close_matches(name, BY_NAME, n=3, cutoff=0.3)
            raise click.UsageError(
                f"--only {name!r}: no row is called so; the nearest: {', '.join(near)}; "
                "`build-kernels faults --list` shows all"
            )
    return [fault for fault in FAULTS if not names or fault.name in names]


def row(fault: Fault, outcome: Outcome | None) -> dict[str, Any]:
    """Return a row and its outcome, for JSON."""
    return {
        "id": fault.name,
        "hazard": fault.hazard,
        "what": fault.what,
        "needs": fault.place.value,
        "expected": fault.expected.name,
        "proof": test_command(fault) if fault.tests else "emulator",
        "status": outcome.status if outcome else NOT_RUN,
        "detail": outcome.detail if outcome else "",
    }


def table(faults: Sequence[Fault], outcomes: Mapping[str, Outcome]) -> list[str]:
    """Return a line per row, a count, and the details of the rows that are not as expected.

    Without outcomes no status is shown: the records of `build-kernels verify` may have one.
    """
    rows: list[tuple[str, ...]] = [("id", "hazard", "needs", "expected", "status", "fault")]
    for fault in faults:
        outcome = outcomes.get(fault.name)
        status = outcome.status if outcome else NOT_RUN
        cells = (fault.name, fault.hazard, fault.place.value, fault.expected.name, status)
        rows.append((*cells, fault.what))
    if not outcomes:
        rows = [(*cells[:4], cells[5]) for cells in rows]
    widths = [max(len(cells[i]) for cells in rows) for i in range(len(rows[0]))]
    lines = [
        "  ".join(cell.ljust(width) for cell, width in zip(cells, widths, strict=True)).rstrip()
        for cells in rows
    ]
    lines.insert(1, "  ".join("-" * width for width in widths))
    details = [
        f"{name}: {outcome.detail}"
        for name, outcome in outcomes.items()
        if outcome.status in (WRONG, NOT_RUN)
    ]
    counts = [f"{sum(o.status == s for o in outcomes.values())} {s}" for s in (WRONG, NOT_RUN)]
    total = f"{len(faults)} rows; {', '.join(counts)}" if outcomes else f"{len(faults)} rows"
    return [*lines, "", *details, total]
