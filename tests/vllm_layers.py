"""A MoE layer of vLLM as its DeepSeek-V4 builds one: real gate, factory and runner, stub experts.

It runs on a CPU, where vLLM's own routing cannot, and on a GPU. The stub records the weights and
ids that the experts are given.
"""

from __future__ import annotations

import contextlib
import math
import tempfile
from collections.abc import Iterator
from functools import lru_cache
from types import SimpleNamespace
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from vllm.config import DeviceConfig, VllmConfig, set_current_vllm_config
from vllm.distributed import init_distributed_environment, initialize_model_parallel
from vllm.distributed.parallel_state import model_parallel_is_initialized
from vllm.forward_context import set_forward_context
from vllm.model_executor.custom_op import op_registry_oot
from vllm.model_executor.layers.fused_moe import FusedMoEFactory, GateLinear
from vllm.model_executor.layers.fused_moe.config import FUSED_MOE_UNQUANTIZED_CONFIG
from vllm.model_executor.layers.fused_moe.fused_moe_method_base import FusedMoEMethodBase
from vllm.model_executor.layers.quantization import QuantizationConfig
from vllm.model_executor.model_loader.reload import layerwise
from vllm.model_executor.model_loader.weight_utils import default_weight_loader
from vllm.v1.worker.workspace import init_workspace_manager, is_workspace_manager_initialized

from dsv4_router_runtime.integrations.engine import KILL_SWITCH, SWITCH

K, E, TOP_K, SCALE, VOCABULARY = 256, 32, 6, 2.5, 64
FIRST_IMAGE_ID = 40
KINDS: dict[str, dict[str, Any]] = {
    "text": {},
    "hash": {"hashed": True},
    "image": {"vision": True},
    "image and hash": {"hashed": True, "vision": True},
    "shared": {"shared_columns": 2, "shared_weight": 0.4},
}


@contextlib.contextmanager
def replaced_classes(monkeypatch: Any) -> Iterator[dict[str, type]]:
    """Give vLLM's registry of replaced classes, empty, with the plugin's switch on."""
    monkeypatch.setenv(SWITCH, "1")
    monkeypatch.delenv(KILL_SWITCH, raising=False)
    before = dict(op_registry_oot)
    op_registry_oot.clear()
    yield op_registry_oot
    op_registry_oot.clear()
    op_registry_oot.update(before)


class StubExperts(FusedMoEMethodBase):
    """Experts that return zeros and keep what they were given."""

    def __init__(self, moe: Any, ids_dtype: torch.dtype | None, monolithic: bool) -> None:
        super().__init__(moe)
        self.ids_dtype = ids_dtype
        self.monolithic = monolithic
        self.given: tuple[torch.Tensor, torch.Tensor] | None = None

    topk_indices_dtype = property(lambda self: self.ids_dtype)
    is_monolithic = property(lambda self: self.monolithic)
    supports_eplb = True

    def create_weights(self, layer: nn.Module, *_: Any, **__: Any) -> None:
        layer.register_parameter("w13_weight", nn.Parameter(torch.empty(1), requires_grad=False))

    def get_fused_moe_quant_config(self, layer: nn.Module) -> Any:
        return FUSED_MOE_UNQUANTIZED_CONFIG

    def apply(self, layer: nn.Module, x: torch.Tensor, topk_weights, topk_ids, *_: Any, **__: Any):
        self.given = topk_weights, topk_ids
        return torch.zeros_like(x)

    def apply_monolithic(self, layer: nn.Module, x: torch.Tensor, *_: Any, **__: Any):
        return torch.zeros_like(x)


class StubConfig(QuantizationConfig):
    """A quantization whose experts are stubs and whose other layers are plain."""

    def __init__(self, ids_dtype: torch.dtype | None = None, monolithic: bool = False) -> None:
        super().__init__()
        self.made: list[StubExperts] = []
        self.given = ids_dtype, monolithic

    def get_quant_method(self, layer: nn.Module, prefix: str) -> StubExperts:
        self.made.append(StubExperts(layer.moe_config, *self.given))
        return self.made[-1]

    get_name = get_supported_act_dtypes = get_min_capability = get_config_filenames = None
    from_config = None


