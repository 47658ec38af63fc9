"""The entry point of group sglang.srt.plugins: SGLang calls `register` early in every process.

Importing this module imports neither torch nor SGLang.
"""

from __future__ import annotations

from importlib.metadata import version

from dsv4_router_runtime.integrations.engine import SWITCH, mismatches, why_off
from dsv4_router_runtime.log import LOGGER

VERSION = "0.5.23"
_registered = False


def register() -> None:
    """Register the hooks, unless this router is off or SGLang is another than the one expected.

    SGLang applies them once all plugins have run. Calling it again changes nothing.
    """
    global _registered
    if _registered:
        return
    if off := why_off():
        LOGGER.info("sglang: dsv4_router is off: %s", off)
        return
    if wrong := differences():
        LOGGER.warning(
            "sglang: dsv4_router serves no layer: it was written for sglang %s; install that "
            "version, or unset %s. %s",
            VERSION,
            SWITCH,
            "; ".join(wrong),
        )
        return
    from sglang.srt.plugins.hook_registry import HookRegistry, HookType

    from .hooks import HOOKS

    for target, (kind, hook) in HOOKS.items():
        HookRegistry.register(target, hook, HookType[kind])
    _registered = True


def differences() -> list[str]:
    """Return how the installed SGLang differs from the one that this plugin was written for."""
    from .contract import CONTRACT

    if (got := version("sglang")) != VERSION:
        return [f"expected version {VERSION} (got {got})"]
    return mismatches(CONTRACT)
