"""`build-kernels clean`: remove built files, and leave what is tracked."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import click

from build_kernels.building import build as builder
from build_kernels.building.artifact_folder import (
    PlaceError,
    check_contents,
    read_contents,
    resolve_folder,
)
from build_kernels.building.plan import known_files
from build_kernels.building.staging import build_folder
from dsv4_router_runtime.artifacts.dsse import ENVELOPE_NAME

from .console import say, stop_like_interrupt
from .errors import reported_errors
from .options import artifacts_option, json_option


@click.command("clean")
@click.option("--dry-run", is_flag=True, help="Name the files, and remove none.")
@artifacts_option("The folder to clean. Default: artifacts/ of this checkout.")
@json_option
def clean_command(dry_run: bool, artifacts: Path | None, as_json: bool) -> None:
    """Remove cubins, PTX and what a killed build left; keep manifest, signatures and evidence.

    A folder that holds what no build made is refused, as by `build`, and nothing is removed.
    """
    with reported_errors():
        stop_like_interrupt()
        place = artifacts or builder.default_artifacts()
        try:
            folder, names = _clean(place, dry_run)
        except PlaceError as error:
            raise PlaceError(str(error).replace("cannot build", "cannot clean", 1)) from error
    if as_json:
        print(json.dumps({"removed": [] if dry_run else names, "found": names}, indent=1))
        return
    for name in names:
        say(f"{'would remove' if dry_run else 'removed'} {name}")
    print(f"{len(names)} files {'found' if dry_run else 'removed'}: {folder}")


def _clean(place: Path, dry_run: bool) -> tuple[Path, Sequence[str]]:
    """Remove the built files, and return the folder and their names."""
    # Opening it to build would delete what a killed build left.
    folder = resolve_folder(place) if dry_run else builder.open_folder(place)
    if not folder.is_dir():
        raise PlaceError(f"cannot clean {folder}: there is no such folder")
    if dry_run:
        return folder, _built(folder)
    with build_folder(folder):
        names = _built(folder)
        for name in names:
            (folder / name).unlink()
    return folder, names


def _built(folder: Path) -> Sequence[str]:
    """Return the names of the cubins and PTX that a build made; PlaceError if there are others."""
    contents = read_contents(folder, known_files())
    check_contents(folder, contents)
    return contents.surplus((ENVELOPE_NAME,))
