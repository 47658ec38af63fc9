"""What a server trusts: the policy that artifacts have to satisfy before any of them is used.

A policy is a JSON file, a dict of the same keys, or the sha256 of the one manifest that is trusted:

    {"keys": ["<base64 of a 32-byte Ed25519 key>"], "threshold": 1,
     "min_release": "0.1.0", "revoked": ["<sha256 of a key or of a manifest>"]}

There is no mode that only warns: a policy that cannot be read, or that is not satisfied, is a
TrustError. No key comes with this package, since whoever can alter the artifacts could alter it.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from dsv4_router_runtime.errors import ManifestError, TrustError

from .dsse import ENVELOPE_NAME, MAX_ENVELOPE_BYTES, Envelope, parse_envelope, read_base64
from .ed25519 import KeyFormatError, PublicKey
from .files import read_file, reason_of
from .json_reader import SHA256, JsonNode, read_json
from .statement import PAYLOAD_TYPE, numbers_of, parse_statement, read_release

TRUST_VARIABLE = "DSV4_ROUTER_TRUST"
Trust = str | os.PathLike[str] | Mapping[str, object]

MAX_POLICY_BYTES = 2**16
MAX_KEYS = 16
MAX_REVOKED = 512
_SHOWN_KEYID = 12

_POLICY_STEP = (
    "name a JSON file of keys, threshold, min_release and revoked, or the sha256 of a manifest "
    "(PRODUCTION.md, Trust)"
)


@dataclass(frozen=True, kw_only=True)
class PinnedManifest:
    """The policy that trusts one manifest and the cubins that it lists."""

    sha256: str
    source: str

    def check(self, folder: Path, manifest_sha256: str, subjects: Mapping[str, str]) -> str:
        """Return the finding in words; TrustError for any other manifest."""
        if manifest_sha256 != self.sha256:
            raise TrustError(
                file=str(folder),
                problem=f"sha256 of its manifest is {manifest_sha256}, and {self.source} allows "
                f"{self.sha256} alone",
                next_step=_install_step(self.source),
            )
        return f"the manifest is the one that {self.source} pins"


@dataclass(frozen=True, kw_only=True)
class SignaturePolicy:
    """The policy that trusts what enough of its keys signed. keys: by keyid."""

    keys: Mapping[str, PublicKey]
    threshold: int
    min_release: str
    revoked: frozenset[str]
    source: str

    def check(self, folder: Path, manifest_sha256: str, subjects: Mapping[str, str]) -> str:
        """Return the finding in words; TrustError unless `subjects` are signed as demanded.

        folder: of the envelope. subjects: sha256 by name, of the bytes that will be used.
        """
        file = os.path.join(folder, ENVELOPE_NAME)
        try:
            text = read_file(file, most_bytes=MAX_ENVELOPE_BYTES)
            envelope = parse_envelope(text, source=file)
            # Nothing is read of a payload before it is known who signed it, and as what.
            signers = self.signers(envelope)
            statement = parse_statement(envelope.payload, source=f"{file}: payload")
            self._check_release(statement.release)
            _check_subjects(statement.subjects, subjects)
            if manifest_sha256 in self.revoked:
                raise Refused(f"the manifest {manifest_sha256} is revoked")
        except FileNotFoundError as error:
            raise self._refusal(file, "missing, so nobody signed these artifacts") from error
        except OSError as error:
            raise self._refusal(file, f"cannot be read ({reason_of(error)})") from error
        except ManifestError as error:
            raise self._refusal(file, f"{error.path}: {error.problem}") from error
        except Refused as error:
            raise self._refusal(file, str(error)) from error
        named = ", ".join(keyid[:_SHOWN_KEYID] for keyid in signers)
        return (
            f"release {statement.release}, signed by {named} "
            f"({self.threshold} of {len(self.keys)} keys asked for by {self.source})"
        )

    def signers(self, envelope: Envelope) -> list[str]:
        """Return the keyids of enough valid signatures; each key counts once."""
        if envelope.payload_type != PAYLOAD_TYPE:
            raise Refused(f"payloadType: expected {PAYLOAD_TYPE} (got {envelope.payload_type})")
        signers: list[str] = []
        reasons = []
        for keyid, signature in envelope.signatures:
            shown = f"keyid {keyid[:_SHOWN_KEYID] or 'missing'}"
            if keyid in self.revoked:
                reasons.append(f"{shown}: revoked")
            elif keyid not in self.keys:
                reasons.append(f"{shown}: no key of the policy")
            elif not self.keys[keyid].verifies(signature, envelope.signed_bytes):
                reasons.append(f"{shown}: its signature is wrong")
            # The keyids of an envelope are distinct, and so are the keys of a policy.
            else:
                signers.append(keyid)
        if len(signers) < self.threshold:
            counted = f"{len(signers)} of {self.threshold} signatures by trusted keys"
            raise Refused(f"{counted} ({'; '.join(reasons) or 'no other in the envelope'})")
        return signers

    def _check_release(self, release: str) -> None:
        if numbers_of(release) < numbers_of(self.min_release):
            raise Refused(f"release {release} is rolled back: min_release is {self.min_release}")

    def _refusal(self, file: str, problem: str) -> TrustError:
        step = _install_step(self.source)
        return TrustError(file=file, problem=f"refused by {self.source}: {problem}", next_step=step)


Policy = PinnedManifest | SignaturePolicy


class Refused(Exception):
    """The policy is not satisfied; the message is the reason."""


def asked_policies(trust: Trust | None) -> tuple[Policy, ...]:
    """Return the policies of the environment and of `trust`: each has to be satisfied."""
    asked = []
    if (named := os.environ.get(TRUST_VARIABLE)) is not None:
        asked.append(read_policy(named, source=TRUST_VARIABLE))
    if trust is not None:
        asked.append(read_policy(trust, source="trust"))
    return tuple(asked)


def read_policy(trust: Trust, *, source: str) -> Policy:
    """Read a policy; TrustError if it is no good, TypeError if it is no policy at all.

    source: who asks for it, in the words of a message.
    """
    if isinstance(trust, Mapping):
        try:
            text = json.dumps(dict(trust)).encode()
        except (TypeError, ValueError, RecursionError) as error:
            raise TypeError(f"{source}: expected a dict of JSON values (got: {error})") from error
        return _parse_policy(text, source)
    if not isinstance(trust, str | os.PathLike):
        raise TypeError(
            f"{source}: expected a path, a sha256 or a dict (got {type(trust).__name__})"
        )
    named = os.fsdecode(trust)
    if not named:
        # An unset variable of a shell looks so: it was meant to name something.
        raise _bad_policy(source, "expected a path or a sha256 (got an empty string)")
    if isinstance(trust, str) and re.fullmatch(SHA256[0], named):
        return PinnedManifest(sha256=named, source=source)
    try:
        text = read_file(named, most_bytes=MAX_POLICY_BYTES)
    except OSError as error:
        raise _bad_policy(f"{source}={named}", f"cannot be read ({reason_of(error)})") from error
    except ValueError as error:  # no path of any file
        raise _bad_policy(f"{source}={named}", f"cannot be read ({error})") from error
    return _parse_policy(text, f"{source}={named}")


def _parse_policy(text: bytes, source: str) -> Policy:
    try:
        return read_json(text, _policy, source=source)
    except ManifestError as error:
        raise _bad_policy(source, f"{error.path}: {error.problem}") from error


def _policy(node: JsonNode) -> Policy:
    at = node.members("keys", optional=("threshold", "min_release", "revoked"))
    nodes = at["keys"].items("a list of keys")
    keys: dict[str, PublicKey] = {}
    for item in nodes:
        key = _key(item)
        if key.keyid in keys:
            raise item.error("the same key once more")
        keys[key.keyid] = key
    if not 1 <= len(keys) <= MAX_KEYS:
        raise at["keys"].error(f"expected 1 to {MAX_KEYS} keys (got {len(keys)})")
    revoked = at["revoked"].items("a list of sha256") if "revoked" in at else []
    if len(revoked) > MAX_REVOKED:
        raise at["revoked"].error(f"expected at most {MAX_REVOKED} sha256 (got {len(revoked)})")
    pattern, digits = SHA256
    what = f"the sha256 of a key or of a manifest, {digits}"
    return SignaturePolicy(
        keys=keys,
        threshold=at["threshold"].integer(1, len(keys)) if "threshold" in at else 1,
        min_release=read_release(at["min_release"]) if "min_release" in at else "0",
        revoked=frozenset(item.string(pattern, what) for item in revoked),
        source=node.source,
    )


def _key(node: JsonNode) -> PublicKey:
    try:
        return PublicKey(read_base64(node))
    except KeyFormatError as error:
        raise node.error(f"no Ed25519 key: {error}") from error


def _check_subjects(signed: Mapping[str, str], here: Mapping[str, str]) -> None:
    for name in sorted(signed.keys() | here.keys()):
        if signed.get(name) != here.get(name):
            raise Refused(
                f"{name}: sha256 is {here.get(name, 'that of no file')} here, "
                f"{signed.get(name, 'that of no file')} in the signed statement"
            )


def _install_step(source: str) -> str:
    return f"install a release that {source} allows, or change that policy"


def _bad_policy(source: str, problem: str) -> TrustError:
    return TrustError(file=source, problem=f"no trust policy: {problem}", next_step=_POLICY_STEP)
