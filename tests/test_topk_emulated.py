"""router_topk's PTX, executed on a CPU by the emulator, against the oracle."""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from typing import Any

import pytest

pytest.importorskip("elftools", reason="needs dsv4-router-builder")
pytest.importorskip("numpy", reason="needs the extra `verify`")
pytest.importorskip("torch", reason="the oracle needs the extra `torch`")

import numpy as np
import torch
from builds import ARCHS, topk_set
from numpy.typing import NDArray

from build_kernels.emulator import DeviceArray, Launch, Schedule, emulate
from build_kernels.specs import ARCHITECTURES, KERNELS, CudaSource
from dsv4_router_runtime.parameters import PARAMETERS_OFF
from dsv4_router_runtime.reference import (
    image_rows,
    ranking_margin,
    select_reference,
    selection_bias,
    tempered,
)

Array = NDArray[Any]

((SPEC, SOURCE),) = ((spec, spec.source) for spec in KERNELS if isinstance(spec.source, CudaSource))
SCALE = 2.5
CANARY_WEIGHT, CANARY_ID = 7.0, -7
INT32_MIN, INT32_MAX = -(2**31), 2**31 - 1
# One for each number of register groups, whole and ragged, and the smallest.
SHAPES = [(1, 1), (8, 8), (128, 3), (132, 4), (144, 6), (216, 6), (256, 6), (384, 6), (512, 8)]


@dataclass(frozen=True, kw_only=True)
class Options:
    """The reference's options, by its names."""

    bias_vl: Array | None = None
    image_mask: Array | None = None
    gate_temp: float = 1.0
    padding_mask: Array | None = None
    num_tokens: Array | None = None
    tid2eid: Array | None = None
    input_ids: Array | None = None
    to_physical: Array | None = None
    logical_count: Array | None = None
    num_shared_slots: int = 0
    shared_weight: float = 1.0
    norm_topk_prob: bool = True
    first_image_id: int = 0
    num_image_ids: int = 0
    forced_ids: Array | None = None
    forced_mask: Array | None = None
    ids_dtype: torch.dtype = torch.int32

    def for_reference(self) -> dict[str, Any]:
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        arrays = {k: torch.from_numpy(v) for k, v in values.items() if isinstance(v, np.ndarray)}
        return values | arrays


PLAIN = Options()


