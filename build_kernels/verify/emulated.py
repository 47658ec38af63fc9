"""Rung: the artifact's PTX, executed on a CPU, gives the reference's ids and weights.

Shows, for each case under each schedule: no finding (races, poison, phases, TMEM, lifetimes), ids
equal and weights within 1e-6 of the FP64 reference, nothing written beside the outputs, scratch
left zero. The inputs are small integers, so logits are exact whatever the order of the sums. Does
not show that ptxas translated rightly, what undocumented hardware does, rounding order, or speed.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from importlib.util import find_spec
from math import prod
from typing import TYPE_CHECKING, Any

from build_kernels.specs import KERNELS
from dsv4_router_runtime.launch import grid_of
from dsv4_router_runtime.manifest import Kernel

from .artifact import (
    OPTIONS_OFF,
    Artifact,
    bounded_block,
    encoded_map,
    is_decode,
    is_hashed,
)
from .evidence import FAILED, FULL, PASSED, QUICK, Result, not_run

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from build_kernels.emulator import DeviceArray, Schedule

    Array = NDArray[Any]

WEIGHT_TOLERANCE = 1e-6
# Ids are compared where neighbouring keys differ by more than FP32 can err; see `make_inputs`.
CLEAR_MARGIN = 1e-4
CANARY_FLOAT = -12345.0
CANARY_INT = -77
# Different, so that one output's stride does not serve for the other.
WEIGHT_CANARIES = 3
ID_CANARIES = 5
SCALE = 2.5
VOCABULARY = 11
ELEMENT_TYPES = {"float32": "float32", "int32": "int32", "uint32": "uint32", "uint8": "uint8"}

# Earliest completes an asynchronous operation as it is issued, latest when all warps are blocked.
# `alone`: one cluster on the machine at a time, the next starting when it has ended, so that a CTA
# that waits for one that has not started never ends.
FULL_SCHEDULES = (
    *(("earliest", 0, False), ("latest", 0, False)),
    *(("random", 1, False), ("random", 2, False), ("random", 3, False)),
    ("random", 4, True),
)
QUICK_SCHEDULES = (("latest", 0, False), ("random", 1, True))


@dataclass(frozen=True, kw_only=True)
class Case:
    """One call. `kind`: what is in the inputs.

    integers   small integers, biases in quarters
    ties       logits all equal: ids must be 0 .. top_k - 1
    biased     integers, with biases near 8 as real checkpoints have
    extreme    logits beyond +-100
    low        all logits near -100: softplus would be denormal, and epsilon counts
    nan        one expert's weights NaN, and one token's row of hidden_states infinite
    """

    num_tokens: int
    num_experts: int
    top_k: int
    k: int = 0
    kind: str = "integers"

    def __str__(self) -> str:
        k = f" K={self.k}" if self.k else ""
        return f"N={self.num_tokens} E={self.num_experts}{k} top_k={self.top_k} {self.kind}"


def decode_cases(kernel: Kernel, *, quick: bool) -> tuple[Case, ...]:
    """N in {1, 6, 7, 16, 64}, ragged E, several K; the last two are a V4-Flash and a V4-Pro layer.

    K of 16 blocks gives each CTA of the cluster one; with 17 each, every stage of the ring is used
    three times.
    """
    tile = kernel.launch.token_tile
    block = kernel.problem.k_multiple * kernel.launch.k_splits
    first = (
        Case(num_tokens=min(7, tile), num_experts=60, top_k=6, k=2 * block),
        Case(num_tokens=1, num_experts=132, top_k=4, k=block, kind="biased"),
        # All experts chosen, so that every score counts.
        Case(num_tokens=3, num_experts=8, top_k=8, k=block, kind="nan"),
        Case(num_tokens=2, num_experts=8, top_k=8, k=block, kind="low"),
    )
    if quick:
        return first
    return (
        *first,
        Case(num_tokens=tile, num_experts=64, top_k=8, k=block),
        Case(num_tokens=6, num_experts=128, top_k=3, k=2 * block, kind="biased"),
        Case(num_tokens=tile - 1, num_experts=216, top_k=6, k=block),
        Case(num_tokens=3, num_experts=96, top_k=6, k=block, kind="nan"),
        Case(num_tokens=2, num_experts=40, top_k=1, k=block, kind="extreme"),
        Case(num_tokens=2, num_experts=70, top_k=8, k=block, kind="ties"),
        Case(num_tokens=5, num_experts=40, top_k=6, k=17 * block),
        Case(num_tokens=6, num_experts=256, top_k=6, k=4096, kind="biased"),
        Case(num_tokens=1, num_experts=384, top_k=6, k=7168, kind="biased"),
    )


def hash_cases(kernel: Kernel, *, quick: bool) -> tuple[Case, ...]:
    """Below, at and above a cluster's tokens; K in one block a CTA and in many."""
    tile = kernel.launch.token_tile
    block = kernel.problem.k_multiple * kernel.launch.k_splits
    first = (
        Case(num_tokens=tile + 1, num_experts=60, top_k=6, k=2 * block),
        Case(num_tokens=3, num_experts=8, top_k=8, k=block, kind="nan"),
        Case(num_tokens=2, num_experts=8, top_k=8, k=block, kind="low"),
    )
    if quick:
        return first
    return (
        *first,
        Case(num_tokens=1, num_experts=512, top_k=1, k=block),
        Case(num_tokens=tile, num_experts=132, top_k=8, k=block, kind="extreme"),
        Case(num_tokens=5, num_experts=40, top_k=4, k=17 * block),
        Case(num_tokens=6, num_experts=256, top_k=6, k=4096),
        Case(num_tokens=64, num_experts=384, top_k=6, k=7168),
    )


