"""Checks of the machine: the driver, its GPUs, and the environment variables that matter."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass

from dsv4_router_runtime.artifacts.dispatch import kernels_on
from dsv4_router_runtime.artifacts.folder import ArtifactSet
from dsv4_router_runtime.device import driver, facts
from dsv4_router_runtime.device.driver import version_text
from dsv4_router_runtime.device.facts import Gpu
from dsv4_router_runtime.errors import (
    DriverError,
    DriverMissingError,
    DriverTooOldError,
    RouterError,
)

from .finding import COMMAND, Finding, fail, ok, skip, warn

_INSTALL_DRIVER = "install NVIDIA's driver, or start the container with `docker run --gpus all`"
_UPDATE_DRIVER = "update NVIDIA's driver: https://www.nvidia.com/drivers"
_SPAWN = 'multiprocessing.set_start_method("spawn")'
_RESTART = "restart the process; `nvidia-smi` shows whether the driver answers"
# Driver codes that need a repair of their own: cuda.h describes them.
_REPAIR_BY_CODE = {
    "CUDA_ERROR_SYSTEM_NOT_READY": "systemctl start nvidia-fabricmanager",
    "CUDA_ERROR_SYSTEM_DRIVER_MISMATCH": "reboot: the driver was updated under a loaded module",
    "CUDA_ERROR_COMPAT_NOT_SUPPORTED_ON_DEVICE": "remove cuda-compat from LD_LIBRARY_PATH",
    "CUDA_ERROR_NO_DEVICE": "nvidia-smi -L",
}


def check_driver() -> tuple[bool, Finding]:
    """Start the driver; return whether it runs, and the finding."""
    needed = "a CUDA driver that starts and a GPU that this process sees"
    try:
        version, count = driver.driver_version(), facts.gpu_count()
    except RouterError as error:
        return False, fail("driver", str(error), needed=needed, repair=_driver_repair(error))
    if count == 0:
        repair = _REPAIR_BY_CODE["CUDA_ERROR_NO_DEVICE"]
        return False, fail("driver", "the driver sees no GPU", needed=needed, repair=repair)
    return True, ok("driver", f"CUDA {version_text(version)}, {_counted(count)}")


def _driver_repair(error: RouterError) -> str:
    if driver.forked:
        return _SPAWN
    if isinstance(error, DriverTooOldError):
        return _UPDATE_DRIVER
    if isinstance(error.__cause__, ImportError):
        return "pip install cuda-bindings"
    code = error.code if isinstance(error, DriverError | DriverMissingError) else ""
    if code == "CUDA_ERROR_NO_DEVICE" and os.environ.get("CUDA_VISIBLE_DEVICES") is not None:
        return "unset CUDA_VISIBLE_DEVICES"
    if code in _REPAIR_BY_CODE:
        return _REPAIR_BY_CODE[code]
    return _INSTALL_DRIVER if isinstance(error, DriverMissingError) else _RESTART


def _counted(count: int) -> str:
    return "1 GPU" if count == 1 else f"{count} GPUs"


def check_floor(artifacts: ArtifactSet, arch: str) -> Finding:
    """Hold the driver against the floor that the manifest states for a GPU's kernels."""
    check, manifest = f"driver for {arch}", artifacts.manifest
    floors = [manifest.driver[kernel.arch] for kernel in kernels_on(manifest, arch)]
    if not floors:
        return skip(check, f"no kernels for {arch}")
    version, floor = driver.driver_version(), max(floors)
    found, needed = f"CUDA {version_text(version)}", f"CUDA {version_text(floor)} or newer"
    if version < floor:
        return fail(check, found, needed=needed, repair=_UPDATE_DRIVER)
    return ok(check, found, needed)


def see_gpus(device: int | None) -> tuple[list[Gpu], list[Finding]]:
    """Read the GPUs that are to be checked, all of them if `device` is None."""
    count = facts.gpu_count()
    if device is not None and not 0 <= device < count:
        needed = f"a GPU from 0 to {count - 1}"
        repair = f"{COMMAND} doctor --device 0"
        return [], [fail(f"gpu {device}", "not there", needed=needed, repair=repair)]
    gpus, failed = [], []
    for index in range(count) if device is None else (device,):
        try:
            gpus.append(facts.read_gpu(index))
        except RouterError as error:
            needed, repair = "a GPU that answers", f"nvidia-smi -q{facts.smi_option(index)}"
            failed.append(fail(f"gpu {index}", str(error), needed=needed, repair=repair))
    return gpus, failed


