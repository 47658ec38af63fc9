"""The router of a layer as an nn.Module, with the names and layouts of DeepSeek-V4 checkpoints.

    config = GateConfig.of_layer(model.config, layer_index)
    gate = Gate(config, device="cuda")
    gate.load_state_dict(...)                                   # the layer's `...ffn.gate.*`
    weights, ids = gate(hidden_states, input_ids)

A hash layer needs input_ids. In a model that sees, `image_mask` marks the rows of images, or
num_image_ids tells them by input_ids.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from dsv4_router_runtime.integrations import torch_op

SCORING = "sqrtsoftplus"
# The name that a buffer has elsewhere -> its name here, in vLLM and in transformers.
OTHER_NAMES = {
    "bias": "e_score_correction_bias",  # DeepSeek's checkpoints
    "e_score_correction_bias_vl": "bias_vl",  # SGLang
}
# Fields of GateConfig that are options of the operator, with the value that is off.
_NUMBERS_OFF = {
    **{"gate_temp": 1.0, "num_shared_slots": 0, "shared_weight": 1.0, "norm_topk_prob": True},
    **{"first_image_id": 0, "num_image_ids": 0, "same_bits": False, "pdl": False},
}


@dataclass(frozen=True, kw_only=True)
class GateConfig:
    """The form of one layer's gate.

    hash_vocab_size: the rows of tid2eid, in a hash layer; None in any other layer.
    vision: the layer has bias_vl, for the rows of images.
    first_image_id, num_image_ids: token ids of image rows (see `Router`); used with vision only.
    gate_temp, num_shared_slots, shared_weight, same_bits and pdl are `Router`'s; weights_dtype is
    torch.float32 or torch.bfloat16, ids_dtype torch.int32 or torch.int64.
    """

    hidden_size: int
    num_experts: int
    top_k: int
    routed_scaling_factor: float
    norm_topk_prob: bool = True
    hash_vocab_size: int | None = None
    vision: bool = False
    gate_temp: float = 1.0
    num_shared_slots: int = 0
    shared_weight: float = 1.0
    first_image_id: int = 0
    num_image_ids: int = 0
    weights_dtype: torch.dtype = torch.float32
    ids_dtype: torch.dtype = torch.int32
    same_bits: bool = False
    pdl: bool = False

    @classmethod
    def of_layer(cls, config: Any, layer_index: int, **more: Any) -> GateConfig:
        """Read a layer of DeepSeek-V4, V4-Vision or V4.1 from its model's config.

        config: an object as transformers and the engines have it, or config.json as a dict.
        layer_index: draft layers (MTP, DSpark) follow the num_hidden_layers of the model itself.
        more: fields of GateConfig that no model's config has, such as num_shared_slots and
            num_image_ids.
        """
        text = _value(config, "text_config", config)
        scoring = _value(text, "scoring_func", SCORING)
        if scoring != SCORING:
            raise ValueError(
                f"scoring_func: expected {SCORING!r} (got {scoring!r}); no kernel computes another"
            )
        num_layers = _needed(text, "num_hidden_layers")
        num_drafts = _value(text, "n_mtp_layers", _value(text, "num_nextn_predict_layers", 0))
        if not 0 <= layer_index < num_layers + num_drafts:
            raise ValueError(
                f"layer_index: expected 0..{num_layers + num_drafts - 1}, {num_layers} layers and "
                f"{num_drafts} draft layers (got {layer_index})"
            )
        num_experts = _needed(text, "n_routed_experts")
        top_k = _needed(text, "num_experts_per_tok")
        if layer_index >= num_layers:
            # V4.1's draft layers have fewer experts; V4's have the model's.
            num_experts = _value(text, "dspark_n_routed_experts", 0) or num_experts
            top_k = _value(text, "dspark_num_experts_per_tok", 0) or top_k
        vision = _value(config, "vision_config", None)
        vision_layers = _value(text, "vision_n_layers", _value(vision, "num_hidden_layers", 0))
        hashed = _is_hashed(text, layer_index)
        return cls(
            hidden_size=_needed(text, "hidden_size"),
            num_experts=num_experts,
            top_k=top_k,
            routed_scaling_factor=_needed(text, "routed_scaling_factor"),
            norm_topk_prob=_value(text, "norm_topk_prob", True),
            hash_vocab_size=_needed(text, "vocab_size") if hashed else None,
            vision=vision_layers > 0,
            **more,
        )


def _is_hashed(config: Any, layer_index: int) -> bool:
    kinds = _value(config, "mlp_layer_types", None)
    if kinds is None:
        return layer_index < _value(config, "num_hash_layers", 0)
    return "hash_moe" in kinds[layer_index : layer_index + 1]


def _needed(config: Any, name: str) -> Any:
    value = _value(config, name, None)
    if value is None:
        raise ValueError(f"config: expected {name} (got a {type(config).__name__} without it)")
    return value


def _value(config: Any, name: str, default: Any) -> Any:
    """Return an entry of a dict or an attribute; `default` if there is none, or it is None."""
    value = config.get(name) if isinstance(config, Mapping) else getattr(config, name, None)
    return default if value is None else value


class Gate(nn.Module):
    """The gate of one layer: hidden states to weights and ids of its experts.

    weight [E, K] BF16, e_score_correction_bias [E] FP32, bias_vl [E] FP32 if the model sees, and
    tid2eid [vocab, top_k] in a hash layer. A hash layer has no e_score_correction_bias, except that
    of a model that sees, whose checkpoint has one: no row uses it. Checkpoints of DeepSeek and
    SGLang, which have other names for the biases, load as they are; state_dict() has these names.

    The first call binds the layer, and so does the first one after a move, or after a load with
    `assign=True`: make it before capturing a CUDA graph. Graphs read the tensors of any other load,
    from the next replay on: call load_state_dict between replays (see `Router.refresh`). Biases
    stay FP32 when the module is converted to another dtype. There is no gradient: see `torch_op`.
    """

    weight: torch.Tensor
    e_score_correction_bias: torch.Tensor | None
    bias_vl: torch.Tensor | None
    tid2eid: torch.Tensor | None

    def __init__(self, config: GateConfig, device: torch.device | str | None = None) -> None:
        super().__init__()
        self.config = config
        numbers = {name: getattr(config, name) for name in _NUMBERS_OFF}
        if not config.vision:
            numbers["num_image_ids"] = 0
        self._numbers_on = {n: value for n, value in numbers.items() if value != _NUMBERS_OFF[n]}
        shape = (config.num_experts, config.hidden_size)
        weight = torch.empty(shape, dtype=torch.bfloat16, device=device)
        self.weight = nn.Parameter(weight, requires_grad=False)
        hashed = config.hash_vocab_size is not None
        for name, needed in (
            ("e_score_correction_bias", config.vision or not hashed),
            ("bias_vl", config.vision),
        ):
            bias = torch.zeros(config.num_experts, device=device, dtype=torch.float32)
            self.register_buffer(name, bias if needed else None)
        table = None
        if config.hash_vocab_size is not None:
            table_shape = (config.hash_vocab_size, config.top_k)
            table = torch.zeros(table_shape, dtype=torch.int32, device=device)
        self.register_buffer("tid2eid", table)
        self.register_load_state_dict_pre_hook(_rename)
        self.register_load_state_dict_post_hook(_refresh_layer)

    def forward(
        self,
        hidden_states: torch.Tensor,
        input_ids: torch.Tensor | None = None,
        *,
        image_mask: torch.Tensor | None = None,
        padding_mask: torch.Tensor | None = None,
        num_tokens: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return weights and ids [N, top_k + num_shared_slots] of hidden_states [..., K] BF16.

        N is the product of the leading dimensions, which input_ids and the masks may have too.
        input_ids: used in a hash layer, and with num_image_ids in a layer with vision. It may be
        given to any other. See `Router` for the rest.
        """
        config = self.config
        hashed = self.tid2eid is not None
        has_image_ids = "num_image_ids" in self._numbers_on
        options: dict[str, Any] = {
            "bias_vl": self.bias_vl,
            "tid2eid": self.tid2eid,
            "image_mask": _flat(image_mask),
            "padding_mask": _flat(padding_mask),
            "num_tokens": num_tokens,
            "input_ids": _flat(input_ids) if hashed or has_image_ids else None,
        }
        # Without any, the call is cheaper.
        options = {name: value for name, value in options.items() if value is not None}
        return torch_op.route_functional(
            hidden_states.reshape(-1, config.hidden_size),
            self.weight,
            None if hashed else self.e_score_correction_bias,
            config.routed_scaling_factor,
            config.top_k,
            weights_dtype=config.weights_dtype,
            ids_dtype=config.ids_dtype,
            **self._numbers_on,
            **options,
        )

    def _apply(self, fn: Any, recurse: bool = True) -> Gate:
        """Move or convert the tensors, but leave the biases in FP32, which the kernels read."""
        # torch swaps no tensor that is weakly referenced, which a bound layer's weight is.
        torch_op.forget(self.weight)
        biases = {name: self._buffers[name] for name in ("e_score_correction_bias", "bias_vl")}
        super()._apply(fn, recurse)
        for name, bias in biases.items():
            converted = self._buffers[name]
            if bias is not None and converted is not None and converted.dtype != bias.dtype:
                self._buffers[name] = bias.to(converted.device)
        return self

    def extra_repr(self) -> str:
        return ", ".join(f"{name}={value}" for name, value in vars(self.config).items())


def _flat(rows: torch.Tensor | None) -> torch.Tensor | None:
    return None if rows is None else rows.reshape(-1)


def _rename(gate: nn.Module, state: dict[str, Any], prefix: str, *_: Any) -> None:
    """Give a checkpoint's tensors the names of the module's, before they are loaded."""
    for other, name in OTHER_NAMES.items():
        missing = gate._buffers[name] is not None and prefix + name not in state
        if missing and prefix + other in state:
            state[prefix + name] = state.pop(prefix + other)


def _refresh_layer(gate: Any, _: Any) -> None:
    """Take the copies of the bound layer again from the loaded tensors."""
    torch_op.refresh(gate.weight)
