"""The cubin readers, against small kernels made for the purpose and against NVIDIA's own dumps."""

from __future__ import annotations

import io
import random
import re
import struct
import subprocess
from functools import cache
from pathlib import Path
from types import SimpleNamespace

import pytest

pytest.importorskip("elftools", reason="needs the builder")

from builds import TOPK, topk_set
from elftools.elf.elffile import ELFFile

from build_kernels.binaries import cubin, nvdisasm, wheels
from build_kernels.binaries.cubin import CubinError, CubinParameter, read_cubin
from build_kernels.building import compilers
from build_kernels.specs import ARCHITECTURES

ARCHS = [arch.name for arch in ARCHITECTURES]

PLAIN = """
struct alignas(64) Map { char bytes[128]; };
extern "C" __global__ void __launch_bounds__(96) __cluster_dims__(4, 1, 1)
plain(const __grid_constant__ Map map, float scale, float* out, int n, const int* in) {
  __shared__ float stage[1000];
  stage[threadIdx.x] = in[threadIdx.x] * scale + map.bytes[threadIdx.x % 128];
  __syncthreads();
  out[threadIdx.x] = stage[(threadIdx.x + n) % 96];
}
"""
# An array that is indexed by data cannot live in registers.
LOCAL = """
extern "C" __global__ void local(int* out, const int* in) {
  int many[64];
  for (int i = 0; i < 64; ++i) many[i] = in[i];
  for (int i = 0; i < 64; ++i) many[in[64 + i] & 63] += i;
  out[threadIdx.x] = many[in[threadIdx.x] & 63];
}
"""
REDUCE = """
extern "C" __global__ void reduce(unsigned* out) {
  out[threadIdx.x] = __reduce_max_sync(0xffffffffu, out[threadIdx.x]);
}
"""


@cache
def compiled(text: str, arch: str) -> bytes:
    return compilers.nvrtc_compile(text, name="test.cu", arch=arch)[0]


@pytest.mark.parametrize("arch", ARCHS)
def test_facts_of_a_known_kernel(arch: str) -> None:
    facts = read_cubin(compiled(PLAIN, arch))
    assert facts.symbol == "plain"
    assert facts.compute_capability == int(arch[3:-1])
    assert facts.parameters == (
        CubinParameter(offset=0, size=128),
        CubinParameter(offset=128, size=4),
        CubinParameter(offset=136, size=8),
        CubinParameter(offset=144, size=4),
        CubinParameter(offset=152, size=8),
    )
    assert facts.static_shared_bytes == 4000
    assert facts.max_block == (96, 1, 1)
    assert facts.required_block is None
    assert facts.cluster == (4, 1, 1)
    assert facts.stack_bytes == 0
    assert 8 <= facts.registers <= 64


def test_the_assembler_is_known_where_the_cubin_says_it() -> None:
    assert cubin.stated_ptxas(compiled(PLAIN, "sm_90a")) is None
    assert re.fullmatch(r"12\.9\.\d+", cubin.stated_ptxas(compiled(PLAIN, "sm_100a")) or "")


@pytest.mark.slow
@pytest.mark.parametrize("arch", ARCHS)
def test_local_memory_is_seen(arch: str, tmp_path: Path) -> None:
    data = compiled(LOCAL, arch)
    path = tmp_path / "local.cubin"
    path.write_bytes(data)
    counts = nvdisasm.watched(nvdisasm.sass_opcodes(path))
    assert counts["LDL"] > 0
    assert counts["STL"] > 0
    assert read_cubin(data).stack_bytes == 256


