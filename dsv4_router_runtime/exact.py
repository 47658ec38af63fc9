"""The exact oracle: the bits of the kernels' logits, weights and ids, in plain torch.

The order of every sum is part of the kernels' contract. This is its statement:

1. K is cut into blocks of 64, and the blocks into 16 slices. Slice s holds the blocks from
   s * num_blocks // 16 up to (s + 1) * num_blocks // 16.
2. Each slice has an FP32 accumulator that starts at 0 and takes the slice in K order, 16 elements
   per step (one MMA instruction of k16).
3. A step is one sum of 17 terms, the accumulator and 16 exact products; see `fused_sum`.
4. Four slices in a row are a group, whose sum is ((p0 + p1) + p2) + p3. The logit is
   ((g0 + g1) + g2) + g3 of the groups' sums. Each addition is FP32, rounded to nearest even.
5. The score, the sum of the chosen scores (in rank order, from 0) and the weights are FP32 steps,
   each rounded to nearest even; see `exact_scores` and `_weights`.

So a logit's bits depend on its row of hidden_states and its column of W_gate alone: not on N, the
row, the neighbours or the layout. With `Router(same_bits=True)` this holds in every call. Otherwise
a call of more tokens than one fused launch takes has the logits of torch.mm, which promises no
order; `exact_selection` gives the weights and the ids of any logits.

Nothing here is shared with the kernels: tests compare the bits, on a GPU and in the emulator.
"""

from __future__ import annotations

from itertools import pairwise
from typing import Unpack

import torch

from .artifacts.limits import K_MULTIPLE
from .reference import EPSILON, FP32_MAX, Arithmetic, ReferenceOptions, select_with

NUM_SLICES = 16
GROUP_SLICES = 4
STEP = 16
# The bits of a step's terms below the largest exponent of the 17, which is LEAST_EXPONENT at least,
# that of the least BF16. An H200's sums near 2^-149 have these bits, and with -132 or -134 not.
FRACTION_BITS, LEAST_EXPONENT = 25, -133
# 2^f on [-1/2, 1/2], then log1p(u) / u on [0, 1], highest power first.
EXP2_TERMS = (
    *(1.53458121e-4, 1.33999314e-3, 9.61848896e-3, 5.55032878e-2),
    *(2.40226469e-1, 6.93147206e-1, 1.0),
)
LOG1P_TERMS = (
    *(5.23269e-3, -2.950524e-2, 7.822597e-2, -1.3663248e-1, 1.9106008e-1),
    *(-2.4842983e-1, 3.3319097e-1, -4.9999493e-1, 9.9999997e-1),
)
LOG2E_QUARTER = float.fromhex("0x1.715476p-2")
LOG2E_QUARTER_REST = float.fromhex("0x1.4ae0c0p-28")
ROUND = 12582912.0
# Products at once: few enough for a CPU's caches, enough to keep a GPU busy.
TILE_PRODUCTS = {"cpu": 1 << 17, "cuda": 1 << 23}


