"""Replace the old set of artifacts by a new one, so that no moment has half of each.

The new set is written into a folder beside the old one, the manifest last. One
renameat2(RENAME_EXCHANGE) swaps the two, and the files of the old set are deleted by name. A build
that is killed at any point leaves the old set or the new one, whole. The next build clears its
private files (see `staging`).

A folder is kept, and gets its new files one by one, if it cannot be exchanged:
- it is a mount point, or the file system has no exchange (some network and overlay file systems);
- it is the current folder, which would become a deleted one;
- it holds names that start with a dot: other programs expect them there;
- its mode, owner or extended attributes cannot be given to another folder.
Each file is then replaced by rename, the manifest after all cubins, and surplus files are deleted
after the manifest. A build that is killed in those milliseconds leaves cubins whose hashes disagree
with the manifest: the runtime refuses them and names `build-kernels build`, which repairs them.
"""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
import signal
import threading
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from dsv4_router_runtime.artifacts.dsse import ENVELOPE_NAME
from dsv4_router_runtime.artifacts.folder import EVIDENCE_NAME, MANIFEST_NAME

from .artifact_folder import Contents, PlaceError, file_sha256, vouched_files
from .rename import exchange, rename_new
from .staging import SET, Mark, marked_folder, publish_folder, put_back, write_mark

_NO_EXCHANGE = (
    *(errno.ENOSYS, errno.EINVAL, errno.ENOTSUP, errno.EXDEV),
    *(errno.EBUSY, errno.EPERM, errno.EACCES),
)


@dataclass(frozen=True, kw_only=True)
class NewSet:
    """Contents of the new set: files with new bytes, the manifest included, and kept files."""

    files: Mapping[str, bytes]
    kept: Collection[str]

    @property
    def names(self) -> set[str]:
        return {*self.files, *self.kept}


def publish(artifacts: Path, private: Path, new: NewSet, contents: Contents) -> tuple[Path, ...]:
    """Make `artifacts` hold the new set, beside evidence.json and names that start with a dot.

    private: the build's own folder. contents: the present files, with no strangers.
    Returns the paths of files that came into the artifacts in the meantime.
    """
    if contents.identity is None:
        with _uninterrupted():
            write_mark(private, Mark(names=tuple(new.names)))
            (private / SET).mkdir()
            _write(private / SET, new.files)
            rename_new(private / SET, artifacts)
        return ()
    if _may_be_exchanged(artifacts, private, contents):
        with contextlib.ExitStack() as stack:
            if _hold_evidence(artifacts, stack):
                stack.enter_context(_uninterrupted())
                if _exchange_sets(artifacts, private, new, contents):
                    return put_back(private, artifacts)
    with _uninterrupted():
        _replace_files(artifacts, new, contents)
    return ()


def _may_be_exchanged(artifacts: Path, private: Path, contents: Contents) -> bool:
    try:
        stands_in_it = os.path.samefile(os.curdir, artifacts)
    except OSError:  # the caller's folder is gone already
        stands_in_it = False
    return private.parent == artifacts.parent and not contents.dotted and not stands_in_it


def _exchange_sets(artifacts: Path, private: Path, new: NewSet, contents: Contents) -> bool:
    """Swap the new set and the old one, which moves to `private`; False if that is impossible."""
    fresh = private / SET
    write_mark(private, Mark(names=(*(new.names | contents.made), EVIDENCE_NAME)))
    fresh.mkdir()
    if not _make_alike(artifacts, fresh):
        return False
    for name in {*new.kept, EVIDENCE_NAME}:
        if name != EVIDENCE_NAME or (artifacts / name).exists():
            _link(artifacts / name, fresh / name)
    _write(fresh, new.files)
    try:
        exchange(fresh, artifacts)
    except OSError as error:
        if error.errno not in _NO_EXCHANGE:
            raise
        return False
    _move_newer_evidence(fresh / EVIDENCE_NAME, artifacts / EVIDENCE_NAME)
    return True


def _make_alike(old: Path, new: Path) -> bool:
    """Give `new` the owner, mode and extended attributes of `old`; False if that is forbidden."""
    wanted = old.stat()
    try:
        os.chown(new, wanted.st_uid, wanted.st_gid)
        shutil.copystat(old, new)
    except OSError:
        return False
    return _traits(old) == _traits(new)


def _traits(folder: Path) -> tuple[object, ...]:
    info = folder.stat()
    try:
        attributes = {name: os.getxattr(folder, name) for name in os.listxattr(folder)}
    except OSError:  # a file system without them
        attributes = {}
    return info.st_mode, info.st_uid, info.st_gid, attributes


def _link(old: Path, new: Path) -> None:
    """Give a file a second name; its inode and owner stay."""
    try:
        os.link(old, new, follow_symlinks=False)
    except OSError:  # no hard links on this file system, or none to another user's file
        shutil.copy2(old, new)


def _write(folder: Path, files: Mapping[str, bytes]) -> None:
    for name in _manifest_last(files):
        (folder / name).write_bytes(files[name])


def _move_newer_evidence(old: Path, new: Path) -> None:
    """Take over evidence that another program wrote between the link and the exchange."""
    if old.exists() and not (new.exists() and old.samefile(new)):
        old.replace(new)


def _replace_files(artifacts: Path, new: NewSet, contents: Contents) -> None:
    """Move the new files over the old ones, manifest last, and delete surplus files."""
    vouched = dict(vouched_files(contents.manifest or b""))
    if digest := file_sha256(artifacts / ENVELOPE_NAME):
        vouched[ENVELOPE_NAME] = digest
    surplus = {name: vouched[name] for name in contents.surplus(new.names) if name in vouched}
    mark = Mark(names=tuple(new.files), surplus=surplus)
    with marked_folder(publish_folder(artifacts), artifacts, mark) as folder:
        (folder / SET).mkdir()
        _write(folder / SET, new.files)
        for name in _manifest_last(new.files):
            try:
                (folder / SET / name).replace(artifacts / name)
            except OSError as error:
                raise PlaceError(
                    f"cannot replace {artifacts / name} ({error.strerror}). The folder may hold "
                    "part of the new set now, which no runtime loads: mend that and build again"
                ) from error


def _manifest_last(names: Collection[str]) -> list[str]:
    return sorted(names, key=lambda name: (name == MANIFEST_NAME, name))


def _hold_evidence(artifacts: Path, stack: contextlib.ExitStack) -> bool:
    """Keep `build-kernels verify` from writing evidence into a folder that is about to go.

    False if that cannot be done: the lock is another user's.
    """
    from build_kernels.evidence.store import evidence_lock

    if (artifacts / EVIDENCE_NAME).exists():
        try:
            stack.enter_context(evidence_lock(artifacts / EVIDENCE_NAME))
        except OSError:
            return False
    return True


@contextlib.contextmanager
def _uninterrupted() -> Iterator[None]:
    """Ignore SIGINT and SIGTERM: in these milliseconds it is too late to stop.

    Blocking them would not do: the kernel delivers a blocked signal to another thread, and
    Python then interrupts the main one. In any other thread there is nothing to interrupt.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {stop: signal.signal(stop, signal.SIG_IGN) for stop in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for stop, handler in before.items():
            signal.signal(stop, handler)
