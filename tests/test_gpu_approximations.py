"""A GPU's approximate instructions: within the bounds of the ISA, and no seed of a wrong result.

`test_approximations.py` shows that all other seeds give correctly rounded results.
"""

from __future__ import annotations

import pytest

torch = pytest.importorskip("torch", reason="torch is not installed")
pytest.importorskip("numpy", reason="needs the extra `verify`")

from gpu_calls import approximation  # noqa: E402
from test_approximations import (  # noqa: E402
    FOUR,
    ONE,
    RECIPROCAL_EXCEPTIONS,
    ROOT_EXCEPTIONS,
    TWO,
)

from build_kernels.emulator.numerics.approximations import BANDS  # noqa: E402
from dsv4_router_runtime.exact import fused  # noqa: E402

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize(("name", "end"), [("rsqrt", FOUR), ("rcp", TWO)])
def test_every_seed_is_one_that_the_isa_allows(name, end):
    """Of every significand, and for roots of both parities of the exponent."""
    band, compiled = BANDS[f"{name}.approx.ftz.f32"], approximation(name)
    for first in range(ONE, end, 1 << 20):
        given = torch.arange(first, first + (1 << 20), dtype=torch.int32).view(torch.float32)
        seed = compiled(given.cuda()).cpu().numpy()
        low, high = band.ends(given.numpy())
        assert ((low <= seed) & (seed <= high)).all()


@pytest.mark.parametrize(
    ("name", "exceptions"), [("rsqrt", ROOT_EXCEPTIONS), ("rcp", RECIPROCAL_EXCEPTIONS)]
)
def test_no_seed_is_one_from_which_a_result_is_wrong(name, exceptions):
    given = torch.tensor([argument for argument, _ in sorted(exceptions)], dtype=torch.int32)
    seeds = approximation(name)(given.cuda().view(torch.float32)).view(torch.int32).tolist()
    found = set(zip(given.tolist(), seeds, strict=True)) & exceptions
    assert not found, [(hex(argument), hex(seed)) for argument, seed in sorted(found)]


def test_roots_are_correctly_rounded():
    """Every significand, by the kernels' steps from this GPU's seed."""
    z = torch.arange(ONE, FOUR, dtype=torch.int32, device="cuda").view(torch.float32)
    seed = approximation("rsqrt")(z)
    root = z * seed
    root = fused(fused(-root, root, z), 0.5 * seed, root)
    wrong = z[root != z.double().sqrt().float()].view(torch.int32).tolist()
    assert set(wrong) <= {argument for argument, _ in ROOT_EXCEPTIONS}
