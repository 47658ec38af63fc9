"""Make, mark, lock and clear the private folders of a build.

A build keeps its private files in `.<name>.build/`, beside the artifacts. That folder is inside the
artifacts if these are a mount point, which no rename crosses, or if no file can be made beside.
A mark in the folder shows that a build made it: an unmarked folder is the user's and stays.

    .<name>.lock        held while a build runs; never written to
    .<name>.build/      made-by-build-kernels.json   the mark
                        work/                        output of the compilers
                        set/                         the new set, then the one that it replaced
    .<name>.publish/    the same, inside the artifacts: new files that replace old ones one by one

Only the names in the mark are deleted from `set/`. Another name there came into the artifacts just
before the exchange: it is put back.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import os
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path

from build_kernels.errors import BuilderError
from dsv4_router_runtime.artifacts.folder import MANIFEST_NAME

from .artifact_folder import PlaceError, is_plain, read_plain, vouched_files
from .entry import sha256
from .rename import rename_new

WORK = "work"
SET = "set"
_MARK_NAME = "made-by-build-kernels.json"
_PARTIAL_MARK_NAME = f"{_MARK_NAME}.partial"


class LockedError(BuilderError):
    """Another build of the same artifacts is running."""


@dataclass(frozen=True, kw_only=True)
class Mark:
    """Names that may be deleted when the folder is cleared.

    names: files of `set/`. surplus: files of the artifacts, by sha256, which the new manifest no
    longer lists; a build that was killed after it wrote that manifest leaves them behind.
    """

    names: tuple[str, ...] = ()
    surplus: Mapping[str, str] = field(default_factory=dict)


@contextlib.contextmanager
def build_folder(artifacts: Path) -> Iterator[Path]:
    """Lock the artifacts, and yield a private folder with an empty `work/` in it.

    LockedError if another build holds them, PlaceError if nothing can be made there.
    """
    if artifacts.is_dir() and not os.access(artifacts, os.W_OK | os.X_OK):
        raise _no_place(artifacts, artifacts, PermissionError(errno.EACCES, "it is read-only"))
    place = _place(artifacts)
    with _held(place, artifacts):
        _clear_all(artifacts)
        with marked_folder(place / f".{artifacts.name}.build", artifacts, Mark()) as folder:
            (folder / WORK).mkdir()
            yield folder


def sweep(artifacts: Path) -> None:
    """Clear the rest of a killed build, if possible: a build with nothing to do writes nothing.

    LockedError if that build is running, PlaceError if it left files that no build made.
    """
    folders = _private_folders(artifacts)
    if not any(_read_mark(folder) or os.path.lexists(_unmarked(folder)) for folder in folders):
        return
    with contextlib.ExitStack() as stack:
        try:
            stack.enter_context(_held(_place(artifacts), artifacts))
        except PlaceError:
            return
        with contextlib.suppress(OSError):
            _clear_all(artifacts)


@contextlib.contextmanager
def marked_folder(folder: Path, artifacts: Path, mark: Mark) -> Iterator[Path]:
    """Make a folder with a mark, and clear it at the end; PlaceError if the name is taken."""
    unmarked = _unmarked(folder)
    try:
        unmarked.mkdir()
        write_mark(unmarked, mark)
        rename_new(unmarked, folder)
    except OSError as error:
        _delete_unmarked(unmarked)
        if os.path.lexists(folder):
            raise PlaceError(
                f"cannot build {artifacts}: {folder} is in the way, and no mark in it says that a "
                "build made it; move it elsewhere, or delete it"
            ) from error
        raise _no_place(folder.parent, artifacts, error) from error
    try:
        yield folder
    finally:
        clear(folder, artifacts)


def _unmarked(folder: Path) -> Path:
    """Return the folder's name before it has its mark, and after. That name is a mark too."""
    return folder.with_name(f"{folder.name}.{_MARK_NAME}")


def _delete_unmarked(unmarked: Path) -> None:
    """Delete a folder that is empty or holds only its mark; leave any other folder."""
    if not unmarked.is_symlink():
        with contextlib.suppress(OSError):
            for name in (_PARTIAL_MARK_NAME, _MARK_NAME):
                (unmarked / name).unlink(missing_ok=True)
            unmarked.rmdir()


def write_mark(folder: Path, mark: Mark) -> None:
    """Write the mark, by rename: half a mark would list too few names."""
    partial = folder / _PARTIAL_MARK_NAME
    partial.write_text(json.dumps(asdict(mark)))
    partial.replace(folder / _MARK_NAME)


def clear(folder: Path, artifacts: Path) -> None:
    """Delete a marked folder, except files that no build made."""
    mark = _read_mark(folder)
    if mark is None:
        return
    shutil.rmtree(folder / WORK, ignore_errors=True)
    put_back(folder, artifacts)
    _remove_surplus(artifacts, mark.surplus)
    if set(os.listdir(folder)) <= {_MARK_NAME, _PARTIAL_MARK_NAME}:
        rename_new(folder, _unmarked(folder))
        _delete_unmarked(_unmarked(folder))


def put_back(folder: Path, artifacts: Path) -> tuple[Path, ...]:
    """Delete the marked files of `set/`; move all others into the artifacts and return their paths.

    A file whose name is taken there stays where it is.
    """
    place, mark = folder / SET, _read_mark(folder)
    if mark is None or place.is_symlink() or not place.is_dir():
        return ()
    found = []
    for name in sorted(os.listdir(place)):
        if name in mark.names and is_plain(place / name):
            with contextlib.suppress(OSError):  # the next build tries again
                (place / name).unlink()
            continue
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
    """Return the folder of the new files while they replace the old ones one by one."""
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
        _delete_unmarked(_unmarked(folder))
        clear(folder, artifacts)
        if _read_mark(folder):
            places = (folder / SET, folder) if (folder / SET).is_dir() else (folder,)
            held = {name for place in places for name in os.listdir(place)}
            names = sorted(held - {SET, _MARK_NAME, _PARTIAL_MARK_NAME})
            raise PlaceError(
                f"cannot build {artifacts}: a former build's {folder} holds {', '.join(names)}, "
                "which no build made or which cannot be deleted; move it elsewhere"
            )


def _remove_surplus(artifacts: Path, surplus: Mapping[str, str]) -> None:
    """Delete files that left the manifest. An OSError keeps the mark for the next build."""
    manifest = artifacts / MANIFEST_NAME
    if not surplus or not is_plain(manifest):
        return  # without a manifest they may be all that is left of the set
    listed = vouched_files(manifest.read_bytes())
    for name, digest in surplus.items():
        path = artifacts / name
        if name not in listed and is_plain(path) and sha256(path.read_bytes()) == digest:
            path.unlink()


def _read_mark(folder: Path) -> Mark | None:
    """Return the mark; None if the folder has none, as a user's folder of that name."""
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
    """Hold the lock in `place`. The kernel releases it when the process ends."""
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
    """Open without changing anything: a user may have a file of that name, or a FIFO."""
    careful = os.O_NOFOLLOW | os.O_NONBLOCK
    try:
        return os.open(lock, os.O_RDWR | os.O_CREAT | careful, 0o666)
    except PermissionError:
        # Another member of a group made it, and only that member may write to it.
        return os.open(lock, os.O_RDONLY | careful)


def _no_place(place: Path, artifacts: Path, error: OSError) -> PlaceError:
    return PlaceError(
        f"cannot build {artifacts}: no file can be made in {place} "
        f"({error.strerror}{f': {error.filename}' if error.filename else ''}); "
        "name a folder in a writable place with --artifacts FOLDER"
    )