def check_gpu(gpu: Gpu, artifacts: ArtifactSet | None) -> Finding:
    """Describe a GPU; a partition, a shared GPU or one without ECC is a WARN."""
    check = f"gpu {gpu.index}"
    mps = {True: "on", False: "off", None: "unknown"}[gpu.mps]
    found = (
        f"{gpu.name}, {gpu.arch}, {gpu.num_sms} SMs, {gpu.shared_bytes_per_cta} bytes of shared "
        f"memory per CTA, ECC {_on(gpu.ecc)}, MIG {_on(gpu.mig)}, MPS {mps}"
    )
    kernels = kernels_on(artifacts.manifest, gpu.arch) if artifacts else ()
    most = max(
        (k.launch.dynamic_shared_bytes + k.resources.static_shared_bytes for k in kernels),
        default=0,
    )
    if most > gpu.shared_bytes_per_cta:
        needed = f"{most} bytes of shared memory per CTA"
        return fail(check, found, needed=needed, repair="nvidia-smi -L, for another GPU")
    if gpu.mig or gpu.mps:
        needed = "a whole GPU: on a part of one, clusters of 16 CTAs may not fit"
        whole = f"nvidia-smi{facts.smi_option(gpu.index)} -mig 0"
        repair = whole if gpu.mig else "echo quit | nvidia-cuda-mps-control"
        return warn(check, found, needed=needed, repair=repair)
    if not gpu.ecc:
        needed = "ECC, since a flipped bit routes wrongly in silence"
        return warn(
            check, found, needed=needed, repair=f"nvidia-smi{facts.smi_option(gpu.index)} -e 1"
        )
    return ok(check, found)


def _on(state: bool) -> str:
    return "on" if state else "off"


@dataclass(frozen=True, kw_only=True)
class Variable:
    """An environment variable that changes how the router runs, and the values that harm it."""

    name: str
    reason: str
    warned: tuple[str, ...] = ()
    failed: tuple[str, ...] = ()


VARIABLES = (
    Variable(
        name="CUDA_VISIBLE_DEVICES",
        reason="hides and renumbers GPUs; with none left, no kernel runs",
        failed=("", "-1", "NoDevFiles"),
    ),
    Variable(
        name="CUDA_LAUNCH_BLOCKING",
        reason="1 makes every eager call wait for the GPU",
        warned=("1",),
    ),
    Variable(
        name="CUDA_DEVICE_MAX_CONNECTIONS",
        reason="with 1, launches of all streams pass one queue and wait for each other",
        warned=("1",),
    ),
    Variable(
        name="CUDA_MODULE_LOADING",
        reason="either value is right: kernels are loaded when a Router is made",
    ),
    Variable(
        name="CUDA_PYTHON_CUDA_PER_THREAD_DEFAULT_STREAM",
        reason="any value is right: kernels are launched on torch's null stream",
    ),
    Variable(
        name="CUDA_FORCE_PTX_JIT",
        reason="1 makes the driver ignore cubins, and the artifacts are cubins",
        failed=("1",),
    ),
    *(
        Variable(name=name, reason="the allocator of the tensors and of a graph's memory")
        for name in ("PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_ALLOC_CONF")
    ),
    Variable(
        name="CUDA_MPS_PIPE_DIRECTORY",
        reason="names the MPS daemon that shares the GPU, if one runs",
    ),
    Variable(
        name="CUDA_MPS_ACTIVE_THREAD_PERCENTAGE",
        reason="below 100 takes SMs away under MPS: clusters of 16 CTAs may not fit",
        warned=tuple(str(percent) for percent in range(1, 100)),
    ),
    Variable(
        name="CUDA_MPS_PINNED_DEVICE_MEM_LIMIT",
        reason="caps the GPU memory of the process under MPS",
    ),
)


def check_environment(environment: Mapping[str, str] | None = None) -> list[Finding]:
    """Judge each variable of VARIABLES that is set."""
    values = os.environ if environment is None else environment
    found = [_check_variable(each, values[each.name]) for each in VARIABLES if each.name in values]
    return found or [ok("environment", f"none of {len(VARIABLES)} variables that matter is set")]


def _check_variable(variable: Variable, value: str) -> Finding:
    check, found = f"environment {variable.name}", f"{value!r}: {variable.reason}"
    repair = f"unset {variable.name}"
    if value in variable.failed:
        return fail(check, found, needed="another value, or none", repair=repair)
    if value in variable.warned:
        return warn(check, found, needed="another value, or none", repair=repair)
    return ok(check, found)
