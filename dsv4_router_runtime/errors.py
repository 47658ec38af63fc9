"""Every exception this package raises on purpose, apart from TypeError and ValueError.

A wrong argument of a call is a TypeError (wrong kind of object or dtype) or a ValueError (anything
else about it). Everything that is wrong with the installation, the machine or the artifacts is a
`RouterError`, so that a server can tell "I called it wrongly" from "this host cannot run it".
"""

from __future__ import annotations

import os
import shlex
from pathlib import Path
from typing import Any

_PACKAGE = Path(__file__).resolve().parent
# The folder inside an installed package that the wheel put the artifacts in.
WHEEL_FOLDER = "_artifacts"
# The folder that a checkout builds into, beside the package.
CHECKOUT_FOLDER = "artifacts"
BUILD_COMMAND = "build-kernels build"
REINSTALL_COMMAND = "pip install --force-reinstall dsv4-router"

# Waiting for the interrupted call would be waiting for oneself.
INTERRUPTED_CALL = (
    "a Router was called from within another call on the same thread, by a finalizer (__del__) or "
    "a signal handler; nothing was launched: note the request there and route after that call"
)

# A message quotes files that anyone may have written: it stays short and printable.
MAX_FILE_SHOWN = 240
MAX_PROBLEM_SHOWN = 420


def repair_command(file: str) -> str:
    """Name the command that makes `file`, in a folder of artifacts or the folder itself, right.

    A wheel's own files are installed again; all others are built, with --artifacts unless the
    folder is the one of the checkout. A name without a folder comes from no file.
    """
    path = Path(file)
    folders = (path, path.parent)
    if any(folder.parts[-2:] == (_PACKAGE.name, WHEEL_FOLDER) for folder in folders):
        return REINSTALL_COMMAND
    checkout = str(_PACKAGE.parent / CHECKOUT_FOLDER)
    if os.sep not in file or checkout in map(os.path.abspath, folders):
        return BUILD_COMMAND
    folder = shlex.quote(printable(str(path.parent)))
    return f"{BUILD_COMMAND} --artifacts {folder if len(folder) <= MAX_FILE_SHOWN else 'FOLDER'}"


def printable(text: str, most: int | None = None) -> str:
    """Escape unprintable characters, and cut the middle out of a text of more than `most`."""
    if not text.isprintable():
        text = "".join(
            char if char.isprintable() else char.encode("unicode_escape").decode() for char in text
        )
    if most is None or len(text) <= most:
        return text
    return f"{text[: most // 2 - 3]} ... {text[3 - most // 2 :]}"


class RouterError(RuntimeError):
    """Base of the errors that are about the artifacts, the driver or the device.

    An error comes out of pickle, copy and deepcopy whole: message, attributes and cause. So it
    reaches the parent of a worker process as it was raised.
    """

    # BaseException would call the constructor with the message alone, which an error with
    # keyword-only parameters refuses: in the process that receives it, where a pool then breaks.
    def __reduce__(self) -> tuple[Any, ...]:
        # The order counts: setting the cause sets the flag too.
        state = {
            **vars(self),
            "__cause__": self.__cause__,
            "__suppress_context__": self.__suppress_context__,
        }
        return _new_error, (type(self), self.args), state


def _new_error(kind: type[RouterError], args: tuple[Any, ...]) -> RouterError:
    return kind.__new__(kind, *args)


class ManifestError(RouterError):
    """The manifest does not fit the schema.

    `path` is where in the JSON (`kernels[1].launch.block`), `source` the file it came from.
    """

    def __init__(self, *, source: str, path: str, problem: str) -> None:
        self.source = source
        self.path = path
        self.problem = problem
        place = f"{printable(source, MAX_FILE_SHOWN)}: {printable(path, MAX_FILE_SHOWN // 2)}"
        shown = printable(problem, MAX_PROBLEM_SHOWN)
        super().__init__(f"{place}: {shown}; repair it with `{repair_command(source)}`")


class ArtifactError(RouterError):
    """A file of the artifacts is missing, surplus, altered, or another than the manifest's.

    `next_step`: the repair, if it is not to build or install again.
    """

    def __init__(self, *, file: str, problem: str, next_step: str | None = None) -> None:
        self.file = file
        self.problem = problem
        self.next_step = next_step or f"repair it with `{repair_command(file)}`"
        place, shown = printable(file, MAX_FILE_SHOWN), printable(problem, MAX_PROBLEM_SHOWN)
        super().__init__(f"{place}: {shown}; {self.next_step}")


class TrustError(ArtifactError):
    """A trust policy refuses the artifacts, or cannot be used itself."""


class NoKernelError(RouterError):
    """No artifact can run this problem on this GPU, or this one cannot run on it at all.

    The message lists every candidate and why it was refused.
    """


class _DriverAnswerError(RouterError):
    """The driver answered with an error. code: its name, as CUDA_ERROR_NO_DEVICE; "" if none."""

    def __init__(self, message: str, *, code: str = "") -> None:
        self.code = code
        super().__init__(message)


class DriverError(_DriverAnswerError):
    """A CUDA driver call failed; the message names the call's purpose and the driver's code."""


class DriverTooOldError(RouterError):
    """The CUDA driver, or the package cuda.bindings, is older than the kernels need."""


class DriverMissingError(_DriverAnswerError):
    """There is no usable CUDA driver, or no cuda.bindings package to reach it with."""
