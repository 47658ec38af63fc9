"""The outputs of an emulated launch: with canaries beside them, and against the reference."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import TYPE_CHECKING, Any

from .cases import Case
from .inputs import Inputs

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from dsv4_router_runtime.artifacts.kernel import Kernel

    Array = NDArray[Any]

WEIGHT_TOLERANCE = 1e-6
CANARY_FLOAT = -12345.0
# As BF16 bits cut off CANARY_FLOAT.
CANARY_BFLOAT16 = -12288.0
CANARY_INT = -77
# Its high word is not -1, that of a padded row's id.
CANARY_INT64 = 0x5A5A_0000_0000 + 77
# Different, so that one output's stride is wrong for the other output.
WEIGHT_CANARIES = 3
ID_CANARIES = 5
LOGICAL_CANARIES = 2
LOGIT_CANARIES = 6
FORCED_CANARIES = 4


def output_strides(case: Case) -> dict[str, int]:
    """Return the row strides of all outputs, in elements, by parameter."""
    return {
        "out_weights_stride": case.columns + WEIGHT_CANARIES,
        "out_ids_stride": case.columns + ID_CANARIES,
        "out_logical_ids_stride": case.top_k + LOGICAL_CANARIES,
        "out_logits_stride": case.num_experts + LOGIT_CANARIES,
    }


def new_outputs(case: Case) -> dict[str, Array]:
    """Return the outputs of a case, full of canaries, by parameter."""
    import numpy as np

    def full(name: str, canary: float, dtype: Any) -> Array:
        return np.full((case.num_tokens, output_strides(case)[f"{name}_stride"]), canary, dtype)

    weights = full("out_weights", CANARY_FLOAT, np.float32)
    if "bfloat16" in case.options:
        weights = (weights.view(np.uint32) >> 16).astype(np.uint16)
    wide = "int64" in case.options
    ids = full("out_ids", CANARY_INT64 if wide else CANARY_INT, np.int64 if wide else np.int32)
    outputs = {"out_weights": weights, "out_ids": ids}
    if "logical" in case.options:
        outputs["out_logical_ids"] = full("out_logical_ids", CANARY_INT, np.int32)
    if "logits" in case.options:
        outputs["out_logits"] = full("out_logits", CANARY_FLOAT, np.float32)
    return outputs


def id_canary(ids: Array) -> int:
    """Return the canary of ids of this dtype."""
    return CANARY_INT64 if ids.dtype.itemsize == 8 else CANARY_INT


def against_reference(
    inputs: Inputs, memory: Mapping[str, Array], beside: Collection[int] = ()
) -> tuple[list[str], float]:
    """Return the problems of the outputs, and the largest relative error of a weight.

    beside: rows that need not equal the reference's. Those before the launch's are untouched.
    """
    import numpy as np

    columns, first = inputs.case.columns, inputs.case.first_token
    weights, ids = as_float32(memory["out_weights"]), memory["out_ids"]
    rows = range(len(ids))
    compared = np.array([row >= first and row not in beside for row in rows])[:, None]
    problems = []
    wrong = np.argwhere((ids[:, :columns] != inputs.ids) & compared)
    if len(wrong):
        row = int(wrong[0, 0])
        problems.append(
            f"{len(wrong)} ids are wrong, first in token {row}: {ids[row, :columns].tolist()}, "
            f"expected {inputs.ids[row].tolist()}"
        )
    expected, tolerance = inputs.weights, WEIGHT_TOLERANCE
    if expected.dtype == np.float32:
        # The exact oracle's.
        expected, tolerance = expected.astype(np.float64), 0.0
    if memory["out_weights"].dtype != np.float32:
        expected = _nearest_bfloat16(expected, weights[:, :columns], tolerance)
    scale = np.where(expected == 0, 1.0, np.abs(expected))
    errors = np.abs(weights[:, :columns].astype(np.float64) - expected) / scale * compared
    error = float(np.where(np.isfinite(errors), errors, np.inf).max())
    if error > tolerance:
        problems.append(f"a weight is off by {error:.2g} of its value")
    canary = CANARY_FLOAT if memory["out_weights"].dtype == np.float32 else CANARY_BFLOAT16
    if (weights[:, columns:] != canary).any() or (ids[:, columns:] != id_canary(ids)).any():
        problems.append("something was written beside the outputs")
    if (weights[:first] != canary).any() or (ids[:first] != id_canary(ids)).any():
        problems.append("a row before the launch's first token was written")
    return problems + _wrong_copies(inputs, memory, compared), error


def scratch_not_zero(kernel: Kernel, memory: Mapping[str, Array]) -> list[str]:
    """Return the problems of scratch that a launch has to leave zero."""
    return [
        f"the scratch {parameter.name} is not left zero"
        for parameter in kernel.parameters
        if parameter.scratch is not None
        and parameter.scratch.zeroed
        and memory[parameter.name].any()
    ]


def _nearest_bfloat16(expected: Array, weights: Array, tolerance: float) -> Array:
    """Return `weights` where they are what an FP32 weight rounds to, and `expected` elsewhere."""
    import numpy as np
    import torch

    rounded = [
        torch.from_numpy(expected * (1 + error)).bfloat16().double().numpy() == weights
        for error in (-tolerance, 0, tolerance)
    ]
    return np.where(np.any(rounded, axis=0), weights, expected)


def _wrong_copies(inputs: Inputs, memory: Mapping[str, Array], compared: Array) -> list[str]:
    """Return the problems of the outputs that a call may leave out: logical ids and logits."""
    import numpy as np

    problems, first = [], inputs.case.first_token
    if (logical := memory.get("out_logical_ids")) is not None:
        top_k = inputs.case.top_k
        if ((logical[:, :top_k] != inputs.logical_ids) & compared).any():
            problems.append("a logical id is wrong")
        if (logical[:, top_k:] != CANARY_INT).any():
            problems.append("something was written beside the logical ids")
        if (logical[:first] != CANARY_INT).any():
            problems.append("a logical id before the launch's first token was written")
    if (logits := memory.get("out_logits")) is not None:
        experts = inputs.case.num_experts
        same = (logits[:, :experts] == inputs.logits) | np.isnan(inputs.logits)
        if (~same & compared).any():
            problems.append("a logit is wrong")
        if (logits[:, experts:] != CANARY_FLOAT).any():
            problems.append("something was written beside the logits")
        if (logits[:first] != CANARY_FLOAT).any():
            problems.append("a logit before the launch's first token was written")
    return problems


def as_float32(weights: Array) -> Array:
    """Return FP32 weights as they are, and BF16 bits as FP32."""
    import numpy as np

    if weights.dtype != np.uint16:
        return weights
    return (weights.astype(np.uint32) << 16).view(np.float32)
