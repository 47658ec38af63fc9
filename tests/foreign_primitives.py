"""Run one of NVIDIA's primitives examples with the emulator in the place of the GPU.

    python foreign_primitives.py SCRIPT RESULT [ARGUMENT ...]

The script compiles its kernels, launches them and checks its own results. Its host code meets a
stand-in for the CUDA runtime, its tensors live in the CPU's memory, and each launch is emulated
under every schedule. RESULT is a JSON file: launches, findings, refused, error, and differing: the
schedules with another result than the one before. Needs torch and apache-tvm-ffi, by which the
examples call what they compile.
"""

from __future__ import annotations

import ctypes
import json
import os
import runpy
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import cutlass
import cutlass.cute as cute
import cutlass.cute.runtime
import numpy as np
import torch
import tvm_ffi
from cutlass.base_dsl.jit_executor import JitExecutor
from cutlass.cutlass_dsl.cuda_jit_executor import CudaDialectJitCompiledFunction
from foreign_gemms import tensor_map
from torch.overrides import TorchFunctionMode
from torch.utils.dlpack import to_dlpack

from build_kernels.binaries.ptx.parser import parse
from build_kernels.binaries.ptx.syntax import UnsupportedPtx
from build_kernels.emulator import DeviceArray, EmulatorError, Launch, Schedule, emulate

SCHEDULES = (Schedule(policy="latest"), Schedule(policy="earliest"), Schedule(seed=1))
CUDA = 2  # of DLPack's devices
ALIGNMENT = 256


class Stream:
    """A stream that needs no wait."""

    cuda_stream = 0

    def __init__(self, *_: object, **__: object) -> None:
        pass

    def synchronize(self) -> None:
        pass


class OnCpu(TorchFunctionMode):
    """Make the tensors of "cuda" in the CPU's memory."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        if getattr(func, "__name__", "") == "cuda":
            return _aligned(args[0])
        named = [isinstance(each, str) and each.startswith("cuda") for each in args]
        if "device" not in kwargs and not any(named):
            return func(*args, **kwargs)
        if "device" in kwargs:
            kwargs["device"] = "cpu"
        args = tuple("cpu" if cuda else each for each, cuda in zip(args, named, strict=True))
        return _aligned(func(*args, **kwargs))


def _aligned(tensor: torch.Tensor) -> torch.Tensor:
    """Return the tensor at an address that a GPU's allocator would give, if it is compact."""
    if not tensor.is_contiguous() or tensor.data_ptr() % ALIGNMENT == 0:
        return tensor
    room = torch.zeros(tensor.nbytes + ALIGNMENT, dtype=torch.uint8)
    start = -room.data_ptr() % ALIGNMENT
    place = room[start : start + tensor.nbytes].view(tensor.dtype).view(tensor.shape)
    return place.copy_(tensor)


class Emulation:
    """What the launches of a script came to. tensors: those it made views of, by address."""

    def __init__(self) -> None:
        self.tensors: dict[int, torch.Tensor] = {}
        self.launches = self.differing = 0
        self.running = False
        self.findings: dict[str, str] = {}

    def run(self, call: Callable[[], Any], ptx: str) -> None:
        """Let host code launch, and emulate each launch in its place."""
        kernel = parse(ptx, None)
        with tempfile.TemporaryDirectory() as folder:
            written = Path(folder, "launches")
            sizes = ",".join(str(each.size) for each in kernel.parameters)
            setenv = ctypes.CDLL(None).setenv
            setenv(b"LAUNCHES", str(written).encode(), 1)
            setenv(b"PARAMETER_SIZES", sizes.encode(), 1)
            self.running = True
            call()
            self.running = False
            for line in written.read_text().splitlines():
                self._emulate(ptx, kernel.target, line.split(" "))

    def _emulate(self, ptx: str, arch: str, line: list[str]) -> None:
        numbers = [int(each) for each in line[:10]]
        launch = Launch(
            grid=tuple(numbers[:3]), block=tuple(numbers[3:6]), cluster=tuple(numbers[6:9]),
            dynamic_shared_bytes=numbers[9], arch=arch,
        )  # fmt: skip
        raws = [bytes.fromhex(each) for each in line[10:]]
        memory: dict[int, np.ndarray] = {}
        for schedule in SCHEDULES:
            arrays = {
                address: DeviceArray(name=f"{address:x}", data=_bytes_of(tensor).copy())
                for address, tensor in self.tensors.items()
            }
            result = emulate(ptx, launch, _arguments(raws, arrays), schedule)
            self.launches += 1
            for finding in result.findings:
                letter = " (by the letter)" * finding.by_the_letter
                self.findings.setdefault(finding.kind + letter, str(finding))
            after = {a: result.memory[f"{a:x}"] for a in arrays if f"{a:x}" in result.memory}
            if memory and any(not np.array_equal(memory[a], after[a]) for a in after):
                self.differing += 1
            memory = after
        for address, data in memory.items():
            _bytes_of(self.tensors[address])[:] = data


def _bytes_of(tensor: torch.Tensor) -> np.ndarray:
    """Return the memory of a tensor, with what lies between its elements."""
    size = 1 + sum((n - 1) * s for n, s in zip(tensor.shape, tensor.stride(), strict=True))
    return tensor.detach().as_strided((size,), (1,)).view(torch.uint8).numpy()


