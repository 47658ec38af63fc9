"""The private folders of a build: who holds them, what marks them, how old ones are cleared.

A build keeps its own files in `.<name>.build/`, beside the artifacts. They are inside the artifacts
if these are a mount point, which no rename crosses, or if nothing can be made beside them. A mark
in the folder says that a build made it: an unmarked folder of that name is the user's and stays.

    .<name>.lock               held while a build runs; never written to
    .<name>.build/             made-by-build-kernels.json   the mark
                               work/                        what compilers write
                               set/                         the new set, then the one it replaced

Nothing in `set/` is deleted but the names in the mark. Another name there got into the artifacts
just before they were exchanged: it is put back.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path

from dsv4_router_runtime.artifacts import MANIFEST_NAME

from .artifact_folder import PlaceError, file_sha256, read_plain, vouched_files
from .rename import rename_new

WORK = "work"
SET = "set"
_MARK_NAME = "made-by-build-kernels.json"
_PARTIAL_MARK_NAME = f"{_MARK_NAME}.partial"


class LockedError(Exception):
    """Another build of the same artifacts is running."""


@dataclass(frozen=True, kw_only=True)
class Mark:
    """What may be deleted when the folder is cleared.

    names: files of `set/`. surplus: files of the artifacts, by sha256, which the new manifest no
    longer lists; a build that was killed after it wrote that manifest leaves them behind.
    """

    names: tuple[str, ...] = ()
    surplus: Mapping[str, str] = field(default_factory=dict)


@contextlib.contextmanager
def build_folder(artifacts: Path) -> Iterator[Path]:
    """Hold the artifacts, and give a private folder with an empty `work/` in it.

    LockedError if another build holds them, PlaceError if nothing can be made there.
    """
    place = _place(artifacts)
    with _held(place, artifacts):
        _clear_all(artifacts)
        with marked_folder(place / f".{artifacts.name}.build", artifacts, Mark()) as folder:
            (folder / WORK).mkdir()
            yield folder


def sweep(artifacts: Path) -> None:
    """Clear what a killed build left, unless it is on a file system that takes no changes."""
    if any(_read_mark(folder) for folder in _private_folders(artifacts)):
        with contextlib.suppress(PlaceError), _held(_place(artifacts), artifacts):
            _clear_all(artifacts)


@contextlib.contextmanager
def marked_folder(folder: Path, artifacts: Path, mark: Mark) -> Iterator[Path]:
    """Make a folder with a mark, and clear it at the end; PlaceError if the name is taken."""
    try:
        folder.mkdir()
        write_mark(folder, mark)
    except FileExistsError as error:
        raise PlaceError(
            f"cannot build {artifacts}: {folder} is in the way, and no mark in it says that a "
            "build made it; move it elsewhere, or delete it"
        ) from error
    except OSError as error:
        # A full disk may have room for a folder and none for the mark.
        (folder / _PARTIAL_MARK_NAME).unlink(missing_ok=True)
        with contextlib.suppress(OSError):
            folder.rmdir()
        raise _no_place(folder.parent, artifacts, error) from error
    try:
        yield folder
    finally:
        clear(folder, artifacts)


def write_mark(folder: Path, mark: Mark) -> None:
    """Say what may be deleted. By rename: a mark that is half written would say too little."""
    partial = folder / _PARTIAL_MARK_NAME
    partial.write_text(json.dumps(asdict(mark)))
    partial.replace(folder / _MARK_NAME)


def clear(folder: Path, artifacts: Path) -> None:
    """Delete a marked folder, but nothing in it that no build made."""
    mark = _read_mark(folder)
    if mark is None:
        return
    shutil.rmtree(folder / WORK, ignore_errors=True)
    put_back(folder, artifacts)
    _remove_surplus(artifacts, mark.surplus)
    # The mark last: without it the rest would be taken for the user's.
    if set(os.listdir(folder)) <= {_MARK_NAME, _PARTIAL_MARK_NAME}:
        (folder / _PARTIAL_MARK_NAME).unlink(missing_ok=True)
        (folder / _MARK_NAME).unlink()
        folder.rmdir()


def put_back(folder: Path, artifacts: Path) -> tuple[Path, ...]:
    """Delete the marked files of `set/`, move all others into the artifacts; return where they are.

    A file whose name is taken there stays where it is.
    """
    place, mark = folder / SET, _read_mark(folder)
    if mark is None or place.is_symlink() or not place.is_dir():
        return ()
    for name in mark.names:
        with contextlib.suppress(OSError):  # gone, or a folder that somebody else made
            (place / name).unlink()
    found = []
    for name in sorted(os.listdir(place)):
        try:
            rename_new(place / name, artifacts / name)
            found.append(artifacts / name)
        except OSError:
            found.append(place / name)
    with contextlib.suppress(OSError):
        place.rmdir()
    return tuple(found)


def _private_folders(artifacts: Path) -> tuple[Path, ...]:
    name = artifacts.name
    beside, inside = artifacts.parent, artifacts
    return beside / f".{name}.build", inside / f".{name}.build", publish_folder(artifacts)


def publish_folder(artifacts: Path) -> Path:
    """Return where the new files lie while they replace the old ones one by one."""
    return artifacts / f".{artifacts.name}.publish"


def _place(artifacts: Path) -> Path:
    parent = artifacts.parent
    if artifacts.is_dir():
        mounted = artifacts.stat().st_dev != parent.stat().st_dev
        if mounted or not os.access(parent, os.W_OK | os.X_OK):
            return artifacts
    return parent


def _clear_all(artifacts: Path) -> None:
    for folder in _private_folders(artifacts):
        clear(folder, artifacts)
        if (folder / SET).is_dir() and _read_mark(folder) and (left := os.listdir(folder / SET)):
            raise PlaceError(
                f"cannot build {artifacts}: {folder / SET} holds {', '.join(sorted(left))}, which "
                f"came into {artifacts} while a build replaced it; move that elsewhere"
            )


def _remove_surplus(artifacts: Path, surplus: Mapping[str, str]) -> None:
    manifest = read_plain(artifacts / MANIFEST_NAME)
    if manifest is None:
        return  # they may be what is left of the set
    listed = vouched_files(manifest)
    for name, digest in surplus.items():
        if name not in listed and file_sha256(artifacts / name) == digest:
            (artifacts / name).unlink()


def _read_mark(folder: Path) -> Mark | None:
    """Return the mark; None if the folder has none, as a user's own folder of that name."""
    data = None if folder.is_symlink() else read_plain(folder / _MARK_NAME)
    try:
        stored = json.loads(data or b"")
        mark = Mark(names=tuple(stored["names"]), surplus=dict(stored["surplus"]))
        # A name is one of a file in the folder: no path leads out of it.
        inside = all(os.path.basename(name) == name for name in (*mark.names, *mark.surplus))
    except (ValueError, KeyError, TypeError, RecursionError):
        return None
    return mark if inside else None


@contextlib.contextmanager
def _held(place: Path, artifacts: Path) -> Iterator[None]:
    """Hold the lock in `place`. It is the kernel's: it goes with the process."""
    lock = place / f".{artifacts.name}.lock"
    try:
        place.mkdir(parents=True, exist_ok=True)
        handle = _open_lock(lock)
    except OSError as error:
        raise _no_place(place, artifacts, error) from error
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        os.close(handle)
        raise LockedError(
            f"another build of {artifacts} is running (it holds {lock}); wait until it ends"
        ) from error
    try:
        yield
    finally:
        os.close(handle)


def _open_lock(lock: Path) -> int:
    """Open without changing anything: a user may have a file of that name."""
    try:
        return os.open(lock, os.O_RDWR | os.O_CREAT, 0o666)
    except PermissionError:
        # Another member of a group made it, and only that member may write to it.
        return os.open(lock, os.O_RDONLY)


def _no_place(place: Path, artifacts: Path, error: OSError) -> PlaceError:
    return PlaceError(
        f"cannot build {artifacts}: no file can be made in {place} "
        f"({error.strerror}: {error.filename}); "
        "name a folder in a writable place with --artifacts FOLDER"
    )
