"""A part of a GPU's SMs, as a stream of a green context (CUDA driver API, "Green Contexts")."""

from __future__ import annotations

from dataclasses import dataclass

from dsv4_router_runtime.device import driver

# CU_DEV_SM_RESOURCE_SPLIT_MAX_POTENTIAL_CLUSTER_SIZE of the driver API: groups of SMs that may hold
# the largest clusters.
LARGE_CLUSTERS = 2


class PartitionError(Exception):
    """The driver does not split this GPU so; the message holds its error code."""


@dataclass(frozen=True, kw_only=True)
class Partition:
    """A green context of `sms` SMs, with handles of it and of a stream; it lasts as the process."""

    sms: int
    context: int
    stream: int


def make_partition(sms: int, *, large_clusters: bool = False, device: int = 0) -> Partition:
    """Take at least `sms` SMs of a GPU, as the driver rounds them; PartitionError if it refuses.

    large_clusters: SMs that may hold clusters of 16 CTAs. Without it, few such parts do.
    """
    cuda = driver.bindings()
    ask = driver.checked
    kind = cuda.CUdevResourceType.CU_DEV_RESOURCE_TYPE_SM
    whole = ask("asking for the GPU's SMs", cuda.cuDeviceGetDevResource(device, kind))
    flags = LARGE_CLUSTERS if large_clusters else 0
    code, groups, *_ = cuda.cuDevSmResourceSplitByCount(1, whole, flags, sms)
    if code:
        raise PartitionError(f"no green context of {sms} SMs: {code.name}")
    described = ask("describing the SMs", cuda.cuDevResourceGenerateDesc(groups[:1], 1))
    default = cuda.CUgreenCtxCreate_flags.CU_GREEN_CTX_DEFAULT_STREAM
    green = ask("making a green context", cuda.cuGreenCtxCreate(described, device, default))
    stream = ask("making a stream", cuda.cuGreenCtxStreamCreate(green, 1, 0))
    context = ask("asking for its context", cuda.cuCtxFromGreenCtx(green))
    return Partition(sms=groups[0].sm.smCount, context=int(context), stream=int(stream))
