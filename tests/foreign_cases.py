"""The configurations of NVIDIA's CuTeDSL GEMMs that the emulator runs."""

from __future__ import annotations

from foreign_gemms import BLACKWELL, HOPPER, TUTORIAL, Gemm


def _tutorial(number: str, *, size: tuple[int, int, int], arguments: str = "a, b, c") -> Gemm:
    return Gemm(
        name=f"tutorial {number}",
        arch="sm_100a",
        file=f"{TUTORIAL}fp16_gemm_{number}.py",
        function="example.host_function",
        arguments=arguments,
        size=size,
    )


def _blackwell(
    name: str,
    file: str,
    kernel: str,
    *,
    size: tuple[int, ...] = (256, 256, 128, 1),
    arguments: str = "a, b, c, stream",
    **more: str,
) -> Gemm:
    return Gemm(
        name=name,
        arch="sm_100a",
        file=f"{BLACKWELL}{file}.py",
        function=f"example.{kernel}",
        arguments=arguments,
        size=size,
        **more,
    )


def _hopper(name: str, kernel: str, *, file: str = "dense_gemm", **more: object) -> Gemm:
    given = {"size": (128, 128, 256, 1), "ab": "BFloat16", "c": "Float32"} | more
    return Gemm(
        name=name, arch="sm_90a", file=f"{HOPPER}{file}.py", function=f"example.{kernel}", **given
    )


_DENSE = "dense_gemm"
_PERSISTENT, _CLUSTERS = "dense_gemm_persistent", "a, b, c, 2, stream"
_ONE, _PAIR = "False, (128, 128), (1, 1)", "True, (256, 128), (2, 1)"

GEMMS = (
    _tutorial("0", size=(128, 256, 256)),
    _tutorial("1", size=(256, 256, 256)),
    _tutorial("2", size=(256, 256, 256)),
    _tutorial("3", size=(512, 256, 128), arguments="a, b, c, 1"),
    _tutorial("3_1", size=(512, 256, 128), arguments="a, b, c, 1"),
    _tutorial("5", size=(512, 128, 128), arguments="a, b, c, 1"),
    _blackwell("dense, TMA store", _DENSE, f"DenseGemmKernel(F32, {_ONE}, True)"),
    _blackwell("dense", _DENSE, f"DenseGemmKernel(F32, {_ONE}, False)"),
    _blackwell("dense, pair, TMA store", _DENSE, f"DenseGemmKernel(F32, {_PAIR}, True)"),
    _blackwell("dense, pair", _DENSE, f"DenseGemmKernel(F32, {_PAIR}, False)"),
    _blackwell(
        *("dense, multicast", _DENSE, "DenseGemmKernel(F32, False, (128, 64), (2, 2), True)"),
        size=(256, 128, 128, 1),
    ),
    _blackwell(
        *("dense, mn-major, BF16 to FP32", _DENSE, f"DenseGemmKernel(F32, {_ONE}, True)"),
        **{"majors": "mnm", "ab": "BFloat16", "c": "Float32"},
    ),
    _blackwell(
        *("dense, M 64", _DENSE, "DenseGemmKernel(F32, False, (64, 64), (1, 1), True)"),
        size=(128, 128, 64, 2),
    ),
    _blackwell("software pipeline", f"{_DENSE}_software_pipeline",
               f"DenseGemmKernel(F32, {_ONE}, True)"),
    _blackwell("software pipeline, pair", f"{_DENSE}_software_pipeline",
               f"DenseGemmKernel(F32, {_PAIR}, False)"),
    _blackwell("persistent, TMA store", _PERSISTENT,
               f"PersistentDenseGemmKernel(F32, {_ONE}, True)", arguments=_CLUSTERS),
    _blackwell("persistent", _PERSISTENT, f"PersistentDenseGemmKernel(F32, {_ONE}, False)",
               arguments=_CLUSTERS),
    _blackwell("persistent, pair, TMA store", _PERSISTENT,
               f"PersistentDenseGemmKernel(F32, {_PAIR}, True)", arguments="a, b, c, 1, stream"),
    _blackwell("persistent, pair", _PERSISTENT, f"PersistentDenseGemmKernel(F32, {_PAIR}, False)",
               arguments="a, b, c, 1, stream"),
    _blackwell("persistent, prefetch", f"{_PERSISTENT}_prefetch",
               f"PersistentDenseGemmKernel(F32, {_ONE}, True)", arguments=_CLUSTERS),
    _blackwell("persistent, prefetch, pair", f"{_PERSISTENT}_prefetch",
               f"PersistentDenseGemmKernel(F32, {_PAIR}, True)", arguments="a, b, c, 1, stream"),
    _blackwell("dynamic", f"{_PERSISTENT}_dynamic",
               f"PersistentDenseGemmKernel(F32, {_ONE}, True)"),
    _blackwell("dynamic, pair", f"{_PERSISTENT}_dynamic",
               f"PersistentDenseGemmKernel(F32, {_PAIR}, True)", size=(512, 256, 128, 1)),
    _hopper("hopper", "HopperWgmmaGemmKernel(F32, (64, 64), (1, 1))"),
    _hopper("hopper, mn-major", "HopperWgmmaGemmKernel(F32, (64, 64), (1, 1))", majors="mnn"),
    _hopper("hopper, multicast", "HopperWgmmaGemmKernel(F32, (64, 64), (2, 1))"),
    _hopper("hopper, FP16", "HopperWgmmaGemmKernel(F32, (128, 64), (1, 2))",
            **{"ab": "Float16", "c": "Float16"}),
    _hopper("hopper persistent", "HopperWgmmaGemmPersistentKernel(F32, (128, 64), (1, 1), 1, True)",
            file="dense_gemm_persistent", arguments="a, b, c, 2, stream", size=(256, 128, 128, 1)),
    _hopper("hopper persistent, multicast",
            "HopperWgmmaGemmPersistentKernel(F32, (64, 128), (2, 1), 1, True)",
            file="dense_gemm_persistent", arguments="a, b, c, 1, stream", c="Float16",
            size=(256, 128, 128, 1)),
)  # fmt: skip
