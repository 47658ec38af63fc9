"""The faults that `doctor` must catch, each with its verdict and its repair."""

from __future__ import annotations

import base64
import json
import os
from dataclasses import replace
from importlib import metadata
from types import SimpleNamespace

from cuda.bindings.driver import CUresult
from doctor_driver import BUS_ID, OutOfMemory
from doctor_world import write_version

from dsv4_router_runtime.artifacts.manifest import serialise_manifest
from dsv4_router_runtime.device import driver
from dsv4_router_runtime.doctor import installation, selftest
from dsv4_router_runtime.errors import (
    DriverMissingError,
    DriverTooOldError,
)

BINDINGS = driver.bindings
CANARY = selftest.CANARY
RFC_KEY = "d75a980182b10ab7d54bfed3c964073a0ee172f3daa62325af021a68f707511a"


def raises(error):
    def fail(*given, **more):
        raise error

    return fail


def without_driver(world, error, cause=None):
    error.__cause__ = cause
    world.monkeypatch.setattr(driver, "bindings", raises(error))


def fork(world):
    world.monkeypatch.setattr(driver, "bindings", BINDINGS)
    world.monkeypatch.setattr(driver, "forked", True)
    driver.bindings.cache_clear()


def cubin(world):
    return world.folder / "router_topk.sm_90a.cubin"


def flip_a_byte(world):
    data = bytearray(cubin(world).read_bytes())
    data[-1] ^= 1
    cubin(world).write_bytes(data)


def put_a_fifo(world):
    cubin(world).unlink()
    os.mkfifo(cubin(world))


def trust_a_key(world):
    """Some key of RFC 8032."""
    key = base64.b64encode(bytes.fromhex(RFC_KEY)).decode()
    path = world.folder.parent / "policy.json"
    path.write_text(json.dumps({"keys": [key]}))
    world.monkeypatch.setenv("DSV4_ROUTER_TRUST", str(path))


def put_stale_schema(world):
    path = world.folder / "manifest.json"
    document = json.loads(path.read_text())
    document["schema_version"] -= 1
    path.write_text(json.dumps(document))


def fail_a_rung(world):
    for entry in world.entries:
        entry["rungs"]["emulated"] = {"status": "failed", "reason": "a race"}
    world.write_evidence()


def forget_the_hardware(world):
    for entry in world.entries:
        entry["rungs"]["hardware"] = {"status": "not run", "reason": "no GPU"}
    world.write_evidence()


def leave_out(name):
    """Let the set be one without the kernels of this name."""

    def arrange(world):
        kept = tuple(each for each in world.manifest.kernels if each.name != name)
        world.manifest = replace(world.manifest, kernels=kept)
        text = serialise_manifest(world.manifest)
        (world.folder / "manifest.json").write_text(text)
        for path in world.folder.glob(f"{name}.*"):
            path.unlink()

    return arrange


def shorten_parameters(world):
    known = world.cuda.parameters
    known["router_topk"] = known["router_topk"][:-1]


def swap_last(weights, ids):
    ids[-1, :2] = ids[-1, :2].flip(0)


def torch_that_fails(error):
    """Let torch's import raise."""

    def arrange(world):
        world.monkeypatch.setattr(installation, "import_module", raises(error))

    return arrange


def torch_without_gpu(world):
    cuda = SimpleNamespace(is_available=lambda: False)
    torch = SimpleNamespace(__version__="2.13.0", cuda=cuda)
    world.monkeypatch.setattr(installation, "import_module", lambda name: torch)


def fact(**values):
    return lambda world: world.cuda.facts.update(values)


def attribute(**values):
    return lambda world: [setattr(world.cuda, name, values[name]) for name in values]


def without_torch(world):
    known = metadata.version

    def version(name):
        if name == "torch":
            raise metadata.PackageNotFoundError(name)
        return known(name)

    world.monkeypatch.setattr(installation.metadata, "version", version)
    world.monkeypatch.setattr(installation, "find_spec", lambda name: None)


def environment(**values):
    return lambda world: [world.monkeypatch.setenv(name, values[name]) for name in values]


NO_LIBRARY = RuntimeError("libcuda.so.1: cannot open shared object file")
BUILD = "build-kernels build --artifacts "
SELF_TEST, TOPK = "self-test gpu 0", "kernel router_topk.sm_90a gpu 0"

