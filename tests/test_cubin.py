"""The cubin readers, against small kernels made for the purpose and against NVIDIA's own dumps."""

from __future__ import annotations

import io
import re
import struct
import subprocess
from pathlib import Path

import pytest

pytest.importorskip("elftools", reason="needs the extra `build`")

from elftools.elf.elffile import ELFFile

from build_kernels import compilers, cubin
from build_kernels.cubin import CubinError, CubinParameter, read_cubin
from build_kernels.specs import ARCHITECTURES, KERNELS, CudaSource

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


@pytest.mark.parametrize("arch", ARCHS)
def test_local_memory_is_seen(arch: str, tmp_path: Path) -> None:
    data = compiled(LOCAL, arch)
    path = tmp_path / "local.cubin"
    path.write_bytes(data)
    counts = cubin.count_opcodes(path)
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


@pytest.mark.parametrize(("arch", "opcode"), [("sm_90a", "REDUX"), ("sm_100a", "CREDUX")])
def test_opcodes_are_counted_without_their_modifiers(
    arch: str, opcode: str, tmp_path: Path
) -> None:
    path = tmp_path / "reduce.cubin"
    path.write_bytes(compiled(REDUCE, arch))
    counts = cubin.count_opcodes(path)
    assert counts[opcode] == 1
    assert counts["LDG"] == counts["STG"] == 1
    assert cubin.watched(counts) == {opcode: 1, "LDG": 1, "STG": 1, "LDL": 0, "STL": 0}


@pytest.mark.parametrize("arch", ARCHS)
def test_every_instruction_is_counted(arch: str, tmp_path: Path) -> None:
    """Predicated ones too: an instruction is 16 bytes of the kernel's .text section."""
    spec = next(spec for spec in KERNELS if isinstance(spec.source, CudaSource))
    data = compilers.compile_kernel(spec, arch, tmp_path).cubin
    path = tmp_path / "topk.cubin"
    path.write_bytes(data)
    text = ELFFile(io.BytesIO(data)).get_section_by_name(f".text.{spec.symbol}")
    assert cubin.count_opcodes(path).total() == text["sh_size"] // 16


@pytest.mark.parametrize("arch", ARCHS)
@pytest.mark.parametrize("text", [PLAIN, LOCAL, REDUCE], ids=["plain", "local", "reduce"])
def test_agrees_with_cuobjdump(arch: str, text: str, tmp_path: Path) -> None:
    """NVIDIA's reader of the same bytes: registers, stack, every parameter's offset and size."""
    tool = cubin.wheel_file("nvidia-cuda-cuobjdump", "cuobjdump")
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
        cubin.count_opcodes(path)


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


def test_a_missing_wheel_is_named() -> None:
    with pytest.raises(CubinError, match="it comes with the wheel no-such-wheel"):
        cubin.wheel_file("no-such-wheel", "tool")


def test_a_source_that_does_not_compile_shows_the_compilers_words() -> None:
    with pytest.raises(compilers.CompileError, match=r"(?s)test\.cu for sm_90a.*undefined_name"):
        compiled('extern "C" __global__ void k(int* p) { *p = undefined_name; }', "sm_90a")