@pytest.mark.parametrize("arch", ARCHS)
@pytest.mark.parametrize("attribute", [cubin._FRAME_SIZE, cubin._MIN_STACK_SIZE])
def test_either_record_of_the_stack_is_enough(arch: str, attribute: int) -> None:
    """The frame is the function's own, the stack that of its calls too: the larger counts."""
    data = compiled(LOCAL, arch)
    section = ELFFile(io.BytesIO(data)).get_section_by_name(".nv.info")
    # A record of format 4 with 8 bytes: (symbol, stack bytes). The other one still says 256.
    record = section.data().index(struct.pack("<BBH", 4, attribute, 8))
    at = section["sh_offset"] + record + 8
    assert struct.unpack_from("<I", data, at) == (256,)
    assert read_cubin(data[:at] + bytes(4) + data[at + 4 :]).stack_bytes == 256


@pytest.mark.slow
@pytest.mark.parametrize(("arch", "opcode"), [("sm_90a", "REDUX"), ("sm_100a", "CREDUX")])
def test_opcodes_are_counted_without_their_modifiers(
    arch: str, opcode: str, tmp_path: Path
) -> None:
    path = tmp_path / "reduce.cubin"
    path.write_bytes(compiled(REDUCE, arch))
    counts = nvdisasm.sass_opcodes(path)
    assert any("." in name for name in counts)
    assert nvdisasm.watched(counts) == {opcode: 1, "LDG": 1, "STG": 1, "LDL": 0, "STL": 0}


@pytest.mark.slow
@pytest.mark.parametrize("arch", ARCHS)
def test_every_instruction_is_counted(arch: str, tmp_path: Path) -> None:
    """Predicated ones too: an instruction is 16 bytes of the kernel's .text section."""
    path = topk_set(tmp_path / "set", [arch]) / f"{TOPK.name}.{arch}.cubin"
    text = ELFFile(io.BytesIO(path.read_bytes())).get_section_by_name(f".text.{TOPK.symbol}")
    assert nvdisasm.sass_opcodes(path).total() == text["sh_size"] // 16


@pytest.mark.slow
@pytest.mark.parametrize("arch", ARCHS)
def test_kernels_that_are_read_at_once_have_the_counts_of_each(arch: str, tmp_path: Path) -> None:
    topk = topk_set(tmp_path / "set", [arch]) / f"{TOPK.name}.{arch}.cubin"
    reduce = tmp_path / "reduce.cubin"
    reduce.write_bytes(compiled(REDUCE, arch))
    paths = (reduce, topk, reduce)
    codes = [read_cubin(path.read_bytes()).code for path in paths]
    each = [nvdisasm.sass_opcodes(path) for path in paths]
    assert nvdisasm.sass_opcodes_of(codes, arch) == each


def test_code_that_is_no_whole_number_of_instructions_is_refused() -> None:
    code = read_cubin(compiled(REDUCE, "sm_90a")).code
    with pytest.raises(CubinError, match=r"\d+ instructions in \d+ bytes of sm_90a"):
        nvdisasm.sass_opcodes_of([code[:24], code[24:]], "sm_90a")


@pytest.mark.parametrize("arch", ARCHS)
@pytest.mark.parametrize("text", [PLAIN, LOCAL, REDUCE], ids=["plain", "local", "reduce"])
def test_agrees_with_cuobjdump(arch: str, text: str, tmp_path: Path) -> None:
    """NVIDIA's reader of the same bytes: registers, stack, every parameter's offset and size."""
    tool = wheels.wheel_file("nvidia-cuda-cuobjdump", "cuobjdump")
    data = compiled(text, arch)
    path = tmp_path / "k.cubin"
    path.write_bytes(data)

    def dumped(option: str) -> str:
        return subprocess.run(
            [tool, option, path], capture_output=True, text=True, check=True
        ).stdout

    facts = read_cubin(data)
    usage = dict(re.findall(r"(REG|STACK|SHARED):(\d+)", dumped("--dump-resource-usage")))
    # cuobjdump counts the KiB that belongs to the driver as shared memory, if the kernel uses any.
    reserved = 1024 if facts.static_shared_bytes else 0
    assert int(usage["REG"]) == facts.registers
    assert int(usage["STACK"]) == facts.stack_bytes
    assert int(usage["SHARED"]) == facts.static_shared_bytes + reserved
    pattern = r"Ordinal : 0x(\w+)\s+Offset  : 0x(\w+)\s+Size    : 0x(\w+)"
    found = {
        int(n, 16): (int(o, 16), int(s, 16)) for n, o, s in re.findall(pattern, dumped("-elf"))
    }
    first = found[0][0]
    assert [(p.offset + first, p.size) for p in facts.parameters] == [
        found[ordinal] for ordinal in range(len(found))
    ]


