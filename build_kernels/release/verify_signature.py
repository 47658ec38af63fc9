"""Hold a set or a wheel against a trust policy: the command `build-kernels verify-signature`.

The verifier is the runtime's. A signature covers the artifacts, not the Python files of a wheel.
"""

from __future__ import annotations

import tempfile
import zipfile
import zlib
from pathlib import Path

import click

from build_kernels.cli.errors import reported_errors
from dsv4_router_runtime.artifacts.folder import find_artifacts, open_with
from dsv4_router_runtime.artifacts.trust import TRUST_VARIABLE, read_policy
from dsv4_router_runtime.errors import WHEEL_FOLDER

from .errors import SigningError

_FOLDER_IN_WHEEL = f"dsv4_router_runtime/{WHEEL_FOLDER}/"
# Today's sets have 2.6 MB.
_MAX_BYTES = 2**28
# RuntimeError is that of an encrypted member.
_NO_WHEEL = (
    *(zipfile.BadZipFile, zlib.error, RuntimeError, NotImplementedError, EOFError, ValueError),
)


@click.command("verify-signature")
@click.argument("set_or_wheel", type=click.Path(path_type=Path), required=False)
@click.option(
    "--trust",
    envvar=TRUST_VARIABLE,
    show_envvar=True,
    required=True,
    help="The policy: a JSON file, or the sha256 of a manifest.",
)
def verify_signature_command(set_or_wheel: Path | None, trust: str) -> None:
    """Check that a policy accepts a folder of artifacts, or those of a wheel, and every hash.

    Default: artifacts/ of this checkout, or the installed wheel's set.
    """
    with reported_errors(), tempfile.TemporaryDirectory() as scratch:
        policy = read_policy(trust, source="--trust")
        place = set_or_wheel or find_artifacts()
        folder = place
        if place.is_file():
            folder = Path(scratch)
            unpack_artifacts(place, folder)
        opened = open_with(folder, (policy,))
        for kernel in opened.manifest.kernels:
            opened.read(kernel)
    (finding,) = opened.trusted
    print(f"{place}: {finding}; every hash of {len(opened.manifest.kernels)} kernels is right")


def unpack_artifacts(wheel: Path, folder: Path) -> None:
    """Write the artifacts of a wheel into `folder`; SigningError if it is no such wheel."""
    left = _MAX_BYTES
    try:
        with zipfile.ZipFile(wheel) as archive:
            ours = [item for item in archive.infolist() if not item.is_dir()]
            ours = [item for item in ours if item.filename.startswith(_FOLDER_IN_WHEEL)]
            names = [item.filename.removeprefix(_FOLDER_IN_WHEEL) for item in ours]
            if not names:
                raise SigningError(f"{wheel}: no artifacts in it; name a wheel of dsv4-router")
            for item, name in zip(ours, names, strict=True):
                # Of two members of one name, installers need not take the same one.
                if Path(name).name != name or names.count(name) > 1:
                    raise SigningError(f"{wheel}: {item.filename} is no single file of the set")
                with archive.open(item) as stream:
                    data = stream.read(left + 1)
                left -= len(data)
                if left < 0:
                    raise SigningError(f"{wheel}: more than {_MAX_BYTES} bytes of artifacts")
                (folder / name).write_bytes(data)
    except _NO_WHEEL as error:
        raise SigningError(f"{wheel}: cannot be read as a wheel ({error})") from error
