"""Write a file in one step, so that a reader finds the old file or the whole new one."""

from __future__ import annotations

import contextlib
import os
import shutil
from pathlib import Path


def replace_file(path: Path, data: bytes) -> None:
    """Write `data` beside `path` and rename it into place, with the old file's mode if any.

    The name of the partial file begins with a dot, so that the closed artifact set ignores it. It
    holds the process's number, so that two writers do not share it.
    """
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        partial.write_bytes(data)
        with contextlib.suppress(FileNotFoundError):
            shutil.copymode(path, partial)
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)
