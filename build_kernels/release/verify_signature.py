"""Hold a set or a wheel against a trust policy: the command `build-kernels verify-signature`.

The verifier is the runtime's. A signature covers the artifacts, not the Python files of a wheel.
"""

from __future__ import annotations

import tempfile
from pathlib import Path

import click

from build_kernels.building.router_wheel import read_wheel
from build_kernels.cli.errors import reported_errors
from dsv4_router_runtime.artifacts.folder import ArtifactSet, find_artifacts, open_with
from dsv4_router_runtime.artifacts.trust import TRUST_VARIABLE, Policy, read_policy
from dsv4_router_runtime.errors import ArtifactError, ManifestError

from .errors import SigningError


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
    with reported_errors():
        policy = read_policy(trust, source="--trust")
        place = set_or_wheel or find_artifacts()
        opened = _open(place, policy) if place.is_dir() else _open_wheel(place, policy)
    (finding,) = opened.trusted
    print(f"{place}: {finding}; every hash of {len(opened.manifest.kernels)} kernels is right")


def _open(folder: Path, policy: Policy) -> ArtifactSet:
    opened = open_with(folder, (policy,))
    for kernel in opened.manifest.kernels:
        opened.read(kernel)
    return opened


def _open_wheel(wheel: Path, policy: Policy) -> ArtifactSet:
    """Open the set in a wheel; SigningError names the wheel, not the folder that it is read in."""
    with tempfile.TemporaryDirectory() as folder:
        for name, data in read_wheel(wheel).items():
            Path(folder, name).write_bytes(data)
        try:
            return _open(Path(folder), policy)
        except ArtifactError as error:
            what = f"{Path(error.file).name}: {error.problem}"
        except ManifestError as error:
            what = f"{Path(error.source).name}: {error.path}: {error.problem}"
    raise SigningError(f"{wheel}: {what}; install another wheel, or change the policy")
