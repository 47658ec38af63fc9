"""Print evidence: the table artifact x rung, and the reasons and assumptions below it."""

from __future__ import annotations

from collections.abc import Sequence

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from build_kernels.cli.console import fits

from .climb import Outcome
from .result import DOES_NOT_APPLY, FAILED, NOT_RUN, PASSED, QUICK, Result
from .rungs import RUNGS

_STYLES = {PASSED: "green", FAILED: "bold red", NOT_RUN: "yellow"}


def print_evidence(console: Console, outcomes: Sequence[Outcome]) -> None:
    """Print one row per artifact and one column per rung, or a line per rung if that is too wide.

    Cells are escaped: a GPU's name in a record may look like markup.
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
    """Return the status with its figures in a few words: "passed, 24 cases, 120 runs"."""
    if result.status == NOT_RUN:
        return NOT_RUN if result.applies else DOES_NOT_APPLY
    quick = [QUICK] if (result.status, result.scope) == (PASSED, QUICK) else []
    return ", ".join((result.status, *quick, *RUNGS[rung].details(result.figures)))


def explanations(outcomes: Sequence[Outcome]) -> list[str]:
    """Return a line per reason and per assumption, with the artifacts that share it."""
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
