"""The entry point that vLLM loads in each of its processes, and the verdict of each layer."""

from __future__ import annotations

from importlib import metadata
from typing import Any

from dsv4_router_runtime.integrations.engine import mismatches, why_off
from dsv4_router_runtime.log import LOGGER, report_to

from .contract import CONTRACT, RELEASE


def register() -> None:
    """Let vLLM build its gates and MoE runners from the classes of this package.

    Does nothing without DSV4_ROUTER=1, or with DSV4_ROUTER_DISABLE=1. Calling it again changes
    nothing. Another release of vLLM, or another plugin in the same place, is declined as a whole,
    with a WARNING.
    """
    if reason := why_off():
        LOGGER.debug("vllm: not registered: %s", reason)
        return
    # vLLM sets up the logger "vllm" alone, and in `LLM` only after plugins are loaded.
    report_to("vllm")
    if reason := _why_not_register():
        LOGGER.warning("vllm: not registered, vLLM's routers run: %s", reason)


def _why_not_register() -> str | None:
    """Register the classes; return why that was not done, None if it was."""
    release = metadata.version("vllm")
    if not release.startswith(RELEASE):
        return f"this adapter is for vLLM {RELEASE}x (got {release})"
    if wrong := mismatches(CONTRACT):
        return "; ".join(wrong)
    from vllm.model_executor.custom_op import PluggableLayer, op_registry_oot

    from .gate import ServedGateLinear
    from .runner import ServedMoERunner

    classes = {"GateLinear": ServedGateLinear, "MoERunner": ServedMoERunner}
    for name, served in classes.items():
        other = op_registry_oot.get(name, served)
        if other is not served:
            return f"{other.__module__}.{other.__qualname__} has replaced {name} before"
    for name, served in classes.items():
        if name not in op_registry_oot:
            PluggableLayer.register_oot(served, name=name)
    return None


def summary(model: Any) -> dict[str, str]:
    """Return the router of each MoE layer of a model: "dsv4_router", or why it is vLLM's.

    It can be passed to `LLM.apply_model`. A layer has its verdict after the first forward.
    """
    from .runner import ServedMoERunner

    return {
        name: module.verdict or "undecided: no forward has run"
        for name, module in model.named_modules()
        if isinstance(module, ServedMoERunner)
    }


def refresh(model: Any) -> None:
    """Copy the hash tables of a model anew, after a change of which vLLM tells no layer.

    `reload_weights` of a checkpoint needs no call. With `is_checkpoint_format=False`, or weights
    written by a trainer, a hash layer's table is copied by this alone; all else is read in place.
    """
    from .router import ServedRouter
    from .runner import ServedMoERunner

    for module in model.modules():
        if isinstance(module, ServedMoERunner) and isinstance(module.router, ServedRouter):
            module.router.take_weights()
