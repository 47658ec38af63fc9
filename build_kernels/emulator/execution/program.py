"""A program: a kernel whose instructions are decoded and whose variables have addresses."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from build_kernels.binaries.ptx.syntax import Kernel
from build_kernels.emulator.execution.warp import DecodedInstruction
from build_kernels.emulator.launch.variables import VariableLayout


@dataclass(frozen=True, kw_only=True)
class Program:
    """A kernel that is ready to run; code: the decoded instructions, by index."""

    kernel: Kernel
    layout: VariableLayout
    code: Sequence[DecodedInstruction]
