"""Checks of the kernels on a GPU: each loads, agrees with the manifest, and has room to run."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import product
from math import prod

from dsv4_router_runtime.artifacts.dispatch import LayerProblem, kernels_on, plan_layer
from dsv4_router_runtime.artifacts.folder import ArtifactSet
from dsv4_router_runtime.artifacts.kernel import LAYOUTS, Kernel
from dsv4_router_runtime.artifacts.limits import MIN_COMPUTE_CAPABILITY
from dsv4_router_runtime.artifacts.manifest import Manifest
from dsv4_router_runtime.device.facts import Gpu
from dsv4_router_runtime.device.load import load_once
from dsv4_router_runtime.device.occupancy import ask_room
from dsv4_router_runtime.errors import BUILD_COMMAND, NoKernelError

from .finding import Finding, fail, guarded, ok, out_of_service, warn

# A layer of DeepSeek-V4, whose plan shows the step that each kernel serves.
_K, _EXPERTS, _TOP_K = 7168, 384, 6


def check_kernels(artifacts: ArtifactSet, gpu: Gpu) -> list[Finding]:
    """Load each kernel of the GPU's architecture and see how many of its clusters fit."""
    kernels = kernels_on(artifacts.manifest, gpu.arch)
    if not kernels:
        archs = ", ".join(sorted({each.arch for each in artifacts.manifest.kernels}))
        major, minor = divmod(MIN_COMPUTE_CAPABILITY, 10)
        needed = f"kernels for {gpu.arch}; no GPU below {major}.{minor} has any"
        repair = f"{BUILD_COMMAND} --arch {gpu.arch}"
        return [fail(f"kernels gpu {gpu.index}", f"for {archs}", needed=needed, repair=repair)]
    served = steps_served(artifacts.manifest, gpu.arch)
    return [
        guarded(
            f"kernel {kernel.key} gpu {gpu.index}",
            lambda kernel=kernel: _check_kernel(artifacts, kernel, gpu, served),  # type: ignore[misc]
            needed="a kernel that loads, with the manifest's parameters",
            repair=out_of_service(gpu.index),
        )
        for kernel in kernels
    ]


def steps_served(manifest: Manifest, arch: str) -> Mapping[str, str]:
    """Return the steps of a DeepSeek-V4 layer that each kernel serves, by kernel."""
    served: dict[str, dict[str, None]] = {}
    for same_bits, layout, hashed in product((False, True), LAYOUTS, (False, True)):
        layer = LayerProblem(
            layout=layout,
            tma_loadable=True,
            hashed=hashed,
            num_experts=_EXPERTS,
            top_k=_TOP_K,
            k=_K,
            same_bits=same_bits,
        )
        try:
            plan = plan_layer(manifest, layer, arch)
        # Another layout may still have a plan.
        except NoKernelError:
            continue
        for step in plan.steps:
            reasons = served.setdefault(step.kernel.key, {})
            if step.reason not in reasons:
                reasons[f"with same_bits, {step.reason}" if same_bits else step.reason] = None
    return {key: " and ".join(reasons) for key, reasons in served.items()}


def _check_kernel(
    artifacts: ArtifactSet, kernel: Kernel, gpu: Gpu, served: Mapping[str, str]
) -> Finding:
    check = f"kernel {kernel.key} gpu {gpu.index}"
    # Once, with the self-test.
    loaded = load_once(artifacts, kernel, gpu.index)
    serves = served.get(kernel.key, "no step of a DeepSeek-V4 layer")
    ctas = prod(kernel.launch.cluster)
    if ctas == 1:
        return ok(check, f"loads; {serves}")
    room = ask_room(loaded, stream=0)
    if room.reason is not None:
        needed = "room for a cluster; without it calls take a slower step"
        found = f"loads; {room.reason}; {serves}"
        return warn(check, found, needed=needed, repair="nvidia-smi -L, for a larger GPU")
    fit = f"{room.exclusive_clusters} clusters of {ctas} CTAs fit with an SM for each CTA"
    return ok(check, f"loads; {fit}; {serves}")
