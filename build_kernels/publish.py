"""How a new set of artifacts takes the place of the old one, so that no moment has half of each.

Everything is written into a staging folder beside `artifacts/`, the manifest last. Then the two
folders are exchanged by one renameat2(RENAME_EXCHANGE), and the old one, now in the staging place,
is deleted. A build that is interrupted or killed at any point therefore leaves either the old set
or the new one, whole; what it leaves in the staging place is deleted by the next build.

A file system without that call (some network and overlay file systems) gets the files one by one,
each by rename, the manifest after all cubins and surplus files deleted after the manifest. A build
killed in those milliseconds leaves cubins whose hashes disagree with the manifest: the runtime
refuses them and names `build-kernels build`, which repairs them.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import fcntl
import os
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path

from dsv4_router_runtime.artifacts import EVIDENCE_NAME, MANIFEST_NAME

_AT_FDCWD = -100
_RENAME_EXCHANGE = 2
_NO_EXCHANGE = (errno.ENOSYS, errno.EINVAL, errno.ENOTSUP, errno.EXDEV, errno.EBUSY, errno.EPERM)


class LockedError(Exception):
    """Another build of the same artifacts is running."""


class PlaceError(Exception):
    """The artifacts cannot be where they are asked for: no files can be made there."""


@contextlib.contextmanager
def build_folder(artifacts: Path) -> Iterator[Path]:
    """An empty private folder on the artifacts' file system, held by one build at a time.

    It is `.<name>.build/` beside the artifacts. The lock is the kernel's: it goes with the process.
    LockedError if another build holds it, PlaceError if nothing can be made there.
    """
    lock = artifacts.parent / f".{artifacts.name}.lock"
    folder = artifacts.parent / f".{artifacts.name}.build"
    try:
        artifacts.parent.mkdir(parents=True, exist_ok=True)
        handle = lock.open("w")
    except OSError as error:
        raise PlaceError(
            f"cannot build {artifacts}: no file can be made in {artifacts.parent} "
            f"({error.strerror}); name a folder in a writable place with --artifacts FOLDER"
        ) from error
    with handle:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise LockedError(
                f"another build of {artifacts} is running (it holds {lock}); wait until it ends"
            ) from error
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
        try:
            yield folder
        finally:
            shutil.rmtree(folder, ignore_errors=True)


def publish(
    artifacts: Path, staging: Path, files: Mapping[str, bytes], kept: tuple[str, ...], manifest: str
) -> tuple[str, ...]:
    """Make `artifacts` hold exactly `files`, the `kept` files it has, and the manifest.

    evidence.json and names that start with a dot stay as well. Returns the names that went.
    """
    staging.mkdir()
    present = sorted(os.listdir(artifacts)) if artifacts.is_dir() else []
    others = [name for name in present if name == EVIDENCE_NAME or name.startswith(".")]
    for name in (*kept, *others):
        shutil.copy2(artifacts / name, staging / name)
    for name, data in files.items():
        (staging / name).write_bytes(data)
    (staging / MANIFEST_NAME).write_text(manifest)
    new = os.listdir(staging)
    _replace(artifacts, staging)
    return tuple(name for name in present if name not in new)


def _replace(artifacts: Path, staging: Path) -> None:
    if not artifacts.exists():
        staging.rename(artifacts)
        return
    try:
        _exchange(staging, artifacts)
    except OSError as error:
        if error.errno not in _NO_EXCHANGE:
            raise
        _replace_files(artifacts, staging)


def _exchange(one: Path, other: Path) -> None:
    """Swap two folders in one step."""
    libc = ctypes.CDLL(None, use_errno=True)
    if not hasattr(libc, "renameat2"):
        raise OSError(errno.ENOSYS, "no renameat2 in the C library")
    failed = libc.renameat2(
        _AT_FDCWD, os.fsencode(one), _AT_FDCWD, os.fsencode(other), _RENAME_EXCHANGE
    )
    if failed:
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code), str(other))


def _replace_files(artifacts: Path, staging: Path) -> None:
    """Move the staged files over the old ones, manifest last, then delete what is surplus."""
    names = sorted(os.listdir(staging), key=lambda name: name == MANIFEST_NAME)
    for name in names:
        (staging / name).replace(artifacts / name)
    for name in os.listdir(artifacts):
        if name not in names:
            (artifacts / name).unlink()
