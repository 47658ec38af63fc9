"""Read one side of a comparison: a folder, a wheel, or the tracked manifest of a git ref.

A manifest of another schema, or one whose parameters this runtime does not fill, can be compared
too. So its shape is checked here only as far as the comparison reads it.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from build_kernels.building.router_wheel import read_wheel
from build_kernels.errors import BuilderError
from build_kernels.git import GitError, NoGitError, git
from dsv4_router_runtime.artifacts.evidence import PASSED, STATUSES
from dsv4_router_runtime.artifacts.files import (
    MAX_CODE_BYTES,
    MAX_JSON_BYTES,
    read_file,
    reason_of,
)
from dsv4_router_runtime.artifacts.folder import EVIDENCE_NAME, MANIFEST_NAME
from dsv4_router_runtime.artifacts.json_reader import SHA256, JsonNode, read_json
from dsv4_router_runtime.artifacts.kernel import ARCHITECTURE
from dsv4_router_runtime.artifacts.manifest import SCHEMA_VERSION, parse_manifest
from dsv4_router_runtime.artifacts.parameter_schema import NAME
from dsv4_router_runtime.errors import CHECKOUT_FOLDER, ManifestError, printable

_EVIDENCE_SCHEMA = 1
_GIT_SECONDS = 60
_MAX_SHOWN = 300

Json = Any
Reader = Callable[[str, int], bytes | None]


class SideError(BuilderError):
    """A side of the comparison cannot be read; the message names it and the next step."""


@dataclass(frozen=True, kw_only=True)
class Standing:
    """What evidence shows on one rung: a status, such as "passed (quick)", by which checker."""

    status: str
    checker: str = ""
    gpus: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Side:
    """One side: the set's own members, its kernels by key, and their evidence by key and rung.

    cubin: returns a kernel's cubin, checked against the manifest's hash; None if it is not at hand.
    notes: what a reader has to know about this side that is no difference.
    """

    name: str
    members: Mapping[str, Json]
    kernels: Mapping[str, Mapping[str, Json]]
    evidence: Mapping[str, Mapping[str, Standing]]
    cubin: Callable[[str], bytes | None]
    notes: tuple[str, ...] = field(default=())


def read_side(place: str) -> Side:
    """Read a folder, a wheel or a git ref, tried in this order; SideError if it is none of them."""
    if not place:  # an unset variable of a shell looks so, and would be the current folder
        raise SideError('expected a folder, a wheel or a git ref (got "")')
    path = Path(place)
    if path.is_dir():
        return _side(f"folder {place}", _folder_reader(path))
    if path.exists():
        files = read_wheel(path)
        return _side(f"wheel {place}", lambda name, _: files.get(name))
    if place.endswith(".whl") or (os.sep in place and place.startswith((".", os.sep))):
        raise SideError(f"{printable(place, _MAX_SHOWN)}: there is no such file or folder")
    return _git_ref(place)


def _folder_reader(folder: Path) -> Reader:
    def read(name: str, most_bytes: int) -> bytes | None:
        try:
            return read_file(folder / name, most_bytes=most_bytes)
        except FileNotFoundError:
            return None
        except OSError as error:
            raise SideError(f"{folder / name}: cannot be read ({reason_of(error)})") from error

    return read


def _git_ref(ref: str) -> Side:
    """Read the manifest and the evidence that are tracked at `ref` of the current repository."""
    commit = _git("rev-parse", "--verify", "--quiet", "--end-of-options", f"{ref}^{{commit}}")
    if commit is None:
        raise SideError(
            f"{printable(ref, _MAX_SHOWN)}: no folder, no file, and no commit of the git "
            f"repository of {os.getcwd()}; a shallow clone lacks older ones (git fetch --unshallow)"
        )
    identity = commit.decode().strip()

    def read(name: str, _most_bytes: int) -> bytes | None:
        if not name.endswith(".json"):
            return None
        return _git("cat-file", "blob", f"{identity}:{CHECKOUT_FOLDER}/{name}")

    return _side(f"git ref {ref} ({identity[:10]})", read)


def _git(*arguments: str) -> bytes | None:
    """Return a git command's output; None if it fails, SideError if it cannot be run."""
    try:
        return git(*arguments, seconds=_GIT_SECONDS)
    except GitError:
        return None
    except NoGitError as error:
        raise SideError(f"git cannot be run to compare refs ({error})") from error