def _arguments(raws: list[bytes], arrays: dict[int, DeviceArray]) -> list[Any]:
    """Return a launch's arguments, with arrays and tensor maps in the place of addresses."""
    arguments: list[Any] = []
    for raw in raws:
        words = np.frombuffer(raw[: len(raw) // 8 * 8], np.uint64).tolist()
        if len(raw) == 128 and words[0] in arrays:
            arguments.append(tensor_map(words, arrays[words[0]]))
            continue
        parts: list[Any] = []
        end = 0
        for at in (8 * i for i, word in enumerate(words) if word in arrays):
            parts += [raw[end:at]] * (end < at) + [arrays[words[at // 8]]]
            end = at + 8
        parts += [raw[end:]] * (end < len(raw))
        arguments.append(parts[0] if len(parts) == 1 else tuple(parts))
    return arguments


class _Described(ctypes.Structure):
    """The head of DLPack's DLTensor."""

    _fields_ = (("data", ctypes.c_void_p), ("device", ctypes.c_int32), ("number", ctypes.c_int32))


class _Capsule:
    """A tensor that claims to be on a GPU."""

    def __init__(self, tensor: torch.Tensor) -> None:
        self.capsule = to_dlpack(tensor)
        pointer = ctypes.pythonapi.PyCapsule_GetPointer
        pointer.restype, pointer.argtypes = ctypes.c_void_p, (ctypes.py_object, ctypes.c_char_p)
        _Described.from_address(pointer(self.capsule, b"dltensor")).device = CUDA

    def __dlpack__(self, **_: object) -> object:
        return self.capsule

    def __dlpack_device__(self) -> tuple[int, int]:
        return CUDA, 0


def _install(emulation: Emulation, folder: str) -> None:
    """Put the emulation in the place of compiled functions, and CPU tensors in that of a GPU's."""
    compile_, from_dlpack = cute.compile, cute.runtime.from_dlpack
    run = JitExecutor.run_compiled_program

    def note(tensor: torch.Tensor) -> None:
        emulation.tensors[tensor.data_ptr()] = tensor

    def given(each: Any) -> Any:
        if not isinstance(each, torch.Tensor):
            return each
        note(each)
        return tvm_ffi.from_dlpack(_Capsule(each))

    class Compiled:
        def __init__(self, function: Any, ptx: str) -> None:
            self._function, self._ptx = function, ptx

        def __call__(self, *args: Any, **kwargs: Any) -> None:
            taken = [given(each) for each in args]
            named = {name: given(each) for name, each in kwargs.items()}
            emulation.run(lambda: self._function(*taken, **named), self._ptx)

    def compiled(*args: Any, options: str = "", **kwargs: Any) -> Compiled:
        kept = tempfile.mkdtemp(dir=folder)
        options = f"{options} --keep-ptx --dump-dir {kept}"
        function = compile_(*args, options=options, **kwargs)
        (ptx,) = Path(kept).rglob("*.ptx")
        return Compiled(function, ptx.read_text())

    def viewed(tensor: Any, *args: Any, **kwargs: Any) -> Any:
        if isinstance(tensor, torch.Tensor):
            note(tensor)
        return from_dlpack(tensor, *args, **kwargs)

    def launched(self: JitExecutor, arguments: list[Any]) -> None:
        if emulation.running:
            run(self, arguments)
            return
        newest = max(Path(folder).glob("*.ptx"), key=lambda each: each.stat().st_mtime_ns)
        emulation.run(lambda: run(self, arguments), newest.read_text())

    cute.compile = compiled
    cute.runtime.from_dlpack = cutlass.cute.runtime.from_dlpack = viewed
    JitExecutor.run_compiled_program = launched
    CudaDialectJitCompiledFunction._load_cuda_library = lambda _: []
    cutlass.cuda.initialize_cuda_context = lambda *_, **__: None
    torch.cuda.is_available = lambda: True
    torch.cuda.synchronize = lambda *_: None
    torch.cuda.get_device_capability = lambda *_: (10, 0)
    torch.cuda.current_device = lambda: 0
    torch.cuda.get_device_properties = lambda *_: SimpleNamespace(
        major=10, minor=0, multi_processor_count=4, name="emulated"
    )
    torch.cuda.current_stream = torch.cuda.default_stream = torch.cuda.Stream = Stream


def main(script: str, result: str) -> None:
    emulation = Emulation()
    outcome: dict[str, object] = {"refused": "", "error": ""}
    _install(emulation, os.environ["CUTE_DSL_DUMP_DIR"])
    sys.path.insert(0, str(Path(script).parent))
    try:
        with OnCpu():
            runpy.run_path(script, run_name="__main__")
    except (EmulatorError, UnsupportedPtx) as error:
        outcome["refused"] = str(error)
    except BaseException as error:
        if not (isinstance(error, SystemExit) and not error.code):
            outcome["error"] = f"{type(error).__name__}: {error}"
            raise
    finally:
        outcome |= {
            "launches": emulation.launches, "findings": emulation.findings,
            "differing": emulation.differing,
        }  # fmt: skip
        Path(result).write_text(json.dumps(outcome))


if __name__ == "__main__":
    script, result, *sys.argv[1:] = sys.argv[1:]
    sys.argv[0] = script
    main(script, result)
