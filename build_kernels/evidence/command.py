"""Climb the ladder and print the evidence: the command `build-kernels verify`."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import click

from build_kernels.cli.console import results, say, stop_like_interrupt
from build_kernels.cli.options import (
    arch_option,
    artifacts_option,
    jobs_option,
    json_option,
    kernel_option,
)
from dsv4_router_runtime.artifacts.folder import find_artifacts
from dsv4_router_runtime.errors import RouterError

from .artifact import ArtifactReadError
from .climb import Outcome, is_failure, verify
from .document import EvidenceError
from .result import result_json
from .rungs import RUNGS
from .rungs.hardware import read_records
from .store import read_evidence
from .table import explanations, print_evidence

NOT_PROVEN = (
    "Not proven by any rung but hardware: that ptxas translated rightly, what undocumented "
    "hardware does, rounding order, speed."
)


@click.command("verify")
@arch_option
@kernel_option
@click.option(
    "--rung",
    "rungs",
    multiple=True,
    type=click.Choice(tuple(RUNGS)),
    help="Climb only this rung, and fail if it cannot be climbed; repeatable. Default: all.",
)
@click.option("--quick", is_flag=True, help="Fewer cases and schedules: minutes, not tens of them.")
@click.option(
    "--record",
    "record_files",
    multiple=True,
    type=click.Path(path_type=Path, dir_okay=False, exists=True),
    help="Merge this file of the GPU tests' records; repeatable.",
)
@click.option(
    "--evidence",
    "evidence_files",
    multiple=True,
    type=click.Path(path_type=Path, dir_okay=False, exists=True),
    help="Merge this evidence.json of the same bytes from another machine; repeatable.",
)
@artifacts_option(
    "The set to verify. Default: artifacts/ of this checkout, or the installed wheel's set."
)
@jobs_option
@json_option
def verify_command(
    archs: tuple[str, ...],
    names: tuple[str, ...],
    rungs: tuple[str, ...],
    quick: bool,
    record_files: tuple[Path, ...],
    evidence_files: tuple[Path, ...],
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
            names,
            rungs,
            quick=quick,
            records=[record for path in record_files for record in read_records(path)],
            others=[read_evidence(path) for path in evidence_files],
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
        listed = ", ".join(f"{outcome.artifact} {outcome.rung}" for outcome in failures)
        say(f"{len(failures)} not shown: {listed}")
        sys.exit(1)


def _say(outcome: Outcome) -> None:
    result = outcome.result
    reason = f": {result.reason.splitlines()[-1]}" if result.reason else ""
    say(f"{outcome.artifact} {outcome.rung}: {result.status}{reason}")


def _row(outcome: Outcome) -> dict:
    row = {"artifact": outcome.artifact, "rung": outcome.rung, "climbed_now": outcome.climbed}
    return row | result_json(outcome.result)
