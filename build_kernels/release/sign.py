"""Sign the provenance of a set of artifacts: the command `build-kernels sign`."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING

import click

from build_kernels.building.build import default_artifacts
from build_kernels.cli.errors import reported_errors
from build_kernels.cli.options import artifacts_option
from build_kernels.files import replace_file
from dsv4_router_runtime.artifacts.dsse import (
    ENVELOPE_NAME,
    MAX_ENVELOPE_BYTES,
    MAX_SIGNATURES,
    Envelope,
    parse_envelope,
    serialise_envelope,
)
from dsv4_router_runtime.artifacts.ed25519 import PublicKey
from dsv4_router_runtime.artifacts.files import read_file
from dsv4_router_runtime.artifacts.folder import open_with
from dsv4_router_runtime.artifacts.statement import PAYLOAD_TYPE, parse_statement
from dsv4_router_runtime.errors import ManifestError

from .errors import SigningError
from .keys import PASSPHRASE_VARIABLE, load_key
from .provenance import LOCAL_BUILDER, make_statement

if TYPE_CHECKING:
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey


@click.command("sign")
@click.option(
    "--key",
    "key_file",
    type=click.Path(path_type=Path),
    required=True,
    help=f"A private key of `keygen`. Its passphrase: {PASSPHRASE_VARIABLE}, or it is asked for.",
)
@artifacts_option("The set to sign. Default: artifacts/ of this checkout.")
@click.option(
    "--builder-id",
    default=LOCAL_BUILDER,
    show_default=True,
    help="The URI of the build platform, for the provenance.",
)
def sign_command(key_file: Path, artifacts: Path | None, builder_id: str) -> None:
    """Sign a built set: write manifest.dsse.json into its folder, or add a signature to it.

    The set has to be that of the checkout's commit. Only what this machine has is looked at.
    """
    with reported_errors():
        own = default_artifacts()
        # Under no policy: the signature that one asks for is made here.
        opened = open_with(artifacts or own, ())
        for kernel in opened.manifest.kernels:
            opened.read(kernel)
        key = load_key(key_file)
        payload = make_statement(own.parent, opened, builder_id)
        file = opened.folder / ENVELOPE_NAME
        envelope = add_signature(_known_envelope(file, payload), key)
        replace_file(file, serialise_envelope(envelope).encode())
    signed = len(envelope.signatures)
    print(f"{file}: {signed} signature{'s' if signed > 1 else ''}, the last by {keyid_of(key)}")


def keyid_of(key: Ed25519PrivateKey) -> str:
    """Return the keyid that trust policies derive from the public key."""
    return PublicKey(key.public_key().public_bytes_raw()).keyid


def add_signature(envelope: Envelope, key: Ed25519PrivateKey) -> Envelope:
    """Return the envelope with the key's signature, in place of an older one of the same key."""
    keyid = keyid_of(key)
    others = tuple(pair for pair in envelope.signatures if pair[0] != keyid)
    if len(others) >= MAX_SIGNATURES:
        raise SigningError(f"the envelope has {len(others)} signatures; no more are read")
    return Envelope(
        payload=envelope.payload,
        payload_type=envelope.payload_type,
        signatures=(*others, (keyid, key.sign(envelope.signed_bytes))),
    )


def _known_envelope(file: Path, payload: bytes) -> Envelope:
    """Return the envelope to sign: the file's if it holds this payload, a new one without a file.

    SigningError if the file holds another payload: others may have signed that one.
    """
    try:
        parse_statement(payload, source="the statement")
    except ManifestError as error:
        # The version of pyproject.toml, say, which a policy could not compare.
        raise SigningError(f"no runtime would take this: {error.path}: {error.problem}") from error
    fresh = Envelope(payload=payload, payload_type=PAYLOAD_TYPE, signatures=())
    if not os.path.lexists(file):
        return fresh
    known = parse_envelope(read_file(file, most_bytes=MAX_ENVELOPE_BYTES), source=str(file))
    if (known.payload, known.payload_type) != (payload, PAYLOAD_TYPE):
        raise SigningError(
            f"{file} is signed for another commit, set or builder; delete it to sign this one anew"
        )
    return known
