"""Random envelopes, right and mutated, and what two libraries say about them."""

from __future__ import annotations

import base64
import json
import random
from dataclasses import dataclass
from typing import Any

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey
from securesystemslib.dsse import Envelope as TheirEnvelope
from securesystemslib.exceptions import VerificationError
from securesystemslib.signer import SSlibKey
from signed_sets import IDS, KEYS, ORDER, PUBLIC, b64, policy, signed

from dsv4_router_runtime.artifacts.dsse import Envelope, parse_envelope
from dsv4_router_runtime.artifacts.statement import PAYLOAD_TYPE
from dsv4_router_runtime.artifacts.trust import Refused, SignaturePolicy, read_policy
from dsv4_router_runtime.errors import ManifestError


@dataclass(frozen=True)
class RandomEnvelope:
    """A document, the numbers of the trusted keys, how many must sign, and the mutation."""

    document: dict[str, Any]
    numbers: list[int]
    threshold: int
    mutation: str

    @property
    def text(self) -> bytes:
        return json.dumps(self.document).encode()

    @property
    def has_our_type(self) -> bool:
        return bool(self.document["payloadType"] == PAYLOAD_TYPE)

    @property
    def is_spelt_loosely(self) -> bool:
        """Whether it has base64 of another spelling, which securesystemslib decodes too."""
        return self.mutation == "trailing_bits"


def random_envelope(rng: random.Random) -> RandomEnvelope:
    numbers = rng.sample(range(6), rng.randint(1, 3))
    # Mostly signed by those who are trusted, so that many are accepted before the mutation.
    signers = {n for n in numbers if rng.random() < 0.9} | {
        rng.choice([*numbers, rng.randrange(6)])
    }
    payload = rng.randbytes(rng.choice((0, 1, 55, 56, 119, 300)))
    kind = PAYLOAD_TYPE if rng.random() < 0.9 else rng.choice(("", "text/plain", "x/\u00e9"))
    document = signed(payload, sorted(signers), kind)
    mutation = rng.choice(sorted(MUTATIONS))
    MUTATIONS[mutation](rng, document)
    return RandomEnvelope(document, numbers, rng.randint(1, len(numbers)), mutation)


def parsed(envelope: RandomEnvelope) -> Envelope | None:
    try:
        return parse_envelope(envelope.text, source="e")
    except ManifestError:
        return None


def policy_accepts(envelope: RandomEnvelope) -> bool:
    """Our verdict about the signatures; these payloads are no statements."""
    asked = read_policy(policy(*envelope.numbers, threshold=envelope.threshold), source="trust")
    assert isinstance(asked, SignaturePolicy)
    found = parsed(envelope)
    try:
        return found is not None and bool(asked.signers(found))
    except Refused:
        return False


def cryptography_accepts(envelope: RandomEnvelope, found: Envelope) -> bool:
    valid = {
        keyid
        for keyid, signature in found.signatures
        if keyid in IDS
        and IDS.index(keyid) in envelope.numbers
        and cryptography_verifies(PUBLIC[IDS.index(keyid)], signature, found.signed_bytes)
    }
    return envelope.has_our_type and len(valid) >= envelope.threshold


def cryptography_verifies(public: bytes, signature: bytes, message: bytes) -> bool:
    try:
        Ed25519PublicKey.from_public_bytes(public).verify(signature, message)
    except InvalidSignature:
        return False
    return True


def securesystemslib_accepts(envelope: RandomEnvelope) -> bool:
    keys = [
        SSlibKey(IDS[n], "ed25519", "ed25519", {"public": PUBLIC[n].hex()})
        for n in envelope.numbers
    ]
    try:
        TheirEnvelope.from_dict(json.loads(envelope.text)).verify(keys, envelope.threshold)
    except (VerificationError, ValueError, KeyError):
        return False
    return True


def _nothing(rng: random.Random, document: dict[str, Any]) -> None:
    pass


def _flip_payload(rng: random.Random, document: dict[str, Any]) -> None:
    data = bytearray(base64.b64decode(document["payload"]) or b"\0")
    data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
    document["payload"] = b64(bytes(data))


