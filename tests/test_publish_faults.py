"""Every system call of a publication fails, or is the last one of its process: nothing is lost."""

from __future__ import annotations

import dataclasses
import errno
import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

pytest.importorskip("elftools", reason="needs the builder")

from builds import ARCHS, TOPK, check_whole, topk_set

from build_kernels.building import build
from build_kernels.building import plan as plan_module
from build_kernels.building.artifact_folder import PlaceError
from build_kernels.building.build import BuildError, Built, run_build
from build_kernels.building.entry import sha256
from build_kernels.building.plan import make_plan
from dsv4_router_runtime.artifacts.folder import open_artifacts
from dsv4_router_runtime.errors import RouterError

# What Python reports before it calls the system: see the table of audit events.
_CALLS = ("open", "os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.link", "os.chmod")
_CALLS += ("os.chown", "os.utime", "os.listdir", "os.scandir", "shutil.rmtree")
_MOST_CALLS = 400
# One kernel of three is no longer named by a spec: its files are surplus.
_TWO = dataclasses.replace(TOPK, archs=ARCHS[1:])


class Watch:
    """An audit hook, which cannot be taken off again: does something at the n-th call below."""

    def __init__(self) -> None:
        self.place, self.calls, self.at, self.do = "", 0, 0, lambda: None
        self.on = False
        sys.addaudithook(self)

    def __call__(self, event: str, arguments: tuple) -> None:
        if self.on and event in _CALLS and str(arguments[0]).startswith(self.place):
            self.calls += 1
            if self.calls == self.at:
                self.do()

    def run(self, place: Path, at: int, do: Callable[[], None], what: Callable[[], object]) -> bool:
        """Call `what`; was the n-th call reached?"""
        self.place, self.calls, self.at, self.do, self.on = str(place), 0, at, do, True
        try:
            what()
        finally:
            self.on = False
        return self.calls >= at


@pytest.fixture(scope="module")
def watch() -> Watch:
    return Watch()


@pytest.fixture(params=["exchanged", "file by file"])
def artifacts(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """A set, with files of the user's beside it and, in the second case, in it."""
    folder = topk_set(tmp_path / "home" / "artifacts")
    (folder / "evidence.json").write_text("{}")
    (folder.parent / "thesis.tex").write_text("precious")
    (folder.parent / "sub").mkdir()
    (folder.parent / "sub" / "data.csv").write_text("precious")
    if request.param != "exchanged":
        (folder / ".ipynb_checkpoints").mkdir()
        (folder / ".ipynb_checkpoints" / "a.ipynb").write_text("precious")
        (folder / ".#manifest.json").symlink_to("me@host.1234")
    return folder


@pytest.fixture(autouse=True)
def other_bytes(artifacts: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A build of two kernels gives other cubins than those on disk, and runs no compiler."""
    built = []
    for kernel in open_artifacts(artifacts).manifest.kernels:
        cubin = (artifacts / kernel.file).read_bytes() + b"other"
        entry = dataclasses.replace(kernel, cubin_sha256=sha256(cubin), source_digest="3" * 64)
        ptx = (artifacts / f"{kernel.key}.ptx").read_text()
        built.append(Built(entry=entry, cubin=cubin, ptx=ptx))
    built = [item for item in built if item.entry.arch in _TWO.archs]
    monkeypatch.setattr(plan_module, "KERNELS", (_TWO,))
    monkeypatch.setattr(build, "_compile_all", lambda *_: built)


def build_other(artifacts: Path) -> None:
    run_build(artifacts, make_plan(artifacts, [TOPK.name], ARCHS), jobs=1)


def the_users(artifacts: Path) -> dict[str, object]:
    """Every file and folder that no build made, with inode and bytes."""
    found: dict[str, object] = {}
    for path in sorted(artifacts.parent.rglob("*")):
        name = str(path.relative_to(artifacts.parent))
        private = ".build" in name or ".publish" in name or name.endswith(".lock")
        ours = name.startswith("artifacts/") and not name.startswith("artifacts/.")
        if name != "artifacts" and not private and (not ours or "evidence" in name):
            target = os.readlink(path) if path.is_symlink() else ""
            data = path.read_bytes() if path.is_file() else b""
            found[name] = (path.lstat().st_ino, target, data)
    return found


def check_after(artifacts: Path, before: dict[str, object]) -> None:
    """The user's files are as they were, and the next build makes all of the rest right."""
    assert the_users(artifacts) == before
    if not any(name.startswith("artifacts/.") for name in before):
        check_whole(artifacts)  # the old set or the new one: no moment has half of each
    build_other(artifacts)
    check_whole(artifacts)
    assert {kernel.arch for kernel in open_artifacts(artifacts).manifest.kernels} == set(_TWO.archs)
    assert the_users(artifacts) == before
    names = [*os.listdir(artifacts), *os.listdir(artifacts.parent)]
    assert [name for name in names if ".build" in name or ".publish" in name] == []


def renewed(artifacts: Path, template: Path) -> None:
    """Put the set back as it was at first, without a trace of what the test did."""
    for path in artifacts.iterdir():
        if not path.name.startswith(".") and path.name != "evidence.json":
            path.unlink()
    for path in template.iterdir():
        (artifacts / path.name).write_bytes(path.read_bytes())


def each_call(artifacts: Path, tmp_path: Path) -> object:
    """Count from 1 to the last call of a build, on a set that is as at first each time."""
    template = topk_set(tmp_path / "template")
    for at in range(1, _MOST_CALLS):
        yield at
        renewed(artifacts, template)
    raise AssertionError(f"a build makes more than {_MOST_CALLS} calls")


@pytest.mark.slow
def test_each_call_fails(artifacts: Path, tmp_path: Path, watch: Watch) -> None:
    before = the_users(artifacts)

    def fail() -> None:
        raise OSError(errno.EIO, "the test pulled the plug")

    for at in each_call(artifacts, tmp_path):
        try:
            reached = watch.run(artifacts.parent, at, fail, lambda: build_other(artifacts))
        except (OSError, PlaceError, BuildError, RouterError):
            reached = True
        check_after(artifacts, before)
        if not reached:
            break
    assert at > 50


@pytest.mark.slow
def test_each_call_is_the_last(artifacts: Path, tmp_path: Path, watch: Watch) -> None:
    before = the_users(artifacts)

    def die() -> None:
        os.kill(os.getpid(), signal.SIGKILL)

    for at in each_call(artifacts, tmp_path):
        child = os.fork()
        if child == 0:
            try:
                watch.run(artifacts.parent, at, die, lambda: build_other(artifacts))
            finally:
                os._exit(0)
        _, status = os.waitpid(child, 0)
        check_after(artifacts, before)
        if not os.WIFSIGNALED(status):
            break
    assert at > 50
