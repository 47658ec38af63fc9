"""Sets of artifacts that are signed, and the keys that sign them."""

from __future__ import annotations

import base64
import hashlib
import json
from collections.abc import Iterable
from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from typing import Any

from conftest import manifest_text, topk_kernel
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from dsv4_router_runtime.artifacts.dsse import ENVELOPE_NAME, Envelope, serialise_envelope
from dsv4_router_runtime.artifacts.folder import subjects
from dsv4_router_runtime.artifacts.manifest import Manifest
from dsv4_router_runtime.artifacts.statement import (
    BUILD_TYPE,
    PAYLOAD_TYPE,
    PREDICATE_TYPE,
    STATEMENT_TYPE,
)

KEYS = tuple(
    Ed25519PrivateKey.from_private_bytes(hashlib.sha256(b"key %d" % n).digest()) for n in range(6)
)
PUBLIC = tuple(key.public_key().public_bytes_raw() for key in KEYS)
IDS = tuple(hashlib.sha256(public).hexdigest() for public in PUBLIC)
ORDER = 2**252 + 27742317777372353535851937790883648493


def b64(data: bytes) -> str:
    return base64.b64encode(data).decode()


@lru_cache
def small_manifest(manifest: Manifest) -> Manifest:
    """The sample manifest with one kernel, which opens fast."""
    return replace(manifest, driver={"sm_90a": 12040}, kernels=(topk_kernel(),))


def statement(manifest: Manifest, release: str = "0.1.0") -> dict[str, Any]:
    named = subjects(manifest, manifest_text(manifest).encode())
    return {
        "_type": STATEMENT_TYPE,
        "subject": [{"name": n, "digest": {"sha256": d}} for n, d in sorted(named.items())],
        "predicateType": PREDICATE_TYPE,
        "predicate": {
            "buildDefinition": {
                "buildType": BUILD_TYPE,
                "externalParameters": {"release": release},
            }
        },
    }


def signed(
    payload: bytes, signers: Iterable[int] = (0,), payload_type: str = PAYLOAD_TYPE
) -> dict[str, Any]:
    """The envelope's document, signed by KEYS of these numbers."""
    bare = Envelope(payload=payload, payload_type=payload_type, signatures=())
    pairs = tuple((IDS[n], KEYS[n].sign(bare.signed_bytes)) for n in signers)
    return json.loads(serialise_envelope(replace(bare, signatures=pairs)))


def policy(*numbers: int, **more: Any) -> dict[str, Any]:
    return {"keys": [b64(PUBLIC[n]) for n in numbers], **more}


def write_envelope(folder: Path, document: object) -> None:
    (folder / ENVELOPE_NAME).write_text(json.dumps(document))
