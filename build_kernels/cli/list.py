"""`build-kernels list`: show each kernel's state and evidence."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import click

from dsv4_router_runtime.artifacts.folder import find_artifacts

from .console import results, say
from .errors import reported_errors
from .listing import explain_states, list_rows, print_rows
from .options import arch_option, json_option, kernel_option, shown_option


@click.command("list")
@arch_option
@kernel_option
@click.option("--check", is_flag=True, help="Fail unless each one listed is built and up to date.")
@shown_option
@json_option
def list_command(
    archs: tuple[str, ...],
    names: tuple[str, ...],
    check: bool,
    artifacts: Path | None,
    as_json: bool,
) -> None:
    """Show each kernel's state, where it can load, where it was validated, and its evidence."""
    with reported_errors():
        folder = artifacts or find_artifacts()
        rows = list_rows(folder, names, archs)
        notes = explain_states(rows, folder)
    if as_json:
        print(json.dumps(rows, indent=1, sort_keys=True))
    else:
        print_rows(results(width=200), rows)
    for note in notes:
        say(note)
    if check and notes:
        sys.exit(1)