@lru_cache
def engine(device: str) -> VllmConfig:
    """Start what vLLM's layers need of an engine, once in a process."""
    config = VllmConfig(device_config=DeviceConfig(device=device))
    if not model_parallel_is_initialized():
        with set_current_vllm_config(config):
            init_distributed_environment(
                1, 0, f"file://{tempfile.mkdtemp()}/store", 0, "gloo" if device == "cpu" else "nccl"
            )
            initialize_model_parallel(1, 1)
    if not is_workspace_manager_initialized():
        init_workspace_manager(torch.device(device))
    return config


class Layer:
    """One MoE layer with random weights, built while the plugin's switches are as they are."""

    made = 0

    def __init__(
        self,
        *,
        device: str = "cpu",
        seed: int = 0,
        k: int = K,
        num_experts: int = E,
        hashed: bool = False,
        vision: bool = False,
        ids_dtype: torch.dtype | None = None,
        monolithic: bool = False,
        eplb: bool = False,
        shared_columns: int = 0,
        shared_weight: float = 1.0,
        **factory: Any,
    ) -> None:
        self.config = engine(device)
        self.generator = torch.Generator().manual_seed(seed)
        self.device, self.k, self.num_experts = device, k, num_experts
        Layer.made += 1
        self.prefix = f"model.layers.{Layer.made}.ffn"
        quant = StubConfig(ids_dtype, monolithic)
        with set_current_vllm_config(self.config), torch.device(device):
            self.gate = GateLinear(
                k,
                num_experts,
                bias=False,
                out_dtype=torch.float32,
                params_dtype=torch.bfloat16,
                prefix=f"{self.prefix}.gate",
            )
            self.gate.e_score_correction_bias = self.gate.tid2eid = self.gate.bias_vl = None
            for name, value in self.new_weights(hashed, vision).items():
                if name == "weight":
                    self.gate.weight.data.copy_(value)
                else:
                    setattr(self.gate, name, nn.Parameter(value, requires_grad=False))
            given = {
                "num_experts": num_experts,
                "top_k": TOP_K,
                "hidden_size": k,
                "intermediate_size": 64,
                "params_dtype": torch.bfloat16,
                "renormalize": True,
                "quant_config": quant,
                "prefix": f"{self.prefix}.experts",
                "scoring_func": "sqrtsoftplus",
                "routed_scaling_factor": SCALE,
                "e_score_correction_bias": self.gate.e_score_correction_bias,
                "hash_indices_table": self.gate.tid2eid,
                "bias_vl": self.gate.bias_vl,
                "image_sentinel_lo": FIRST_IMAGE_ID if vision else 0,
                "router_logits_dtype": torch.float32,
                "gate": self.gate,
                "enable_eplb": eplb,
                **factory,
            }
            self.runner = FusedMoEFactory(**given)
        (self.experts,) = quant.made
        # The factory makes such columns for ROCm alone; the router has them on any platform.
        self.shared = self.runner.router.num_fused_shared_experts = shared_columns
        self.shared_weight = self.runner.router.shared_expert_weight = shared_weight

    def new_weights(self, hashed: bool, vision: bool) -> dict[str, torch.Tensor]:
        """Draw the gate's tensors, under the names that a checkpoint's are loaded as.

        The weight holds whole numbers times a power of two, and so do the hidden states: FP32 holds
        the sum of their products exactly in any order. Logits have a standard deviation of about 2.
        """

        def normal(*shape: int) -> torch.Tensor:
            return torch.randn(shape, generator=self.generator, device="cpu")

        unit = 2.0 ** -round(math.log2(2.6 * self.k**0.5))
        weight = self.integers(4, self.num_experts, self.k)
        given = {"weight": weight * unit}
        if not hashed or vision:
            given["e_score_correction_bias"] = 8 + 0.05 * normal(self.num_experts)
        if vision:
            given["bias_vl"] = 8 + 0.5 * normal(self.num_experts)
        if hashed:
            order = normal(VOCABULARY, self.num_experts).argsort(1)[:, :TOP_K]
            given["tid2eid"] = order.int()
        return {name: value.to(self.device) for name, value in given.items()}

    def integers(self, most: int, *shape: int) -> torch.Tensor:
        """Draw whole numbers of up to `most`, of either sign, in BF16."""
        drawn = torch.randint(-most, most + 1, shape, generator=self.generator, device="cpu")
        return drawn.bfloat16()

    def batch(self, num_tokens: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Draw hidden states and token ids, images among them."""
        x = self.integers(3, num_tokens, self.k)
        ids = torch.randint(
            VOCABULARY, (num_tokens,), generator=self.generator, device="cpu", dtype=torch.int32
        )
        return x.to(self.device), ids.to(self.device)

    def __call__(
        self,
        x: torch.Tensor,
        input_ids: torch.Tensor | None = None,
        padding: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Run the layer's forward; return the weights and ids that the experts were given."""
        with self.forward_context(padding):
            self.runner(hidden_states=x, router_logits=x, input_ids=input_ids)
        assert self.experts.given is not None
        return self.experts.given

    @contextlib.contextmanager
    def forward_context(self, padding: torch.Tensor | None = None) -> Iterator[None]:
        with set_forward_context(None, self.config, is_padding=padding), torch.inference_mode():
            yield

    def expected(
        self,
        x: torch.Tensor,
        input_ids: torch.Tensor | None = None,
        padding: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Return weights, ids and the margin of each row's choice.

        This is vLLM's `fused_topk_bias` and what FusedTopKBiasRouter appends, in FP64 torch.
        """
        gate, num_tokens = self.gate, len(x)
        scores = F.softplus(x.double() @ gate.weight.double().t()).sqrt()
        bias = gate.e_score_correction_bias
        keys = scores if bias is None else scores + bias.double()
        images = torch.zeros(num_tokens, dtype=torch.bool, device=x.device)
        if gate.bias_vl is not None:
            images = (input_ids >= FIRST_IMAGE_ID) & (input_ids < FIRST_IMAGE_ID + 5)
            keys = torch.where(images[:, None], scores + gate.bias_vl.double(), keys)
        best, order = keys.topk(TOP_K + 1)
        ids, margin = order[:, :TOP_K], best[:, TOP_K - 1] - best[:, TOP_K]
        if gate.tid2eid is not None:
            by_token = gate.tid2eid[input_ids.long()].long()
            ids = torch.where(images[:, None], ids, by_token)
            margin = margin.where(images, torch.inf)
        weights = scores.gather(1, ids)
        weights = weights / weights.sum(1, keepdim=True) * SCALE
        shared = self.num_experts + torch.arange(self.shared, device=x.device)
        ids = torch.cat([ids, shared.expand(num_tokens, -1)], 1)
        of_shared = weights.new_full((num_tokens, self.shared), self.shared_weight)
        weights = torch.cat([weights, of_shared], 1)
        if padding is not None:
            ids = ids.masked_fill(padding[:num_tokens, None], -1)
            weights = weights.masked_fill(padding[:num_tokens, None], 0)
        return weights, ids, margin


def load(layer: Layer, new: dict[str, torch.Tensor]) -> None:
    """Load a checkpoint's tensors anew, as vLLM's `reload_weights` does."""
    model = model_of(layer)
    with set_current_vllm_config(engine(layer.device)), torch.device(layer.device):
        layerwise.record_metadata_for_reloading(model)
        layerwise.initialize_layerwise_reload(model)
        for name, value in new.items():
            parameter = getattr(layer.gate, name)
            getattr(parameter, "weight_loader", default_weight_loader)(parameter, value)
        layerwise.finalize_layerwise_reload(model, SimpleNamespace(dtype=torch.bfloat16))


def model_of(*layers: Layer) -> nn.Module:
    """Return a model with these layers, each with its gate and its experts."""
    parts = []
    for layer in layers:
        part = nn.Module()
        part.gate, part.experts = layer.gate, layer.runner
        parts.append(part)
    return nn.Sequential(*parts)
