"""`emulate`: run PTX text with a launch and arguments; return memory and findings."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cached_property, partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from build_kernels.binaries.ptx.parser import parse
from build_kernels.binaries.ptx.syntax import UnsupportedPtx
from build_kernels.emulator.access.thread_access import ThreadAccess
from build_kernels.emulator.coverage import Coverage
from build_kernels.emulator.execution.grid import Grid
from build_kernels.emulator.execution.machine import Machine
from build_kernels.emulator.findings import Finding, FindingLog, PtxError
from build_kernels.emulator.instructions.ld_st import Load
from build_kernels.emulator.instructions.lookahead import Code, Lookahead, live_registers
from build_kernels.emulator.instructions.table import make_blocks, make_program
from build_kernels.emulator.lanes import LANES, Ints
from build_kernels.emulator.launch.arguments import Argument, PackedArguments, pack
from build_kernels.emulator.launch.device_array import DeviceArray
from build_kernels.emulator.launch.dynamic_shared import check_dynamic_shared
from build_kernels.emulator.launch.launch import Launch, Schedule, check_launch
from build_kernels.emulator.launch.tear import OnLoad, Tear, change, tear_arrays
from build_kernels.emulator.launch.variables import place_variables
from build_kernels.emulator.memory.memory import Access, Memory


@dataclass(frozen=True, kw_only=True)
class Result:
    """The state after a run.

    memory: array name -> contents after the run (dtype and shape of its DeviceArray); bytes of an
    array that was not initialised and never written are 0xFF.
    findings: by PTX line; empty for a clean run. steps: instructions of all warps, about.
    trapped: a thread executed trap, which ended the launch there; the finding `trap` says which.
    """

    memory: dict[str, NDArray[Any]]
    findings: tuple[Finding, ...]
    steps: int
    trapped: bool


def emulate(
    ptx: str,
    launch: Launch,
    arguments: Sequence[Argument],
    schedule: Schedule | None = None,
    *,
    approximate: Mapping[str, Callable[[NDArray[Any]], NDArray[Any]]] | None = None,
    on_load: OnLoad | None = None,
    coverage: Coverage | None = None,
    by_the_letter: bool = True,
) -> Result:
    """Run a kernel of a PTX module on the CPU.

    ptx: the module's text. launch: grid, block, cluster and architecture. arguments: one per
    kernel parameter, in order: an int, float, bytes or NumPy scalar; a DeviceArray for a pointer;
    a TensorMap; or a tuple of these for a struct. schedule: Schedule() if None.
    approximate: opcode, such as "ex2.approx.ftz.f32", -> function of 32 values of its type, to
    use a GPU's own results where the emulator would round correctly. on_load: tears arrays as the
    launch goes; it may fork the process, and the child finishes the launch with other contents
    than the parent. coverage: records the instructions and outcomes that the launch reaches.
    by_the_letter: report faults by the letter of the ISA too, against whose effect hardware or
    ptxas guards (see the package); it changes no result and no other finding.

    The same inputs give the same result. Raises PtxError for PTX that is not supported and
    LaunchError for a launch or arguments that do not fit. Nothing has run then, except that a
    matrix descriptor of an unsupported kind is met only at its use. Faults of the kernel are
    findings of the result, not exceptions.
    """
    with _garbage_kept():
        return _emulate(
            ptx,
            launch,
            arguments,
            schedule or Schedule(),
            approximate or {},
            on_load,
            coverage,
            FindingLog(by_the_letter=by_the_letter),
        )


@contextmanager
def _garbage_kept() -> Iterator[None]:
    """Collect what a launch leaves once, after it: it has cycles, but few before its end."""
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()
            gc.collect(0)


def _emulate(
    ptx: str,
    launch: Launch,
    arguments: Sequence[Argument],
    schedule: Schedule,
    approximate: Mapping[str, Callable[[NDArray[Any]], NDArray[Any]]],
    on_load: OnLoad | None,
    coverage: Coverage | None,
    log: FindingLog,
) -> Result:
    """Run a kernel: see `emulate`."""
    try:
        kernel = parse(ptx, launch.kernel)
        check_launch(kernel, launch)
        check_dynamic_shared(kernel, launch)
        packed = pack(kernel, arguments)
        layout = place_variables(kernel, launch.dynamic_shared_bytes)
        program = make_program(kernel, layout, launch.arch, approximate)
        watched = program
        if coverage is not None:
            watched = replace(program, code=coverage.watch(kernel, program.code))
        machine = Machine(watched, launch, packed, schedule, log)
        arrays = _place_arrays(machine.grid, packed)
        if on_load is not None:
            make_blocks(program)  # before a fork: not in each child
            _Loads(program.code, arrays, on_load)
        machine.run()
    except UnsupportedPtx as error:
        raise PtxError(str(error)) from None
    memory = {
        array.name: placed.data.view(array.data.dtype).reshape(array.data.shape)
        for array, placed in arrays.items()
    }
    return Result(
        memory=memory,
        findings=machine.grid.log.findings(),
        steps=machine.grid.steps,
        trapped=machine.trapped,
    )


def _place_arrays(grid: Grid, packed: PackedArguments) -> dict[DeviceArray, Memory]:
    """Give every array an address, and fill in pointers and tensor maps."""
    arrays: dict[DeviceArray, Memory] = {}

    def place(array: DeviceArray) -> Memory:
        if array not in arrays:
            contents = np.frombuffer(array.data.tobytes(), dtype=np.uint8)
            arrays[array] = Memory(
                array.name,
                array.data.nbytes,
                initial=contents if array.initialised else None,
                read_only=array.read_only,
                dependent=array.dependent,
            )
            grid.memory.place(arrays[array])
        return arrays[array]

    for offset, array in packed.pointers.items():
        base = place(array).base
        grid.parameters.data[offset : offset + 8] = np.array([base], np.uint64).view(np.uint8)
    for offset, described in packed.tensor_maps.items():
        grid.tensor_maps[offset] = (described, place(described.array))
    return arrays


class _Loads:
    """The loads of a launch: tear arrays before them. live: made at the first look ahead."""

    def __init__(self, code: Code, arrays: Mapping[DeviceArray, Memory], on_load: OnLoad) -> None:
        self._code = code
        self._arrays = arrays
        self._on_load = on_load
        for array, placed in arrays.items():
            placed.on_load = partial(self._before, array)

    @cached_property
    def live(self) -> list[int]:
        return live_registers(self._code)

    def _before(self, array: DeviceArray, offsets: Ints, access: Access) -> None:
        depends = partial(self._depends, array, offsets, access)
        tear_arrays(self._arrays, self._on_load(array.name, offsets, depends))

    def _depends(self, array: DeviceArray, offsets: Ints, access: Access, tear: Tear) -> bool:
        """Return False if the launch does not depend on whether this load meets the tear."""
        if not isinstance(access, ThreadAccess):
            return True
        w, lanes = access.warp, access.lanes
        load = self._code[w.fragment.pc].run
        if not isinstance(load, Load) or len(lanes) != w.bits.bit_count():
            return True
        old = self._arrays[array].data
        new = old.copy()
        change(array.name, new.view(array.data.dtype), tear.get(array.name, {}))
        both = np.zeros((2, LANES, access.size), dtype=np.uint8)
        both[0, lanes] = old[offsets].reshape(len(lanes), -1)
        both[1, lanes] = new[offsets].reshape(len(lanes), -1)
        return Lookahead(w, self._code, self.live).depends(load, both[0], both[1])
