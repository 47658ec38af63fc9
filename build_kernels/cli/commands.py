"""The command `build-kernels`. Results go to stdout, talk to stderr; a failure is never exit 0."""

from __future__ import annotations

import difflib
import json
import os
import signal
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import click
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

import dsv4_router_runtime
from build_kernels.bench.command import bench_command
from build_kernels.building import build as builder
from build_kernels.building.artifact_folder import PlaceError
from build_kernels.building.compilers import CompileError, toolchain_versions
from build_kernels.building.plan import make_plan
from build_kernels.building.staging import LockedError
from build_kernels.evidence import EvidenceError, verify_command
from build_kernels.specs import ARCHITECTURES, KERNELS
from dsv4_router_runtime.artifacts.folder import MANIFEST_NAME, find_artifacts, open_artifacts
from dsv4_router_runtime.artifacts.manifest import (
    Kernel,
    Manifest,
    Parameter,
    cubin_name,
    serialise_manifest,
)
from dsv4_router_runtime.errors import ArtifactError, RouterError

from .console import results, say, talk
from .listing import explain_states, list_rows, print_rows

KERNEL_NAMES = tuple(spec.name for spec in KERNELS)
ARCH_NAMES = tuple(arch.name for arch in ARCHITECTURES)

_EXPECTED_ERRORS = (
    *(builder.BuildError, CompileError, LockedError, PlaceError),
    *(EvidenceError, RouterError, OSError),
)


class KernelName(click.ParamType):
    """The name of a kernel that this package can build."""

    name = "kernel"

    def convert(
        self, value: object, param: click.Parameter | None, ctx: click.Context | None
    ) -> str:
        name = str(value)
        if name not in KERNEL_NAMES:
            near = difflib.get_close_matches(name, KERNEL_NAMES, n=2)
            hint = f"did you mean {' or '.join(near)}? " if near else ""
            self.fail(
                f"no kernel is called {name!r}; {hint}All: {', '.join(KERNEL_NAMES)}", param, ctx
            )
        return name


json_option = click.option("--json", "as_json", is_flag=True, help="Print JSON on stdout.")
arch_option = click.option(
    "--arch",
    "archs",
    multiple=True,
    type=click.Choice(ARCH_NAMES),
    help="Only this architecture; repeatable. Default: all.",
)
kernel_option = click.option(
    "--kernel",
    "names",
    multiple=True,
    type=KernelName(),
    metavar="KERNEL",
    help="Only this kernel; repeatable. Default: all.",
)
shown_option = click.option(
    "--artifacts",
    type=click.Path(path_type=Path, file_okay=False),
    help="The set to show. Default: artifacts/ of this checkout, or the installed wheel's set.",
)


def print_versions(context: click.Context, _option: click.Parameter, wanted: bool) -> None:
    """Print the versions that decide a build, and exit."""
    if not wanted or context.resilient_parsing:
        return
    print(f"dsv4-router {dsv4_router_runtime.__version__}")
    try:
        for name, version in sorted(toolchain_versions().items()):
            print(f"{name} {version}")
    except CompileError as error:
        print(f"no toolchain: {error}")
    context.exit()


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
@click.option(
    "--version",
    is_flag=True,
    is_eager=True,
    expose_value=False,
    callback=print_versions,
    help="Print this project's version and those of the compilers.",
)
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
        plan = make_plan(folder, names or KERNEL_NAMES, archs or ARCH_NAMES)
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
@arch_option
@kernel_option
@click.option("--check", is_flag=True, help="Fail unless each one listed is built and up to date.")
@shown_option
@json_option
def list_kernels(
    archs: tuple[str, ...],
    names: tuple[str, ...],
    check: bool,
    artifacts: Path | None,
    as_json: bool,
) -> None:
    """Each kernel's state, where it can load, where it was validated, and its evidence."""
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


@main.command()
@click.argument("kernels", type=KernelName(), metavar="KERNEL...", nargs=-1, required=True)
@arch_option
@shown_option
@json_option
def inspect(
    kernels: tuple[str, ...], archs: tuple[str, ...], artifacts: Path | None, as_json: bool
) -> None:
    """Launch ABI, resources and opcode counts of built kernels."""
    with reported_errors():
        entries = _built_entries(artifacts or find_artifacts(), kernels, archs)
    if as_json:
        document = json.loads(serialise_manifest(Manifest(toolchain={}, kernels=entries)))
        print(json.dumps(document["kernels"], indent=1, sort_keys=True))
        return
    for entry in entries:
        _print_entry(entry)


def _built_entries(folder: Path, names: Sequence[str], archs: Sequence[str]) -> tuple[Kernel, ...]:
    """Give the manifest's entries, their cubins checked; for all architectures if none is named."""
    artifacts = open_artifacts(folder)
    entries = {(entry.name, entry.arch): entry for entry in artifacts.manifest.kernels}
    chosen = [
        (name, arch)
        for name in dict.fromkeys(names)
        for arch in archs or [arch for known, arch in entries if known == name] or ARCH_NAMES
    ]
    for name, arch in chosen:
        if (name, arch) not in entries:
            raise ArtifactError(
                file=str(folder / cubin_name(name, arch)),
                problem=f"not built: {MANIFEST_NAME} lists no {name}.{arch}",
            )
    found = tuple(entries[pair] for pair in chosen)
    for entry in found:
        artifacts.read(entry)
    return found


@contextmanager
def reported_errors() -> Iterator[None]:
    """Turn what can go wrong into a message and an exit status; a bug keeps its traceback."""
    try:
        yield
    except KeyboardInterrupt:
        say("interrupted; the artifacts are as they were")
        sys.exit(130)
    except _EXPECTED_ERRORS as error:
        say(f"error: {error}")
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
    table = Table()
    for heading in ("parameter", "kind", "offset", "size"):
        table.add_column(heading, no_wrap=True)
    table.add_column("what")
    for parameter in entry.parameters:
        table.add_row(
            parameter.name,
            parameter.kind,
            str(parameter.offset),
            str(parameter.size),
            escape(_described(parameter)),
        )
    results(width=200).print(table)


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


def _shown(folder: Path) -> str:
    try:
        return os.path.relpath(folder)
    except FileNotFoundError:  # the current folder is gone
        return str(folder)


def _cpus() -> int:
    return len(os.sched_getaffinity(0))
