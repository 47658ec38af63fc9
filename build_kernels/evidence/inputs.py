"""Make the inputs of a case, small integers for exact logits, and the reference's outputs."""

from __future__ import annotations

import zlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from dsv4_router_runtime.artifacts.manifest import Kernel
from dsv4_router_runtime.parameters import OPTIONS, PARAMETERS_OFF

from .cases import SHARED_SLOTS, VOCABULARY, Case
from .factors import draw_bias, draw_factors

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
        hidden, weight, logits, bias = draw_factors(generator, kernel, case)
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
            drawn["bias_vl"] = draw_bias(generator, case).float()
            drawn["image_mask"] = torch.arange(n) % 2 == 0
        if option == "image_ids":
            drawn["bias_vl"] = draw_bias(generator, case).float()
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


def _bf16_bits(values: Any) -> Array:
    import numpy as np
    import torch

    exact = values.bfloat16()
    if not torch.equal(exact.double().nan_to_num(7.0), values.nan_to_num(7.0)):
        raise ValueError("inputs are not exact in BF16")
    return np.ascontiguousarray(exact.view(torch.int16).numpy().view(np.uint16))
