"""Read and write a DSSE envelope: a payload, its type, and signatures of both.

https://github.com/secure-systems-lab/dsse: keyid is a hint that nothing signs, unknown keys are
ignored, and base64 may be the standard or the URL-safe one. Here it is canonical, and no two
signatures have the same keyid.
"""

from __future__ import annotations

import base64
import binascii
import json
from dataclasses import dataclass

from .json_reader import JsonNode, read_json

ENVELOPE_NAME = "manifest.dsse.json"
# A statement of 48 kernels takes 9 KB.
MAX_ENVELOPE_BYTES = 2**20
# Each one may cost a verification of 2 ms.
MAX_SIGNATURES = 16


@dataclass(frozen=True, kw_only=True)
class Envelope:
    """A payload, and its signatures by keyid; keyid "" is a signature that names no key."""

    payload: bytes
    payload_type: str
    signatures: tuple[tuple[str, bytes], ...]

    @property
    def signed_bytes(self) -> bytes:
        """Return the pre-authentication encoding, the message of every signature."""
        kind = self.payload_type.encode()
        return b"DSSEv1 %d %b %d %b" % (len(kind), kind, len(self.payload), self.payload)


def parse_envelope(text: bytes, *, source: str) -> Envelope:
    """Read an envelope, whose signatures are not checked; ManifestError names the place in it."""
    return read_json(text, _envelope, source=source)


def serialise_envelope(envelope: Envelope) -> str:
    """Return the envelope's text, signatures sorted by keyid."""
    document = {
        "payload": base64.b64encode(envelope.payload).decode(),
        "payloadType": envelope.payload_type,
        "signatures": [
            {"keyid": keyid, "sig": base64.b64encode(signature).decode()}
            for keyid, signature in sorted(envelope.signatures)
        ],
    }
    return json.dumps(document, indent=1, sort_keys=True) + "\n"


def read_base64(node: JsonNode) -> bytes:
    """Return the bytes of a string in canonical base64, the standard or the URL-safe one."""
    text = node.value
    if isinstance(text, str) and text.isascii():
        for altchars in (None, b"-_"):
            try:
                data = base64.b64decode(text, altchars, validate=True)
            except binascii.Error:
                continue
            if base64.b64encode(data, altchars).decode() == text:
                return data
    raise node.expected("canonical base64")


def _envelope(node: JsonNode) -> Envelope:
    at = node.known_members("payload", "payloadType", "signatures")
    signatures = [_signature(item) for item in at["signatures"].items("a list of signatures")]
    if not 1 <= len(signatures) <= MAX_SIGNATURES:
        raise at["signatures"].error(
            f"expected 1 to {MAX_SIGNATURES} signatures (got {len(signatures)})"
        )
    named = [keyid for keyid, _ in signatures if keyid]
    for keyid in named:
        if named.count(keyid) > 1:
            raise at["signatures"].error(f"two signatures have the keyid {keyid}")
    return Envelope(
        payload=read_base64(at["payload"]),
        payload_type=at["payloadType"].text("a media type", 255),
        signatures=tuple(signatures),
    )


def _signature(node: JsonNode) -> tuple[str, bytes]:
    at = node.known_members("sig", optional=("keyid",))
    # Absent and empty are the same.
    keyid = at["keyid"].text("a keyid", 255) if "keyid" in at else ""
    return keyid, read_base64(at["sig"])
