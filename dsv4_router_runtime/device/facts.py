"""Properties of the driver and of its GPUs, read without a context."""

from __future__ import annotations

from dataclasses import dataclass

from dsv4_router_runtime.errors import DriverError

from . import driver

_NAME_BYTES = 128


@dataclass(frozen=True, kw_only=True)
class Gpu:
    """One GPU as the driver describes it. mps is None if the driver or its bindings lack it."""

    index: int
    name: str
    arch: str
    num_sms: int
    shared_bytes_per_cta: int
    ecc: bool
    mps: bool | None

    @property
    def mig(self) -> bool:
        """Whether it is a slice of a GPU; the name alone has it."""
        return " MIG " in self.name

    @property
    def kind(self) -> tuple[object, ...]:
        """The properties that decide which kernels load and fit: one check per kind of GPU."""
        return (self.name, self.arch, self.num_sms, self.shared_bytes_per_cta, self.mps)


def gpu_count() -> int:
    """Return the number of GPUs that this process sees."""
    return int(driver.checked("counting the GPUs", driver.bindings().cuDeviceGetCount()))


def read_gpu(index: int) -> Gpu:
    """Read the properties of GPU `index`."""
    cuda = driver.bindings()
    device = driver.checked(f"opening GPU {index}", cuda.cuDeviceGet(index))
    name = driver.checked(f"naming GPU {index}", cuda.cuDeviceGetName(_NAME_BYTES, device))
    return Gpu(
        index=index,
        name=name.split(b"\0")[0].decode(errors="replace"),
        arch=driver.arch_of_device(index),
        num_sms=driver.device_attribute(index, "MULTIPROCESSOR_COUNT"),
        shared_bytes_per_cta=driver.device_attribute(index, "MAX_SHARED_MEMORY_PER_BLOCK_OPTIN"),
        ecc=driver.device_attribute(index, "ECC_ENABLED") != 0,
        mps=_uses_mps(index),
    )


def smi_option(index: int) -> str:
    """Return nvidia-smi's option that selects GPU `index`; "", for all GPUs, if there is no id.

    nvidia-smi counts every GPU, in another order; the bus id is one for both.
    """
    cuda = driver.bindings()
    try:
        device = driver.checked(f"opening GPU {index}", cuda.cuDeviceGet(index))
        asked = cuda.cuDeviceGetPCIBusId(_NAME_BYTES, device)
        bus_id = driver.checked(f"reading the PCI bus id of GPU {index}", asked)
    except DriverError:
        return ""
    return f" -i {bus_id.split(bytes(1))[0].decode()}"


def _uses_mps(index: int) -> bool | None:
    try:
        return driver.device_attribute(index, "MPS_ENABLED") != 0
    # Bindings of CUDA 12 do not name the attribute, and older drivers do not know it.
    except (AttributeError, DriverError):
        return None
