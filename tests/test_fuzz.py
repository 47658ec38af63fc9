"""Files by other hands, mutated by the thousand: an answer, or the reader's own error, and soon.

A case is its reader's name and a number: `CASES["manifest"](number)` does it again. What a reader
accepts is used as a server or a command would use it, which must not fail for the file's sake.
"""

from __future__ import annotations

import contextlib
import json
import math
from collections import Counter
from pathlib import Path

import pytest
from conftest import decode_kernel, hash_kernel, topk_kernel
from mutations import mutated_json
from test_evidence import RECORD, RUN
from watchdog import ends_within

from build_kernels.evidence.document import EvidenceError
from build_kernels.evidence.rungs import RUNGS
from build_kernels.evidence.rungs.hardware import append_record, read_records, result_of
from build_kernels.evidence.store import read_evidence, standing, validated_on, write_evidence
from build_kernels.evidence.table import cell
from dsv4_router_runtime.artifacts.dispatch import (
    LayerProblem,
    Problem,
    plan_layer,
    resolve,
    runs_on,
)
from dsv4_router_runtime.artifacts.evidence import PASSED, read_summary
from dsv4_router_runtime.artifacts.kernel import LAYOUTS
from dsv4_router_runtime.artifacts.limits import MAX_SCRATCH_BYTES, MAX_TOKENS
from dsv4_router_runtime.artifacts.manifest import Manifest, parse_manifest, serialise_manifest
from dsv4_router_runtime.device.launch import ParameterBlock, grid_of
from dsv4_router_runtime.device.tensor_map import encode_arguments, hidden_states_arguments
from dsv4_router_runtime.errors import NoKernelError, RouterError

# A case takes a millisecond; the largest file that is read at all, a second.
SECONDS_PER_CASE = 10


def manifest_text() -> str:
    kernels = (decode_kernel(), hash_kernel(), topk_kernel())
    manifest = Manifest(toolchain={"nvrtc": "12.9"}, driver={"sm_90a": 12040}, kernels=kernels)
    return serialise_manifest(manifest)


def evidence_text() -> str:
    checked = {"status": "passed", "scope": "full", "checker": "lint 1", "assumptions": ["a", "b"]}
    figures = {
        "structure": {"registers": 72, "paired_instructions": {"atom": 1}},
        "lint": {"diagnostics": 1, "explained": 1},
        "protocol": {"race_free": ["N=1"]},
        "emulated": {"cases": ["N=1"], "runs": 6, "worst_weight_error": 2e-07},
        "faults": {"faults": ["padding-set"], "runs": 2},
        "hardware": {"records": [{**RUN, "arch": "sm_90a", "tests": {"test_a": 3}}]},
    }
    rungs = {rung: {**checked, "figures": figures[rung]} for rung in RUNGS}
    not_run = {"status": "not run", "scope": "quick", "reason": "no GPU", "applies": False}
    keys = ("artifact", "cubin_sha256", "ptx_sha256")
    first = {key: RECORD[key] for key in keys}
    entries = [
        first | {"rungs": rungs},
        first | {"ptx_sha256": "a" * 64, "rungs": {"lint": not_run}},
    ]
    return json.dumps({"schema_version": 1, "evidence": entries})


def record_text() -> str:
    records = [RECORD, RECORD | {"gpu": "NVIDIA H100", "failed": ["test_models[1]"]}]
    return json.dumps({"schema_version": 2, "records": records})


