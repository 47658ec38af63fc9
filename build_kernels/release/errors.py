"""The error of every command about signatures."""

from __future__ import annotations


class SigningError(Exception):
    """A key, a statement or an envelope is not as it has to be; the message has the next step."""
