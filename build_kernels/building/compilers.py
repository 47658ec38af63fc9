"""Compile a spec to a cubin and its PTX, with CuTeDSL or NVRTC.

Runs in worker processes (see `build`): the DSL is not thread-safe and takes two seconds to import.
NVRTC is that of toolkit 12.9, whose assembler the DSL carries too. All artifacts then hold PTX 8.8
and load with the same drivers. NVRTC is called through ctypes: `cuda.bindings` takes the newest
NVRTC that is installed, and a GPU build of torch brings another.
"""

from __future__ import annotations

import ctypes
import importlib
import importlib.metadata
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from build_kernels.binaries.wheels import how_to_repair, wheel_file
from build_kernels.specs import CudaSource, DslSource, KernelSpec

NVRTC_DISTRIBUTION = "nvidia-cuda-nvrtc-cu12"
NVRTC_LIBRARY = "libnvrtc.so.12"
DSL_DISTRIBUTION = "nvidia-cutlass-dsl"

# -lineinfo is left out: it would embed the sources' paths and modification times. Multiplications
# and additions are fused only by fmaf: see topk.cu.
NVRTC_OPTIONS = ("--std=c++17", "--fmad=false")

NO_DEFINES: Mapping[str, int] = {}
_PACKAGE = Path(__file__).resolve().parent.parent


class CompileError(Exception):
    """A compiler refused a kernel, or is not installed; the message holds the compiler's."""


@dataclass(frozen=True, kw_only=True)
class Compiled:
    """A compiled kernel, and the part of its launch that its source decides.

    parameters: their names, in the order of the source.
    """

    cubin: bytes
    ptx: str
    parameters: tuple[str, ...]
    block: tuple[int, int, int]
    dynamic_shared_bytes: int


def toolchain_versions() -> dict[str, str]:
    """Return the versions that decide bytes: of each nvidia-cutlass-dsl* distribution and NVRTC.

    The DSL's code generator is in its -libs- distributions. Reads metadata only.
    """
    versions = {
        name.lower(): distribution.version
        for distribution in importlib.metadata.distributions()
        if (name := distribution.metadata["Name"] or "").lower().startswith(DSL_DISTRIBUTION)
    }
    try:
        versions["nvrtc"] = importlib.metadata.version(NVRTC_DISTRIBUTION)
    except importlib.metadata.PackageNotFoundError:
        raise _missing(NVRTC_DISTRIBUTION) from None
    if DSL_DISTRIBUTION not in versions:
        raise _missing(DSL_DISTRIBUTION)
    return versions


def source_files(spec: KernelSpec) -> tuple[Path, ...]:
    """Return the source files of a kernel, sorted. The DSL's kernels import each other."""
    if isinstance(spec.source, CudaSource):
        return (_PACKAGE / spec.source.file,)
    return tuple(sorted((_PACKAGE / "kernels").glob("*.py")))


def compile_kernel(spec: KernelSpec, arch: str, dump_folder: Path) -> Compiled:
    """Compile one kernel for one architecture; the DSL leaves its own files in `dump_folder`."""
    if isinstance(spec.source, CudaSource):
        return _compile_cuda(spec, spec.source, arch)
    return _compile_dsl(spec, spec.source, arch, dump_folder)


def _missing(distribution: str) -> CompileError:
    return CompileError(f"{distribution} is not installed; {how_to_repair()}")


def _compile_dsl(spec: KernelSpec, source: DslSource, arch: str, dump_folder: Path) -> Compiled:
    module = importlib.import_module(source.module)
    config = {
        "role": spec.role,
        "arch": arch,
        "layout": source.layout,
        "token_tile": source.token_tile,
        "chunk": source.chunk,
        "stages": source.stages,
        "m_tiles": source.m_tiles,
        "splits": source.splits,
    }
    launch: Mapping[str, Any] = module.launch_properties(**config)
    cubin, ptx = module.compile_kernel(symbol=spec.name, dump_dir=str(dump_folder), **config)
    if not isinstance(cubin, bytes):
        # The DSL looks for its own file under the name of the architecture that it takes this one
        # for, finds none, and returns the path: sm_101a is sm_110a to it.
        raise CompileError(
            f"{DSL_DISTRIBUTION} does not compile for {arch}: it looked for *."
            f"{'.'.join(Path(cubin).name.split('.')[-2:])} and found none"
        )
    if not ptx.rstrip("\0\n").endswith("}"):
        raise CompileError(f"the PTX that {DSL_DISTRIBUTION} wrote for {arch} is cut off")
    return Compiled(
        cubin=cubin,
        ptx=ptx.rstrip("\0"),
        parameters=launch["parameters"],
        block=launch["block"],
        dynamic_shared_bytes=launch["dynamic_shared_bytes"],
    )


def _compile_cuda(spec: KernelSpec, source: CudaSource, arch: str) -> Compiled:
    text = (_PACKAGE / source.file).read_text()
    cubin, ptx = nvrtc_compile(text, name=Path(source.file).name, arch=arch, defines=source.defines)
    return Compiled(
        cubin=cubin,
        ptx=ptx,
        parameters=_declared_parameters(text, spec.symbol),
        block=source.block,
        dynamic_shared_bytes=0,
    )


def _declared_parameters(text: str, symbol: str) -> tuple[str, ...]:
    """Return the names in the parameter list of a CUDA C++ function; none without the function."""
    found = re.search(rf"\b{re.escape(symbol)}\(([^)]*)\)", text)
    return tuple(re.findall(r"(\w+)\s*(?:,|$)", found[1])) if found else ()


def nvrtc_compile(
    text: str, *, name: str, arch: str, defines: Mapping[str, int] = NO_DEFINES
) -> tuple[bytes, str]:
    """Compile CUDA C++ to (cubin, PTX), both of one compilation; CompileError holds NVRTC's log."""
    nvrtc = ctypes.CDLL(str(wheel_file(NVRTC_DISTRIBUTION, NVRTC_LIBRARY)))
    nvrtc.nvrtcGetErrorString.restype = ctypes.c_char_p
    program = ctypes.c_void_p()

    def check(result: int, step: str) -> None:
        if result != 0:
            reason = nvrtc.nvrtcGetErrorString(result).decode()
            raise CompileError(f"{name} for {arch}: NVRTC cannot {step}: {reason}")

    def output(kind: str) -> bytes:
        size = ctypes.c_size_t()
        check(getattr(nvrtc, f"nvrtcGet{kind}Size")(program, ctypes.byref(size)), f"give {kind}")
        buffer = ctypes.create_string_buffer(size.value)
        check(getattr(nvrtc, f"nvrtcGet{kind}")(program, buffer), f"give {kind}")
        return buffer.raw

    created = nvrtc.nvrtcCreateProgram(
        ctypes.byref(program), text.encode(), name.encode(), 0, None, None
    )
    check(created, "create the program")
    try:
        macros = (f"--define-macro={macro}={value}" for macro, value in defines.items())
        options = [f"--gpu-architecture={arch}", *NVRTC_OPTIONS, *macros]
        array = (ctypes.c_char_p * len(options))(*(option.encode() for option in options))
        if nvrtc.nvrtcCompileProgram(program, len(options), array) != 0:
            log = output("ProgramLog").rstrip(b"\0").decode(errors="replace").strip()
            raise CompileError(f"{name} for {arch} does not compile:\n{log}")
        return output("CUBIN"), output("PTX").rstrip(b"\0").decode()
    finally:
        nvrtc.nvrtcDestroyProgram(ctypes.byref(program))
