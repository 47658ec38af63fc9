"""Every exception this package raises on purpose, apart from TypeError and ValueError.

A wrong argument of a call is a TypeError (wrong kind of object or dtype) or a ValueError (anything
else about it). Everything that is wrong with the installation, the machine or the artifacts is a
`RouterError`, so that a server can tell "I called it wrongly" from "this host cannot run it".
"""

from __future__ import annotations

from pathlib import PurePath

# The folder inside an installed package that the wheel put the artifacts in.
WHEEL_FOLDER = "_artifacts"
BUILD_COMMAND = "build-kernels build"
REINSTALL_COMMAND = "pip install --force-reinstall dsv4-router"


def repair_command(file: str) -> str:
    """What makes `file` right again: a wheel's own files are installed, all others are built."""
    installed = WHEEL_FOLDER in PurePath(file).parts[-2:]
    return REINSTALL_COMMAND if installed else BUILD_COMMAND


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
        super().__init__(f"{source}: {path}: {problem}; repair it with `{repair_command(source)}`")


class ArtifactError(RouterError):
    """A file of the artifacts is missing, surplus, altered, or not what the manifest says."""

    def __init__(self, *, file: str, problem: str) -> None:
        self.file = file
        self.problem = problem
        super().__init__(f"{file}: {problem}; repair it with `{repair_command(file)}`")


class NoKernelError(RouterError):
    """No artifact can run this problem on this GPU, or this one cannot run on it at all.

    The message lists every candidate and why it was refused.
    """


class DriverError(RouterError):
    """A CUDA driver call failed; the message names the call's purpose and the driver's code."""


class DriverMissingError(RouterError):
    """There is no usable CUDA driver, or no cuda.bindings package to reach it with."""
