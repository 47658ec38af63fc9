"""The error of every command about signatures."""

from __future__ import annotations

from build_kernels.errors import BuilderError


class SigningError(BuilderError):
    """A key, a statement or an envelope is not as it has to be; the message has the next step."""
