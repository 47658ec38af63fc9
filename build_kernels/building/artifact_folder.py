"""Tell the files that a build made from strangers.

A build replaces and removes files of the set only: manifest.json with its signatures,
evidence.json, the cubins and the PTX that this version's specs name, and those that the manifest in
the folder vouches for, name and hash. If no manifest vouches for any, one that differs from the
build's is not replaced.
Names that start with a dot belong to editors, notebooks and desktops: they are ignored.
Everything else is a stranger, and a folder with a stranger in it is refused as a whole.
"""

from __future__ import annotations

import json
import os
import re
import stat
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from build_kernels.errors import BuilderError
from dsv4_router_runtime.artifacts.dsse import ENVELOPE_NAME
from dsv4_router_runtime.artifacts.folder import EVIDENCE_NAME, MANIFEST_NAME

from .entry import sha256

_SHOWN_STRANGERS = 5
# Far above a build's files (0.14 MB of manifest, 0.13 MB of PTX): a larger file is not read.
_MAX_FILE_BYTES = 16 * 2**20
# The names that a build has given to cubins and PTX, whatever the manifest's schema was.
_KERNEL_FILE = re.compile(r"[a-z][a-z0-9_]*\.sm_[0-9]+[af]?\.(cubin|ptx)")
# How `serialise_manifest` begins every text, also one that was cut off or conflicts.
_OUR_BEGINNING = b'{\n "kernels": ['


class PlaceError(BuilderError):
    """The artifacts cannot be in the requested folder; the message names the obstacle."""


@dataclass(frozen=True, kw_only=True)
class Contents:
    """The entries of a folder, sorted by origin.

    made: plain files that a build made. dotted: names that start with a dot. strangers: all others,
    as printed in messages. identity: device and inode of the folder, None if there is no folder.
    manifest: the bytes of manifest.json, None if there is no such file.
    """

    identity: tuple[int, int] | None = None
    made: frozenset[str] = frozenset()
    dotted: frozenset[str] = frozenset()
    strangers: tuple[str, ...] = ()
    manifest: bytes | None = None

    def surplus(self, wanted: Collection[str]) -> tuple[str, ...]:
        """Return the kernels' and signatures' files that are not `wanted`, sorted."""
        return tuple(sorted(self.made - {MANIFEST_NAME, EVIDENCE_NAME} - set(wanted)))


def resolve_folder(folder: Path) -> Path:
    """Return the folder that a path leads to; PlaceError if it cannot be a folder of artifacts.

    A symbolic link is followed, so that it stays a link. A dangling link is refused: its target may
    be on a volume that is not mounted now.
    """
    for link in (folder, *folder.parents):
        if link.is_symlink() and not link.exists():
            raise PlaceError(
                f"cannot build {folder}: {link} is a symbolic link to {os.readlink(link)}, which "
                "is not there; make that folder, or remove the link"
            )
    try:
        path = Path(os.path.realpath(folder))
    except FileNotFoundError as error:
        raise PlaceError(f"cannot build {folder}: the current folder is gone") from error
    if path.exists() and not path.is_dir():
        raise PlaceError(f"cannot build {folder}: it is not a folder")
    return path


def read_contents(folder: Path, named: Collection[str]) -> Contents:
    """Sort a folder's entries; `named` are the cubins and PTX of this version's specs."""
    try:
        with os.scandir(folder) as entries:
            found = sorted(entries, key=lambda entry: entry.name)
        info = folder.stat()
    except (FileNotFoundError, NotADirectoryError):
        return Contents()
    except OSError as error:
        raise PlaceError(f"cannot build {folder}: it cannot be read ({error.strerror})") from error
    dotted = {entry.name for entry in found if entry.name.startswith(".")}
    manifest = read_plain(folder / MANIFEST_NAME)
    vouched = vouched_files(manifest or b"")
    ours = manifest is not None and _is_ours(manifest)
    made, strangers = set(), []
    for entry in found:
        name = entry.name
        if name in dotted:
            continue
        if not entry.is_file(follow_symlinks=False):
            strangers.append(_shown(entry))
        elif (
            name in (EVIDENCE_NAME, ENVELOPE_NAME)
            or (name == MANIFEST_NAME and ours)
            or (name in named and (ours or manifest is None))
            or (name in vouched and file_sha256(folder / name) == vouched[name])
        ):
            made.add(name)
        elif name == MANIFEST_NAME and manifest is None:
            strangers.append(f"{name} (it cannot be read)")
        else:
            strangers.append(_shown(entry))
    return Contents(
        identity=(info.st_dev, info.st_ino),
        made=frozenset(made),
        dotted=frozenset(dotted),
        strangers=tuple(strangers),
        manifest=manifest,
    )


