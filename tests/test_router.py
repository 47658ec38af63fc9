"""The host side of a call, on a CPU: which kernel, with which arguments, on which scratch.

The driver is replaced by a recorder; tensors lie in host memory and are never launched on.
"""

from __future__ import annotations

import contextlib
import copy
import pickle
import sys
import threading
import weakref
from dataclasses import replace
from pathlib import Path

import pytest

pytest.importorskip("torch", reason="torch is the caller's and is not installed here")

import torch
from conftest import decode_kernel, sample_manifest
from gpu_recorder import (
    interrupt_at_last_parameter,
    remembered_layers,
    sites_of,
    table_of,
    w_copy_of,
    workspace_of,
)
from watchdog import ends_within

from dsv4_router_runtime import Router, binding, dense_router_dispatch, router, steps
from dsv4_router_runtime.artifacts.dispatch import LayerProblem, plan_layer
from dsv4_router_runtime.artifacts.folder import ArtifactSet, open_artifacts
from dsv4_router_runtime.artifacts.kernel import LAYOUTS, IntRange
from dsv4_router_runtime.binding import multiply
from dsv4_router_runtime.device import tensor_map
from dsv4_router_runtime.device.launch_site import LaunchSite
from dsv4_router_runtime.device.tensor_map import encode_arguments
from dsv4_router_runtime.errors import ArtifactError, NoKernelError, RouterError
from dsv4_router_runtime.parameters import ABI, DTYPES
from dsv4_router_runtime.product import transposed_rows

K, E, TOP_K = 512, 80, 6


def weights(layout="kmajor", e=E):
    if layout == "kmajor":
        return torch.zeros(e, K, dtype=torch.bfloat16).t()
    return torch.zeros(K, e, dtype=torch.bfloat16)


@pytest.fixture
def make(artifacts):
    def made(layout="kmajor", e=E, scale=2.5, **more) -> Router:
        W, bias = weights(layout, e), torch.zeros(e)
        bias = None if "tid2eid" in more else bias
        more = {"top_k": TOP_K, "artifacts": artifacts} | more
        return Router(W, bias, routed_scaling_factor=scale, **more)

    return made


def step(num_tokens, rows=None, columns=TOP_K):
    rows = num_tokens if rows is None else rows
    x = torch.zeros(num_tokens, K, dtype=torch.bfloat16)
    return x, torch.zeros(rows, columns), torch.zeros(rows, columns, dtype=torch.int32)


@pytest.mark.parametrize("layout", ["kmajor", "emajor"])
@pytest.mark.parametrize(("num_tokens", "tile"), [(1, 8), (8, 8), (9, 32), (32, 32), (33, 64)])
def test_decode_is_one_launch_with_every_parameter(gpu, make, layout, num_tokens, tile):
    bound = make(layout)
    x, w, ids = step(num_tokens, rows=70, columns=9)
    bound(x, w, ids)
    assert len(gpu.launches) == 1
    assert gpu.products == []
    last = gpu.last
    assert last["kernel"] == f"router_decode_{layout}_n{tile}.sm_90a"
    assert last["grid"] == (16, 2, 1)
    assert last["e_bias"] == bound.e_bias.data_ptr()
    assert (last["out_weights"], last["out_ids"]) == (w.data_ptr(), ids.data_ptr())
    assert (last["out_weights_stride"], last["out_ids_stride"]) == (9, 9)
    assert (last["num_tokens"], last["num_experts"], last["num_k_blocks"]) == (num_tokens, E, 8)
    assert (last["top_k"], last["routed_scaling_factor"]) == (TOP_K, 2.5)
    assert all(last[name] for name in ("w_map", "x_map", "partials", "counters"))
    assert last["w_map"] != last["x_map"]


