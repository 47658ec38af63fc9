"""One reader for every file: regular files only, bounded, and never waiting for anybody."""

from __future__ import annotations

import errno
import os
import socket
import threading
from pathlib import Path

import pytest
from watchdog import ends_within

from build_kernels.evidence.document import EvidenceError
from build_kernels.evidence.rungs.hardware import read_records
from build_kernels.evidence.store import Evidence, read_evidence, update_evidence
from build_kernels.files import replace_file
from dsv4_router_runtime.artifacts import files
from dsv4_router_runtime.artifacts.files import read_file
from dsv4_router_runtime.artifacts.folder import open_artifacts
from dsv4_router_runtime.errors import ArtifactError


def a_fifo(path: Path) -> None:
    os.mkfifo(path)


def a_directory(path: Path) -> None:
    path.mkdir()


def a_device(path: Path) -> None:
    path.symlink_to("/dev/zero")


def a_socket(path: Path) -> None:
    # The address of a socket has at most 107 bytes: named from its own folder.
    here = os.getcwd()
    os.chdir(path.parent)
    try:
        with socket.socket(socket.AF_UNIX) as listening:
            listening.bind(path.name)
    finally:
        os.chdir(here)


def a_sparse_gigabyte(path: Path) -> None:
    with path.open("wb") as file:
        file.truncate(2**30)


def a_loop(path: Path) -> None:
    path.symlink_to(path)


SPECIAL = [
    (a_fifo, "a FIFO, not a regular file"),
    (a_directory, "a directory, not a regular file"),
    (a_device, "a device, not a regular file"),
    (a_socket, "a socket, not a regular file"),
    (a_sparse_gigabyte, "1073741824 bytes; at most"),
    (a_loop, "Too many levels of symbolic links"),
]
each_special_file = pytest.mark.parametrize(
    ("make", "words"), SPECIAL, ids=[make.__name__ for make, _ in SPECIAL]
)


@each_special_file
def test_what_is_no_small_regular_file_is_refused_in_words(tmp_path, make, words):
    path = tmp_path / "file"
    make(path)
    with ends_within(5), pytest.raises(OSError, match=words):
        read_file(path, most_bytes=2**20)


@each_special_file
def test_a_manifest_that_is_no_small_regular_file(tmp_path, make, words):
    make(tmp_path / "manifest.json")
    with ends_within(5), pytest.raises(ArtifactError, match=rf"manifest\.json: cannot .*{words}"):
        open_artifacts(tmp_path)


@each_special_file
def test_a_cubin_that_is_no_small_regular_file(manifest, write_artifacts, make, words):
    folder = write_artifacts(manifest)
    kernel = manifest.kernels[0]
    (folder / kernel.file).unlink()
    make(folder / kernel.file)
    with ends_within(5), pytest.raises(ArtifactError, match=rf"\.cubin: cannot .*{words}"):
        open_artifacts(folder).read(kernel)


@each_special_file
@pytest.mark.parametrize("read", [read_evidence, read_records])
def test_evidence_that_is_no_small_regular_file(tmp_path, read, make, words):
    path = tmp_path / "evidence.json"
    make(path)
    with ends_within(5), pytest.raises(EvidenceError, match=rf"evidence\.json: cannot .*{words}"):
        read(path)


def test_a_lock_that_is_a_fifo_holds_nobody_up(tmp_path):
    folder = tmp_path / "artifacts"
    folder.mkdir()
    os.mkfifo(tmp_path / ".artifacts.evidence.json.lock")
    with ends_within(5):
        update_evidence(folder / "evidence.json", lambda known: known)
    assert read_evidence(folder / "evidence.json") == Evidence()


def test_a_file_is_read_whole_up_to_the_limit(tmp_path):
    path = tmp_path / "file"
    for size in (0, 1, 4096, 200_000):
        path.write_bytes(os.urandom(size))
        assert read_file(path, most_bytes=200_000) == path.read_bytes()
    path.write_bytes(bytes(200_001))
    with pytest.raises(OSError, match="200001 bytes; at most 200000") as caught:
        read_file(path, most_bytes=200_000)
    assert caught.value.errno == errno.EFBIG


