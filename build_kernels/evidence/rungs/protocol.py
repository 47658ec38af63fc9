"""Rung `protocol`: prove every schedule of a launch of the artifact's own PTX with SentryWard.

Shows, for each case's fixed sizes: no deadlock, correct TMA byte counts, no race on shared, tensor
or global memory, TMEM and mbarriers alive when used. Does not show fences (not modelled), values,
other sizes, atomics or their consequences. SentryWard does not support wgmma.

The input file's format was inferred from SentryWard's error messages (0.1.1 does not describe it):
    schema           "spverify.kernel-input/v1"
    launch           grid_dim, block_dim, cluster_dim, dynamic_shared_bytes
    arguments        [{parameter, offset, type as the PTX declares it, value}]
    tma_descriptors  [{parameter, offset, object, element_type, rank, global_shape, box_shape,
                     global_strides_bytes, element_strides, swizzle, interleave, oob_fill "zero"}],
                     fastest dimension first
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from build_kernels.binaries.ptx.parser import parse
from build_kernels.binaries.ptx.syntax import UnsupportedPtx
from build_kernels.cli.extras import why_missing
from build_kernels.evidence.artifact import Artifact, encoded_map
from build_kernels.evidence.cases import VOCABULARY
from build_kernels.evidence.result import FAILED, FULL, PASSED, QUICK, Result, not_run
from dsv4_router_runtime.artifacts.kernel import Kernel, TensorMapRecipe
from dsv4_router_runtime.device.launch import grid_of
from dsv4_router_runtime.parameters import PARAMETERS_OFF

from .rewrites import NO_TICKET, ProtocolError, Rewrite, rewrites_for, rewritten
from .rung import Checker, Reads, Rung, counted

PACKAGES = ("sentryward",)
INPUT_SCHEMA = "spverify.kernel-input/v1"
TIMEOUT_SECONDS = 900
# A decode case with two wraps of every ring takes up to 4 GB.
MEMORY_LIMIT_MIB = 8192

_PROVEN = "race_free"
_FAULTS = ("not_wellsynced", "potential_race", "invalid_lifecycle")
_OOB_FILLS = {"zeros": "zero"}
_ELEMENT_TYPES = {"bfloat16": "bf16"}


@dataclass(frozen=True, kw_only=True)
class ProofCase:
    """The sizes of one launch, and the rewrites that SentryWard needs to follow it."""

    num_tokens: int
    num_experts: int
    top_k: int
    k: int = 0
    rewrites: tuple[Rewrite, ...] = ()

    def __str__(self) -> str:
        k = f" K={self.k}" if self.k else ""
        return f"N={self.num_tokens} E={self.num_experts}{k} top_k={self.top_k}"


ALWAYS_ASSUMED = (
    "fences and memory scopes are not modelled: a missing proxy fence is the emulator's to find",
    "one launch at a time: griddepcontrol orders nothing but this launch's own instructions",
    "distinct arguments do not overlap in memory",
)


def _case(
    kernel: Kernel,
    rewrites: tuple[Rewrite, ...],
    num_tokens: int,
    num_experts: int,
    top_k: int,
    blocks: int,
) -> ProofCase:
    """Make a case with `blocks` K blocks per CTA."""
    k = blocks * kernel.problem.k_multiple * kernel.launch.k_splits
    return ProofCase(
        num_tokens=num_tokens, num_experts=num_experts, top_k=top_k, k=k, rewrites=rewrites
    )


def decode_cases(kernel: Kernel, *, quick: bool) -> tuple[ProofCase, ...]:
    """Return ragged and full expert tiles, N below and at the tile, two wraps of the ring.

    A CTA multiplies K / 64 / k_splits blocks. Its ring holds at most 8, so the 17th block waits for
    the second round of the empty barriers, in a chunk of its own.
    """
    tile = kernel.launch.token_tile
    case = partial(_case, kernel, rewrites_for(kernel))
    if quick:
        return (case(6, 60, 6, 2),)
    two_tiles = _case(kernel, (*rewrites_for(kernel), NO_TICKET), 6, 100, 6, 1)
    return (
        # Few tokens here: SentryWard's time grows with blocks times tokens.
        case(6, 60, 6, 17),
        case(tile, kernel.launch.expert_tile, 8, 1),
        case(tile - 3, 40, 1, 2),
        two_tiles,
    )


def prefill_cases(kernel: Kernel, *, quick: bool) -> tuple[ProofCase, ...]:
    """Return ragged tiles, two token tiles, two wraps of the ring.

    SentryWard takes 112 s for 6 tokens and 2 blocks of n128, so the quick case is less.
    """
    case = partial(_case, kernel, rewrites_for(kernel))
    if quick:
        return (case(2, 60, 6, 1),)
    tile, experts = kernel.launch.token_tile, kernel.launch.expert_tile
    return (case(6, 60, 6, 17), case(tile + 1, experts, 8, 1), case(6, experts + 4, 6, 1))


def hash_cases(kernel: Kernel, *, quick: bool) -> tuple[ProofCase, ...]:
    """Return N below and at a cluster's tokens; 17 blocks of K use a CTA's chunk three times.

    One cluster: SentryWard cannot tell two clusters' outputs from a null option's target.
    """
    case, tile = partial(_case, kernel, rewrites_for(kernel)), kernel.launch.token_tile
    first = (case(tile - 2, 60, 6, 2),)
    return first if quick else (*first, case(tile, 132, 8, 1), case(3, 60, 1, 17))


def topk_cases(kernel: Kernel, *, quick: bool) -> tuple[ProofCase, ...]:
    """Return ragged and full E, N below and at a block's tokens, and candidates of two slots."""

    def case(num_tokens: int, num_experts: int, top_k: int, slot: int) -> ProofCase:
        rewrites = rewrites_for(kernel, slot=slot)
        return _case(kernel, rewrites, num_tokens, num_experts, top_k, 0)

    block = kernel.launch.token_tile
    first = (case(block - 1, 60, 6, 1), case(block, 512, 8, 15))
    return first if quick else (*first, case(block + 3, 60, 6, 0), case(2 * block, 384, 6, 11))


