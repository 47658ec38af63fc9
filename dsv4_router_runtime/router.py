"""The router of a DeepSeek-V4 Mixture-of-Experts layer: hidden states to expert weights and ids."""

from __future__ import annotations

import os
import threading
from collections import OrderedDict
from typing import Any, Unpack

import torch

from .artifacts.folder import ArtifactSet, open_artifacts
from .binding import Binding, require_gpu
from .call import RareKeywords, check_call, check_call_options, plainly_right
from .checks import check_bool
from .device import driver
from .device.arguments import NO_OPTIONS
from .device.capture import CALL_OUTSIDE, refuse_under_capture
from .device.memory import wait_for_device
from .layer import OPTIONS_OFF, LayerOptions, check_layer, complete_options, options_on
from .locks import refuse_within

# The tensors of a layer that every call reads where they lie, and the one that is copied.
_READ_IN_PLACE = ("W_gate", "e_bias", "bias_vl", "to_physical", "logical_count")
_BOUND = (*_READ_IN_PLACE, "tid2eid")
# dense_router_dispatch remembers this many layers: a few models of 61.
MAX_REMEMBERED_LAYERS = 512


class Router:
    """The gate of one layer, bound to its weights once and called every step.

        router = Router(W_gate, e_bias, top_k=6, routed_scaling_factor=2.5)
        router(hidden_states, out_weights, out_ids)

    W_gate [K, E] BF16, with unit stride along K or along E; e_bias [E] FP32; K a multiple of 64, E
    up to 512, top_k 1..8 and at most E. Both tensors are kept, and are read where they lie:
    changing them in place changes later calls. If a bound tensor has moved (`.data` was set), a
    call is refused; the memory that it had is kept. See `reset` for weights that are swapped, and
    `refresh` for weights that are loaded anew in place.

    Two cases with unit stride along E are bound as a K-contiguous copy: rows that are no multiple
    of 16 bytes (E = 132, say), which TMA cannot read, and W_gate of a hash layer. Then
    `weights_copied` is True, and a call after W_gate was modified in place is refused. (A change
    that torch does not count, through `.data` or to an inference tensor, is not seen.)

    Options, of which none is compile-time: every one is a number, or a pointer that is null when
    the option is off, passed to the same kernels. Only a hash layer has a kernel of its own.

    bias_vl [E] FP32: a second bias, for image rows; like e_bias, in place. Image rows are those of
        a call's image_mask and those that num_image_ids tells. A hash layer's call that may have
        any, or that has out_logits, takes the kernels of the whole gate, at any N.
    num_image_ids, first_image_id: a row is an image row too if its token id is one of
        first_image_id, first_image_id + 1, ..., num_image_ids of them, all within int32. Needs
        bias_vl. Every call then has input_ids, in any layer. 0 turns it off.
    gate_temp: logits are divided by it.
    norm_topk_prob: False leaves weights at score * scale.
    num_shared_slots: 0..8 columns after the top_k, for fused shared experts: ids E, E + 1, ... and
        weight shared_weight, which the scale does not reach. A physical map has to leave them free.
    shared_weight: 1.0 by default. An engine that scales the sum of all experts later passes
        1 / routed_scaling_factor.
    tid2eid [vocab, top_k] int32 or int64: makes this a hash layer, whose ids are the row of each
        token id in the table's order, and which has no e_bias. Each row holds distinct experts;
        checked and copied here, so that later changes to it are not seen before `refresh`.
    to_physical [E, max_replicas] and logical_count [E], both int32 or both int64: id e of row r is
        written as to_physical[e, r % logical_count[e]]. Checked here, and then read in place by
        every call, so that a server may rebalance in place: a count is held within 1..max_replicas,
        a physical id is written as it is found. Of an int64 the low 32 bits are read.

    pdl: launch as a programmatic dependent of the kernel before, unless a call says otherwise. The
    kernel then reads W_gate, e_bias, bias_vl, tid2eid, to_physical, logical_count and a call's
    input_ids while that one may still run, and those before it that it may overlap, so none of them
    may write any of these; the caller alone can tell, so it is off by default.
    hidden_states, the masks, num_tokens and forced_ids may be the work of the kernel before, and it
    may still use the outputs. On one H200 it takes 1.7 us or more off a decode call in a graph.

    share_captured_scratch: graphs of all layers with it share one slot of scratch per capture
        stream, as large as their largest call needs, until the last of them is gone. Promise then
        that no two of these graphs run at once, on any streams: torch asks the same of graphs that
        are captured into one memory pool. Two at once route wrongly, or trap.

    same_bits: a token's ids, weights and logits have the same bits at every N. Otherwise they have
        others from the N on that takes torch.mm, which is faster there. With it, such a call takes
        several launches of a fused kernel; NoKernelError if there is none, or none that fits.

    artifacts: a folder, or an ArtifactSet, instead of the installed one. `open_artifacts(trust=)`
        opens a set under a trust policy; DSV4_ROUTER_TRUST names one for every set.

    Keywords of a call:
    image_mask [N] bool: image rows, which select with bias_vl instead of e_bias or the table.
    padding_mask [N] bool, num_tokens (int32, one element): the mask's rows, and those from
        num_tokens on, are padding. They get id -1 and weight 0 in every column, and nothing
        that their hidden_states hold, NaN included, reaches an output.
    input_ids [N] int32 or int64: the token ids, in a hash layer or one with num_image_ids, and
        in no other. A row whose token id is outside the table is treated like padding; the
        table is not used for an image row.
    forced_ids [N, top_k] int32 or int64, rows strided or not: the experts of the rows of
        forced_mask ([N] bool), or of all rows without one, in this order. Only their weights
        are computed. Token id, biases and image_mask of such a row are not used; a physical map
        applies. A row with an id outside 0..E - 1, or with one twice, is treated like padding.
    out_logical_ids int32, at least [N, top_k]: gets the ids before a physical map, and -1 in
        rows that are treated like padding.
    out_logits FP32, at least [N, E]: gets hidden_states @ W_gate, before gate_temp, of every
        row, padding too. If the call takes a matrix product, it is that product's own output. A
        hash layer has it only if it has bias_vl.

    torch.compile: a call breaks the graph. fullgraph=True and torch.export refuse it; they trace
    the operators of `integrations.torch_op`. `torch.compiler.disable(router)` keeps Dynamo out.

    copy.copy gives the same layer once more. deepcopy and pickle are a TypeError, since a Router is
    bound to memory: leave it out of copies and pickles (in the module's `__deepcopy__` or
    `__getstate__`), and bind a new one from the copy's tensors.

    A CUDA graph that holds a call keeps the layer's tensors and the scratch of the call alive
    until the graph is gone: a Router may be dropped before.

    Making a Router loads kernels; it must not happen under stream capture, unless a Router with the
    same kernels was made before, W_gate needs no copy, and it has neither tid2eid nor to_physical.
    Threads may share a Router. Scratch belongs to the stream or the capture that a call is made on:
    see `workspace`.

    Raises TypeError and ValueError about arguments, NoKernelError where no artifact fits this GPU,
    ArtifactError, ManifestError, DriverError, DriverTooOldError and DriverMissingError.
    """

    def __init__(
        self,
        W_gate: torch.Tensor,
        e_bias: torch.Tensor | None = None,
        *,
        top_k: int,
        routed_scaling_factor: float,
        pdl: bool = False,
        share_captured_scratch: bool = False,
        same_bits: bool = False,
        artifacts: str | os.PathLike[str] | ArtifactSet | None = None,
        **given: Unpack[LayerOptions],
    ) -> None:
        options = complete_options(given)
        layer = check_layer(
            W_gate,
            e_bias,
            top_k=top_k,
            routed_scaling_factor=routed_scaling_factor,
            options=options,
        )
        if not (artifacts is None or isinstance(artifacts, str | os.PathLike | ArtifactSet)):
            raise TypeError(
                "artifacts: expected a folder (str or os.PathLike), an ArtifactSet or None "
                f"(got {type(artifacts).__name__})"
            )
        check_bool("pdl", pdl)
        check_bool("share_captured_scratch", share_captured_scratch)
        check_bool("same_bits", same_bits)
        require_gpu(layer.device)
        if not isinstance(artifacts, ArtifactSet):
            artifacts = open_artifacts(artifacts)
        self._layer = layer
        self._options = options
        self._options_on = options_on(options)
        self._binding = Binding(
            *(W_gate, e_bias, layer, options),
            artifacts=artifacts,
            share_captured_scratch=share_captured_scratch,
            same_bits=same_bits,
        )
        self._pdl = pdl
        self.W_gate = W_gate
        self.e_bias = e_bias
        self.bias_vl = options["bias_vl"]
        self.tid2eid = options["tid2eid"]
        self.to_physical = options["to_physical"]
        self.logical_count = options["logical_count"]
        # One list of all copies, which share the launch sites: `reset` of one changes it for each.
        self._bound_at: list[tuple[Any, int]] = []
        self._note_addresses()

    def _note_addresses(self) -> None:
        """Remember where the bound tensors lie, and keep that memory."""
        bound = [tensor for tensor in map(self.__dict__.get, _READ_IN_PLACE) if tensor is not None]
        table = [] if self.tid2eid is None else [self.tid2eid]
        # A view (weight.t()) stays with the old memory if `.data` of its base is set.
        bases, base_of_table = _bases(bound), _bases(table)
        # Aliases: `.data` takes the memory from the caller's tensor, not from these. First of all:
        # a call that is not refused after an interrupt has its tensors kept by its graph.
        self._binding.pin(*(tensor.detach() for tensor in bound))
        self._bases_at = tuple((base, base.data_ptr()) for base in (*bases, *base_of_table))
        # Bound methods: every call runs each of them, for 0.05 us.
        self._bound_at[:] = _where(*bound, *bases)
        # A call reads the copy; only `refresh` compares these.
        self._table_at = _where(*table, *base_of_table)
        self._note_version()

    def _note_version(self) -> None:
        self._version = version_of(self.W_gate) if self.weights_copied else None

    def reset(self) -> None:
        """Bind the layer's tensors anew, with their present addresses and contents.

        For weights that were swapped or moved (`.data`), and tables that changed. The tensors must
        be as they were in shape, strides, dtype and device. Private copies (`weights_copied`, a
        hash layer's table) are taken again at the addresses that they had, so that captured graphs
        read the new ones. A graph keeps the addresses of the other tensors: capture it again if one
        moved. Call it outside capture, with no call of this layer under way: it waits for the GPU.
        """
        refuse_under_capture("the layer's tensors would have to be read", CALL_OUTSIDE)
        if any(base.data_ptr() != address for base, address in self._bases_at):
            raise self._moved()
        self._check_layer_again()
        wait_for_device(self._layer.device.index)
        self._binding.bind(self.W_gate, self.e_bias, self._options)
        self._note_addresses()

    def refresh(self) -> None:
        """Take the private copies again, after W_gate or tid2eid was changed in place.

        Copies (`weights_copied`, a hash layer's table) keep their addresses, so captured graphs
        stay valid and read the new values from the next replay on. Without copies, every call and
        every graph reads the new values anyway, and this only checks the tensors. They must lie
        where they were bound, with the same shapes, dtypes and device: see `reset` for others. A
        refused refresh has changed no copy.

        Call it between replays, outside capture. The copy is made on the current stream, in whose
        order it reads the new values, and is complete on return: later work on any stream needs no
        order. Earlier work on other streams does: a replay of this layer that still runs there may
        read half of the old copy and half of the new one.
        """
        refuse_under_capture("the layer's tensors would have to be read", CALL_OUTSIDE)
        if any(ask() != address for ask, address in (*self._bound_at, *self._table_at)):
            raise self._moved()
        self._check_layer_again()
        self._binding.copy(self.W_gate, self._options)
        self._note_version()

    def _check_layer_again(self) -> None:
        """Raise ValueError unless the bound tensors still make the layer that was bound."""
        layer = check_layer(
            self.W_gate,
            self.e_bias,
            top_k=self._layer.top_k,
            routed_scaling_factor=self._layer.scale,
            options=self._options,
        )
        if layer != self._layer:
            raise ValueError(
                f"W_gate: expected a layer as it was bound, {self._layer} (got {layer}); make a "
                "new Router"
            )

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
        pdl: bool | None = None,
        **rare: Unpack[RareKeywords],
    ) -> None:
        """Route hidden_states [N, K] BF16 on the current stream; nothing is returned or awaited.

        Writes out_weights (FP32, or BF16 rounded from it to nearest even) and out_ids (int32 or
        int64) in [0:N, 0:top_k + num_shared_slots] and nowhere else; both may be larger. N = 0
        returns at once. Up to 640 tokens of 384 experts (960 of 256) take one launch, more take
        cuBLAS and one (see same_bits); `explain` prints the steps of a layer. A refused call has
        launched nothing and touched no output.

        The class describes the keywords. pdl: for this call, instead of the Router's.

        All tensors lie on the device and the host never reads them, so that a captured graph may be
        replayed with other contents. Outputs lie apart from each other and from the inputs.
        """
        layer = self._layer
        for address_of, address in self._bound_at:
            if address_of() != address:
                raise self._moved()
        # check_call begins with the same; a call of it costs 0.1 us.
        call = plainly_right(layer, hidden_states, out_weights, out_ids) or check_call(
            layer, hidden_states, out_weights, out_ids
        )
        if (
            image_mask is None
            and padding_mask is None
            and num_tokens is None
            and input_ids is None
            and not rare
            and not layer.needs_input_ids
        ):
            options, out_logits = NO_OPTIONS, None
        else:
            options = check_call_options(
                layer, call, image_mask, padding_mask, num_tokens, input_ids, rare
            )
            out_logits = rare.get("out_logits")
        if self._version is not None and version_of(self.W_gate) != self._version:
            raise ValueError(
                "W_gate: expected the weights as they were bound (got: modified in place since, "
                "and this layer is bound to a copy); call refresh(), or make a new Router"
            )
        if pdl is None:
            pdl = self._pdl
        elif pdl is not True and pdl is not False:
            raise TypeError(
                f"pdl: expected a bool, or None for the Router's (got {type(pdl).__name__})"
            )
        if call[0]:
            self._binding.run(call, options, hidden_states, self.W_gate, pdl, out_logits)

    def _moved(self) -> ValueError:
        """Return the error about the first bound tensor, or base of one, that has moved."""
        places = (*self._bound_at, *self._table_at)
        address_of, was = next((ask, at) for ask, at in places if ask() != at)
        moved = address_of.__self__
        bound = {name: tensor for name in _BOUND if (tensor := vars(self)[name]) is not None}
        name = next(name for name, each in bound.items() if each is moved or each._base is moved)
        of_base = "" if bound[name] is moved else " of the tensor that it is a view of"
        repair = "" if of_base else "call this Router's reset(), or "
        return ValueError(
            f"{name}: expected the memory{of_base} as it was bound, at {was:#x} (got "
            f"{moved.data_ptr():#x}: moved since, by `.data` or `Module.to`, say); {repair}make a "
            "new Router, and capture graphs of its calls again"
        )

    @property
    def weights_copied(self) -> bool:
        """Whether a private copy of W_gate is bound, which later changes to W_gate do not reach."""
        return self._binding.w_copy is not None

    @property
    def kernels(self) -> tuple[str, ...]:
        """The artifacts bound, by ascending number of tokens.

        Those that only a hash layer's calls with image rows or out_logits take come last.
        """
        return tuple(kernel.key for kernel in self._binding.kernels)

    def __copy__(self) -> Router:
        """Return a second Router of the same layer, which shares tensors and launch sites."""
        twin = object.__new__(type(self))
        vars(twin).update(vars(self))
        return twin

    def __deepcopy__(self, memo: dict[int, Any]) -> Router:
        raise TypeError(
            "a Router cannot be deep-copied: it is bound to the memory of its layer's tensors, "
            "which torch may copy apart from each other; copy the layer without it, and bind a new "
            "Router from the copy's tensors"
        )

    def __reduce_ex__(self, protocol: Any) -> str | tuple[Any, ...]:
        raise TypeError(
            "a Router cannot be pickled: it is bound to kernels and memory of this process's GPU; "
            "send the layer's tensors, and bind a new Router from them in that process"
        )

    def __repr__(self) -> str:
        layer = self._layer
        return (
            f"Router(K={layer.k}, num_experts={layer.num_experts}, top_k={layer.top_k}, "
            f"routed_scaling_factor={layer.scale}, layout={layer.layout}, device={layer.device}, "
            f"options=[{self._options_on}], pdl={self._pdl}, kernels={list(self.kernels)})"
        )


