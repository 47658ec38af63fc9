"""Clusters and CTAs: their memories and barriers."""

from __future__ import annotations

import itertools
from dataclasses import dataclass

from build_kernels.binaries.ptx.syntax import Instruction
from build_kernels.emulator.findings import Thread
from build_kernels.emulator.memory.access_records import CLUSTER_SCOPE, CTA_SCOPE
from build_kernels.emulator.memory.memory import Memory
from build_kernels.emulator.memory.tensor_memory import TensorMemory
from build_kernels.emulator.memory.windows import SHARED_RANK_SHIFT
from build_kernels.emulator.ordering.barriers import ClusterBarrier, NamedBarrier, Signal
from build_kernels.emulator.ordering.clocks import Clock
from build_kernels.emulator.ordering.mbarrier import Mbarrier
from build_kernels.emulator.ordering.warp_clocks import WarpClocks

Dim = tuple[int, int, int]

NAMED_BARRIERS = 16


@dataclass(frozen=True)
class Touch:
    """A use of a CTA's memories by an operation."""

    actor: int
    tick: int
    instruction: Instruction
    thread: Thread


class Cluster:
    """CTAs that share distributed shared memory and one barrier.

    living: the number of threads that have not exited.
    """

    def __init__(self, shape: Dim, origin: Dim, threads: int, shared_end: int, zero: Clock) -> None:
        self.shape = shape
        self.barrier = ClusterBarrier(zero)
        self.ctas: list[Cta] = []
        for z, y, x in itertools.product(*(range(n) for n in reversed(shape))):
            index = (origin[0] + x, origin[1] + y, origin[2] + z)
            self.ctas.append(Cta(self, index, (x, y, z), threads, shared_end, zero))
        self.living = threads * len(self.ctas)
        self.exited = False


class Cta:
    """A thread block's shared and tensor memory and its barriers.

    index: its place in the grid; place, rank: in the cluster. slot: its slot on the machine;
    first_actor, last_actor, first_tick: the actors of its threads, and the tick of its start.
    allocated: how often it has allocated tensor memory; allocation notifies of one more.
    living: the lanes of each warp that have not exited. touched_by: operations on its memories,
    which its threads must wait for before they exit.
    """

    def __init__(
        self, cluster: Cluster, index: Dim, place: Dim, threads: int, shared_end: int, zero: Clock
    ) -> None:
        self.cluster = cluster
        self.index = index
        self.place = place
        self.rank = len(cluster.ctas)
        self.threads = threads
        self.shared_base = self.rank << SHARED_RANK_SHIFT
        self.shared_end = shared_end
        self.shared = Memory(f"shared memory of cta {index}", shared_end)
        self.tensor_memory = TensorMemory(f"tensor memory of cta {index}")
        self.allocated = 0
        self.allocation = Signal()
        self.mbarriers: dict[int, Mbarrier] = {}
        self.living: dict[WarpClocks, int] = {}
        self.barriers = [NamedBarrier(zero, self.living) for _ in range(NAMED_BARRIERS)]
        self.touched_by: list[Touch] = []
        self.slot = self.first_actor = self.last_actor = self.first_tick = 0
        self.exited = False

    def shares(self, scope: int, other: Cta) -> bool:
        """Return whether a scope of this CTA includes the other."""
        if scope == CTA_SCOPE:
            return other is self
        return scope != CLUSTER_SCOPE or other.cluster is self.cluster


@dataclass(eq=False)
class Released:
    """The clock that the last strong write of a location released, its scope, and its CTA."""

    clock: Clock
    scope: int
    cta: Cta

    def reaches(self, scope: int, cta: Cta) -> bool:
        """Return whether a read of this scope by a CTA synchronises with the write."""
        return self.cta.shares(min(scope, self.scope), cta)
