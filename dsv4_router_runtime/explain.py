"""`python -m dsv4_router_runtime explain`: which kernel serves a call, and why. No GPU is needed.

Built on `plan_layer`, which a Router's binding uses as well.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from math import prod
from typing import Any

from .artifacts.dispatch import (
    FUSED_GATE_ROLES,
    Accepted,
    LayerPlan,
    LayerProblem,
    Problem,
    Rejected,
    Step,
    kernels_on,
    plan_layer,
    resolve,
    without,
)
from .artifacts.evidence import KernelEvidence, read_summary
from .artifacts.folder import ArtifactSet
from .artifacts.kernel import ARCHITECTURE, LAYOUTS, Kernel
from .artifacts.limits import (
    K_MULTIPLE,
    MAP_ALIGNMENT_BYTES,
    MAX_EXPERTS,
    MAX_K_BLOCKS,
    MAX_TOKENS,
    MAX_TOP_K,
)
from .device.launch import ceil_div, grid_of, tokens_at_once
from .device.workspace import scratch_layout
from .errors import NoKernelError
from .parameters import DTYPES
from .product import transposed_rows

_BF16_BYTES, _FP32_BYTES = 2, 4


@dataclass(frozen=True, kw_only=True)
class Question:
    """A call of `num_tokens` rows to a layer whose W_gate [k, num_experts] has no gaps.

    hashed: the layer has tid2eid. images: the call may have image rows, by image_mask or by the
    layer's num_image_ids. logits: the call has out_logits. same_bits: as in `Router`.
    """

    num_tokens: int
    k: int
    num_experts: int
    top_k: int
    layout: str = "kmajor"
    hashed: bool = False
    images: bool = False
    logits: bool = False
    same_bits: bool = False

    def __post_init__(self) -> None:
        for name, value, high in (
            ("num_tokens", self.num_tokens, MAX_TOKENS),
            ("num_experts", self.num_experts, MAX_EXPERTS),
            ("top_k", self.top_k, min(MAX_TOP_K, self.num_experts)),
            ("k", self.k, MAX_K_BLOCKS),
        ):
            if not 1 <= value <= high:
                raise ValueError(f"{name}: expected 1..{high} (got {value})")
        if self.k % K_MULTIPLE:
            raise ValueError(f"k: expected a multiple of {K_MULTIPLE} (got {self.k})")
        if self.layout not in LAYOUTS:
            expected = " or ".join(LAYOUTS)
            raise ValueError(f"layout: expected {expected} (got {self.layout!r})")

    def __str__(self) -> str:
        kind = "hash layer" if self.hashed else "layer"
        kind += ", image rows" * self.images + ", out_logits" * self.logits
        kind += ", same bits" * self.same_bits
        return (
            f"N={self.num_tokens}, K={self.k}, num_experts={self.num_experts}, "
            f"top_k={self.top_k}, {self.layout} {kind}"
        )

    @property
    def layer(self) -> LayerProblem:
        """The layer as `plan_layer` takes it. One expert without gaps is a row along K."""
        row_bytes = self.num_experts * _BF16_BYTES
        kmajor = self.layout == "kmajor" or self.num_experts == 1
        return LayerProblem(
            layout="kmajor" if kmajor else "emajor",
            tma_loadable=kmajor or row_bytes % MAP_ALIGNMENT_BYTES == 0,
            hashed=self.hashed,
            # Any layer may have it, and its kernels are shown too.
            has_bias_vl=True,
            num_experts=self.num_experts,
            top_k=self.top_k,
            k=self.k,
            same_bits=self.same_bits,
            dtypes=DTYPES,
        )


@dataclass(frozen=True, kw_only=True)
class Explanation:
    """The plan of a layer, the step of one call, and every kernel's verdict for that step.

    steps_without: by the CTAs of a cluster, the step of the call in a context that has no room for
    clusters of so many and more; None if it is a NoKernelError there.
    scratch_bytes: a stream's scratch, which serves all kernels of the set.
    """

    question: Question
    arch: str
    plan: LayerPlan
    step: Step
    steps_without: Mapping[int, Step | None]
    candidates: tuple[Accepted | Rejected, ...]
    scratch_bytes: int
    evidence: KernelEvidence | None

    @property
    def kernel(self) -> Kernel:
        return self.step.kernel

    @property
    def grid(self) -> tuple[int, int, int]:
        """The CTAs of the launch, or of the largest piece."""
        return grid_of(
            self.kernel.launch,
            num_tokens=self.tokens_at_once,
            num_experts=self.question.num_experts,
        )

    @property
    def tokens_at_once(self) -> int:
        """The tokens of the largest launch."""
        return tokens_at_once(self.question.num_tokens, self.step.piece_tokens)

    @property
    def num_launches(self) -> int:
        """The launches of the call, a matrix product's as one."""
        pieces = ceil_div(self.question.num_tokens, self.tokens_at_once)
        return pieces + self.step.is_product_and_select

    @property
    def capture_bytes(self) -> int:
        """Scratch of one captured launch of the call; each capture has its own."""
        problem = self.tokens_at_once, self.question.num_experts
        return scratch_layout([self.kernel], problem).num_bytes

    @property
    def logits_bytes(self) -> int:
        """Scratch for a matrix product's logits, and for the rows that it computes transposed.

        Those alone if out_logits takes the logits; 0 without a product.
        """
        asked = self.question
        if not self.step.is_product_and_select:
            return 0
        rows = transposed_rows(asked.num_tokens, asked.num_experts)
        rows += 0 if asked.logits else asked.num_tokens
        return rows * asked.num_experts * _FP32_BYTES

    @property
    def weights_copy_bytes(self) -> int:
        """The private copy of W_gate; 0 if it is read in place."""
        asked = self.question
        return 0 if self.plan.copy_reason is None else asked.k * asked.num_experts * _BF16_BYTES


