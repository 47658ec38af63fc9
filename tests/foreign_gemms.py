"""NVIDIA's CuTeDSL GEMMs, compiled by the DSL: their PTX and the launch that their host code makes.

The host code runs against a stand-in for the CUDA runtime, which writes the launch down. The
examples are no part of this project: CUTLASS_EXAMPLES names the folder
examples/python/CuTeDSL/cute of a checkout of NVIDIA/cutlass of the installed DSL's release.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pytest

from build_kernels.emulator import DeviceArray, Launch, LaunchError, TensorMap

EXAMPLES = os.environ.get("CUTLASS_EXAMPLES")
BLACKWELL, HOPPER = "blackwell/kernel/dense_gemm/", "hopper/kernel/dense_gemm/"
TUTORIAL = "blackwell/tutorial/tutorial_gemm/"

# What the host code of a compiled function calls. A launch is a line: grid, block, cluster, dynamic
# shared memory, and the bytes of each parameter. A tensor map is encoded as the driver does, as far
# as `tensor_map` reads it.
RUNTIME = r"""
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
enum { CLUSTER = 4, ATTRIBUTE = 72 };
typedef struct {
    uint32_t grid[3], block[3]; uint64_t shared; void *stream; char *attributes; uint32_t count;
} Config;
int _cudaGetDevice(int *device) { return *device = 0; }
int _cudaDeviceGetAttribute(int *value) { return *value = 0; }
int _cuKernelGetAttribute(int *value) { return *value = 0; }
int _cudaFuncSetAttribute(void) { return 0; }
int _cudaKernelSetAttributeForDevice(void) { return 0; }
int _cudaLibraryLoadData(void) { return 0; }
int _cudaLibraryGetKernel(void) { return 0; }
int _cudaLaunchKernelEx(const Config *c, void *kernel, void **arguments) {
    FILE *out = fopen(getenv("LAUNCHES"), "a");
    char *sizes = getenv("PARAMETER_SIZES");
    uint32_t cluster[3] = {1, 1, 1};
    for (uint32_t i = 0; i < c->count; i++)
        if (*(uint32_t *)(c->attributes + ATTRIBUTE * i) == CLUSTER)
            memcpy(cluster, c->attributes + ATTRIBUTE * i + 8, sizeof cluster);
    for (int i = 0; i < 3; i++) fprintf(out, "%u ", c->grid[i]);
    for (int i = 0; i < 3; i++) fprintf(out, "%u ", c->block[i]);
    for (int i = 0; i < 3; i++) fprintf(out, "%u ", cluster[i]);
    fprintf(out, "%llu", (unsigned long long)c->shared);
    for (int i = 0; *sizes; i++) {
        long size = strtol(sizes, &sizes, 10);
        fputc(' ', out);
        for (long j = 0; j < size; j++) fprintf(out, "%02x", ((unsigned char *)arguments[i])[j]);
        sizes += *sizes != 0;
    }
    fputc('\n', out);
    return fclose(out);
}
void CuteDSLRT_TVMFFISetRaisedCudaError(void *a, int b) {}
void cuda_dialect_unload_library_once(void *a) {}
void cuda_dialect_assert_success(int a) {}
const char *cuda_dialect_get_error_name(int a) { return ""; }
int cuda_dialect_init_library_once(void) { return 0; }
int _cudaSetDevice(int a) { return 0; }
int _cuTensorMapEncodeTiled(uint64_t *map, int type, uint32_t rank, uint64_t address,
                            const uint64_t *dims, const uint64_t *strides, const uint32_t *box,
                            const uint32_t *steps, int interleave, int swizzle) {
    memset(map, 0, 128);
    uint32_t *halves = (uint32_t *)map, atom = swizzle > 3;
    if (type == 9) type = 10;  // BF16
    map[0] = address;
    map[1] = (rank - 1) << 4 | type << 7 | (atom ? 3 : swizzle) << 13 | atom << 19;
    for (uint32_t i = 0; i + 1 < rank; i++) halves[3 + i] = strides[i] / 16;
    for (uint32_t i = 0; i < rank; i++) halves[8 + i] = dims[i] - 1;
    map[6] |= (uint64_t)(box[0] - 1) << 56;
    for (uint32_t i = 1; i < rank; i++) map[7] |= (uint64_t)(box[i] - 1) << 8 * (i - 1);
    return 0;
}
"""

COMPILE = r"""
import ctypes, importlib.util, json, os, re, sys
import cutlass, cutlass.cute as cute
from cutlass.cute.runtime import make_fake_compact_tensor, make_fake_stream
path, root, given = sys.argv[1], sys.argv[2], json.loads(sys.argv[3])
sys.path[:0] = [os.path.dirname(path), root, os.path.dirname(root)]
spec = importlib.util.spec_from_file_location("example", path)
example = importlib.util.module_from_spec(spec)
sys.modules["example"] = example
spec.loader.exec_module(example)
F32 = cutlass.Float32
for name, value in given["settings"].items():
    setattr(example, name, value)
