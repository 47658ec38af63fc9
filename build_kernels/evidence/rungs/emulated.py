"""Rung `emulated`: execute the artifact's PTX on a CPU and compare with the reference.

Shows, for each case under each schedule: no finding (races, poison, phases, TMEM, lifetimes), equal
ids, weights within 1e-6 of the FP64 reference, no store beside the outputs, and zeroed scratch. The
inputs are small integers, so logits are exact in any order of the sums. Does not show that ptxas
translated correctly, undocumented behaviour of hardware, rounding order, or speed.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from math import prod
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from build_kernels.cli.extras import why_missing
from build_kernels.evidence.artifact import Artifact, encoded_map
from build_kernels.evidence.cases import Case
from build_kernels.evidence.inputs import SCALE, Inputs, make_inputs
from build_kernels.evidence.outputs import (
    CANARY_INT,
    FORCED_CANARIES,
    against_reference,
    as_float32,
    new_outputs,
    output_strides,
    scratch_not_zero,
)
from build_kernels.evidence.picked import cases_of
from build_kernels.evidence.result import FAILED, FULL, PASSED, QUICK, Result, not_run
from build_kernels.specs import KERNELS, CudaSource
from dsv4_router_runtime.artifacts.json_reader import JsonNode
from dsv4_router_runtime.artifacts.manifest import Kernel
from dsv4_router_runtime.device.launch import grid_of
from dsv4_router_runtime.parameters import PARAMETERS_OFF, TENSORS

from .rung import Checker, Reads, Rung, counted

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from build_kernels.emulator import DeviceArray, Schedule
    from build_kernels.emulator import Result as EmulatorResult

    Array = NDArray[Any]

PACKAGES = ("numpy", "torch")

ALONE, FROZEN = ", a cluster at a time", ", a CTA or a cluster frozen"
# (policy, seed, more). Earliest completes an asynchronous operation at issue, latest if all warps
# are blocked. ALONE: one cluster runs at a time and the next starts after it, so that a CTA that
# waits for one not yet started never ends.
FULL_SCHEDULES = (
    *(("earliest", 0, ""), ("latest", 0, ""), ("random", 1, ""), ("random", 2, "")),
    *(("random", 3, FROZEN), ("random", 4, ALONE)),
)
# In turn, one per case.
QUICK_SCHEDULES = (("latest", 0, ""), ("random", 1, ALONE))


def climb(artifact: Artifact, *, quick: bool) -> Result:
    """Run each case under each schedule; the first problem ends the climb."""
    for package in PACKAGES:
        if (problem := why_missing(package)) is not None:
            return not_run(problem)
    from build_kernels.emulator import EmulatorError

    kernel, scope = artifact.kernel, QUICK if quick else FULL
    cases = cases_of(kernel, quick=quick)
    schedules = QUICK_SCHEDULES if quick else FULL_SCHEDULES
    runs = 0
    worst = 0.0
    for number, case in enumerate(cases):
        inputs = make_inputs(kernel, case)
        for policy, seed, more in [schedules[number % 2]] if quick else schedules:
            try:
                outcome = run(kernel, artifact.ptx, inputs, schedule_of(kernel, policy, seed, more))
            except EmulatorError as error:
                return Result(status=FAILED, scope=scope, reason=f"{case}: refused: {error}")
            if outcome.problems:
                problems = "; ".join(outcome.problems[:3])
                return Result(
                    status=FAILED,
                    scope=scope,
                    reason=f"{case}, schedule {policy} {seed}{more}: {problems}",
                    figures={"runs_before": runs},
                )
            runs += 1
            worst = max(worst, outcome.weight_error)
    figures = {
        "cases": [str(case) for case in cases],
        "schedules": [f"{policy} {seed}{more}" for policy, seed, more in schedules],
        "runs": runs,
        "worst_weight_error": float(f"{worst:.2g}"),
    }
    return Result(status=PASSED, scope=scope, figures=figures)


def schedule_of(kernel: Kernel, policy: str, seed: int, more: str) -> Schedule:
    """Return one of the schedules above for a kernel."""
    from build_kernels.emulator import Schedule

    schedule = Schedule(policy=policy, seed=seed, freezes=more == FROZEN)
    if more == ALONE:
        schedule = replace(schedule, resident_ctas=prod(kernel.launch.cluster))
    return schedule


@dataclass(frozen=True, kw_only=True)
class Emulation:
    """One emulated launch: its problems, a line each, and its outputs.

    weight_error: the largest relative error of a weight. weights (FP32), ids: [N, columns].
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
) -> Emulation:
    """Emulate one launch and compare its outputs with the reference.

    tensor_map_changes: faults to insert, as fields of the emulator's TensorMap by parameter name;
    they are not checked. approximate: a GPU's own results for approximate instructions; see
    `emulate`. LaunchError, before anything runs, if the case, the launch, a box or an array does
    not fit the kernel.
    """
    changes = tensor_map_changes or {}
    result = emulate_case(kernel, ptx, inputs, schedule, changes, approximate=approximate)
    case = inputs.case
    problems = [str(finding) for finding in result.findings]
    wrong, error = against_reference(inputs, result.memory)
    problems += wrong + scratch_not_zero(kernel, result.memory)
    return Emulation(
        problems=tuple(problems),
        weight_error=error,
        weights=as_float32(result.memory["out_weights"])[:, : case.columns],
        ids=result.memory["out_ids"][:, : case.columns],
    )


