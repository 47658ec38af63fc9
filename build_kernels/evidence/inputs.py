"""Make the inputs of a case, small integers for exact logits, and the reference's outputs."""

from __future__ import annotations

import math
import zlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from dsv4_router_runtime.artifacts.manifest import Kernel
from dsv4_router_runtime.parameters import OPTIONS, PARAMETERS_OFF

from .cases import SHARED_SLOTS, VOCABULARY, Case

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Array = NDArray[Any]

# The least difference of neighbouring keys that FP32 rounding cannot reverse; see `make_inputs`.
CLEAR_MARGIN = 1e-4
SCALE = 2.5
SHARED_WEIGHT = 0.4
# Their keys may differ by one unit in the last place: `exact.py` gives the ids and the weights.
EXACT_KINDS = ("dense", "near")
# Token ids of images, of VOCABULARY.
FIRST_IMAGE_ID, NUM_IMAGE_IDS = 3, 4
# About the lanes of a warp: above 32 a kernel finds the replica in another way.
REPLICAS, FEW_REPLICAS = (36, 33, 32), 3
# 2 is the neighbour of 1, the temperature that divides nothing.
TEMPERATURES = (1.5, 2.0, 0.75)


class UnclearError(ValueError):
    """A case of so many keys that some two are always too near each other for FP32."""


@dataclass(frozen=True, kw_only=True)
class Inputs:
    """A case's arrays and the reference's outputs.

    tensors: hidden_states [N, K] and W_gate [K, E] as BF16 bits, or logits [N, E] FP32; and the
    options' tensors by the kernels' parameter names. numbers: the options' scalar parameters.
    weights and ids, [N, columns]. logical_ids [N, top_k]. logits FP64 [N, E], exact.
    weights are FP64; of a kind in EXACT_KINDS they are FP32, with the kernels' bits.
    """

    case: Case
    tensors: Mapping[str, Array]
    weights: Array
    ids: Array
    logical_ids: Array
    logits: Array
    numbers: Mapping[str, int | float] = field(default_factory=dict)


def make_inputs(kernel: Kernel, case: Case) -> Inputs:
    """Draw inputs by a seed of the case's own, again until no key is near its neighbour.

    Equal keys are kept: the tie rule decides them. Rounding could reverse keys that differ by less
    than CLEAR_MARGIN, so such inputs are drawn again, unless the exact oracle judges them.
    """
    import torch

    from dsv4_router_runtime.exact import exact_selection
    from dsv4_router_runtime.reference import select_reference

    generator = torch.Generator().manual_seed(zlib.crc32(f"{kernel.name} {case}".encode()))
    hashed = kernel.role == "hash" or "table" in case.options
    options = _draw_options(generator, case, hashed=hashed)
    stray = options.pop("stray", None)
    hidden, weight, logits, bias = _draw_clear(generator, kernel, case, options, hashed=hashed)
    padded = _padded(case, options)
    for rows in (hidden, logits):
        if rows is not None:
            rows[padded] = torch.nan
    is_exact = case.kind in EXACT_KINDS
    select = exact_selection if is_exact else select_reference
    given = (logits.float() if is_exact else logits, None if hashed else bias, SCALE, case.top_k)
    expected = select(*given, **options)
    unmapped = {**options, "to_physical": None, "logical_count": None, "num_shared_slots": 0}
    unmapped["ids_dtype"] = torch.int32
    logical = select(*given, **unmapped)
    tensors = {} if hashed else {"e_bias": bias.float().numpy()}
    if stray is not None:
        options["tid2eid"] = stray
    option_tensors, numbers = _kernel_options(options)
    tensors |= option_tensors
    if hidden is None or weight is None:
        tensors["logits"] = logits.float().numpy()
    else:
        tensors["hidden_states"] = _bf16_bits(hidden)
        tensors["W_gate"] = _bf16_bits(weight)
    weights, ids = (outputs.numpy() for outputs in expected)
    return Inputs(
        case=case,
        tensors=tensors,
        weights=weights,
        ids=ids,
        logical_ids=logical[1].numpy(),
        logits=logits.numpy(),
        numbers=numbers,
    )


