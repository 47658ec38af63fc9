"""A PTX emulator: runs sm_90a and sm_100a kernels on a CPU and reports what is wrong with them.

result = emulate(ptx, Launch(grid=..., block=..., arch="sm_100a"), arguments, Schedule(seed=1))
result.memory["out"], result.findings
"""

from build_kernels.emulator.emulator import Result, emulate
from build_kernels.emulator.findings import (
    EmulatorError,
    Finding,
    LaunchError,
    Party,
    PtxError,
    Thread,
)
from build_kernels.emulator.launch import DeviceArray, Launch, Schedule
from build_kernels.emulator.tensor_map import TensorMap

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
]