def cases_of(kernel: Kernel, *, quick: bool) -> tuple[Case, ...]:
    """What the kernel is run on."""
    if is_hashed(kernel):
        return hash_cases(kernel, quick=quick)
    return (decode_cases if is_decode(kernel) else topk_cases)(kernel, quick=quick)


def topk_cases(kernel: Kernel, *, quick: bool) -> tuple[Case, ...]:
    """Below, at and above a block's tokens; each number of register groups of experts."""
    first = (
        Case(num_tokens=7, num_experts=132, top_k=6),
        Case(num_tokens=4, num_experts=512, top_k=8, kind="biased"),
        Case(num_tokens=3, num_experts=8, top_k=8, kind="nan"),
        Case(num_tokens=2, num_experts=8, top_k=8, kind="low"),
    )
    if quick:
        return first
    return (
        *first,
        Case(num_tokens=1, num_experts=8, top_k=8),
        Case(num_tokens=16, num_experts=384, top_k=6, kind="biased"),
        Case(num_tokens=5, num_experts=256, top_k=6, kind="extreme"),
        Case(num_tokens=3, num_experts=130, top_k=4, kind="nan"),
        Case(num_tokens=2, num_experts=70, top_k=8, kind="ties"),
        Case(num_tokens=66, num_experts=60, top_k=1),
    )


def climb(artifact: Artifact, *, quick: bool) -> Result:
    """Run each case under each schedule; the first that is not right ends the climb."""
    for package, extra in (("numpy", "verify"), ("torch", "torch")):
        if find_spec(package) is None:
            return not_run(f"{package} is not installed: it is in this project's extra `{extra}`")
    from build_kernels.emulator import EmulatorError, Schedule

    kernel, scope = artifact.kernel, QUICK if quick else FULL
    cases = cases_of(kernel, quick=quick)
    schedules = QUICK_SCHEDULES if quick else FULL_SCHEDULES
    runs = 0
    worst = 0.0
    for case in cases:
        inputs = make_inputs(kernel, case)
        for policy, seed, alone in schedules:
            schedule = Schedule(policy=policy, seed=seed)
            if alone:
                schedule = replace(schedule, resident_ctas=prod(kernel.launch.cluster))
            try:
                outcome = run(kernel, artifact.ptx, inputs, schedule)
            except EmulatorError as error:
                return Result(status=FAILED, scope=scope, reason=f"{case}: refused: {error}")
            if outcome.problems:
                problems = "; ".join(outcome.problems[:3])
                return Result(
                    status=FAILED,
                    scope=scope,
                    reason=f"{case}, schedule {policy} {seed}: {problems}",
                    figures={"runs_before": runs},
                )
            runs += 1
            worst = max(worst, outcome.weight_error)
    figures = {
        "cases": [str(case) for case in cases],
        "schedules": [
            f"{policy} {seed}" + ", a cluster at a time" * alone
            for policy, seed, alone in schedules
        ],
        "runs": runs,
        "worst_weight_error": float(f"{worst:.2g}"),
    }
    return Result(status=PASSED, scope=scope, figures=figures)


