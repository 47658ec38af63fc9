"""Make and read the private keys that sign releases: the command `build-kernels keygen`.

`cryptography` makes the keys and the signatures; it comes with the extra `sign`.
"""

from __future__ import annotations

import base64
import json
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import click

from build_kernels.cli.console import say
from build_kernels.cli.errors import reported_errors
from build_kernels.cli.extras import why_missing
from dsv4_router_runtime.artifacts.ed25519 import PublicKey
from dsv4_router_runtime.artifacts.files import read_file, reason_of

from .errors import SigningError

if TYPE_CHECKING:
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

PASSPHRASE_VARIABLE = "DSV4_ROUTER_KEY_PASSPHRASE"
_MAX_KEY_BYTES = 2**14


@click.command("keygen")
@click.argument("file", type=click.Path(path_type=Path))
@click.option(
    "--encrypt",
    is_flag=True,
    help=f"Ask for a passphrase. One in {PASSPHRASE_VARIABLE} is taken without being asked for.",
)
def keygen_command(file: Path, encrypt: bool) -> None:
    """Write a new private key to FILE, and print the trust policy that accepts it.

    FILE must not exist; only its owner may read it.
    """
    with reported_errors():
        key = new_key(file, _new_passphrase(encrypt))
    public = PublicKey(key.public_key().public_bytes_raw())
    print(json.dumps({"keys": [base64.b64encode(public.encoded).decode()], "threshold": 1}))
    say(f"private key: {file}; keyid {public.keyid}. The policy on stdout holds the public key.")


def new_key(file: Path, passphrase: bytes | None) -> Ed25519PrivateKey:
    """Write a new private key as PEM, mode 0600; SigningError if `file` exists or cannot be."""
    _require_cryptography()
    from cryptography.hazmat.primitives import serialization
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

    key = Ed25519PrivateKey.generate()
    encryption = (
        serialization.NoEncryption()
        if passphrase is None
        else serialization.BestAvailableEncryption(passphrase)
    )
    pem = key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, encryption
    )
    try:
        # O_EXCL follows no link either: nothing is ever overwritten.
        descriptor = os.open(file, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    except FileExistsError:
        raise SigningError(f"{file} exists, and no key is overwritten; name another file") from None
    except OSError as error:
        raise SigningError(f"{file}: no key can be written there ({reason_of(error)})") from error
    try:
        with os.fdopen(descriptor, "wb") as stream:
            stream.write(pem)
    except BaseException:
        file.unlink()  # half a key
        raise
    return key


def load_key(file: Path) -> Ed25519PrivateKey:
    """Read a private key; SigningError gives the reason why it is not taken."""
    _require_cryptography()
    from cryptography.exceptions import UnsupportedAlgorithm
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
    from cryptography.hazmat.primitives.serialization import load_pem_private_key

    try:
        pem = read_file(file, most_bytes=_MAX_KEY_BYTES)
        mode = file.stat().st_mode & 0o777
    except OSError as error:
        raise SigningError(f"{file}: no key can be read there ({reason_of(error)})") from error
    if mode & 0o077:
        raise SigningError(f"{file}: others may read it (mode {mode:04o}); run `chmod 600 {file}`")
    try:
        try:
            key = load_pem_private_key(pem, None)
        except TypeError:  # it is encrypted
            key = load_pem_private_key(pem, _passphrase(f"passphrase of {file}"))
    except (ValueError, UnsupportedAlgorithm) as error:
        # Not the library's words: they may go on about the parser's state.
        raise SigningError(
            f"{file}: no private key in PEM, or not with this passphrase; make one with "
            "`build-kernels keygen`"
        ) from error
    if not isinstance(key, Ed25519PrivateKey):
        raise SigningError(f"{file}: expected an Ed25519 key (got {type(key).__name__})")
    return key


def _new_passphrase(encrypt: bool) -> bytes | None:
    if encrypt or PASSPHRASE_VARIABLE in os.environ:
        return _passphrase("passphrase of the new key", confirm=True)
    return None


def _passphrase(prompt: str, *, confirm: bool = False) -> bytes:
    given = os.environ.get(PASSPHRASE_VARIABLE)
    if given is None:
        if not sys.stdin.isatty():
            raise SigningError(
                f"a passphrase is needed, and nobody can be asked: set {PASSPHRASE_VARIABLE}"
            )
        given = click.prompt(prompt, hide_input=True, confirmation_prompt=confirm, err=True)
    if not given:
        raise SigningError(f"the passphrase is empty; set {PASSPHRASE_VARIABLE}, or unset it")
    return os.fsencode(given)


def _require_cryptography() -> None:
    if (problem := why_missing("cryptography")) is not None:
        raise SigningError(problem)
