"""Every planted difference of two folders of built files is found and named."""

from __future__ import annotations

import gzip
import io
import json
import shutil
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest

pytest.importorskip("click", reason="needs the builder")

from build_kernels.release.differences import Difference, compare_folders

CUBIN = bytes(range(256)) * 4
FILES = {
    "pkg/a.py": b"import os\n",
    "pkg/_artifacts/k.cubin": CUBIN,
    "pkg/_artifacts/manifest.json": b'{"kernels": [{"registers": 40}], "schema_version": 5}',
}
WHEEL, SDIST = "dist/p-1-py3-none-any.whl", "dist/p-1.tar.gz"
DATE = (2026, 1, 31, 12, 0, 0)


def wheel(files=FILES, *, date=DATE, mode=0o644, level=6, comment=b"") -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.comment = comment
        for name, data in files.items():
            info = zipfile.ZipInfo(name, date_time=date)
            info.external_attr = mode << 16
            archive.writestr(info, data, zipfile.ZIP_DEFLATED, level)
    return buffer.getvalue()


def sdist(files=FILES, *, mtime=7, stamp=7, mode=0o644, uid=0, owner="") -> bytes:
    buffer = io.BytesIO()
    with (
        gzip.GzipFile(fileobj=buffer, mode="wb", mtime=stamp) as packed,
        tarfile.open(fileobj=packed, mode="w", format=tarfile.PAX_FORMAT) as archive,
    ):
        for name, data in files.items():
            info = tarfile.TarInfo(name)
            info.size, info.mtime, info.mode = len(data), mtime, mode
            info.uid, info.uname = uid, owner
            archive.addfile(info, io.BytesIO(data))
    return buffer.getvalue()


def changed(data: bytes, place: int) -> bytes:
    return data[:place] + bytes([data[place] ^ 1]) + data[place + 1 :]


def other_files(name: str, data: bytes) -> dict[str, bytes]:
    return {**FILES, name: data}


BACKWARDS = dict(reversed(FILES.items()))
FEWER = {name: data for name, data in FILES.items() if name != "pkg/a.py"}
REGISTERS = FILES["pkg/_artifacts/manifest.json"].replace(b"40", b"41")
# (file, its other contents, None if it is missing) and (field, first, second).
PLANTED = {
    "a cubin's byte": ("artifacts/k.cubin", changed(CUBIN, 600),
        ("byte 600, the first of 1 (1024 and 1024 bytes)", "0x58", "0x59")),
    "a longer cubin": ("artifacts/k.cubin", CUBIN + b"\0",
        ("byte 1024, the first of 1 (1024 and 1025 bytes)", "missing", "0x00")),
    "an empty cubin": ("artifacts/k.cubin", b"",
        ("byte 0, the first of 1024 (1024 and 0 bytes)", "0x00", "missing")),
    "a cubin too few": ("artifacts/k.cubin", None, ("file", "there", "missing")),
    "a file too many": ("artifacts/new.ptx", b"", ("file", "missing", "there")),
    "a manifest's value": ("artifacts/manifest.json", REGISTERS,
        ("kernels[0].registers", "40", "41")),
    "a manifest's key": ("artifacts/manifest.json",
        b'{"kernels": [{"registers": 40}], "schema_version": 5, "new": {}}',
        ("new", "missing", "{}")),
    "a manifest's list": ("artifacts/manifest.json", b'{"kernels": [], "schema_version": 5}',
        ("kernels", '[{"registers": 40}]', "[]")),
    "a number written as another type": ("artifacts/manifest.json",
        b'{"kernels": [{"registers": 40.0}], "schema_version": 5}',
        ("kernels[0].registers", "40", "40.0")),
    "the same values with a blank more": ("artifacts/manifest.json",
        FILES["pkg/_artifacts/manifest.json"] + b" ",
        ("byte 53, the first of 1 (53 and 54 bytes)", "missing", "0x20")),
    "no JSON any more": ("artifacts/manifest.json", b'{"kernels": ',
        ("byte 12, the first of 41 (53 and 12 bytes)", "0x5b", "missing")),
    "a wheel's time stamp": (WHEEL, wheel(date=(2026, 1, 31, 12, 0, 2)),
        ("pkg/a.py: date", "2026-01-31 12:00:00", "2026-01-31 12:00:02")),
    "a wheel's order of members": (WHEEL, wheel(BACKWARDS),
        ("order of members, from number 1 of 3", "pkg/a.py", "pkg/_artifacts/manifest.json")),
    "a wheel's mode": (WHEEL, wheel(mode=0o600), ("pkg/a.py: mode", "0o644", "0o600")),
    "a wheel's member": (WHEEL, wheel(FEWER), ("pkg/a.py: member", "there", "missing")),
    "a wheel's comment": (WHEEL, wheel(comment=b"x"), ("comment", "", "78")),
    "a cubin's byte in a wheel": (WHEEL,
        wheel(other_files("pkg/_artifacts/k.cubin", changed(CUBIN, 9))),
        ("pkg/_artifacts/k.cubin: byte 9, the first of 1 (1024 and 1024 bytes)", "0x09", "0x08")),
    "a manifest's value in a wheel": (WHEEL,
        wheel(other_files("pkg/_artifacts/manifest.json", REGISTERS)),
        ("pkg/_artifacts/manifest.json: kernels[0].registers", "40", "41")),
    "an sdist's time stamp": (SDIST, sdist(mtime=8),
        ("pkg/a.py: date", "1970-01-01 00:00:07+00:00", "1970-01-01 00:00:08+00:00")),
    "a time stamp of gzip": (SDIST, sdist(stamp=9),
        ("gzip time", "1970-01-01 00:00:07+00:00", "1970-01-01 00:00:09+00:00")),
    "an sdist's order of members": (SDIST, sdist(BACKWARDS),
        ("order of members, from number 1 of 3", "pkg/a.py", "pkg/_artifacts/manifest.json")),
    "an sdist's mode": (SDIST, sdist(mode=0o600), ("pkg/a.py: mode", "0o644", "0o600")),
    "an sdist's owner": (SDIST, sdist(uid=7, owner="me"), ("pkg/a.py: owner", "0 ", "7 me")),
}  # fmt: skip


