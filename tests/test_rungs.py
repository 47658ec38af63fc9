"""What each rung refuses, and what it takes to pass."""

from __future__ import annotations

import multiprocessing
import re
import sys
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from conftest import decode_kernel, sample_kernel, sample_manifest

pytest.importorskip("elftools", reason="needs dsv4-router-builder")

from builds import kernel_set, topk_set
from hardware_record import Tally
from processes import append_records
from test_evidence import KERNEL, record_of

from build_kernels.binaries.ptx.parser import parse
from build_kernels.building import compilers
from build_kernels.evidence import outputs
from build_kernels.evidence.artifact import Artifact, load_artifact
from build_kernels.evidence.cases import (
    ENGINE_OPTIONS,
    GATE_OPTIONS,
    MIXED_OPTIONS,
    VOCABULARY,
    Case,
    decode_cases,
)
from build_kernels.evidence.document import EvidenceError
from build_kernels.evidence.inputs import make_inputs
from build_kernels.evidence.picked import cases_of
from build_kernels.evidence.result import Result
from build_kernels.evidence.rungs import emulated, hardware, lint, protocol, rewrites, structure
from build_kernels.evidence.store import Evidence, validated_on
from build_kernels.specs import KERNELS


@pytest.fixture
def topk(tmp_path_factory: pytest.TempPathFactory) -> Artifact:
    folder = topk_set(tmp_path_factory.mktemp("topk") / "artifacts", ["sm_100a"])
    return load_artifact(folder, "router_topk.sm_100a")


# ---------------------------------------------------------------- structure


@pytest.mark.usefixtures("disassemble_once")
def test_a_kernel_as_built_passes_the_structure_rung(topk: Artifact) -> None:
    result = structure.climb(topk, quick=True)
    assert (result.status, result.reason) == ("passed", "")
    assert result.figures["registers"] == topk.kernel.resources.registers
    assert result.figures["local_memory_instructions"] == 0
    assert result.figures["paired_instructions"]["griddepcontrol.wait"] == 1


def _spoiled(topk: Artifact, what: str) -> Artifact:
    kernel = topk.kernel
    if what == "registers":
        resources = replace(kernel.resources, registers=7)
        return replace(topk, kernel=replace(kernel, resources=resources))
    if what == "cubin sha256":
        return replace(topk, cubin=topk.cubin + b"\0")
    if what == "PTX .target":
        return replace(topk, ptx=topk.ptx.replace("sm_100a", "sm_103a"))
    if what == "ELF compute capability":
        return replace(topk, kernel=replace(kernel, arch="sm_103a"))
    if what == "parameters in .nv.info":
        return replace(topk, kernel=replace(kernel, parameters=kernel.parameters[:-1]))
    if what == "symbol":
        return replace(topk, kernel=replace(kernel, symbol="another"))
    if what == "opcode counts":
        resources = replace(kernel.resources, opcodes=dict(kernel.resources.opcodes, LDG=1))
        return replace(topk, kernel=replace(kernel, resources=resources))
    wait = re.search(r"griddepcontrol\.wait;", topk.ptx)
    assert what == "griddepcontrol.wait"
    assert wait is not None
    return replace(topk, ptx=topk.ptx.replace(wait.group(), ""))


@pytest.mark.usefixtures("disassemble_once")
@pytest.mark.parametrize(
    "what",
    [
        "registers",
        "cubin sha256",
        "PTX .target",
        "ELF compute capability",
        "parameters in .nv.info",
        "symbol",
        "opcode counts",
        "griddepcontrol.wait",
    ],
)
def test_the_structure_rung_names_what_differs(topk: Artifact, what: str) -> None:
    result = structure.climb(_spoiled(topk, what), quick=True)
    assert result.status == "failed"
    assert what in result.reason