def check_contents(folder: Path, contents: Contents) -> None:
    """Refuse a folder with strangers: PlaceError names the first few of them."""
    if not contents.strangers:
        return
    shown = ", ".join(contents.strangers[:_SHOWN_STRANGERS])
    more = len(contents.strangers) - _SHOWN_STRANGERS
    if more > 0:
        shown += f" and {more} more"
    old = any(map(_KERNEL_FILE.fullmatch, contents.strangers))
    hint = " (cubins and PTX of another version of this tool: delete them)" if old else ""
    raise PlaceError(
        f"cannot build {folder}: it holds what no build made: {shown}. A set of artifacts has its "
        f"folder to itself: move them elsewhere{hint}, or name another folder with "
        "--artifacts FOLDER"
    )


def check_replaced(folder: Path, contents: Contents, files: Mapping[str, bytes]) -> None:
    """Refuse to replace a file that no manifest vouches for by other bytes of the same name.

    A build that was killed before it wrote a first manifest left the same bytes.
    """
    if contents.manifest is not None:
        return
    for name in sorted(contents.made & files.keys()):
        if read_plain(folder / name) != files[name]:
            raise PlaceError(
                f"cannot build {folder}: {name} is not what this build makes, and no "
                f"{MANIFEST_NAME} there lists it. Move it elsewhere, delete it if a build made it, "
                "or name another folder with --artifacts FOLDER"
            )


def vouched_files(manifest: bytes) -> Mapping[str, str]:
    """Return sha256 by file name for the cubins and PTX that a manifest of any schema lists."""
    try:
        kernels = json.loads(manifest)["kernels"]
        return dict(pair for entry in kernels for pair in _files_of(entry))
    except (ValueError, TypeError, KeyError, RecursionError):
        return {}


def _files_of(entry: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    for kind in ("cubin", "ptx"):
        name = f"{entry['name']}.{entry['arch']}.{kind}"
        if _KERNEL_FILE.fullmatch(name):
            yield name, str(entry[f"{kind}_sha256"])


def file_sha256(path: Path) -> str | None:
    """Return a plain file's digest, None if there is none or it cannot be read."""
    data = read_plain(path)
    return None if data is None else sha256(data)


def is_plain(path: Path) -> bool:
    """Return whether it is a file, and neither a link to one nor anything else."""
    try:
        return stat.S_ISREG(path.lstat().st_mode)
    except OSError:
        return False


def read_plain(path: Path) -> bytes | None:
    """Return a plain file's bytes, None if it is anything else, too large, or cannot be read."""
    try:
        if not is_plain(path) or path.lstat().st_size > _MAX_FILE_BYTES:
            return None
        return path.read_bytes()
    except OSError:
        return None


def _is_ours(manifest: bytes) -> bool:
    """Return whether it is a manifest of artifacts, of any schema, or the rest of one."""
    try:
        document = json.loads(manifest)
    except (ValueError, RecursionError):
        return not manifest.strip() or _OUR_BEGINNING in manifest
    if not isinstance(document, dict) or not isinstance(document.get("kernels"), list):
        return False
    described = all(
        isinstance(kernel, dict) and "cubin_sha256" in kernel for kernel in document["kernels"]
    )
    return described and isinstance(document.get("schema_version"), int)


def _shown(entry: os.DirEntry[str]) -> str:
    name = entry.name if entry.name.isprintable() else repr(entry.name)[1:-1]
    if entry.is_symlink():
        return f"{name} (a symbolic link)"
    return f"{name}/" if entry.is_dir(follow_symlinks=False) else name
