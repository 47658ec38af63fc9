"""NVIDIA's tutorial GEMMs, compiled by the DSL and emulated: exact, and only faults they have.

Needs the CuTeDSL examples of a checkout of NVIDIA/cutlass, which are not part of this project:
CUTLASS_EXAMPLES=<checkout>/examples/python/CuTeDSL/cute python -m pytest tests/test_emulator_tutorials.py
"""  # noqa: E501

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from test_emulator import kinds
from test_emulator_tensor import as_bf16

from build_kernels.emulator import DeviceArray, Launch, Schedule, TensorMap, emulate

EXAMPLES = os.environ.get("CUTLASS_EXAMPLES")
pytestmark = pytest.mark.skipif(
    not EXAMPLES, reason="CUTLASS_EXAMPLES does not name NVIDIA/cutlass's CuTeDSL examples"
)

# The examples do not wait for tcgen05.ld, put no tcgen05.fence behind an mbarrier wait, and let
# all 32 lanes of a warp issue the same TMA store.
KNOWN_SM100 = {"missing-tcgen05-fence", "unwaited-register"}
KNOWN_STORES = {"race"}

LOADER = """
import importlib.util, os, sys
import cutlass, cutlass.cute as cute
from cutlass.cute.runtime import make_fake_compact_tensor, make_fake_stream
path, out = sys.argv[1:3]
m, n, k = (int(x) for x in sys.argv[3].split(","))
sys.path[:0] = [os.path.dirname(path), sys.argv[4], os.path.dirname(sys.argv[4])]
spec = importlib.util.spec_from_file_location("example", path)
example = importlib.util.module_from_spec(spec)
spec.loader.exec_module(example)
def fake(dtype, shape, order):
    return make_fake_compact_tensor(dtype, shape, stride_order=order, assumed_align=128)
"""
BLACKWELL = """
half = cutlass.Float16
tensors = [fake(half, s, (1, 0)) for s in ((m, k), (n, k), (m, n))]
done = cute.compile(example.host_function, *tensors, options="--gpu-arch sm_100a --keep-ptx "
                    f"--dump-dir {out}")
open(out + "/kernel.ptx", "w").write(done.__ptx__)
"""
HOPPER = """
major = (0, 1, 2) if sys.argv[5] == "mn" else (1, 0, 2)
dtype = cutlass.BFloat16
tensors = [fake(dtype, (m, k, 1), major), fake(dtype, (n, k, 1), major),
           fake(cutlass.Float32, (m, n, 1), (1, 0, 2))]
gemm = example.HopperWgmmaGemmKernel(cutlass.Float32, (64, 64), (1, 1))
done = cute.compile(gemm, *tensors, make_fake_stream(), options="--gpu-arch sm_90a --keep-ptx "
                    f"--dump-dir {out}")
open(out + "/kernel.ptx", "w").write(done.__ptx__)
"""


def compiled(tmp_path, example, code, size, *more) -> str:
    """The PTX of an example; the DSL runs in a process of its own."""
    pytest.importorskip("cutlass", reason="the DSL (nvidia-cutlass-dsl) is not installed")
    path = Path(str(EXAMPLES)) / example
    command = [sys.executable, "-c", LOADER + code, path, tmp_path, ",".join(map(str, size)),
               str(EXAMPLES), *more]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    return (tmp_path / "kernel.ptx").read_text()


def operand(name, values, bf16, transposed, box, swizzle="128B"):
    stored = values.T if transposed else values
    data = as_bf16(stored) if bf16 else np.ascontiguousarray(stored, np.float16)
    array = DeviceArray(name=name, data=data, read_only=True)
    return TensorMap(
        array=array, element_type="bfloat16" if bf16 else "float16",
        dims=data.shape[::-1], strides=(data.shape[1] * 2,), box=box, swizzle=swizzle,
    )  # fmt: skip


def integers(m, n, k):
    rng = np.random.default_rng(5)
    a = rng.integers(-2, 3, (m, k)).astype(np.float32)
    b = rng.integers(-2, 3, (n, k)).astype(np.float32)
    return a, b


@pytest.mark.parametrize(
    ("number", "cluster", "threads", "box_n"),
    [(0, 1, 128, 256), (1, 2, 128, 128), (2, 2, 192, 128)],
)
def test_blackwell_tutorial(tmp_path, number, cluster, threads, box_n):
    m, n, k = 128 * cluster, 256, 256
    file = f"blackwell/tutorial/tutorial_gemm/fp16_gemm_{number}.py"
    ptx = compiled(tmp_path, file, BLACKWELL, (m, n, k))
    a, b = integers(m, n, k)
    out = DeviceArray(name="c", data=np.zeros((m, n), np.float16), initialised=False)
    last: DeviceArray | TensorMap = out
    if number == 2:
        last = TensorMap(
            array=out, element_type="float16", dims=(n, m), strides=(n * 2,), box=(32, 128),
            swizzle="64B",
        )  # fmt: skip
    for policy in ("latest", "random"):
        result = emulate(
            ptx,
            Launch(
                grid=(cluster, 1, 1), block=(threads, 1, 1), cluster=(cluster, 1, 1),
                dynamic_shared_bytes=225_000, arch="sm_100a",
            ),
            [
                bytes(32 * cluster),
                operand("a", a, False, False, (64, 128)),
                operand("b", b, False, False, (64, box_n)),
                last,
            ],
            Schedule(policy=policy),
        )  # fmt: skip
        np.testing.assert_array_equal(result.memory["c"], a @ b.T)
        known = KNOWN_SM100 | (KNOWN_STORES if number == 2 else set())
        assert kinds(result) == known, [str(f) for f in result.findings]


@pytest.mark.parametrize("majors", ["k", "mn"])
def test_hopper_dense_gemm(tmp_path, majors):
    m, n, k = 128, 128, 256
    file = "hopper/kernel/dense_gemm/dense_gemm.py"
    ptx = compiled(tmp_path, file, HOPPER, (m, n, k), majors)
    a, b = integers(m, n, k)
    out = DeviceArray(name="c", data=np.zeros((m, n), np.float32), initialised=False)
    c_map = TensorMap(
        array=out, element_type="float32", dims=(n, m), strides=(n * 4,), box=(32, 64),
        swizzle="128B",
    )  # fmt: skip
    for policy in ("latest", "random"):
        result = emulate(
            ptx,
            Launch(grid=(2, 2, 1), block=(128, 1, 1), dynamic_shared_bytes=220_000, arch="sm_90a"),
            [
                operand("a", a, True, majors == "mn", (64, 64)),
                operand("b", b, True, majors == "mn", (64, 64)),
                c_map,
                bytes(1),
            ],
            Schedule(policy=policy),
        )
        np.testing.assert_array_equal(result.memory["c"], a @ b.T)
        assert kinds(result) == KNOWN_STORES, [str(f) for f in result.findings]
