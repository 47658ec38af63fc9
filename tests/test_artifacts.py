"""A folder of artifacts is whole and unaltered, or an error names the file and the repair."""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import struct
import threading
from dataclasses import replace

import pytest
from conftest import cubin_bytes

from dsv4_router_runtime import errors
from dsv4_router_runtime.artifacts import folder as artifacts_module
from dsv4_router_runtime.artifacts.folder import (
    elf_compute_capability,
    find_artifacts,
    open_artifacts,
)
from dsv4_router_runtime.artifacts.manifest import cubin_name, serialise_manifest
from dsv4_router_runtime.errors import ArtifactError, ManifestError, RouterError

BUILD, REINSTALL = "build-kernels build", "pip install --force-reinstall dsv4-router"


@pytest.fixture
def folder(manifest, write_artifacts):
    return write_artifacts(manifest)


def refused(folder, kernel=None, step=None) -> str:
    """The message with which opening `folder`, or reading one kernel of it, is refused."""
    step = step or f"repair it with `{BUILD} --artifacts {folder}`"

    def open_and_read():
        opened = open_artifacts(folder)
        opened.read(opened.manifest.kernels[kernel])

    with pytest.raises(ArtifactError) as caught:
        open_and_read()
    assert str(caught.value).endswith(f"; {step}")
    return str(caught.value)


def test_every_kernel_of_a_good_folder_is_read(folder, manifest):
    opened = open_artifacts(folder)
    assert opened.manifest == manifest
    for kernel in opened.manifest.kernels:
        assert opened.read(kernel) == (folder / kernel.file).read_bytes()


def test_known_neighbours_are_allowed(folder, manifest):
    (folder / f"{manifest.kernels[0].key}.ptx").write_text("")
    (folder / "evidence.json").write_text("{}")
    (folder / ".build-1234").mkdir()
    open_artifacts(str(folder))


def test_missing_cubin(folder):
    (folder / "router_topk.sm_90a.cubin").unlink()
    message = refused(folder)
    assert "router_topk.sm_90a.cubin: missing; kernels[31].file of manifest.json" in message


@pytest.mark.parametrize(
    "name",
    [
        "router_old.sm_90a.cubin",
        "router_old.sm_90a.ptx",
        "notes.txt",
        "manifest.json.tmp",
        "x.json",
        "router_topk.sm_90a.json",
    ],
)
def test_surplus_file(folder, name):
    (folder / name).write_bytes(b"")
    """A build refuses a folder of strangers too, so it is no repair."""
    step = "move it out of the folder, which belongs to the artifacts alone"
    assert f"{name}: surplus" in refused(folder, step=step)


def test_truncated_cubin(folder, manifest):
    path = folder / manifest.kernels[2].file
    path.write_bytes(path.read_bytes()[:-1])
    message = refused(folder, 2)
    assert str(path) in message
    assert "altered or truncated" in message
    assert "cubin_sha256 of router_decode_emajor_n64.sm_100a in manifest.json" in message


def test_one_flipped_bit(folder, manifest):
    path = folder / manifest.kernels[2].file
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    assert "altered or truncated: sha256 of its" in refused(folder, 2)


@pytest.mark.parametrize("digit", [0, 7, 8, 32, 63])
def test_every_digit_of_the_hash_counts(manifest, write_artifacts, change, digit):
    right = manifest.kernels[0].cubin_sha256
    wrong = right[:digit] + ("0" if right[digit] != "0" else "1") + right[digit + 1 :]
    folder = write_artifacts(change(manifest, 0, cubin_sha256=wrong))
    assert "altered or truncated" in refused(folder, 0)


def test_bytes_are_hashed_at_every_read(folder, manifest):
    opened = open_artifacts(folder)
    kernel = opened.manifest.kernels[0]
    opened.read(kernel)
    (folder / kernel.file).write_bytes(b"other")
    with pytest.raises(ArtifactError, match="altered"):
        opened.read(kernel)