@pytest.mark.parametrize("size", [0, 16, 63, 64, 2000])
def test_truncated_files_are_refused(size: int) -> None:
    with pytest.raises(CubinError):
        read_cubin(compiled(REDUCE, "sm_90a")[:size])


def test_files_that_are_no_cubin_are_refused(tmp_path: Path) -> None:
    with pytest.raises(CubinError, match="not a readable cubin"):
        read_cubin(b"not an ELF file" * 100)
    path = tmp_path / "text.cubin"
    path.write_bytes(b"not an ELF file" * 100)
    with pytest.raises(CubinError, match=r"nvdisasm cannot read text\.cubin"):
        nvdisasm.sass_opcodes(path)


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("__device__ int x;", "none"),
        (
            'extern "C" __global__ void one(int* p) { *p = 1; }\n'
            'extern "C" __global__ void two(int* p) { *p = 2; }',
            "one, two",
        ),
    ],
)
def test_a_cubin_holds_exactly_one_kernel(text: str, found: str) -> None:
    with pytest.raises(CubinError, match=rf"expected one kernel in a cubin \(found {found}\)"):
        read_cubin(compiled(text, "sm_90a"))


def header_at(data: bytes, name: str) -> int:
    """Where the header of a section lies in the file."""
    elf = ELFFile(io.BytesIO(data))
    return int(elf["e_shoff"]) + 64 * next(
        index for index, section in enumerate(elf.iter_sections()) if section.name == name
    )


@pytest.mark.parametrize("name", [".nv.info", ".nv.info.plain", ".symtab", ".strtab", ".shstrtab"])
@pytest.mark.parametrize(
    ("offset", "value", "problem"),
    [
        (24, 2**63, "after the .* bytes of the file"),
        (32, 2**63, "after the .* bytes of the file"),
        (32, 2**64 - 1, "after the .* bytes of the file"),
        (8, 0x800, "is compressed"),
    ],
)
def test_a_section_that_leads_out_of_the_file_is_refused(
    name: str, offset: int, value: int, problem: str
) -> None:
    """pyelftools reads as much as a header states, or raises an OverflowError."""
    data = bytearray(compiled(PLAIN, "sm_90a"))
    struct.pack_into("<Q", data, header_at(data, name) + offset, value)
    with pytest.raises(CubinError, match=problem):
        read_cubin(bytes(data))


@pytest.mark.parametrize("size", [0, 23, 2**63])
def test_symbols_of_another_size_are_refused(size: int) -> None:
    data = bytearray(compiled(PLAIN, "sm_90a"))
    struct.pack_into("<Q", data, header_at(data, ".symtab") + 56, size)
    with pytest.raises(CubinError, match=f"holds symbols of {size} bytes"):
        read_cubin(bytes(data))


@pytest.mark.parametrize("count", [0, 5000])
def test_a_table_of_sections_is_as_long_as_the_header_says(count: int) -> None:
    """0 would mean that the first section states the number: up to 2**64."""
    data = bytearray(compiled(PLAIN, "sm_90a"))
    struct.pack_into("<H", data, 60, count)
    with pytest.raises(CubinError, match=f"a table of {count} sections"):
        read_cubin(bytes(data))


