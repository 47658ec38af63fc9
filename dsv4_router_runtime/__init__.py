"""Ahead-of-time router kernels for DeepSeek-V4, loaded and launched with cuda-python alone.

    from dsv4_router_runtime import Router, dense_router_dispatch

Importing this package loads neither torch nor the CUDA bindings: each public name below brings what
it needs when it is first used.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .artifacts.folder import ArtifactSet, find_artifacts, open_artifacts
    from .artifacts.manifest import Manifest, parse_manifest, serialise_manifest
    from .errors import (
        ArtifactError,
        DriverError,
        DriverMissingError,
        DriverTooOldError,
        ManifestError,
        NoKernelError,
        RouterError,
    )
    from .exact import exact_logits, exact_reference
    from .reference import router_reference
    from .router import Router, dense_router_dispatch
    from .scratch import Status, check, reset, status

    __version__: str

__all__ = [
    "ArtifactError",
    "ArtifactSet",
    "DriverError",
    "DriverMissingError",
    "DriverTooOldError",
    "Manifest",
    "ManifestError",
    "NoKernelError",
    "Router",
    "RouterError",
    "Status",
    "check",
    "dense_router_dispatch",
    "exact_logits",
    "exact_reference",
    "find_artifacts",
    "open_artifacts",
    "parse_manifest",
    "reset",
    "router_reference",
    "serialise_manifest",
    "status",
]

_HOME = {
    "ArtifactError": "errors",
    "ArtifactSet": "artifacts.folder",
    "DriverError": "errors",
    "DriverMissingError": "errors",
    "DriverTooOldError": "errors",
    "Manifest": "artifacts.manifest",
    "ManifestError": "errors",
    "NoKernelError": "errors",
    "Router": "router",
    "RouterError": "errors",
    "Status": "scratch",
    "check": "scratch",
    "dense_router_dispatch": "router",
    "exact_logits": "exact",
    "exact_reference": "exact",
    "find_artifacts": "artifacts.folder",
    "open_artifacts": "artifacts.folder",
    "parse_manifest": "artifacts.manifest",
    "reset": "scratch",
    "router_reference": "reference",
    "serialise_manifest": "artifacts.manifest",
    "status": "scratch",
}


def __getattr__(name: str) -> Any:
    if name == "__version__":
        value = import_module(".version", __name__).package_version()
    elif name in _HOME:
        try:
            value = getattr(import_module(f".{_HOME[name]}", __name__), name)
        except ModuleNotFoundError as error:
            if error.name != "torch":
                raise
            raise ModuleNotFoundError(
                f"{name} needs torch, which is not installed here: install it, or this package's "
                "extra: pip install 'dsv4-router[torch]'",
                name="torch",
            ) from error
    else:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__, "__version__"})
