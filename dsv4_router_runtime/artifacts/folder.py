"""The built kernels on disk: where they are, that the set is whole, that the bytes are right.

A folder of artifacts is closed: it holds `manifest.json`, one cubin for each kernel it lists,
perhaps the PTX of each, `evidence.json` and the signed `manifest.dsse.json` beside them, and
nothing else (names that start with a dot are not looked at: a build in progress has its temporary
files there). The bytes that are hashed are the bytes that are handed to the driver, and nothing
switches the check off. Who made them is checked if a trust policy asks for it: see `trust`.
"""

from __future__ import annotations

import hashlib
import os
import struct
from dataclasses import dataclass, field, replace
from functools import lru_cache
from pathlib import Path

from dsv4_router_runtime.errors import CHECKOUT_FOLDER, WHEEL_FOLDER, ArtifactError, RouterError
from dsv4_router_runtime.version import checkout_settings

from .dsse import ENVELOPE_NAME
from .files import MAX_CODE_BYTES, MAX_JSON_BYTES, read_file, reason_of
from .kernel import Kernel, compute_capability
from .manifest import Manifest, parse_manifest
from .trust import TRUST_VARIABLE, Policy, Trust, asked_policies

MANIFEST_NAME = "manifest.json"
EVIDENCE_NAME = "evidence.json"

ELF_HEADER_BYTES = 64
ELF_MACHINE_CUDA = 190


@dataclass(frozen=True, kw_only=True)
class ArtifactSet:
    """A folder of artifacts whose manifest was read and whose file names were checked.

    trusted: the finding of each trust policy that was asked for.
    """

    folder: Path
    manifest: Manifest
    trusted: tuple[str, ...] = field(default=(), repr=False)

    def read(self, kernel: Kernel) -> bytes:
        """The kernel's cubin, its hash and architecture checked; ArtifactError if either is off."""
        file = _path(self.folder, kernel.file)
        try:
            cubin = _read(file, MAX_CODE_BYTES)
            check_cubin(kernel, cubin, file=file)
        except ArtifactError as error:
            if self._is_replaced():
                raise ArtifactError(
                    file=file,
                    problem=f"not of the set that was opened: {MANIFEST_NAME} beside it is another "
                    "by now",
                    next_step="open the folder again (a server: restart it)",
                ) from error
            raise
        return cubin

    def _is_replaced(self) -> bool:
        """Return whether the folder's manifest is a valid one of another set by now."""
        try:
            return _read_manifest(self.folder)[1] != self.manifest
        except RouterError:
            return False


def find_artifacts() -> Path:
    """The folder inside the installed package or, in a checkout, the one beside the package."""
    package = Path(__file__).resolve().parent.parent
    installed, built = package / WHEEL_FOLDER, package.parent / CHECKOUT_FOLDER
    checkout = checkout_settings(package.parent) is not None
    # Beside an installed package, site-packages/artifacts may belong to another package.
    for place in (installed, built) if checkout else (installed,):
        if place.is_dir():
            return place
    problem = f"no artifacts: neither {installed} nor {built} exists"
    if not checkout:
        problem = f"no artifacts: {installed} does not exist, and {package.parent} is no checkout"
    raise ArtifactError(file=str(built if checkout else installed), problem=problem)


def open_artifacts(
    folder: str | os.PathLike[str] | None = None, *, trust: Trust | None = None
) -> ArtifactSet:
    """Read `folder`'s manifest and check the set; None stands for `find_artifacts()`.

    That default set is opened once and kept for the process. A build under a running server leaves
    what is loaded as it was: those kernels go on running. A kernel that a later Router loads for
    the first time no longer has the hash that the kept manifest states, and is an ArtifactError:
    restart the server to take up the new build. A `folder` given is read anew by every call, and
    once more if another build was published into it meanwhile.

    trust: a policy that the set has to satisfy, as a path, a dict or the sha256 of a manifest. One
    in the environment variable DSV4_ROUTER_TRUST has to be satisfied as well. See `trust`.

    Symbolic links to files are followed, as the hashes decide; a FIFO, a device or a file beyond
    any artifact's size is an ArtifactError. Raises TypeError, ValueError, ArtifactError and
    ManifestError.
    """
    if folder is None and trust is None:
        return _default_artifacts(os.environ.get(TRUST_VARIABLE))
    policies = asked_policies(trust)
    if folder is None:
        return open_with(find_artifacts(), policies)
    if not isinstance(folder, str | os.PathLike):
        raise TypeError(
            f"folder: expected a str or os.PathLike, or None (got {type(folder).__name__})"
        )
    place = Path(folder)
    try:
        named = b"\0" not in os.fsencode(place)
    except UnicodeEncodeError:
        named = False
    if not named:
        got = f"{os.fspath(folder)!r:.80}"
        raise ValueError(f"folder: expected a path that a file system can hold (got {got})")
    return open_with(place, policies)


@lru_cache(maxsize=1)
def _default_artifacts(trust_variable: str | None) -> ArtifactSet:
    """Open the default set; under another value of the variable it is opened anew."""
    return open_with(find_artifacts(), asked_policies(None))


