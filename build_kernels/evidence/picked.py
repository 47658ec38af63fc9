"""The cases of a kernel: the drawn ones that reach all of its text, and in full those by hand.

`picked.json` holds the numbers of the draws per role, which `build-kernels coverage --pick` renews.
"""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path

from dsv4_router_runtime.artifacts.manifest import Kernel

from .cases import Case, listed_cases, second_launch, wide_cases
from .draws import draw

# The token tile of decode between the least and the greatest.
_BETWEEN = 32
PICKED = Path(__file__).with_name("picked.json")


@cache
def picked_numbers() -> dict[str, list[int]]:
    """Return the numbers of the draws by role."""
    numbers: dict[str, list[int]] = json.loads(PICKED.read_text())
    return numbers


def cases_of(kernel: Kernel, *, quick: bool) -> tuple[Case, ...]:
    """Return the kernel's cases.

    In quick an E-major kernel and that of 32 tokens have those of several blocks of K alone: their
    texts differ from the other K-major kernels' in the loads of W_gate and in a warp's tokens. The
    other prefill kernels have a call's second launch too. router_topk has the wide cases in both.
    """
    drawn = tuple(draw(kernel, number) for number in picked_numbers()[kernel.role])
    if kernel.role == "select":
        drawn += wide_cases()
    if not quick:
        return drawn + listed_cases(kernel)
    is_between = kernel.problem.layout == "emajor" or kernel.launch.token_tile == _BETWEEN
    if kernel.role == "prefill" and not is_between:
        drawn += (second_launch(kernel),)
    return tuple(case for case in drawn if not is_between or case.k > kernel.problem.k_multiple)
