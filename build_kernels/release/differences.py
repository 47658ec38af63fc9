"""Compare the files of two folders; of archives name the member and the field that differ."""

from __future__ import annotations

import io
import json
import tarfile
import zipfile
import zlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from itertools import zip_longest
from pathlib import Path
from typing import Any

Facts = Mapping[str, str]
_BROKEN = (zipfile.BadZipFile, tarfile.TarError, zlib.error, EOFError, OSError, ValueError)
_SHOWN = 80  # characters of a value
_MISSING = "missing"


@dataclass(frozen=True, kw_only=True)
class Difference:
    """One field in which a file of two folders differs. field: with the members that lead to it."""

    file: str
    field: str
    first: str
    second: str


@dataclass(frozen=True, kw_only=True)
class _Archive:
    facts: Facts
    members: Mapping[str, tuple[Facts, bytes]]


def compare_folders(first: Path, second: Path) -> list[Difference]:
    """Return each difference of the files in two folders and in folders below."""
    names = [
        {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}
        for folder in (first, second)
    ]
    found = []
    for name in sorted(names[0] | names[1]):
        if name not in names[0] & names[1]:
            there = ["there" if name in each else _MISSING for each in names]
            fields = [("file", *there)]
        else:
            fields = list(_of_bytes((first / name).read_bytes(), (second / name).read_bytes()))
        found += [Difference(file=name, field=f, first=a, second=b) for f, a, b in fields]
    return found


def _of_bytes(first: bytes, second: bytes) -> Iterator[tuple[str, str, str]]:
    """Yield (field, first value, second value); nothing for equal bytes, else something."""
    if first == second:
        return
    found = []
    archive, other = _read_archive(first), _read_archive(second)
    if archive and other:
        found = list(_of_archives(archive, other))
    elif first[:1] == second[:1] == b"{":
        try:
            found = list(_of_values("", json.loads(first), json.loads(second)))
        except (ValueError, RecursionError):
            found = []
    # Also where an archive's own bytes differ and no member does.
    yield from found or [_first_byte(first, second)]


def _of_archives(first: _Archive, second: _Archive) -> Iterator[tuple[str, str, str]]:
    yield from _of_facts("", first.facts, second.facts)
    both = [name for name in first.members if name in second.members]
    for name in sorted(first.members.keys() ^ second.members.keys()):
        there = ["there" if name in each.members else _MISSING for each in (first, second)]
        yield (f"{name}: member", there[0], there[1])
    order = [name for name in second.members if name in first.members]
    for index, (one, other) in enumerate(zip(both, order, strict=True)):
        if one != other:
            yield (f"order of members, from number {index + 1} of {len(both)}", one, other)
            break
    for name in both:
        (facts, data), (other_facts, other_data) = first.members[name], second.members[name]
        yield from _of_facts(f"{name}: ", facts, other_facts)
        for field, a, b in _of_bytes(data, other_data):
            yield (f"{name}: {field}", a, b)


def _of_facts(prefix: str, first: Facts, second: Facts) -> Iterator[tuple[str, str, str]]:
    for field in {**first, **second}:
        a, b = first.get(field, _MISSING), second.get(field, _MISSING)
        if a != b:
            yield (prefix + field, a, b)


def _of_values(path: str, first: Any, second: Any) -> Iterator[tuple[str, str, str]]:
    """Yield the keys of two JSON values at which they differ."""
    if isinstance(first, dict) and isinstance(second, dict):
        for key in {**first, **second}:
            below = f"{path}.{key}" if path else key
            if key in first and key in second:
                yield from _of_values(below, first[key], second[key])
            elif key in first:
                yield (below, _value(first[key]), _MISSING)
            else:
                yield (below, _MISSING, _value(second[key]))
    elif isinstance(first, list) and isinstance(second, list) and len(first) == len(second):
        for index, (a, b) in enumerate(zip_longest(first, second)):
            yield from _of_values(f"{path}[{index}]", a, b)
    elif json.dumps(first) != json.dumps(second):
        yield (path, _value(first), _value(second))


def _value(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= _SHOWN else f"{text[:_SHOWN]}..."


def _first_byte(first: bytes, second: bytes) -> tuple[str, str, str]:
    pairs = list(zip_longest(first, second))
    places = [index for index, (a, b) in enumerate(pairs) if a != b]
    shown = [_MISSING if byte is None else f"{byte:#04x}" for byte in pairs[places[0]]]
    sizes = f"{len(first)} and {len(second)} bytes"
    return (f"byte {places[0]}, the first of {len(places)} ({sizes})", shown[0], shown[1])


def _read_archive(data: bytes) -> _Archive | None:
    """Read a wheel or a .tar.gz; None for anything else, and for a broken one."""
    try:
        if data.startswith(b"PK"):
            return _read_zip(data)
        return _read_tar(data) if data.startswith(b"\x1f\x8b") else None
    except _BROKEN:
        return None


def _read_zip(data: bytes) -> _Archive:
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        members = {}
        for info in archive.infolist():
            facts = {
                "date": str(datetime(*info.date_time)),
                "mode": oct(info.external_attr >> 16),
                "attributes": hex(info.external_attr & 0xFFFF),
                "system": str(info.create_system),
                "compression": str(info.compress_type),
                "extra": info.extra.hex(),
            }
            members[info.filename] = (facts, archive.read(info))
        return _Archive(facts={"comment": archive.comment.hex()}, members=members)


def _read_tar(data: bytes) -> _Archive:
    # RFC 1952: the time is in bytes 4 to 7, the flags in byte 3.
    facts = {
        "gzip time": _date(int.from_bytes(data[4:8], "little")),
        "gzip flags": str(data[3]),
    }
    with tarfile.open(fileobj=io.BytesIO(data), mode="r:gz") as archive:
        members = {}
        for info in archive:
            file = archive.extractfile(info)
            fields = {
                "date": _date(info.mtime),
                "mode": oct(info.mode),
                "owner": f"{info.uid} {info.uname}",
                "group": f"{info.gid} {info.gname}",
                "type": info.type.decode(),
                "link": info.linkname,
                "headers": str(sorted(info.pax_headers.items())),
            }
            members[info.name] = (fields, file.read() if file else b"")
        return _Archive(facts=facts, members=members)


def _date(seconds: float) -> str:
    return str(datetime.fromtimestamp(seconds, UTC))
