"""The command `build-kernels`. Results go to stdout, talk to stderr; a failure is never exit 0."""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import click
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from dsv4_router_runtime.artifacts import EVIDENCE_NAME
from dsv4_router_runtime.errors import RouterError
from dsv4_router_runtime.manifest import Kernel, Manifest, Parameter, serialise_manifest

from . import build as builder
from .artifact_folder import PlaceError
from .bench import bench_command
from .compilers import CompileError
from .specs import ARCHITECTURES, KERNELS
from .staging import LockedError
from .verify import (
    RUNGS,
    Evidence,
    EvidenceError,
    read_evidence,
    standing,
    validated_on,
    verify_command,
)

KERNEL_NAMES = tuple(spec.name for spec in KERNELS)
ARCH_NAMES = tuple(arch.name for arch in ARCHITECTURES)

_EXPECTED_ERRORS = (
    *(builder.BuildError, CompileError, LockedError, PlaceError),
    *(EvidenceError, RouterError, OSError),
)

talk = Console(stderr=True, highlight=False)
json_option = click.option("--json", "as_json", is_flag=True, help="Print JSON on stdout.")
arch_option = click.option(
    "--arch",
    "archs",
    multiple=True,
    type=click.Choice(ARCH_NAMES),
    help="Only this architecture; repeatable. Default: all.",
)
artifacts_option = click.option(
    "--artifacts",
    type=click.Path(path_type=Path, file_okay=False),
    help="The folder to work on. Default: artifacts/ of this checkout.",
)


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
def main() -> None:
    """Build the DeepSeek-V4 router's kernels ahead of time: no GPU, no CUDA toolkit."""


main.add_command(bench_command)
main.add_command(verify_command)


@main.command()
@arch_option
@click.option(
    "--kernel",
    "names",
    multiple=True,
    type=click.Choice(KERNEL_NAMES),
    help="Only this kernel; repeatable. Default: all.",
)
@click.option(
    "--jobs", type=click.IntRange(min=1), help="Compiler processes. Default: one for each CPU."
)
@click.option(
    "--locked", is_flag=True, help="Fail unless the bytes made are those the manifest records."
)
@click.option(
    "--artifacts",
    type=click.Path(path_type=Path, file_okay=False),
    help="The folder to build in, which the set has to itself: files that no build made are "
    "refused, names that start with a dot are left alone. Default: artifacts/ of this checkout.",
)
@json_option
def build(
    archs: tuple[str, ...],
    names: tuple[str, ...],
    jobs: int | None,
    locked: bool,
    artifacts: Path | None,
    as_json: bool,
) -> None:
    """Compile what is out of date and publish cubins and manifest.

    A build of some kernels (--arch, --kernel) keeps the others, or is refused if it cannot.
    """
    if locked and (archs or names):
        raise click.UsageError("--locked checks the whole set: leave --arch and --kernel out")
    started = time.monotonic()
    with reported_errors():
        # A stop asked for by the system ends like Ctrl-C: the artifacts stay as they were.
        signal.signal(signal.SIGTERM, signal.default_int_handler)
        folder = builder.open_folder(artifacts or builder.default_artifacts())
        plan = builder.make_plan(folder, names or KERNEL_NAMES, archs or ARCH_NAMES)
        if plan.problem and plan.manifest is None:
            talk.print(f"building from scratch: {plan.problem}", markup=False)
        report = builder.run_build(
            folder, plan, jobs=jobs or _cpus(), locked=locked, watch=progress_of
        )
    seconds = round(time.monotonic() - started, 2)
    for name in report.removed:
        talk.print(f"removed {name}", markup=False)
    if as_json:
        print(json.dumps(asdict(report) | {"seconds": seconds}, indent=1, sort_keys=True))
        return
    left = f", {len(report.kept)} not asked for" if report.kept else ""
    print(
        f"{len(report.built)} built, {len(report.up_to_date)} up to date{left} "
        f"in {seconds} s: {_shown(folder)}"
    )


@main.command("list")
@artifacts_option
@json_option
def list_kernels(artifacts: Path | None, as_json: bool) -> None:
    """Each kernel's state, where it can load, where it was validated, and its evidence."""
    with reported_errors():
        folder = artifacts or builder.default_artifacts()
        plan = builder.make_plan(folder, KERNEL_NAMES, ARCH_NAMES)
        evidence = read_evidence(folder / EVIDENCE_NAME)
    rows = _rows(plan, evidence)
    if as_json:
        print(json.dumps(rows, indent=1, sort_keys=True))
        return
    table = Table("kernel", "arch", "state", "N", "can load on", "validated on", *RUNGS)
    for row in rows:
        table.add_row(*(row[name] for name in (*_COLUMNS, *RUNGS)))
    _print_table(table)


