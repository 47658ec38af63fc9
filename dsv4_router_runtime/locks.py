"""Reentrant locks, which a signal handler or a finalizer may meet held by its own thread."""

from __future__ import annotations

import threading

from .errors import INTERRUPTED_CALL, RouterError


def is_held_here(lock: threading.RLock) -> bool:
    """Return whether this thread holds the lock."""
    return bool(lock._is_owned())  # type: ignore[attr-defined]


def refuse_within(lock: threading.RLock) -> None:
    """Raise RouterError if this thread holds the lock: this call interrupts one of its calls."""
    if is_held_here(lock):
        raise RouterError(INTERRUPTED_CALL)
