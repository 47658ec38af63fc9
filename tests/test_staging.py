"""The private folders of a build: never a user's, held by one build, cleared after a killed one."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import NoReturn

import pytest

pytest.importorskip("elftools", reason="needs the builder")

from builds import ARCHS, TOPK, check_whole, contents, leftovers, make, mounted, topk_set
from processes import heed_signals

from build_kernels.building import staging
from build_kernels.building.artifact_folder import PlaceError
from build_kernels.building.entry import sha256

COMMAND = [sys.executable, "-c", "from build_kernels.__main__ import main; main()", "build"]
CUBIN = f"{TOPK.name}.sm_90a.cubin"
pytestmark = pytest.mark.usefixtures("compile_once")


@pytest.fixture
def artifacts(tmp_path: Path) -> Path:
    return topk_set(tmp_path / "artifacts")


def disk_full(*_args: object) -> NoReturn:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


class TestPrivateFolders:
    @pytest.mark.parametrize("empty", [True, False])
    def test_a_users_folder_of_that_name_is_never_deleted(
        self, artifacts: Path, empty: bool
    ) -> None:
        (artifacts / CUBIN).write_bytes(b"")
        taken = artifacts.parent / ".artifacts.build"
        taken.mkdir()
        if not empty:
            (taken / "thesis.tex").write_text("precious")
        with pytest.raises(PlaceError, match=r"\.artifacts\.build is in the way, and no mark"):
            make(artifacts)
        assert os.listdir(taken) == ([] if empty else ["thesis.tex"])

    @pytest.mark.parametrize("name", [".artifacts.build", ".artifacts.lock"])
    def test_a_users_file_of_that_name_keeps_its_bytes(self, artifacts: Path, name: str) -> None:
        (artifacts / CUBIN).write_bytes(b"")
        taken = artifacts.parent / name
        taken.write_text("precious")
        with contextlib.suppress(PlaceError):
            make(artifacts)
        assert taken.read_text() == "precious"

    def test_a_folder_in_the_locks_place_is_named(self, artifacts: Path) -> None:
        (artifacts / CUBIN).write_bytes(b"")
        (artifacts.parent / ".artifacts.lock").mkdir()
        with pytest.raises(PlaceError, match=r"Is a directory: .*/\.artifacts\.lock"):
            make(artifacts)

    def test_a_link_in_the_locks_place_is_not_followed(self, artifacts: Path) -> None:
        (artifacts / CUBIN).write_bytes(b"")
        (artifacts.parent / ".artifacts.lock").symlink_to("elsewhere")
        with pytest.raises(PlaceError, match=r"/\.artifacts\.lock"):
            make(artifacts)
        assert not (artifacts.parent / "elsewhere").exists()

    def test_what_a_user_put_into_it_stays(self, artifacts: Path) -> None:
        with staging.build_folder(artifacts) as private:
            (private / "thesis.tex").write_text("precious")
            (private / "work" / "half.cubin").write_text("a compiler's")
        assert (private / "thesis.tex").read_text() == "precious"
        assert not (private / "work").exists()

    @pytest.mark.parametrize(
        "mark",
        [
            {"names": ["../../../thesis.tex"], "surplus": {}},
            {"names": [], "surplus": {"../thesis.tex": sha256(b"precious")}},
        ],
    )
    def test_a_mark_reaches_no_other_folder(self, artifacts: Path, mark: dict) -> None:
        (artifacts / CUBIN).write_bytes(b"")
        (artifacts.parent / "thesis.tex").write_text("precious")
        private = artifacts.parent / ".artifacts.build"
        (private / "set").mkdir(parents=True)
        (private / "made-by-build-kernels.json").write_text(json.dumps(mark))
        with pytest.raises(PlaceError, match="is in the way"):
            make(artifacts)
        assert (artifacts.parent / "thesis.tex").read_text() == "precious"

    def test_a_link_in_its_place_is_not_followed(self, artifacts: Path) -> None:
        (artifacts / CUBIN).write_bytes(b"")
        elsewhere = artifacts.parent / "elsewhere"
        elsewhere.mkdir()
        (elsewhere / "manifest.json").write_text("precious")
        private = artifacts.parent / ".artifacts.build"
        private.mkdir()
        mark = {"names": ["manifest.json"], "surplus": {}}
        (private / "made-by-build-kernels.json").write_text(json.dumps(mark))
        (private / "set").symlink_to(elsewhere)
        with contextlib.suppress(PlaceError):
            make(artifacts)
        assert (elsewhere / "manifest.json").read_text() == "precious"

    def test_a_full_disk_leaves_none_behind(
        self, artifacts: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        (artifacts / CUBIN).write_bytes(b"")
        monkeypatch.setattr(Path, "write_text", disk_full)
        with pytest.raises(PlaceError, match="No space left on device"):
            make(artifacts)
        assert leftovers(artifacts) == []

    def test_two_builds_at_once(self, artifacts: Path) -> None:
        with staging.build_folder(artifacts) as private:
            (private / "work" / "half.cubin").write_text("of the first build")
            with pytest.raises(staging.LockedError, match=r"another build of .* is running"):
                make(artifacts)
            assert (private / "work" / "half.cubin").exists()
        make(artifacts)

    def test_a_refused_build_is_not_watched(self, artifacts: Path) -> None:
        """Else it draws a progress bar of a build that never starts."""

        def watch(total: int) -> NoReturn:
            raise AssertionError(f"a build of {total} kernels was announced")

        with staging.build_folder(artifacts), pytest.raises(staging.LockedError):
            make(artifacts, watch=watch)

    def test_nothing_to_do_needs_no_writable_place(self, tmp_path: Path) -> None:
        with mounted(tmp_path / "volume") as volume:
            topk_set(volume / "artifacts")
            # As a killed build leaves it.
            with staging.build_folder(volume / "artifacts") as private:
                shutil.copytree(private, volume / "copy")
            shutil.copytree(volume / "copy", private)
            subprocess.run(["mount", "-o", "remount,ro", str(volume)], check=True)
            assert len(make(volume / "artifacts").up_to_date) == len(ARCHS)
            assert len(make(volume / "artifacts", locked=True).up_to_date) == len(ARCHS)


@pytest.mark.slow
@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_an_interrupted_build_leaves_the_old_set(artifacts: Path, how: signal.Signals) -> None:
    """Stopped for real while compilers run: the decode kernels are not built yet."""
    before = contents(artifacts)
    process = subprocess.Popen(
        [*COMMAND, "--artifacts", str(artifacts), "--jobs", "2"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,  # so that Ctrl-C reaches the compilers, as in a terminal
        preexec_fn=heed_signals,
    )
    private = artifacts.parent / f".{artifacts.name}.build"
    deadline = time.monotonic() + 60
    while not any(private.glob("work/*/*.cubin")) and time.monotonic() < deadline:
        time.sleep(0.01)
    assert process.poll() is None, "the build ended before it could be interrupted"
    if how == signal.SIGINT:
        os.killpg(process.pid, how)
    else:
        process.send_signal(how)
    output, errors = process.communicate(timeout=20)
    assert contents(artifacts) == before
    check_whole(artifacts)
    assert output == ""
    if how == signal.SIGKILL:
        assert process.returncode == -signal.SIGKILL
        make(artifacts)  # and the next build is not in its way
    else:
        assert process.returncode == 130
        assert "interrupted; the artifacts are as they were" in errors
        assert "Traceback" not in errors
    assert not private.exists()
    assert not _compilers_of(artifacts)


def _compilers_of(artifacts: Path) -> list[str]:
    """Processes that still have the build's folder in an argument or as an open file."""
    found = []
    for process in Path("/proc").iterdir():
        if process.name.isdigit() and int(process.name) != os.getpid():
            try:
                command = (process / "cmdline").read_bytes().decode(errors="replace")
            except OSError:
                continue
            if str(artifacts) in command:
                found.append(command)
    return found
