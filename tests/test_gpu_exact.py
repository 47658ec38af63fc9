"""The kernels on a GPU against the exact oracle: logits, weights and ids, bit for bit.

No margins: every id is compared. The oracle's bits do not depend on N or the layout, so one of its
runs serves the kernels of every N, on the same rows.
"""

from __future__ import annotations

import math
from itertools import product

import pytest

torch = pytest.importorskip("torch", reason="torch is not installed")

from gpu_calls import BF16, laid_out, most_in_one_launch  # noqa: E402

from dsv4_router_runtime import Router  # noqa: E402
from dsv4_router_runtime.exact import exact_logits, exact_selection  # noqa: E402

pytestmark = pytest.mark.gpu

# N whose logits a kernel sums, as far as that is one launch; the rest multiply by torch.mm.
TOKENS = (1, 8, 9, 32, 33, 64, 65, 100, 128, 129, 256)
# More of 256 experts, whose weights and ids are compared with those of their own logits.
SELECT_TOKENS = (961, 1200)
LAYOUTS = ("kmajor", "emajor")
SCALE, TOP_K = 2.5, 6
MILLION, MASK = 10**6, 0xFFFFFFFF


@pytest.fixture
def random(seed):
    """A generator on the GPU, seeded by the test's own id."""
    return torch.Generator(device="cuda").manual_seed(seed)


def normal(random, *shape):
    return torch.randn(*shape, generator=random, device="cuda")


def binades(random, low: int, high: int, *shape):
    """Powers of two from 2^low to 2^high."""
    return torch.exp2(torch.randint(low, high + 1, shape, generator=random, device="cuda"))


def gaussian(random, n, k, e):
    """Logits of standard deviation 2."""
    return normal(random, n, k), normal(random, k, e) * (2 / math.sqrt(k))


def wide_range(random, n, k, e):
    """24 binades of each factor."""
    x, w = normal(random, n, k), normal(random, k, e)
    return x * binades(random, -12, 12, n, k), w * binades(random, -18, 6, k, e)