@pytest.fixture(scope="module")
def ptx(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    folder = topk_set(tmp_path_factory.mktemp("topk") / "artifacts")
    return {arch: (folder / f"{SPEC.name}.{arch}.ptx").read_text() for arch in ARCHS}


def route(
    ptx: dict[str, str],
    arch: str,
    logits: Array,
    bias: Array | None,
    top_k: int,
    options: Options = PLAIN,
    *,
    readable_rows: int | None = None,
    readable_experts: int = 0,
) -> tuple[Array, Array]:
    """Weights and ids of the emulated kernel; it must have no findings and keep to its outputs.

    readable_rows, readable_experts: where the allocation of the logits ends, and how much of the
    row after it has.
    """
    num_tokens, num_experts = logits.shape
    columns = top_k + options.num_shared_slots
    # Rows further apart than they are long, with NaN between: reading it would show.
    padded = np.full((num_tokens, num_experts + 5), np.nan, np.float32)
    padded[:, :num_experts] = logits
    if readable_rows is not None:
        readable = padded.reshape(-1)[: readable_rows * padded.shape[1] + readable_experts]
    else:
        readable = padded
    weights = np.full((num_tokens, columns + 2), CANARY_WEIGHT, np.float32)
    is_int64 = options.ids_dtype == torch.int64
    ids = np.full((num_tokens, columns + 1), CANARY_ID, np.int64 if is_int64 else np.int32)
    # What the kernel before may have written, and what is bound once.
    dependent = {
        "logits": readable,
        "image_mask": options.image_mask,
        "padding_mask": options.padding_mask,
        "num_valid_tokens": options.num_tokens,
        "forced_ids": options.forced_ids,
        "forced_mask": options.forced_mask,
    }
    bound = {
        "e_bias": bias,
        "bias_vl": options.bias_vl,
        "tid2eid": options.tid2eid,
        "input_ids": options.input_ids,
        "to_physical": options.to_physical,
        "logical_count": options.logical_count,
    }
    values: dict[str, Any] = {
        name: DeviceArray(name=name, data=data, read_only=True, dependent=name in dependent)
        for name, data in (dependent | bound).items()
        if data is not None
    }
    values |= {
        "out_weights": DeviceArray(name="out_weights", data=weights, dependent=True),
        "out_ids": DeviceArray(name="out_ids", data=ids, dependent=True),
        "num_tokens": num_tokens,
        "num_experts": num_experts,
        "top_k": top_k,
        "routed_scaling_factor": SCALE,
        "gate_temp": float(options.gate_temp),
        "norm_topk_prob": int(options.norm_topk_prob),
        "vocab_size": 0 if options.tid2eid is None else len(options.tid2eid),
        "input_ids_are_int64": int(getattr(options.input_ids, "dtype", None) == np.int64),
        "max_replicas": 0 if options.to_physical is None else options.to_physical.shape[1],
        "map_is_int64": int(getattr(options.to_physical, "dtype", None) == np.int64),
        "num_shared_slots": options.num_shared_slots,
        "shared_weight": float(options.shared_weight),
        "first_image_id": options.first_image_id,
        "num_image_ids": options.num_image_ids,
        "forced_ids_are_int64": int(getattr(options.forced_ids, "dtype", None) == np.int64),
        "forced_ids_stride": top_k,
        "ids_are_int64": int(is_int64),
        "logits_stride": padded.shape[1],
        "out_weights_stride": weights.shape[1],
        "out_ids_stride": ids.shape[1],
    }
    arguments = {"e_bias": 0} | PARAMETERS_OFF | values
    result = emulate(
        ptx[arch],
        Launch(grid=(-(-num_tokens // SPEC.token_tile), 1, 1), block=SOURCE.block, arch=arch),
        [arguments[parameter.name] for parameter in SPEC.parameters],
        Schedule(seed=num_experts),
    )
    assert result.findings == ()
    got_weights, got_ids = result.memory["out_weights"], result.memory["out_ids"]
    assert (got_weights[:, columns:] == CANARY_WEIGHT).all()
    assert (got_ids[:, columns:] == CANARY_ID).all()
    return got_weights[:, :columns], got_ids[:, :columns]


def check(
    ptx: dict[str, str],
    arch: str,
    logits: Array,
    bias: Array | None,
    top_k: int,
    options: Options = PLAIN,
    **allocation: int,
) -> Array:
    """Hold the kernel against the reference; returns the ids. allocation: as in `route`."""
    weights, ids = route(ptx, arch, logits, bias, top_k, options, **allocation)
    wanted, wanted_ids = select_reference(
        torch.from_numpy(logits).double(),
        None if bias is None else torch.from_numpy(bias),
        SCALE,
        top_k,
        **options.for_reference(),
    )
    np.testing.assert_array_equal(ids, wanted_ids.numpy())
    assert np.isfinite(weights).all()
    np.testing.assert_allclose(weights, wanted.numpy(), rtol=1e-6, atol=1e-30)
    return ids


def clear_gaussians(
    num_tokens: int,
    num_experts: int,
    top_k: int,
    bias_mean: float,
    options: Options = PLAIN,
) -> tuple[Array, Array]:
    """Rows whose first top_k + 1 keys are apart by more than FP32's rounding of a key near 8."""
    generator = np.random.default_rng(num_experts * 8 + top_k)
    bias = generator.normal(bias_mean, 0.05, num_experts).astype(np.float32)
    known = options.for_reference()
    telling = ("image_mask", "input_ids", "first_image_id", "num_image_ids")
    images = image_rows(num_tokens, torch.device("cpu"), *(known[name] for name in telling))
    row_bias = selection_bias(torch.from_numpy(bias), known["bias_vl"], images)
    row_bias = row_bias.expand(num_tokens, num_experts)
    rows: list = []
    while len(rows) < num_tokens:
        row = generator.normal(0, 3, (1, num_experts)).astype(np.float32)
        logits = tempered(torch.from_numpy(row).double(), options.gate_temp)
        if ranking_margin(logits, row_bias[len(rows)], top_k).item() > 1e-5:
            rows.append(row)
    return np.concatenate(rows), bias


@pytest.mark.quick(4)
@pytest.mark.parametrize(("num_experts", "top_k"), SHAPES)
@pytest.mark.parametrize("arch", ["sm_90a", "sm_100a"])
def test_real_bias_scale(ptx: dict[str, str], arch: str, num_experts: int, top_k: int) -> None:
    logits, bias = clear_gaussians(3, num_experts, top_k, 8.08)
    check(ptx, arch, logits, bias, top_k)


@pytest.mark.quick(2)
@pytest.mark.parametrize("num_tokens", [1, 4, 5, 9])
def test_every_number_of_tokens_in_a_block(ptx: dict[str, str], num_tokens: int) -> None:
    logits, bias = clear_gaussians(num_tokens, 160, 6, 0.0)
    check(ptx, "sm_100a", logits, bias, 6)


@pytest.mark.quick(2)
@pytest.mark.parametrize("top_k", range(1, 9))
def test_every_top_k(ptx: dict[str, str], top_k: int) -> None:
    logits, bias = clear_gaussians(2, 144, top_k, 0.0)
    check(ptx, "sm_90a", logits, bias, top_k)


@pytest.mark.quick(2)
@pytest.mark.parametrize(("num_experts", "top_k"), [(8, 8), (132, 4), (384, 6)])
def test_equal_keys_go_to_the_lower_expert(
    ptx: dict[str, str], num_experts: int, top_k: int
) -> None:
    bias = np.zeros(num_experts, np.float32)
    equal = np.full((1, num_experts), 1.25, np.float32)
    _, ids = route(ptx, "sm_90a", equal, bias, top_k)
    assert ids.tolist() == [list(range(top_k))]
    # Few distinct values, so that lanes and a lane's own slots tie with each other.
    generator = np.random.default_rng(num_experts)
    logits = generator.integers(-1, 2, (4, num_experts)).astype(np.float32)
    check(ptx, "sm_90a", logits, bias, top_k)


def test_nan_and_infinity(ptx: dict[str, str]) -> None:
    generator = np.random.default_rng(7)
    logits = generator.integers(-8, 8, (6, 132)).astype(np.float32)
    logits[0, 3:70] = np.nan
    logits[1, :] = np.nan
    logits[2, :] = -np.inf
    logits[3, 5:100] = np.inf
    logits[4, :] = np.nan
    logits[4, [7, 100]] = [-np.inf, 2.0]  # fewer numbers than top_k
    logits[5, ::2] = -np.inf
    check(ptx, "sm_90a", logits, np.zeros(132, np.float32), 6)
    check(ptx, "sm_100a", logits, np.zeros(132, np.float32), 6)


def test_extreme_logits(ptx: dict[str, str]) -> None:
    """Where naive formulas of softplus overflow, underflow or lose all digits."""
    scales = (-100.0, -88.0, -20.0, -16.6, -1.0, -1e-3, 1e-3, 20.0, 88.7, 100.0, 1e30)
    logits = np.outer(np.float32(scales), np.linspace(1.0, 1.7, 128, dtype=np.float32))
    check(ptx, "sm_90a", logits, np.zeros(128, np.float32), 8)


# ------------------------------------------------------------------ options


def wide_bias(seed: int, num_experts: int) -> Array:
    """Wide enough that it picks others than the e_bias of `clear_gaussians`."""
    return np.random.default_rng(seed).normal(8.0, 2.0, num_experts).astype(np.float32)


def a_table(vocab_size: int, num_experts: int, top_k: int) -> Array:
    """tid2eid [vocab_size, top_k]: distinct experts, in no order."""
    generator = np.random.default_rng(vocab_size)
    rows = [generator.permutation(num_experts)[:top_k] for _ in range(vocab_size)]
    return np.array(rows, np.int32)


def a_map(num_experts: int, replicas: int) -> dict[str, Any]:
    """Physical ids that tell expert and replica, with 1..replicas of them in use."""
    ids = 1000 * (1 + np.arange(num_experts))[:, None] + np.arange(replicas)
    count = 1 + np.arange(num_experts) % replicas
    return {"to_physical": ids.astype(np.int32), "logical_count": count.astype(np.int32)}


def mask(*flags: int) -> Array:
    return np.array(flags, np.bool_)


def scalar(value: int) -> Array:
    return np.array([value], np.int32)


@pytest.mark.quick(1)
@pytest.mark.parametrize("arch", ["sm_90a", "sm_100a"])
def test_rows_of_the_image_mask_select_with_bias_vl(ptx: dict[str, str], arch: str) -> None:
    options = Options(bias_vl=wide_bias(1, 144), image_mask=mask(0, 1, 1, 0, 1))
    logits, bias = clear_gaussians(5, 144, 6, 8.08, options)
    image_ids = check(ptx, arch, logits, bias, 6, options)
    text_ids = check(ptx, arch, logits, bias, 6, replace(options, image_mask=None))
    differ = (image_ids != text_ids).any(1)
    np.testing.assert_array_equal(differ, options.image_mask)


@pytest.mark.quick(1)
@pytest.mark.parametrize("arch", ["sm_90a", "sm_100a"])
@pytest.mark.parametrize(("num_experts", "top_k"), SHAPES)
def test_gate_temp(ptx: dict[str, str], arch: str, num_experts: int, top_k: int) -> None:
    options = Options(gate_temp=float(np.float32(0.7)))
    logits, bias = clear_gaussians(2, num_experts, top_k, 0.0, options)
    check(ptx, arch, logits, bias, top_k, options)


@pytest.mark.quick(2)
@pytest.mark.parametrize("gate_temp", [1e-38, 1e-3, 1.7, 3.0, 1e30])
def test_gate_temp_divides_before_nan_and_infinity_count(
    ptx: dict[str, str], gate_temp: float
) -> None:
    """Quotients round, overflow and underflow as IEEE's do."""
    generator = np.random.default_rng(3)
    # So low that the last bit of a quotient is several times the tolerance of its score.
    logits = generator.integers(-150, 8, (4, 70)).astype(np.float32)
    logits[1, ::3] = np.nan
    logits[2, [5, 6, 69]] = [np.inf, -np.inf, np.nan]
    logits[3] = 1e-40
    # The table decides, whatever is left of the logits; then biases so far apart that they do.
    table = a_table(9, 70, 8)
    ids = np.array([0, 3, 8, 5], np.int32)
    options = Options(gate_temp=float(np.float32(gate_temp)), tid2eid=table, input_ids=ids)
    check(ptx, "sm_90a", logits, None, 8, options)
    bias = (np.arange(70) % 7 * 1e20).astype(np.float32)
    check(ptx, "sm_100a", logits, bias, 1, Options(gate_temp=options.gate_temp))


def test_logits_that_division_rounds_together_are_ties(ptx: dict[str, str]) -> None:
    """Neighbours that a multiplication with 1 / gate_temp tells apart, the larger one second."""
    gate_temp = np.float32(1.7)
    logits = np.float32(-120) + np.arange(256, dtype=np.float32) * np.float32(2**-17)
    quotients, products = logits / gate_temp, logits * (1 / gate_temp)
    together = np.flatnonzero((np.diff(quotients) == 0) & (np.diff(products) != 0))[:4]
    row = np.stack([logits[together], logits[together + 1]], 1).reshape(1, 8)
    options = Options(gate_temp=float(gate_temp))
    ids = check(ptx, "sm_90a", row, np.zeros(8, np.float32), 8, options)
    assert ids.tolist() == [[6, 7, 4, 5, 2, 3, 0, 1]]


def test_rows_of_the_padding_mask_are_not_read(ptx: dict[str, str]) -> None:
    logits, bias = clear_gaussians(9, 132, 4, 0.0)
    padding = mask(0, 1, 0, 0, 1, 0, 1, 1, 1)
    logits[padding] = np.nan
    options = Options(padding_mask=padding, num_shared_slots=1)
    # The last three rows lie beyond the allocation: reading one is a finding.
    ids = check(ptx, "sm_100a", logits, bias, 4, options, readable_rows=6)
    assert (ids[padding] == -1).all()


@pytest.mark.quick(3)
@pytest.mark.parametrize(
    ("num_valid", "rows"), [(0, 1), (1, 1), (3, 3), (6, 6), (9, 6), (-1, 1), (INT32_MIN, 1)]
)
def test_rows_beyond_num_tokens_are_not_read(
    ptx: dict[str, str], num_valid: int, rows: int
) -> None:
    logits, bias = clear_gaussians(6, 132, 4, 0.0)
    logits[max(num_valid, 0) :] = np.nan
    options = Options(num_tokens=scalar(num_valid))
    ids = check(ptx, "sm_90a", logits, bias, 4, options, readable_rows=rows)
    assert (ids[max(num_valid, 0) :] == -1).all()


def test_a_mask_and_a_count_pad_together(ptx: dict[str, str]) -> None:
    logits, bias = clear_gaussians(8, 132, 4, 0.0)
    options = Options(padding_mask=mask(0, 1, 0, 0, 1, 0, 0, 1), num_tokens=scalar(6))
    ids = check(ptx, "sm_90a", logits, bias, 4, options)
    assert (ids[:, 0] == -1).tolist() == [False, True, False, False, True, False, True, True]


@pytest.mark.quick(2)
@pytest.mark.parametrize("ids_type", [np.int32, np.int64])
@pytest.mark.parametrize(("num_experts", "top_k"), [(8, 8), (132, 6), (512, 1)])
def test_hash_rows_take_ids_from_the_table(
    ptx: dict[str, str], ids_type: type, num_experts: int, top_k: int
) -> None:
    table = a_table(50, num_experts, top_k)
    tokens: Array = np.array([0, 49, 7, 7, 23, 1], ids_type)
    logits = np.random.default_rng(5).normal(0, 3, (6, num_experts)).astype(np.float32)
    logits[2, table[7, 0]] = np.nan
    logits[4, table[23, -1]] = np.inf
    options = Options(tid2eid=table, input_ids=tokens)
    ids = check(ptx, "sm_90a", logits, None, top_k, options)
    np.testing.assert_array_equal(ids, table[tokens])


def test_hash_rows_read_the_logits_of_their_experts_alone(ptx: dict[str, str]) -> None:
    """The allocation ends behind the last one of them; reading on is a finding."""
    table = np.array([[3, 0, 7], [2, 5, 1]], np.int32)
    logits = np.arange(16, dtype=np.float32).reshape(2, 8)
    options = Options(tid2eid=table, input_ids=np.array([0, 1], np.int64))
    logits[0, [1, 2, 4, 5, 6]] = np.nan
    logits[1, [0, 3, 4]] = np.nan
    check(ptx, "sm_100a", logits, None, 3, options, readable_rows=1, readable_experts=6)


@pytest.mark.parametrize(
    ("ids_type", "outside"),
    [
        (np.int32, [-1, 20, 21, INT32_MAX, INT32_MIN]),
        # The low 32 bits of these are in the table.
        (np.int64, [-1, 20, 2**32 + 1, -(2**63), 2**63 - 1, 2**63 - 2**32 + 3, -(2**32)]),
    ],
)
def test_a_token_id_outside_the_table_pads_its_row(
    ptx: dict[str, str], ids_type: type, outside: list[int]
) -> None:
    tokens: Array = np.array([19, 0, *outside], ids_type)
    logits = np.full((len(tokens), 40), np.nan, np.float32)
    logits[:2] = np.random.default_rng(6).normal(0, 3, (2, 40))
    options = Options(tid2eid=a_table(20, 40, 6), input_ids=tokens, num_shared_slots=2)
    ids = check(ptx, "sm_90a", logits, None, 6, options, readable_rows=2)
    assert (ids[2:] == -1).all()
    assert (ids[:2] >= 0).all()


def test_whatever_the_table_holds_reads_stay_inside(ptx: dict[str, str]) -> None:
    table = np.array([[-1, 40, 3, INT32_MAX, INT32_MIN, 39]], np.int32)
    logits = np.zeros((1, 40), np.float32)
    options = Options(tid2eid=table, input_ids=np.zeros(1, np.int32), **a_map(40, 2))
    weights, _ = route(ptx, "sm_90a", logits, None, 6, options)
    assert np.isfinite(weights).all()


@pytest.mark.quick(2)
@pytest.mark.parametrize("arch", ["sm_90a", "sm_100a"])
@pytest.mark.parametrize("replicas", [1, 2, 5])
def test_physical_ids_replace_logical_ones(ptx: dict[str, str], arch: str, replicas: int) -> None:
    logits, bias = clear_gaussians(9, 144, 6, 0.0)
    options = Options(num_shared_slots=1, **a_map(144, replicas))
    ids = check(ptx, arch, logits, bias, 6, options)
    assert (ids[:, :6] >= 1000).all()
    assert (ids[:, 6] == 144).all()


def test_whatever_the_map_holds_reads_stay_inside(ptx: dict[str, str]) -> None:
    """Servers rewrite map and counts in place; a count is held within 1..replicas."""
    logits, bias = clear_gaussians(9, 8, 8, 0.0)
    options = Options(**a_map(8, 3))
    count = np.array([0, -1, INT32_MIN, INT32_MAX, 4, 3, 1, 2], np.int32)
    check(ptx, "sm_100a", logits, bias, 8, replace(options, logical_count=count))
    numbers = np.random.default_rng(8).integers(INT32_MIN, INT32_MAX, (8, 3)).astype(np.int32)
    check(ptx, "sm_100a", logits, bias, 8, replace(options, to_physical=numbers))


@pytest.mark.parametrize("dtype", [np.int32, np.int64])
def test_rows_of_image_token_ids_select_with_bias_vl(ptx: dict[str, str], dtype: type) -> None:
    tokens = np.array([6, 7, 9, 10, -1, 2**31 - 1, 8], dtype)
    if dtype is np.int64:
        tokens[:2] = 2**32 + 7, 7 - 2**32
    options = Options(
        bias_vl=wide_bias(1, 144), input_ids=tokens, first_image_id=7, num_image_ids=3
    )
    logits, bias = clear_gaussians(7, 144, 6, 0.0, options)
    ids = check(ptx, "sm_90a", logits, bias, 6, options)
    assert (ids != check(ptx, "sm_90a", logits, bias, 6, replace(options, num_image_ids=0))).any()
    mixed = replace(options, image_mask=mask(0, 0, 1, 0, 0, 0, 0), tid2eid=a_table(9, 144, 6))
    check(ptx, "sm_90a", logits, None, 6, mixed)


@pytest.mark.parametrize("dtype", [np.int32, np.int64])
def test_forced_rows_get_the_callers_ids(ptx: dict[str, str], dtype: type) -> None:
    """Rows 2 to 5 are no choice: below, beyond, twice, and beyond but for the low word."""
    forced = np.array([[3, 1, 2], [0, 5, 4], [-1, 0, 1], [0, 40, 1], [7, 2, 7], [1, 2, 3]], dtype)
    if dtype is np.int64:
        forced[5, 0] += 2**32
    logits, bias = clear_gaussians(6, 40, 3, 0.0)
    masked = Options(forced_ids=forced, forced_mask=mask(1, 0, 1, 1, 1, 1), **a_map(40, 2))
    for options in (masked, Options(forced_ids=forced, padding_mask=mask(1, 0, 0, 0, 0, 0))):
        ids = check(ptx, "sm_90a", logits, bias, 3, options)
        assert (ids[2:5] == -1).all()


def test_a_map_in_int64(ptx: dict[str, str]) -> None:
    given = {name: array.astype(np.int64) for name, array in a_map(40, 3).items()}
    given["to_physical"] += 2**33
    logits, bias = clear_gaussians(5, 40, 6, 0.0)
    check(ptx, "sm_90a", logits, bias, 6, Options(**given))


def test_shared_experts_have_a_weight_of_their_own(ptx: dict[str, str]) -> None:
    logits, bias = clear_gaussians(3, 40, 6, 0.0)
    options = Options(num_shared_slots=2, shared_weight=float(np.float32(0.4)))
    check(ptx, "sm_90a", logits, bias, 6, options)


@pytest.mark.quick(1)
@pytest.mark.parametrize(("top_k", "num_shared_slots"), [(1, 1), (6, 2), (8, 8)])
def test_shared_experts_have_columns(
    ptx: dict[str, str], top_k: int, num_shared_slots: int
) -> None:
    logits, bias = clear_gaussians(5, 132, top_k, 0.0)
    options = Options(num_shared_slots=num_shared_slots)
    weights, ids = route(ptx, "sm_90a", logits, bias, top_k, options)
    assert ids[:, top_k:].tolist() == [[132 + j for j in range(num_shared_slots)]] * 5
    assert (weights[:, top_k:] == 1.0).all()
    check(ptx, "sm_90a", logits, bias, top_k, options)


@pytest.mark.parametrize("top_k", [1, 6])
def test_weights_that_are_not_normalised(ptx: dict[str, str], top_k: int) -> None:
    logits, bias = clear_gaussians(3, 160, top_k, 8.08)
    check(ptx, "sm_90a", logits, bias, top_k, Options(norm_topk_prob=False))


def test_int64_ids(ptx: dict[str, str]) -> None:
    logits, bias = clear_gaussians(5, 144, 6, 0.0)
    options = Options(
        ids_dtype=torch.int64, num_shared_slots=2, padding_mask=mask(0, 0, 1, 0, 0), **a_map(144, 2)
    )
    check(ptx, "sm_90a", logits, bias, 6, options)


def drawn_options(
    generator: np.random.Generator, num_tokens: int, num_experts: int, top_k: int
) -> Options:
    """Each option on or off by the toss of a coin."""

    def coin() -> bool:
        return bool(generator.integers(2))

    options = Options(
        gate_temp=float(np.float32(generator.choice([1.0, 0.6, 2.3]))),
        padding_mask=generator.random(num_tokens) < 0.3 if coin() else None,
        num_tokens=scalar(int(generator.integers(-1, num_tokens + 2))) if coin() else None,
        num_shared_slots=int(generator.integers(9)) if coin() else 0,
        norm_topk_prob=coin(),
        ids_dtype=torch.int64 if coin() else torch.int32,
    )
    if coin():
        options = replace(options, **a_map(num_experts, int(generator.integers(1, 5))))
    if coin():
        ids = generator.integers(-1, 12, num_tokens).astype(np.int64 if coin() else np.int32)
        return replace(options, tid2eid=a_table(11, num_experts, top_k), input_ids=ids)
    if coin():
        image = generator.random(num_tokens) < 0.5 if coin() else None
        return replace(options, bias_vl=wide_bias(num_experts, num_experts), image_mask=image)
    return options


@pytest.mark.quick(4)
@pytest.mark.parametrize("seed", range(24))
def test_options_combined(ptx: dict[str, str], seed: int) -> None:
    generator = np.random.default_rng(seed)
    num_experts, top_k = SHAPES[seed % len(SHAPES)]
    num_tokens = int(generator.integers(1, 10))
    options = drawn_options(generator, num_tokens, num_experts, top_k)
    logits, bias = clear_gaussians(num_tokens, num_experts, top_k, 8.08, options)
    arch = ARCHITECTURES[seed % len(ARCHITECTURES)].name
    check(ptx, arch, logits, None if options.tid2eid is not None else bias, top_k, options)