def _bases(tensors: list[torch.Tensor]) -> list[torch.Tensor]:
    return [tensor._base for tensor in tensors if tensor._base is not None]


def _where(*tensors: torch.Tensor) -> tuple[tuple[Any, int], ...]:
    """Return the method that tells each tensor's address, with the address now."""
    return tuple((tensor.data_ptr, tensor.data_ptr()) for tensor in tensors)


def dense_router_dispatch(
    hidden_states: torch.Tensor,
    W_gate: torch.Tensor,
    e_bias: torch.Tensor,
    routed_scaling_factor: float,
    top_k: int,
    out_weights: torch.Tensor,
    out_ids: torch.Tensor,
) -> None:
    """Route one batch with weights given anew each call; see `Router` for shapes, rules and errors.

    The binding of a layer's first call is remembered for the next one with the same weights: same
    memory, shape, strides, bias, top_k and scale. The tensors themselves are not kept alive, except
    if W_gate has to be copied (`Router.weights_copied`). The next call after it was modified in
    place copies it again, to the memory that captured graphs read, as `Router.refresh` does; that
    call cannot be captured. The last 512 layers are remembered: a graph of another keeps its copy.
    """
    if driver.forked:  # a function's call costs 0.04 us
        driver.refuse_forked_child()
    binding = _remembered_binding(W_gate, e_bias, routed_scaling_factor, top_k)
    call = check_call(binding.layer, hidden_states, out_weights, out_ids)
    if call[0]:
        binding.run(call, NO_OPTIONS, hidden_states, W_gate, False)


