"""A new set takes the place of the old: whole at every moment, and nothing else is lost by it."""

from __future__ import annotations

import dataclasses
import errno
import os
import shutil
import signal
import subprocess
import sys
import threading
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn

import pytest

pytest.importorskip("elftools", reason="needs the builder")

from builds import (
    ARCHS,
    TOPK,
    check_whole,
    compile_once,
    contents,
    leftovers,
    make,
    mounted,
    topk_set,
    versions_once,
)

from build_kernels.building import build, compilers, publish, staging
from build_kernels.building import plan as plan_module
from build_kernels.building.artifact_folder import PlaceError
from build_kernels.building.build import BuildError, Built, run_build
from build_kernels.building.entry import sha256
from build_kernels.building.plan import Task, make_plan
from build_kernels.evidence import store as evidence
from build_kernels.evidence.store import Evidence, update_evidence
from dsv4_router_runtime.artifacts.folder import open_artifacts

CUBIN = f"{TOPK.name}.sm_90a.cubin"


@pytest.fixture
def artifacts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(compilers, "toolchain_versions", versions_once)
    return topk_set(tmp_path / "artifacts")


def other_plan(artifacts: Path) -> build.Plan:
    """A plan that compiles everything again, to another manifest than the one on disk."""
    plan = make_plan(artifacts, [TOPK.name], ARCHS)
    spec = dataclasses.replace(TOPK, pdl=False)
    tasks = tuple(Task(spec=spec, arch=arch, digest="3" * 64) for arch in ARCHS)
    return dataclasses.replace(plan, stale=tasks, current=())


def check_is_other(artifacts: Path) -> None:
    check_whole(artifacts)
    assert {kernel.launch.pdl for kernel in open_artifacts(artifacts).manifest.kernels} == {False}


def compiled_to_other(folder: Path) -> tuple[Built, ...]:
    """Return what `other_plan` compiles to, made from a set's files: no compiler is run."""
    source = topk_set(folder / "source")
    built = []
    for kernel in open_artifacts(source).manifest.kernels:
        launch = dataclasses.replace(kernel.launch, pdl=False)
        entry = dataclasses.replace(kernel, launch=launch, source_digest="3" * 64)
        ptx = (source / f"{kernel.key}.ptx").read_text()
        built.append(Built(entry=entry, cubin=(source / kernel.file).read_bytes(), ptx=ptx))
    return tuple(built)


@pytest.fixture
def compiled(tmp_path: Path) -> tuple[Built, ...]:
    return compiled_to_other(tmp_path)


@pytest.fixture
def meanwhile(
    compiled: tuple[Built, ...], monkeypatch: pytest.MonkeyPatch
) -> Callable[[Callable[[], object]], None]:
    """Have something happen while the compilers would run."""

    def set_up(happens: Callable[[], object] = lambda: None) -> None:
        def compile_all(*_args: object) -> list[Built]:
            happens()
            return list(compiled)

        monkeypatch.setattr(build, "_compile_all", compile_all)

    set_up()
    return set_up


def build_other(artifacts: Path) -> build.Report:
    return run_build(artifacts, other_plan(artifacts), jobs=1)


def fail(*_args: object, **_options: object) -> NoReturn:
    raise OSError(errno.EIO, "the test pulled the plug")


def no_exchange(code: int) -> Callable[..., NoReturn]:
    def refuse(*_args: object) -> NoReturn:
        raise OSError(code, os.strerror(code))

    return refuse


