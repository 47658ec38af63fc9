"""Print what the emulated rung's cases reach: the command `build-kernels coverage`."""

from __future__ import annotations

import json
import os
import sys
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import click

from build_kernels.cli.console import say, stop_like_interrupt
from build_kernels.cli.errors import reported_errors
from build_kernels.cli.extras import why_missing
from build_kernels.cli.options import (
    arch_option,
    artifacts_option,
    jobs_option,
    json_option,
    kernel_option,
)
from build_kernels.workers import WorkerDiedError, run_tasks
from dsv4_router_runtime.artifacts.folder import find_artifacts, open_artifacts
from dsv4_router_runtime.artifacts.manifest import Kernel

from .artifact import NO_PTX, ArtifactReadError, carries_ptx
from .climb import choose_kernels
from .picked import PICKED, picked_numbers
from .rungs.emulated import PACKAGES


@click.command("coverage")
@arch_option
@kernel_option
@click.option("--quick", is_flag=True, help="Of the cases of `verify --quick`.")
@click.option(
    "--pick",
    "patience",
    type=click.IntRange(min=1),
    metavar="N",
    help="Pick the quick cases of the kernels' roles anew: draw until N in a row reach nothing new "
    "of these kernels. Minutes per kernel: choose one per role.",
)
@artifacts_option("The folder of built kernels and their PTX. Default: artifacts/.")
@jobs_option
@json_option
def coverage_command(
    archs: tuple[str, ...],
    names: tuple[str, ...],
    quick: bool,
    patience: int | None,
    artifacts: Path | None,
    jobs: int | None,
    as_json: bool,
) -> None:
    """Show which blocks, predicates, selects and guards of each kernel the cases reach.

    Fails if something is not reached and nothing explains why.
    """
    stop_like_interrupt()
    for package in PACKAGES:
        if (problem := why_missing(package)) is not None:
            raise click.ClickException(problem)
    processes = jobs or len(os.sched_getaffinity(0))
    with reported_errors():
        folder = artifacts or find_artifacts()
        chosen = choose_kernels(folder, open_artifacts(folder).manifest.kernels, archs, names)
        if not carries_ptx(folder):
            raise ArtifactReadError(f"{folder}: {NO_PTX}")
        if patience is not None:
            _pick(folder, chosen, patience, processes)
            return
        found = _measure(folder, chosen, quick, processes)
    if as_json:
        print(json.dumps([asdict(each) for each in found], indent=1))
    else:
        print("\n".join(table(found)))
    if any(each.open for each in found):
        sys.exit(1)


def _measure(folder: Path, kernels: Sequence[Kernel], quick: bool, jobs: int) -> list[Any]:
    """Measure the artifacts in processes; return the results in the order of `kernels`."""
    from .coverage import measure_one

    found = {}
    calls = {kernel.key: (folder, kernel.key, quick) for kernel in kernels}
    with run_tasks(measure_one, calls, jobs=jobs) as results:
        for key, measured in results:
            if isinstance(measured, WorkerDiedError):
                raise click.ClickException(f"{key}: {measured}")
            found[key] = measured
            say(f"[{len(found)}/{len(calls)}] {key}")
    return [found[kernel.key] for kernel in kernels]


def _pick(folder: Path, kernels: Sequence[Kernel], patience: int, jobs: int) -> None:
    """Pick the draws of the kernels' roles, and keep each role's when they are found."""
    from .coverage import pick

    roles: dict[str, list[str]] = defaultdict(list)
    for kernel in kernels:
        roles[kernel.role].append(kernel.key)
    served = {role: _largest(folder, role) for role in roles}
    calls = {role: (folder, keys, served[role], patience) for role, keys in roles.items()}
    with run_tasks(pick, calls, jobs=jobs) as results:
        for role, numbers in results:
            if isinstance(numbers, WorkerDiedError):
                raise click.ClickException(f"{role}: {numbers}")
            known = picked_numbers() | {role: numbers}
            picked_numbers.cache_clear()
            rows = [f" {json.dumps(name)}: {known[name]}" for name in sorted(known)]
            PICKED.write_text("{\n" + ",\n".join(rows) + "\n}\n")
            print(f"{role}: {len(numbers)} cases: {numbers}")


def _largest(folder: Path, role: str) -> list[str]:
    """Return a kernel of the role with the largest token tile, whose goals hold for all."""
    listed = [each for each in open_artifacts(folder).manifest.kernels if each.role == role]
    return [max(listed, key=lambda each: each.launch.token_tile).key]


def table(found: Sequence[Any]) -> list[str]:
    """Return a line per artifact with reached / all by kind, and what may need a case."""
    kinds = list(found[0].counts) if found else []
    rows = [("kernel", "cases", *(f"{kind}s" for kind in kinds), "explained", "open")]
    for each in found:
        counts = [f"{reached}/{every}" for reached, every in each.counts.values()]
        explained = len(each.unreached) - len(each.open)
        rows.append((each.artifact, str(each.cases), *counts, str(explained), str(len(each.open))))
    widths = [max(len(cells[i]) for cells in rows) for i in range(len(rows[0]))]
    lines = ["  ".join(map(str.ljust, cells, widths)).rstrip() for cells in rows]
    lines.insert(1, "  ".join("-" * width for width in widths))
    for each in found:
        lines += [f"{each.artifact}: {row_of(asdict(item))}" for item in each.open]
    return lines


def row_of(item: Mapping[str, Any]) -> str:
    """Return one line of what was not reached."""
    where = f" line {item['line']}" if item["line"] else ""
    return f"{item['kind']} never {item['outcome']}{where}: {item['text']}"
