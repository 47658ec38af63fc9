"""The parts that adapters of engines share: switches, contract, limits, one line per layer.

Importing this module imports neither torch nor an engine.
"""

from __future__ import annotations

import importlib
import inspect
import os
from collections.abc import Iterator, Mapping
from operator import attrgetter
from typing import Any

from dsv4_router_runtime.artifacts.limits import K_MULTIPLE, MAX_EXPERTS, MAX_TOP_K
from dsv4_router_runtime.log import LOGGER

SWITCH = "DSV4_ROUTER"
KILL_SWITCH = "DSV4_ROUTER_DISABLE"


def why_off() -> str | None:
    """Return why no engine is served in this process; None if it is.

    The kill switch wins. ValueError if a switch is neither 0 nor 1.
    """
    if _switch(KILL_SWITCH):
        return f"{KILL_SWITCH}=1"
    return None if _switch(SWITCH) else f"{SWITCH} is not 1"


def _switch(name: str) -> bool:
    value = os.environ.get(name) or "0"
    if value not in ("0", "1"):
        raise ValueError(f"{name}: expected 0 or 1 (got {value!r}); set it to 1, or unset it")
    return value == "1"


def mismatches(contract: Mapping[str, str | None]) -> list[str]:
    """Return how the installed engine differs from the contract.

    contract: "module:name" -> the parameters, without annotations and defaults, as in "(self, x, *,
    y)"; None for a name that only has to exist.
    """
    wrong = []
    for name, expected in contract.items():
        module, _, path = name.partition(":")
        try:
            found = attrgetter(path)(importlib.import_module(module))
        except (ImportError, AttributeError) as error:
            wrong.append(f"{name}: not found ({error})")
            continue
        if expected is not None and (got := parameters_of(found)) != expected:
            wrong.append(f"{name}: expected {expected} (got {got})")
    return wrong


def parameters_of(function: Any) -> str:
    """Return the signature without annotations and defaults."""
    parameters = [
        each.replace(annotation=each.empty, default=each.empty)
        for each in inspect.signature(function).parameters.values()
    ]
    return str(inspect.Signature(parameters))


def report_layer(engine: str, layer: str, reason: str | None) -> None:
    """Log which router serves a layer: INFO if it is this one, a WARNING with the reason if not."""
    if reason is None:
        LOGGER.info("%s: %s is served by dsv4_router", engine, layer)
    else:
        LOGGER.warning("%s: %s keeps the engine's router: %s", engine, layer, reason)


def limits_against(*, hidden_size: int, num_experts: int, top_k: int) -> Iterator[str]:
    """Yield the limits of the kernels that a gate's sizes exceed, as an adapter reports them."""
    if hidden_size % K_MULTIPLE:
        yield f"hidden_size is {hidden_size}; multiples of {K_MULTIPLE} are served"
    if num_experts > MAX_EXPERTS or top_k > MAX_TOP_K:
        yield (
            f"it takes {top_k} of {num_experts} experts; up to {MAX_TOP_K} of {MAX_EXPERTS} are "
            "served"
        )