def test_a_file_of_another_magnitude_is_not_read() -> None:
    with pytest.raises(CubinError, match="at most"):
        read_cubin(compiled(PLAIN, "sm_90a") + bytes(cubin.MAX_CODE_BYTES))


def refused_of(count: int, arch: str, seed: int) -> int:
    """Mutate bytes anywhere, in the ELF header and in the table of sections, whose numbers lead
    most astray; return how many of `count` mutations are a CubinError instead of facts."""
    pristine = compiled(PLAIN, arch)
    (table,) = struct.unpack_from("<Q", pristine, 40)
    numbers = (0, 1, 7, 24, 0x800, 2**31, 2**32 - 1, 2**63, 2**64 - 1, len(pristine))
    fields = ((0, 4), (4, 4), (8, 8), (24, 8), (32, 8), (40, 4), (44, 4), (48, 8), (56, 8))
    draw = random.Random(seed)
    refused = 0
    for _ in range(count):
        data = bytearray(pristine)
        for _ in range(draw.randint(1, 4)):
            place = draw.randrange(3)
            if place == 0:
                data[draw.randrange(64)] = draw.randrange(256)
            elif place == 1:
                data[draw.randrange(len(data))] ^= 1 << draw.randrange(8)
            else:
                section = table + 64 * draw.randrange((len(data) - table) // 64)
                offset, size = draw.choice(fields)
                value = draw.choice(numbers) % 256**size
                at = section + offset
                data[at : at + size] = value.to_bytes(size, "little")
        try:
            read_cubin(bytes(data))
        except CubinError:
            refused += 1
    return refused


@pytest.mark.slow
@pytest.mark.parametrize("arch", ARCHS)
def test_no_mutation_raises_anything_else(arch: str, seed: int) -> None:
    assert 100 < refused_of(1000, arch, seed) < 1000


@pytest.mark.slow
@pytest.mark.parametrize("arch", ARCHS)
def test_no_mutation_of_thousands_raises_anything_else(arch: str, seed: int) -> None:
    assert 400 < refused_of(4000, arch, seed) < 4000


REPAIR = r"run `pip install --force-reinstall dsv4-router-builder`"


def test_a_missing_wheel_is_named() -> None:
    words = r"it comes with the wheel no-such-wheel; run `pip install dsv4-router-builder`$"
    with pytest.raises(wheels.ToolError, match=words):
        wheels.wheel_file("no-such-wheel", "tool")


def test_a_file_that_was_deleted_from_its_wheel_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The wheel still counts as installed: pip would leave it as it is."""
    file = SimpleNamespace(name="nvdisasm", locate=lambda: tmp_path / "nvdisasm")
    monkeypatch.setattr(wheels.importlib.metadata, "files", lambda _: [file])
    with pytest.raises(wheels.ToolError, match=f"nvdisasm is missing.*{REPAIR}"):
        nvdisasm.sass_opcodes(tmp_path / "k.cubin")


@pytest.mark.parametrize(
    ("mode", "text", "why"),
    [(0o644, "#!/bin/sh\n", "not executable"), (0o755, "\x7fELF", "Exec format error")],
)
def test_a_tool_that_cannot_be_run_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, mode: int, text: str, why: str
) -> None:
    (tmp_path / "nvdisasm").write_text(text)
    (tmp_path / "nvdisasm").chmod(mode)
    monkeypatch.setattr(nvdisasm, "wheel_file", lambda *_: tmp_path / "nvdisasm")
    with pytest.raises(wheels.ToolError, match=rf"nvdisasm cannot be run \({why}.*{REPAIR}"):
        nvdisasm.sass_opcodes(tmp_path / "k.cubin")


def test_a_source_that_does_not_compile_shows_the_compilers_words() -> None:
    with pytest.raises(compilers.CompileError, match=r"(?s)test\.cu for sm_90a.*undefined_name"):
        compiled('extern "C" __global__ void k(int* p) { *p = undefined_name; }', "sm_90a")
