"""The layers that the operators of `torch_op` have bound, found by memory and numbers.

`refresh` and `forget` are part of `torch_op`.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable, Hashable
from typing import Any, Unpack, cast

import torch

from dsv4_router_runtime.call import RareKeywords, check_call, check_call_options
from dsv4_router_runtime.checks import check_bool
from dsv4_router_runtime.device import driver
from dsv4_router_runtime.layer import LayerOptions, check_layer, complete_options
from dsv4_router_runtime.reference import ReferenceOptions, select_reference
from dsv4_router_runtime.router import MAX_REMEMBERED_LAYERS, Router, version_of
from dsv4_router_runtime.tables import check_physical_map, copied_hash_table

# Layers that an nn.Parameter keeps: they differ in the biases, the tables or the numbers.
MAX_LAYERS_OF_A_WEIGHT = 16
# Subclasses may have a dispatch of their own.
_PLAIN_TYPES = (torch.Tensor, torch.nn.Parameter)


class CpuRouter:
    """`Router` on a CPU: the same checks of layer and call, computed by the reference."""

    weights_copied = False

    def __init__(
        self,
        W_gate: torch.Tensor,
        e_bias: torch.Tensor | None,
        *,
        top_k: int,
        routed_scaling_factor: float,
        share_captured_scratch: bool = False,
        same_bits: bool = False,
        **given: Any,
    ) -> None:
        check_bool("share_captured_scratch", share_captured_scratch)
        check_bool("same_bits", same_bits)
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
        self._tid2eid = options["tid2eid"]
        self._W_gate = W_gate
        self._bound = (e_bias, routed_scaling_factor, top_k)
        self._options = options
        self.refresh()

    def refresh(self) -> None:
        if self._tid2eid is not None:
            table = copied_hash_table(self._tid2eid, self._layer.num_experts)
            self._options["tid2eid"] = table

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


def bind_router(
    weight: torch.Tensor, e_bias: torch.Tensor | None, **bound: Any
) -> Router | CpuRouter:
    """Return a `Router` of weight [E, K] on a GPU; on a CPU, for tests, the reference."""
    # `.data` needs no gradient, and is no view of weight, which would keep it alive as its base.
    W_gate = weight.data.t() if weight.dim() == 2 else weight.data
    return (Router if weight.is_cuda else CpuRouter)(W_gate, e_bias, **bound)


class BoundLayer:
    """A bound layer, and the fields that `route` compares with a call.

    `router` holds the weight's memory, but not the tensor itself, so that an nn.Parameter can die
    and take its layer along. `versions` count the in-place changes of copied tensors; they are
    None if there are none.
    """

    def __init__(
        self,
        weight: torch.Tensor,
        e_bias: torch.Tensor | None,
        scale: float,
        top_k: int,
        options: LayerOptions,
    ) -> None:
        self.router = bind_router(
            weight, e_bias, top_k=top_k, routed_scaling_factor=scale, **options
        )
        self.tid2eid = options.get("tid2eid")
        copied = self.router.weights_copied or self.tid2eid is not None
        self.versions = _versions(weight, self.tid2eid) if copied else None
        self.kept_by_parameter = isinstance(weight, torch.nn.Parameter)
        self.weight = weakref.ref(weight, _forget_dead)
        self.address, self.shape = weight.data_ptr(), weight.shape
        self.e_bias = e_bias
        self.e_bias_address = 0 if e_bias is None else e_bias.data_ptr()
        self.scale, self.top_k = scale, top_k
        given = (e_bias, *options.values())
        self._others = [(t, t.data_ptr()) for t in given if isinstance(t, torch.Tensor)]

    def refresh(self, weight: torch.Tensor, tid2eid: torch.Tensor | None) -> None:
        """Take the copies again, from memory that these tensors have too."""
        versions = _versions(weight, tid2eid)
        self.router.refresh()
        self.versions = versions

    def has_moved(self) -> bool:
        """Return whether `.to()` or `.data = ...` moved a tensor, so that no call finds this."""
        weight = self.weight()
        moved = weight is not None and weight.data_ptr() != self.address
        return moved or any(tensor.data_ptr() != at for tensor, at in self._others)


# A layer's key -> the layer, the oldest first.
layers: dict[Hashable, BoundLayer] = {}
# id(weight) -> its last layer without options or copies, which `route` tries first.
plain_layers: dict[int, BoundLayer] = {}
_lock = threading.RLock()


def refresh(weight: torch.Tensor) -> None:
    """Take the copies of the layers bound to `weight` again; see `Router.refresh`.

    Captured graphs read them from the next replay on. Layers without copies need none of this.
    """
    if weight.is_cuda:
        driver.refuse_forked_child()
    address = weight.data_ptr()
    with _lock:
        for bound in list(layers.values()):
            # No call finds a layer that has moved.
            if bound.address == address and bound.versions is not None and not bound.has_moved():
                bound.refresh(weight, bound.tid2eid)


def forget(weight: torch.Tensor | None = None) -> None:
    """Drop the layers bound to `weight`, or all of them, with their copies of weights and tables.

    The next call binds the layer again. A CUDA graph keeps the copies of its capture: a replay
    routes by the old weights.
    """
    address = None if weight is None else weight.data_ptr()
    for table in (layers, plain_layers):
        _drop(table, lambda bound: address is None or bound.address == address)


def _forget_dead(weight: weakref.ref[torch.Tensor]) -> None:
    """Drop the plain layer of a tensor that died, and with an nn.Parameter its layers."""
    _drop(plain_layers, lambda bound: bound.weight is weight)
    _drop(layers, lambda bound: bound.weight is weight and bound.kept_by_parameter)


def _drop(table: dict[Any, BoundLayer], unwanted: Callable[[BoundLayer], bool]) -> None:
    """Drop layers. This takes no lock, since the garbage collector may call it anywhere."""
    # A copy: to list the items allocates, so a collection may begin there, and may drop layers.
    for key, bound in table.copy().items():
        if unwanted(bound):
            table.pop(key, None)


def find(
    weight: torch.Tensor,
    e_bias: torch.Tensor | None,
    scale: float,
    top_k: int,
    options: LayerOptions,
) -> BoundLayer:
    """Return the layer, bound now if it is not bound or its copies are out of date.

    The dispatcher passes options in the schema's order, and leaves out those that are off.
    """
    key = _layer_key(weight, e_bias, scale, top_k, options)
    tid2eid = options.get("tid2eid")
    bound = layers.get(key)
    if bound is not None and _fresh(bound, weight, tid2eid):
        return bound
    if weight.is_cuda:
        driver.refuse_forked_child()
    with _lock:
        bound = layers.get(key)
        if bound is not None:
            if not _fresh(bound, weight, tid2eid):
                bound.refresh(weight, tid2eid)
            return bound
        bound = BoundLayer(weight, e_bias, scale, top_k, options)
        for table in (layers, plain_layers):
            _drop(table, lambda old: old.weight() is weight and old.has_moved())
        layers[key] = bound
        plain = type(weight) in _PLAIN_TYPES and type(e_bias) in _PLAIN_TYPES
        if plain and bound.versions is None and not options:
            plain_layers[id(weight)] = bound
        known = layers.copy()
        loose = [key for key, bound in known.items() if not bound.kept_by_parameter]
        # Tensors that were replaced by others, not moved, leave such layers behind.
        same = [
            key for key, each in known.items() if each.kept_by_parameter and each.weight() is weight
        ]
        for key in (*loose[:-MAX_REMEMBERED_LAYERS], *same[:-MAX_LAYERS_OF_A_WEIGHT]):
            layers.pop(key, None)
        return bound


def _layer_key(
    weight: torch.Tensor,
    e_bias: torch.Tensor | None,
    scale: float,
    top_k: int,
    options: LayerOptions,
) -> Hashable:
    """Return the key of a layer: the form and memory of each tensor, and the numbers."""
    of_options = [(name, _form(value)) for name, value in options.items()]
    return (_form(weight), _form(e_bias), scale, top_k, *of_options)


def _form(value: Any) -> Hashable:
    if isinstance(value, torch.Tensor):
        return value.data_ptr(), value.shape, value.stride(), value.dtype
    return value


def _fresh(bound: BoundLayer, weight: torch.Tensor, tid2eid: torch.Tensor | None) -> bool:
    return bound.versions is None or bound.versions == _versions(weight, tid2eid)


def _versions(weight: torch.Tensor, tid2eid: torch.Tensor | None) -> tuple[int | None, ...]:
    return version_of(weight), None if tid2eid is None else version_of(tid2eid)


def find_plain(
    weight: torch.Tensor, e_bias: torch.Tensor | None, scale: float, top_k: int
) -> BoundLayer | None:
    """Return the layer if it is the last plain one of `weight`; its key would cost 1 us more."""
    bound = plain_layers.get(id(weight))
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
        return None
    return bound