# Key -> the binding and, for one that copied W_gate, W_gate and its version: kept alive, so that
# its address cannot come to hold other weights.
_remembered: OrderedDict[Any, tuple[Binding, torch.Tensor | None, int | None]] = OrderedDict()
_remembered_lock = threading.RLock()


def _remembered_binding(
    W_gate: torch.Tensor, e_bias: torch.Tensor, routed_scaling_factor: float, top_k: int
) -> Binding:
    key = _layer_key(W_gate, e_bias, routed_scaling_factor, top_k)
    refuse_within(_remembered_lock)
    with _remembered_lock:
        binding, copied_from, version = _remembered.get(key, (None, None, None))
        if binding is not None:
            if copied_from is not None and (changed := version_of(W_gate)) != version:
                binding.copy(W_gate, OPTIONS_OFF)
                _remembered[key] = (binding, W_gate, changed)
            _remembered.move_to_end(key)
            return binding
        layer = check_layer(
            W_gate, e_bias, top_k=top_k, routed_scaling_factor=routed_scaling_factor
        )
        require_gpu(layer.device)
        binding = Binding(W_gate, e_bias, layer, artifacts=open_artifacts())
        copied_from = None if binding.w_copy is None else W_gate
        _remembered[key] = (binding, copied_from, version_of(W_gate))
        while len(_remembered) > MAX_REMEMBERED_LAYERS:
            _remembered.popitem(last=False)
        return binding


def _layer_key(W_gate: Any, e_bias: Any, routed_scaling_factor: Any, top_k: Any) -> Any:
    """Return the key of a layer. It has types: 6.0 or True must not pass for a checked 6."""
    tensors = [
        (tensor.data_ptr(), tensor.shape, tensor.stride(), tensor.dtype, tensor.device)
        if isinstance(tensor, torch.Tensor) and tensor.layout is torch.strided
        else type(tensor)
        for tensor in (W_gate, e_bias)
    ]
    scalars = [
        (type(value), value) if isinstance(value, int | float) else type(value)
        for value in (routed_scaling_factor, top_k)
    ]
    return (*tensors, *scalars)


def version_of(tensor: torch.Tensor) -> int | None:
    """Return torch's count of in-place changes; None for an inference tensor, which has none."""
    return None if tensor.is_inference() else tensor._version
