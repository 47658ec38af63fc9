"""The errors that a command reports as a message."""

from __future__ import annotations


class BuilderError(Exception):
    """An error that a user can mend: what, got, expected and the next step, without a traceback."""
