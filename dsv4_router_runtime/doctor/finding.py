"""A check's verdict: its status, the state found, the state needed, and the repair."""

from __future__ import annotations

import getpass
import re
import shlex
import socket
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from dsv4_router_runtime.device.facts import smi_option
from dsv4_router_runtime.errors import (
    ArtifactError,
    DriverError,
    ManifestError,
    RouterError,
    printable,
    repair_command,
)

OK, WARN, FAIL, SKIP = "OK", "WARN", "FAIL", "SKIP"
_EXIT_CODES = {OK: 0, SKIP: 0, WARN: 1, FAIL: 2}
_PACKAGE_PARENT = Path(__file__).resolve().parents[2]
RIGHT_OUTPUTS = "the reference's ids, and weights within 1e-5"
COMMAND = "python -m dsv4_router_runtime"


@dataclass(frozen=True, kw_only=True)
class Finding:
    """One line of doctor. A WARN or FAIL names the need and one next step."""

    check: str
    status: str
    found: str
    needed: str = ""
    repair: str = ""

    def __str__(self) -> str:
        needed = f"; needed: {self.needed}" if self.needed else ""
        repair = f"; repair: {self.repair}" if self.repair else ""
        text = f"{self.status:<4} {self.check}: {self.found}{needed}{repair}"
        return printable(text.replace("\n", " "))


def ok(check: str, found: str, needed: str = "") -> Finding:
    return Finding(check=check, status=OK, found=found, needed=needed)


def warn(check: str, found: str, *, needed: str, repair: str) -> Finding:
    return Finding(check=check, status=WARN, found=found, needed=needed, repair=repair)


def fail(check: str, found: str, *, needed: str, repair: str) -> Finding:
    return Finding(check=check, status=FAIL, found=found, needed=needed, repair=repair)


def skip(check: str, reason: str, repair: str = "") -> Finding:
    return Finding(check=check, status=SKIP, found=reason, repair=repair)


def guarded(check: str, look: Callable[[], Finding], *, needed: str, repair: str) -> Finding:
    """Return the finding of `look`; an error that it raises is a FAIL and stops no other check."""
    try:
        return look()
    except (ArtifactError, ManifestError) as error:
        return artifact_failure(check, error, needed=needed)
    except RouterError as error:
        if isinstance(error, DriverError) and error.code == "CUDA_ERROR_OUT_OF_MEMORY":
            return _no_memory(check, error)
        return fail(check, str(error), needed=needed, repair=repair)
    # Any other error is a fault of doctor or of a library: it is shown, with the checks after it.
    except Exception as error:
        found = f"{type(error).__name__}: {error}"
        repair = f"{COMMAND} doctor --report, and report it"
        if isinstance(error, ImportError):
            repair = "pip install --force-reinstall 'dsv4-router[torch]'"
        return fail(check, found, needed=needed, repair=repair)


def _no_memory(check: str, error: Exception) -> Finding:
    """Return the WARN of a check for which a server left no memory on the GPU."""
    needed = "about 1 GB of free GPU memory for the check"
    repair = "nvidia-smi, to find the process that holds the memory; check before the server starts"
    return warn(check, str(error), needed=needed, repair=repair)


def artifact_failure(check: str, error: ArtifactError | ManifestError, *, needed: str) -> Finding:
    """Return the FAIL of artifacts that cannot be used, with the error's own next step."""
    if isinstance(error, ManifestError):
        found = f"{error.source}: {error.path}: {error.problem}"
        repair = repair_command(error.source)
    else:
        found, command = f"{error.file}: {error.problem}", repair_command(error.file)
        repair = command if f"`{command}`" in error.next_step else error.next_step
    return fail(check, found, needed=needed, repair=repair)


def out_of_service(index: int) -> str:
    """Return the next step for a GPU that fails."""
    return f"nvidia-smi -q{smi_option(index)} shows its errors: take the GPU out of service"


def exit_code(findings: Iterable[Finding]) -> int:
    """Return 0 if nothing is wrong, 1 after a WARN, 2 after a FAIL."""
    return max((_EXIT_CODES[finding.status] for finding in findings), default=0)


def as_json(findings: Iterable[Finding]) -> dict[str, Any]:
    """Return the document of `doctor --json`."""
    findings = list(findings)
    return {"exit": exit_code(findings), "findings": [asdict(finding) for finding in findings]}


def without_names(text: str, folder: Path | None = None) -> str:
    """Take out of `text` every path outside the package, the user's name and the host's.

    Paths of the package and of a checkout's artifacts stay, relative to the package's parent.
    folder: the artifacts' folder, if the user named one; it may hold spaces.
    """
    if folder is not None:
        for shown in (shlex.quote(str(folder)), str(folder)):
            text = text.replace(shown, "<artifacts>")
    text = text.replace(f"{_PACKAGE_PARENT}/", "")
    text = re.sub(r"(['\"])~?/.*?\1", "<path>", text)
    # Two slashes after a colon are a URL's.
    text = re.sub(r"(?<![\w.>/])(?!(?<=:)//)~?/[^\s'\"`;:,()]+", "<path>", text)
    text = re.sub(r"\b(GPU|MIG)-[0-9a-f]{8}[0-9a-f/-]*", r"\1-<uuid>", text)
    for name, word in ((_user(), "<user>"), (socket.gethostname(), "<host>")):
        if name:
            text = re.sub(rf"(?<!\w){re.escape(name)}(?!\w)", word, text)
    return text


def _user() -> str:
    try:
        return getpass.getuser()
    # A container may run under a user id that has no name.
    except (OSError, KeyError, ImportError):
        return ""
