"""The runtime's verifier of signatures, against published vectors and against two libraries."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest
from cpu_time import best_ms

from dsv4_router_runtime.artifacts.ed25519 import KeyFormatError, PublicKey

P = 2**255 - 19
VECTORS = json.loads((Path(__file__).parent / "ed25519_vectors.json").read_text())["vectors"]
# The points of order 1, 2, 4 and 8, in the order of their y.
OF_ORDER_8 = (
    0x05FC536D880238B13933C6D305ACDFD5F098EFF289F4C345B027B2C28F95E826,
    P - 0x05FC536D880238B13933C6D305ACDFD5F098EFF289F4C345B027B2C28F95E826,
)
SMALL = (1, P - 1, 0, 0 | 1 << 255, *(y | sign << 255 for y in OF_ORDER_8 for sign in (0, 1)))


def accepts(key: bytes, signature: bytes, message: bytes) -> bool:
    try:
        return PublicKey(key).verifies(signature, message)
    except KeyFormatError:
        return False


@pytest.mark.parametrize("vector", VECTORS, ids=[each["name"] for each in VECTORS])
def test_a_published_vector(vector):
    key, message, signature = (
        bytes.fromhex(vector[name]) for name in ("key", "message", "signature")
    )
    assert accepts(key, signature, message) == vector["valid"]


@pytest.mark.parametrize("encoded", SMALL, ids=hex)
def test_a_key_of_small_order_is_refused(encoded):
    with pytest.raises(KeyFormatError, match="small order"):
        PublicKey(encoded.to_bytes(32, "little"))


def test_no_encoding_of_a_key_but_the_canonical_one_is_taken():
    """Every y from p on, and the two encodings of x = 0 with a sign."""
    wrong = [y | sign << 255 for y in range(P, 2**255) for sign in (0, 1)]
    for encoded in (*wrong, 1 | 1 << 255, (P - 1) | 1 << 255):
        with pytest.raises(KeyFormatError, match="canonical encoding"):
            PublicKey(encoded.to_bytes(32, "little"))


@pytest.mark.parametrize("length", [0, 31, 33, 64])
def test_a_key_of_another_length_is_refused(length):
    with pytest.raises(KeyFormatError, match=f"expected 32 bytes .got {length}."):
        PublicKey(bytes([9] * length))


def test_bytes_that_are_no_point_are_refused():
    # y = 2 has no x.
    with pytest.raises(KeyFormatError, match="canonical encoding of a point"):
        PublicKey((2).to_bytes(32, "little"))


def test_a_verification_takes_at_most_3_ms():
    """With the decoding of the key."""
    sets = pytest.importorskip("signed_sets", reason="needs the extra `test`")
    signature = sets.KEYS[0].sign(b"m" * 10_000)

    def verify() -> None:
        assert PublicKey(sets.PUBLIC[0]).verifies(signature, b"m" * 10_000)

    assert best_ms(verify, 20) <= 3


def test_it_agrees_with_cryptography_and_securesystemslib_on_some(seed):
    assert compared(30, seed) > 0


@pytest.mark.slow
def test_it_agrees_with_cryptography_and_securesystemslib_on_ten_thousand():
    assert compared(10_000, 1) > 2000


def compared(number: int, seed: int) -> int:
    """Compare the verdicts about random envelopes; return how many were accepted."""
    pytest.importorskip("cryptography", reason="needs the extra `test`")
    pytest.importorskip("securesystemslib", reason="needs the extra `test`")
    import random_envelopes as made

    rng = random.Random(seed)
    accepted = 0
    for _ in range(number):
        envelope = made.random_envelope(rng)
        verdict = made.policy_accepts(envelope)
        theirs = made.securesystemslib_accepts(envelope) and envelope.has_our_type
        assert verdict == (theirs and not envelope.is_spelt_loosely), envelope
        parsed = made.parsed(envelope)
        if parsed is not None:
            assert verdict == made.cryptography_accepts(envelope, parsed), envelope
            # Any key and any signature, whatever the envelope says of them.
            key, (_, signature) = rng.choice(made.PUBLIC), rng.choice(parsed.signatures)
            message = parsed.signed_bytes
            ours = PublicKey(key).verifies(signature, message)
            assert ours == made.cryptography_verifies(key, signature, message), envelope
        accepted += verdict
    return accepted
