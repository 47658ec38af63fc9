"""Every exception this package raises on purpose, apart from TypeError and ValueError.

A wrong argument of a call is a TypeError (wrong kind of object or dtype) or a ValueError (anything
else about it). Everything that is wrong with the installation, the machine or the artifacts is a
`RouterError`, so that a server can tell "I called it wrongly" from "this host cannot run it".
"""

from __future__ import annotations

REPAIR_COMMAND = "build-kernels build"


class RouterError(RuntimeError):
    """Base of the errors that are about the artifacts, the driver or the device."""


class ManifestError(RouterError):
    """The manifest is not what the schema says.

    `path` is where in the JSON (`kernels[1].launch.block`), `source` the file it came from.
    """

    def __init__(self, *, source: str, path: str, problem: str) -> None:
        self.source = source
        self.path = path
        self.problem = problem
        super().__init__(f"{source}: {path}: {problem}; rebuild it with `{REPAIR_COMMAND}`")


class ArtifactError(RouterError):
    """A file of the artifacts is missing, surplus, altered, or made for another architecture."""

    def __init__(self, *, file: str, problem: str) -> None:
        self.file = file
        self.problem = problem
        super().__init__(f"{file}: {problem}; repair it with `{REPAIR_COMMAND}`")


class NoKernelError(RouterError):
    """No artifact can run this problem on this GPU; the message lists every candidate and why."""


class DriverError(RouterError):
    """A CUDA driver call failed; the message names the call's purpose and the driver's code."""


class DriverMissingError(RouterError):
    """There is no usable CUDA driver, or no cuda.bindings package to reach it with."""
