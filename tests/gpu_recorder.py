"""A recorder in the GPU's place, and the one way from a test into a Router's private parts."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from types import SimpleNamespace

import torch

from dsv4_router_runtime import Router, binding, router
from dsv4_router_runtime.device import (
    driver,
    launch_site,
    load,
    occupancy,
    streams,
    tensor_map,
    workspace,
)
from dsv4_router_runtime.device.launch_site import LaunchSite


class Gpu:
    """What a process asked the GPU for, in order; tensors lie in host memory."""

    def __init__(self) -> None:
        self.arch = "sm_90a"
        self.stream = 0
        self.capture = 0
        self.loads: list[str] = []
        self.maps: list = []
        self.launches: list[dict] = []
        self.products: list = []
        self.pdl: list[bool] = []

    @property
    def last(self) -> dict:
        return self.launches[-1]

    def load(self, artifacts, kernel, device):
        self.loads.append(kernel.key)
        return load.LoadedKernel(kernel=kernel, device=0, library=None, handle=None, function=None)

    def room(self, loaded, stream):
        return occupancy.Room(exclusive_clusters=0)

    def encode(self, arguments):
        self.maps.append(arguments)
        return tensor_map.TensorMap()

    def launch_config(self, kernel, *, grid, shared_bytes, stream, pdl):
        self.pdl.append(pdl)
        x, y, z = grid
        return SimpleNamespace(gridDimX=x, gridDimY=y, gridDimZ=z, stream=stream)

    def note(self, site: LaunchSite) -> None:
        config = site._config
        values = {name: cell.value for name, cell in site.block.cells.items()}
        grid = (config.gridDimX, config.gridDimY, config.gridDimZ)
        key = site.block.kernel.key
        self.launches.append({"kernel": key, "stream": config.stream, "grid": grid, **values})


def replace_gpu(monkeypatch) -> Gpu:
    """Put a recorder in the place of the driver, of streams and of the matrix product."""
    gpu = Gpu()
    monkeypatch.setattr(driver, "arch_of_device", lambda index: gpu.arch)
    monkeypatch.setattr(load, "load_kernel", gpu.load)
    monkeypatch.setattr(load, "_loaded", {})
    monkeypatch.setattr(streams, "is_capturing", lambda: gpu.capture != 0)
    monkeypatch.setattr(tensor_map, "encode_tensor_map", gpu.encode)
    monkeypatch.setattr(tensor_map, "_map_caches", {})
    monkeypatch.setattr(launch_site, "launch_config", gpu.launch_config)
    monkeypatch.setattr(LaunchSite, "launch", lambda site: gpu.note(site))
    monkeypatch.setattr(driver, "context_kept", contextlib.nullcontext)
    monkeypatch.setattr(driver, "refuse_foreign_context", lambda index: None)
    monkeypatch.setattr(driver, "is_primary_current", lambda index: True)
    monkeypatch.setattr(occupancy, "_fallbacks", {})
    for name, value in {
        "current_stream": lambda index: gpu.stream,
        "is_capturing": lambda: gpu.capture != 0,
        "encode_tensor_map": gpu.encode,
        "ask_room": gpu.room,
        "multiply": lambda x, w, out: gpu.products.append((x, w, out)),
        "wait_for_current_stream": lambda device: None,
    }.items():
        monkeypatch.setattr(binding, name, value)
    monkeypatch.setattr(workspace, "capture_id", lambda stream: gpu.capture)
    monkeypatch.setattr(workspace, "wait_for_current_stream", lambda device: None)
    monkeypatch.setattr(workspace, "_workspaces", {})
    monkeypatch.setattr(router, "require_gpu", lambda device: None)
    monkeypatch.setattr(router, "_remembered", type(router._remembered)())
    monkeypatch.setattr(torch.cuda, "device", lambda index: contextlib.nullcontext())
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    return gpu


def workspace_of(bound: Router) -> workspace.Workspace:
    return bound._binding._workspace


def workspaces() -> list[workspace.Workspace]:
    return list(workspace._workspaces.values())


def free_slots(space: workspace.Workspace) -> list[int]:
    """Return the addresses that no capture has taken yet: the workspace's own list."""
    return space._free


def reserve_chunks(space: workspace.Workspace) -> list[torch.Tensor]:
    return space._reserve


def eager_slots(space: workspace.Workspace) -> list[workspace.Slot]:
    return list(space._slots.values())


@contextlib.contextmanager
def reserve_used_up(bound: Router):
    """Leave a capture within the block no zeroed slot."""
    space = workspace_of(bound)
    kept, space._free = space._free, []
    try:
        yield
    finally:
        space._free = kept


def note_zeroing(monkeypatch, note: Callable[[int], object]) -> None:
    """Call `note` with the size of each piece of memory that a workspace zeroes."""
    zeros = workspace.Workspace._zeros
    noted = lambda space, size: (note(size), zeros(space, size))[1]  # noqa: E731
    monkeypatch.setattr(workspace.Workspace, "_zeros", noted)


def fill_plain_scratch(monkeypatch, value: int) -> None:
    """Let memory that is not zeroed come with `value` in each byte."""
    filled = lambda _, size, dtype=torch.uint8: torch.full((size,), value, dtype=dtype)  # noqa: E731
    monkeypatch.setattr(workspace.Workspace, "_empty", filled)


def remembered_layers() -> list[tuple[binding.Binding, torch.Tensor | None]]:
    """Return the binding of each layer that dense_router_dispatch keeps, and the W_gate kept."""
    return [(bound, kept) for bound, kept, _ in router._remembered.values()]


@contextlib.contextmanager
def interrupt_at_last_parameter(monkeypatch, site: LaunchSite):
    """Raise KeyboardInterrupt where `site` writes the last parameter of a call."""

    class Interrupted:
        def __setattr__(self, name, value):
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(site, "_call_cells", (*site._call_cells[:-1], Interrupted()))
        yield


def w_copy_of(bound: Router) -> torch.Tensor | None:
    return bound._binding.w_copy


def table_of(bound: Router) -> torch.Tensor | None:
    return bound._binding.table_copy


def sites_of(bound: Router) -> list[launch_site.LayerLaunchSite]:
    return list(bound._binding._sites.values())