def test_a_file_that_says_it_is_empty_is_bounded_all_the_same(tmp_path, monkeypatch):
    """Files of /proc state no size, and a file may grow while it is read."""
    path = tmp_path / "file"
    path.write_bytes(bytes(5000))
    stat = os.stat

    def stated_empty(status):
        return os.stat_result((*status[:6], 0, *status[7:10]))

    monkeypatch.setattr(files.os, "stat", lambda *a, **b: stated_empty(stat(*a, **b)))
    monkeypatch.setattr(files.os, "fstat", lambda fd: stated_empty(stat(fd)))
    assert read_file(path, most_bytes=5000) == bytes(5000)
    with pytest.raises(OSError, match="more than 4999 bytes; at most 4999"):
        read_file(path, most_bytes=4999)


def test_a_file_swapped_for_a_fifo_before_it_is_opened(tmp_path, monkeypatch):
    path = tmp_path / "file"
    path.write_bytes(b"good")
    opened = os.open

    def swapped(*arguments, **more):
        path.unlink()
        os.mkfifo(path)
        return opened(*arguments, **more)

    monkeypatch.setattr(files.os, "open", swapped)
    with ends_within(5), pytest.raises(OSError, match="a FIFO, not a regular file"):
        read_file(path, most_bytes=100)


def test_no_descriptor_is_left_open(tmp_path):
    path = tmp_path / "file"
    path.write_bytes(bytes(100))
    before = len(os.listdir("/proc/self/fd"))
    for most in (100, 99) * 50:
        try:
            read_file(path, most_bytes=most)
        except OSError:
            continue
    assert len(os.listdir("/proc/self/fd")) == before


def test_a_symbolic_link_to_a_regular_file_is_followed(manifest, write_artifacts, tmp_path):
    """Sets kept once and linked into place; the hash decides, wherever the bytes lie."""
    folder = write_artifacts(manifest)
    kernel = manifest.kernels[0]
    store = tmp_path / "store"
    (folder / kernel.file).rename(store)
    (folder / kernel.file).symlink_to(store)
    assert open_artifacts(folder).read(kernel) == store.read_bytes()


def test_the_limits_leave_room_for_what_is_built():
    artifacts = Path(__file__).parents[1] / "artifacts"
    for path in artifacts.iterdir():
        limit = files.MAX_JSON_BYTES if path.suffix == ".json" else files.MAX_CODE_BYTES
        assert path.stat().st_size * 10 < limit


def test_threads_may_read_at_once(tmp_path):
    path = tmp_path / "file"
    path.write_bytes(os.urandom(100_000))
    read: list[bytes] = []
    threads = [
        threading.Thread(target=lambda: read.append(read_file(path, most_bytes=100_000)))
        for _ in range(8)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert read == [path.read_bytes()] * 8


def test_a_replaced_file_keeps_its_mode(tmp_path):
    path = tmp_path / "evidence.json"
    path.write_bytes(b"old")
    path.chmod(0o640)
    replace_file(path, b"new")
    assert (path.read_bytes(), path.stat().st_mode & 0o777) == (b"new", 0o640)
    assert [item.name for item in tmp_path.iterdir()] == ["evidence.json"]


def test_a_write_that_breaks_off_leaves_the_old_file_alone(tmp_path, monkeypatch):
    path = tmp_path / "evidence.json"
    path.write_bytes(b"old")

    def half(partial: Path, data: bytes) -> int:
        with partial.open("wb") as file:
            file.write(data[:1])
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(partial))

    monkeypatch.setattr(Path, "write_bytes", half)
    with pytest.raises(OSError, match="No space left"):
        replace_file(path, b"new")
    assert path.read_bytes() == b"old"
    assert [item.name for item in tmp_path.iterdir()] == ["evidence.json"]
