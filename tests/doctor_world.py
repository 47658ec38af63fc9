"""A machine in good order, made of a recorder in the place of the driver and of the Router."""

from __future__ import annotations

import contextlib
import json
from types import SimpleNamespace

import torch

from dsv4_router_runtime.device import driver, occupancy
from dsv4_router_runtime.doctor import machine, selftest
from dsv4_router_runtime.reference import router_reference

BUS_ID = "00000000:19:00.0"
ENVIRONMENT = [variable.name for variable in machine.VARIABLES]


class Word(str):
    """A member of an enumeration of the driver's: its name."""

    @property
    def name(self):
        return str(self)


class Words:
    """An enumeration of the driver's: each member is its own name."""

    def __getattr__(self, name):
        return Word(name)


class OutOfMemory(int):
    """The driver's code for too little memory."""

    name = "CUDA_ERROR_OUT_OF_MEMORY"


class Codes:
    """The driver's result codes that the runtime tells apart."""

    CUDA_ERROR_INVALID_VALUE, CUDA_ERROR_INVALID_CONTEXT = 1, 201
    CUDA_ERROR_INVALID_CLUSTER_SIZE = 912


class FakeCuda:
    """A driver of one H200: what it answers is in `facts`, what it lacks succeeds with 0."""

    CUresult, CUfunction = Codes, int

    def __init__(self, kernels):
        self.facts = {
            "COMPUTE_CAPABILITY_MAJOR": 9,
            "COMPUTE_CAPABILITY_MINOR": 0,
            "MULTIPROCESSOR_COUNT": 132,
            "MAX_SHARED_MEMORY_PER_BLOCK_OPTIN": 232_448,
            "MAX_SHARED_MEMORY_PER_MULTIPROCESSOR": 233_472,
            "ECC_ENABLED": 1,
            "MPS_ENABLED": 0,
        }
        self.version, self.count, self.name = 13000, 1, b"NVIDIA H200"
        self.clusters, self.load_code, self.bus_ids = 7, 0, True
        self.parameters = {kernel.symbol: kernel.parameters for kernel in kernels}
        self.CUdevice_attribute = self.CUfunction_attribute = Words()

    def __getattr__(self, name):
        if not name.startswith("cu"):
            raise AttributeError(name)
        return lambda *given: (0, 0)

    def cuDriverGetVersion(self):
        return 0, self.version

    def cuDeviceGetCount(self):
        return 0, self.count

    def cuDeviceGetName(self, most, device):
        return 0, self.name + bytes(most - len(self.name))

    def cuDeviceGetPCIBusId(self, most, device):
        return (0, BUS_ID.encode() + bytes(most - len(BUS_ID))) if self.bus_ids else (1, None)

    def cuDeviceGetAttribute(self, which, device):
        value = self.facts.get(which.removeprefix("CU_DEVICE_ATTRIBUTE_"))
        return (1, 0) if value is None else (0, value)

    def cuLibraryLoadData(self, cubin, *more):
        return self.load_code, None

    def cuLibraryGetKernel(self, library, symbol):
        return 0, list(self.parameters).index(symbol.decode())

    def cuKernelGetParamInfo(self, handle, index):
        known = list(self.parameters.values())[handle]
        if index >= len(known):
            return 1, 0, 0
        return 0, known[index].offset, known[index].size

    def cuOccupancyMaxActiveClusters(self, function, config):
        return 0, self.clusters


class RightRouter:
    """A Router that routes as the reference does."""

    def __init__(self, W_gate, e_bias, *, top_k, routed_scaling_factor, artifacts, tid2eid):
        self.layer = (W_gate, e_bias, routed_scaling_factor, top_k)
        self.table = tid2eid

    def __call__(self, x, weights, ids, *, input_ids):
        right, right_ids = router_reference(x, *self.layer, tid2eid=self.table, input_ids=input_ids)
        weights.copy_(right)
        ids.copy_(right_ids)


def zero_workspace(device):
    """A check that finds nothing."""


def forget_driver():
    """Forget what the runtime remembers of a driver."""
    driver._primary_context.cache_clear()
    driver.driver_version.cache_clear()


def make_world(monkeypatch, folder, manifest):
    """Make a machine in good order: a whole set with evidence, a driver, a GPU and its kernels."""
    entries = [
        {
            "artifact": kernel.key,
            "cubin_sha256": kernel.cubin_sha256,
            "ptx_sha256": kernel.ptx_sha256,
            "rungs": {
                "hardware": {"status": "passed", "figures": {"records": [{"gpu": "NVIDIA H200"}]}},
                "emulated": {"status": "passed"},
            },
        }
        for kernel in manifest.kernels
    ]
    cuda = FakeCuda(manifest.kernels)
    world = SimpleNamespace(
        folder=folder, manifest=manifest, cuda=cuda, monkeypatch=monkeypatch, entries=entries
    )
    world.write_evidence = lambda: (folder / "evidence.json").write_text(
        json.dumps({"schema_version": 1, "evidence": entries})
    )
    world.write_evidence()
    for name in ENVIRONMENT:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(driver, "bindings", lambda: cuda)
    forget_driver()
    monkeypatch.setattr(occupancy, "launch_config", lambda *given, **more: None)
    monkeypatch.setattr(selftest, "device_name", lambda index: "cpu")
    monkeypatch.setattr(selftest, "run_eagerly", lambda call: call())
    monkeypatch.setattr(selftest, "run_replayed", lambda call: call())
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device", lambda index: contextlib.nullcontext())
    monkeypatch.setattr(selftest.dsv4_router_runtime, "Router", RightRouter, raising=False)
    monkeypatch.setattr(selftest.dsv4_router_runtime, "check", zero_workspace, raising=False)
    return world
