"""The launch and the schedule of a run, and the checks that they fit the kernel."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from build_kernels.binaries.ptx.syntax import Kernel
from build_kernels.emulator.findings import LaunchError
from build_kernels.emulator.memory.windows import SHARED_CAPACITY, SHARED_RESERVED

POLICIES = ("earliest", "latest", "random")
MAX_THREADS = 1024
MAX_CLUSTER = 16
MAX_DYNAMIC_SHARED = SHARED_CAPACITY - SHARED_RESERVED


@dataclass(frozen=True, kw_only=True)
class Launch:
    """Launch configuration.

    grid: CTAs. block: threads per CTA. cluster: CTAs per cluster; divides the grid.
    dynamic_shared_bytes: extern shared memory. arch: the PTX's target, e.g. "sm_100a".
    kernel: the name of the .entry if the module has several.
    """

    grid: tuple[int, int, int]
    block: tuple[int, int, int]
    cluster: tuple[int, int, int] = (1, 1, 1)
    dynamic_shared_bytes: int = 0
    arch: str
    kernel: str | None = None

    def __post_init__(self) -> None:
        for name in ("grid", "block", "cluster"):
            value = getattr(self, name)
            if len(value) != 3 or any(not isinstance(n, int) or n < 1 for n in value):
                raise LaunchError(f"launch.{name}: expected 3 ints >= 1 (got {value})")
        if np.prod(self.block) > MAX_THREADS:
            raise LaunchError(f"launch.block: at most {MAX_THREADS} threads (got {self.block})")
        if np.prod(self.cluster) > MAX_CLUSTER:
            raise LaunchError(f"launch.cluster: at most {MAX_CLUSTER} CTAs (got {self.cluster})")
        if any(g % c for g, c in zip(self.grid, self.cluster, strict=True)):
            raise LaunchError(
                f"launch.grid: must be a multiple of the cluster (got {self.grid} for clusters "
                f"of {self.cluster}); count CTAs, not clusters"
            )
        if not 0 <= self.dynamic_shared_bytes <= MAX_DYNAMIC_SHARED:
            raise LaunchError(
                f"launch.dynamic_shared_bytes: expected 0..{MAX_DYNAMIC_SHARED} "
                f"(got {self.dynamic_shared_bytes})"
            )


@dataclass(frozen=True, kw_only=True)
class Schedule:
    """When asynchronous operations finish, and which warp runs.

    policy: "earliest" (an operation finishes as it is issued), "latest" (only when every warp is
    blocked) or "random" (any legal moment, drawn from `seed`). The same schedule gives the same
    run. resident_ctas: maximum number of CTAs on the machine; at least one cluster runs.
    freezes: a CTA or a cluster is held up at random moments, until the rest stands still.
    """

    seed: int = 0
    policy: str = "random"
    resident_ctas: int = 64
    freezes: bool = False

    def __post_init__(self) -> None:
        if self.policy not in POLICIES:
            raise LaunchError(f"schedule.policy: expected one of {POLICIES} (got {self.policy!r})")
        if self.freezes and self.policy != "random":
            raise LaunchError(f"schedule.freezes: the policy must be random (got {self.policy!r})")
        if self.resident_ctas < 1:
            raise LaunchError(f"schedule.resident_ctas: must be >= 1 (got {self.resident_ctas})")


def check_launch(kernel: Kernel, launch: Launch) -> None:
    """Raise LaunchError unless the kernel can be launched so."""
    if kernel.target != launch.arch:
        raise LaunchError(
            f"the PTX is for .target {kernel.target}, the launch for {launch.arch}; "
            "emulate it for the architecture it was compiled for"
        )
    for name, required, limit in (
        ("block", "reqntid", "maxntid"),
        ("cluster", "reqnctapercluster", "maxclusterrank"),
    ):
        value = getattr(launch, name)
        exact, most = (kernel.directives.get(directive) for directive in (required, limit))
        if exact and _filled(exact) != value:
            exact = _filled(exact)
            raise LaunchError(f"launch.{name}: the kernel has .{required} {exact} (got {value})")
        if most and np.prod(value) > np.prod(most):
            raise LaunchError(f"launch.{name}: the kernel has .{limit} {most} (got {value})")


def _filled(numbers: Sequence[int]) -> tuple[int, int, int]:
    x, y, z = (*numbers, 1, 1, 1)[:3]
    return x, y, z