def use_manifest(data: bytes) -> None:
    """Everything that a bind or a call computes from a manifest, at the ends of what it accepts."""
    manifest = parse_manifest(data)
    assert parse_manifest(serialise_manifest(manifest)) == manifest
    for kernel in manifest.kernels:
        accepts, launch = kernel.problem, kernel.launch
        k = math.lcm(accepts.k_multiple, 64)
        for num_tokens in (accepts.num_tokens.low, accepts.num_tokens.high or MAX_TOKENS):
            for num_experts in (accepts.num_experts.low, accepts.num_experts.high):
                grid_of(launch, num_tokens=num_tokens, num_experts=num_experts)
        ParameterBlock(kernel)
        assert sum(p.scratch.elements for p in kernel.parameters if p.scratch) <= MAX_SCRATCH_BYTES
        for recipe in (p.tensor_map for p in kernel.parameters if p.tensor_map):
            if recipe.tensor == "hidden_states" and k < 2**20:
                hidden_states_arguments(recipe, address=256, num_tokens=1, k=k, row_stride=k)
            elif recipe.tensor == "W_gate" and k < 2**20:
                sizes = {"K": k, "E": 8}
                strides = {"K": 1, "E": k} if recipe.dims[0] == "K" else {"K": 8, "E": 1}
                encode_arguments(recipe, address=256, sizes=sizes, strides=strides)
        problem = Problem(
            role=kernel.role, layout=accepts.layout, num_tokens=1, num_experts=8, top_k=1, k=k
        )
        resolve(manifest, problem, "sm_90a")
    for layout, hashed in ((layout, hashed) for layout in LAYOUTS for hashed in (False, True)):
        layer = LayerProblem(
            layout=layout, tma_loadable=True, hashed=hashed, num_experts=384, top_k=6, k=7168
        )
        with contextlib.suppress(NoKernelError):
            assert len(plan_layer(manifest, layer, "sm_90a").steps) <= len(manifest.kernels)


def use_evidence(path: Path) -> None:
    """What `list`, `inspect` and `verify` read of it; and it can be written again."""
    evidence = read_evidence(path)
    for kernel in (decode_kernel(), topk_kernel()):
        standing(evidence, kernel)
        validated_on(evidence, kernel)
        for rung, result in evidence.stored(kernel).items():
            cell(rung, result)
    write_evidence(path, evidence)
    assert read_evidence(path) == evidence


def use_summary(path: Path) -> None:
    """What `doctor` and `explain` report of it."""
    for entry in read_summary(path.parent).entries.values():
        ", ".join((*entry.with_status(PASSED), *entry.gpus))


def use_records(path: Path) -> None:
    """What `verify --record` does with them."""
    records = read_records(path)
    for record in records:
        runs_on("sm_90a", record.arch)
    result = result_of(topk_kernel(), records)
    result_of(topk_kernel(), records, result)
    append_record(path, records[0]) if records else None


def of_text(use, text: str):
    return lambda number, folder, name: use(mutated_json(text, number, name))


def of_file(use, text: str):
    def case(number: int, folder: Path, name: str) -> None:
        path = folder / "evidence.json"
        path.write_bytes(mutated_json(text, number, name))
        use(path)

    return case


READERS = {
    "manifest": (of_text(use_manifest, manifest_text()), 40_000),
    "evidence": (of_file(use_evidence, evidence_text()), 25_000),
    "summary": (of_file(use_summary, evidence_text()), 25_000),
    "records": (of_file(use_records, record_text()), 25_000),
}
EXPECTED = (RouterError, EvidenceError)


def run_cases(name: str, numbers: range, folder: Path) -> Counter[str]:
    """Do the cases; anything but an answer or a reader's own error is a failure that names one."""
    case, _ = READERS[name]
    seen: Counter[str] = Counter()
    for number in numbers:
        try:
            with ends_within(SECONDS_PER_CASE):
                case(number, folder, name)
            seen["accepted"] += 1
        except EXPECTED as error:
            seen["refused"] += 1
            text = str(error).replace(str(folder), "")
            assert len(text) <= 1024
            text.encode()
        except BaseException as error:
            raise AssertionError(f"case {number} of {name}: {type(error).__name__}") from error
    return seen


@pytest.mark.quick(2)
@pytest.mark.parametrize("name", READERS)
def test_a_share_of_the_mutations_gives_an_answer_or_an_error(name, tmp_path):
    _, cases = READERS[name]
    share = cases // 200
    seen = run_cases(name, range(share), tmp_path)
    # Mutations that are all refused, or none, would try nothing.
    assert seen["accepted"] > share * 0.005
    assert seen["refused"] > share * 0.2


@pytest.mark.slow
@pytest.mark.parametrize("name", READERS)
def test_every_mutation_gives_an_answer_or_an_error(name, tmp_path):
    _, cases = READERS[name]
    run_cases(name, range(cases), tmp_path)