def test_cubin_that_vanished_after_opening(folder):
    opened = open_artifacts(folder)
    (folder / opened.manifest.kernels[0].file).unlink()
    with pytest.raises(ArtifactError, match="cannot be read"):
        opened.read(opened.manifest.kernels[0])


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (cubin_bytes("sm_103a"), "its ELF header says sm_103, arch of"),
        (cubin_bytes("sm_90a"), "its ELF header says sm_90, arch of"),
        (b"not an ELF file" * 8, "not a 64-bit ELF file (120 bytes)"),
        (cubin_bytes("sm_100a")[:63], "not a 64-bit ELF file (63 bytes)"),
        (cubin_bytes("sm_100a").replace(b"\xbe\x00", b"\x3e\x00", 1), "ELF machine 62"),
    ],
)
def test_wrong_architecture_under_a_right_hash(manifest, write_artifacts, change, content, message):
    """The driver would take a cubin for another architecture and fail only at launch."""
    kernel = manifest.kernels[0]
    assert kernel.arch == "sm_100a"
    digest = hashlib.sha256(content).hexdigest()
    folder = write_artifacts(change(manifest, 0, cubin_sha256=digest))
    (folder / kernel.file).write_bytes(content)
    assert message in refused(folder, 0)


@pytest.mark.parametrize(
    ("flags", "abi", "capability"),
    [
        (0x005A0D5A, 7, 90),
        (0x06005A04, 8, 90),
        (0x0600640A, 8, 100),
        (0x06006402, 8, 100),
        (0x0600670A, 8, 103),
        (0x06006702, 8, 103),
    ],
)
def test_elf_flags_as_measured(flags, abi, capability):
    header = bytearray(cubin_bytes("sm_90a"))
    header[8] = abi
    struct.pack_into("<I", header, 48, flags)
    assert elf_compute_capability(bytes(header), file="x") == capability


@pytest.mark.parametrize("abi", [0, 6, 9])
def test_unknown_elf_abi(abi):
    """Where the number lies in the flags differs from ABI to ABI: none is guessed."""
    header = bytearray(cubin_bytes("sm_90a"))
    header[8] = abi
    with pytest.raises(ArtifactError, match=rf"not a cubin this .*ABI version {abi}\)"):
        elf_compute_capability(bytes(header), file="x")


def test_no_manifest(tmp_path):
    message = refused(tmp_path)
    assert str(tmp_path / "manifest.json") in message
    assert "cannot be read" in message


def test_bad_manifest_names_the_file(folder):
    (folder / "manifest.json").write_text('{"schema_version": 7}')
    with pytest.raises(ManifestError, match=r"artifacts/manifest.json: schema_version: expected 5"):
        open_artifacts(folder)


@pytest.mark.parametrize("inside", [True, False])
def test_found_in_a_package_and_in_a_checkout(tmp_path, monkeypatch, inside):
    package = tmp_path / "dsv4_router_runtime"
    place = package / "_artifacts" if inside else tmp_path / "artifacts"
    (tmp_path / "pyproject.toml").write_text('[project]\nname = "dsv4-router"\n')
    package.mkdir()
    place.mkdir()
    monkeypatch.setattr(artifacts_module, "__file__", str(package / "artifacts" / "folder.py"))
    assert find_artifacts() == place


@pytest.mark.parametrize("checkout", [True, False])
def test_found_nowhere(tmp_path, monkeypatch, checkout):
    if checkout:
        (tmp_path / "pyproject.toml").write_text('[project]\nname = "dsv4-router"\n')
    package = tmp_path / "dsv4_router_runtime"
    monkeypatch.setattr(artifacts_module, "__file__", str(package / "artifacts" / "folder.py"))
    monkeypatch.setattr(errors, "_PACKAGE", package)
    with pytest.raises(ArtifactError, match="no artifacts: ") as caught:
        find_artifacts()
    assert str(caught.value).endswith(f"; repair it with `{BUILD if checkout else REINSTALL}`")


