"""The one reader of files: regular files only, of a bounded size, and without ever waiting.

A FIFO would block its reader for ever, a device may never end, and a sparse file of 1 GB costs
memory and seconds. Symbolic links are followed.
"""

from __future__ import annotations

import errno
import os
import stat

# The manifest is 0.3 MB today, evidence 0.5 MB. JSON of 4 MB is read in about a second.
MAX_JSON_BYTES = 8 * 2**20
# Cubins and PTX are below 0.2 MB today.
MAX_CODE_BYTES = 16 * 2**20

_CHUNK_BYTES = 2**20
_KINDS = {
    stat.S_IFIFO: "a FIFO",
    stat.S_IFDIR: "a directory",
    stat.S_IFSOCK: "a socket",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
}


def read_file(path: str | os.PathLike[str], *, most_bytes: int) -> bytes:
    """Read a regular file of at most `most_bytes`; OSError says why not (see `reason_of`)."""
    # Before it is opened, since opening some devices does something, and after, since another file
    # may be there by then. O_NONBLOCK: opening a FIFO waits for its writer otherwise.
    _check(os.stat(path), path, most_bytes)
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC)
    try:
        _check(os.fstat(descriptor), path, most_bytes)
        data = bytearray()
        # One byte past the limit: a file may grow, and those of /proc state no size.
        while chunk := os.read(descriptor, min(_CHUNK_BYTES, most_bytes + 1 - len(data))):
            data += chunk
            if len(data) > most_bytes:
                raise _too_large(f"more than {most_bytes}", path, most_bytes)
        return bytes(data)
    finally:
        os.close(descriptor)


def reason_of(error: OSError) -> str:
    """Say why a file was not read, without its path: the caller names it."""
    return error.strerror or str(error)


def _check(status: os.stat_result, path: str | os.PathLike[str], most_bytes: int) -> None:
    if not stat.S_ISREG(status.st_mode):
        kind = _KINDS.get(stat.S_IFMT(status.st_mode), "a special file")
        code = errno.EISDIR if stat.S_ISDIR(status.st_mode) else errno.EINVAL
        raise OSError(code, f"{kind}, not a regular file", os.fspath(path))
    if status.st_size > most_bytes:
        raise _too_large(str(status.st_size), path, most_bytes)


def _too_large(size: str, path: str | os.PathLike[str], most_bytes: int) -> OSError:
    words = f"{size} bytes; at most {most_bytes} are read"
    return OSError(errno.EFBIG, words, os.fspath(path))