def _change_signature(change: Any) -> Any:
    def mutate(rng: random.Random, document: dict[str, Any]) -> None:
        one = rng.choice(document["signatures"])
        one["sig"] = b64(change(rng, base64.b64decode(one["sig"])))

    return mutate


def _flip(rng: random.Random, signature: bytes) -> bytes:
    data = bytearray(signature)
    data[rng.randrange(64)] ^= 1 << rng.randrange(8)
    return bytes(data)


def _add_order(rng: random.Random, signature: bytes) -> bytes:
    s = int.from_bytes(signature[32:], "little") + ORDER
    return signature[:32] + s.to_bytes(32, "little")


def _other_payload_type(rng: random.Random, document: dict[str, Any]) -> None:
    document["payloadType"] = rng.choice((PAYLOAD_TYPE, "text/plain", f"{PAYLOAD_TYPE} "))


def _swap_keyids(rng: random.Random, document: dict[str, Any]) -> None:
    one, other = rng.choice(document["signatures"]), rng.choice(document["signatures"])
    one["keyid"], other["keyid"] = other["keyid"], one["keyid"]


def _other_keyid(rng: random.Random, document: dict[str, Any]) -> None:
    one = rng.choice(document["signatures"])
    one["keyid"] = rng.choice(("", "0" * 64, one["keyid"].upper(), one["keyid"][:12]))


def _duplicate(rng: random.Random, document: dict[str, Any]) -> None:
    document["signatures"].append(dict(rng.choice(document["signatures"])))


def _url_safe(rng: random.Random, document: dict[str, Any]) -> None:
    for holder in (document, *document["signatures"]):
        for name in ("payload", "sig"):
            if name in holder and rng.random() < 0.7:
                holder[name] = holder[name].replace("+", "-").replace("/", "_")


def _trailing_bits(rng: random.Random, document: dict[str, Any]) -> None:
    """64 bytes end in one digit of two bits: others decode alike."""
    one = rng.choice(document["signatures"])
    digits = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/"
    last = digits.index(one["sig"][-3])
    one["sig"] = f"{one['sig'][:-3]}{digits[last | rng.randint(1, 15)]}=="


def _spoil_base64(rng: random.Random, document: dict[str, Any]) -> None:
    one = rng.choice(document["signatures"])
    one["sig"] = rng.choice((one["sig"] + "\n", one["sig"][:-1], " " + one["sig"], "*" * 88))


def _sign_payload_alone(rng: random.Random, document: dict[str, Any]) -> None:
    for one in document["signatures"]:
        key = KEYS[IDS.index(one["keyid"])]
        one["sig"] = b64(key.sign(base64.b64decode(document["payload"])))


def _add_unknown_keys(rng: random.Random, document: dict[str, Any]) -> None:
    document["later"] = {"version": 2}
    rng.choice(document["signatures"])["cert"] = "x"


def _drop(rng: random.Random, document: dict[str, Any]) -> None:
    document["signatures"].remove(rng.choice(document["signatures"]))


MUTATIONS = {
    "nothing": _nothing,
    "nothing again": _nothing,
    "flip_payload": _flip_payload,
    "flip_signature": _change_signature(_flip),
    "truncate": _change_signature(lambda rng, data: data[: rng.randrange(64)]),
    "extend": _change_signature(lambda rng, data: data + rng.randbytes(rng.randint(1, 3))),
    "random_signature": _change_signature(lambda rng, data: rng.randbytes(64)),
    "add_order": _change_signature(_add_order),
    "zero_s": _change_signature(lambda rng, data: data[:32] + bytes(32)),
    "other_payload_type": _other_payload_type,
    "swap_keyids": _swap_keyids,
    "other_keyid": _other_keyid,
    "duplicate": _duplicate,
    "url_safe": _url_safe,
    "trailing_bits": _trailing_bits,
    "spoil_base64": _spoil_base64,
    "sign_payload_alone": _sign_payload_alone,
    "add_unknown_keys": _add_unknown_keys,
    "drop": _drop,
}
