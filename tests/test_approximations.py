"""The bits of a result and the seed of an approximate instruction: every seed that the ISA allows.

`router_score`, `reciprocal` and `quotient` of score.py are repeated here in the emulator's
arithmetic. A significand is a number in [1, 2); scaling by powers of two is exact.
"""

from __future__ import annotations

from collections.abc import Iterator

import pytest

np = pytest.importorskip("numpy", reason="needs the extra `verify`")

from build_kernels.emulator.numerics import floats  # noqa: E402
from build_kernels.emulator.numerics.approximations import BANDS, at_the_ends  # noqa: E402

RSQRT, RCP = BANDS["rsqrt.approx.ftz.f32"], BANDS["rcp.approx.ftz.f32"]
ONE, TWO, FOUR = 0x3F800000, 0x40000000, 0x40800000
# (argument, seed): the results are one unit too low. The arguments stand for all that are a power
# of 4, or of 2, larger.
ROOT_EXCEPTIONS = {(0x3FFC114A, 0x3F366D09), (0x406E9372, 0x3F049780)}
RECIPROCAL_EXCEPTIONS = {(0x3FFFFFFF, 0x3F000000)}
# (dividend, divisor, inverse)
QUOTIENT_EXCEPTIONS = {(ONE, 0x3FFFFFFF, 0x3F000000)}


def of_bits(bits):
    return np.asarray(bits).astype(np.uint32).view(np.float32)


def bits_of(values):
    return np.ascontiguousarray(values).view(np.uint32)


def fused(a, b, c):
    return floats.fma32(a, b, c, "rn")


def root(z, seed):
    """The end of `router_score`."""
    product = z * seed
    return fused(fused(-product, product, z), np.float32(0.5) * seed, product)


def reciprocal(value, guess):
    return fused(fused(-value, guess, np.ones_like(guess)), guess, guess)


def quotient(dividend, divisor, inverse):
    product = dividend * inverse
    return fused(fused(-product, divisor, dividend), inverse, product)


def divided(dividend, divisor):
    """Correctly rounded: FP64 has more than twice the bits of FP32 and two to spare."""
    return (dividend.astype(np.float64) / divisor.astype(np.float64)).astype(np.float32)


def rooted(z):
    return np.sqrt(z.astype(np.float64)).astype(np.float32)


def seeds(band, values) -> Iterator:
    """Every seed of the band: (which of the values have a further one, those seeds)."""
    low, high = (bits_of(end).astype(np.int64) for end in band.ends(values))
    for offset in range(int((high - low).max()) + 1):
        has = low + offset <= high
        yield has, of_bits((low + offset)[has])


def wrong(band, values, step, expected) -> set[tuple[int, int]]:
    """(value, seed) of the results that differ from the correctly rounded ones."""
    found = set()
    for has, seed in seeds(band, values):
        given = values[has]
        bad = step(given, seed) != expected[has]
        found |= set(zip(bits_of(given[bad]).tolist(), bits_of(seed[bad]).tolist(), strict=True))
    return found


# The first class, a sample of the others, holds an exception.
@pytest.mark.quick(1)
@pytest.mark.parametrize("place", [10, *range(10), *range(11, 16)])
def test_the_root_is_correctly_rounded_from_every_seed_but_two(place):
    """Every significand of both parities of the exponent; a class is those equal modulo 16."""
    z = of_bits(np.arange(ONE + place, FOUR, 16))
    expected = {pair for pair in ROOT_EXCEPTIONS if pair[0] % 16 == place}
    assert wrong(RSQRT, z, root, rooted(z)) == expected


@pytest.mark.quick(1)
@pytest.mark.parametrize("place", [15, *range(15)])
def test_the_reciprocal_is_correctly_rounded_from_every_seed_but_one(place):
    divisor = of_bits(np.arange(ONE + place, TWO, 16))
    expected = {pair for pair in RECIPROCAL_EXCEPTIONS if pair[0] % 16 == place}
    assert wrong(RCP, divisor, reciprocal, RCP.nearest(divisor)) == expected


