"""A recorder in the GPU's place, and the one way from a test into a Router's private parts."""

from __future__ import annotations

import contextlib
from dataclasses import replace
from types import SimpleNamespace

import torch
from fake_driver import FakeDriver

from dsv4_router_runtime import Router, binding, loaded_steps, log, router, scratch, steps
from dsv4_router_runtime.artifacts.limits import MAX_TOKENS
from dsv4_router_runtime.device import (
    driver,
    launch_site,
    load,
    memory,
    occupancy,
    streams,
    tensor_map,
    workspace,
)
from dsv4_router_runtime.device.arguments import NO_OPTIONS, Call
from dsv4_router_runtime.device.launch_site import LaunchSite


class Gpu:
    """What a process asked the GPU for, in order; tensors lie in host memory."""

    def __init__(self) -> None:
        self.arch = "sm_90a"
        self.stream = 0
        self.capture = 0
        # The handle of the calling thread's current context.
        self.context = 1
        # Streams that torch did not make.
        self.foreign: set[int] = {2}
        self.driver = FakeDriver(self)
        self.driver.cuCtxGetCurrent = lambda: (0, self.context)
        self.loads: list[str] = []
        self.maps: list = []
        self.launches: list[dict] = []
        self.products: list = []
        # The room for the rows that a product computes transposed.
        self.transposed: list = []
        self.pdl: list[bool] = []
        # Kernels that no context has room for, by key, with the reason.
        self.unfit: dict[str, str] = {}
        # Clusters that a context holds at once, by kernel. It holds all of any other kernel.
        self.clusters: dict[str, int] = {}

    @property
    def last(self) -> dict:
        return self.launches[-1]

    def load(self, artifacts, kernel, device):
        self.loads.append(kernel.key)
        return load.LoadedKernel(kernel=kernel, device=0, library=None, handle=None, function=None)

    def multiply(self, x, w, logits, transposed=None) -> None:
        self.products.append((x, w, logits))
        if transposed is not None:
            self.transposed.append(transposed)

    def room(self, loaded, stream, clusters=1):
        """Return the room of a context that holds every cluster but those of unfit kernels."""
        reason = self.unfit.get(loaded.kernel.key)
        clusters = self.clusters.get(loaded.kernel.key, 1 << 20)
        return occupancy.Room(exclusive_clusters=0, clusters=clusters, reason=reason)

    def encode(self, arguments, device):
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
    monkeypatch.setattr(driver, "bindings", lambda: gpu.driver)
    monkeypatch.setattr(driver, "_primary_context", lambda index: "primary")
    monkeypatch.setattr(memory, "_live", type(memory._live)())
    monkeypatch.setattr(memory, "_to_free", type(memory._to_free)())
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
    monkeypatch.setattr(log, "_logged", set())
    for name, value in {
        "current_stream": lambda index: gpu.stream,
        "is_capturing": lambda: gpu.capture != 0,
        "is_lasting": lambda index, stream: stream not in gpu.foreign,
        "multiply": gpu.multiply,
        "wait_for_current_stream": lambda device: None,
        "on_memory_stream": lambda device: contextlib.nullcontext(),
    }.items():
        monkeypatch.setattr(binding, name, value)
    monkeypatch.setattr(steps, "encode_tensor_map", gpu.encode)
    monkeypatch.setattr(loaded_steps, "ask_room", gpu.room)
    monkeypatch.setattr(workspace, "_workspaces", {})
    monkeypatch.setattr(scratch, "gpu_index", lambda device: None)
    monkeypatch.setattr(router, "require_gpu", lambda device: None)
    monkeypatch.setattr(router, "_remembered", type(router._remembered)())
    monkeypatch.setattr(torch.cuda, "device", lambda index: contextlib.nullcontext())
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    return gpu


def run_without_memory(bound: Router, num_tokens: int) -> None:
    """Make a call of so many tokens with addresses of no memory, past the checks of a call."""
    given = Call(num_tokens, 1 << 44, 128, 2 << 44, 8, 3 << 44, 8, 0, 0)
    bound._binding.run(given, NO_OPTIONS, None, None, False)


def workspace_of(bound: Router) -> workspace.Workspace:
    return bound._binding._workspace


def remembered_layers() -> list[tuple[binding.Binding, torch.Tensor | None]]:
    """Return the binding of each layer that dense_router_dispatch keeps, and the W_gate kept."""
    return [(bound, kept) for bound, kept, _ in router._remembered.values()]


@contextlib.contextmanager
def interrupt_at_last_parameter(monkeypatch, site: LaunchSite):
    """Raise KeyboardInterrupt where `site` writes the last parameter that each call has anew."""

    class Interrupted:
        def __setattr__(self, name, value):
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        cells = list(site._call_cells)
        cells[launch_site._CALL_PARAMETERS.index("out_ids_stride")] = Interrupted()
        patch.setattr(site, "_call_cells", cells)
        yield


def w_copy_of(bound: Router) -> torch.Tensor | None:
    return bound._binding.w_copy


def table_of(bound: Router) -> torch.Tensor | None:
    return bound._binding.table_copy


def site_table_of(bound: Router) -> dict:
    return bound._binding._sites


def sites_of(bound: Router) -> list[launch_site.LayerLaunchSite]:
    return list(site_table_of(bound).values())


def steps_of(bound: Router) -> tuple:
    return bound._binding._steps


def keep_first_step(monkeypatch, bound: Router) -> None:
    """Let the first step of a layer serve any number of tokens, with no step behind it."""
    first = replace(steps_of(bound)[0], max_tokens=MAX_TOKENS)
    monkeypatch.setattr(bound._binding, "_steps", (first,))


def pretend_many_devices(monkeypatch, bound: Router) -> None:
    monkeypatch.setattr(bound._binding, "_current_device", lambda: torch.cuda.current_device())


@contextlib.contextmanager
def held_locks(bound: Router):
    """Hold the locks that a call may wait for, as another thread did at a fork."""
    with router._remembered_lock, bound._binding._lock:
        yield