def emulate_case(
    kernel: Kernel,
    ptx: str,
    inputs: Inputs,
    schedule: Schedule,
    tensor_map_changes: Mapping[str, Mapping[str, Any]] = MappingProxyType({}),
    *,
    contents: Mapping[str, Callable[[Array], Array]] = MappingProxyType({}),
    **options: Any,
) -> EmulatorResult:
    """Emulate one launch and return the emulator's result, unjudged.

    contents: by parameter name, a function from the initial contents of an array, such as the
    workspace, to others. options: keywords of `emulate`. See `run` for the rest.
    """
    from build_kernels.emulator import Launch, emulate

    check_fit(kernel, inputs.case)
    _check_shapes(inputs)
    case, launch = inputs.case, kernel.launch
    arrays = _device_arrays(kernel, inputs)
    for name, change in contents.items():
        arrays[name] = replace(arrays[name], data=change(arrays[name].data))
    grid = grid_of(launch, num_tokens=case.launched_tokens, num_experts=case.num_experts)
    return emulate(
        ptx,
        Launch(
            grid=grid,
            block=launch.block,
            cluster=launch.cluster,
            dynamic_shared_bytes=launch.dynamic_shared_bytes,
            arch=kernel.arch,
        ),
        _arguments(kernel, inputs, arrays, tensor_map_changes),
        schedule,
        **options,
    )


def check_fit(kernel: Kernel, case: Case) -> None:
    """Raise LaunchError unless the manifest's entry launches the kernel as its source intends.

    The grid, the cluster, the tiles and the boxes must be those of the source, the case in the
    kernel's range. The emulator checks dynamic shared memory, and the block that a PTX requires:
    that of the CUDA source states an upper bound alone.
    """
    from build_kernels.emulator import LaunchError

    problem, launch = kernel.problem, kernel.launch
    for what, value, allowed in (
        ("num_tokens", case.launched_tokens, problem.num_tokens),
        ("num_experts", case.num_experts, problem.num_experts),
        ("top_k", case.top_k, problem.top_k),
    ):
        if value not in allowed:
            raise LaunchError(f"{kernel.key}: {what}: expected {allowed} (got {value})")
    if kernel.role != "select" and (case.k < 1 or case.k % problem.k_multiple):
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
    if isinstance(spec.source, CudaSource):
        compared.append(("launch.block", launch.block, spec.source.block))
    found = {parameter.name: parameter for parameter in kernel.parameters}
    compared.append(("parameters", list(found), [item.name for item in spec.parameters]))
    for item in spec.parameters:
        if item.name in found:
            at, got = f"parameters.{item.name}", found[item.name]
            compared.append((f"{at}.tensor_map", got.tensor_map, item.tensor_map))
            compared.append((f"{at}.scratch", got.scratch, item.scratch))
    for what, has, expected in compared:
        if has != expected:
            raise LaunchError(
                f"{kernel.key}: {what}: the manifest has {has}, its source {expected}; "
                "make both anew with `build-kernels build`"
            )