@pytest.mark.parametrize("settings", [None, "", '[project]\nname = "other"\n', b"\xff"])
def test_the_artifacts_of_another_package_are_not_ours(tmp_path, monkeypatch, settings):
    """site-packages/artifacts belongs to whoever installed it, pyproject.toml or not."""
    (tmp_path / "artifacts").mkdir()
    if settings is not None:
        data = settings if isinstance(settings, bytes) else settings.encode()
        (tmp_path / "pyproject.toml").write_bytes(data)
    package = tmp_path / "dsv4_router_runtime"
    monkeypatch.setattr(artifacts_module, "__file__", str(package / "artifacts" / "folder.py"))
    with pytest.raises(ArtifactError, match=f"{tmp_path} is no checkout"):
        find_artifacts()


def remove_a_cubin(folder):
    (folder / "router_topk.sm_90a.cubin").unlink()


def alter_a_cubin(folder):
    (folder / "router_decode_emajor_n32.sm_100a.cubin").write_bytes(b"")


def remove_the_manifest(folder):
    (folder / "manifest.json").unlink()


def spoil_the_manifest(folder):
    (folder / "manifest.json").write_text("{}")


@pytest.mark.parametrize(("wheel", "command"), [(False, BUILD), (True, REINSTALL)])
@pytest.mark.parametrize(
    "damage", [remove_a_cubin, alter_a_cubin, remove_the_manifest, spoil_the_manifest]
)
def test_a_wheel_is_installed_again_and_a_checkout_built_again(
    folder, monkeypatch, wheel, command, damage
):
    """There is no compiler beside an installed wheel, and its files are pip's to write."""
    package = folder.parent / "dsv4_router_runtime"
    package.mkdir()
    monkeypatch.setattr(errors, "_PACKAGE", package)
    place = folder.rename(package / "_artifacts") if wheel else folder
    damage(place)

    def open_and_read():
        opened = open_artifacts(place)
        opened.read(opened.manifest.kernels[0])

    with pytest.raises(RouterError) as caught:
        open_and_read()
    assert str(caught.value).endswith(f"; repair it with `{command}`")


@pytest.mark.parametrize("folder", [3, b"artifacts", True])
def test_what_is_no_folder(folder):
    got = type(folder).__name__
    with pytest.raises(TypeError, match=rf"folder: expected a str .*\(got {got}\)"):
        open_artifacts(folder)


@pytest.mark.parametrize("folder", ["a\0b", "a\ud800b"])
def test_a_folder_that_no_file_system_can_hold(folder):
    with pytest.raises(ValueError, match="folder: expected a path that a file system can hold"):
        open_artifacts(folder)


def test_a_folder_that_vanishes_or_may_not_be_listed(folder, monkeypatch):
    def refused(path):
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(artifacts_module.os, "listdir", refused)
    with pytest.raises(ArtifactError, match=r"cannot be listed \(Permission denied\)"):
        open_artifacts(folder)


# ---------------------------------------------------------------- a build published meanwhile


@pytest.fixture
def next_set(manifest, folder, tmp_path):
    """A set of other names and other bytes, beside `folder`, that a build would publish into it."""
    kernels = []
    place = tmp_path / "next"
    place.mkdir()
    for kernel in manifest.kernels[::2]:
        name = f"{kernel.name}_v2" if kernel.name == "router_topk" else kernel.name
        content = cubin_bytes(kernel.arch, f"other {kernel.key}".encode())
        digest = hashlib.sha256(content).hexdigest()
        file = cubin_name(name, kernel.arch)
        kernels.append(replace(kernel, name=name, file=file, cubin_sha256=digest))
        (place / file).write_bytes(content)
    after = replace(manifest, kernels=tuple(kernels))
    (place / "manifest.json").write_text(serialise_manifest(after))
    return place


def exchange(folder, other):
    """What a build does last, in three steps instead of one: enough while nobody looks."""
    aside = folder.with_name("aside")
    folder.rename(aside)
    other.rename(folder)
    aside.rename(other)


