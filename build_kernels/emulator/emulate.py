"""`emulate`: PTX text, a launch and arguments in; memory and findings out."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

from build_kernels.emulator.execution.machine import Machine
from build_kernels.emulator.execution.warp import Decoded
from build_kernels.emulator.findings import Finding
from build_kernels.emulator.instructions import collectives
from build_kernels.emulator.instructions.operands import Context
from build_kernels.emulator.instructions.table import decoder_of
from build_kernels.emulator.launch.dynamic_shared import check_reach
from build_kernels.emulator.launch.launch import (
    Argument,
    DeviceArray,
    Launch,
    Schedule,
    check_launch,
    pack,
)
from build_kernels.emulator.launch.variables import place_variables
from build_kernels.emulator.memory.memory import Memory
from build_kernels.emulator.ptx.parser import parse
from build_kernels.emulator.ptx.syntax import Instruction, Kernel


@dataclass(frozen=True, kw_only=True)
class Result:
    """What a run left behind.

    memory: array name -> contents after the run (dtype and shape of its DeviceArray); bytes of an
    array that was not initialised and never written are 0xFF;
    findings: by PTX line, empty for a clean run; steps: instructions of all warps, about.
    """

    memory: dict[str, NDArray[Any]]
    findings: tuple[Finding, ...]
    steps: int


def emulate(
    ptx: str,
    launch: Launch,
    arguments: Sequence[Argument],
    schedule: Schedule | None = None,
    *,
    approximate: Mapping[str, Callable[[NDArray[Any]], NDArray[Any]]] | None = None,
) -> Result:
    """Run a kernel of a PTX module on the CPU.

    ptx: the module's text; launch: grid, block, cluster and architecture; arguments: one for each
    kernel parameter, in order: an int, float, bytes or NumPy scalar; a DeviceArray for a
    pointer; a TensorMap; or a tuple of these for a struct. schedule: Schedule() when None.
    approximate: opcode, such as "ex2.approx.ftz.f32", -> function of 32 values of its type, to
    use a GPU's own results where the emulator would round correctly.

    The same inputs give the same result. Raises PtxError for PTX that is not understood and
    LaunchError for a launch or arguments that do not fit; nothing has run then (but a matrix
    descriptor of a kind that is not modelled is met only as it is used). Faults of the kernel are
    findings of the result, not exceptions.
    """
    parsed = _parsed(ptx, launch.kernel)
    kernel = replace(parsed, instructions=list(parsed.instructions))
    check_launch(kernel, launch)
    check_reach(kernel, launch)
    packed = pack(kernel, arguments)
    machine = Machine(kernel, launch, packed, schedule or Schedule())
    placed = place_variables(machine, kernel, launch)
    context = Context(
        arch=launch.arch,
        shared=placed["shared"],
        parameters={p.name: p.offset for p in kernel.parameters},
        addresses=placed["address"],
        approximate=approximate or {},
    )
    machine.program = decode(kernel, context)
    arrays = _place_arrays(machine)
    machine.run()
    memory = {
        array.name: placed_.data.view(array.data.dtype).reshape(array.data.shape)
        for array, placed_ in arrays.items()
    }
    return Result(memory=memory, findings=machine.log.findings(), steps=machine.steps)


# Runs of one text under several schedules parse it once: a quarter of a small run's time.
_parsed = lru_cache(maxsize=4)(parse)


def decode(kernel: Kernel, context: Context) -> list[Decoded]:
    """Turn every instruction into a closure; PtxError for the first that is unknown."""
    program = []
    for ins in kernel.instructions:
        decoder = decoder_of(ins)
        try:
            run = decoder(ins, context)
        except IndexError:
            raise ins.error("has too few operands or modifiers") from None
        guard, negated = (ins.guard[0].index, ins.guard[1]) if ins.guard else (-1, False)
        target = -1 if ins.target is None else ins.target
        program.append(Decoded(ins, run, guard, negated, target))
    end = Instruction(len(program), kernel.line, "the end of the kernel", "ret", ())
    program.append(Decoded(end, collectives.leave(end, context)))
    kernel.instructions.append(end)
    return program


def _place_arrays(machine: Machine) -> dict[DeviceArray, Memory]:
    """Give every array an address and fill pointers and tensor maps in."""
    arrays: dict[DeviceArray, Memory] = {}

    def place(array: DeviceArray) -> Memory:
        if array not in arrays:
            memory = Memory(
                array.name,
                array.data.nbytes,
                initial=np.frombuffer(array.data.tobytes(), dtype=np.uint8)
                if array.initialised
                else None,
                read_only=array.read_only,
                dependent=array.dependent,
            )
            machine.memory.place(memory)
            arrays[array] = memory
        return arrays[array]

    for offset, array in machine.packed.pointers.items():
        base = place(array).base
        machine.parameters.data[offset : offset + 8] = np.array([base], np.uint64).view(np.uint8)
    for offset, described in machine.packed.tensor_maps.items():
        machine.tensor_maps[offset] = (described, place(described.array))
    return arrays