@dataclass(frozen=True, kw_only=True)
class Inputs:
    """A case's arrays, and what the reference makes of them.

    tensors: hidden_states [N, K] and W_gate [K, E] as BF16 bits, or logits [N, E] FP32; e_bias [E]
    FP32, or tid2eid [vocab, top_k] and input_ids [N] int32. weights [N, top_k] FP64, ids likewise.
    """

    case: Case
    tensors: Mapping[str, Array]
    weights: Array
    ids: Array


def make_inputs(kernel: Kernel, case: Case) -> Inputs:
    """Inputs from a seed of the case's own, drawn again until no key is near its neighbour.

    Equal keys are kept: the tie rule decides them. Keys that differ by less than CLEAR_MARGIN could
    be told apart by rounding, and are not.
    """
    import torch

    from dsv4_router_runtime.reference import ranking_margin, select_reference

    generator = torch.Generator().manual_seed(zlib.crc32(f"{kernel.name} {case}".encode()))
    table = _draw_table(generator, case) if is_hashed(kernel) else {}
    for _ in range(100):
        hidden, weight, logits, bias = _draw(generator, kernel, case)
        if table or float(ranking_margin(logits, bias, case.top_k).min()) > CLEAR_MARGIN:
            break
    else:
        raise ValueError(f"{case}: no inputs with clear margins in 100 draws")
    if table:
        weights, ids = select_reference(logits, None, SCALE, case.top_k, **table)
        tensors = {name: values.numpy() for name, values in table.items()}
    else:
        weights, ids = select_reference(logits, bias, SCALE, case.top_k)
        tensors = {"e_bias": bias.float().numpy()}
    if hidden is None or weight is None:
        tensors["logits"] = logits.float().numpy()
    else:
        tensors["hidden_states"] = _bf16_bits(hidden)
        tensors["W_gate"] = _bf16_bits(weight)
    return Inputs(case=case, tensors=tensors, weights=weights.numpy(), ids=ids.numpy())


def _draw_table(generator: Any, case: Case) -> dict[str, Any]:
    """tid2eid, whose rows hold distinct experts, and the tokens' ids in it."""
    import torch

    rows = [torch.randperm(case.num_experts, generator=generator) for _ in range(VOCABULARY)]
    table = torch.stack([row[: case.top_k] for row in rows]).int()
    ids = torch.randint(0, VOCABULARY, (case.num_tokens,), generator=generator).int()
    return {"tid2eid": table, "input_ids": ids}


