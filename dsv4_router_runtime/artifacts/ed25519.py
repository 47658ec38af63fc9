"""Verify Ed25519 signatures (RFC 8032, section 5.1.7), strictly. Uses the standard library alone.

Stricter than the RFC demands, so that a signature has one encoding and a key one set of messages:
A and R are encoded canonically, S is below L, and neither A nor R is of small order (with such an A
one signature fits every message). The equation is the cofactorless one, S B = R + k A: it decides
each pair of key and signature by one comparison of bytes, as OpenSSL, BoringSSL and Go decide it.
The cofactored one would accept signatures that those refuse. Nothing here is secret, so the time
that a verification takes may depend on its input.
"""

from __future__ import annotations

import hashlib
from functools import lru_cache

KEY_BYTES = 32
SIGNATURE_BYTES = 64

_P = 2**255 - 19
_L = 2**252 + 27742317777372353535851937790883648493
_D = -121665 * pow(121666, -1, _P) % _P
_ROOT_OF_MINUS_ONE = pow(2, (_P - 1) // 4, _P)
_WINDOW = 4  # bits of a scalar for each pair of additions

# Extended coordinates (X, Y, Z, T): x = X / Z, y = Y / Z, x y = T / Z.
Point = tuple[int, int, int, int]
_NEUTRAL: Point = (0, 1, 1, 0)
# Y - X, Y + X, 2 d T, 2 Z of a point that is added more than once.
Addend = tuple[int, int, int, int]


class KeyFormatError(ValueError):
    """These bytes are no public key that this verifier takes."""


class PublicKey:
    """A public key, decoded and checked; KeyFormatError gives the reason against its bytes."""

    def __init__(self, encoded: bytes) -> None:
        if len(encoded) != KEY_BYTES:
            raise KeyFormatError(f"expected {KEY_BYTES} bytes (got {len(encoded)})")
        point = _decode(encoded)
        if point is None:
            raise KeyFormatError("expected the canonical encoding of a point of Ed25519")
        if _is_small(point):
            raise KeyFormatError("a point of small order, for which anyone can sign")
        self.encoded = encoded
        x, y, z, t = point
        self._multiples_of_minus_a = _multiples((-x % _P, y, z, -t % _P))

    @property
    def keyid(self) -> str:
        """Return the sha256 of the 32 bytes, as 64 hexadecimal digits."""
        return hashlib.sha256(self.encoded).hexdigest()

    def verifies(self, signature: bytes, message: bytes) -> bool:
        """Return whether `signature` is this key's of `message`."""
        if len(signature) != SIGNATURE_BYTES:
            return False
        r, s = signature[:32], int.from_bytes(signature[32:], "little")
        if s >= _L:
            return False
        k = int.from_bytes(hashlib.sha512(r + self.encoded + message).digest(), "little") % _L
        # An encoding of R that is not canonical differs from this one, which is.
        found = _sum_of_products(s, _multiples_of_base(), k, self._multiples_of_minus_a)
        return _encode(found) == r and not _is_small(found)


def _ready(point: Point) -> Addend:
    x, y, z, t = point
    return (y - x) % _P, (y + x) % _P, 2 * _D * t % _P, 2 * z


def _add(point: Point, addend: Addend) -> Point:
    # Complete for this curve: points may be equal, opposite or of small order.
    x, y, z, t = point
    less, more, scaled_t, twice_z = addend
    a, b = (y - x) * less, (y + x) * more
    c, d = t * scaled_t, z * twice_z
    e, f, g, h = (b - a) % _P, (d - c) % _P, (d + c) % _P, (b + a) % _P
    return e * f % _P, g * h % _P, f * g % _P, e * h % _P


def _double(point: Point, times: int) -> Point:
    """Double a point `times` times, once at least; T is computed for the last one alone."""
    x, y, z, _ = point
    for _ in range(times):
        a, b = x * x, y * y
        e, g, h = 2 * x * y % _P, (b - a) % _P, -(a + b) % _P
        f = (g - 2 * z * z) % _P
        x, y, z = e * f % _P, g * h % _P, f * g % _P
    return x, y, z, e * h % _P


def _multiples(point: Point) -> tuple[Addend, ...]:
    """Return 0, 1, ... times a point, one for each value of a window."""
    step, last = _ready(point), _NEUTRAL
    found = [_ready(last)]
    for _ in range(2**_WINDOW - 1):
        last = _add(last, step)
        found.append(_ready(last))
    return tuple(found)


@lru_cache(maxsize=1)
def _multiples_of_base() -> tuple[Addend, ...]:
    return _multiples(_decode((4 * pow(5, -1, _P) % _P).to_bytes(32, "little")) or _NEUTRAL)


def _sum_of_products(
    m: int, of_one: tuple[Addend, ...], n: int, of_other: tuple[Addend, ...]
) -> Point:
    """Return m times one point plus n times another, given their multiples."""
    total = _NEUTRAL
    for shift in range(256 - _WINDOW, -1, -_WINDOW):
        total = _double(total, _WINDOW)
        total = _add(total, of_one[m >> shift & 2**_WINDOW - 1])
        total = _add(total, of_other[n >> shift & 2**_WINDOW - 1])
    return total


def _is_small(point: Point) -> bool:
    """Return whether 8 times the point is the neutral element."""
    x, y, z, _ = _double(point, 3)
    return x == 0 and y == z


def _encode(point: Point) -> bytes:
    x, y, z, _ = point
    inverse = pow(z, -1, _P)
    return (y * inverse % _P | (x * inverse % _P & 1) << 255).to_bytes(32, "little")


def _decode(encoded: bytes) -> Point | None:
    """Return the point; None if there is none, or if this is not its only canonical encoding."""
    y = int.from_bytes(encoded, "little")
    sign, y = y >> 255, y & 2**255 - 1
    if y >= _P:
        return None
    square = (y * y - 1) * pow(_D * y * y + 1, -1, _P) % _P
    x = pow(square, (_P + 3) // 8, _P)
    if x * x % _P != square:
        x = x * _ROOT_OF_MINUS_ONE % _P
    if x * x % _P != square or (x == 0 and sign):
        return None
    if x & 1 != sign:
        x = _P - x
    return x, y, 1, x * y % _P
