"""Exchange two names in one step, or rename without replacing anything, by renameat2."""

from __future__ import annotations

import ctypes
import errno
import os
from pathlib import Path

_AT_FDCWD = -100
_RENAME_NOREPLACE = 1
_RENAME_EXCHANGE = 2


def exchange(one: Path, other: Path) -> None:
    """Swap two folders. OSError if the file system cannot; then nothing changed."""
    _renameat2(one, other, _RENAME_EXCHANGE)


def rename_new(old: Path, new: Path) -> None:
    """Rename, or FileExistsError if `new` exists."""
    try:
        _renameat2(old, new, _RENAME_NOREPLACE)
    except OSError as error:
        if error.errno not in (errno.ENOSYS, errno.EINVAL):
            raise
        if os.path.lexists(new):
            raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), str(new)) from error
        os.rename(old, new)


def _renameat2(old: Path, new: Path, flags: int) -> None:
    libc = ctypes.CDLL(None, use_errno=True)
    if not hasattr(libc, "renameat2"):
        raise OSError(errno.ENOSYS, "no renameat2 in the C library")
    paths = os.fsencode(old), os.fsencode(new)
    if libc.renameat2(_AT_FDCWD, paths[0], _AT_FDCWD, paths[1], flags):
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code), str(new))