def _draw(generator: Any, kernel: Kernel, case: Case) -> tuple[Any, Any, Any, Any]:
    """hidden_states, W_gate (None for a kernel that reads logits), FP64 logits and e_bias."""
    import torch

    n, e, k = case.num_tokens, case.num_experts, case.k

    def integers(low: int, high: int, *shape: int) -> torch.Tensor:
        return torch.randint(low, high + 1, shape, generator=generator).double()

    bias = integers(-8, 8, e) / 4
    if case.kind == "biased":
        bias = 8.0 + integers(-16, 16, e) / 64
    if case.kind == "ties":
        bias = torch.zeros(e).double()
    if not is_decode(kernel):
        logits = integers(-6, 6, n, e)
        if case.kind == "extreme":
            logits *= 40
        if case.kind == "ties":
            logits[:] = 1.0
        if case.kind == "low":
            logits[:] = -100.0 - torch.arange(e)
        if case.kind == "nan":
            logits[:, 1] = torch.nan
            logits[-1, 0] = torch.inf
        return None, None, logits, bias
    # Sparse, so that logits stay within a few units at any K.
    sparse = (torch.rand(n, k, generator=generator) < 16 / k).double()
    hidden, weight = integers(-1, 1, n, k) * sparse, integers(-2, 2, k, e)
    if case.kind == "extreme":
        hidden *= 16
    if case.kind == "ties":
        weight[:] = weight[:, :1]
    if case.kind == "low":
        hidden[:], weight[:] = 0.0, 0.0
        hidden[:, 0], weight[0] = 1.0, -100.0 - torch.arange(e)
    if case.kind == "nan":
        weight[:, 1] = torch.nan
        hidden[-1, :] = 0.0
        hidden[-1, 0] = torch.inf
        weight[0] = weight[0].abs() + 1
    return hidden, weight, hidden @ weight, bias


def _bf16_bits(values: Any) -> Array:
    import numpy as np
    import torch

    exact = values.bfloat16()
    if not torch.equal(exact.double().nan_to_num(7.0), values.nan_to_num(7.0)):
        raise ValueError("inputs are not exact in BF16")
    return np.ascontiguousarray(exact.view(torch.int16).numpy().view(np.uint16))


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """One run: everything that is wrong with it, in lines, and what it wrote.

    weight_error: the largest relative error of a weight. weights, ids: [N, top_k] FP32 and int32.
    """

    problems: tuple[str, ...]
    weight_error: float
    weights: Array
    ids: Array


def run(
    kernel: Kernel,
    ptx: str,
    inputs: Inputs,
    schedule: Schedule,
    *,
    tensor_map_changes: Mapping[str, Mapping[str, Any]] | None = None,
    approximate: Mapping[str, Callable[[Array], Array]] | None = None,
) -> Outcome:
    """Emulate one launch and hold it against the reference.

    tensor_map_changes: fields of the emulator's TensorMap to change, by parameter name: faults to
    put in, which nothing here refuses. approximate: a GPU's own results for approximate
    instructions; see `emulate`. LaunchError, with nothing run, for a case, a launch, a box or an
    array that does not fit the kernel.
    """
    from build_kernels.emulator import Launch, emulate

    check_fit(kernel, ptx, inputs.case)
    _check_shapes(inputs)
    case, launch = inputs.case, kernel.launch
    arrays = _device_arrays(kernel, inputs)
    grid = grid_of(launch, num_tokens=case.num_tokens, num_experts=case.num_experts)
    result = emulate(
        ptx,
        Launch(
            grid=grid,
            block=launch.block,
            cluster=launch.cluster,
            dynamic_shared_bytes=launch.dynamic_shared_bytes,
            arch=kernel.arch,
        ),
        _arguments(kernel, case, arrays, tensor_map_changes or {}),
        schedule,
        approximate=approximate,
    )
    problems = [str(finding) for finding in result.findings]
    wrong, error = _against_reference(inputs, result.memory)
    problems += wrong
    for parameter in kernel.parameters:
        scratch = parameter.scratch
        if scratch is not None and scratch.zeroed and result.memory[parameter.name].any():
            problems.append(f"the scratch {parameter.name} is not left zero")
    return Outcome(
        problems=tuple(problems),
        weight_error=error,
        weights=result.memory["out_weights"][:, : case.top_k],
        ids=result.memory["out_ids"][:, : case.top_k],
    )