@pytest.mark.usefixtures("meanwhile")
class TestACrash:
    @pytest.mark.parametrize("at", range(2 * len(ARCHS) + 1))
    def test_while_staging(self, artifacts: Path, monkeypatch: pytest.MonkeyPatch, at: int) -> None:
        before = contents(artifacts)
        written = []
        write = Path.write_bytes

        def write_some(path: Path, data: bytes) -> int:
            written.append(path)
            if len(written) > at:
                write(path, data[: len(data) // 2])
                fail()
            return write(path, data)

        monkeypatch.setattr(Path, "write_bytes", write_some)
        with pytest.raises(OSError, match="pulled the plug"):
            build_other(artifacts)
        assert len(written) == at + 1
        assert contents(artifacts) == before
        assert leftovers(artifacts) == []

    def test_before_the_exchange(self, artifacts: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        before = contents(artifacts)
        monkeypatch.setattr(publish, "exchange", fail)
        with pytest.raises(OSError, match="pulled the plug"):
            build_other(artifacts)
        assert contents(artifacts) == before
        assert leftovers(artifacts) == []

    def test_after_the_exchange(self, artifacts: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        exchange = publish.exchange

        def exchange_and_fail(one: Path, other: Path) -> None:
            exchange(one, other)
            fail()

        monkeypatch.setattr(publish, "exchange", exchange_and_fail)
        with pytest.raises(OSError, match="pulled the plug"):
            build_other(artifacts)
        check_is_other(artifacts)
        assert leftovers(artifacts) == []

    @pytest.mark.parametrize("at", range(2 * len(ARCHS) + 1))
    def test_while_files_are_replaced_one_by_one(
        self, artifacts: Path, monkeypatch: pytest.MonkeyPatch, at: int
    ) -> None:
        """A part of the new set may be there. The next build makes it whole."""
        (artifacts / ".DS_Store").touch()
        replaced = []
        replace = Path.replace

        def replace_some(path: Path, target: Path) -> Path:
            if target.parent == artifacts:
                replaced.append(target.name)
                if len(replaced) > at:
                    fail()
            return replace(path, target)

        monkeypatch.setattr(Path, "replace", replace_some)
        with pytest.raises(PlaceError, match="may hold part of the new set") as caught:
            build_other(artifacts)
        assert "the test pulled the plug" in str(caught.value)
        assert len(replaced) == at + 1
        assert leftovers(artifacts) == [".DS_Store"]
        monkeypatch.undo()
        make(artifacts)
        (artifacts / ".DS_Store").unlink()
        assert contents(artifacts) == contents(topk_set(artifacts.parent / "wanted"))


@pytest.mark.usefixtures("compile_once")
class TestAKilledBuild:
    """SIGKILL leaves its private folders; the next build clears them, whatever it finds to do."""

    def killed(self, artifacts: Path, at: str, *, dots: bool = False) -> None:
        """Run a build in a process that kills itself where `at` says, then check the set."""
        if dots:
            (artifacts / ".DS_Store").touch()
        code = (
            "def die(*_a, **_o):\n"
            "    os.kill(os.getpid(), signal.SIGKILL)\n"
            "plan = other_plan(artifacts)\n"
            "built = TestAKilledBuild.built(artifacts)\n"
            "build._compile_all = lambda *_: built\n"
            f"{at}\n"
            "run_build(artifacts, plan, jobs=1)\n"
        )
        child = os.fork()
        if child == 0:
            try:
                exec(code, globals() | {"artifacts": artifacts})
            except BaseException:
                traceback.print_exc()
            os._exit(1)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL

    @staticmethod
    def built(artifacts: Path) -> list[Built]:
        """Other kernels' bytes than those on disk, so that a mixed set shows."""
        made = []
        for kernel in open_artifacts(artifacts).manifest.kernels:
            cubin = (artifacts / kernel.file).read_bytes() + b"other"
            launch = dataclasses.replace(kernel.launch, pdl=False)
            digest = sha256(cubin)
            entry = dataclasses.replace(kernel, launch=launch, cubin_sha256=digest)
            ptx = (artifacts / f"{kernel.key}.ptx").read_text()
            made.append(Built(entry=entry, cubin=cubin, ptx=ptx))
        return made

    def check_cleared(self, artifacts: Path) -> None:
        make(artifacts)
        check_whole(artifacts)
        assert [name for name in leftovers(artifacts) if name != ".DS_Store"] == []

    def test_while_compiling(self, artifacts: Path) -> None:
        before = contents(artifacts)
        self.killed(artifacts, "build._compile_all = die")
        assert leftovers(artifacts) == [".artifacts.build"]
        assert contents(artifacts) == before
        self.check_cleared(artifacts)

    def test_before_the_exchange(self, artifacts: Path) -> None:
        before = contents(artifacts)
        self.killed(artifacts, "publish.exchange = die")
        assert len(os.listdir(artifacts.parent / ".artifacts.build" / "set")) == len(before)
        assert contents(artifacts) == before
        self.check_cleared(artifacts)
        assert contents(artifacts) == before

    def test_after_the_exchange(self, artifacts: Path) -> None:
        self.killed(artifacts, "publish.put_back = die")
        check_is_other(artifacts)
        (artifacts.parent / ".artifacts.build" / "set" / "thesis.tex").write_text("precious")
        with pytest.raises(PlaceError, match=r"it holds what no build made: thesis\.tex"):
            make(artifacts)
        assert (artifacts / "thesis.tex").read_text() == "precious"
        (artifacts / "thesis.tex").unlink()
        self.check_cleared(artifacts)

    def test_after_the_first_of_the_files(self, artifacts: Path) -> None:
        at = (
            "replace = Path.replace\n"
            "def replace_one(path, target):\n"
            "    replace(path, target)\n"
            "    if target.name.endswith('.cubin'): die()\n"
            "Path.replace = replace_one"
        )
        self.killed(artifacts, at, dots=True)
        assert ".artifacts.publish" in leftovers(artifacts)
        self.check_cleared(artifacts)

    @pytest.mark.slow
    def test_after_the_manifest_and_before_the_surplus(
        self, artifacts: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """The new manifest no longer vouches for them: the mark does."""
        at = (
            "plan_module.KERNELS = (dataclasses.replace(TOPK, archs=('sm_100a', 'sm_103a')),)\n"
            "plan = make_plan(artifacts, [TOPK.name], ARCHS)\n"
            "built = [b for b in built if b.entry.arch != 'sm_90a']\n"
            "staging._remove_surplus = die"
        )
        self.killed(artifacts, at, dots=True)
        assert CUBIN not in (artifacts / "manifest.json").read_text()
        assert (artifacts / CUBIN).exists()
        two = dataclasses.replace(TOPK, archs=("sm_100a", "sm_103a"))
        monkeypatch.setattr(plan_module, "KERNELS", (two,))
        make(artifacts)
        check_whole(artifacts)
        assert not (artifacts / CUBIN).exists()


@pytest.mark.usefixtures("meanwhile")
class TestFileByFile:
    @pytest.mark.parametrize("code", [errno.EINVAL, errno.EXDEV, errno.ENOSYS, errno.EBUSY])
    def test_without_the_exchange_the_manifest_comes_last(
        self, artifacts: Path, monkeypatch: pytest.MonkeyPatch, code: int
    ) -> None:
        monkeypatch.setattr(plan_module, "KERNELS", (dataclasses.replace(TOPK, archs=ARCHS[1:]),))
        plan = other_plan(artifacts)
        built = build._compile_all(plan.stale[1:], artifacts, 1, str)[:2]
        monkeypatch.setattr(build, "_compile_all", lambda *_: built)
        gone = {name for name in contents(artifacts) if built[0].entry.arch not in name}
        gone -= {name for item in built for name in (item.entry.file, f"{item.entry.key}.ptx")}
        gone.remove("manifest.json")
        order = []
        replace, unlink = Path.replace, Path.unlink

        def note(done: Callable) -> Callable:
            def noted(path: Path, *args: Path, **options: bool) -> None:
                target = args[0] if args else path
                if target.parent == artifacts:
                    order.append(target.name)
                done(path, *args, **options)

            return noted

        folder = artifacts.stat().st_ino
        monkeypatch.setattr(publish, "exchange", no_exchange(code))
        monkeypatch.setattr(Path, "replace", note(replace))
        monkeypatch.setattr(Path, "unlink", note(unlink))
        report = run_build(artifacts, plan, jobs=2)
        assert order[4] == "manifest.json"
        assert set(order[5:]) == gone == set(report.removed)
        assert artifacts.stat().st_ino == folder
        check_is_other(artifacts)
        assert leftovers(artifacts) == []

    def test_on_a_mount_point(self, tmp_path: Path, artifacts: Path) -> None:
        with mounted(tmp_path / "volume") as volume:
            for path in artifacts.iterdir():
                shutil.copy2(path, volume)
            build_other(volume)
            open_artifacts(volume)
            check_is_other(volume)
            assert set(os.listdir(volume)) - {".volume.lock"} == set(os.listdir(artifacts))
        assert leftovers(artifacts) == []

    def test_on_an_empty_mount_point(self, tmp_path: Path) -> None:
        with mounted(tmp_path / "volume") as volume:
            build_other(volume)
            check_is_other(volume)

    def test_on_a_bind_mount(self, tmp_path: Path, artifacts: Path) -> None:
        """On the same file system as what lies beside it, and still no rename crosses it."""
        with mounted(tmp_path / "volume", "--bind", source=artifacts) as volume:
            assert volume.stat().st_dev == tmp_path.stat().st_dev
            build_other(volume)
            check_is_other(volume)
        check_is_other(artifacts)
        assert leftovers(artifacts) == []

    def test_where_nothing_can_be_made_beside_it(
        self, artifacts: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """A volume in a folder of root's."""
        access = os.access
        monkeypatch.setattr(
            os, "access", lambda path, mode: path != artifacts.parent and access(path, mode)
        )
        build_other(artifacts)
        check_is_other(artifacts)
        assert ".artifacts.lock" not in os.listdir(artifacts.parent)
        assert leftovers(artifacts) == []

    def test_two_builds_of_one_volume(self, tmp_path: Path) -> None:
        """Two containers share the volume and not what lies beside it."""
        with mounted(tmp_path / "volume") as volume, staging.build_folder(volume):
            with pytest.raises(staging.LockedError):
                make(volume)

    def test_a_folder_whose_owner_cannot_be_given_stays(
        self, artifacts: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        folder = artifacts.stat().st_ino
        monkeypatch.setattr(os, "chown", no_exchange(errno.EPERM))
        build_other(artifacts)
        check_is_other(artifacts)
        assert artifacts.stat().st_ino == folder

    def test_a_folder_whose_evidence_cannot_be_held_stays(
        self, artifacts: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """The lock file is another user's."""
        (artifacts / "evidence.json").write_text("{}")
        folder = artifacts.stat().st_ino
        monkeypatch.setattr(evidence, "evidence_lock", no_exchange(errno.EACCES))
        build_other(artifacts)
        check_is_other(artifacts)
        assert artifacts.stat().st_ino == folder

    def test_extended_attributes_stay(self, artifacts: Path) -> None:
        try:
            os.setxattr(artifacts, "user.note", b"mine")
        except OSError:
            pytest.skip("no extended attributes on this file system")
        build_other(artifacts)
        check_is_other(artifacts)
        assert os.getxattr(artifacts, "user.note") == b"mine"


class TestWhatHappensDuringABuild:
    """Whatever comes into the folder while the compilers run, or just before the exchange."""

    def test_a_stranger_is_refused_and_kept(self, artifacts: Path, meanwhile: Callable) -> None:
        before = contents(artifacts)
        meanwhile(lambda: (artifacts / "thesis.tex").write_text("precious"))
        with pytest.raises(PlaceError, match=r"it holds what no build made: thesis\.tex"):
            build_other(artifacts)
        assert contents(artifacts) == before | {"thesis.tex": b"precious"}
        assert leftovers(artifacts) == []

    def test_strangers_at_the_moment_of_the_exchange_are_put_back(
        self, artifacts: Path, meanwhile: Callable, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        meanwhile()
        exchange = publish.exchange

        def exchange_late(one: Path, other: Path) -> None:
            (artifacts / "sub").mkdir()
            (artifacts / "sub" / "data.csv").write_text("p")
            (artifacts / "thesis.tex").write_text("precious")
            (artifacts / ".dot").symlink_to("nowhere")
            exchange(one, other)

        monkeypatch.setattr(publish, "exchange", exchange_late)
        with pytest.raises(BuildError, match=r"published, but .*/artifacts/thesis\.tex\."):
            build_other(artifacts)
        assert (artifacts / "thesis.tex").read_text() == "precious"
        assert (artifacts / "sub" / "data.csv").read_text() == "p"
        assert os.readlink(artifacts / ".dot") == "nowhere"
        (artifacts / ".dot").unlink()
        shutil.rmtree(artifacts / "sub")
        (artifacts / "thesis.tex").unlink()
        check_is_other(artifacts)
        assert leftovers(artifacts) == []

    def test_a_stranger_whose_name_is_taken_is_kept_aside(
        self, artifacts: Path, meanwhile: Callable, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        meanwhile()
        exchange = publish.exchange

        def exchange_late(one: Path, other: Path) -> None:
            (artifacts / CUBIN).unlink()
            (artifacts / CUBIN).mkdir()
            (artifacts / CUBIN / "data.csv").write_text("p")
            exchange(one, other)

        monkeypatch.setattr(publish, "exchange", exchange_late)
        with pytest.raises(BuildError, match=rf"published, but .*set/{CUBIN}\."):
            build_other(artifacts)
        check_is_other(artifacts)
        aside = artifacts.parent / ".artifacts.build" / "set" / CUBIN
        assert (aside / "data.csv").read_text() == "p"
        with pytest.raises(PlaceError, match=rf"\.artifacts\.build holds {CUBIN}, which no build"):
            make(artifacts)
        with pytest.raises(PlaceError, match=rf"\.artifacts\.build holds {CUBIN}, which no build"):
            build.open_folder(artifacts)  # with nothing to do, too
        shutil.rmtree(aside)
        monkeypatch.undo()
        monkeypatch.setattr(build, "_compile_all", compile_once)
        assert make(artifacts).built
        assert leftovers(artifacts) == []

    def test_a_folder_that_is_swapped_is_left_alone(
        self, artifacts: Path, meanwhile: Callable
    ) -> None:
        before = contents(artifacts)

        def swap() -> None:
            artifacts.rename(artifacts.with_name("old"))
            shutil.copytree(artifacts.with_name("old"), artifacts)

        meanwhile(swap)
        with pytest.raises(BuildError, match="was changed while this build ran"):
            build_other(artifacts)
        assert contents(artifacts) == contents(artifacts.with_name("old")) == before

    def test_a_folder_that_is_made_meanwhile_is_left_alone(
        self, tmp_path: Path, meanwhile: Callable
    ) -> None:
        folder = tmp_path / "new"
        meanwhile(folder.mkdir)
        with pytest.raises(BuildError, match="was changed while this build ran"):
            build_other(folder)
        assert list(folder.iterdir()) == []

    def test_another_manifest_is_not_overwritten(
        self, artifacts: Path, meanwhile: Callable
    ) -> None:
        """Another branch was checked out while the old one's sources were compiled."""
        path = artifacts / "manifest.json"
        text = path.read_text().replace('"nvrtc"', '"other"')
        meanwhile(lambda: path.write_text(text))
        with pytest.raises(BuildError, match="was changed while this build ran"):
            build_other(artifacts)
        assert path.read_text() == text

    def test_evidence_that_is_found_meanwhile_is_kept(
        self, artifacts: Path, meanwhile: Callable, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """By a writer that knows no lock: git, an editor."""
        path = artifacts / "evidence.json"
        path.write_text("old")
        meanwhile()
        exchange = publish.exchange

        def exchange_late(one: Path, other: Path) -> None:
            partial = artifacts.parent / "partial"
            partial.write_text("new")
            partial.replace(path)
            exchange(one, other)

        monkeypatch.setattr(publish, "exchange", exchange_late)
        build_other(artifacts)
        assert path.read_text() == "new"
        check_is_other(artifacts)

    def test_verify_waits_for_the_exchange(
        self, artifacts: Path, meanwhile: Callable, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        path = artifacts / "evidence.json"
        update_evidence(path, lambda found: found)
        meanwhile()
        exchange = publish.exchange

        def exchange_late(one: Path, other: Path) -> None:
            started = subprocess.run([sys.executable, "-c", _TRY_EVIDENCE, str(path)], check=False)
            assert started.returncode == 3, "verify could write into a folder that goes"
            exchange(one, other)

        monkeypatch.setattr(publish, "exchange", exchange_late)
        build_other(artifacts)
        update_evidence(path, lambda evidence: Evidence())

    @pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGTERM])
    def test_it_is_too_late_to_stop_it(
        self,
        artifacts: Path,
        meanwhile: Callable,
        monkeypatch: pytest.MonkeyPatch,
        how: signal.Signals,
    ) -> None:
        """Else "interrupted; the artifacts are as they were" would be untrue."""
        over = threading.Event()
        # A signal that only the main thread blocks would go to this one.
        threading.Thread(target=over.wait, daemon=True).start()
        meanwhile()
        exchange = publish.exchange

        def exchange_and_stop(one: Path, other: Path) -> None:
            os.kill(os.getpid(), how)
            exchange(one, other)

        monkeypatch.setattr(publish, "exchange", exchange_and_stop)
        assert build_other(artifacts).built
        over.set()
        check_is_other(artifacts)
        assert leftovers(artifacts) == []


_TRY_EVIDENCE = """
import fcntl, sys
from pathlib import Path
from build_kernels.evidence.store import update_evidence
def fail(*_): sys.exit(3)
flock = fcntl.flock
def flock_now(handle, how):
    try: flock(handle, how | fcntl.LOCK_NB)
    except BlockingIOError: sys.exit(3)
fcntl.flock = flock_now
update_evidence(Path(sys.argv[1]), lambda old: old)
"""