def open_with(folder: Path, policies: tuple[Policy, ...]) -> ArtifactSet:
    """Open the set in `folder` under these policies alone.

    It is read once more if a build was published meanwhile: the manifest of one set and the file
    names of another would be an error about neither.
    """
    for attempt in ("first", "last"):
        text = None
        try:
            text, manifest = _read_manifest(folder)
            artifacts = ArtifactSet(folder=folder, manifest=manifest)
            _check_closed(artifacts)
            artifacts = replace(artifacts, trusted=_trusted(artifacts, text, policies))
        except RouterError:
            if attempt == "last" or not _has_changed(folder, text):
                raise
            continue
        if attempt == "last" or not _has_changed(folder, text):
            break
    return artifacts


def subjects(manifest: Manifest, text: bytes) -> dict[str, str]:
    """Return the sha256 of the files that a signed statement has to name; text: the manifest's."""
    cubins = {kernel.file: kernel.cubin_sha256 for kernel in manifest.kernels}
    return {MANIFEST_NAME: hashlib.sha256(text).hexdigest()} | cubins


def _trusted(artifacts: ArtifactSet, text: bytes, policies: tuple[Policy, ...]) -> tuple[str, ...]:
    """Return the finding of each policy about the manifest that was parsed from `text`."""
    if not policies:
        return ()
    named = subjects(artifacts.manifest, text)
    digest = named[MANIFEST_NAME]
    return tuple(policy.check(artifacts.folder, digest, named) for policy in policies)


def _has_changed(folder: Path, text: bytes | None) -> bool:
    """Return whether the manifest is no longer `text`; None means it could not be read before."""
    try:
        return _read(_path(folder, MANIFEST_NAME), MAX_JSON_BYTES) != text
    except ArtifactError:
        return text is not None


def _read_manifest(folder: Path) -> tuple[bytes, Manifest]:
    file = _path(folder, MANIFEST_NAME)
    text = _read(file, MAX_JSON_BYTES)
    return text, parse_manifest(text, source=file)


def _read(file: str, most_bytes: int) -> bytes:
    try:
        return read_file(file, most_bytes=most_bytes)
    except OSError as error:
        raise ArtifactError(file=file, problem=f"cannot be read ({reason_of(error)})") from error


def _path(folder: Path, name: str) -> str:
    # Not folder / name: "./manifest.json" says that a folder was named, and which.
    return os.path.join(folder, name)


def _check_closed(artifacts: ArtifactSet) -> None:
    kernels = artifacts.manifest.kernels
    cubins = {kernel.file for kernel in kernels}
    known = {f"{kernel.key}.ptx" for kernel in kernels} | cubins
    known |= {MANIFEST_NAME, EVIDENCE_NAME, ENVELOPE_NAME}
    try:
        present = {name for name in os.listdir(artifacts.folder) if not name.startswith(".")}
    except OSError as error:
        problem = f"cannot be listed ({reason_of(error)})"
        raise ArtifactError(file=str(artifacts.folder), problem=problem) from error
    for index, kernel in enumerate(kernels):
        if kernel.file not in present:
            problem = f"missing; kernels[{index}].file of {MANIFEST_NAME} names it"
            raise ArtifactError(file=_path(artifacts.folder, kernel.file), problem=problem)
    for name in sorted(present - known):
        raise ArtifactError(
            file=_path(artifacts.folder, name),
            problem=f"surplus; no kernel of {MANIFEST_NAME} names it, so nothing vouches for it",
            next_step="move it out of the folder, which belongs to the artifacts alone",
        )


def check_cubin(kernel: Kernel, cubin: bytes, *, file: str) -> None:
    """Raise ArtifactError unless `cubin` has the sha256 and the architecture of `kernel`."""
    digest = hashlib.sha256(cubin).hexdigest()
    if digest != kernel.cubin_sha256:
        raise ArtifactError(
            file=file,
            problem=f"altered or truncated: sha256 of its {len(cubin)} bytes is {digest}, "
            f"cubin_sha256 of {kernel.key} in {MANIFEST_NAME} is {kernel.cubin_sha256}",
        )
    built_for = elf_compute_capability(cubin, file=file)
    if built_for != compute_capability(kernel.arch):
        raise ArtifactError(
            file=file,
            problem=f"made for another architecture: its ELF header says sm_{built_for}, "
            f"arch of {kernel.key} in {MANIFEST_NAME} is {kernel.arch}",
        )


def elf_compute_capability(cubin: bytes, *, file: str) -> int:
    """Return 10 * major + minor from a cubin's ELF header.

    Seen: toolkit 12.9 writes ABI 7 for sm_90a (e_flags 0x5a0d5a: the number in the low byte) and
    ABI 8 for sm_100a (0x600640a) and sm_103a (0x600670a): the number from bit 8 on. Toolkit 13
    writes ABI 8 for all (0x6005a04, 0x6006402, 0x6006702) and no longer tells sm_100a from sm_100f
    there; the suffix is left to the manifest, whose hash covers these bytes.
    """
    if len(cubin) < ELF_HEADER_BYTES or cubin[:5] != b"\x7fELF\x02":
        raise ArtifactError(file=file, problem=f"not a 64-bit ELF file ({len(cubin)} bytes)")
    (machine,) = struct.unpack_from("<H", cubin, 18)
    (flags,) = struct.unpack_from("<I", cubin, 48)
    abi = cubin[8]
    if machine != ELF_MACHINE_CUDA or abi not in (7, 8):
        problem = f"not a cubin this runtime knows (ELF machine {machine}, ABI version {abi})"
        raise ArtifactError(file=file, problem=problem)
    return flags & 0xFF if abi == 7 else flags >> 8 & 0xFF
