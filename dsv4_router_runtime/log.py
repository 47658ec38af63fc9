"""The package's logger, and records that are written once per process for each kind.

An application chooses the level and the handler: the package installs none but the NullHandler that
keeps the library from writing to stderr on its own.
"""

from __future__ import annotations

import logging
import threading

LOGGER = logging.getLogger("dsv4_router_runtime")
LOGGER.addHandler(logging.NullHandler())

_logged: set[tuple[int, str]] = set()
_lock = threading.RLock()


def report_to(name: str) -> None:
    """Send records where the logger `name` sends its own; without a handler, WARNINGs to stderr."""
    LOGGER.parent = logging.getLogger(name)
    for handler in LOGGER.handlers[:]:
        # It counts as a handler, so that logging would not fall back to stderr.
        if isinstance(handler, logging.NullHandler):
            LOGGER.removeHandler(handler)


def info_once(kind: str, text: str) -> bool:
    """Log `text` at INFO unless `kind` was logged at INFO before; return whether it was logged."""
    return _once(logging.INFO, kind, text)


def warn_once(kind: str, text: str) -> bool:
    """Log `text` as a WARNING unless `kind` was warned of before; return whether it was logged."""
    return _once(logging.WARNING, kind, text)


def _once(level: int, kind: str, text: str) -> bool:
    # A disabled record is not counted, so that a level lowered later still shows the next one.
    if not LOGGER.isEnabledFor(level):
        return False
    with _lock:
        if (level, kind) in _logged:
            return False
        _logged.add((level, kind))
    LOGGER.log(level, "%s", text)
    return True