def climb(artifact: Artifact, *, quick: bool) -> Result:
    """Prove the kernel's cases."""
    cases = {
        "decode": decode_cases,
        "prefill": prefill_cases,
        "hash": hash_cases,
        "select": topk_cases,
    }
    proven = prove(artifact, cases[artifact.kernel.role](artifact.kernel, quick=quick))
    return replace(proven, scope=QUICK if quick else FULL)


def prove(
    artifact: Artifact,
    cases: tuple[ProofCase, ...],
    *,
    tensor_map_changes: Mapping[str, Mapping[str, Any]] | None = None,
) -> Result:
    """Prove each case; the first unproven one ends the climb.

    tensor_map_changes: fields of the encoded tensor maps to change, by parameter name.
    """
    kernel = artifact.kernel
    if "wgmma." in artifact.ptx:
        reason = "SentryWard has no semantics for wgmma, the tensor instruction of sm_90a"
        return not_run(reason, applies=False)
    if (problem := why_missing(*PACKAGES)) is not None:
        return not_run(problem)
    import sentryward

    assumptions = dict.fromkeys(ALWAYS_ASSUMED)
    proven: list[str] = []
    for case in cases:
        with tempfile.TemporaryDirectory() as folder:
            ptx_path, input_path = Path(folder, "kernel.ptx"), Path(folder, "input.json")
            try:
                text = rewritten(artifact.ptx, case.rewrites)
                given = kernel_input(kernel, artifact.ptx, case, tensor_map_changes or {})
            except (ProtocolError, UnsupportedPtx) as error:
                return not_run(f"{case}: {error}")
            ptx_path.write_text(text)
            input_path.write_text(json.dumps(given))
            report = sentryward.verify(
                ptx_path,
                input=input_path,
                timeout_seconds=TIMEOUT_SECONDS,
                memory_limit_mib=MEMORY_LIMIT_MIB,
            )
        if report["result"] != _PROVEN:
            return _not_proven(case, report, proven)
        proven.append(str(case))
        assumptions |= dict.fromkeys(rewrite.why for rewrite in case.rewrites)
        assumptions |= dict.fromkeys(
            item["text"] for item in report.get("assumptions", ()) if item.get("triggered")
        )
        assumptions |= dict.fromkeys(_first_line(item) for item in report.get("warnings", ()))
    return Result(
        status=PASSED,
        figures={"race_free": proven, "sentryward": _version()},
        assumptions=tuple(assumptions),
    )


