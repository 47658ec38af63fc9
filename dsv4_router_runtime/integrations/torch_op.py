"""The router as operators of torch, for torch.compile, torch.export and profilers.

    from dsv4_router_runtime.integrations import torch_op

    torch_op.route(hidden_states, weight, e_bias, 2.5, 6, out_weights, out_ids)
    torch_op.route_options(..., out_weights, out_ids, bias_vl=bias_vl, image_mask=image_mask)
    weights, ids = torch_op.route_functional(hidden_states, weight, e_bias, 2.5, 6)

Importing this module registers `torch.ops.dsv4_router`. Arguments, checks and errors are those of
`Router` and its calls, with one difference: weight [E, K] has a checkpoint's layout, and is bound
as W_gate = weight.t(). The last two operators take the options of `Router` and of its calls as
keywords. `route` takes none, since each argument of an operator costs host time.
`route_functional` allocates its outputs: weights of `weights_dtype` (FP32 if None) and ids of
`ids_dtype` (int32 if None). It has no out_logical_ids and no out_logits: use `route_options`.

The first call with a layer binds it: a `Router` on a GPU, on a CPU the reference in FP64. It
must not happen under stream capture (see `Router`). A layer is found by the memory of its tensors
and by its numbers. If the weight is an nn.Parameter, its last 16 layers are kept for as long as it
lives. Of layers with other weights the last 512 are kept, and their memory with them.

A layer with copies (see `Router`) is bound again after its weight or tid2eid was modified in place.
torch does not count a change through `.data` or to an inference tensor: call `forget(weight)` after
it. A CUDA graph reads the copies of its capture: capture it again.

The operators have no gradient: a call that would need one is a RuntimeError.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable, Hashable
from typing import Any, Unpack, cast

import torch

from dsv4_router_runtime.call import RareKeywords, check_call, check_call_options
from dsv4_router_runtime.device import driver
from dsv4_router_runtime.layer import LayerOptions, check_layer, complete_options
from dsv4_router_runtime.reference import ReferenceOptions, select_reference
from dsv4_router_runtime.router import MAX_REMEMBERED_LAYERS, Router, version_of
from dsv4_router_runtime.tables import check_physical_map, copied_hash_table

_LAYER = (
    "Tensor hidden_states, Tensor weight, Tensor? e_bias, float routed_scaling_factor, int top_k"
)
_OUTPUTS = "Tensor(a!) out_weights, Tensor(b!) out_ids"
_OPTIONS = (
    "Tensor? bias_vl=None, float gate_temp=1.0, Tensor? tid2eid=None, Tensor? to_physical=None, "
    "Tensor? logical_count=None, int num_shared_slots=0, float shared_weight=1.0, "
    "bool norm_topk_prob=True, int first_image_id=0, int num_image_ids=0, "
    "Tensor? image_mask=None, Tensor? padding_mask=None, Tensor? num_tokens=None, "
    "Tensor? input_ids=None, Tensor? forced_ids=None, Tensor? forced_mask=None, bool pdl=False"
)
_OPTIONAL_OUTPUTS = "Tensor(c!)? out_logical_ids=None, Tensor(d!)? out_logits=None"
_DTYPES = "ScalarType? weights_dtype=None, ScalarType? ids_dtype=None"
_CALL_OPTIONS = (
    *("image_mask", "padding_mask", "num_tokens", "input_ids", "pdl"),
    *RareKeywords.__annotations__,
)
_NO_OPTIONS = LayerOptions()
# Layers that an nn.Parameter keeps: they differ in the biases, the tables or the numbers.
MAX_LAYERS_OF_A_WEIGHT = 16


class _CpuRouter:
    """`Router` on a CPU: the same checks of layer and call, computed by the reference."""

    weights_copied = False

    def __init__(
        self,
        W_gate: torch.Tensor,
        e_bias: torch.Tensor | None,
        *,
        top_k: int,
        routed_scaling_factor: float,
        **given: Any,
    ) -> None:
        options = complete_options(cast(LayerOptions, given))
        self._layer = check_layer(
            W_gate,
            e_bias,
            top_k=top_k,
            routed_scaling_factor=routed_scaling_factor,
            options=options,
        )
        to_physical, logical_count = options["to_physical"], options["logical_count"]
        if to_physical is not None and logical_count is not None:
            check_physical_map(to_physical, logical_count)
        if options["tid2eid"] is not None:
            options["tid2eid"] = copied_hash_table(options["tid2eid"], self._layer.num_experts)
        self._W_gate = W_gate
        self._bound = (e_bias, routed_scaling_factor, top_k)
        self._options = options

    def __call__(
        self,
        hidden_states: torch.Tensor,
        out_weights: torch.Tensor,
        out_ids: torch.Tensor,
        *,
        image_mask: torch.Tensor | None = None,
        padding_mask: torch.Tensor | None = None,
        num_tokens: torch.Tensor | None = None,
        input_ids: torch.Tensor | None = None,
        pdl: bool = False,
        **rare: Unpack[RareKeywords],
    ) -> None:
        call = check_call(self._layer, hidden_states, out_weights, out_ids)
        check_call_options(self._layer, call, image_mask, padding_mask, num_tokens, input_ids, rare)
        logits = hidden_states.double() @ self._W_gate.double()
        options = ReferenceOptions(
            **self._options,
            image_mask=image_mask,
            padding_mask=padding_mask,
            num_tokens=num_tokens,
            input_ids=input_ids,
            forced_ids=rare.get("forced_ids"),
            forced_mask=rare.get("forced_mask"),
        )
        weights, ids = select_reference(logits, *self._bound, **options)
        # By way of FP32, as the kernels round.
        _write(out_weights, weights.float())
        _write(out_ids, ids)
        if (out_logical_ids := rare.get("out_logical_ids")) is not None:
            options["to_physical"] = options["logical_count"] = None
            _, ids = select_reference(logits, *self._bound, **options)
            _write(out_logical_ids, ids[:, : self._layer.top_k])
        if (out_logits := rare.get("out_logits")) is not None:
            _write(out_logits, logits)


def _write(out: torch.Tensor, rows: torch.Tensor) -> None:
    out[: rows.shape[0], : rows.shape[1]] = rows


class _Bound:
    """A bound layer, and what `route` compares a call with.

    `router` holds the weight's memory, but not the tensor itself, so that an nn.Parameter can die
    and take its layer along. `versions` count the in-place changes of what was copied; they are
    None if nothing was.
    """

    def __init__(
        self,
        weight: torch.Tensor,
        e_bias: torch.Tensor | None,
        scale: float,
        top_k: int,
        options: LayerOptions,
    ) -> None:
        # `.data` is no view of weight; a view would keep weight alive as its base.
        W_gate = weight.data.t() if weight.dim() == 2 else weight.data
        kind: type[Router] | type[_CpuRouter] = Router if weight.is_cuda else _CpuRouter
        self.router = kind(W_gate, e_bias, top_k=top_k, routed_scaling_factor=scale, **options)
        tid2eid = options.get("tid2eid")
        copied = self.router.weights_copied or tid2eid is not None
        self.versions = _versions(weight, tid2eid) if copied else None
        self.kept_by_parameter = isinstance(weight, torch.nn.Parameter)
        self.weight = weakref.ref(weight, _forget_dead)
        self.address, self.shape = weight.data_ptr(), weight.shape
        self.e_bias = e_bias
        self.e_bias_address = 0 if e_bias is None else e_bias.data_ptr()
        self.scale, self.top_k = scale, top_k
        given = (e_bias, *options.values())
        self._others = [(t, t.data_ptr()) for t in given if isinstance(t, torch.Tensor)]

    def has_moved(self) -> bool:
        """Return whether `.to()` or `.data = ...` moved a tensor, so that no call finds this."""
        weight = self.weight()
        moved = weight is not None and weight.data_ptr() != self.address
        return moved or any(tensor.data_ptr() != at for tensor, at in self._others)


# A layer's key -> the layer, the oldest first.
_layers: dict[Hashable, _Bound] = {}
# id(weight) -> its last layer without options or copies, which `route` looks at first.
_plain_layers: dict[int, _Bound] = {}
_lock = threading.Lock()


def forget(weight: torch.Tensor | None = None) -> None:
    """Drop the layers bound to `weight`, or all of them, with their copies of weights and tables.

    The next call binds the layer again. A CUDA graph keeps the copies of its capture: a replay
    routes by the old weights.
    """
    address = None if weight is None else weight.data_ptr()
    for table in (_layers, _plain_layers):
        _drop(table, lambda bound: address is None or bound.address == address)


def _forget_dead(weight: weakref.ref[torch.Tensor]) -> None:
    """Drop what only a tensor that died could find, and with an nn.Parameter its layers."""
    _drop(_plain_layers, lambda bound: bound.weight is weight)
    _drop(_layers, lambda bound: bound.weight is weight and bound.kept_by_parameter)


def _drop(table: dict[Any, _Bound], unwanted: Callable[[_Bound], bool]) -> None:
    """Drop layers. This takes no lock, since the garbage collector may call it anywhere."""
    for key, bound in list(table.items()):
        if unwanted(bound):
            table.pop(key, None)


def _find(
    weight: torch.Tensor,
    e_bias: torch.Tensor | None,
    scale: float,
    top_k: int,
    options: LayerOptions,
) -> _Bound:
    """Return the layer, bound now if it is not bound or its copies are out of date.

    The dispatcher passes options in the schema's order, and leaves out those that are off.
    """
    key = _layer_key(weight, e_bias, scale, top_k, options)
    tid2eid = options.get("tid2eid")
    bound = _layers.get(key)
    if bound is not None and _fresh(bound, weight, tid2eid):
        return bound
    if weight.is_cuda and driver.forked:
        driver.bindings()  # says so, before a lock that another thread held at the fork
    with _lock:
        bound = _layers.get(key)
        if bound is not None and _fresh(bound, weight, tid2eid):
            return bound
        bound = _Bound(weight, e_bias, scale, top_k, options)
        for table in (_layers, _plain_layers):
            _drop(table, lambda old: old.weight() is weight and old.has_moved())
        _layers[key] = bound
        if bound.versions is None and not options:
            _plain_layers[id(weight)] = bound
        loose = [key for key, bound in list(_layers.items()) if not bound.kept_by_parameter]
        # Tensors that were replaced by others, not moved, leave such layers behind.
        same = [
            key
            for key, each in list(_layers.items())
            if each.kept_by_parameter and each.weight() is weight
        ]
        for key in (*loose[:-MAX_REMEMBERED_LAYERS], *same[:-MAX_LAYERS_OF_A_WEIGHT]):
            _layers.pop(key, None)
        return bound


def _layer_key(
    weight: torch.Tensor,
    e_bias: torch.Tensor | None,
    scale: float,
    top_k: int,
    options: LayerOptions,
) -> Hashable:
    """Return what tells layers apart: the form and memory of each tensor, and the numbers."""
    of_options = [(name, _form(value)) for name, value in options.items()]
    return (_form(weight), _form(e_bias), scale, top_k, *of_options)


def _form(value: Any) -> Hashable:
    if isinstance(value, torch.Tensor):
        return value.data_ptr(), value.shape, value.stride(), value.dtype
    return value


def _fresh(bound: _Bound, weight: torch.Tensor, tid2eid: torch.Tensor | None) -> bool:
    return bound.versions is None or bound.versions == _versions(weight, tid2eid)


def _versions(weight: torch.Tensor, tid2eid: torch.Tensor | None) -> tuple[int | None, ...]:
    return version_of(weight), None if tid2eid is None else version_of(tid2eid)


def _route(
    hidden_states: torch.Tensor,
    weight: torch.Tensor,
    e_bias: torch.Tensor | None,
    scale: float,
    top_k: int,
    out_weights: torch.Tensor,
    out_ids: torch.Tensor,
) -> None:
    if torch.is_grad_enabled():
        _refuse_gradient(hidden_states, weight)
    bound = _plain_layers.get(id(weight))
    # A layer's key says the same, and costs 1 us more.
    if (
        bound is None
        or e_bias is None
        or bound.weight() is not weight
        or bound.e_bias is not e_bias
        or bound.address != weight.data_ptr()
        or bound.e_bias_address != e_bias.data_ptr()
        or bound.shape != weight.shape
        or bound.scale != scale
        or bound.top_k != top_k
    ):
        bound = _find(weight, e_bias, scale, top_k, _NO_OPTIONS)
    bound.router(hidden_states, out_weights, out_ids)


def _route_options(
    hidden_states: torch.Tensor,
    weight: torch.Tensor,
    e_bias: torch.Tensor | None,
    scale: float,
    top_k: int,
    out_weights: torch.Tensor,
    out_ids: torch.Tensor,
    **options: Any,
) -> None:
    if torch.is_grad_enabled():
        _refuse_gradient(hidden_states, weight)
    of_call = {name: options.pop(name) for name in _CALL_OPTIONS if name in options}
    bound = _find(weight, e_bias, scale, top_k, cast(LayerOptions, options))
    bound.router(hidden_states, out_weights, out_ids, **of_call)


def _route_functional(
    hidden_states: torch.Tensor,
    weight: torch.Tensor,
    e_bias: torch.Tensor | None,
    scale: float,
    top_k: int,
    **options: Any,
) -> tuple[torch.Tensor, torch.Tensor]:
    out = _fake_functional(hidden_states, weight, e_bias, scale, top_k, **options)
    for name in ("weights_dtype", "ids_dtype"):
        options.pop(name, None)
    run = _route_options if options else _route
    run(hidden_states, weight, e_bias, scale, top_k, *out, **options)
    return out


def _fake_route(hidden_states: torch.Tensor, weight: torch.Tensor, *_: Any, **__: Any) -> None:
    if torch.is_grad_enabled():
        _refuse_gradient(hidden_states, weight)


def _fake_functional(
    hidden_states: torch.Tensor,
    weight: torch.Tensor,
    e_bias: torch.Tensor | None,
    scale: float,
    top_k: int,
    *,
    num_shared_slots: int = 0,
    weights_dtype: torch.dtype | None = None,
    ids_dtype: torch.dtype | None = None,
    **_: Any,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Allocate the outputs of a call with any kind of tensors."""
    _fake_route(hidden_states, weight)
    shape = (hidden_states.shape[0], top_k + num_shared_slots)
    out_weights = hidden_states.new_empty(shape, dtype=weights_dtype or torch.float32)
    return out_weights, hidden_states.new_empty(shape, dtype=ids_dtype or torch.int32)