@main.command()
@click.argument("kernel", type=click.Choice(KERNEL_NAMES))
@arch_option
@artifacts_option
@json_option
def inspect(kernel: str, archs: tuple[str, ...], artifacts: Path | None, as_json: bool) -> None:
    """A built kernel's launch ABI, resources and opcode counts."""
    with reported_errors():
        folder = artifacts or builder.default_artifacts()
        entries = builder.built_entries(folder, kernel, archs or ARCH_NAMES)
    if as_json:
        document = json.loads(serialise_manifest(Manifest(toolchain={}, kernels=entries)))
        print(json.dumps(document["kernels"], indent=1, sort_keys=True))
        return
    for entry in entries:
        _print_entry(entry)


@contextmanager
def reported_errors() -> Iterator[None]:
    """Turn what can go wrong into a message and an exit status; a bug keeps its traceback."""
    try:
        yield
    except KeyboardInterrupt:
        talk.print("interrupted; the artifacts are as they were")
        sys.exit(130)
    except _EXPECTED_ERRORS as error:
        talk.print(f"error: {error}", markup=False, soft_wrap=True)
        sys.exit(1)


@contextmanager
def progress_of(total: int) -> Iterator[Any]:
    """A progress bar on stderr; gives the function to call with each finished kernel's key."""
    columns = (TextColumn("compiling"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=talk, disable=total == 0) as progress:
        bar = progress.add_task("", total=total)

        def on_done(key: str) -> None:
            progress.console.print(f"compiled {key}", markup=False)
            progress.advance(bar)

        yield on_done


_COLUMNS = ("kernel", "arch", "state", "num_tokens", "loads_on", "validated_on")


def _rows(plan: builder.Plan, evidence: Evidence) -> list[dict[str, str]]:
    current = {entry.key for entry in plan.current}
    listed = {entry.key: entry for entry in plan.manifest.kernels} if plan.manifest else {}
    archs = {arch.name: arch for arch in ARCHITECTURES}
    rows = []
    for spec in KERNELS:
        for arch in spec.archs:
            key = f"{spec.name}.{arch}"
            state = "built" if key in current else "out of date" if key in listed else "not built"
            entry = listed.get(key)
            rungs = standing(evidence, entry) if entry else dict.fromkeys(RUNGS, "not run")
            rows.append(
                {
                    "kernel": spec.name,
                    "arch": arch,
                    "state": state,
                    "loads_on": archs[arch].loads_on,
                    "validated_on": validated_on(evidence, entry) if entry else "nowhere",
                    "num_tokens": str(spec.problem.num_tokens),
                    "num_experts": str(spec.problem.num_experts),
                    "top_k": str(spec.problem.top_k),
                    **rungs,
                }
            )
    return rows


def _print_entry(entry: Kernel) -> None:
    launch, resources = entry.launch, entry.resources
    print(f"{entry.key}: {entry.symbol} in {entry.file}, sha256 {entry.cubin_sha256}")
    print(
        f"  launch: block {list(launch.block)}, grid {list(launch.grid)} CTAs, "
        f"cluster {list(launch.cluster)}, dynamic shared {launch.dynamic_shared_bytes} B, "
        f"PDL {'yes' if launch.pdl else 'no'}"
    )
    print(
        f"  resources: {resources.registers} registers, spills {resources.spill_bytes} B, "
        f"stack {resources.stack_bytes} B, static shared {resources.static_shared_bytes} B"
    )
    print("  opcodes: " + ", ".join(f"{name} {n}" for name, n in sorted(resources.opcodes.items())))
    table = Table("parameter", "kind", "offset", "size", "what")
    for parameter in entry.parameters:
        table.add_row(
            parameter.name,
            parameter.kind,
            str(parameter.offset),
            str(parameter.size),
            _described(parameter),
        )
    _print_table(table)


def _described(parameter: Parameter) -> str:
    if parameter.tensor_map is not None:
        recipe = parameter.tensor_map
        return (
            f"{recipe.tensor} {recipe.element_type}, dims {', '.join(recipe.dims)}, "
            f"box {list(recipe.box)}, swizzle {recipe.swizzle}, L2 {recipe.l2_promotion}"
        )
    if parameter.scratch is not None:
        zeroed = ", zero between launches" if parameter.scratch.zeroed else ""
        return f"{parameter.element_type} scratch, {parameter.scratch.elements} elements{zeroed}"
    return parameter.element_type or ""


def _print_table(table: Table) -> None:
    """On stdout, as wide as it needs to be where stdout is no terminal."""
    width = None if sys.stdout.isatty() else 200
    Console(width=width, highlight=False).print(table, markup=False)


def _shown(folder: Path) -> str:
    try:
        return os.path.relpath(folder)
    except FileNotFoundError:  # the current folder is gone
        return str(folder)


def _cpus() -> int:
    return len(os.sched_getaffinity(0))