def _side(name: str, read: Reader) -> Side:
    name = printable(name, _MAX_SHOWN)
    text = read(MANIFEST_NAME, MAX_JSON_BYTES)
    if text is None:
        raise SideError(f"{name}: has no {MANIFEST_NAME}")
    source = f"{MANIFEST_NAME} of {name}"
    try:
        members, kernels = read_json(text, _manifest, source=source)
        notes = _refusal(text, source) if members["schema_version"] == SCHEMA_VERSION else ()
        stored, problem = _evidence_of(read(EVIDENCE_NAME, MAX_JSON_BYTES), name)
    except ManifestError as error:
        raise SideError(f"{error.source}: {error.path}: {error.problem}") from error
    evidence = {
        key: stored.get((entry["cubin_sha256"], entry["ptx_sha256"]), {})
        for key, entry in kernels.items()
    }

    def cubin(key: str) -> bytes | None:
        data = read(f"{key}.cubin", MAX_CODE_BYTES)
        if data is not None and hashlib.sha256(data).hexdigest() != kernels[key]["cubin_sha256"]:
            raise SideError(f"{name}: {key}.cubin is not the one that {MANIFEST_NAME} records")
        return data

    for key in kernels:
        cubin(key)  # the hashes that are compared are those of the bytes at hand
    return Side(
        name=name,
        members=members,
        kernels=kernels,
        evidence=evidence,
        cubin=cubin,
        notes=(*notes, *problem),
    )


def _refusal(text: bytes, source: str) -> tuple[str, ...]:
    """Return why the runtime beside this builder refuses the manifest, if it does."""
    try:
        parse_manifest(text, source=source)
    except ManifestError as error:
        return (f"the runtime here refuses {error.source}: {error.path}: {error.problem}",)
    return ()


def _manifest(node: JsonNode) -> tuple[dict[str, Json], dict[str, dict[str, Json]]]:
    """Return the members of the set, and its kernels by key."""
    _object(node)
    node.member("schema_version").integer(low=1)
    kernels: dict[str, dict[str, Json]] = {}
    for item in node.member("kernels").items("a list of kernels"):
        _object(item)
        kernel = item.member("name").string(NAME, "a kernel name (a-z, 0-9, _; at most 64)")
        arch = item.member("arch").string(ARCHITECTURE, "an architecture")
        for digest in ("cubin_sha256", "ptx_sha256"):
            item.member(digest).string(*SHA256)
        for part in ("problem", "launch", "resources"):
            _object(item.member(part))
        named = set()
        for parameter in item.member("parameters").items("a list of parameters"):
            name = _object(parameter).member("name").string(NAME, "a parameter's name")
            if name in named:
                raise parameter.error(f"a second parameter {name}")
            named.add(name)
        key = f"{kernel}.{arch}"
        if key in kernels:
            raise item.error(f"a second kernel {key}")
        kernels[key] = item.plain()
    return {key: node.member(key).plain() for key in node.value if key != "kernels"}, kernels


def _object(node: JsonNode) -> JsonNode:
    """Return the node; ManifestError unless it is an object with no key twice."""
    node.known_members()
    return node


_Evidence = dict[tuple[str, str], dict[str, Standing]]


def _evidence_of(text: bytes | None, name: str) -> tuple[_Evidence, tuple[str, ...]]:
    """Return what the evidence shows by a kernel's hashes, and a note if it cannot be compared."""
    if text is None:
        return {}, (f"{name} has no {EVIDENCE_NAME}",)

    def read(node: JsonNode) -> _Evidence | None:
        schema = _object(node).member("schema_version")
        if schema.value != _EVIDENCE_SCHEMA:
            return None
        entries = {}
        for item in node.member("evidence").items("a list of entries"):
            pair = tuple(
                _object(item).member(digest).string(*SHA256)
                for digest in ("cubin_sha256", "ptx_sha256")
            )
            rungs = item.member("rungs").mapping(_standing, keys=NAME)
            entries[pair[0], pair[1]] = dict(rungs)
        return entries

    found = read_json(text, read, source=f"{EVIDENCE_NAME} of {name}")
    if found is None:
        return {}, (f"evidence not compared: {EVIDENCE_NAME} of {name} has another schema",)
    return found, ()


def _standing(node: JsonNode) -> Standing:
    """Read a result of a rung; the builder's own reader refuses other rungs than today's."""
    status = _object(node).member("status").choice(STATUSES)
    gpus: set[str] = set()
    figures = node.member("figures")
    if status == PASSED and isinstance(figures.value, dict) and "records" in figures.value:
        for record in figures.member("records").items("a list of records"):
            gpus.add(_object(record).member("gpu").text("a GPU's name", _MAX_SHOWN))
    if node.value.get("applies") is False:
        status = "does not apply"
    elif status == PASSED and node.value.get("scope") == "quick":
        status = "passed (quick)"
    return Standing(
        status=status,
        checker=str(node.value.get("checker", "")),
        gpus=tuple(sorted(gpus)),
    )
