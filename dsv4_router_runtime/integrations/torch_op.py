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
`route`, and `route_functional` without options, call a bound layer's Router instead of the operator
of their name if nothing that runs would miss it.

The first call with a layer binds it: a `Router` on a GPU, on a CPU the reference in FP64. It
must not happen under stream capture (see `Router`). A layer is found by the memory of its tensors
and by its numbers. If the weight is an nn.Parameter, its last 16 layers are kept for as long as it
lives. Of layers with other weights the last 512 are kept, and their memory with them.

A layer with copies (see `Router`) takes them again, where CUDA graphs read them, in the first call
after its weight or tid2eid was modified in place. `refresh(weight)` does it without a call: before
a replay, or after a change that torch does not count (by `.data`, or to an inference tensor).

The operators have no gradient: a call that would need one is a RuntimeError.
"""

from __future__ import annotations

from typing import Any, cast

import torch
from torch._C import _get_tracing_state as _jit_trace
from torch._C import _len_torch_dispatch_stack as _num_dispatch_modes
from torch._C import _len_torch_function_stack as _num_function_modes
from torch._C._functorch import maybe_current_level as _transform_level
from torch.autograd import _profiler_enabled

from dsv4_router_runtime.call import RareKeywords
from dsv4_router_runtime.layer import LayerOptions

from .bound_layers import BoundLayer, find, find_plain, forget, refresh

__all__ = ["forget", "refresh", "route", "route_functional", "route_options"]

_LAYER = (
    "Tensor hidden_states, Tensor weight, Tensor? e_bias, float routed_scaling_factor, int top_k"
)
_OUTPUTS = "Tensor(a!) out_weights, Tensor(b!) out_ids"
_OPTIONS = (
    "Tensor? bias_vl=None, float gate_temp=1.0, Tensor? tid2eid=None, Tensor? to_physical=None, "
    "Tensor? logical_count=None, int num_shared_slots=0, float shared_weight=1.0, "
    "bool norm_topk_prob=True, int first_image_id=0, int num_image_ids=0, bool same_bits=False, "
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
# A name of torch's takes 0.03 us to look up.
_TENSOR = torch.Tensor
_dynamo_traces = torch.compiler.is_dynamo_compiling


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
    bound = find_plain(weight, e_bias, scale, top_k)
    if bound is None:
        bound = find(weight, e_bias, scale, top_k, _NO_OPTIONS)
    bound.router(hidden_states, out_weights, out_ids)


def route(
    hidden_states: torch.Tensor,
    weight: torch.Tensor,
    e_bias: torch.Tensor | None,
    routed_scaling_factor: float,
    top_k: int,
    out_weights: torch.Tensor,
    out_ids: torch.Tensor,
) -> None:
    """Route into out_weights and out_ids, as `torch.ops.dsv4_router.route` does."""
    bound = _without_dispatcher(hidden_states, weight, e_bias, routed_scaling_factor, top_k)
    if bound is None or type(out_weights) is not _TENSOR or type(out_ids) is not _TENSOR:
        _route_operator(
            hidden_states, weight, e_bias, routed_scaling_factor, top_k, out_weights, out_ids
        )
    else:
        bound.router(hidden_states, out_weights, out_ids)


def route_functional(
    hidden_states: torch.Tensor,
    weight: torch.Tensor,
    e_bias: torch.Tensor | None,
    routed_scaling_factor: float,
    top_k: int,
    *,
    weights_dtype: torch.dtype | None = None,
    ids_dtype: torch.dtype | None = None,
    **options: Any,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return weights and ids, as `torch.ops.dsv4_router.route_functional` does."""
    given = (hidden_states, weight, e_bias, routed_scaling_factor, top_k)
    bound = None if options else _without_dispatcher(*given)
    if bound is None:
        dtypes = {"weights_dtype": weights_dtype, "ids_dtype": ids_dtype}
        return _functional_operator(*given, **dtypes, **options)
    out = _fake_functional(*given, weights_dtype=weights_dtype, ids_dtype=ids_dtype)
    bound.router(hidden_states, *out)
    return out


def _without_dispatcher(
    hidden_states: torch.Tensor,
    weight: torch.Tensor,
    e_bias: torch.Tensor | None,
    scale: float,
    top_k: int,
) -> BoundLayer | None:
    """Return a plain layer that is bound, unless something would miss its operator.

    Those are tracers, modes, transforms, profilers and subclasses. The dispatcher costs more time
    than all checks of a call.
    """
    if (
        # Dynamo takes this for True, and traces the operator alone.
        _dynamo_traces()
        or _num_dispatch_modes()
        or _num_function_modes()
        or _transform_level()
        or _jit_trace()
        or _profiler_enabled()
        or type(hidden_states) is not _TENSOR
        or type(scale) is not float
        or type(top_k) is not int
    ):
        return None
    bound = find_plain(weight, e_bias, scale, top_k)
    if bound is not None and torch.is_grad_enabled():
        _refuse_gradient(hidden_states, weight)
    return bound


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
    bound = find(weight, e_bias, scale, top_k, cast(LayerOptions, options))
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
_route_operator = torch.ops.dsv4_router.route.default
route_options = torch.ops.dsv4_router.route.options
_functional_operator = torch.ops.dsv4_router.route_functional.default
