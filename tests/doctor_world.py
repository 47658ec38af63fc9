"""A machine in good order, made of a fake driver whose kernels route, and of a torch for CUDA."""

from __future__ import annotations

import json
from collections import deque
from types import SimpleNamespace

from doctor_driver import Gpu

from dsv4_router_runtime.artifacts.kernel import launch_sha256
from dsv4_router_runtime.device import driver, load, memory, tensor_map, workspace
from dsv4_router_runtime.doctor import installation, machine

ENVIRONMENT = [variable.name for variable in machine.VARIABLES]


def forget_driver():
    """Forget what the runtime remembers of a driver."""
    driver._primary_context.cache_clear()
    driver.driver_version.cache_clear()
    tensor_map._encode_function.cache_clear()


def write_version(world, text):
    """Write torch's own record of its build."""
    (world.torch / "version.py").write_text(f"from typing import Optional\n{text}\n")


def make_world(monkeypatch, folder, manifest):
    """Make a machine in good order: a whole set with evidence, a driver, a GPU and its kernels."""
    entries = [
        {
            "artifact": kernel.key,
            "cubin_sha256": kernel.cubin_sha256,
            "ptx_sha256": kernel.ptx_sha256,
            "launch_sha256": launch_sha256(kernel),
            "rungs": {
                "hardware": {"status": "passed", "figures": {"records": [{"gpu": "NVIDIA H200"}]}},
                "emulated": {"status": "passed"},
            },
        }
        for kernel in manifest.kernels
    ]
    cuda = Gpu(manifest.kernels)
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
    for owner, name, empty in (
        (load, "_loaded", {}),
        (workspace, "_workspaces", {}),
        (tensor_map, "_map_caches", {}),
        (memory, "_to_free", deque()),
    ):
        monkeypatch.setattr(owner, name, empty)
    world.torch = folder.parent / "torch"
    world.torch.mkdir()
    write_version(world, 'cuda: Optional[str] = "13.0"')
    spec = SimpleNamespace(origin=str(world.torch / "__init__.py"))
    monkeypatch.setattr(installation, "find_spec", lambda name: spec)
    return world