def _not_proven(case: ProofCase, report: Mapping[str, Any], proven: list[str]) -> Result:
    """Return "failed" for a fault with a witness, "not run" if SentryWard could not decide."""
    verdict = report["result"]
    lines = [_first_line(item) for item in report.get("diagnostics", ())][:3]
    reason = f"{case}: {verdict}: {'; '.join(lines)}"
    if verdict in _FAULTS:
        return Result(status=FAILED, reason=reason, figures={"race_free": proven})
    return not_run(reason)


def _first_line(diagnostic: Mapping[str, Any]) -> str:
    """Return a diagnostic in one line, with its PTX line if it names one."""
    details = diagnostic.get("details") or {}
    line = details.get("ptx_line") or (details.get("location") or {}).get("line")
    where = f" (PTX line {line})" if line else ""
    return f"{diagnostic.get('message') or diagnostic.get('code')}{where}"


def kernel_input(
    kernel: Kernel,
    ptx: str,
    case: ProofCase,
    tensor_map_changes: Mapping[str, Mapping[str, Any]],
) -> dict[str, Any]:
    """Return SentryWard's input for one launch: packed tensors, integer parameters by name."""
    integers = {
        **PARAMETERS_OFF,
        "num_tokens": case.num_tokens,
        "num_experts": case.num_experts,
        "num_k_blocks": case.k // kernel.problem.k_multiple,
        "top_k": case.top_k,
        "out_weights_stride": case.top_k,
        "out_ids_stride": case.top_k,
        "logits_stride": case.num_experts,
    }
    if kernel.role == "hash":
        integers |= {"vocab_size": VOCABULARY, "w_stride": case.k}
    declared = parse(ptx).parameters
    arguments, descriptors = [], []
    for index, parameter in enumerate(kernel.parameters):
        place = {"parameter": index, "offset": 0}
        if parameter.tensor_map is not None:
            changes = tensor_map_changes.get(parameter.name, {})
            descriptor = _tma_descriptor(parameter.tensor_map, case, changes)
            descriptors.append(place | descriptor)
        elif parameter.kind == "int32":
            if parameter.name not in integers:
                raise ProtocolError(f"{kernel.key}: no value for the parameter {parameter.name}")
            value = {"type": declared[index].type, "value": integers[parameter.name]}
            arguments.append(place | value)
    grid = grid_of(kernel.launch, num_tokens=case.num_tokens, num_experts=case.num_experts)
    return {
        "schema": INPUT_SCHEMA,
        "launch": {
            "grid_dim": list(grid),
            "block_dim": list(kernel.launch.block),
            "cluster_dim": list(kernel.launch.cluster),
            "dynamic_shared_bytes": kernel.launch.dynamic_shared_bytes,
        },
        "arguments": arguments,
        "tma_descriptors": descriptors,
    }


def _tma_descriptor(
    recipe: TensorMapRecipe, case: ProofCase, changes: Mapping[str, Any]
) -> dict[str, Any]:
    """Return SentryWard's form of a tensor map, with rows packed to a multiple of 16 B."""
    row = 8 * -(-(case.num_experts if recipe.dims[0] == "E" else case.k) // 8)
    encoded = encoded_map(
        recipe, num_tokens=case.num_tokens, num_experts=case.num_experts, k=case.k, row=row
    )
    encoded = replace(encoded, **changes)
    return {
        "object": recipe.tensor,
        "element_type": _ELEMENT_TYPES[encoded.element_type],
        "rank": len(encoded.dims),
        "global_shape": list(encoded.dims),
        "global_strides_bytes": list(encoded.strides),
        "element_strides": list(encoded.element_strides),
        "box_shape": list(encoded.box),
        "swizzle": encoded.swizzle,
        "interleave": encoded.interleave,
        "oob_fill": _OOB_FILLS[encoded.oob_fill],
    }


def _version() -> str:
    from importlib.metadata import version

    return version("sentryward")


RUNG = Rung(
    name="protocol",
    climbs=(climb,),
    checker=Checker(number=2, tool="sentryward"),
    reads=Reads.TEXT_AND_LAUNCH,
    cost=4,
    figures={"race_free": lambda node: node.items("a list of cases")},
    describe=lambda shown: [counted(len(shown["race_free"]), "launch", "launches")],
    packages=PACKAGES,
)