def _device_arrays(kernel: Kernel, inputs: Inputs) -> dict[str, DeviceArray]:
    """Return the arrays in global memory, by tensor or parameter name.

    An array that the preceding kernel may write or still use is `dependent`: the kernel must run
    griddepcontrol.wait before any access. Weights and biases are not dependent.
    """
    import numpy as np

    from build_kernels.emulator import DeviceArray

    case = inputs.case
    layout = kernel.problem.layout
    contents: dict[str, tuple[Array, dict[str, bool]]] = {
        name: (array, {"dependent": True}) for name, array in new_outputs(case).items()
    }
    for name, tensor in inputs.tensors.items():
        if name == "forced_ids":
            tensor = np.pad(tensor, ((0, 0), (0, FORCED_CANARIES)), constant_values=CANARY_INT)
        contents[name] = (tensor, {"read_only": True, "dependent": TENSORS[name].after_wait})
    if "logits" in inputs.tensors:
        logits = inputs.tensors["logits"]
        padded = np.full((logits.shape[0], logits.shape[1] + 5), np.nan, np.float32)
        padded[:, : logits.shape[1]] = logits
        if case.kind == "dense":
            # The memory ends with the last logit, and so a kernel may read no further.
            padded = padded.reshape(-1)[:-5]
        contents["logits"] = (padded, {"read_only": True, "dependent": True})
    else:
        weight = inputs.tensors["W_gate"]
        rows = _with_aligned_rows(weight if layout == "emajor" else weight.T, beyond=8)
        contents["w_gate" if kernel.role == "hash" else "W_gate"] = (rows, {"read_only": True})
        hidden = _with_aligned_rows(inputs.tensors["hidden_states"])
        contents["hidden_states"] = (hidden, {"read_only": True, "dependent": True})
    for parameter in kernel.parameters:
        if parameter.scratch is not None and parameter.element_type is not None:
            zeros = np.zeros(parameter.scratch.elements, parameter.element_type)
            flags = {"initialised": parameter.scratch.zeroed, "dependent": True}
            contents[parameter.name] = (zeros, flags)
    return {
        name: DeviceArray(name=name, data=data, **flags) for name, (data, flags) in contents.items()
    }


def _check_shapes(inputs: Inputs) -> None:
    """Raise LaunchError if the launch would read past a tensor's end, or not up to it."""
    from build_kernels.emulator import LaunchError

    case = inputs.case
    sizes: dict[str, Any] = {"N": case.num_tokens, "E": case.num_experts, "K": case.k, "1": 1}
    sizes |= {"top_k": case.top_k, **inputs.numbers}
    for name, tensor in inputs.tensors.items():
        shape = tuple(sizes.get(size) for size in TENSORS[name].shape)
        if tensor.shape != shape:
            raise LaunchError(f"{name}: expected the shape {shape} (got {tensor.shape})")


def _with_aligned_rows(rows: Array, beyond: int = 0) -> Array:
    """Pad BF16 rows to a multiple of 16 B and by `beyond` elements, with NaN: none is a factor."""
    import numpy as np

    width = -(-rows.shape[1] // 8) * 8 + beyond
    padded = np.full((rows.shape[0], width), 0x7FFF, np.uint16)
    padded[:, : rows.shape[1]] = rows
    return padded


def _arguments(
    kernel: Kernel,
    inputs: Inputs,
    arrays: Mapping[str, DeviceArray],
    changes: Mapping[str, Mapping[str, Any]],
) -> list[Any]:
    """Return the kernel's arguments in the manifest's order."""
    from build_kernels.emulator import TensorMap

    case = inputs.case
    values: dict[str, Any] = {
        **PARAMETERS_OFF,
        "e_bias": 0,
        **inputs.numbers,
        "num_tokens": case.num_tokens,
        "first_token": case.first_token,
        "num_experts": case.num_experts,
        "num_k_blocks": case.k // kernel.problem.k_multiple,
        "top_k": case.top_k,
        "routed_scaling_factor": SCALE,
        "forced_ids_stride": case.top_k + FORCED_CANARIES,
        **output_strides(case),
        "logits_stride": case.num_experts + 5,
        **arrays,
    }
    for name in arrays.keys() & TENSORS.keys():
        if (flag := TENSORS[name].other_dtype) is not None:
            values[flag] = int(arrays[name].data.dtype != TENSORS[name].element_type)
    if kernel.role == "hash":
        values["w_stride"] = arrays["w_gate"].data.shape[1]
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


RUNG = Rung(
    name="emulated",
    climbs=(climb,),
    checker=Checker(number=9),
    reads=Reads.TEXT_AND_LAUNCH,
    cost=3,
    figures={"cases": lambda node: node.items("a list of cases"), "runs": JsonNode.integer},
    describe=lambda shown: [
        counted(len(shown["cases"]), "case", "cases"),
        counted(shown["runs"], "run", "runs"),
    ],
    packages=PACKAGES,
)