def meanwhile(monkeypatch, name, act, times=1):
    """Do `act` before the module's function `name` runs, the first `times` that it does."""
    function = getattr(artifacts_module, name)
    left = [act] * times

    def interrupted(*arguments, **more):
        if left:
            left.pop()()
        return function(*arguments, **more)

    monkeypatch.setattr(artifacts_module, name, interrupted)


@pytest.mark.parametrize("step", ["_check_closed", "_has_changed"])
def test_a_set_swapped_under_a_reader_is_opened_whole(folder, next_set, monkeypatch, step):
    """Between reading the manifest and listing the files, or just after."""
    meanwhile(monkeypatch, step, lambda: exchange(folder, next_set))
    opened = open_artifacts(folder)
    assert "router_topk_v2" in {kernel.name for kernel in opened.manifest.kernels}
    for kernel in opened.manifest.kernels:
        opened.read(kernel)


def test_a_manifest_that_appears_meanwhile_is_read(folder, manifest, next_set, monkeypatch):
    (folder / "manifest.json").rename(folder / ".manifest")
    meanwhile(monkeypatch, "_has_changed", lambda: exchange(folder, next_set))
    expected = len(manifest.for_arch("sm_100a"))
    assert len(open_artifacts(folder).manifest.kernels) == expected


def test_a_reader_tries_twice_and_no_more(folder, next_set, monkeypatch):
    meanwhile(monkeypatch, "_check_closed", lambda: exchange(folder, next_set), times=2)
    assert "router_topk_v2.sm_100a.cubin: missing" in refused(folder)


def test_a_damaged_set_is_not_read_again(folder, monkeypatch):
    (folder / "router_topk.sm_90a.cubin").unlink()
    reads = []
    meanwhile(monkeypatch, "_read_manifest", lambda: reads.append(1), times=9)
    refused(folder)
    assert len(reads) == 1


def test_a_set_swapped_after_it_was_opened_says_so(folder, next_set):
    opened = open_artifacts(folder)
    exchange(folder, next_set)
    for kernel in opened.manifest.kernels:
        with pytest.raises(ArtifactError, match="not of the set that was opened") as caught:
            opened.read(kernel)
        assert str(caught.value).endswith("; open the folder again (a server: restart it)")


@pytest.mark.slow
def test_no_reader_ever_sees_a_mixed_set(folder, next_set):
    """Two builds take turns as fast as they can: an open is one of them, whole, or refused."""
    sets = [open_artifacts(place).manifest for place in (folder, next_set)]
    link, ends = folder.with_name("link"), threading.Event()
    link.symlink_to(folder)

    def take_turns():
        for turn in itertools.cycle((next_set, folder)):
            if ends.is_set():
                return
            new = folder.with_name("new")
            new.symlink_to(turn)
            new.replace(link)

    writer = threading.Thread(target=take_turns)
    writer.start()
    opened = []
    try:
        for _ in range(150):
            with contextlib.suppress(ArtifactError):
                opened.append(open_artifacts(link))
                for kernel in opened[-1].manifest.kernels:
                    digest = hashlib.sha256(opened[-1].read(kernel)).hexdigest()
                    assert digest == kernel.cubin_sha256
    finally:
        ends.set()
        writer.join()
    assert opened
    assert all(one.manifest in sets for one in opened)


def test_the_default_set_is_opened_once_for_the_process(folder, monkeypatch):
    """A build under a running process: what the kept manifest does not vouch for is refused."""
    monkeypatch.setattr(artifacts_module, "find_artifacts", lambda: folder)
    artifacts_module._default_artifacts.cache_clear()
    try:
        opened = open_artifacts()
        (folder / "manifest.json").write_text("{}")
        alter_a_cubin(folder)
        assert open_artifacts() is opened
        with pytest.raises(ArtifactError, match="altered"):
            opened.read(opened.manifest.kernels[0])
        with pytest.raises(ManifestError):
            open_artifacts(folder)
    finally:
        artifacts_module._default_artifacts.cache_clear()