def cancelling(random, n, k, e):
    """Neighbours cancel to the last bit of W_gate, and the second half of K cancels the first."""
    x, w = normal(random, n, k), normal(random, k, e)
    x[:, 1::2], w[1::2] = x[:, ::2], -w[::2]
    w[1::6] *= 1 + 2**-7
    x[:, k // 2 :], w[k // 2 :] = x[:, : k // 2].flip(1), -w[: k // 2].flip(0)
    return x, w + normal(random, k, e) * 1e-3


def zeros_beside_huge(random, n, k, e):
    """Half of the factors are 0, and a 0 meets up to 2^120 where other products are far below 1."""
    x, w = normal(random, n, k) * 2.0**-60, normal(random, k, e) * 2.0**-30
    huge = torch.rand(k, generator=random, device="cuda") < 0.25
    x[:, huge], w[huge] = 0, normal(random, int(huge.sum()), e) * binades(random, 0, 120, 1, e)
    x[torch.rand(n, k, generator=random, device="cuda") < 0.25] = 0
    return x, w


def denormal_factors(random, n, k, e):
    """One factor in four is denormal, and meets one of up to 2^60."""
    x, w = normal(random, n, k), normal(random, k, e) * binades(random, 0, 60, k, e)
    x[:, ::4] *= 2.0**-128
    w[1::4] *= 2.0**-190
    return x, w


def denormal_sums(random, n, k, e):
    """Products around the least FP32 numbers."""
    x = normal(random, n, k) * binades(random, -80, -68, n, k)
    return x, normal(random, k, e) * binades(random, -72, -60, k, e)


def overflows(random, n, k, e):
    """Sums around the largest FP32 number."""
    x = normal(random, n, k) * binades(random, 58, 62, n, 1)
    return x, normal(random, k, e) * binades(random, 56, 61, 1, e)


def raw_bits(random, n, k, e):
    """Any finite BF16 bits, in about 4 places of K: the rest is 0, or few sums would be finite."""
    drawn = []
    for shape in ((n, k), (k, e)):
        words = torch.randint(-(2**15), 2**15, shape, generator=random, device="cuda").short()
        drawn.append(words.view(BF16).nan_to_num(nan=1.0, posinf=1.0, neginf=1.0))
    drawn[0][:, torch.rand(k, generator=random, device="cuda") > 4 / k] = 0
    return drawn


def not_finite(random, n, k, e):
    """A few infinities and NaNs, of both factors."""
    x, w = gaussian(random, n, k, e)
    odd = torch.tensor([math.nan, math.inf, -math.inf], device="cuda")
    for each in (x, w):
        at = torch.rand(each.shape, generator=random, device="cuda") < 1 / (2 * k)
        each[at] = odd[torch.randint(0, 3, (int(at.sum()),), generator=random, device="cuda")]
    return x, w


PLAIN = (gaussian, wide_range, cancelling)
ODD = (
    *(zeros_beside_huge, denormal_factors, denormal_sums),
    *(overflows, raw_bits, not_finite),
)


def drawn(random, draw, n, k, e):
    x, w = (each.to(BF16) for each in draw(random, n, k, e))
    return x, w, 8.08 + 0.05 * normal(random, e)


def routed(router, x, num_tokens: int):
    """Logits, weights and ids of all rows of x, num_tokens in a call."""
    n, e = len(x), router.W_gate.shape[1]
    logits = torch.empty(n, e, device="cuda")
    weights = torch.empty(n, TOP_K, device="cuda")
    ids = torch.empty(n, TOP_K, dtype=torch.int32, device="cuda")
    for first in range(0, n, num_tokens):
        rows = slice(first, first + num_tokens)
        router(x[rows], weights[rows], ids[rows], out_logits=logits[rows])
    return logits, weights, ids


def same_bits(got, expected, about: str) -> None:
    """Fail unless the bits are equal, with their number and the first few that are not."""
    got, expected = (each.contiguous().view(torch.int32) for each in (got, expected))
    wrong = got != expected
    if wrong.any():
        pairs = zip(got[wrong][:4].tolist(), expected[wrong][:4].tolist(), strict=True)
        first = ", ".join(f"{a & MASK:08x} instead of {b & MASK:08x}" for a, b in pairs)
        at = wrong.nonzero()[:4].tolist()
        pytest.fail(f"{about}: {int(wrong.sum())} of {wrong.numel()} differ: {first} at {at}")


def same_weights(got, expected, tempered_logits, ids, about: str) -> None:
    """As `same_bits`, of the scores from 2^-102 on; see `exact_selection`."""
    is_tiny = tempered_logits.gather(1, ids.long()) < -141
    same_bits(got.masked_fill(is_tiny, 0), expected.masked_fill(is_tiny, 0), f"{about}: weights")


def agrees(x, w, bias, layout: str, tokens, logits) -> None:
    router = Router(laid_out(w, layout), bias, top_k=TOP_K, routed_scaling_factor=SCALE)
    weights, ids = exact_selection(logits, bias, SCALE, TOP_K)
    most = most_in_one_launch(w.shape[1])
    for num_tokens in (number for number in tokens if number <= most):
        about = f"{layout}, N = {num_tokens}"
        got = routed(router, x, num_tokens)
        same_bits(got[0], logits, f"{about}: logits")
        same_bits(got[2], ids, f"{about}: ids")
        same_weights(got[1], weights, logits, ids, about)


@pytest.mark.parametrize("draw", PLAIN, ids=lambda draw: draw.__name__)
def test_a_million_logits_of_each_kernel(random, draw):
    """7168 x 384: every layout and every N get the same rows, a million logits each."""
    x, w, bias = drawn(random, draw, 2624, 7168, 384)
    logits = exact_logits(x, w)
    assert logits.numel() > MILLION
    for layout in LAYOUTS:
        agrees(x, w, bias, layout, TOKENS, logits)


@pytest.mark.parametrize("draw", PLAIN, ids=lambda draw: draw.__name__)
@pytest.mark.parametrize(
    ("k", "num_experts"),
    [(64, 8), (960, 60), (1088, 132), (4096, 256), (5120, 128), (5184, 512), (8256, 72)],
)
def test_shapes_with_ragged_slices_and_tiles(random, k, num_experts, draw):
    x, w, bias = drawn(random, draw, 260, k, num_experts)
    logits = exact_logits(x, w)
    for layout in LAYOUTS:
        agrees(x, w, bias, layout, TOKENS, logits)


@pytest.mark.parametrize("draw", PLAIN, ids=lambda draw: draw.__name__)
@pytest.mark.parametrize(
    ("num_experts", "tokens"),
    [
        (60, (448, 449, 896, 897, 960, 961, 1920)),
        (128, (769, 896, 960, 1920)),
        (256, (192, 193, 384, 385, 448, 449, 960)),
        (384, (256, 257, 320, 321, 640)),
        (512, (65, 128, 129, 192, 193, 448)),
    ],
)
def test_the_bounds_of_prefills_kernels(random, num_experts, tokens, draw):
    """N at which n64 ends, and n128, n64_k8 and n64_k4 begin and end."""
    x, w, bias = drawn(random, draw, max(tokens), 1088, num_experts)
    logits = exact_logits(x, w)
    for layout in LAYOUTS:
        agrees(x, w, bias, layout, tokens, logits)


@pytest.mark.parametrize("draw", ODD, ids=lambda draw: draw.__name__)
@pytest.mark.parametrize("k", [64, 1088, 4096])
def test_odd_numbers(random, k, draw):
    x, w, bias = drawn(random, draw, 130, k, 160)
    logits = exact_logits(x, w)
    router = Router(w, bias, top_k=TOP_K, routed_scaling_factor=SCALE)
    ids = exact_selection(logits, bias, SCALE, TOP_K)[1]
    for num_tokens in (32, 130):
        got = routed(router, x, num_tokens)
        same_bits(got[0], logits, f"N = {num_tokens}: logits")
        same_bits(got[2], ids, f"N = {num_tokens}: ids")


@pytest.mark.parametrize("draw", PLAIN, ids=lambda draw: draw.__name__)
@pytest.mark.parametrize("num_tokens", SELECT_TOKENS)
def test_weights_and_ids_of_the_logits_that_torch_multiplies(random, num_tokens, draw):
    x, w, bias = drawn(random, draw, 4 * num_tokens, 4096, 256)
    router = Router(w, bias, top_k=TOP_K, routed_scaling_factor=SCALE)
    logits, weights, ids = routed(router, x, num_tokens)
    expected = exact_selection(logits, bias, SCALE, TOP_K)
    same_bits(ids, expected[1], "ids")
    same_weights(weights, expected[0], logits, ids, f"N = {num_tokens}")


@pytest.mark.parametrize("gate_temp", [1.0, 0.7])
@pytest.mark.parametrize("num_tokens", [1, 9, 56, 57, 65, 200])
def test_weights_of_a_hash_layer(random, num_tokens, gate_temp):
    x, w, _ = drawn(random, gaussian, num_tokens, 4096, 256)
    w *= 8
    table = torch.rand(50, 256, generator=random, device="cuda").argsort(1)[:, :TOP_K].int()
    tokens = torch.randint(0, 50, (num_tokens,), generator=random, device="cuda")
    layer = {"tid2eid": table, "gate_temp": gate_temp}
    router = Router(laid_out(w, "kmajor"), top_k=TOP_K, routed_scaling_factor=SCALE, **layer)
    weights = torch.empty(num_tokens, TOP_K, device="cuda")
    ids = torch.empty(num_tokens, TOP_K, dtype=torch.int32, device="cuda")
    router(x, weights, ids, input_ids=tokens)
    logits = exact_logits(x, w)
    expected = exact_selection(logits, None, SCALE, TOP_K, input_ids=tokens, **layer)
    same_bits(ids, expected[1], "ids")
    same_weights(weights, expected[0], logits / gate_temp, ids, f"N = {num_tokens}")


def test_the_oracle_has_the_same_bits_on_cpu_and_gpu(random):
    for draw in (*PLAIN, *ODD):
        x, w, bias = drawn(random, draw, 16, 1088, 24)
        logits = exact_logits(x, w)
        same_bits(logits.cpu(), exact_logits(x.cpu(), w.cpu()), f"{draw.__name__}: logits")
        here = exact_selection(logits, bias, SCALE, TOP_K)
        there = exact_selection(logits.cpu(), bias.cpu(), SCALE, TOP_K)
        for mine, other in zip(here, there, strict=True):
            same_bits(mine.cpu(), other, f"{draw.__name__}: selection")


# Experts of one to eight tiles: each number of registers that a lane merges.
@pytest.mark.parametrize("e", [60, 64, 100, 130, 200, 256, 300, 384, 450, 512])
def test_equal_logits_go_to_the_lower_expert(random, e):
    """Rows of few different logits: equal ones in one lane, in several, and at the last rank."""
    k = 64
    for num_tokens in (1, 8, 32, 64, 128, 256):
        for top_k, different in product((1, 3, 6, 8), (2, 5, 12, 40)):
            x = torch.zeros(num_tokens, k, device="cuda", dtype=BF16)
            rows = torch.arange(num_tokens, device="cuda")
            x[rows, rows % k] = 1
            w = torch.randint(0, different, (k, e), generator=random, device="cuda").to(BF16)
            router = Router(w, torch.zeros(e, device="cuda"), top_k=top_k, routed_scaling_factor=1)
            weights = torch.empty(num_tokens, top_k, device="cuda")
            ids = torch.empty(num_tokens, top_k, device="cuda", dtype=torch.int32)
            router(x, weights, ids)
            logits = w[rows % k].float()
            order = logits.sort(dim=-1, descending=True, stable=True).indices
            assert torch.equal(ids, order[:, :top_k].int()), (num_tokens, top_k, different)
