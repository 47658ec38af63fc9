"""Clusters and CTAs."""

from __future__ import annotations

import itertools
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from build_kernels.emulator.execution.operation import Operation, Touch
from build_kernels.emulator.execution.warp import LANE_INDEX, LANES, Warp
from build_kernels.emulator.memory.memory import SHARED_RANK_SHIFT, SHARED_RESERVED, Memory
from build_kernels.emulator.memory.tensor_memory import TensorMemory
from build_kernels.emulator.ordering.barriers import ClusterBarrier, Mbarrier, NamedBarrier

if TYPE_CHECKING:
    from build_kernels.emulator.execution.machine import Machine


Dim = tuple[int, int, int]


class Cluster:
    """CTAs that share distributed shared memory and one barrier."""

    def __init__(self, machine: Machine, shape: Dim, origin: Dim) -> None:
        self.shape = shape
        self.ctas: list[Cta] = []
        self.barrier = ClusterBarrier(machine)
        for z, y, x in itertools.product(*(range(n) for n in reversed(shape))):
            rank = len(self.ctas)
            index = (origin[0] + x, origin[1] + y, origin[2] + z)
            self.ctas.append(Cta(machine, self, index, (x, y, z), rank))

    def living(self) -> int:
        return sum(warp.live.bit_count() for cta in self.ctas for warp in cta.warps)

    @property
    def exited(self) -> bool:
        return all(cta.exited for cta in self.ctas)


class Cta:
    """A thread block: its shared and tensor memory, barriers and warps."""

    def __init__(self, machine: Machine, cluster: Cluster, index: Dim, place: Dim, rank: int):
        self.machine = machine
        self.cluster = cluster
        self.index = index
        self.place = place
        self.rank = rank
        self.shared_base = rank << SHARED_RANK_SHIFT
        self.shared = Memory(f"shared memory of cta {index}", machine.shared_end)
        self.shared_end = machine.shared_end
        self.tensor_memory = TensorMemory(self)
        self.mbarriers: dict[int, Mbarrier] = {}
        self.barriers = [NamedBarrier(machine) for _ in range(16)]
        self.pipes: dict[int, Operation] = {}  # last operation of each in-order unit
        # Operations on this CTA's memories: to be known to its threads when it exits.
        self.touched_by: list[Touch] = []
        self.slot = machine.claim(self)
        block = machine.launch.block
        self.threads = int(np.prod(block))
        self.warps: list[Warp] = []
        for number in range(machine.warps_per_cta):
            count = min(LANES, self.threads - number * LANES)
            actor = (self.slot * machine.warps_per_cta + number) * LANES
            self.warps.append(Warp(machine, self, number, count, actor))
        self.first_actor = self.warps[0].actor
        self.last_actor = self.first_actor + machine.warps_per_cta * LANES
        self.exited = False

    def special(self, warp: Warp, name: str) -> NDArray[Any]:
        """A special register of the warp's lanes (PTX ISA, "Special Registers")."""
        machine = self.machine
        launch, cluster = machine.launch, self.cluster
        register, _, axis = name[1:].partition(".")
        if axis:
            number = "xyz".index(axis)
            linear = warp.index * LANES + LANE_INDEX
            width, height, _ = launch.block
            if register == "tid":
                return (linear % width, linear // width % height, linear // (width * height))[
                    number
                ].astype(np.int64)
            groups = tuple(g // c for g, c in zip(launch.grid, launch.cluster, strict=True))
            value = {
                "ntid": launch.block,
                "ctaid": self.index,
                "nctaid": launch.grid,
                "clusterid": tuple(i // c for i, c in zip(self.index, launch.cluster, strict=True)),
                "nclusterid": groups,
                "cluster_ctaid": self.place,
                "cluster_nctaid": cluster.shape,
            }[register][number]
            return np.full(LANES, value, dtype=np.int64)
        one = np.int64(1) << LANE_INDEX.astype(np.int64)
        lanes = {
            "laneid": LANE_INDEX.astype(np.int64),
            "lanemask_eq": one,
            "lanemask_lt": one - 1,
            "lanemask_le": 2 * one - 1,
            "lanemask_gt": (1 << 32) - 2 * one,
            "lanemask_ge": (1 << 32) - one,
        }
        if register in lanes:
            return lanes[register]
        value = {
            "warpid": warp.index,
            "nwarpid": machine.warps_per_cta,
            "cluster_ctarank": self.rank,
            "cluster_nctarank": len(cluster.ctas),
            "is_explicit_cluster": int(launch.cluster != (1, 1, 1)),
            "smid": self.slot,
            "dynamic_smem_size": launch.dynamic_shared_bytes,
            "total_smem_size": self.shared_end - SHARED_RESERVED,
        }[register]
        return np.full(LANES, value, dtype=np.int64)

    def lanes_exited(self, warp: Warp, bits: int) -> None:
        self.machine.events += 1
        if warp.live == 0:
            warp.publish((1 << min(LANES, self.threads - warp.index * LANES)) - 1)
        self.cluster.barrier.settle(self.cluster.living())
        if not any(w.live for w in self.warps):
            self.exited = True
            self.machine.cta_exits(self)