# name -> (fault, check, status, what was found, repair), and more of doctor's arguments
FAULTS = {
    "no driver": (
        lambda w: without_driver(w, DriverMissingError("no CUDA driver here"), NO_LIBRARY),
        *("driver", "FAIL", "no CUDA driver here", "docker run --gpus all"),
    ),
    "no bindings": (
        lambda w: without_driver(w, DriverMissingError("no package"), ImportError("cuda")),
        *("driver", "FAIL", "no package", "pip install cuda-bindings"),
    ),
    "no GPU": (
        lambda w: without_driver(w, DriverMissingError("no GPU", code="CUDA_ERROR_NO_DEVICE")),
        *("driver", "FAIL", "no GPU", "nvidia-smi -L"),
    ),
    "the GPUs hidden": (
        lambda w: (
            environment(CUDA_VISIBLE_DEVICES="")(w),
            without_driver(w, DriverMissingError("no GPU", code="CUDA_ERROR_NO_DEVICE")),
        ),
        *("driver", "FAIL", "no GPU", "unset CUDA_VISIBLE_DEVICES"),
    ),
    "no fabric manager": (
        lambda w: without_driver(
            w, DriverMissingError("no start", code="CUDA_ERROR_SYSTEM_NOT_READY")
        ),
        *("driver", "FAIL", "no start", "systemctl start nvidia-fabricmanager"),
    ),
    "no device counted": (
        attribute(count=0),
        *("driver", "FAIL", "the driver sees no GPU", "nvidia-smi -L"),
    ),
    "a forked child": (
        fork,
        *("driver", "FAIL", "forked from one that had used CUDA", '("spawn")'),
    ),
    "a driver that lacks a function": (
        lambda w: without_driver(w, DriverTooOldError("the CUDA driver has no cuDeviceGetName")),
        *("driver", "FAIL", "has no cuDeviceGetName", "update NVIDIA's driver"),
    ),
    "an old driver": (
        attribute(version=12030),
        *("driver for sm_90a", "FAIL", "CUDA 12.3", "update NVIDIA's driver"),
    ),
    "a GPU that does not answer": (
        fact(MULTIPROCESSOR_COUNT=None),
        *("gpu 0", "FAIL", "reading MULTIPROCESSOR_COUNT", f"nvidia-smi -q -i {BUS_ID}"),
    ),
    "another architecture": (
        fact(COMPUTE_CAPABILITY_MAJOR=8),
        *("kernels gpu 0", "FAIL", "for sm_100a, sm_90a", "build-kernels build --arch sm_80"),
    ),
    "too little shared memory": (
        fact(MAX_SHARED_MEMORY_PER_BLOCK_OPTIN=99_000),
        *("gpu 0", "FAIL", "99000 bytes of shared memory per CTA", "nvidia-smi -L"),
    ),
    "a flipped byte": (
        flip_a_byte,
        *("artifacts", "FAIL", "router_topk.sm_90a.cubin: altered or truncated", BUILD),
    ),
    "a missing cubin": (
        lambda w: cubin(w).unlink(),
        *("artifacts", "FAIL", "router_topk.sm_90a.cubin: missing", BUILD),
    ),
    "a FIFO for a cubin": (
        put_a_fifo,
        *("artifacts", "FAIL", "a FIFO, not a regular file", BUILD),
    ),
    "a foreign manifest": (
        lambda w: (w.folder / "manifest.json").write_text('{"name": "app"}'),
        *("artifacts", "FAIL", "manifest.json: schema_version: expected", BUILD),
    ),
    "a stale schema": (
        put_stale_schema,
        *("artifacts", "FAIL", "manifest.json: schema_version: expected", BUILD),
    ),
    "a stranger among the files": (
        lambda w: (w.folder / "notes.txt").write_text("x"),
        *("artifacts", "FAIL", "notes.txt: surplus", "move it out of the folder"),
    ),
    "no signature where one is asked for": (
        trust_a_key,
        *("signature", "FAIL", "missing, so nobody signed", "install a release"),
    ),
    "another manifest than the pinned one": (
        lambda w: w.monkeypatch.setenv("DSV4_ROUTER_TRUST", "0" * 64),
        *("signature", "FAIL", "sha256 of its manifest is", "install a release"),
    ),
    "a trust policy that is not there": (
        lambda w: w.monkeypatch.setenv("DSV4_ROUTER_TRUST", "/no/policy.json"),
        *("signature", "FAIL", "no trust policy: cannot be read", "name a JSON file"),
    ),
    "no folder": (
        lambda w: setattr(w, "folder", w.folder / "elsewhere"),
        *("artifacts", "FAIL", "cannot be read", BUILD),
    ),
    "no evidence": (
        lambda w: (w.folder / "evidence.json").unlink(),
        *(
            "evidence sm_90a",
            "WARN",
            "none for the bytes and the launch of",
            "build-kernels verify",
        ),
    ),
    "evidence of another launch": (
        lambda w: (w.entries[1].update(launch_sha256="0" * 64), w.write_evidence()),
        *("evidence sm_90a", "WARN", "and the launch of router_decode_emajor_n32.sm_90a"),
        "build-kernels verify",
    ),
    "evidence said twice": (
        lambda w: (w.entries.append(w.entries[0]), w.write_evidence()),
        *("evidence sm_90a", "FAIL", "a second entry of the same bytes", "git checkout"),
    ),
    "unreadable evidence": (
        lambda w: (w.folder / "evidence.json").write_text("{"),
        *("evidence sm_90a", "FAIL", "evidence.json: $: not valid JSON", "git checkout"),
    ),
    "evidence of a failure": (
        fail_a_rung,
        *(
            "evidence sm_90a",
            "FAIL",
            "failed: router_decode_emajor_n32.sm_90a emulated",
            "build-kernels verify",
        ),
    ),
    "evidence without a GPU": (
        forget_the_hardware,
        *("evidence sm_90a", "WARN", "not run on a GPU of sm_90a", "pytest -m gpu --record"),
    ),
    "a parameter missing": (
        shorten_parameters,
        *(TOPK, "FAIL", "the manifest lists", BUILD),
    ),
    "a cubin that the driver refuses": (
        attribute(load_code=200),
        *(TOPK, "FAIL", "loading router_topk.sm_90a.cubin", f"nvidia-smi -q -i {BUS_ID}"),
    ),
    "no room for a cluster": (
        attribute(clusters=0),
        "kernel router_decode_kmajor_n64.sm_90a gpu 0",
        *("WARN", "loads; no room for a cluster of 16 CTAs of 100000 bytes", "nvidia-smi -L"),
    ),
    "MPS": (
        fact(MPS_ENABLED=1),
        *("gpu 0", "WARN", "MPS on", "nvidia-cuda-mps-control"),
    ),
    "MIG": (
        attribute(name=b"NVIDIA H200 MIG 1g.18gb"),
        *("gpu 0", "WARN", "MIG on", f"nvidia-smi -i {BUS_ID} -mig 0"),
    ),
    "a GPU without a bus id": (
        lambda w: (attribute(bus_ids=False)(w), fact(ECC_ENABLED=0)(w)),
        *("gpu 0", "WARN", "ECC off", "nvidia-smi -e 1"),
    ),
    "no ECC": (
        fact(ECC_ENABLED=0),
        *("gpu 0", "WARN", "ECC off", f"nvidia-smi -i {BUS_ID} -e 1"),
    ),
    "wrong ids": (
        attribute(change=swap_last),
        *(SELF_TEST, "FAIL", "kmajor, N=1, eager: 1 of 1 rows have other ids", "out of service"),
    ),
    "NaN for a weight": (
        attribute(change=lambda weights, ids: weights[0].fill_(float("nan"))),
        *(SELF_TEST, "FAIL", "eager: a weight is off by nan", "out of service"),
    ),
    "a weight off by 1e-4": (
        attribute(change=lambda weights, ids: weights[0].mul_(1.0001)),
        *(SELF_TEST, "FAIL", "eager: a weight is off by 0.0001", "out of service"),
    ),
    "outputs that are not written": (
        attribute(change=lambda weights, ids: (weights.fill_(CANARY), ids.fill_(CANARY))),
        *(SELF_TEST, "FAIL", "rows have other ids", "out of service"),
    ),
    "a replay that does nothing": (
        attribute(replays=False),
        *(SELF_TEST, "FAIL", "N=1, replayed: 1 of 1 rows have other ids", "out of service"),
    ),
    "a launch that fails": (
        attribute(launch_code=CUresult.CUDA_ERROR_LAUNCH_FAILED),
        *(SELF_TEST, "FAIL", "CUDA_ERROR_LAUNCH_FAILED", f"nvidia-smi -q -i {BUS_ID}"),
    ),
    "a graph that cannot be destroyed": (
        attribute(cuGraphExecDestroy=lambda graph: (CUresult.CUDA_ERROR_ILLEGAL_ADDRESS,)),
        *(SELF_TEST, "FAIL", "destroying what the driver made", f"nvidia-smi -q -i {BUS_ID}"),
    ),
    "a graph that fails, and cannot be destroyed": (
        attribute(
            cuGraphLaunch=lambda graph, stream: (CUresult.CUDA_ERROR_LAUNCH_FAILED,),
            cuGraphExecDestroy=lambda graph: (CUresult.CUDA_ERROR_ILLEGAL_ADDRESS,),
        ),
        *(SELF_TEST, "FAIL", "launching a graph: ", "nvidia-smi -q"),
    ),
    "a torch without CUDA": (
        lambda w: write_version(w, "cuda: Optional[str] = None"),
        *("torch", "FAIL", "sees no GPU, and the driver does", "built for CUDA"),
    ),
    "a torch for a newer driver": (
        lambda w: write_version(w, 'cuda = "14.1"'),
        *(
            "torch",
            "FAIL",
            "built for CUDA 14.1, and the driver is of CUDA 13",
            "pytorch.org, 13.x",
        ),
    ),
    "a torch that does not say what it is built for": (
        lambda w: write_version(w, "git_version = 'a'"),
        *("torch", "FAIL", "version.py: expected a line `cuda = ...`", "pip install --force-rein"),
    ),
    "a torch in part": (
        lambda w: (w.torch / "version.py").unlink(),
        *("torch", "FAIL", "version.py: cannot be read", "pip install --force-reinstall"),
    ),
    "a torch that sees no GPU": (
        torch_without_gpu,
        *("torch", "FAIL", "2.13.0 sees no GPU, and the driver does", "built for CUDA", "--torch"),
    ),
    "a torch that cannot be imported": (
        torch_that_fails(ImportError("libcudart.so.13: cannot open shared object file")),
        *("torch", "FAIL", "libcudart.so.13", "pip install --force-reinstall", "--torch"),
    ),
    "a set without a kernel": (
        leave_out("router_topk"),
        *(SELF_TEST, "FAIL", "no kernel for role=select, num_tokens=641", BUILD),
    ),
    "no memory left by a server": (
        attribute(cuMemAlloc=lambda size: (OutOfMemory(2), None)),
        *(SELF_TEST, "WARN", "CUDA_ERROR_OUT_OF_MEMORY", "the process that holds the memory"),
    ),
    "no memory for a context": (
        attribute(load_code=OutOfMemory(2)),
        *(TOPK, "WARN", "CUDA_ERROR_OUT_OF_MEMORY", "the process that holds the memory"),
    ),
    "an error of a library": (
        lambda w: w.monkeypatch.setattr(selftest, "make_inputs", raises(KeyError("x"))),
        *(SELF_TEST, "FAIL", "KeyError: 'x'", "doctor --report"),
    ),
    "scratch that is not zero": (
        attribute(dirt=12),
        *(
            "workspace gpu 0",
            "FAIL",
            "expected zeroed scratch (got byte 0xff",
            f"nvidia-smi -q -i {BUS_ID}",
        ),
    ),
    "no torch": (
        without_torch,
        *("package torch", "WARN", "not installed", "pip install 'torch"),
    ),
    "blocking launches": (
        environment(CUDA_LAUNCH_BLOCKING="1"),
        *("environment CUDA_LAUNCH_BLOCKING", "WARN", "wait for the GPU", "unset CUDA_LAUNCH"),
    ),
    "one hardware queue": (
        environment(CUDA_DEVICE_MAX_CONNECTIONS="1"),
        "environment CUDA_DEVICE_MAX_CONNECTIONS",
        *("WARN", "one queue", "unset CUDA_DEVICE_MAX_CONNECTIONS"),
    ),
    "cubins ignored": (
        environment(CUDA_FORCE_PTX_JIT="1"),
        *("environment CUDA_FORCE_PTX_JIT", "FAIL", "ignore cubins", "unset CUDA_FORCE_PTX_JIT"),
    ),
    "a share of the SMs": (
        environment(CUDA_MPS_ACTIVE_THREAD_PERCENTAGE="40"),
        "environment CUDA_MPS_ACTIVE_THREAD_PERCENTAGE",
        *("WARN", "'40': below 100 takes SMs away", "unset CUDA_MPS_ACTIVE_THREAD_PERCENTAGE"),
    ),
}
