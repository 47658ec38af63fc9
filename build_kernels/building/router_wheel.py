"""Read the artifacts out of a wheel of dsv4-router, which anybody may have written."""

from __future__ import annotations

import io
import posixpath
import zipfile
import zlib
from pathlib import Path

from build_kernels.errors import BuilderError
from dsv4_router_runtime.artifacts.files import read_file, reason_of
from dsv4_router_runtime.artifacts.folder import MANIFEST_NAME

from .sbom import ARTIFACTS_IN_WHEEL

# 20 times today's artifacts, 60 times today's wheel.
_MAX_BYTES = 2**26
# RuntimeError is that of an encrypted member.
_NO_ZIP = (
    *(zipfile.BadZipFile, zlib.error, EOFError),
    *(RuntimeError, NotImplementedError, ValueError),
)


class WheelError(BuilderError):
    """A file is no wheel of dsv4-router, or its members are not what an installer would write."""


def read_wheel(wheel: Path) -> dict[str, bytes]:
    """Return the files of the set in a wheel, by name; WheelError if they may not be installed so.

    Of two members that lead to one file, installers need not take the same one. So each member of
    the wheel has a plain path, and none is in its folder `*.data`, whose files go anywhere.
    """
    files: dict[str, bytes] = {}
    left = _MAX_BYTES
    try:
        data = read_file(wheel, most_bytes=_MAX_BYTES)
        with zipfile.ZipFile(io.BytesIO(data)) as archive:
            for item in archive.infolist():
                path = item.filename.removesuffix("/")
                if posixpath.normpath(path) != path or _elsewhere(path):
                    raise WheelError(f"{wheel}: {path!r} may be installed as another file")
                place, _, name = path.rpartition("/")
                if item.is_dir() or not f"{place}/".startswith(f"{ARTIFACTS_IN_WHEEL}/"):
                    continue
                if place != ARTIFACTS_IN_WHEEL or name in files:
                    raise WheelError(f"{wheel}: {path!r} is no single file of the set")
                with archive.open(item) as stream:
                    files[name] = stream.read(left + 1)
                left -= len(files[name])
                if left < 0:
                    raise WheelError(f"{wheel}: more than {_MAX_BYTES} bytes of artifacts")
    except _NO_ZIP as error:
        raise WheelError(f"{wheel}: cannot be read as a wheel ({error})") from error
    except OSError as error:
        raise WheelError(f"{wheel}: cannot be read ({reason_of(error)})") from error
    if MANIFEST_NAME not in files:
        raise WheelError(f"{wheel}: no {MANIFEST_NAME} in it; name a wheel of dsv4-router")
    return files


def _elsewhere(path: str) -> bool:
    """Return whether an installer writes this member below another folder than site-packages."""
    return path.startswith(("/", "../")) or path.partition("/")[0].endswith(".data")