@pytest.fixture
def outputs(tmp_path: Path) -> tuple[Path, Path]:
    """Two folders with the same files."""
    first = tmp_path / "first"
    for name, data in {
        "artifacts/k.cubin": CUBIN,
        "artifacts/manifest.json": FILES["pkg/_artifacts/manifest.json"],
        WHEEL: wheel(),
        SDIST: sdist(),
    }.items():
        (first / name).parent.mkdir(parents=True, exist_ok=True)
        (first / name).write_bytes(data)
    return first, Path(shutil.copytree(first, tmp_path / "second"))


def test_the_same_files_have_no_difference(outputs) -> None:
    assert compare_folders(*outputs) == []


@pytest.mark.parametrize("name", PLANTED)
def test_a_planted_difference_is_found_and_named(outputs, name: str) -> None:
    file, data, (field, first, second) = PLANTED[name]
    place = outputs[1] / file
    if data is None:
        place.unlink()
    else:
        place.write_bytes(data)
    found = compare_folders(*outputs)
    assert found[0] == Difference(file=file, field=field, first=first, second=second)
    assert {each.file for each in found} == {file}


@pytest.mark.parametrize(
    ("file", "spoil"),
    [
        (WHEEL, lambda data: data[:-5]),
        (WHEEL, lambda data: changed(data, len(data) - 1)),
        (WHEEL, lambda data: wheel(level=1)),
        (WHEEL, lambda data: data.replace(b"a.py", b"\xff\xfe\xfd\xfc")),
        (SDIST, lambda data: data[:-5]),
        (SDIST, lambda data: changed(data, len(data) // 2)),
        (SDIST, lambda data: gzip.compress(b"no tar", mtime=7)),
    ],
)
def test_an_archive_that_is_broken_or_packed_otherwise_is_a_difference(
    outputs, file: str, spoil: Callable[[bytes], bytes]
) -> None:
    place = outputs[1] / file
    place.write_bytes(spoil(place.read_bytes()))
    found = compare_folders(*outputs)
    assert found
    assert {each.file for each in found} == {file}


def test_deep_json_is_a_difference(outputs) -> None:
    deep = json.loads('{"a": ' * 300 + "1" + "}" * 300)
    for folder, value in zip(outputs, (b"1", b"2"), strict=True):
        text = json.dumps(deep).encode().replace(b"1", value)
        (folder / "artifacts/manifest.json").write_bytes(text if value == b"1" else text * 200)
    assert compare_folders(*outputs)
