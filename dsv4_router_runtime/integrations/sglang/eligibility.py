"""Which layers are served: a decision on plain facts, which needs neither torch nor SGLang."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from dsv4_router_runtime.artifacts.limits import MAX_SHARED_SLOTS
from dsv4_router_runtime.integrations.engine import limits_against

# Algorithms of --ep-dispatch-algorithm with logical ids, or ids that a kernel or SGLang maps.
DISPATCH_ALGORITHMS = (None, "static", "dynamic")


@dataclass(frozen=True, kw_only=True)
class LayerFacts:
    """The properties of one DeepseekV2MoE on which it depends whether it is served.

    device: "cuda", "cpu", or another type; a build of torch for ROCm counts as "hip". dtypes are
    named as torch prints them, and e_bias is None without a bias. top_k counts routed experts,
    num_shared the shared columns that the router writes. sees: it has a second bias for images.
    output_format: None for a hash layer, whose format is always STANDARD.
    """

    is_deepseek_v4: bool
    gate: str
    topk: str
    experts: str
    device: str
    weight: str
    weight_shape: tuple[int, ...]
    contiguous: bool
    e_bias: str | None
    hashed: bool
    sees: bool
    num_experts: int
    hidden_size: int
    top_k: int
    num_shared: int
    scoring_func: str
    grouped: bool
    custom: bool
    renormalize: bool
    output_format: str | None
    waterfill: bool
    simulated: bool
    dispatch: str | None


def reason_against(facts: LayerFacts) -> str | None:
    """Return why SGLang's own router serves the layer; None if this one does."""
    return next(_reasons(facts), None)


def _reasons(facts: LayerFacts) -> Iterator[str]:
    yield from _reasons_of_model(facts)
    yield from _reasons_of_tensors(facts)
    yield from _reasons_of_server(facts)


def _reasons_of_model(facts: LayerFacts) -> Iterator[str]:
    if not facts.is_deepseek_v4:
        yield "it is no layer of DeepSeek-V4"
    classes = (facts.gate, facts.topk)
    expected = ("MoEGate", "HashTopK" if facts.hashed else "TopK")
    if classes != expected:
        yield f"its gate and top-k are {classes}; {expected} are served"
    if facts.scoring_func != "sqrtsoftplus" or facts.grouped or facts.custom:
        grouped = "grouped " if facts.grouped else ""
        custom = ", with a routing function of its own" if facts.custom else ""
        yield f"the scores are {grouped}{facts.scoring_func}{custom}; sqrtsoftplus is served"
    if facts.sees and facts.top_k == 1:
        yield "a model that sees takes top_k 1, which SGLang normalises for text alone"
    if facts.num_shared and not facts.renormalize:
        yield "shared columns beside weights that are not normalised hold a sum of scores"


def _reasons_of_tensors(facts: LayerFacts) -> Iterator[str]:
    if facts.device not in ("cuda", "cpu"):
        yield f"the weight is on {facts.device}; NVIDIA GPUs, or a CPU for tests, are served"
    if facts.weight != "torch.bfloat16":
        yield f"the weight is {facts.weight}; torch.bfloat16 is served"
    if facts.weight_shape != (facts.num_experts, facts.hidden_size) or not facts.contiguous:
        yield f"the weight is packed as {facts.weight_shape}; a contiguous [E, K] is served"
    if facts.e_bias not in ("torch.float32", None if facts.hashed else "torch.float32"):
        yield f"e_score_correction_bias is {facts.e_bias}; torch.float32 is served"
    yield from limits_against(
        hidden_size=facts.hidden_size, num_experts=facts.num_experts, top_k=facts.top_k
    )
    if facts.num_shared > MAX_SHARED_SLOTS:
        yield f"it has {facts.num_shared} shared columns; up to {MAX_SHARED_SLOTS} are served"


def _reasons_of_server(facts: LayerFacts) -> Iterator[str]:
    if facts.output_format not in (None, "STANDARD"):
        yield f"its experts take the format {facts.output_format}; STANDARD is served"
    if facts.waterfill:
        yield "waterfill balances its shared expert"
    if facts.simulated:
        yield "SGLANG_SIMULATE_* overrides its routing"
    if facts.dispatch not in DISPATCH_ALGORITHMS:
        yield f"--ep-dispatch-algorithm is {facts.dispatch}; static and dynamic are served"
    if facts.experts == "KTEPWrapperMethod":
        yield "its experts are KTransformers', with which nothing was tried"