def hard_quotients(divisors) -> Iterator:
    """Every dividend A and divisor B, integers of 24 bits, that `quotient` could round wrong.

    Their quotient is next to a midpoint M / 2^s, with an odd M of 25 bits: s is 24 for quotients
    from 1 on, and 25 below. Further than |A * 2^s - M * B| = 2, or 5 below 1, none is rounded
    wrong. For a and b in [1, 2), q = RN(a * y) and |y - 1/b| <= ulp(y) / 2:

        |q - a/b| <= (a/4 + 1/2) ulp(q), or (a/2 + 1/2) ulp(q) below 1
        |1 - b*y| <= b / 2^25
        |q + y * RN(a - b*q) - a/b| <= |q - a/b| * |1 - b*y|, and below 1 2^-47 more, since
            the remainder has 25 bits

    A distance of 1 is ulp(q) / (2^24 * b).
    """
    for zeros in range(3):
        here = divisors[divisors & ((2 << zeros) - 1) == 1 << zeros].astype(np.uint64)
        odd = here >> np.uint64(zeros)
        inverse = odd
        for _ in range(4):  # to 48 bits
            inverse = inverse * (np.uint64(2) - odd * inverse)
        for scale, farthest in ((24, 2), (25, 5)):
            modulus = 1 << (scale - zeros)
            for distance in range(-farthest, farthest + 1):
                if distance % (2 << zeros) != 1 << zeros:
                    continue  # M would be even, or there is none
                least = np.uint64(-(distance >> zeros) % 2**64) * inverse % np.uint64(modulus)
                for first in range(0, 1 << 25, modulus):
                    middle = least + np.uint64(first)
                    total = (middle * here).astype(np.int64) + distance
                    dividend = total >> scale
                    fits = (middle >> np.uint64(24) == 1) & (dividend >> 23 == 1)
                    fits &= (dividend >= here.astype(np.int64)) == (scale == 24)
                    if fits.any():
                        assert not (total[fits] & ((1 << scale) - 1)).any()
                        yield dividend[fits], here[fits].astype(np.int64)


@pytest.mark.quick(1)
@pytest.mark.parametrize("divisor", [0x800001, 0xB504F2, 0xFFFFFC, 0xFFFFFF])
def test_hard_quotients_are_all_those_next_to_a_midpoint(divisor):
    """All dividends of a divisor that is odd, or twice or four times an odd number."""
    found = {pair[0].tobytes() for pair in hard_quotients(np.array([divisor]))}
    hard = sorted(np.frombuffer(b"".join(found), np.int64).tolist())
    dividend = np.arange(1 << 23, 1 << 24)
    below = dividend < divisor
    quotient, rest = np.divmod(dividend << np.where(below, 25, 24), divisor)
    distance = np.where(quotient % 2 == 1, rest, divisor - rest)
    assert hard == dividend[distance <= np.where(below, 5, 2)].tolist()


@pytest.mark.quick(1)
@pytest.mark.parametrize("block", range(16))
def test_the_quotient_is_correctly_rounded_from_every_inverse_but_one(block):
    """Every pair of significands that could be rounded wrong; see `hard_quotients`."""
    found = set()
    first = (1 << 23) + (15 - block << 19)
    for pair in hard_quotients(np.arange(first, first + (1 << 19))):
        dividend, divisor = (of_bits(ONE - (1 << 23) + each) for each in pair)
        expected = divided(dividend, divisor)
        for has, seed in seeds(RCP, divisor):
            operands = dividend[has], divisor[has], reciprocal(divisor[has], seed)
            bad = quotient(*operands) != expected[has]
            found |= set(zip(*(bits_of(each[bad]).tolist() for each in operands), strict=True))
    assert found == (QUOTIENT_EXCEPTIONS if block == 0 else set())


@pytest.mark.slow
def test_of_the_divisor_with_two_inverses_one_dividend_has_two_quotients():
    """Every dividend: `hard_quotients` does not hold if an inverse is more than ulp / 2 off."""
    dividend = of_bits(np.arange(ONE, TWO))
    for _, divisor, inverse in QUOTIENT_EXCEPTIONS:
        operands = (np.full_like(dividend, of_bits(each)) for each in (divisor, inverse))
        bad = quotient(dividend, *operands) != divided(dividend, of_bits(divisor))
        assert bits_of(dividend[bad]).tolist() == [ONE]


def test_easy_quotients_are_correctly_rounded(seed):
    random = np.random.default_rng(seed)
    dividend, divisor = (of_bits(random.integers(ONE, TWO, 1 << 18)) for _ in range(2))
    inverse = reciprocal(divisor, RCP.nearest(divisor))
    np.testing.assert_array_equal(quotient(dividend, divisor, inverse), divided(dividend, divisor))