def test_a_disassembler_that_hangs_is_not_run_and_not_failed(
    topk: Artifact, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    slow = tmp_path / "nvdisasm"
    slow.write_text("#!/bin/sh\nexec sleep 60\n")
    slow.chmod(0o755)
    monkeypatch.setattr(structure.nvdisasm, "wheel_file", lambda *_: slow)
    monkeypatch.setattr(structure.nvdisasm, "TIMEOUT_SECONDS", 0.2)
    result = structure.climb(topk, quick=True)
    assert (result.status, result.applies) == ("not run", True)
    assert "nvdisasm took more than" in result.reason


def test_a_missing_disassembler_is_not_run_and_an_unreadable_cubin_failed(
    topk: Artifact, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever the words of the error are."""
    broken = replace(topk, cubin=b"is missing: it comes with the wheel")
    assert structure.climb(broken, quick=True).status == "failed"

    def missing(*_: str) -> Path:
        raise structure.ToolError("no such tool")

    monkeypatch.setattr(structure.nvdisasm, "wheel_file", missing)
    assert structure.climb(topk, quick=True).status == "not run"
    monkeypatch.setattr(structure.nvdisasm, "wheel_file", lambda *_: Path(__file__))
    result = structure.climb(topk, quick=True)
    assert (result.status, "not executable" in result.reason) == ("not run", True)


def test_ptx_instructions_are_counted_with_their_modifiers() -> None:
    ptx = """
.target sm_100a
.visible .entry k(.param .align 64 .b8 k_param_0[128], .param .u64 .ptr .global .align 4 k_param_1,
    .param .f32 k_param_2)
{   .reg .pred %p<3>;  // tcgen05.mma in a comment
    @%p1 tcgen05.mma.cta_group::1.kind::f16 [%r1], %rd1, %rd2, %r2, %p2;
    @!%p1 bra $L__BB0_1;
    { .reg .pred P1; LOOP: mbarrier.try_wait.parity.shared.b64 P1, [%r1], %r2; @P1 bra LOOP; }
$L__BB0_1: tcgen05.mma.cta_group::1.kind::f16 [%r1], %rd1, %rd2, %r2, %p2;
    ret;
}"""
    kernel = parse(ptx)
    counts = Counter(item.opcode for item in kernel.instructions)
    assert counts["tcgen05.mma.cta_group::1.kind::f16"] == 2
    assert counts["mbarrier.try_wait.parity.shared.b64"] == 1
    assert (kernel.name, kernel.target) == ("k", "sm_100a")
    assert [(p.type, p.size) for p in kernel.parameters] == [("b8", 128), ("u64", 8), ("f32", 4)]


# ---------------------------------------------------------------- lint

OUTPUT = """\x1b[93mwarning[W0015]:\x1b[0m tcgen05.dealloc is not ordered

  --> kernel.py:69:12
      in function `\x1b[92m{function}\x1b[0m(...)`:
   |
  \x1b[93mwarning:\x1b[0m More words about it.
\x1b[93mremark[R0001]:\x1b[0m something without a place
"""


def test_diagnostics_are_read_with_code_and_function() -> None:
    first, second = lint.parse_diagnostics(OUTPUT.format(function="free_accumulator"))
    assert (first.code, first.function) == ("W0015", "free_accumulator")
    assert first.message == "tcgen05.dealloc is not ordered"
    assert (second.code, second.function) == ("R0001", "")


def test_a_diagnostic_without_an_explanation_fails() -> None:
    (known, _) = lint.parse_diagnostics(OUTPUT.format(function="free_accumulator"))
    assert lint.judge(()).status == "passed"
    explained = lint.judge((known,))
    assert explained.status == "passed"
    assert "named barrier" in explained.assumptions[0]
    elsewhere = replace(known, function="issue_mma")
    assert lint.judge((known, elsewhere)).status == "failed"
    assert "issue_mma" in lint.judge((known, elsewhere)).reason


def test_what_an_explanation_rests_on_is_there() -> None:
    """W0015's backing: a mutant of decode that two rungs reject, and one of prefill."""
    pytest.importorskip("numpy", reason="needs the extra `verify`")
    from build_kernels.mutants.faults import MUTANTS

    (explanation,) = lint.EXPLANATIONS
    named = [mutant for mutant in MUTANTS if f"'{mutant.name}'" in explanation.reason]
    rejected_by = [set(mutant.rejected_by) for mutant in named]
    assert sorted(rejected_by, key=len) == [{"emulated"}, {"emulated", "protocol"}]


def test_the_lint_rung_knows_every_dsl_kernel() -> None:
    names = {spec.name for spec in KERNELS}
    assert {kernel.name for kernel in sample_manifest().kernels} <= names
    assert compilers.NVRTC_OPTIONS, "the CUDA kernels are compiled by NVRTC, not linted"


@pytest.mark.slow
def test_the_lint_rung_refuses_sources_that_do_not_make_the_artifact(tmp_path: Path) -> None:
    pytest.importorskip("cutlass", reason="needs dsv4-router-builder")
    kernel = decode_kernel("sm_100a")
    result = lint.climb(
        Artifact(kernel=kernel, cubin_path=tmp_path / "x", cubin=b"", ptx="another kernel"),
        quick=True,
    )
    assert result.status == "failed"
    assert "do not compile to the artifact's PTX" in result.reason


# ---------------------------------------------------------------- protocol


def test_the_input_names_every_integer_and_every_tensor_map() -> None:
    kernel = decode_kernel("sm_100a", "emajor", 32)
    sizes = {"tensor_map": "b8", "pointer": "u64", "int32": "u32", "float32": "f32"}
    declared = ",".join(
        f".param .{sizes[p.kind]} p{i}" + ("[128]" if p.kind == "tensor_map" else "")
        for i, p in enumerate(kernel.parameters)
    )
    case = protocol.ProofCase(num_tokens=6, num_experts=132, top_k=4, k=2048)
    given = protocol.kernel_input(kernel, f".visible .entry k({declared})\n{{ ret; }}", case, {})
    by_index = {item["parameter"]: item["value"] for item in given["arguments"]}
    named = {kernel.parameters[index].name: value for index, value in by_index.items()}
    assert named["num_k_blocks"] == 32
    assert named["num_experts"] == 132
    assert named["out_ids_stride"] == 4
    assert given["launch"]["grid_dim"] == [16, 3, 1]
    w_map, x_map = given["tma_descriptors"]
    assert (w_map["global_shape"], w_map["global_strides_bytes"]) == ([132, 2048], [272])
    assert (x_map["global_shape"], x_map["box_shape"]) == ([64, 6, 32], [64, 32, 2])


def test_a_rewrite_that_finds_nothing_is_an_error() -> None:
    assert rewrites.rewritten("x.collector::a::discard", (rewrites.NO_COLLECTOR,)) == "x"
    with pytest.raises(rewrites.ProtocolError, match="matches nothing"):
        rewrites.rewritten("x", (rewrites.NO_COLLECTOR,))


def test_full_decode_cases_wrap_every_ring_twice_and_reach_the_tile() -> None:
    for tile in (8, 32, 64):
        kernel = decode_kernel("sm_100a", "kmajor", tile)
        cases = protocol.decode_cases(kernel, quick=False)
        blocks = [case.k // 64 // 16 for case in cases]
        assert max(blocks) > 2 * 8
        assert {case.num_tokens for case in cases} >= {tile}
        assert any(case.num_tokens < tile for case in cases)
        assert any(case.num_experts % 64 for case in cases)


@pytest.mark.slow
def test_sentryward_proves_topk_and_finds_its_missing_barrier(topk: Artifact) -> None:
    pytest.importorskip("sentryward", reason="needs the extra `verify`")
    proven = protocol.climb(topk, quick=True)
    assert (proven.status, proven.reason) == ("passed", "")
    assert any("candidates and their ranks are constants" in text for text in proven.assumptions)
    barriers = list(re.finditer(r"bar\.warp\.sync\s+-1;", topk.ptx))
    assert len(barriers) == 3
    for barrier in barriers:
        text = topk.ptx[: barrier.start()] + topk.ptx[barrier.end() :]
        faulty = protocol.climb(replace(topk, ptx=text), quick=True)
        assert faulty.status == "failed"
        assert "potential_race" in faulty.reason


def test_without_sentryward_the_rung_is_not_run(
    topk: Artifact, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "sentryward", None)
    result = protocol.climb(topk, quick=True)
    assert result.status == "not run"
    assert "it comes with `pip install 'dsv4-router-builder[verify]'`" in result.reason
    assert result.applies


def test_out_of_time_is_not_run_and_not_failed(
    topk: Artifact, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("sentryward", reason="needs the extra `verify`")
    monkeypatch.setattr(protocol, "TIMEOUT_SECONDS", 1e-3)
    result = protocol.climb(topk, quick=True)
    assert result.status == "not run"
    assert "timeout" in result.reason


def test_wgmma_is_beyond_the_protocol_rung(topk: Artifact) -> None:
    ptx = topk.ptx.replace("ret;", "wgmma.fence.sync.aligned; ret;")
    result = protocol.climb(replace(topk, ptx=ptx), quick=True)
    assert (result.status, result.applies) == ("not run", False)


# ---------------------------------------------------------------- hardware


@pytest.mark.slow
def test_records_of_several_processes_are_all_kept(tmp_path: Path) -> None:
    path = tmp_path / "record.json"
    context = multiprocessing.get_context("spawn")
    records = [record_of(gpu=f"GPU {i}") for i in range(2)]
    writers = [context.Process(target=append_records, args=(path, each)) for each in records]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join()
    assert [writer.exitcode for writer in writers] == [0, 0]
    assert len(hardware.read_records(path)) == 20


def test_records_are_appended_and_read_back(tmp_path: Path) -> None:
    path = tmp_path / "record.json"
    records = (record_of(), record_of(gpu="NVIDIA H100", failed=("test_ties[1]",)))
    for record in records:
        hardware.append_record(path, record)
    assert hardware.read_records(path) == records
    for damaged in (
        '{"schema_version": 2, "records": [{"gpu": "H200"}]}',
        '{"schema_version": 2, "records": [{"gpu": "H200", "cases": ["a"], "failed": []}]}',
        '{"schema_version": 1, "records": []}',
    ):
        path.write_text(damaged)
        with pytest.raises(EvidenceError, match=r"not a file of GPU test records|expected 2"):
            hardware.read_records(path)


def test_a_record_validates_its_own_bytes_only() -> None:
    result = hardware.result_of(KERNEL, [record_of()])
    assert result is not None
    assert result.figures["cases"] == 32, "cases are summed, not the tests that ran them"
    evidence = Evidence().with_result(KERNEL, "hardware", result)
    assert validated_on(evidence, KERNEL) == "NVIDIA H200"
    assert validated_on(evidence, replace(KERNEL, cubin_sha256="f" * 64)) == "nowhere"
    assert hardware.result_of(replace(KERNEL, ptx_sha256="f" * 64), [record_of()]) is None
    failed = hardware.result_of(KERNEL, [record_of(), record_of(failed=("test_models[1]",))])
    assert failed is not None
    assert (failed.status, failed.reason) == ("failed", "test_models[1]")
    assert validated_on(Evidence().with_result(KERNEL, "hardware", failed), KERNEL) == "nowhere"


@pytest.mark.parametrize(
    ("changed", "records", "cases"),
    [
        # The same run told twice, and a part of it run again: nothing is counted twice.
        ({}, 1, 32),
        ({"cases": {"test_ties": 8, "test_graphs": 5}}, 1, 37),
        ({"date": "2026-02-01"}, 2, 64),
        ({"gpu": "NVIDIA H100"}, 2, 64),
        ({"driver": "590.0"}, 2, 64),
    ],
)
def test_records_add_up(changed: dict, records: int, cases: int) -> None:
    first = hardware.result_of(KERNEL, [record_of()])
    both = hardware.result_of(KERNEL, [record_of(**changed)], first)
    assert both is not None
    assert len(both.figures["records"]) == records
    assert both.figures["cases"] == cases
    assert hardware.result_of(KERNEL, [record_of(), record_of(**changed)]) == both


def test_cases_are_counted_by_what_was_launched() -> None:
    tally = Tally()
    tally.launched("a")
    tally.launched("b")
    tally.end("test_one[1]", failed=False)
    for artifact in ("a", "a", "b"):
        tally.launched(artifact)
        tally.count()
    tally.launched("a")  # no case of its own: the test counts
    tally.launched("c")
    tally.end("test_many[2]", failed=True)
    tally.launched("a")  # by a fixture's teardown
    tally.forget()
    tally.end("test_nothing", failed=True)
    tally.launched("a")
    tally.count(9)
    tally.end("test_one[2]", failed=False)
    assert tally.cases == {
        "a": {"test_one[1]": 1, "test_many[2]": 2, "test_one[2]": 9},
        "b": {"test_one[1]": 1, "test_many[2]": 1},
        "c": {"test_many[2]": 1},
    }
    assert tally.failed == {artifact: {"test_many[2]"} for artifact in "abc"}


def test_a_failure_on_record_stays_visible() -> None:
    first = hardware.result_of(KERNEL, [record_of(failed=("test_ties[2]",))])
    for later in (record_of(), record_of(date="2026-02-01"), record_of(gpu="NVIDIA H100")):
        again = hardware.result_of(KERNEL, [later], first)
        assert again is not None
        assert (again.status, again.reason) == ("failed", "test_ties[2]")


def test_a_record_of_before_there_were_counts_is_kept() -> None:
    old = {"gpu": "NVIDIA H200", "driver": "580.0", "date": "2026-01-31", "cases": 24, "failed": []}
    stored = Result(status="passed", figures={"records": [old], "cases": ["test_models: 24"]})
    both = hardware.result_of(KERNEL, [record_of()], stored)
    assert both is not None
    assert old in both.figures["records"]
    assert both.figures["cases"] == 24 + 32


# ---------------------------------------------------------------- emulated


@pytest.mark.parametrize("kind", ["integers", "ties", "biased", "extreme", "low", "nan"])
def test_inputs_are_exact_and_reproducible(topk: Artifact, kind: str) -> None:
    pytest.importorskip("torch")
    for kernel, k in ((topk.kernel, 0), (decode_kernel("sm_100a", "emajor"), 1024)):
        case = Case(num_tokens=3, num_experts=70, top_k=4, k=k, kind=kind)
        first, again = (make_inputs(kernel, case) for _ in range(2))
        for name, tensor in first.tensors.items():
            assert tensor.tobytes() == again.tensors[name].tobytes()
        assert first.ids.shape == (3, 4)
        if kind == "ties":
            assert first.ids.tolist() == [[0, 1, 2, 3]] * 3


@pytest.mark.parametrize("name", ["out_weights", "out_ids"])
def test_a_store_beside_either_output_is_a_problem(topk: Artifact, name: str) -> None:
    np = pytest.importorskip("numpy")
    pytest.importorskip("torch")
    inputs = make_inputs(topk.kernel, Case(num_tokens=3, num_experts=70, top_k=4))
    beside = {
        "out_weights": np.full((3, outputs.WEIGHT_CANARIES), outputs.CANARY_FLOAT, np.float32),
        "out_ids": np.full((3, outputs.ID_CANARIES), outputs.CANARY_INT, np.int32),
    }
    right = {"out_weights": inputs.weights.astype(np.float32), "out_ids": inputs.ids}

    def problems() -> list[str]:
        memory = {each: np.hstack([right[each], beside[each]]) for each in right}
        return outputs.against_reference(inputs, memory)[0]

    assert problems() == []
    beside[name][2, -1] = 0
    assert problems() == ["something was written beside the outputs"]


LATER = tuple(
    case
    for case in cases_of(sample_kernel("router_prefill_kmajor_n64_k4"), quick=False)
    if case.first_token and case.options
)


def test_later_launches_have_every_option() -> None:
    taken = {option for case in LATER for option in case.options}
    assert taken >= {*GATE_OPTIONS, *MIXED_OPTIONS, *ENGINE_OPTIONS, "image_ids", "logits", "empty"}


@pytest.mark.parametrize("case", LATER, ids=str)
def test_a_row_before_the_launch_is_left_as_it_is(case: Case) -> None:
    np = pytest.importorskip("numpy")
    torch = pytest.importorskip("torch")
    inputs = make_inputs(sample_kernel("router_prefill_kmajor_n64_k4"), case)
    written = range(case.first_token, case.num_tokens)
    memory = outputs.new_outputs(case)
    right = {"out_ids": inputs.ids, "out_logical_ids": inputs.logical_ids}
    right["out_logits"] = np.nan_to_num(inputs.logits)
    weights = inputs.weights.astype(np.float32)
    if "bfloat16" in case.options:
        weights = torch.from_numpy(weights).bfloat16().view(torch.int16).numpy().view(np.uint16)
    right["out_weights"] = weights
    for name, array in memory.items():
        array[written, : right[name].shape[1]] = right[name][written]
    assert outputs.against_reference(inputs, memory)[0] == []
    for array in memory.values():
        before = array[0, 0]
        array[0, 0] = 0
        (problem,) = outputs.against_reference(inputs, memory)[0]
        assert "before the launch's first token was written" in problem
        array[0, 0] = before


def test_scratch_that_a_launch_leaves_is_a_problem() -> None:
    np = pytest.importorskip("numpy")
    kernel = decode_kernel()
    memory = {name: np.zeros(2, np.uint32) for name in ("counters", "partials")}
    memory["partials"][1] = 1  # need not be zero
    assert outputs.scratch_not_zero(kernel, memory) == []
    memory["counters"][1] = 1
    assert outputs.scratch_not_zero(kernel, memory) == ["the scratch counters is not left zero"]


def _named(topk: Artifact, name: str) -> str:
    """A parameter of router_topk as the PTX's loads write it."""
    (index,) = (i for i, item in enumerate(topk.kernel.parameters) if item.name == name)
    return f"[router_topk_param_{index}]"


@pytest.mark.slow
def test_the_emulated_rung_passes_topk_and_names_what_is_wrong(topk: Artifact) -> None:
    pytest.importorskip("torch")
    pytest.importorskip("build_kernels.emulator")
    result = emulated.climb(topk, quick=True)
    assert (result.status, result.reason) == ("passed", "")
    assert result.figures["runs"] == len(cases_of(topk.kernel, quick=True))
    # The weights are multiplied by gate_temp, which is 1, instead of the scale.
    scale, one = (_named(topk, name) for name in ("routed_scaling_factor", "gate_temp"))
    assert scale in topk.ptx
    wrong = emulated.climb(replace(topk, ptx=topk.ptx.replace(scale, one)), quick=True)
    assert wrong.status == "failed"
    assert "a weight is off" in wrong.reason


@pytest.mark.slow
def test_the_emulated_rung_tells_the_outputs_strides_apart(topk: Artifact) -> None:
    pytest.importorskip("torch")
    one, other = (_named(topk, f"{name}_stride") for name in ("out_weights", "out_ids"))
    assert one in topk.ptx
    assert other in topk.ptx
    swapped = topk.ptx.replace(one, "[it]").replace(other, one).replace("[it]", other)
    result = emulated.climb(replace(topk, ptx=swapped), quick=True)
    assert result.status == "failed"
    assert "ids" in result.reason


@pytest.mark.slow
def test_the_emulated_rung_sees_the_denominators_epsilon(topk: Artifact) -> None:
    """1e-20 left out: all scores are near 1e-22."""
    pytest.importorskip("torch")
    assert "0f1E3CE508" in topk.ptx
    text = topk.ptx.replace("0f1E3CE508", "0f00000000")
    result = emulated.climb(replace(topk, ptx=text), quick=True)
    assert result.status == "failed"
    assert "a weight is off" in result.reason


@pytest.mark.parametrize("kernel", [*sample_manifest().for_arch("sm_100a")], ids=lambda k: k.name)
@pytest.mark.parametrize("quick", [True, False])
def test_every_case_is_one_that_its_kernel_takes(kernel: Any, quick: bool) -> None:
    for case in cases_of(kernel, quick=quick):
        assert case.num_tokens in kernel.problem.num_tokens, str(case)


def test_decode_cases_are_those_that_the_evidence_promises() -> None:
    cases = [
        case
        for layout in ("kmajor", "emajor")
        for tile in (8, 32, 64)
        for case in decode_cases(decode_kernel("sm_100a", layout, tile))
    ]
    assert len(cases) >= 20
    assert {case.num_tokens for case in cases} >= {1, 6, 7, 16, 64}
    assert len({case.k for case in cases}) >= 2
    assert any(case.num_experts % 64 for case in cases)
    assert len(emulated.FULL_SCHEDULES) >= 5


# What the artifact's manifest may have wrong, and the word of the error that names it.
MISFITS = {
    "block": {"block": (64, 1, 1)},
    "cluster": {"cluster": (8, 1, 1)},
    "grid": {"grid": ("k_splits", 1, 1)},
    "token_tile": {"token_tile": 64},
    "dynamic_shared_bytes": {"dynamic_shared_bytes": 50_000},
}


@pytest.fixture(scope="module")
def dsl_artifacts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A decode kernel and the hash kernel."""
    pytest.importorskip("torch")
    names = ["router_decode_kmajor_n8", "router_hash"]
    return kernel_set(tmp_path_factory.mktemp("dsl") / "artifacts", names, ["sm_100a"])


@pytest.fixture
def decode(dsl_artifacts: Path) -> Artifact:
    return load_artifact(dsl_artifacts, "router_decode_kmajor_n8.sm_100a")


@pytest.fixture
def hashed(dsl_artifacts: Path) -> Artifact:
    return load_artifact(dsl_artifacts, "router_hash.sm_100a")


@pytest.mark.slow
def test_the_hash_kernel_gives_the_tables_experts(
    hashed: Artifact, monkeypatch: pytest.MonkeyPatch
) -> None:
    case = Case(num_tokens=9, num_experts=60, top_k=6, k=1024)
    monkeypatch.setattr(emulated, "cases_of", lambda kernel, quick: (case,))
    inputs = make_inputs(hashed.kernel, case)
    table, tokens = inputs.tensors["tid2eid"], inputs.tensors["input_ids"]
    assert inputs.ids.tolist() == table[tokens].tolist()
    result = emulated.climb(hashed, quick=True)
    assert (result.status, result.reason) == ("passed", "")
    # A row of the table is taken to be one expert long.
    text, count = re.subn(r"(mad\.lo\.s64 \t%rd\d+, %rd\d+, )%rd\d+, (%rd\d+);", r"\g<1>1, \2;",
                          hashed.ptx)  # fmt: skip
    assert count
    wrong = emulated.climb(replace(hashed, ptx=text), quick=True)
    assert wrong.status == "failed"
    assert "ids are wrong" in wrong.reason


def test_what_sentryward_is_told_of_the_hash_kernel(hashed: Artifact) -> None:
    (case,) = protocol.hash_cases(hashed.kernel, quick=True)
    given = protocol.kernel_input(hashed.kernel, hashed.ptx, case, {})
    names = {
        hashed.kernel.parameters[item["parameter"]].name: item["value"]
        for item in given["arguments"]
    }
    assert (names["w_stride"], names["vocab_size"]) == (case.k, VOCABULARY)
    text = rewrites.rewritten(hashed.ptx, case.rewrites)
    assert "ld.global.s32" not in text
    loads = re.findall(r"ld\.param\.b64\s+%rd\d+, \[router_hash_0_param_(\d+)\];", text)
    read = {hashed.kernel.parameters[int(index)].name for index in loads}
    assert read == {"w_gate", "tid2eid", "input_ids", "out_weights", "out_ids"}


def _refusal(artifact: Artifact, kernel, monkeypatch, inputs=None) -> str:
    """What a run of this kernel says before anything was emulated."""
    from build_kernels.emulator import LaunchError, Schedule
    from build_kernels.emulator.execution.machine import Machine

    monkeypatch.setattr(Machine, "run", lambda machine: pytest.fail("the emulation began"))
    case = Case(num_tokens=7, num_experts=100, top_k=6, k=1024)
    inputs = inputs or make_inputs(kernel, case)
    with pytest.raises(LaunchError) as caught:
        emulated.run(kernel, artifact.ptx, inputs, Schedule())
    return str(caught.value)


@pytest.mark.parametrize("what", MISFITS)
def test_a_launch_that_does_not_fit_is_refused_before_it_starts(
    decode: Artifact, what: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    kernel = replace(decode.kernel, launch=replace(decode.kernel.launch, **MISFITS[what]))
    assert f"launch.{what}" in _refusal(decode, kernel, monkeypatch)
    monkeypatch.undo()
    result = emulated.climb(replace(decode, kernel=kernel), quick=True)
    assert result.status == "failed"
    assert "refused: " in result.reason


def test_half_a_box_is_refused_before_it_starts(
    decode: Artifact, monkeypatch: pytest.MonkeyPatch
) -> None:
    first, *others = decode.kernel.parameters
    assert first.tensor_map is not None
    width, height = first.tensor_map.box
    half = replace(first, tensor_map=replace(first.tensor_map, box=(width, height // 2)))
    kernel = replace(decode.kernel, parameters=(half, *others))
    assert "parameters.w_map.tensor_map" in _refusal(decode, kernel, monkeypatch)


@pytest.mark.parametrize("name", ["e_bias", "W_gate", "hidden_states"])
def test_an_array_of_another_shape_is_refused_before_it_starts(
    decode: Artifact, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    case = Case(num_tokens=7, num_experts=100, top_k=6, k=1024)
    inputs = make_inputs(decode.kernel, case)
    short = inputs.tensors[name][:-1]
    inputs = replace(inputs, tensors={**inputs.tensors, name: short})
    message = _refusal(decode, decode.kernel, monkeypatch, inputs)
    assert f"{name}: expected the shape" in message


def test_a_block_below_the_bound_of_the_ptx_is_refused_before_it_starts(
    topk: Artifact, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The PTX of topk.cu states .maxntid, which a smaller block would pass."""
    pytest.importorskip("torch")
    kernel = replace(topk.kernel, launch=replace(topk.kernel.launch, block=(96, 1, 1)))
    inputs = make_inputs(kernel, Case(num_tokens=3, num_experts=70, top_k=4))
    assert "launch.block" in _refusal(topk, kernel, monkeypatch, inputs)


@pytest.mark.parametrize(
    ("what", "changed"),
    [("num_tokens", {"num_tokens": 17}), ("num_experts", {"num_experts": 513}), ("k", {"k": 100})],
)
def test_a_case_out_of_range_is_refused(decode: Artifact, what: str, changed: dict) -> None:
    from build_kernels.emulator import LaunchError

    case = Case(num_tokens=7, num_experts=100, top_k=6, k=1024)
    emulated.check_fit(decode.kernel, case)
    with pytest.raises(LaunchError, match=rf"{what}: expected"):
        emulated.check_fit(decode.kernel, replace(case, **changed))


def test_a_ptx_file_of_another_target_is_refused(
    decode: Artifact, monkeypatch: pytest.MonkeyPatch
) -> None:
    kernel = replace(decode.kernel, arch="sm_90a")
    assert "the PTX is for .target sm_100a" in _refusal(decode, kernel, monkeypatch)
