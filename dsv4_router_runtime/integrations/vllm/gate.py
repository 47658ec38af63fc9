"""vLLM's gate, without its logits if a router makes its own."""

from __future__ import annotations

from functools import lru_cache
from typing import TYPE_CHECKING, Any

import torch
from vllm.config import get_current_vllm_config_or_none
from vllm.model_executor.layers.fused_moe.router.gate_linear import GateLinear
from vllm.model_executor.layers.linear import UnquantizedLinearMethod

from dsv4_router_runtime.log import warn_once

if TYPE_CHECKING:
    from .router import ServedRouter


@lru_cache(maxsize=1024)
def no_logits(num_tokens: int, num_experts: int) -> torch.Tensor:
    """Return logits without values, on the meta device: an operator that reads them fails."""
    return torch.empty((num_tokens, num_experts), dtype=torch.float32, device="meta")


class ServedGateLinear(GateLinear):
    """vLLM's gate. Its logits have no values if `served_by` routes by the hidden states."""

    quant_method: Any
    served_by: ServedRouter | None = None

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        if type(self.quant_method) is UnquantizedLinearMethod:
            self.quant_method = ServedGateMethod()
        config = get_current_vllm_config_or_none()
        offload = None if config is None else config.offload_config
        self.offloaded = offload is not None and (
            offload.uva.cpu_offload_gb > 0 or offload.prefetch.offload_group_size > 0
        )

    def forward(self, x: torch.Tensor) -> Any:
        if self.served_by is None:
            return super().forward(x)
        weight = self.weight
        if self.hooked:
            self._warn("a hook reads the gate's logits")
        elif weight.data_ptr() != self.served_by.weight_at:
            self._warn("the gate's weight lies elsewhere than when it was bound")
        else:
            return self._return(no_logits(x.shape[0], weight.shape[0]))
        return super().forward(x)

    def _warn(self, reason: str) -> None:
        text = f"vllm: {self.prefix}: vLLM's router runs while {reason}"
        warn_once(text, text)

    @property
    def hooked(self) -> bool:
        return bool(self._forward_hooks or self._forward_pre_hooks)


class ServedGateMethod(UnquantizedLinearMethod):
    """The gate's weights in BF16. vLLM calls it once they are loaded."""

    def process_weights_after_loading(self, layer: torch.nn.Module) -> None:
        super().process_weights_after_loading(layer)
        if isinstance(layer, ServedGateLinear) and layer.served_by is not None:
            layer.served_by.take_weights()