@pytest.mark.parametrize("power", [-1, 31, 62])
def test_a_root_scales_with_its_argument(power, seed):
    """Down to 1/4, and up to the largest float: no step overflows or is subnormal."""
    random = np.random.default_rng(seed)
    z = of_bits(np.append(random.integers(ONE, FOUR, 1 << 16), [ONE, FOUR - 1]))
    scale, half = np.float32(4.0**power), np.float32(2.0**power)
    for has, guess in seeds(RSQRT, z):
        scaled = root(z[has] * scale, guess / half)
        np.testing.assert_array_equal(scaled, root(z[has], guess) * half)


@pytest.mark.parametrize(
    ("dividend_power", "divisor_power"), [(-102, 0), (-102, -100), (0, 125), (0, -126), (126, 0)]
)
def test_a_quotient_scales_with_its_operands(dividend_power, divisor_power, seed):
    """From a dividend of 2^-102 on; below, the remainder's last bits are lost."""
    random = np.random.default_rng(seed)
    dividend, divisor = (of_bits(random.integers(ONE, TWO, 1 << 16)) for _ in range(2))
    up, down = np.float32(2.0**dividend_power), np.float32(2.0**divisor_power)
    inverse = reciprocal(divisor, RCP.nearest(divisor))
    of_scaled = reciprocal(divisor * down, RCP.nearest(divisor * down))
    np.testing.assert_array_equal(of_scaled.astype(np.float64) * down, inverse)
    scaled = quotient(dividend * up, divisor * down, of_scaled)
    expected = quotient(dividend, divisor, inverse).astype(np.float64) * up / down
    np.testing.assert_array_equal(scaled, expected)


def test_results_without_the_last_step_depend_on_the_seed():
    z = of_bits(np.arange(ONE, FOUR, 1 << 12))
    assert len(wrong(RSQRT, z, np.multiply, rooted(z))) > 1000
    divisor = of_bits(np.arange(ONE, TWO, 1 << 12))
    assert len(wrong(RCP, divisor, lambda value, guess: guess, RCP.nearest(divisor))) > 1000


@pytest.mark.parametrize(
    ("opcode", "argument", "low", "high"),
    [
        ("rcp", 3.0, 0x3EAAAAAA, 0x3EAAAAAB),
        ("rcp", 1.0, ONE - 2, ONE + 1),
        ("rcp", -4.0, 0xBE800001, 0xBE7FFFFE),
        ("rcp", 1e-40, 0x7F800000, 0x7F800000),
        ("rsqrt", 1.0, ONE - 2, ONE + 1),
        ("rsqrt", -1.0, 0x7FFFFFFF, 0x7FFFFFFF),
        ("sqrt", 0.0, 0, 0),
        ("sqrt", 1.0, ONE - 2, ONE + 1),
        ("ex2", 0.5, 0x3FB504F1, 0x3FB504F5),
        ("ex2", -np.inf, 0, 0),
        ("ex2", -140.0, 0, 0),
        ("ex2", 127.99999, 0x7F7FFFA5, 0x7F7FFFA9),
        ("lg2", 1.0, 0xB4800000, 0x34800000),
        ("lg2", 2.0, ONE - 4, ONE + 2),
        ("lg2", 0.0, 0xFF800000, 0xFF800000),
        ("lg2", np.nan, 0x7FFFFFFF, 0x7FFFFFFF),
    ],
)
def test_a_band_has_the_bounds_of_the_isa(opcode, argument, low, high):
    ends = BANDS[f"{opcode}.approx.ftz.f32"].ends(np.array([argument], np.float32))
    assert [hex(bits_of(end)[0]) for end in ends] == [hex(low), hex(high)]


def test_each_lane_gets_an_end_of_its_band_or_the_nearest_result(seed):
    values = of_bits(np.arange(ONE, FOUR, 1 << 12))
    moved = at_the_ends(np.random.default_rng(seed))["rsqrt.approx.ftz.f32"](values)
    choices = np.stack([*RSQRT.ends(values), RSQRT.nearest(values)])
    taken = choices == moved
    assert taken.any(0).all()
    assert taken.any(1).all()