def explain(artifacts: ArtifactSet, question: Question, arch: str) -> Explanation:
    """Plan the layer on `arch` and find the step of the call; NoKernelError if there is none."""
    if re.fullmatch(ARCHITECTURE, arch) is None:
        raise ValueError(f"arch: expected an architecture such as sm_90a (got {arch!r})")
    plan = plan_layer(artifacts.manifest, question.layer, arch)
    step = _step_of(plan, question)
    layer = question.layer
    problem = Problem(
        role=step.kernel.role,
        layout=layer.layout if plan.copy_reason is None else "kmajor",
        num_tokens=tokens_at_once(question.num_tokens, step.piece_tokens),
        num_experts=layer.num_experts,
        top_k=layer.top_k,
        k=layer.k,
        same_bits=layer.same_bits,
        dtypes=layer.dtypes,
    )
    if step.is_product_and_select:
        problem = replace(problem, layout=None)
    return Explanation(
        question=question,
        arch=arch,
        plan=plan,
        step=step,
        steps_without=_steps_without(plan, question, step),
        candidates=resolve(artifacts.manifest, problem, arch),
        scratch_bytes=scratch_layout(kernels_on(artifacts.manifest, arch)).num_bytes,
        evidence=read_summary(artifacts.folder).of(step.kernel),
    )


def _steps_without(plan: LayerPlan, question: Question, step: Step) -> dict[int, Step | None]:
    """Return what takes the place of `step` if its cluster has no room, the larger ones first."""
    sizes = {prod(kernel.launch.cluster) for kernel in plan.kernels}
    most = prod(step.kernel.launch.cluster)
    return {
        size: _step_without(plan, question, size)
        for size in sorted(sizes, reverse=True)
        if 1 < size <= most
    }


def _step_without(plan: LayerPlan, question: Question, size: int) -> Step | None:
    """Return the call's step without kernels of clusters of `size` CTAs and more."""
    unfit = {
        kernel.key: f"no room for a cluster of {size} CTAs"
        for kernel in plan.kernels
        if prod(kernel.launch.cluster) >= size
    }
    try:
        return _step_of(without(plan, unfit), question)
    except NoKernelError:
        return None


def _step_of(plan: LayerPlan, question: Question) -> Step:
    """Return the step of a plan that takes the call."""
    return next(
        step
        for step in plan.steps_of(whole_gate=question.images or question.logits)
        if step.max_tokens is None or question.num_tokens <= step.max_tokens
    )


def _as_items(steps: tuple[Step, ...]) -> list[dict[str, Any]]:
    return [
        {
            "kernel": step.kernel.key,
            "max_tokens": step.max_tokens,
            "piece_tokens": step.piece_tokens,
            "reason": step.reason,
        }
        for step in steps
    ]


def _lines(explained: Explanation, steps: tuple[Step, ...]) -> Iterator[str]:
    for step in steps:
        mark = "->" if step is explained.step else "  "
        yield f"  {mark} {step.reason}: {step.kernel.key}"


