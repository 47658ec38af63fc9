"""Build everything that a release has twice, each time in a copy of the checkout."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from build_kernels.building.artifact_folder import read_plain, vouched_files
from build_kernels.building.build import BuildError
from build_kernels.specs import KERNELS
from dsv4_router_runtime.artifacts.folder import MANIFEST_NAME

from .surroundings import Place, Source, make_place, two_surroundings

ARTIFACTS, PACKAGES = "artifacts", "dist"
_SHOWN_LINES = 20
_SECONDS_TO_END = 20


@dataclass(frozen=True, kw_only=True)
class Selection:
    """The kernels that are compiled; empty names or architectures mean all.

    A wheel needs every kernel: with a part of them it takes the others from the checkout, as built.
    """

    names: Sequence[str] = ()
    archs: Sequence[str] = ()

    @property
    def is_whole(self) -> bool:
        return not self.names and not self.archs


def quick_selection() -> Selection:
    """Return one kernel per source language, on one architecture."""
    by_language = {type(spec.source): spec for spec in reversed(KERNELS)}
    return Selection(
        names=[spec.name for spec in by_language.values()], archs=[KERNELS[0].archs[0]]
    )


def build_twice(
    base: Path, source: Source, selection: Selection, say: Callable[[str], None]
) -> tuple[Place, Place]:
    """Build in both surroundings, one after the other; return the places with their output.

    BuildError if a build fails. Interrupted, it ends the processes that it started.
    """
    built = _built_files(source.root, selection)
    # Both before the first build: somebody may edit the checkout in these minutes.
    first, second = (make_place(base, each, source, built) for each in two_surroundings())
    for place in (first, second):
        say(f"the {place.surroundings.name} build")
        _build(place, selection)
    return first, second


def _built_files(root: Path, selection: Selection) -> list[str]:
    """Return the files of the checkout's artifacts that a wheel takes as they are.

    The kernels, unless all are compiled here, and a signature. BuildError if a kernel is missing.
    """
    folder = root / ARTIFACTS
    found = {path.name for path in folder.glob("[!.]*") if path.is_file()}
    kernels = {name for name in found if name.endswith((".cubin", ".ptx"))}
    if selection.is_whole:
        return [f"{ARTIFACTS}/{name}" for name in found - kernels]
    listed = vouched_files(read_plain(folder / MANIFEST_NAME) or b"")
    missing = sorted(listed.keys() - kernels) if listed else [MANIFEST_NAME]
    if missing:
        raise BuildError(
            "the wheel needs every kernel, and only a part of them is compiled twice: the others "
            f"come from {folder}, where {missing[0]} is missing or damaged. Run "
            "`build-kernels build` first, or compile all twice: no --quick, --kernel or --arch"
        )
    return [f"{ARTIFACTS}/{name}" for name in found]


def _build(place: Place, selection: Selection) -> None:
    artifacts, packages = place.base / ARTIFACTS, place.output / PACKAGES
    chosen = [f"--kernel={name}" for name in selection.names]
    chosen += [f"--arch={arch}" for arch in selection.archs]
    jobs = f"--jobs={place.surroundings.jobs}"
    _run(place, ".", "build_kernels", "build", f"--artifacts={artifacts}", jobs, *chosen)
    shutil.copytree(artifacts, place.output / ARTIFACTS)
    if selection.is_whole:
        shutil.copytree(artifacts, place.checkout / ARTIFACTS, dirs_exist_ok=True)
    _run(place, ".", "hatchling", "build", "-t", "sdist", "-t", "wheel", "-d", str(packages))
    _run(place, "build_kernels", "hatchling", "build", "-t", "wheel", "-d", str(packages))


def _run(place: Place, folder: str, *module: str) -> None:
    with place.log.open("ab") as log:
        process = subprocess.Popen(
            [sys.executable, "-m", *module],
            cwd=place.checkout / folder,
            env=place.environment(),
            umask=place.surroundings.umask,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            process_group=0,  # Ctrl-C is for this process, which ends that one
        )
        try:
            status = process.wait()
        except BaseException:
            _end(process)
            raise
    if status != 0:
        lines = place.log.read_text(errors="replace").splitlines()[-_SHOWN_LINES:]
        shown = "\n  ".join(lines)
        raise BuildError(
            f"the {place.surroundings.name} build failed: `python -m {' '.join(module)}` ended "
            f"with {status}:\n  {shown}"
        )


def _end(process: subprocess.Popen[bytes]) -> None:
    """End a build as Ctrl-C does, so that it ends its workers; kill it if it does not end."""
    for number in (signal.SIGTERM, signal.SIGKILL):
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, number)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(_SECONDS_TO_END)
            return