def _refuse_gradient(hidden_states: torch.Tensor, weight: torch.Tensor) -> None:
    for name, tensor in (("hidden_states", hidden_states), ("weight", weight)):
        if tensor.requires_grad:
            raise RuntimeError(
                f"{name}: expected a tensor that needs no gradient, since this router has none "
                f"(got requires_grad=True); call it under torch.no_grad() or "
                f"torch.inference_mode(), or pass {name}.detach(); to train, use the model's own "
                "router"
            )


def _register() -> torch.library.Library:
    """Define the operators; they are gone when the returned library is."""
    library = torch.library.Library("dsv4_router", "DEF")
    for name, signature, run, fake in (
        ("route", f"({_LAYER}, {_OUTPUTS}) -> ()", _route, _fake_route),
        (
            "route.options",
            f"({_LAYER}, {_OUTPUTS}, *, {_OPTIONS}, {_OPTIONAL_OUTPUTS}) -> ()",
            _route_options,
            _fake_route,
        ),
        (
            "route_functional",
            f"({_LAYER}, *, {_OPTIONS}, {_DTYPES}) -> (Tensor, Tensor)",
            _route_functional,
            _fake_functional,
        ),
    ):
        library.define(name + signature, tags=torch.Tag.pt2_compliant_tag)
        library.impl(name, run, "CUDA")
        library.impl(name, run, "CPU")
        torch.library.register_fake(f"dsv4_router::{name}", fake, lib=library)
    return library


_library = _register()
route = torch.ops.dsv4_router.route.default
route_options = torch.ops.dsv4_router.route.options
route_functional = torch.ops.dsv4_router.route_functional.default