def check_fit(kernel: Kernel, ptx: str, case: Case) -> None:
    """LaunchError unless the manifest's entry launches the kernel as it was written to be.

    The grid, the cluster, the tiles and the boxes must be its source's; the block the one that the
    PTX is bounded to; the case in its range. (Dynamic shared memory is the emulator's to check.)
    """
    from build_kernels.emulator import LaunchError

    problem, launch = kernel.problem, kernel.launch
    for what, value, allowed in (
        ("num_tokens", case.num_tokens, problem.num_tokens),
        ("num_experts", case.num_experts, problem.num_experts),
        ("top_k", case.top_k, problem.top_k),
    ):
        if value not in allowed:
            raise LaunchError(f"{kernel.key}: {what}: expected {allowed} (got {value})")
    if is_decode(kernel) and (case.k < 1 or case.k % problem.k_multiple):
        raise LaunchError(
            f"{kernel.key}: k: expected a multiple of {problem.k_multiple} (got {case.k})"
        )
    if case.top_k > case.num_experts:
        raise LaunchError(f"{kernel.key}: top_k {case.top_k} of {case.num_experts} experts")
    spec = next((spec for spec in KERNELS if spec.name == kernel.name), None)
    if spec is None:
        raise LaunchError(f"no source makes a kernel {kernel.name}")
    names = ("cluster", "grid", "k_splits", "expert_tile", "token_tile")
    compared = [(f"launch.{name}", getattr(launch, name), getattr(spec, name)) for name in names]
    compared.append(("launch.block", launch.block, bounded_block(ptx) or launch.block))
    found = {parameter.name: parameter for parameter in kernel.parameters}
    compared.append(("parameters", list(found), [wanted.name for wanted in spec.parameters]))
    for wanted in spec.parameters:
        if wanted.name in found:
            at, got = f"parameters.{wanted.name}", found[wanted.name]
            compared.append((f"{at}.tensor_map", got.tensor_map, wanted.tensor_map))
            compared.append((f"{at}.scratch", got.scratch, wanted.scratch))
    for what, has, expected in compared:
        if has != expected:
            raise LaunchError(
                f"{kernel.key}: {what}: the manifest has {has}, its source {expected}; "
                "make both anew with `build-kernels build`"
            )


def _device_arrays(kernel: Kernel, inputs: Inputs) -> dict[str, DeviceArray]:
    """Global memory, by tensor or parameter name.

    What a kernel before this one may have written or may still use is `dependent`: the kernel has
    to griddepcontrol.wait before it touches it. Weights and biases are not.
    """
    import numpy as np

    from build_kernels.emulator import DeviceArray

    case = inputs.case
    weights_shape = (case.num_tokens, case.top_k + WEIGHT_CANARIES)
    ids_shape = (case.num_tokens, case.top_k + ID_CANARIES)
    layout = kernel.problem.layout
    contents: dict[str, tuple[Array, dict[str, bool]]] = {
        "out_weights": (np.full(weights_shape, CANARY_FLOAT, np.float32), {"dependent": True}),
        "out_ids": (np.full(ids_shape, CANARY_INT, np.int32), {"dependent": True}),
    }
    for name in ("e_bias", "tid2eid", "input_ids"):
        if name in inputs.tensors:
            contents[name] = (inputs.tensors[name], {"read_only": True})
    if "logits" in inputs.tensors:
        logits = inputs.tensors["logits"]
        padded = np.full((logits.shape[0], logits.shape[1] + 5), np.nan, np.float32)
        padded[:, : logits.shape[1]] = logits
        contents["logits"] = (padded, {"read_only": True, "dependent": True})
    else:
        weight = inputs.tensors["W_gate"]
        rows = _with_aligned_rows(weight if layout == "emajor" else weight.T)
        contents["w_gate" if is_hashed(kernel) else "W_gate"] = (rows, {"read_only": True})
        hidden = _with_aligned_rows(inputs.tensors["hidden_states"])
        contents["hidden_states"] = (hidden, {"read_only": True, "dependent": True})
    for parameter in kernel.parameters:
        if parameter.scratch is not None and parameter.element_type is not None:
            zeros = np.zeros(parameter.scratch.elements, ELEMENT_TYPES[parameter.element_type])
            facts = {"initialised": parameter.scratch.zeroed, "dependent": True}
            contents[parameter.name] = (zeros, facts)
    return {
        name: DeviceArray(name=name, data=data, **facts) for name, (data, facts) in contents.items()
    }