tensors = [
    make_fake_compact_tensor(getattr(cutlass, dtype), shape, stride_order=order, assumed_align=128)
    for dtype, shape, order in given["tensors"]
]
stream = make_fake_stream()
function = eval(given["function"])
arguments = eval("[" + given["arguments"] + "]", globals() | dict(zip("abcd", tensors)))
options = f"--gpu-arch {given['arch']} --keep-ptx --dump-dir {os.getcwd()}"
done = cute.compile(function, *arguments, options=options)
ptx = done.__ptx__
entry = ptx.split(".entry")[1].split("{")[0]
width = {"8": 1, "16": 2, "32": 4, "64": 8}
sizes = [width[bits] * int(count or 1) for bits, count in
         re.findall(r"\.param (?:\.align \d+ )?\.[a-z](\d+) \w+(?:\[(\d+)\])?", entry)]
libc = ctypes.CDLL(None)
libc.setenv(b"LAUNCHES", b"launches", 1)
libc.setenv(b"PARAMETER_SIZES", ",".join(map(str, sizes)).encode(), 1)
values = [ctypes.c_uint64(each) for each in given["addresses"]]
for each in arguments:
    if isinstance(each, cutlass.Float32):
        values.append(ctypes.c_float(each.value))
values += [ctypes.c_uint64(0), ctypes.c_uint64(0)]  # the stream, and the result
packed = (ctypes.c_void_p * len(values))(*[ctypes.addressof(value) for value in values])
host = done.engine.lookup(done.function_name)
ctypes.CFUNCTYPE(None, ctypes.c_void_p)(host)(packed)
open("kernel.ptx", "w").write(ptx)
"""


@dataclass(frozen=True, kw_only=True)
class Gemm:
    """One configuration of an example: C = A B^T, batched if `size` has a fourth number.

    file: below the examples. function, arguments: Python text, in which a, b and c are the tensors.
    size: m, n, k and the batch. ab, c: DSL types. majors: of A, B and C. settings: globals of the
    example to set first.
    """

    name: str
    arch: str
    file: str
    function: str
    arguments: str = "a, b, c, stream"
    size: tuple[int, ...]
    ab: str = "Float16"
    c: str = "Float16"
    majors: str = "kkn"
    settings: dict[str, object] = field(default_factory=dict)

    def __hash__(self) -> int:
        return hash(self.name)

    def tensors(self) -> list[tuple[str, tuple[int, ...], tuple[int, ...]]]:
        """Return type, shape and stride order of A, B and C."""
        m, n, k, *batch = self.size
        shapes = ((m, k), (n, k), (m, n))
        second = "kkn"
        return [
            (
                self.c if at == 2 else self.ab,
                (*shape, *batch),
                ((1, 0, 2) if self.majors[at] == second[at] else (0, 1, 2))[: 2 + len(batch)],
            )
            for at, shape in enumerate(shapes)
        ]


NUMPY = {"Float16": np.float16, "BFloat16": np.uint16, "Float32": np.float32}
BASES = (0x1000_0000_0000, 0x2000_0000_0000, 0x3000_0000_0000)


def runtime(folder: Path) -> str:
    """Compile the stand-in for the runtime; the test is skipped without a C compiler."""
    compiler = shutil.which("cc") or pytest.skip("no C compiler makes the stand-in for the runtime")
    source, library = folder / "runtime.c", folder / "runtime.so"
    source.write_text(RUNTIME)
    subprocess.run([compiler, "-shared", "-fPIC", "-o", library, source], check=True)
    return str(library)


def capture(gemm: Gemm, folder: Path) -> tuple[str, list[str]]:
    """Compile an example in a process; return its PTX and the line of its launch."""
    pytest.importorskip("cutlass", reason="the DSL (nvidia-cutlass-dsl) is not installed")
    given = {
        "tensors": gemm.tensors(), "arch": gemm.arch, "function": gemm.function,
        "arguments": gemm.arguments, "addresses": BASES, "settings": gemm.settings,
    }  # fmt: skip
    path = Path(str(EXAMPLES)) / gemm.file
    done = subprocess.run(
        [sys.executable, "-c", COMPILE, path, str(EXAMPLES), json.dumps(given)],
        capture_output=True,
        text=True,
        cwd=folder,
        env=os.environ | {"CUTE_DSL_LIBS": runtime(folder), "CUTE_DSL_ARCH": gemm.arch},
        check=False,
    )
    assert done.returncode == 0, (done.stdout + done.stderr)[-3000:]
    (line,) = (folder / "launches").read_text().splitlines()
    return (folder / "kernel.ptx").read_text(), line.split(" ")


# Types and swizzles in a tensor map's 128 bytes.
ELEMENTS = {
    0: "uint8", 1: "uint16", 2: "uint32", 3: "int32", 6: "float16", 7: "float32", 10: "bfloat16",
}  # fmt: skip
SWIZZLES = ("none", "32B", "64B", "128B")
ATOMS = ("", "_atom_32B")


def tensor_map(words: list[int], array: DeviceArray) -> TensorMap:
    """Decode a tensor map in tiled mode; LaunchError for elements that the emulator lacks."""
    code = words[1] >> 7 & 15
    if code not in ELEMENTS:
        raise LaunchError(f"a tensor map of element type {code}; supported are {ELEMENTS}")
    rank = (words[1] >> 4 & 7) + 1
    halves = [word >> shift & 0xFFFFFFFF for word in words for shift in (0, 32)]
    boxes = [words[6] >> 56, *(words[7] >> 8 * i & 255 for i in range(4))]
    return TensorMap(
        array=array,
        element_type=ELEMENTS[code],
        dims=tuple(each + 1 for each in halves[8 : 8 + rank]),
        strides=tuple(each * 16 for each in halves[3 : 2 + rank]),
        box=tuple(each + 1 for each in boxes[:rank]),
        swizzle=SWIZZLES[words[1] >> 13 & 3] + ATOMS[words[1] >> 19 & 3],
    )


def launch_of(gemm: Gemm, line: list[str], arrays: list[DeviceArray]) -> tuple[Launch, list]:
    """Return the launch and its arguments, with the arrays where the host code put addresses."""
    numbers = [int(each) for each in line[:10]]
    launch = Launch(
        grid=tuple(numbers[:3]), block=tuple(numbers[3:6]), cluster=tuple(numbers[6:9]),
        dynamic_shared_bytes=numbers[9], arch=gemm.arch,
    )  # fmt: skip
    arguments: list = []
    for raw in map(bytes.fromhex, line[10:]):
        words = np.frombuffer(raw[: len(raw) // 8 * 8], np.uint64).tolist()
        first = words[0] if words else 0
        if first not in BASES:
            arguments.append(raw)
            continue
        array = arrays[BASES.index(first)]
        if len(raw) == 128:
            arguments.append(tensor_map(words, array))
        else:
            arguments.append((array, raw[8:]) if raw[8:] else array)
    return launch, arguments


def integers(gemm: Gemm) -> tuple[np.ndarray, np.ndarray]:
    """Return A and B of small integers, [batch, rows, k]: the sums are exact in FP16."""
    m, n, k, *batch = gemm.size
    rng = np.random.default_rng(5)
    a, b = (rng.integers(-2, 3, (*(batch or [1]), rows, k)) for rows in (m, n))
    return a.astype(np.float32), b.astype(np.float32)


def stored(values: np.ndarray, dtype: str, order: tuple[int, ...]) -> np.ndarray:
    """Return [batch, rows, columns] as the bytes of a tensor of this type and stride order."""
    kept = values if order[0] == 1 else values.transpose(0, 2, 1)
    kept = np.ascontiguousarray(kept, np.float32)
    if dtype == "BFloat16":
        return (kept.view(np.uint32) >> 16).astype(np.uint16)
    return kept.astype(NUMPY[dtype])


def loaded(memory: np.ndarray, dtype: str, order: tuple[int, ...]) -> np.ndarray:
    """Return what `stored` took."""
    if dtype == "BFloat16":
        memory = (memory.astype(np.uint32) << 16).view(np.float32)
    values = memory.astype(np.float32)
    return values if order[0] == 1 else values.transpose(0, 2, 1)


def device_arrays(gemm: Gemm) -> tuple[list[DeviceArray], np.ndarray]:
    """Return A, B and C as arrays, C without contents, and the product."""
    a, b = integers(gemm)
    product = a @ b.transpose(0, 2, 1)
    arrays = []
    for name, values, (dtype, _, order) in zip("abc", (a, b, product), gemm.tensors(), strict=True):
        data = stored(values if name != "c" else values * 0, dtype, order)
        arrays.append(
            DeviceArray(name=name, data=data, read_only=name != "c", initialised=name != "c")
        )
    return arrays, product
