"""`build-kernels build`: compile stale kernels and publish the set."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import click
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from build_kernels.building import build as builder
from build_kernels.building.plan import make_plan

from .console import say, stop_like_interrupt, talk
from .errors import reported_errors
from .options import (
    ARCH_NAMES,
    KERNEL_NAMES,
    arch_option,
    artifacts_option,
    jobs_option,
    json_option,
    kernel_option,
)


@click.command("build")
@arch_option
@kernel_option
@jobs_option
@click.option(
    "--locked", is_flag=True, help="Fail unless the new bytes are those that the manifest records."
)
@artifacts_option(
    "The folder to build in. Files that no build made are refused, names that start with "
    "a dot are left alone. Default: artifacts/ of this checkout."
)
@json_option
def build_command(
    archs: tuple[str, ...],
    names: tuple[str, ...],
    jobs: int | None,
    locked: bool,
    artifacts: Path | None,
    as_json: bool,
) -> None:
    """Compile the kernels that are out of date and publish cubins and manifest.

    A build of some kernels (--arch, --kernel) keeps the others, or is refused if it cannot.
    """
    if locked and (archs or names):
        raise click.UsageError("--locked checks the whole set: leave --arch and --kernel out")
    started = time.monotonic()
    with reported_errors():
        stop_like_interrupt()
        folder = builder.open_folder(artifacts or builder.default_artifacts())
        plan = make_plan(folder, names or KERNEL_NAMES, archs or ARCH_NAMES)
        if plan.problem and plan.manifest is None:
            say(f"building from scratch: {plan.problem}")
        report = builder.run_build(
            folder, plan, jobs=jobs or _cpus(), locked=locked, watch=progress_of
        )
    seconds = round(time.monotonic() - started, 2)
    for name in report.removed:
        say(f"removed {name}")
    if as_json:
        print(json.dumps(asdict(report) | {"seconds": seconds}, indent=1, sort_keys=True))
        return
    left = f", {len(report.kept)} not requested" if report.kept else ""
    print(
        f"{len(report.built)} built, {len(report.up_to_date)} up to date{left} "
        f"in {seconds} s: {_shown(folder)}"
    )


@contextmanager
def progress_of(total: int) -> Iterator[Any]:
    """Show a progress bar on stderr; yield the function to call with each finished kernel's key."""
    columns = (TextColumn("compiling"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=talk, disable=total == 0) as progress:
        bar = progress.add_task("", total=total)

        def on_done(key: str) -> None:
            progress.console.print(f"compiled {key}", markup=False)
            progress.advance(bar)

        yield on_done


def _shown(folder: Path) -> str:
    try:
        return os.path.relpath(folder)
    except FileNotFoundError:  # the current folder is gone
        return str(folder)


def _cpus() -> int:
    return len(os.sched_getaffinity(0))