def _draw_clear(
    generator: Any, kernel: Kernel, case: Case, options: Mapping[str, Any], *, hashed: bool
) -> tuple[Any, Any, Any, Any]:
    """Return the first of 100 draws whose keys FP32 rounding cannot reverse; see `_draw`."""
    import torch

    from dsv4_router_runtime.reference import ranking_margin, selection_bias, tempered

    images = options.get("bias_vl"), _image_rows(case, options)
    for _ in range(100):
        hidden, weight, logits, bias = _draw(generator, kernel, case)
        if case.kind in EXACT_KINDS:
            return hidden, weight, logits, bias
        keyed = tempered(logits, options.get("gate_temp", 1.0))
        margin = ranking_margin(keyed, selection_bias(bias, *images), case.top_k)
        if hashed:
            # Only an image row of a hash layer is ranked.
            margin = margin.masked_fill(~images[1], torch.inf)
        if float(margin.min()) > CLEAR_MARGIN:
            return hidden, weight, logits, bias
    raise UnclearError(f"{case}: no inputs with clear margins in 100 draws")


def _draw_options(generator: Any, case: Case, *, hashed: bool) -> dict[str, Any]:
    """Draw the reference's keywords for a case's options.

    A row of tid2eid holds distinct experts. An unknown token id is negative or past the table.
    """
    import torch

    n, e = case.num_tokens, case.num_experts
    int32 = torch.int32

    def integers(low: int, high: int, *shape: int) -> torch.Tensor:
        return torch.randint(low, high + 1, shape, generator=generator)

    drawn: dict[str, Any] = {}
    if hashed:
        rows = [torch.randperm(e, generator=generator)[: case.top_k] for _ in range(VOCABULARY)]
        ids = integers(0, VOCABULARY - 1, n)
        if "unknown" in case.options:
            beyond = [2**32 + 3] if "int64" in case.options else []
            outside = torch.tensor([VOCABULARY, -1, *beyond])
            known = torch.arange(n) % 4 == 3
            ids = torch.where(known, ids, outside.repeat(n)[:n])
        drawn["tid2eid"] = torch.stack(rows).to(int32)
        if "stray" in case.options:
            # Taken for the last expert, as an unsigned number.
            experts = torch.tensor([e, 2**31 - 1])[torch.arange(VOCABULARY) % 2]
            drawn["stray"] = drawn["tid2eid"].clone()
            drawn["stray"][:, case.top_k // 2] = experts.to(int32)
            drawn["tid2eid"][:, case.top_k // 2] = e - 1
        drawn["input_ids"] = ids if "int64" in case.options else ids.to(int32)
    elif "image_ids" in case.options:
        ids = integers(-1, VOCABULARY, n)
        drawn["input_ids"] = ids if "int64" in case.options else ids.to(int32)
    for option in case.options:
        if option == "images":
            drawn["bias_vl"] = _draw_bias(generator, case).float()
            drawn["image_mask"] = torch.arange(n) % 2 == 0
        if option == "image_ids":
            drawn["bias_vl"] = _draw_bias(generator, case).float()
            drawn |= {"first_image_id": FIRST_IMAGE_ID, "num_image_ids": NUM_IMAGE_IDS}
        if option == "forced":
            drawn["forced_ids"] = _draw_forced(generator, case)
            drawn["forced_mask"] = torch.arange(n) % 2 == 1
        if option == "all_forced":
            drawn["forced_ids"] = _draw_forced(generator, case)
        if option == "temperature":
            drawn["gate_temp"] = _one_of(TEMPERATURES, case)
        if option == "padding":
            drawn["padding_mask"] = torch.arange(n) % 3 == 1
        if option == "count":
            drawn["num_tokens"] = torch.tensor([n - 2], dtype=int32)
        if option == "empty":
            drawn["num_tokens"] = torch.tensor([0], dtype=int32)
        if option == "physical":
            drawn |= _draw_map(generator, case)
        if option == "shared":
            drawn |= {"num_shared_slots": SHARED_SLOTS, "shared_weight": SHARED_WEIGHT}
        if option == "unnormed":
            drawn["norm_topk_prob"] = False
        if option == "int64":
            drawn["ids_dtype"] = torch.int64
    return drawn


def _one_of(values: tuple[Any, ...], case: Case) -> Any:
    """Return the value for a case, without a draw."""
    return values[(case.num_tokens + case.top_k) % len(values)]


def _draw_map(generator: Any, case: Case) -> dict[str, Any]:
    """Draw to_physical and logical_count: beyond both ends, at them and between for neighbours.

    Of an int64 the high word is noise: kernels take the low one.
    """
    import torch

    experts = case.num_experts
    replicas = FEW_REPLICAS if "few" in case.options else _one_of(REPLICAS, case)
    physical = torch.randint(0, 1 << 20, (experts, replicas), generator=generator)
    ends = torch.tensor([-(2**31), 0, 1, 2, replicas, replicas + 1, 2**31 - 1])
    count = ends[torch.randint(0, len(ends), (experts,), generator=generator)]
    if "mapped64" in case.options:
        high = torch.randint(-5, 5, (experts,), generator=generator) << 32
        return {
            "to_physical": physical + high[:, None],
            "logical_count": (count & 2**32 - 1) + high,
        }
    return {"to_physical": physical.to(torch.int32), "logical_count": count.to(torch.int32)}


def _draw_forced(generator: Any, case: Case) -> Any:
    """Draw [N, top_k] experts, but one twice in rows 3, 7, ... and none in rows 5, 13, ...

    The place of the one that comes twice is the next in each such row.
    """
    import torch

    rows = [torch.randperm(case.num_experts, generator=generator) for _ in range(case.num_tokens)]
    ids = torch.stack(rows)[:, : case.top_k].contiguous()
    if case.top_k > 1:
        for number, row in enumerate(ids[3::4]):
            first = (number + case.num_experts) % (case.top_k - 1)
            second = torch.randint(first + 1, case.top_k, (), generator=generator)
            row[second] = row[first]
    ids[5::8, case.top_k // 2] = 2**32 if "int64" in case.options else case.num_experts
    return ids if "int64" in case.options else ids.to(torch.int32)


def _image_rows(case: Case, options: Mapping[str, Any]) -> Any:
    """Return bool [N]: the rows that image_mask or their token ids make image rows."""
    import torch

    rows = options.get("image_mask", torch.zeros(case.num_tokens, dtype=torch.bool))
    if "num_image_ids" in options:
        place = options["input_ids"] - options["first_image_id"]
        rows = rows | (place >= 0) & (place < options["num_image_ids"])
    return rows


def _padded(case: Case, options: Mapping[str, Any]) -> Any:
    import torch

    from dsv4_router_runtime.reference import padded_rows

    masks = options.get("padding_mask"), options.get("num_tokens")
    return padded_rows(case.num_tokens, torch.device("cpu"), *masks)


def _kernel_options(options: Mapping[str, Any]) -> tuple[dict[str, Array], dict[str, int | float]]:
    """Return the options as kernels take them: the tensors; the numbers, with tensors' extents."""
    tensors: dict[str, Array] = {}
    numbers: dict[str, int | float] = {}
    for item in OPTIONS:
        value = options.get(item.keyword)
        if value is None:
            continue
        if item.tensor is None:
            numbers[item.name] = value
            continue
        array = value.numpy()
        tensors[item.name] = array.view(item.element_type) if "bool" in item.dtypes else array
        extents = zip(item.shape, array.shape, strict=True)
        numbers |= {name: extent for name, extent in extents if name in PARAMETERS_OFF}
    return tensors, numbers


def _draw_bias(generator: Any, case: Case) -> Any:
    """Draw FP64 biases [E] for the kind of inputs."""
    import torch

    experts = case.num_experts
    if case.kind in ("ties", *_NEIGHBOURS):
        return torch.zeros(experts).double()
    if case.kind == "near":
        # Exact sums, and keys of both signs.
        return -torch.ones(experts).double()
    if case.kind == "low":
        # No two keys alike, and all below that of a logit of 0 without a bias.
        return -(1 + torch.randperm(experts, generator=generator)).double() / 4
    if case.kind == "biased":
        return 8.0 + torch.randint(-16, 17, (experts,), generator=generator).double() / 64
    return torch.randint(-8, 9, (experts,), generator=generator).double() / 4


def _draw(generator: Any, kernel: Kernel, case: Case) -> tuple[Any, Any, Any, Any]:
    """Draw hidden_states, W_gate (None for a kernel that reads logits), FP64 logits, e_bias."""
    import torch

    n, e, k = case.num_tokens, case.num_experts, case.k

    def integers(low: int, high: int, *shape: int) -> torch.Tensor:
        return torch.randint(low, high + 1, shape, generator=generator).double()

    bias = _draw_bias(generator, case)
    if kernel.role == "select":
        logits = integers(-6, 6, n, e)
        if case.kind == "extreme":
            logits *= 40
        if case.kind == "ties":
            logits[:] = 1.0
        if case.kind in _NEIGHBOURS:
            logits = _crowded(n, e, case.kind)
        if case.kind == "near":
            logits = _near(generator, n, e)
        if case.kind == "dense":
            logits = 3 * torch.randn(n, e, generator=generator).double()
            logits = logits.float().double()
        if case.kind == "low":
            logits[:] = -100.0 - torch.arange(e) % 8
        if case.kind == "nans":
            logits[integers(0, 1, n, e) == 1] = torch.nan
            logits[1::2] = torch.nan
            logits[1::2, _few(generator, e)] = torch.inf
        if case.kind == "nan":
            logits[:, 1] = torch.nan
            logits[-1, 0] = torch.inf
        return None, None, logits, bias
    # Sparse, so that logits stay within a few units at any K.
    sparse = (torch.rand(n, k, generator=generator) < 16 / k).double()
    hidden, weight = integers(-1, 1, n, k) * sparse, integers(-2, 2, k, e)
    if case.kind == "extreme":
        # A table may choose an expert with a logit below -174, whose score would be denormal.
        hidden *= 5 if kernel.role == "hash" else 16
    if case.kind == "ties":
        weight[:] = weight[:, :1]
    if case.kind in _NEIGHBOURS:
        hidden[:], weight[:] = 0.0, 0.0
        hidden[:, :n], weight[:n] = torch.eye(n), _crowded(n, e, case.kind)
    if case.kind == "near":
        hidden, weight = _factors_of(generator, _near(generator, n, e), k)
    if case.kind == "dense":
        # Logits of a few units at any K, and so exact: whole numbers of so small a power of two.
        hidden = 2.0 * integers(0, 1, n, k) - 1
        weight = integers(1, 3, k, e) * (2 * integers(0, 1, k, e) - 1)
        weight *= 2.0 ** -round(math.log2(k) / 2)
    if case.kind == "low":
        hidden[:], weight[:] = 0.0, 0.0
        hidden[:, 0], weight[0] = 1.0, -100.0 - torch.arange(e) % 8
    if case.kind == "nans":
        weight[:, integers(0, 1, e) == 1] = torch.nan
        # 0 times infinity is NaN.
        weight[0] *= 0
        weight[0, _few(generator, e)] = 1.0
        hidden[:, 0] = 0.0
        hidden[1::2] = 0.0
        hidden[1::2, 0] = torch.inf
    if case.kind == "nan":
        weight[:, 1] = torch.nan
        hidden[-1, :] = 0.0
        hidden[-1, 0] = torch.inf
        weight[0] = weight[0].abs() + 1
    return hidden, weight, hidden @ weight, bias


_NEIGHBOURS = ("crowded", "spread")
# About 0, where each power of exp(-|x|) counts; where log2(exp(x / 4)) is between whole numbers;
# and far from both.
# 500 is beyond the clamp of exp(-|x|).
_NEAR = (0.03, 1.33, -1.4, -0.06, -4.1, 4.2, 500.0, -30.0)
_NUM_NEAR = 16


def _few(generator: Any, e: int) -> Any:
    """Return three experts, fewer than most cases choose."""
    import torch

    return torch.randperm(e, generator=generator)[:3]


def _near(generator: Any, n: int, e: int) -> Any:
    """Return FP64 [n, e]: in each row 16 experts, an equal part of all each, are the best by far.

    Their logits are FP32 numbers that follow each other, in random order, so that a score that is
    off by a unit in the last place changes the ranking.
    """
    import torch

    first = int(torch.randint(len(_NEAR), (1,), generator=generator))
    logits = torch.full((n, e), -40.0).double()
    count = min(_NUM_NEAR, e)
    for row in range(n):
        about = _NEAR[(first + row) % len(_NEAR)]
        # FP32's distance of two numbers there, but no less than for 1: about 0 a score has others.
        step = 2.0 ** (math.frexp(max(abs(about), 1.0))[1] - 24)
        within = torch.rand(count, generator=generator) * (e / count)
        experts = (torch.arange(count) * (e / count) + within).long().clamp(max=e - 1)
        order = torch.randperm(count, generator=generator)
        logits[row, experts] = round(about / step) * step + order.double() * step
    return logits


def _factors_of(generator: Any, logits: Any, k: int) -> tuple[Any, Any]:
    """Return hidden_states [N, K] and W_gate [K, E] whose products are FP32 logits, in any order.

    Row r has three ones, at random places of K, where W_gate holds 8 bits of its logits each.
    """
    import torch

    n, e = logits.shape
    places = torch.randperm(k, generator=generator)[: 3 * n].view(n, 3)
    hidden, weight = torch.zeros(n, k).double(), torch.zeros(k, e).double()
    rest = logits.clone()
    for piece in range(3):
        # The sign, the exponent and the first bits of the rest: a BF16 number.
        cut = (rest.float().view(torch.int32) & -(1 << 16)).view(torch.float32).double()
        hidden[torch.arange(n), places[:, piece]] = 1.0
        weight[places[:, piece]] = cut
        rest -= cut
    return hidden, weight


def _crowded(n: int, e: int, kind: str) -> Any:
    """Return FP64 [n, e]: the best twelve logits of each row are neighbours, some of them equal.

    Row 0 has equal ones with a larger and a smaller one between them, row 1 in twos from an odd
    expert on, so of two lanes, row 2 none, row 3 all. `spread`: a twelfth of all experts apart.
    """
    import torch

    rows = (
        (8, 1, 9, 8, 1, 1, 7, 6, 4, 1, 5, 4),
        [12 - i // 2 for i in range(12)],
        range(12, 0, -1),
        [8] * 12,
    )
    best = torch.tensor([list(row) for row in rows])
    row, expert = torch.arange(n)[:, None], torch.arange(e)
    place, apart = (expert - 5 * row) % e, max(1, e // 12) if kind == "spread" else 1
    is_best = (place % apart == 0) & (place < 12 * apart)
    return torch.where(is_best, best[row % 4, (place // apart).clamp(max=11)], -1).double()


def _bf16_bits(values: Any) -> Array:
    import numpy as np
    import torch

    exact = values.bfloat16()
    if not torch.equal(exact.double().nan_to_num(7.0), values.nan_to_num(7.0)):
        raise ValueError("inputs are not exact in BF16")
    return np.ascontiguousarray(exact.view(torch.int16).numpy().view(np.uint16))