def as_json(explained: Explanation) -> dict[str, Any]:
    """Return the document of `explain --json`."""
    evidence, without_room = explained.evidence, explained.steps_without
    keys = {size: step and step.kernel.key for size, step in without_room.items()}
    return {
        "question": asdict(explained.question),
        "arch": explained.arch,
        "kernel": explained.kernel.key,
        "path": _path(explained),
        "kernel_without_clusters": [explained.kernel.key, *keys.values()][-1],
        "kernel_without_clusters_of": {str(size): key for size, key in keys.items()},
        "launches": explained.num_launches,
        "grid": list(explained.grid),
        "cluster": list(explained.kernel.launch.cluster),
        "pdl": explained.kernel.launch.pdl,
        "steps": _as_items(explained.plan.steps),
        "gate_steps": _as_items(explained.plan.gate_steps),
        "candidates": [
            {"kernel": each.kernel.key, "verdict": verdict, "reason": reason}
            for each, verdict, reason in _verdicts(explained)
        ],
        "copy_reason": explained.plan.copy_reason,
        "weights_copy_bytes": explained.weights_copy_bytes,
        "scratch_bytes": explained.scratch_bytes,
        "capture_bytes": explained.capture_bytes,
        "logits_bytes": explained.logits_bytes,
        "evidence": None if evidence is None else dict(evidence.rungs),
        "ran_on": [] if evidence is None else list(evidence.gpus),
    }


def as_text(explained: Explanation) -> str:
    """Return the lines of `explain`."""
    kernel = explained.kernel
    lines = [f"{explained.question} on {explained.arch}", f"path: {_path(explained)}", "steps:"]
    lines += _lines(explained, explained.plan.steps)
    if explained.plan.gate_steps:
        lines.append("steps of calls with image rows or out_logits, if the layer has bias_vl:")
        lines += _lines(explained, explained.plan.gate_steps)
    for size, other in explained.steps_without.items():
        instead = "NoKernelError" if other is None else other.kernel.key
        room = f"for a cluster of {size} CTAs (MIG, MPS, green contexts)"
        lines.append(f"without room {room}: {instead}")
    if kernel.role in FUSED_GATE_ROLES:
        lines.append(
            "with room for some of its clusters at once: the step from it on of the fewest waves"
        )
    lines.append(f"candidates of role {kernel.role} for N={explained.tokens_at_once}:")
    for each, verdict, reason in _verdicts(explained):
        lines.append(f"     {verdict} {each.kernel.key}: {reason}")
    lines += _memory(explained)
    pdl = "allowed: the kernel waits for the one before with griddepcontrol"
    lines.append(f"pdl: {pdl if kernel.launch.pdl else 'never: the kernel has no griddepcontrol'}")
    return "\n".join([*lines, f"evidence of {kernel.key}: {_evidence(explained.evidence)}"])


def _path(explained: Explanation) -> str:
    kernel, grid = explained.kernel, explained.grid
    ctas, cluster = prod(grid), prod(kernel.launch.cluster)
    launch = f"{kernel.key}, {ctas} CTA{'s' if ctas > 1 else ''}"
    if cluster > 1:
        clusters = ctas // cluster
        launch += f" in {clusters} cluster{'s' if clusters > 1 else ''} of {cluster}"
    if explained.step.is_product_and_select:
        return f"torch.mm (cuBLAS), then one launch of {launch}"
    if (number := explained.num_launches) > 1:
        tokens = explained.tokens_at_once
        return f"{number} launches, the largest ({tokens} tokens) of {launch}"
    return f"one launch of {launch}"


def _verdicts(explained: Explanation) -> Iterator[tuple[Accepted | Rejected, str, str]]:
    for each in explained.candidates:
        if isinstance(each, Rejected):
            yield each, "rejected", each.reason
        elif each.kernel is explained.kernel:
            yield each, "accepted", "chosen, made for the fewest tokens of those accepted"
        else:
            low = each.kernel.problem.num_tokens.low
            most = each.kernel.most_tokens(explained.question.num_experts) or ""
            yield each, "accepted", f"not chosen, made for {low}..{most} tokens"


def _memory(explained: Explanation) -> Iterator[str]:
    reason = explained.plan.copy_reason
    if reason is None:
        yield "copies: W_gate is read in place"
    else:
        yield f"copies: W_gate, {explained.weights_copy_bytes} bytes per layer, since {reason}"
    if explained.question.hashed:
        yield "copies: tid2eid as int32, 4 bytes per element and layer"
    yield f"scratch: {explained.scratch_bytes} bytes per stream, shared by all layers"
    yield f"scratch: {explained.capture_bytes} bytes per captured graph and stream in it"
    if explained.logits_bytes:
        yield f"scratch: {explained.logits_bytes} bytes of logits per stream, shared by all layers"


def _evidence(evidence: KernelEvidence | None) -> str:
    if evidence is None:
        return "none for these bytes and this launch"
    ran = f"ran on {', '.join(evidence.gpus)}" if evidence.gpus else "ran on no GPU"
    return "; ".join([ran, *(f"{rung} {status}" for rung, status in evidence.rungs.items())])