def test_tensor_maps_describe_the_tensors(gpu, make):
    bound = make()
    x, w, ids = step(5)
    bound(x, w, ids)
    *w_maps, x_map = gpu.maps
    for w_map in w_maps:
        assert (w_map.address, w_map.dims) == (bound.W_gate.data_ptr(), (K, E))
        assert w_map.strides == (1024,)
    # Decode's and prefill's.
    assert sorted(w_map.box for w_map in w_maps) == [(64, 64), (64, 128)]
    assert (x_map.address, x_map.dims) == (x.data_ptr(), (64, 5, K // 64))
    assert (x_map.strides, x_map.box) == ((1024, 128), (64, 8, 4))


def test_weights_map_is_encoded_once_and_activations_maps_are_remembered(gpu, make):
    bound = make()
    x, w, ids = step(8)
    for _ in range(3):
        bound(x, w, ids)
    # Decode's and prefill's of W_gate, and one of x.
    assert len(gpu.maps) == 3
    bound(x[:7], w, ids)
    assert [m.dims[1] for m in gpu.maps[3:]] == [7]
    bound(x, w, ids)
    assert len(gpu.maps) == 4


def test_layers_share_the_maps_of_activations(gpu, make):
    first, second = make(), make()
    x, w, ids = step(8)
    first(x, w, ids)
    second(x, w, ids)
    assert [m.dims for m in gpu.maps] == [*[(K, E)] * 4, (64, 8, K // 64)]
    assert gpu.launches[0]["x_map"] == gpu.launches[1]["x_map"]
    assert gpu.launches[0]["w_map"] != gpu.launches[1]["w_map"]


def test_activations_are_told_apart_by_address_and_shape(gpu, artifacts):
    """Torch's allocator hands an address out again, for rows of another length or stride."""
    memory = torch.zeros(5 * K * 2, dtype=torch.bfloat16)
    layers = {
        k: Router(
            torch.zeros(E, k, dtype=torch.bfloat16).t(),
            torch.zeros(E),
            top_k=TOP_K,
            routed_scaling_factor=1.0,
            artifacts=artifacts,
        )
        for k in (K, K // 2)
    }
    wanted = []
    for k, row_stride, num_tokens, offset in (
        (K, K, 4, 0),
        (K // 2, K, 4, 0),  # another K, the same stride
        (K, 2 * K, 4, 0),  # another stride, the same K
        (K, K, 3, 0),
        (K // 2, K // 2, 4, 0),
        (K, K, 4, K),
    ):
        x = memory.as_strided((num_tokens, k), (row_stride, 1), offset)
        for _ in range(2):
            layers[k](x, *step(4)[1:])
        dims, strides = (64, num_tokens, k // 64), (2 * row_stride, 128)
        wanted.append((x.data_ptr(), dims, strides))
    assert [(m.address, m.dims, m.strides) for m in gpu.maps if len(m.dims) == 3] == wanted
    assert len({launch["x_map"] for launch in gpu.launches}) == len(wanted)


def test_map_cache_drops_the_oldest(gpu, make, monkeypatch):
    monkeypatch.setattr(tensor_map, "MAX_CACHED_MAPS", 2)
    bound = make()
    x, w, ids = step(8)
    for num_tokens in (1, 2, 3, 3, 2, 1):
        bound(x[:num_tokens], w, ids)
    encoded = [m.dims[1] for m in gpu.maps if len(m.dims) == 3]
    assert encoded == [1, 2, 3, 1]


def test_a_map_that_the_cache_dropped_lives_as_long_as_a_site_points_to_it(gpu, make, monkeypatch):
    """A call with the arguments of the one before writes nothing, and launches by that address."""
    monkeypatch.setattr(tensor_map, "MAX_CACHED_MAPS", 2)
    made = []

    class Watched(tensor_map.TensorMap):
        """One that a weak reference may point to."""

    def encode(arguments, device):
        encoded = Watched()
        made.append(weakref.ref(encoded))
        return encoded

    for module in (tensor_map, steps):
        monkeypatch.setattr(module, "encode_tensor_map", encode)
    bound = make()
    x, w, ids = step(8)
    bound(x, w, ids)
    of_the_first = made[-1]
    gpu.stream = 5
    for num_tokens in range(1, 8):
        bound(x[:num_tokens], w, ids)
    gpu.stream = 0
    bound(x, w, ids)
    assert gpu.last["x_map"] == of_the_first().address


@pytest.mark.parametrize("layout", ["kmajor", "emajor"])
@pytest.mark.parametrize(
    ("num_tokens", "shape", "splits", "box", "token_tiles"),
    [
        (65, "n64", 16, (64, 64, 2), 2),
        (448, "n64", 16, (64, 64, 2), 7),
        (449, "n64_k8", 8, (64, 64, 1), 8),
        (960, "n64_k8", 8, (64, 64, 1), 15),
        (961, "n64_k4", 4, (64, 64, 1), 16),
        (1920, "n64_k4", 4, (64, 64, 1), 30),
    ],
)
def test_prefill_is_one_launch_with_decodes_parameters(
    gpu, make, layout, num_tokens, shape, splits, box, token_tiles
):
    bound = make(layout)
    bound(*step(64))
    x, w, ids = step(num_tokens, columns=9)
    bound(x, w, ids)
    decode, last = gpu.launches
    assert gpu.products == []
    assert last["kernel"] == f"router_prefill_{layout}_{shape}.sm_90a"
    # 80 experts are one tile of 128.
    assert last["grid"] == (splits, 1, token_tiles)
    assert (last["num_tokens"], last["num_experts"], last["num_k_blocks"]) == (num_tokens, E, 8)
    assert (last["out_weights"], last["out_ids"]) == (w.data_ptr(), ids.data_ptr())
    assert (last["out_weights_stride"], last["out_ids_stride"]) == (9, 9)
    assert set(last) == {*decode, "first_token"}
    assert last["first_token"] == 0
    # Of W_gate a K-contiguous box is as wide as the tile: a map of the kernel's own.
    assert (last["w_map"] == decode["w_map"]) == (layout == "emajor")
    assert (gpu.maps[-1].dims, gpu.maps[-1].box) == ((64, num_tokens, 8), box)


@pytest.mark.parametrize("num_tokens", [1921, 4000])
def test_more_tokens_are_a_product_and_a_selection(gpu, make, num_tokens):
    bound = make()
    x, w, ids = step(num_tokens)
    bound(x, w, ids)
    [(left, right, logits)] = gpu.products
    assert left is x
    assert right is bound.W_gate
    assert (logits.shape, logits.dtype) == ((num_tokens, E), torch.float32)
    assert logits.is_contiguous()
    last = gpu.last
    assert last["kernel"] == "router_topk.sm_90a"
    assert last["grid"] == (-(-num_tokens // 4), 1, 1)
    assert (last["logits"], last["logits_stride"]) == (logits.data_ptr(), E)
    assert (last["num_tokens"], last["num_experts"]) == (num_tokens, E)
    assert len(gpu.launches) == 1


def test_selections_grid_follows_n_and_logits_only_grow(gpu, make):
    bound = make()
    for num_tokens in (2000, 4000, 2000):
        bound(*step(num_tokens))
    assert [item["grid"][0] for item in gpu.launches] == [500, 1000, 500]
    small, large, again = (item["logits"] for item in gpu.launches)
    assert small != large == again


def test_no_tokens_is_no_launch(gpu, make):
    make()(*step(0))
    assert gpu.launches == gpu.products == []


def test_refused_call_launches_nothing_and_touches_nothing(gpu, make):
    bound = make()
    x, w, ids = step(4)
    w.fill_(7.0)
    for wrong in ((x, w, ids.short()), (x, w[:3], ids), (x.float(), w, ids), (x[:, :64], w, ids)):
        with pytest.raises((TypeError, ValueError)):
            bound(*wrong)
    assert gpu.launches == gpu.products == []
    assert (w == 7.0).all()


def test_streams_have_their_own_scratch_and_layers_share_it(gpu, make):
    first, second = make(), make()
    for stream in (0, 0x70, 0):
        gpu.stream = stream
        first(*step(4))
        second(*step(40))
    counters = [item["counters"] for item in gpu.launches]
    partials = [item["partials"] for item in gpu.launches]
    assert [item["stream"] for item in gpu.launches] == [0, 0, 0x70, 0x70, 0, 0]
    for addresses in (counters, partials):
        assert addresses[0] == addresses[1] == addresses[4] == addresses[5]
        assert addresses[2] == addresses[3] != addresses[0]


@pytest.mark.parametrize("capture", [0, 1], ids=["eager", "in one capture"])
def test_per_thread_stream_is_one_stream_in_each_thread(gpu, make, capture):
    bound = make()
    gpu.stream = 2  # CU_STREAM_PER_THREAD
    gpu.capture = capture
    bound(*step(4))
    thread = threading.Thread(target=lambda: bound(*step(4)))
    thread.start()
    thread.join()
    bound(*step(4))
    here, there, again = (item["counters"] for item in gpu.launches)
    assert here == again != there


def test_per_thread_stream_is_another_stream_in_each_context_of_a_capture(gpu, make):
    """Branches on that of the primary context and of a green one may run at once."""
    bound = make()
    gpu.stream, gpu.capture = 2, 1
    for gpu.context in (1, 7, 1, 7):
        bound(*step(4))
    primary, green, again, green_again = (item["counters"] for item in gpu.launches)
    assert primary == again
    assert green == green_again != primary


def test_threads_one_after_another_have_their_own_scratch_in_a_capture(gpu, make):
    """Python gives an identifier again once its thread has ended; the branch may run on."""
    bound = make()
    gpu.stream, gpu.capture = 2, 1
    idents = []

    def branch() -> None:
        idents.append(threading.get_ident())
        bound(*step(4))

    for _ in range(4):
        thread = threading.Thread(target=branch)
        thread.start()
        thread.join()
    assert len(set(idents)) < 4, "no identifier came again"
    assert len({item["counters"] for item in gpu.launches}) == 4


def test_captures_have_their_own_counters(gpu, make):
    bound = make()
    for gpu.capture in (0, 1, 1, 2, 0):
        bound(*step(4))
    gpu.capture, gpu.stream = 2, 0x70
    bound(*step(4))
    eager, one, one_again, two, eager_again, two_forked = (i["counters"] for i in gpu.launches)
    assert eager == eager_again
    assert one == one_again
    assert len({eager, one, two, two_forked}) == 4


def test_call_from_another_current_device_runs_on_the_layers_own(gpu, make, monkeypatch):
    current, entered = [1], []

    @contextlib.contextmanager
    def device(index):
        entered.append(index)
        before, current[0] = current[0], index
        yield
        current[0] = before

    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "device", device)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: current[0])
    stream_asked_on = []
    monkeypatch.setattr(binding, "current_stream", lambda index: stream_asked_on.append(current[0]))
    bound = make()
    entered.clear()
    bound(*step(4))
    # The CPU's tensors have no index, which stands for the layer's own GPU here.
    assert entered == stream_asked_on == [None]
    assert current == [1]
    current[0] = None
    bound(*step(4))
    assert entered == [None]
    assert len(gpu.launches) == 2


def test_a_call_holds_the_slot_from_product_to_launch(gpu, make, monkeypatch):
    """Another layer's call on the stream writes the same logits: it must not come between."""
    bound = make()
    bound(*step(2000))
    [slot] = workspace_of(bound).slots.values()
    held = []
    product, launch = binding.multiply, LaunchSite.launch
    monkeypatch.setattr(
        binding, "multiply", lambda *given: held.append(slot.lock._is_owned()) or product(*given)
    )
    second = make()

    def launched(site):
        held.append(slot.lock._is_owned())
        launch(site)

    monkeypatch.setattr(LaunchSite, "launch", launched)
    second(*step(2000))
    assert gpu.launches[0]["logits"] == gpu.launches[1]["logits"]
    assert held == [True, True]
    assert not slot.lock._is_owned()


@pytest.mark.parametrize(("num_tokens", "scratch"), [(100, "counters"), (2000, "logits")])
def test_a_capture_leaves_the_eager_scratch_alone(gpu, make, num_tokens, scratch):
    bound = make()
    bound(*step(num_tokens))
    eager = gpu.last[scratch]
    gpu.capture = 1
    bound(*step(num_tokens))
    assert gpu.last[scratch] != eager
    gpu.capture = 0
    bound(*step(num_tokens))
    assert gpu.last[scratch] == eager


def test_scratch_made_in_inference_mode_can_be_used_outside(gpu, make):
    bound = make()
    with torch.inference_mode():
        bound(*step(2000))
    assert not gpu.products[0][2].is_inference()


def test_kernels_are_loaded_once_and_before_the_first_call(gpu, make):
    bound = make()
    assert gpu.loads == [
        "router_decode_kmajor_n8.sm_90a",
        "router_decode_kmajor_n32.sm_90a",
        "router_decode_kmajor_n64.sm_90a",
        "router_prefill_kmajor_n64.sm_90a",
        "router_prefill_kmajor_n64_k8.sm_90a",
        "router_prefill_kmajor_n64_k4.sm_90a",
        "router_topk.sm_90a",
    ]
    assert bound.kernels == tuple(gpu.loads)
    make()
    for num_tokens in (4, 100, 2000):
        bound(*step(num_tokens))
    assert len(gpu.loads) == 7


def test_same_bytes_under_changed_metadata_are_loaded_as_it_says(gpu, make, artifacts):
    """Rebuilt entries may launch the same cubin otherwise; the old launch must not live on."""
    make()
    manifest = artifacts.manifest
    kernels = tuple(
        replace(kernel, launch=replace(kernel.launch, grid=("k_splits", 9, 1)))
        if kernel.key == "router_decode_kmajor_n8.sm_90a"
        else kernel
        for kernel in manifest.kernels
    )
    before = len(gpu.loads)
    bound = make(artifacts=replace(artifacts, manifest=replace(manifest, kernels=kernels)))
    assert gpu.loads[before:] == ["router_decode_kmajor_n8.sm_90a"]
    bound(*step(4))
    assert gpu.last["grid"] == (16, 9, 1)


def test_loading_under_capture_is_refused(gpu, make):
    gpu.capture = 5
    with pytest.raises(RouterError, match=r"being captured and router_decode_kmajor_n8.sm_90a"):
        make()
    gpu.capture = 0
    make()
    gpu.capture = 5
    make()(*step(4))
    assert len(gpu.launches) == 1


def test_copying_under_capture_is_refused(gpu, make):
    make()
    gpu.capture = 5
    with pytest.raises(RouterError, match="W_gate would have to be copied"):
        make("emajor", e=132)


def test_unaligned_rows_are_copied_k_contiguous(gpu, make):
    bound = make("emajor", e=132)
    copy = w_copy_of(bound)
    assert bound.weights_copied
    assert bound.kernels[0] == "router_decode_kmajor_n8.sm_90a"
    assert copy.stride() == (1, K)
    assert gpu.maps[0].address == copy.data_ptr()
    bound(*step(960))
    assert gpu.last["kernel"] == "router_prefill_kmajor_n64_k4.sm_90a"
    bound(*step(961))
    assert gpu.products[0][1] is copy
    assert not make().weights_copied


def test_copied_weights_hold_the_same_numbers(gpu, artifacts):
    W = torch.arange(K * 132).view(K, 132).bfloat16()
    bound = Router(W, torch.zeros(132), top_k=1, routed_scaling_factor=1, artifacts=artifacts)
    assert torch.equal(w_copy_of(bound), W)


def test_modified_weights_are_refused_only_where_they_were_copied(gpu, make):
    copied, plain = make("emajor", e=132), make("emajor", e=136)
    for bound in (copied, plain):
        bound(*step(4))
        bound.W_gate.add_(1)
    with pytest.raises(ValueError, match=r"W_gate: .*modified in place.*make a new Router"):
        copied(*step(4))
    plain(*step(4))
    assert len(gpu.launches) == 3


def test_pdl_reaches_the_launch(gpu, make):
    router = make(pdl=True)
    router(*step(4))
    make()(*step(4))
    assert gpu.pdl == [True, False]


def test_a_call_may_say_otherwise_about_pdl(gpu, make):
    """Each choice has a launch site of its own, made once."""
    router = make(pdl=True)
    for choice in (None, False, None, False, True):
        router(*step(4), pdl=choice)
    assert gpu.pdl == [True, False]
    assert len(gpu.launches) == 5


@pytest.mark.parametrize("pdl", ["no", 0, 1, 1.0, torch.tensor(True), object()])
def test_pdl_is_a_bool(gpu, make, pdl):
    """The string "no" is true, and a launch that starts too early is seen by nobody."""
    got = type(pdl).__name__
    with pytest.raises(TypeError, match=rf"^pdl: expected a bool \(got {got}\)"):
        make(pdl=pdl)
    router = make()
    for num_tokens in (4, 100, 2000, 0):
        with pytest.raises(TypeError, match=rf"^pdl: expected a bool, or None .*\(got {got}\)"):
            router(*step(num_tokens), pdl=pdl)
    assert gpu.launches == gpu.products == []
    with pytest.raises(TypeError, match=r"^pdl: expected a bool \(got NoneType\)"):
        make(pdl=None)


def test_a_decode_kernel_without_an_upper_bound_takes_every_call(gpu, artifacts, make):
    kernels = tuple(
        replace(kernel, problem=replace(kernel.problem, num_tokens=IntRange(low=1, high=None)))
        if kernel.name == "router_decode_kmajor_n64"
        else kernel
        for kernel in artifacts.manifest.kernels
    )
    endless = replace(artifacts, manifest=replace(artifacts.manifest, kernels=kernels))
    with ends_within(10):
        bound = make(artifacts=endless)
    bound(*step(5000))
    assert gpu.last["kernel"] == "router_decode_kmajor_n64.sm_90a"
    assert gpu.products == []


def test_a_router_cannot_be_pickled_and_says_what_to_do(gpu, make):
    for protocol in range(pickle.HIGHEST_PROTOCOL + 1):
        with pytest.raises(TypeError, match=r"a Router cannot be pickled: .* bind a new Router"):
            pickle.dumps(make(), protocol)


def test_a_router_cannot_be_deep_copied_and_says_what_to_do(gpu, make):
    """Torch copies a parameter and a view of it apart: the copy would read what is not trained."""
    model = torch.nn.Linear(K, E, bias=False).to(torch.bfloat16)
    view = torch.nn.Module()
    view.gate, view.turned = model, model.weight.detach().t()
    apart = copy.deepcopy(view)
    assert apart.turned.data_ptr() != apart.gate.weight.data_ptr()
    view.router = make()
    for held in (view, view.router):
        with pytest.raises(
            TypeError, match=r"a Router cannot be deep-copied: .* bind a new Router"
        ):
            copy.deepcopy(held)


def test_a_shallow_copy_is_the_same_layer(gpu, make):
    bound = make(pdl=True, num_shared_slots=1)
    twin = copy.copy(bound)
    assert repr(twin) == repr(bound)
    loads = list(gpu.loads)
    for each in (bound, twin):
        each(*step(4, columns=TOP_K + 1))
    first, second = (
        {k: v for k, v in launch.items() if "out_" not in k} for launch in gpu.launches
    )
    assert first["e_bias"] == second["e_bias"] == bound.e_bias.data_ptr()
    assert (gpu.loads, twin.W_gate) == (loads, bound.W_gate)


def test_no_kernel_for_this_gpu(gpu, make):
    gpu.arch = "sm_103a"
    with pytest.raises(NoKernelError) as caught:
        make()
    assert "router_decode_kmajor_n8.sm_100a: built for sm_100a, this GPU is sm_103a" in str(
        caught.value
    )
    assert gpu.loads == []


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("out_ids", "ids", 'none is named "out_ids", which this runtime sets'),
        ("gate_temp", "temperature", 'none is named "gate_temp", which this runtime sets'),
        ("image_mask", "mask", 'none is named "image_mask", which this runtime sets'),
    ],
)
def test_parameters_unknown_to_this_runtime_are_refused_when_bound(gpu, make, old, new, message):
    manifest = sample_manifest()
    kernels = tuple(
        replace(
            kernel,
            parameters=tuple(
                replace(p, name=new) if p.name == old else p for p in kernel.parameters
            ),
        )
        for kernel in manifest.kernels
    )
    altered = ArtifactSet(folder=Path("there"), manifest=replace(manifest, kernels=kernels))
    with pytest.raises(ArtifactError) as caught:
        make(artifacts=altered)
    assert message in str(caught.value)
    assert caught.value.file.startswith("there/router_decode_kmajor_n8.sm_90a")
    assert gpu.loads == []


def test_a_parameter_that_nothing_fills_is_refused(artifacts):
    """Scratch without its size, say: an address that would be null."""
    kernel = decode_kernel()
    parameters = tuple(
        replace(p, scratch=None) if p.name == "partials" else p for p in kernel.parameters
    )
    with pytest.raises(ArtifactError) as caught:
        steps.check_parameter_names(artifacts, replace(kernel, parameters=parameters))
    assert 'parameters[2].name: nothing to pass as "partials"' in str(caught.value)


def test_repr_says_what_is_bound(gpu, make):
    text = repr(make())
    assert "K=512, num_experts=80, top_k=6, routed_scaling_factor=2.5, layout=kmajor" in text
    assert "options=[], pdl=False" in text
    assert "router_topk.sm_90a" in text
    assert "options=[tid2eid, num_shared_slots=1]" in repr(
        make(tid2eid=hash_table(), num_shared_slots=1)
    )


# ------------------------------------------------------------------ options

OPTION_DEFAULTS = {
    "bias_vl": 0,
    "image_mask": 0,
    "padding_mask": 0,
    "num_valid_tokens": 0,
    "to_physical": 0,
    "logical_count": 0,
    "gate_temp": 1.0,
    "norm_topk_prob": 1,
    "max_replicas": 0,
    "num_shared_slots": 0,
    "ids_are_int64": 0,
    "weights_are_bfloat16": 0,
    "shared_weight": 1.0,
    "map_is_int64": 0,
    "first_image_id": 0,
    "num_image_ids": 0,
    "forced_ids": 0,
    "forced_ids_stride": 0,
    "forced_ids_are_int64": 0,
    "forced_mask": 0,
    "out_logical_ids": 0,
    "out_logical_ids_stride": 0,
}
TABLE_DEFAULTS = {"tid2eid": 0, "input_ids": 0, "vocab_size": 0, "input_ids_are_int64": 0}


def of(launch, expected):
    """The part of a launch that `expected` is about."""
    return {name: launch[name] for name in expected}


def physical(e=E, replicas=3):
    return torch.zeros(e, replicas, dtype=torch.int32), torch.ones(e, dtype=torch.int32)


def hash_table(vocab=20):
    return torch.arange(TOP_K).expand(vocab, TOP_K)


@pytest.mark.parametrize("num_tokens", [4, 100, 2000])
def test_options_that_are_off_are_null(gpu, make, num_tokens):
    make()(*step(num_tokens))
    assert of(gpu.last, OPTION_DEFAULTS) == OPTION_DEFAULTS
    assert of(gpu.last, TABLE_DEFAULTS) == TABLE_DEFAULTS


@pytest.mark.parametrize("num_tokens", [4, 20, 64, 100, 2000])
def test_options_of_a_layer_reach_the_launch(gpu, make, num_tokens):
    to_physical, logical_count = physical()
    bound = make(
        bias_vl=torch.zeros(E),
        gate_temp=1.5,
        to_physical=to_physical,
        logical_count=logical_count,
        num_shared_slots=2,
        shared_weight=0.4,
        norm_topk_prob=False,
    )
    bound(*step(num_tokens, columns=TOP_K + 2))
    expected = OPTION_DEFAULTS | {
        "bias_vl": bound.bias_vl.data_ptr(),
        "gate_temp": 1.5,
        "to_physical": to_physical.data_ptr(),
        "logical_count": logical_count.data_ptr(),
        "max_replicas": 3,
        "num_shared_slots": 2,
        "shared_weight": pytest.approx(0.4, rel=1e-7),
        "norm_topk_prob": 0,
    }
    assert of(gpu.last, expected) == expected


@pytest.mark.parametrize("num_tokens", [4, 100, 2000])
def test_image_token_ids_reach_the_launch_of_any_layer(gpu, make, num_tokens):
    bound = make(bias_vl=torch.zeros(E), first_image_id=-5, num_image_ids=7)
    tokens = torch.zeros(num_tokens, dtype=torch.int64)
    with pytest.raises(TypeError, match="which the layer's num_image_ids tells image rows by"):
        bound(*step(num_tokens))
    bound(*step(num_tokens), input_ids=tokens)
    expected = OPTION_DEFAULTS | {
        "bias_vl": bound.bias_vl.data_ptr(),
        "first_image_id": -5,
        "num_image_ids": 7,
        "input_ids": tokens.data_ptr(),
        "input_ids_are_int64": 1,
        "tid2eid": 0,
    }
    assert of(gpu.last, expected) == expected


@pytest.mark.parametrize(
    ("hashed", "num_tokens"), [(False, 4), (False, 100), (False, 2000), (True, 4), (True, 100)]
)
def test_a_physical_map_in_int64_is_read_in_place(gpu, make, hashed, num_tokens):
    to_physical, logical_count = (tensor.long() for tensor in physical())
    table = {"tid2eid": hash_table()} if hashed else {}
    bound = make(to_physical=to_physical, logical_count=logical_count, **table)
    tokens = torch.zeros(num_tokens, dtype=torch.int32)
    bound(*step(num_tokens), **({"input_ids": tokens} if hashed else {}))
    expected = {
        "to_physical": to_physical.data_ptr(),
        "logical_count": logical_count.data_ptr(),
        "map_is_int64": 1,
        "max_replicas": 3,
    }
    assert of(gpu.last, expected) == expected


@pytest.mark.parametrize("num_tokens", [4, 20, 64, 100, 2000])
@pytest.mark.parametrize("ids_dtype", [torch.int32, torch.int64])
def test_rare_options_of_a_call_reach_that_launch_and_no_other(gpu, make, ids_dtype, num_tokens):
    bound = make()
    x, w, ids = step(num_tokens)
    forced = torch.zeros(num_tokens, TOP_K + 3, dtype=ids_dtype)[:, 1 : TOP_K + 1]
    rows = torch.zeros(num_tokens, dtype=torch.bool)
    logical = torch.zeros(num_tokens, TOP_K + 2, dtype=torch.int32)
    bound(x, w.bfloat16(), ids, forced_ids=forced, forced_mask=rows, out_logical_ids=logical)
    bound(x, w, ids, forced_ids=forced)
    bound(x, w, ids, padding_mask=rows)
    bound(x, w, ids)
    first, second, third, fourth = (of(item, OPTION_DEFAULTS) for item in gpu.launches)
    given = {
        "forced_ids": forced.data_ptr(),
        "forced_ids_stride": TOP_K + 3,
        "forced_ids_are_int64": int(ids_dtype is torch.int64),
    }
    assert first == OPTION_DEFAULTS | given | {
        "weights_are_bfloat16": 1,
        "forced_mask": rows.data_ptr(),
        "out_logical_ids": logical.data_ptr(),
        "out_logical_ids_stride": TOP_K + 2,
    }
    assert second == OPTION_DEFAULTS | given
    assert third == OPTION_DEFAULTS | {"padding_mask": rows.data_ptr()}
    assert fourth == OPTION_DEFAULTS


def test_logits_of_a_decode_call_are_written_by_the_kernel(gpu, make):
    bound = make()
    x, w, ids = step(4)
    logits = torch.zeros(5, E + 3)
    bound(x, w, ids, out_logits=logits)
    bound(x, w, ids)
    assert (gpu.launches[0]["out_logits"], gpu.launches[0]["out_logits_stride"]) == (
        logits.data_ptr(),
        E + 3,
    )
    assert (gpu.launches[1]["out_logits"], gpu.launches[1]["out_logits_stride"]) == (0, 0)
    assert gpu.products == []


def test_logits_of_more_tokens_are_the_products_own_output(gpu, make):
    """And the next call has scratch again: its address, and its stride."""
    bound = make()
    x, w, ids = step(2000)
    logits = torch.zeros(2001, E + 3)
    bound(x, w, ids)
    for _ in range(2):
        bound(x, w, ids, out_logits=logits)
        bound(x, w, ids)
    scratch, asked, *_ = (out for _, _, out in gpu.products)
    assert (asked.data_ptr(), asked.shape, asked.stride()) == (
        *(logits.data_ptr(), (2000, E)),
        (E + 3, 1),
    )
    own = (scratch.data_ptr(), E)
    assert [(each["logits"], each["logits_stride"]) for each in gpu.launches] == [
        *(own, (logits.data_ptr(), E + 3), own),
        *((logits.data_ptr(), E + 3), own),
    ]


def test_logits_may_be_an_inference_tensor():
    """torch.mm itself, which outside of inference mode refuses to write one."""
    x, W = torch.ones(3, K), torch.ones(K, E)
    with torch.inference_mode():
        logits = torch.zeros(3, E)
    with pytest.MonkeyPatch.context() as patch:
        mm = torch.mm
        patch.setattr(torch, "mm", lambda x, W, out_dtype, out: mm(x, W, out=out))
        multiply(x, W, logits)
    assert (logits == K).all()


@pytest.mark.parametrize(
    ("num_tokens", "num_experts", "rows"),
    [(512, 132, 512), (1029, 300, 1024), (511, 132, 0), (1029, 384, 0)],
)
def test_a_product_of_ill_shaped_rows_is_computed_transposed(num_tokens, num_experts, rows):
    """In scratch beside the logits, or alone if those are the caller's; the rest as it is."""
    x = torch.arange(num_tokens * 4).view(num_tokens, 4).float() % 7
    W = (torch.arange(4 * num_experts).view(4, num_experts) % 5).float()
    logits = torch.zeros(num_tokens, num_experts + 1)[:, :num_experts]
    assert transposed_rows(num_tokens, num_experts) == rows
    room = torch.zeros(num_experts, rows) if rows else None
    calls, mm = [], torch.mm

    def recorded(a, b, out_dtype, out):
        calls.append(tuple(out.shape))
        return out.copy_(mm(a, b))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch, "mm", recorded)
        multiply(x, W, logits, room)
    assert (logits == mm(x, W)).all()
    left = num_tokens - rows
    assert calls == [(num_experts, rows)] * (rows > 0) + [(left, num_experts)] * (left > 0)


@pytest.mark.parametrize("asked", [False, True])
def test_a_layer_has_room_for_the_rows_that_it_computes_transposed(gpu, make, asked):
    experts = 132
    bound = make(e=experts)
    more = {"out_logits": torch.zeros(1001, experts)} if asked else {}
    bound(*step(1001), **more)
    ((_, _, logits),), (transposed,) = gpu.products, gpu.transposed
    assert (transposed.shape, transposed.is_contiguous()) == ((experts, 1000), True)
    (slot,) = {id(site.slot): site.slot for site in sites_of(bound)}.values()
    start = slot.logits.data_ptr()
    assert transposed.data_ptr() == start + 4 * (0 if asked else 1001 * experts)
    assert slot.logits.numel() == (1000 + 1001 * (not asked)) * experts
    assert logits.data_ptr() == (more["out_logits"].data_ptr() if asked else start)


@pytest.mark.parametrize(
    ("num_tokens", "table", "whole"),
    [
        (4, "router_hash", "router_decode_kmajor_n8"),
        (100, "router_prefill_kmajor_n64", "router_prefill_kmajor_n64"),
        (2000, "router_topk", "router_topk"),
    ],
)
def test_a_hash_layer_takes_the_whole_gate_for_logits_and_for_image_token_ids(
    gpu, make, num_tokens, table, whole
):
    vision = {"tid2eid": hash_table(), "bias_vl": torch.zeros(E)}
    tokens = torch.zeros(num_tokens, dtype=torch.int32)
    bound = make(**vision)
    for logits in (torch.zeros(num_tokens, E), None):
        bound(*step(num_tokens), input_ids=tokens, out_logits=logits)
    by_id = make(**vision, num_image_ids=1)
    by_id(*step(num_tokens), input_ids=tokens)
    assert [each["kernel"] for each in gpu.launches] == [
        *(f"{whole}.sm_90a", f"{table}.sm_90a", f"{whole}.sm_90a")
    ]
    assert gpu.last["num_image_ids"] == 1


@pytest.mark.parametrize("num_tokens", [4, 20, 64, 100, 2000])
def test_options_of_a_call_reach_that_launch_and_no_other(gpu, make, num_tokens):
    bound = make(bias_vl=torch.zeros(E))
    x, w, ids = step(num_tokens)
    mask, count = torch.zeros(num_tokens, dtype=torch.bool), torch.zeros(1, dtype=torch.int32)
    bound(x, w, ids, image_mask=mask, num_tokens=count)
    bound(x, w, ids.long(), padding_mask=mask)
    bound(x, w, ids)
    first, second, third = (of(item, OPTION_DEFAULTS) for item in gpu.launches)
    plain = OPTION_DEFAULTS | {"bias_vl": bound.bias_vl.data_ptr()}
    assert first == plain | {"image_mask": mask.data_ptr(), "num_valid_tokens": count.data_ptr()}
    assert second == plain | {"padding_mask": mask.data_ptr(), "ids_are_int64": 1}
    assert third == plain


def test_an_interrupted_write_does_not_pass_for_done(gpu, make, monkeypatch):
    """Ctrl-C between two parameters: the next call writes all of them."""
    bound = make()
    first, second = step(4), step(5)
    bound(*first)
    site = sites_of(bound)[0]
    with interrupt_at_last_parameter(monkeypatch, site), pytest.raises(KeyboardInterrupt):
        bound(*second)
    bound(*first)
    assert gpu.last["num_tokens"] == 4
    assert gpu.last["out_weights"] == first[1].data_ptr()


def test_options_come_and_go_as_calls_say(gpu, make):
    """What one launch site holds from the call before never reaches the next."""
    bound = make(bias_vl=torch.zeros(E))
    x, w, ids = step(4)
    for choice in range(64):
        given = {
            name: torch.zeros(size, dtype=dtype)
            for bit, (name, size, dtype) in enumerate(
                [
                    ("image_mask", 4, torch.bool),
                    ("padding_mask", 4, torch.bool),
                    ("num_tokens", 1, torch.int32),
                    ("forced_ids", (4, TOP_K), torch.int32),
                ]
            )
            if choice >> bit & 1
        }
        out = ids.long() if choice & 16 else ids
        bound(x, w.bfloat16() if choice & 32 else w, out, **given)
        for name in ("image_mask", "padding_mask", "num_tokens", "forced_ids"):
            parameter = {"num_tokens": "num_valid_tokens"}.get(name, name)
            assert gpu.last[parameter] == (given[name].data_ptr() if name in given else 0), choice
        assert gpu.last["ids_are_int64"] == bool(choice & 16), choice
        assert gpu.last["weights_are_bfloat16"] == bool(choice & 32), choice
        assert gpu.last["num_tokens"] == 4


def test_a_set_for_a_family_of_gpus_serves_a_later_one(gpu, artifacts, make):
    """Its kernels' scratch too: a workspace without it would leave the parameter null."""
    gpu.arch = "sm_103a"
    family = replace(artifacts, manifest=sample_manifest(("sm_100f",)))
    make(artifacts=family)(*step(8))
    assert gpu.last["kernel"] == "router_decode_kmajor_n8.sm_100f"
    assert gpu.last["partials"]
    assert gpu.last["counters"]


def test_a_kernel_that_would_ignore_an_option_is_refused(artifacts):
    """Artifacts of before an option: its parameter is missing, so it would do nothing."""
    for kernel in artifacts.manifest.for_arch("sm_90a"):
        for name in (item.name for item in ABI[kernel.role] if item.is_passed_by_name):
            parameters = tuple(p for p in kernel.parameters if p.name != name)
            with pytest.raises(ArtifactError, match=f'none is named "{name}", which this runtime'):
                steps.check_parameter_names(artifacts, replace(kernel, parameters=parameters))


def test_a_kernel_that_takes_too_few_dtypes_is_refused(gpu, artifacts, make):
    manifest = artifacts.manifest
    kernels = tuple(
        replace(k, problem=replace(k.problem, dtypes={**k.problem.dtypes, "out_ids": ("int32",)}))
        for k in manifest.kernels
    )
    old = replace(artifacts, manifest=replace(manifest, kernels=kernels))
    with pytest.raises(NoKernelError, match="takes out_ids in int32, got int64"):
        make(artifacts=old)


def test_wrong_options_are_refused_before_the_artifacts(gpu, make):
    with pytest.raises(ValueError, match="gate_temp: expected a finite number"):
        make(gate_temp=0.0)
    with pytest.raises(ValueError, match=r"logical_count: expected 1\.\.3, to_physical's"):
        make(to_physical=physical()[0], logical_count=torch.zeros(E, dtype=torch.int32))
    with pytest.raises(ValueError, match=r"tid2eid: expected ids in 0\.\.79"):
        make(tid2eid=hash_table() + E)
    assert gpu.maps == gpu.launches == []


def test_refused_options_launch_nothing(gpu, make):
    bound = make()
    x, w, ids = step(4)
    w.fill_(7.0)
    mask = torch.zeros(4, dtype=torch.bool)
    for wrong in (
        {"image_mask": mask},
        {"padding_mask": mask[:3]},
        {"num_tokens": 4},
        {"input_ids": torch.zeros(4, dtype=torch.int32)},
        {"forced_mask": mask},
        {"forced_ids": ids},
        {"out_logical_ids": ids},
        {"out_logits": w},
        {"logits": None},
    ):
        with pytest.raises((TypeError, ValueError)):
            bound(x, w, ids, **wrong)
    assert gpu.launches == gpu.products == []
    assert (w == 7.0).all()
    bound(x, w, ids, padding_mask=mask)
    assert len(gpu.launches) == 1


@pytest.mark.parametrize("layout", ["kmajor", "emajor"])
@pytest.mark.parametrize(
    ("num_tokens", "of_images"),
    [
        (1, "router_decode_kmajor_n8"),
        (9, "router_decode_kmajor_n32"),
        (56, "router_decode_kmajor_n64"),
        (57, "router_decode_kmajor_n64"),
        (64, "router_decode_kmajor_n64"),
        (65, "router_prefill_kmajor_n64"),
        (449, "router_prefill_kmajor_n64_k8"),
        (1920, "router_prefill_kmajor_n64_k4"),
        (1921, "router_topk"),
    ],
)
def test_image_rows_of_a_hash_layer_take_the_whole_gate(gpu, make, num_tokens, of_images, layout):
    """router_hash reads the weights of the table's experts only; a row of an image may take any."""
    bias_vl = torch.zeros(E)
    bound = make(layout, tid2eid=hash_table(), bias_vl=bias_vl)
    tokens = torch.zeros(num_tokens, dtype=torch.int32)
    images = torch.zeros(num_tokens, dtype=torch.bool)
    x, w, ids = step(num_tokens)
    for mask in (images, None, images):
        bound(x, w, ids, input_ids=tokens, image_mask=mask)
    first, text, again = gpu.launches
    assert first == again
    assert first["kernel"] == f"{of_images}.sm_90a"
    expected = {
        "e_bias": 0,
        "bias_vl": bias_vl.data_ptr(),
        "image_mask": images.data_ptr(),
        "tid2eid": table_of(bound).data_ptr(),
        "input_ids": tokens.data_ptr(),
    }
    assert of(first, expected) == expected
    if num_tokens <= 56:
        assert text["kernel"] == "router_hash.sm_90a"
    else:
        assert (text["kernel"], text["image_mask"]) == (first["kernel"], 0)
    if of_images == "router_topk":
        W = w_copy_of(bound) if layout == "emajor" else bound.W_gate
        assert all(product[1] is W for product in gpu.products)
        assert len(gpu.products) == 3


@pytest.mark.parametrize("num_tokens", [1, 8, 9, 56])
@pytest.mark.parametrize("ids_dtype", [torch.int32, torch.int64])
def test_a_hash_layer_reads_rows(gpu, make, ids_dtype, num_tokens):
    to_physical, logical_count = physical()
    bound = make(
        tid2eid=hash_table(),
        to_physical=to_physical,
        logical_count=logical_count,
        num_shared_slots=1,
        gate_temp=0.5,
    )
    assert bound.kernels == (
        "router_hash.sm_90a",
        "router_decode_kmajor_n64.sm_90a",
        "router_prefill_kmajor_n64.sm_90a",
        "router_prefill_kmajor_n64_k8.sm_90a",
        "router_prefill_kmajor_n64_k4.sm_90a",
        "router_topk.sm_90a",
    )
    x, w, ids = step(num_tokens, columns=TOP_K + 1)
    tokens = torch.zeros(num_tokens, dtype=ids_dtype)
    mask = torch.zeros(num_tokens, dtype=torch.bool)
    bound(x, w, ids, input_ids=tokens, padding_mask=mask)
    last, table = gpu.last, table_of(bound)
    assert last["kernel"] == "router_hash.sm_90a"
    assert last["grid"] == (16, -(-num_tokens // 8), 1)
    expected = {
        "w_gate": bound.W_gate.data_ptr(),
        "w_stride": K,
        "num_k_blocks": K // 64,
        "tid2eid": table.data_ptr(),
        "vocab_size": 20,
        "input_ids": tokens.data_ptr(),
        "input_ids_are_int64": int(ids_dtype is torch.int64),
        "padding_mask": mask.data_ptr(),
        "num_valid_tokens": 0,
        "to_physical": to_physical.data_ptr(),
        "max_replicas": 3,
        "num_shared_slots": 1,
        "gate_temp": 0.5,
        "norm_topk_prob": 1,
    }
    assert of(last, expected) == expected
    x_map = gpu.maps[-1]
    assert (x_map.dims, x_map.box) == ((64, num_tokens, K // 64), (64, 8, 8))


@pytest.mark.parametrize(
    ("num_tokens", "kernel"),
    [
        (57, "router_decode_kmajor_n64"),
        (64, "router_decode_kmajor_n64"),
        (65, "router_prefill_kmajor_n64"),
        (960, "router_prefill_kmajor_n64_k8"),
        (1920, "router_prefill_kmajor_n64_k4"),
    ],
)
def test_a_hash_layer_of_more_tokens_takes_the_whole_gate(gpu, make, num_tokens, kernel):
    """There router_hash has no SM of its own for each CTA, and is mostly slower."""
    bound = make(tid2eid=hash_table(), gate_temp=0.5)
    tokens = torch.zeros(num_tokens, dtype=torch.int64)
    bound(*step(num_tokens), input_ids=tokens)
    expected = OPTION_DEFAULTS | {
        "e_bias": 0,
        "gate_temp": 0.5,
        "tid2eid": table_of(bound).data_ptr(),
        "vocab_size": 20,
        "input_ids": tokens.data_ptr(),
        "input_ids_are_int64": 1,
    }
    assert gpu.last["kernel"] == f"{kernel}.sm_90a"
    assert of(gpu.last, expected) == expected
    assert gpu.products == []


def test_a_hash_layer_without_decode_kernels_is_refused(gpu, artifacts, make):
    kernels = tuple(k for k in artifacts.manifest.kernels if k.role != "decode")
    few = replace(artifacts, manifest=replace(artifacts.manifest, kernels=kernels))
    with pytest.raises(NoKernelError, match="no kernel for role=decode, num_tokens=1,"):
        make(tid2eid=hash_table(), artifacts=few)


def test_a_hash_layers_selection_is_by_the_table(gpu, make):
    bound = make(tid2eid=hash_table())
    tokens = torch.zeros(2000, dtype=torch.int64)
    bound(*step(2000), input_ids=tokens)
    expected = OPTION_DEFAULTS | {
        "e_bias": 0,
        "tid2eid": table_of(bound).data_ptr(),
        "vocab_size": 20,
        "input_ids": tokens.data_ptr(),
        "input_ids_are_int64": 1,
    }
    assert gpu.last["kernel"] == "router_topk.sm_90a"
    assert of(gpu.last, expected) == expected
    assert gpu.products[0][1] is bound.W_gate


def test_a_hash_layers_table_is_its_own(gpu, make):
    given = hash_table().clone()
    bound = make(tid2eid=given)
    given.fill_(-1)
    assert torch.equal(table_of(bound), hash_table().int())


@pytest.mark.parametrize("e", [80, 132])
def test_an_e_contiguous_gate_of_a_hash_layer_is_copied(gpu, make, e):
    bound = make("emajor", e=e, tid2eid=hash_table())
    copy = w_copy_of(bound)
    assert bound.weights_copied
    assert copy.stride() == (1, K)
    tokens = torch.zeros(2000, dtype=torch.int32)
    bound(*step(4), input_ids=tokens[:4])
    assert (gpu.last["w_gate"], gpu.last["w_stride"]) == (copy.data_ptr(), K)
    bound(*step(100), input_ids=tokens[:100])
    assert gpu.last["w_map"] != 0
    assert gpu.maps[0].address == copy.data_ptr()
    bound(*step(2000), input_ids=tokens)
    assert gpu.products[0][1] is copy
    bound.W_gate.add_(1)
    with pytest.raises(ValueError, match=r"W_gate: .*modified in place.*make a new Router"):
        bound(*step(4), input_ids=tokens[:4])


def test_rows_of_a_wider_matrix_are_stepped_over(gpu, artifacts):
    W = torch.zeros(E, K + 64, dtype=torch.bfloat16)[:, :K].t()
    options = {"tid2eid": hash_table(), "artifacts": artifacts}
    bound = Router(W, top_k=TOP_K, routed_scaling_factor=1.0, **options)
    bound(*step(4), input_ids=torch.zeros(4, dtype=torch.int32))
    assert (gpu.last["w_gate"], gpu.last["w_stride"]) == (W.data_ptr(), K + 64)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"tid2eid": hash_table()}, "tid2eid would have to be read and copied"),
        (
            dict(zip(("to_physical", "logical_count"), physical(), strict=True)),
            "to_physical and logical_count would have to be read",
        ),
    ],
)
def test_tables_are_not_read_under_capture(gpu, make, options, message):
    make()
    make(tid2eid=hash_table())
    gpu.capture = 5
    with pytest.raises(RouterError, match=f"being captured and {message}"):
        make(**options)


def test_a_captured_hash_layer_needs_no_scratch_of_its_own(gpu, make):
    bound = make(tid2eid=hash_table())
    tokens = torch.zeros(4, dtype=torch.int32)
    for gpu.capture in (0, 1, 0):
        bound(*step(4), input_ids=tokens)
    assert len(gpu.launches) == 3


@pytest.fixture
def dispatch(gpu, artifacts, monkeypatch):
    monkeypatch.setattr(router, "open_artifacts", lambda: artifacts)
    return router.dense_router_dispatch


def test_dispatch_prepares_a_layer_once(gpu, dispatch):
    W, bias = weights(), torch.zeros(E)
    for _ in range(3):
        x, w, ids = step(4)
        dispatch(x, W, bias, 2.5, TOP_K, w, ids)
    # A fresh view of the same weights is the same layer.
    dispatch(x, W.t().t(), bias, 2.5, TOP_K, w, ids)
    assert len(remembered_layers()) == 1
    assert len(gpu.launches) == 4
    assert len({item["w_map"] for item in gpu.launches}) == 1


def test_dispatch_tells_layers_apart(gpu, dispatch):
    W, bias = weights(), torch.zeros(E)
    x, w, ids = step(4)
    dispatch(x, W, bias, 2.5, TOP_K, w, ids)
    dispatch(x, weights(), bias, 2.5, TOP_K, w, ids)
    dispatch(x, W, torch.ones(E), 2.5, TOP_K, w, ids)
    dispatch(x, W, bias, 1.5, TOP_K, w, ids)
    dispatch(x, W, bias, 2.5, TOP_K - 1, w, ids)
    assert len(remembered_layers()) == 5


@pytest.mark.parametrize("top_k", [float(TOP_K), True])
def test_a_remembered_layer_does_not_excuse_a_wrong_argument(gpu, dispatch, top_k):
    W, bias = weights(), torch.zeros(E)
    x, w, ids = step(4)
    dispatch(x, W, bias, 2.5, int(top_k), w, ids)
    with pytest.raises(TypeError, match="top_k: expected an int"):
        dispatch(x, W, bias, 2.5, top_k, w, ids)
    with pytest.raises(TypeError, match="W_gate: expected dtype"):
        dispatch(x, W.view(torch.float16), bias, 2.5, int(top_k), w, ids)
    with pytest.raises(TypeError, match=r"W_gate: expected a torch\.Tensor"):
        dispatch(x, None, bias, 2.5, int(top_k), w, ids)
    assert len(gpu.launches) == 1


def test_dispatch_copies_again_what_was_modified_to_where_graphs_read_it(gpu, dispatch):
    W, bias = weights("emajor", e=132), torch.zeros(132)
    x, w, ids = step(4)
    dispatch(x, W, bias, 2.5, TOP_K, w, ids)
    [(bound, _)] = remembered_layers()
    at = bound.w_copy.data_ptr()
    W.add_(1)
    gpu.capture = 5
    with pytest.raises(RouterError, match="being captured and W_gate would have to be copied"):
        dispatch(x, W, bias, 2.5, TOP_K, w, ids)
    gpu.capture = 0
    for _ in range(2):
        dispatch(x, W, bias, 2.5, TOP_K, w, ids)
    [(again, kept)] = remembered_layers()
    assert again is bound
    assert kept is W
    assert bound.w_copy.data_ptr() == at
    assert torch.equal(bound.w_copy, W)
    assert len({item["w_map"] for item in gpu.launches}) == 1


def test_dispatch_keeps_no_weights_alive_that_it_reads_in_place(gpu, dispatch):
    x, w, ids = step(4)
    dispatch(x, weights(), torch.zeros(E), 2.5, TOP_K, w, ids)
    [(_, kept)] = remembered_layers()
    assert kept is None


def test_dispatch_forgets_the_oldest_layer(gpu, dispatch, monkeypatch):
    monkeypatch.setattr(router, "MAX_REMEMBERED_LAYERS", 2)
    x, w, ids = step(4)
    layers = [(weights(), torch.zeros(E)) for _ in range(3)]
    for W, bias in layers:
        dispatch(x, W, bias, 2.5, TOP_K, w, ids)
    assert len(remembered_layers()) == 2


def test_threads_on_one_router_do_not_mix_their_arguments(gpu, make):
    bound = make()
    cases = [step(n) for n in range(1, 9)]
    # Threads change places within a call, not only every 5 ms.
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)

    def work(case):
        for _ in range(200):
            bound(*case)

    threads = [threading.Thread(target=work, args=(case,)) for case in cases]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    sys.setswitchinterval(interval)
    expected = {(c[0].shape[0], c[1].data_ptr(), c[2].data_ptr()) for c in cases}
    got = {(i["num_tokens"], i["out_weights"], i["out_ids"]) for i in gpu.launches}
    assert got == expected
    assert len(gpu.launches) == 1600


def test_maps_are_encoded_for_what_the_driver_accepts(gpu, make):
    """The recipes' own rules hold for a single expert, whose row stride torch leaves arbitrary."""
    W = torch.zeros(K, 8, dtype=torch.bfloat16)[:, :1]
    recipe = sample_manifest().kernels[0].parameters[0].tensor_map
    sizes, strides = {"K": K, "E": 1}, {"K": 8, "E": 1}
    assert encode_arguments(recipe, address=W.data_ptr(), sizes=sizes, strides=strides).dims == (
        1,
        K,
    )


def test_the_artifacts_built_here_can_be_bound():
    """The real manifest against this runtime: whole, unaltered, and nothing unknown to fill in."""
    try:
        artifacts = open_artifacts()
    except RouterError as error:
        pytest.skip(str(error))
    for kernel in artifacts.manifest.kernels:
        artifacts.read(kernel)
        steps.check_parameter_names(artifacts, kernel)
    for arch in {kernel.arch for kernel in artifacts.manifest.kernels}:
        for layout, hashed in ((layout, hashed) for layout in LAYOUTS for hashed in (False, True)):
            layer = LayerProblem(
                layout=layout,
                tma_loadable=True,
                hashed=hashed,
                num_experts=384,
                top_k=6,
                k=7168,
                dtypes=DTYPES,
            )
            ends = [step.max_tokens for step in plan_layer(artifacts.manifest, layer, arch).steps]
            assert ends == [*([56] if hashed else [8, 32]), 64, 128, 320, 640, None]


class Step(torch.nn.Module):
    """What a compiled model does around a router: something before it and something after."""

    def __init__(self, router):
        super().__init__()
        self.router = router

    def forward(self, x, out, ids):
        self.router(x * 1, out, ids)
        return out + 1


@pytest.fixture
def compiled():
    """torch.compile without a code generator; what it remembers is forgotten afterwards."""
    torch._dynamo.reset()
    yield lambda model, **more: torch.compile(model, backend="eager", **more)
    torch._dynamo.reset()


@pytest.mark.slow
def test_a_compiled_model_launches_at_every_call(gpu, make, compiled):
    model = compiled(Step(make()))
    for calls, num_tokens in enumerate((4, 4, 5, 40, 100, 2000, 4), start=1):
        x, out, ids = step(num_tokens)
        model(x, out, ids)
        assert len(gpu.launches) == calls
        assert gpu.last["out_weights"] == out.data_ptr()


@pytest.mark.slow
def test_a_compiled_model_may_leave_the_router_out(gpu, make, compiled):
    model = compiled(Step(torch.compiler.disable(make())))
    for calls in (1, 2, 3):
        model(*step(4))
        assert len(gpu.launches) == calls


@pytest.mark.slow
def test_a_whole_graph_with_a_router_in_it_is_refused(gpu, make, compiled):
    """No graph that leaves the launch out, which would be silent."""
    with pytest.raises(torch._dynamo.exc.Unsupported):
        compiled(Step(make()), fullgraph=True)(*step(4))
    with pytest.raises(
        TypeError, match=r"hidden_states: expected a tensor with memory .*torch\.exp"
    ):
        torch.export.export(Step(make()), step(4), strict=False)
    assert gpu.launches == []


@pytest.mark.parametrize("num_tokens", [8, 100, 2000])
def test_a_call_within_a_call_of_the_same_thread_is_refused(gpu, make, monkeypatch, num_tokens):
    """As a finalizer or a signal handler makes it: to wait for the lock would never end."""
    bound, case = make(), step(num_tokens)
    refused = []
    launch = LaunchSite.launch

    def interrupted(site):
        with pytest.raises(RouterError, match="within another call") as caught:
            bound(*step(4))
        refused.append(caught.value)
        launch(site)

    monkeypatch.setattr(LaunchSite, "launch", interrupted)
    with ends_within(20):
        bound(*case)
    assert (len(refused), len(gpu.launches)) == (1, 1)
    monkeypatch.setattr(LaunchSite, "launch", launch)
    bound(*case)
    assert len(gpu.launches) == 2


def test_a_dispatch_within_a_dispatch_that_binds_is_refused(gpu, artifacts, monkeypatch):
    monkeypatch.setattr(router, "open_artifacts", lambda: artifacts)
    W, bias, case = torch.zeros(K, E, dtype=torch.bfloat16), torch.zeros(E), step(8)
    bind, refused = router.Binding, []

    def interrupted(*given, **more):
        with pytest.raises(RouterError, match="within another call") as caught:
            dense_router_dispatch(case[0], W, bias, 2.5, TOP_K, *case[1:])
        refused.append(caught.value)
        return bind(*given, **more)

    monkeypatch.setattr(router, "Binding", interrupted)
    with ends_within(20):
        for _ in range(2):
            dense_router_dispatch(case[0], W, bias, 2.5, TOP_K, *case[1:])
    assert (len(refused), len(gpu.launches)) == (1, 2)


def test_another_routers_product_within_a_product_is_refused(gpu, make, monkeypatch):
    """They share the logits of the stream."""
    outer, inner, case = make(), make(), step(2000)
    multiplied = binding.multiply

    def interrupted(*operands):
        multiplied(*operands)
        with pytest.raises(RouterError, match="within another call"):
            inner(*case)

    monkeypatch.setattr(binding, "multiply", interrupted)
    with ends_within(20):
        outer(*case)
    assert len(gpu.launches) == 1
