"""Emulate PTX: run sm_90a and sm_100a kernels on a CPU, and report their faults.

    result = emulate(ptx, Launch(grid=..., block=..., arch="sm_100a"), arguments, Schedule(seed=1))
    result.memory["out"], result.findings

A warp's 32 lanes are one NumPy vector. Asynchronous operations (TMA, tensor cores, st.async,
commits) are agents that act at any legal moment; the schedule picks it. Each byte has records of
its last accesses. Vector clocks over threads and agents order them, so most faults are found under
every schedule. `supported_instructions()` lists the opcode prefixes.

Findings by kind
    race                        no order between two accesses, in shared, global or tensor memory
    missing-proxy-fence         ordered, but an ordinary write meets the async proxy with no fence
    missing-tcgen05-fence       ordered, but without the tcgen05.fence pair that PTX requires
    missing-wgmma-fence         accumulators or A registers written since the last wgmma.fence
    missing-griddepcontrol-wait data of the grid before, touched with no wait for it
    unwaited-register           result of tcgen05.ld or wgmma used before its wait
    poison                      memory or a register that was never written reaches a store to
                                global memory, an address, a predicate, or another operand that
                                decides the kernel's course
    phase-overrun               an mbarrier's phase may end before a wait for the last one is over
    barrier-uninitialised, -reinitialised, -overflow, -mismatch, mbarrier-as-data
    tx-leftover, tx-overflow    transaction bytes pending at exit, or beyond the counter
    arrivals-leftover           some arrivals of a phase, but not all of them, at exit
    unfinished-at-exit          no thread of a CTA waited for an operation on the CTA's memory
    exited-peer, peer-not-started, not-own-shared      distributed shared memory
    tmem-lane, -unallocated, -allocation, -leak        tensor memory
    out-of-bounds, misaligned, read-only, tensor-map, inactive-lane, member-mask, trap
    deadlock                    with the event that each thread waits for

Findings by the letter (`Finding.by_the_letter`): the PTX ISA forbids it, compilers emit it, and
hardware or ptxas guards against its effect. `emulate` reports them unless by_the_letter is False.
The run goes on with the values of the hardware, so that none hides another fault.
    unwaited-register           result of tcgen05.ld: the scoreboard holds its use
    missing-tcgen05-fence       between a tcgen05.ld and another operation
    missing-wgmma-fence         a constant or an accumulator that was moved behind the fence
    race                        lanes of a warp that store the same bytes to the same place by one
                                bulk store; tensor memory that a pair of CTAs frees with no order
                                after the peer's access to it

The first strong load after a strong write that is not ordered before it finds the value before the
write, as PTX allows: code that does not wait for the new value is wrong in every run.

A trap ends the launch (`Result.trapped`). Time passes with the steps of the warps. If all that is
left to run are warps that spin and look at %globaltimer, it leaps ahead, so that a bounded wait
ends. `emulate`'s on_load changes arrays between two loads of one launch.

Not modelled
    a proxy fence between an ordinary read and a later write by the async proxy; the order of one
    lane's cp.async copies (they act in turn); poison of half a 64-bit register (all of it is);
    the last bits of approximate functions (ex2, lg2, rcp.approx, ...: correctly rounded, unless
    `approximate` is given; `numerics/approximations.py` has the bounds of the ISA);
    caches, timing, bank conflicts, register counts (setmaxnreg has no effect); the scopes of
    mbarrier operations (taken as the cluster's); two CTAs on one SM competing for tensor memory;
    the grid that griddepcontrol starts; the elements of one lane's vector access acting one by
    one (the lanes of a strong access do, under random schedules)
"""

from build_kernels.emulator.emulate import Result, emulate
from build_kernels.emulator.findings import (
    EmulatorError,
    Finding,
    LaunchError,
    Party,
    PtxError,
    Thread,
)
from build_kernels.emulator.instructions.table import supported_instructions
from build_kernels.emulator.launch.device_array import DeviceArray
from build_kernels.emulator.launch.launch import Launch, Schedule
from build_kernels.emulator.launch.tensor_map import TensorMap

__all__ = [
    "DeviceArray",
    "EmulatorError",
    "Finding",
    "Launch",
    "LaunchError",
    "Party",
    "PtxError",
    "Result",
    "Schedule",
    "TensorMap",
    "Thread",
    "emulate",
    "supported_instructions",
]