def _check_shapes(inputs: Inputs) -> None:
    """LaunchError for a tensor that the launch would read beyond, or not to its end."""
    from build_kernels.emulator import LaunchError

    case = inputs.case
    shapes = {
        "hidden_states": (case.num_tokens, case.k),
        "W_gate": (case.k, case.num_experts),
        "logits": (case.num_tokens, case.num_experts),
        "e_bias": (case.num_experts,),
        "tid2eid": (VOCABULARY, case.top_k),
        "input_ids": (case.num_tokens,),
    }
    for name, tensor in inputs.tensors.items():
        if tensor.shape != shapes[name]:
            raise LaunchError(f"{name}: expected the shape {shapes[name]} (got {tensor.shape})")


def _with_aligned_rows(rows: Array) -> Array:
    """Rows padded to a multiple of 16 bytes with BF16 NaNs, which nobody may multiply."""
    import numpy as np

    width = -(-rows.shape[1] // 8) * 8
    padded = np.full((rows.shape[0], width), 0x7FFF, np.uint16)
    padded[:, : rows.shape[1]] = rows
    return padded


def _arguments(
    kernel: Kernel,
    case: Case,
    arrays: Mapping[str, DeviceArray],
    changes: Mapping[str, Mapping[str, Any]],
) -> list[Any]:
    """The kernel's arguments in order, by the manifest's names."""
    from build_kernels.emulator import TensorMap

    values: dict[str, Any] = {
        **OPTIONS_OFF,
        "num_tokens": case.num_tokens,
        "num_experts": case.num_experts,
        "num_k_blocks": case.k // kernel.problem.k_multiple,
        "top_k": case.top_k,
        "routed_scaling_factor": SCALE,
        "out_weights_stride": case.top_k + WEIGHT_CANARIES,
        "out_ids_stride": case.top_k + ID_CANARIES,
        "logits_stride": case.num_experts + 5,
        **arrays,
    }
    if is_hashed(kernel):
        values |= {"vocab_size": VOCABULARY, "w_stride": arrays["w_gate"].data.shape[1]}
    arguments: list[Any] = []
    for parameter in kernel.parameters:
        recipe = parameter.tensor_map
        if recipe is None:
            if parameter.name not in values:
                raise ValueError(f"{kernel.key}: no value for the parameter {parameter.name}")
            arguments.append(values[parameter.name])
            continue
        array = arrays[recipe.tensor]
        encoded = encoded_map(
            recipe,
            num_tokens=case.num_tokens,
            num_experts=case.num_experts,
            k=case.k,
            row=array.data.shape[1],
        )
        described = TensorMap(
            array=array,
            element_type=encoded.element_type,
            dims=encoded.dims,
            strides=encoded.strides,
            box=encoded.box,
            swizzle=encoded.swizzle,
        )
        arguments.append(replace(described, **changes.get(parameter.name, {})))
    return arguments


def _against_reference(inputs: Inputs, memory: Mapping[str, Array]) -> tuple[list[str], float]:
    """What is wrong with the outputs, and the largest relative error of a weight."""
    import numpy as np

    top_k = inputs.case.top_k
    weights, ids = memory["out_weights"], memory["out_ids"]
    problems = []
    wrong = np.argwhere(ids[:, :top_k] != inputs.ids)
    if len(wrong):
        row = int(wrong[0, 0])
        problems.append(
            f"{len(wrong)} ids are wrong, first in token {row}: {ids[row, :top_k].tolist()}, "
            f"expected {inputs.ids[row].tolist()}"
        )
    expected = inputs.weights
    scale = np.where(expected == 0, 1.0, np.abs(expected))
    errors = np.abs(weights[:, :top_k].astype(np.float64) - expected) / scale
    error = float(np.where(np.isfinite(errors), errors, np.inf).max())
    if error > WEIGHT_TOLERANCE:
        problems.append(f"a weight is off by {error:.2g} of its value")
    if (weights[:, top_k:] != CANARY_FLOAT).any() or (ids[:, top_k:] != CANARY_INT).any():
        problems.append("something was written beside the outputs")
    return problems, error
