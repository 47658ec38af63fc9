"""`build-kernels reproduce`: build twice in other surroundings and compare every byte."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

import click

from build_kernels.building.build import BuildError
from build_kernels.building.entry import sha256
from build_kernels.cli.console import say, stop_like_interrupt
from build_kernels.cli.errors import reported_errors
from build_kernels.cli.extras import why_missing
from build_kernels.cli.options import arch_option, json_option, kernel_option

from .differences import Difference, compare_folders
from .surroundings import read_source
from .two_builds import ARTIFACTS, PACKAGES, Selection, build_twice, quick_selection

_SHOWN = 20  # differences of one file


@click.command("reproduce")
@kernel_option
@arch_option
@click.option("--quick", is_flag=True, help="Compile one kernel per source language: < 1 minute.")
@click.option(
    "--keep",
    type=click.Path(path_type=Path, file_okay=False),
    help="A new folder for the output of both builds, as first/ and second/. Default: deleted.",
)
@json_option
def reproduce_command(
    names: tuple[str, ...], archs: tuple[str, ...], quick: bool, keep: Path | None, as_json: bool
) -> None:
    """Build kernels, wheels and sdist twice, in other surroundings, and compare every byte.

    The second build has another folder, home, time zone, locale, umask, hash seed, number of jobs,
    order of files and dates of files. Fails if one byte differs. Wheels and sdist take kernels that
    are not compiled here (--quick, --kernel, --arch) from artifacts/.
    """
    if quick and (names or archs):
        raise click.UsageError("--quick chooses the kernels: leave --kernel and --arch out")
    selection = quick_selection() if quick else Selection(names=names, archs=archs)
    started = time.monotonic()
    with reported_errors():
        stop_like_interrupt()
        if why := why_missing("hatchling"):
            raise BuildError(f"no wheel can be made: {why}")
        source = read_source()
        with (
            _kept(keep),
            tempfile.TemporaryDirectory(prefix="dsv4-router-reproduce-") as scratch,
        ):
            first, second = build_twice(Path(scratch), source, selection, say)
            differences = compare_folders(first.output, second.output)
            files = _digests(first.output)
            changes = _kernel_changes(first.output, second.output, differences)
            if keep is not None:
                for place in (first, second):
                    shutil.move(place.output, keep / place.surroundings.name)
    report = {
        "commit": source.commit,
        "uncommitted_changes": source.changed,
        "source_date_epoch": source.epoch,
        "surroundings": [asdict(place.surroundings) for place in (first, second)],
        "files": files,
        "differences": [asdict(difference) for difference in differences],
        "kernel_changes": changes,
        "seconds": round(time.monotonic() - started, 1),
    }
    if as_json:
        print(json.dumps(report, indent=1, sort_keys=True))
    else:
        _print_report(report, differences)
    if differences:
        if keep is None:
            say("to look at both outputs, run it again with --keep FOLDER")
        sys.exit(1)


@contextmanager
def _kept(keep: Path | None) -> Iterator[None]:
    """Make the folder before the builds, which take minutes; remove it again if they fail."""
    if keep is None:
        yield
        return
    new = not keep.exists()
    keep.mkdir(parents=True, exist_ok=True)
    if any(keep.iterdir()):
        raise BuildError(f"--keep {keep}: it is not empty; name a new folder")
    if not os.access(keep, os.W_OK | os.X_OK):
        raise BuildError(f"--keep {keep}: no file can be made in it; name a new folder")
    try:
        yield
    except BaseException:
        with suppress(OSError):
            if new:
                keep.rmdir()
        raise


def _digests(folder: Path) -> dict[str, str]:
    paths = sorted(path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): sha256(path.read_bytes()) for path in paths}


def _kernel_changes(first: Path, second: Path, differences: Sequence[Difference]) -> str:
    """Return what `build-kernels diff` prints about the kernels; nothing if they are the same."""
    if not any(difference.file.startswith(ARTIFACTS) for difference in differences):
        return ""
    sides = [str(output / ARTIFACTS) for output in (first, second)]
    command = [sys.executable, "-m", "build_kernels", "diff", *sides]
    done = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True)
    if done.returncode not in (0, 1):
        say(f"no `build-kernels diff` of the kernels: {done.stderr.strip()}")
    return done.stdout


def _print_report(report: Mapping[str, Any], differences: Sequence[Difference]) -> None:
    changes = ", with uncommitted changes" if report["uncommitted_changes"] else ""
    print(f"commit {report['commit']}{changes}, SOURCE_DATE_EPOCH {report['source_date_epoch']}")
    for name, digest in report["files"].items():
        if name.startswith(PACKAGES):
            print(f"{digest}  {name}")
    by_file: dict[str, list[Difference]] = {}
    for difference in differences:
        by_file.setdefault(difference.file, []).append(difference)
    for name, found in by_file.items():
        print(f"{name} differs:")
        for each in found[:_SHOWN]:
            print(f"  {each.field}: {each.first} | {each.second}")
        if len(found) > _SHOWN:
            print(f"  and {len(found) - _SHOWN} more")
    print(report["kernel_changes"], end="")
    same = len(report["files"].keys() - by_file.keys())
    print(f"{same} files are the same, {len(by_file)} differ ({report['seconds']} s)")
