"""The emulator's parts: the table of instructions, the PTX reader, barriers without a machine."""

from __future__ import annotations

import ast
import pkgutil
from importlib import import_module
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
from test_emulator import run_threads

from build_kernels.binaries import ptx
from build_kernels.binaries.ptx.parser import parse
from build_kernels.binaries.ptx.syntax import Instruction, UnsupportedPtx
from build_kernels.emulator import PtxError, instructions, supported_instructions
from build_kernels.emulator.findings import FindingLog
from build_kernels.emulator.instructions.table import FAMILIES, INSTRUCTIONS, merge
from build_kernels.emulator.memory.memory import Memory
from build_kernels.emulator.ordering.clocks import ClockSpace
from build_kernels.emulator.ordering.mbarrier import Mbarrier
from build_kernels.emulator.ordering.warp_clocks import WarpClocks


def family(name: str, *prefixes: str) -> ModuleType:
    made = ModuleType(name)
    made.INSTRUCTIONS = dict.fromkeys(prefixes, lambda d: None)
    return made


def test_two_families_that_decode_one_prefix_are_refused() -> None:
    with pytest.raises(ValueError, match=r"both first and second decode ld\.global"):
        merge([family("first", "ld", "ld.global"), family("second", "st", "ld.global")])


def test_every_module_with_a_table_is_merged() -> None:
    modules = (
        import_module(f"{instructions.__name__}.{info.name}")
        for info in pkgutil.iter_modules(instructions.__path__)
        if info.name != "table"
    )
    found = [module for module in modules if hasattr(module, "INSTRUCTIONS")]
    assert set(found) == set(FAMILIES)


def test_the_longest_prefix_decodes() -> None:
    """st.async is no st with an unknown modifier, and prefetch.tensormap takes no cache level."""
    with pytest.raises(PtxError, match="needs one of the modifiers shared::cluster"):
        run_threads("st.async.u32 [%r1], %r2, [%r3];")
    with pytest.raises(PtxError, match="needs one of the modifiers L1"):
        run_threads("prefetch.global [%rd0];")
    _, result = run_threads("prefetch.tensormap [%rd0];")
    assert {finding.kind for finding in result.findings} >= {"tensor-map"}


def test_an_unknown_instruction_of_a_family_names_the_supported_ones() -> None:
    with pytest.raises(PtxError) as caught:
        run_threads("mbarrier.pending_count.b64 %r1, %rd1;")
    assert ", ".join(supported_instructions("mbarrier")) in str(caught.value)
    assert "tcgen05" not in str(caught.value)


def test_the_supported_instructions_are_the_keys_of_the_table() -> None:
    assert supported_instructions() == sorted(INSTRUCTIONS)
    assert supported_instructions("st") == ["st", "st.async"]


def test_a_modifier_that_no_decoder_takes_is_refused() -> None:
    with pytest.raises(PtxError, match=r"unknown modifier \.unheard_of"):
        run_threads("bar.warp.sync.unheard_of -1;")


def test_the_ptx_reader_uses_the_standard_library_and_itself() -> None:
    for path in Path(ptx.__file__).parent.glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom) and node.module.split(".")[0] == "build_kernels":
                names = [f"{node.module}.{alias.name}" for alias in node.names]
                assert all(name.startswith(f"{ptx.__name__}.") for name in names), path
            elif isinstance(node, ast.Import):
                assert {alias.name for alias in node.names} <= {"re", "struct"}, path


def test_the_ptx_reader_reads_a_kernel_without_a_launch() -> None:
    kernel = parse(".target sm_90a .entry k(.param .u64 out, .param .f32 x) .maxntid 64 { ret; }")
    assert (kernel.name, kernel.target) == ("k", "sm_90a")
    assert [(p.name, p.type, p.offset) for p in kernel.parameters] == [
        ("out", "u64", 0),
        ("x", "f32", 8),
    ]
    assert kernel.directives == {"maxntid": (64,)}
    assert [instruction.opcode for instruction in kernel.instructions] == ["ret"]
    with pytest.raises(UnsupportedPtx, match=r"PTX line 1: unknown module directive"):
        parse(".frobnicate")
    with pytest.raises(UnsupportedPtx, match=r"PTX line 2: a second \.target"):
        parse(".target sm_90a\n.target sm_100a")


def test_an_mbarrier_needs_no_machine() -> None:
    """A phase ends at its last arrival; one more is a finding of the warp that arrives."""
    log, space = FindingLog(), ClockSpace(threads=32, pipes=0, agents=1)
    instruction = Instruction(0, 7, "mbarrier.arrive.b64", "mbarrier.arrive.b64", ())
    warp = WarpClocks(log, space, (0, 0, 0), 0, 0, 1, 1, instruction)
    cta = SimpleNamespace(shared=Memory("shared", 64), mbarriers={}, exited=False)
    barrier = Mbarrier(cta, 16, 2, warp, space.zero)
    barrier.arrive(1, warp.publish(1), warp)
    assert (barrier.phase, barrier.pending) == (0, 1)
    barrier.arrive(1, warp.publish(1), warp)
    assert (barrier.phase, barrier.pending) == (1, 2)
    assert any(row.latest(0, space.size) for row in barrier.released)
    barrier.arrive(3, warp.publish(1), warp)
    (finding,) = log.findings()
    assert (finding.kind, finding.line, finding.thread.warp) == ("barrier-overflow", 7, 0)