def exact_reference(
    hidden_states: torch.Tensor,
    W_gate: torch.Tensor,
    e_bias: torch.Tensor | None,
    routed_scaling_factor: float,
    top_k: int,
    **options: Unpack[ReferenceOptions],
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the weights (FP32) and ids of the kernels, both [N, top_k + num_shared_slots].

    The arguments are those of `router_reference`. See `exact_selection` for the bits of a weight.
    """
    logits = exact_logits(hidden_states, W_gate)
    return exact_selection(logits, e_bias, routed_scaling_factor, top_k, **options)


def exact_selection(
    logits: torch.Tensor,
    e_bias: torch.Tensor | None,
    routed_scaling_factor: float,
    top_k: int,
    **options: Unpack[ReferenceOptions],
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return weights (FP32) and ids from FP32 logits [N, E]; see `select_reference`.

    The kernels' roots and quotients start at a GPU's approximation. From every one that the PTX ISA
    allows they are correctly rounded, with these exceptions, in the last bit:
    - a root, for 2 significands in 2^24, and a power of two by a number of the significand
      2 - 2^-23, each from one approximation. No GPU has it whose sqrt.rn and rcp.rn are right:
      they take the same steps (build_kernels/evidence/README.md);
    - a weight whose score is below 2^-102 (a logit of about -141).
    """
    if logits.dtype is not torch.float32:
        raise TypeError(f"logits: expected torch.float32, as the kernels have (got {logits.dtype})")
    return select_with(KERNELS, logits, e_bias, routed_scaling_factor, top_k, options)


def exact_logits(hidden_states: torch.Tensor, W_gate: torch.Tensor) -> torch.Tensor:
    """Return the FP32 logits [N, E] of hidden_states [N, K] and W_gate [K, E], BF16, any strides.

    It runs where its tensors are. A NaN is 0x7fffffff. An H200 has the same bits: of 10^6 logits
    per kernel, draw and layout, and of zeros beside huge factors, denormals and overflow.
    """
    _check(hidden_states, W_gate)
    num_tokens, num_experts = hidden_states.shape[0], W_gate.shape[1]
    logits = hidden_states.new_empty((num_tokens, num_experts), dtype=torch.float32)
    # [E, NUM_SLICES, steps, STEP]
    w, w_exponents = _factors(W_gate.t())
    at_once = TILE_PRODUCTS["cuda" if hidden_states.is_cuda else "cpu"]
    rows = max(1, at_once // max(1, num_experts * NUM_SLICES * STEP))
    for first in range(0, num_tokens, rows):
        x, x_exponents = _factors(hidden_states[first : first + rows])
        # [rows, E, NUM_SLICES]
        partial = x.new_zeros((len(x), num_experts, NUM_SLICES), dtype=torch.float32)
        for step in range(x.shape[2]):
            products = x[:, None, :, step] * w[None, :, :, step]
            exponents = x_exponents[:, None, :, step] + w_exponents[None, :, :, step]
            partial = fused_sum(partial, products, exponents)
        groups = _folded(partial.unflatten(2, (-1, GROUP_SLICES)))
        logits[first : first + rows] = _folded(groups)
    logits.view(torch.int32).masked_fill_(logits.isnan(), 0x7FFFFFFF)
    return logits


def _folded(terms: torch.Tensor) -> torch.Tensor:
    """Add the terms of the last dimension from the left."""
    total = terms[..., 0]
    for index in range(1, terms.shape[-1]):
        total = total + terms[..., index]
    return total


def fused_sum(
    accumulator: torch.Tensor, products: torch.Tensor, exponents: torch.Tensor
) -> torch.Tensor:
    """Return an MMA step's FP32 accumulator [...] from the one before and its products [..., STEP].

    products: exact, FP64. exponents: int16, the sum of both factors' exponents: of a product of
    significands in [1, 4), not normalised. A denormal's is -126. Both are overwritten. Every term
    is truncated toward zero at FRACTION_BITS bits below the largest exponent of the terms that are
    not zero. The terms are added exactly, and the sum is truncated toward zero to FP32.
    """
    of_accumulator = _exponents(accumulator.view(torch.int32) >> 23)
    of_accumulator = of_accumulator.masked_fill_(accumulator == 0, LEAST_EXPONENT)
    exponents = exponents.masked_fill_(products == 0, LEAST_EXPONENT)
    largest = torch.maximum(exponents.amax(-1), of_accumulator).clamp_(min=LEAST_EXPONENT).long()
    # 2^(FRACTION_BITS - largest): of a term scaled by it, the integer part is kept.
    scale = (1023 + FRACTION_BITS - largest << 52).view(torch.float64)
    total = products.mul_(scale[..., None]).trunc_().sum(-1)
    return _truncated((total + (accumulator.double() * scale).trunc_()) / scale)


def _truncated(values: torch.Tensor) -> torch.Tensor:
    """Round FP64 toward zero to FP32; from 2^128 on, to infinity."""
    nearest = values.float()
    outward = (nearest.double().abs() > values.abs()) & (values.abs() < 2.0**128)
    # The next float toward zero has the next lower bits. 0 is added so that no zero is negative.
    return (nearest.view(torch.int32) - outward.int()).view(torch.float32) + 0.0


def _exponents(fields: torch.Tensor) -> torch.Tensor:
    """Return int16 exponents from shifted bits of BF16 or FP32, whose low 8 are the field."""
    return ((fields & 0xFF).clamp_(min=1) - 127).short()


def _factors(matrix: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Cut BF16 [rows, K] into [rows, NUM_SLICES, steps, STEP]: FP64 values, and exponents.

    A slice that is a block shorter than the longest ends in zeros, which leave an accumulator as it
    is.
    """
    rows, num_blocks = len(matrix), matrix.shape[1] // K_MULTIPLE
    bounds = [index * num_blocks // NUM_SLICES for index in range(NUM_SLICES + 1)]
    longest = -(-num_blocks // NUM_SLICES)
    blocks = matrix.reshape(rows, num_blocks, K_MULTIPLE)
    cut = matrix.new_zeros((rows, NUM_SLICES, longest, K_MULTIPLE))
    for index, (start, end) in enumerate(pairwise(bounds)):
        cut[:, index, : end - start] = blocks[:, start:end]
    cut = cut.view(rows, NUM_SLICES, -1, STEP)
    return cut.double(), _exponents(cut.view(torch.int16) >> 7)


def _check(hidden_states: torch.Tensor, W_gate: torch.Tensor) -> None:
    for name, tensor in (("hidden_states", hidden_states), ("W_gate", W_gate)):
        if tensor.dtype is not torch.bfloat16:
            raise TypeError(
                f"{name}: expected torch.bfloat16, since only its products are exact (got "
                f"{tensor.dtype}); for others use router_reference"
            )
        if tensor.dim() != 2:
            raise ValueError(f"{name}: expected two dimensions (got shape {tuple(tensor.shape)})")
    k = hidden_states.shape[1]
    if k != W_gate.shape[0] or k % K_MULTIPLE or not k:
        raise ValueError(
            f"expected hidden_states [N, K] and W_gate [K, E] with K a multiple of {K_MULTIPLE} "
            f"(got {tuple(hidden_states.shape)} and {tuple(W_gate.shape)})"
        )


# ------------------------------------------------------------------ from a logit to a weight


def exact_scores(logits: torch.Tensor) -> torch.Tensor:
    """Return sqrt(softplus(logits)) in the kernels' FP32 steps; NaN stays NaN.

    q = exp(-|x| / 4), h = q^2, u = h^2; the root is of log1p(u) / u, or of x + log1p(u) if x > 0.
    """
    magnitude = logits.abs().fmin(logits.new_tensor(340.0))
    n = fused(magnitude, -LOG2E_QUARTER, ROUND) - ROUND
    f = fused(magnitude, -LOG2E_QUARTER, -n)
    f = fused(magnitude, -LOG2E_QUARTER_REST, f)
    q = _polynomial(EXP2_TERMS, f)
    # q * 2^n
    q = (q.view(torch.int32) + n.int() * (1 << 23)).view(torch.float32)
    h = q * q
    u = h * h
    p = _polynomial(LOG1P_TERMS, u)
    is_negative = logits <= 0
    z = torch.where(is_negative, p, fused(u, p, logits.clamp(max=FP32_MAX)))
    # Through FP64: torch does not round an FP32 root correctly on every CPU.
    root = z.double().sqrt().float()
    return torch.where(is_negative, h * root, root)


def _polynomial(terms: tuple[float, ...], x: torch.Tensor) -> torch.Tensor:
    value = torch.full_like(x, terms[0])
    for term in terms[1:]:
        value = fused(value, x, term)
    return value


def fused(a: torch.Tensor, b: torch.Tensor | float, c: torch.Tensor | float) -> torch.Tensor:
    """Return a * b + c of FP32, rounded once to nearest even.

    The FP64 sum is rounded to odd. A second rounding, to FP32, then gives what one rounding of the
    exact sum would: FP64 has more than twice the bits and two to spare.
    """
    product = a.double() * _fp32(b, a).double()
    addend = _fp32(c, a).double()
    total = product + addend
    back = total - product
    error = (product - (total - back)) + (addend - back)
    bits = total.view(torch.int64)
    even_and_inexact = (error != 0) & total.isfinite() & (bits & 1 == 0)
    # The neighbour on the error's side: away from zero if the signs are equal.
    neighbour = bits + torch.where((error > 0) == (total > 0), 1, -1)
    return torch.where(even_and_inexact, neighbour, bits).view(torch.float64).float()


def _fp32(value: torch.Tensor | float, like: torch.Tensor) -> torch.Tensor:
    return value if isinstance(value, torch.Tensor) else like.new_tensor(value)


def _quotient(dividend: torch.Tensor, divisor: torch.Tensor) -> torch.Tensor:
    """Return dividend / divisor in the kernels' Newton steps: correctly rounded unless tiny."""
    guess = divisor.reciprocal()
    inverse = fused(fused(-divisor, guess, 1.0), guess, guess)
    product = dividend * inverse
    return fused(fused(-product, divisor, dividend), inverse, product)


def _weights(scores: torch.Tensor, scale: float, norm_topk_prob: bool) -> torch.Tensor:
    """Return score / (total + EPSILON) * scale of each row's chosen scores, in FP32."""
    total = torch.zeros_like(scores[:, 0])
    for rank in range(scores.shape[1]):
        total = total + scores[:, rank]
    divisor = total + _fp32(EPSILON, total) if norm_topk_prob else torch.ones_like(total)
    quotient = _quotient(scores, divisor[:, None].expand_as(scores))
    return quotient * _fp32(scale, scores) + 0.0


KERNELS = Arithmetic(scores=exact_scores, weights=_weights)
