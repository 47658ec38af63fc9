"""`build --artifacts FOLDER` keeps whatever it did not make: where it refuses, where it goes on."""

from __future__ import annotations

import json
import os
import stat
from pathlib import Path

import pytest

pytest.importorskip("elftools", reason="needs the builder")
pytest.importorskip("click", reason="needs the builder")

from builds import ARCHS, TOPK, check_whole, contents, topk_set
from click.testing import CliRunner, Result

from build_kernels.building import build
from build_kernels.building import plan as plan_module
from build_kernels.building.entry import sha256
from build_kernels.cli import main as cli

CUBIN = f"{TOPK.name}.sm_90a.cubin"
FILES = {f"{TOPK.name}.{arch}.{kind}" for arch in ARCHS for kind in ("cubin", "ptx")}
FILES |= {"manifest.json"}


def build_in(folder: str | Path, *options: str) -> Result:
    """Build router_topk alone, by the command."""
    arguments = ["build", "--kernel", TOPK.name, "--artifacts", str(folder), *options]
    return CliRunner().invoke(cli.main, arguments)


def tree(folder: Path) -> dict[str, tuple]:
    """Everything below a folder: kind, mode, owner, and bytes or target. No link is followed."""
    found = {}
    for path in sorted(folder.rglob("*")):
        info = path.lstat()
        what: object = None
        if path.is_symlink():
            what = os.readlink(path)
        elif path.is_file():
            what = path.read_bytes()
        found[str(path.relative_to(folder))] = (stat.filemode(info.st_mode), info.st_uid, what)
    return found


@pytest.fixture
def project(tmp_path: Path) -> Path:
    """A user's own folder, with a tree in it."""
    folder = tmp_path / "home" / "project"
    (folder / "sub").mkdir(parents=True)
    (folder / "sub" / "data.csv").write_text("p")
    (folder / "thesis.tex").write_text("precious")
    (folder / "link").symlink_to("sub")
    return folder


@pytest.fixture
def artifacts(tmp_path: Path) -> Path:
    """A small set, in which nothing is out of date."""
    return topk_set(tmp_path / "artifacts")


@pytest.fixture
def stale(artifacts: Path) -> Path:
    """The same with one file to make again."""
    (artifacts / CUBIN).write_bytes(b"")
    return artifacts


@pytest.fixture
def topk_is_all(monkeypatch: pytest.MonkeyPatch) -> None:
    """A build of router_topk is a build of everything."""
    monkeypatch.setattr(plan_module, "KERNELS", (TOPK,))


@pytest.fixture
def no_compiler(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    topk_set(tmp_path / "compiled before")

    def refuse(*_args: object, **_options: object) -> None:
        raise AssertionError("a kernel was compiled")

    monkeypatch.setattr(build, "_compile_all", refuse)


def check_refused(result: Result, *names: str) -> None:
    assert result.exit_code == 1, result.output
    assert isinstance(result.exception, SystemExit), result.exception
    assert "it holds what no build made: " in result.stderr
    assert "--artifacts FOLDER" in result.stderr
    for name in names:
        assert name in result.stderr


def list_old_kernel(artifacts: Path, *, made: bytes, schema: int = 2) -> None:
    """Have the manifest list one more kernel, which no spec names any more."""
    path = artifacts / "manifest.json"
    document = json.loads(path.read_text())
    old = {
        **document["kernels"][0],
        **{"name": "router_old", "arch": "sm_90a", "file": "router_old.sm_90a.cubin"},
        **{"cubin_sha256": sha256(made), "ptx_sha256": sha256(made)},
    }
    document["kernels"].insert(0, old)
    document["schema_version"] = schema
    path.write_text(json.dumps(document))


@pytest.mark.usefixtures("no_compiler")
class TestAFolderWithStrangersIsRefused:
    """Before anything is compiled, and with everything left as it was."""

    def test_named_by_its_path(self, project: Path) -> None:
        before = tree(project.parent)
        check_refused(build_in(project), "link", "sub/", "thesis.tex")
        assert tree(project.parent) == before

    @pytest.mark.parametrize("given", ["..", "../..", "."])
    def test_named_from_within(
        self, project: Path, given: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        before = tree(project.parent)
        monkeypatch.chdir(project / "sub" if given == ".." else project)
        check_refused(build_in(given if given != "../.." else "sub/../.."))
        assert tree(project.parent) == before

    def test_named_by_its_absolute_path_from_within(
        self, project: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        before = tree(project.parent)
        monkeypatch.chdir(project)
        check_refused(build_in(project), "thesis.tex")
        assert tree(project.parent) == before

    def test_the_root_of_all(self) -> None:
        before = set(os.listdir("/"))
        check_refused(build_in("/"))
        assert set(os.listdir("/")) == before

    def test_named_by_a_symlink(self, project: Path) -> None:
        link = project.parent / "lnk"
        link.symlink_to("project")
        before = tree(project.parent)
        check_refused(build_in(link), "thesis.tex")
        assert tree(project.parent) == before

    def test_a_thousand_names_are_counted(self, project: Path) -> None:
        for index in range(1000):
            (project / f"file{index:04}").touch()
        result = build_in(project)
        check_refused(result, "file0000", "and 998 more")
        assert len(result.stderr) < 1000

    def test_a_name_that_is_no_text_is_shown(self, artifacts: Path) -> None:
        (artifacts / os.fsdecode(b"\xff\x1b[31m\n")).touch()
        check_refused(build_in(artifacts), r"\udcff\x1b[31m\n")

    @pytest.mark.parametrize("name", ["notes.txt", "old.sm_90a.cubin", "router_topk.sm_80.ptx"])
    def test_one_file_in_a_good_set(self, artifacts: Path, name: str) -> None:
        """With nothing to compile, too."""
        (artifacts / name).write_text("precious")
        before = tree(artifacts.parent)
        result = build_in(artifacts)
        check_refused(result, name)
        assert ("another version of this tool" in result.stderr) == (name != "notes.txt")
        assert tree(artifacts.parent) == before

    @pytest.mark.parametrize("kind", ["folder", "link", "fifo", "socket"])
    @pytest.mark.parametrize("name", [CUBIN, "manifest.json", "evidence.json"])
    def test_a_name_of_ours_that_is_no_plain_file(
        self, artifacts: Path, name: str, kind: str
    ) -> None:
        path = artifacts / name
        if path.exists():
            path.rename(artifacts.parent / name)
        if kind == "folder":
            path.mkdir()
            (path / "data.csv").write_text("p")
        elif kind == "link":
            path.symlink_to(artifacts.parent / name)
        else:
            os.mknod(path, 0o600 | (stat.S_IFIFO if kind == "fifo" else stat.S_IFSOCK))
        before = tree(artifacts.parent)
        check_refused(build_in(artifacts), name)
        assert tree(artifacts.parent) == before

    @pytest.mark.parametrize(
        "text",
        ['{"name": "My App", "start_url": "/"}', "[1, 2]", "dear diary", "\xff", "[" * 10**5],
    )
    def test_a_manifest_of_something_else(self, tmp_path: Path, text: str) -> None:
        """A web page or a browser extension has a file of that name too."""
        folder = tmp_path / "extension"
        folder.mkdir()
        (folder / "manifest.json").write_text(text, encoding="latin-1")
        before = tree(folder)
        check_refused(build_in(folder), "manifest.json")
        assert tree(folder) == before

    def test_a_manifest_that_cannot_be_read(self, artifacts: Path) -> None:
        """Nobody can tell whose it is: too large for one of ours, or of another user."""
        os.truncate(artifacts / "manifest.json", 2**40)
        check_refused(build_in(artifacts), "manifest.json (it cannot be read)")
        assert (artifacts / "manifest.json").stat().st_size == 2**40

    def test_a_kernel_of_the_past_that_was_altered(self, artifacts: Path) -> None:
        """The manifest vouches for bytes, not for a name."""
        list_old_kernel(artifacts, made=b"the old cubin")
        (artifacts / "router_old.sm_90a.cubin").write_bytes(b"the old cubin, patched by hand")
        before = tree(artifacts)
        check_refused(build_in(artifacts), "router_old.sm_90a.cubin")
        assert tree(artifacts) == before

    def test_a_manifest_vouches_for_cubins_and_ptx_alone(self, artifacts: Path) -> None:
        """Else one that is made for the purpose could have any file removed."""
        path = artifacts / "manifest.json"
        document = json.loads(path.read_text())
        entry = document["kernels"][0] | {"file": "thesis.tex", "cubin_sha256": sha256(b"p")}
        path.write_text(json.dumps(document | {"kernels": [entry], "schema_version": 1}))
        (artifacts / "thesis.tex").write_bytes(b"p")
        check_refused(build_in(artifacts), "thesis.tex")


@pytest.mark.usefixtures("compile_once")
class TestAFolderOfOurs:
    def test_an_empty_one(self, tmp_path: Path) -> None:
        (tmp_path / "empty").mkdir()
        assert build_in(tmp_path / "empty").exit_code == 0
        assert set(contents(tmp_path / "empty")) == FILES

    def test_one_that_is_not_there_yet(self, tmp_path: Path) -> None:
        assert build_in(tmp_path / "some" / "where").exit_code == 0
        assert set(contents(tmp_path / "some" / "where")) == FILES

    @pytest.mark.usefixtures("topk_is_all")
    def test_one_without_its_manifest(self, artifacts: Path) -> None:
        """What a build that was killed before it wrote the manifest leaves."""
        wanted = contents(artifacts)
        (artifacts / "manifest.json").unlink()
        assert build_in(artifacts).exit_code == 0
        assert contents(artifacts) == wanted

    def test_a_file_of_our_name_that_no_manifest_lists_is_kept(self, tmp_path: Path) -> None:
        """A copy of the PTX put aside by hand, say; a killed build left the same bytes."""
        kept = tmp_path / "router_topk.sm_90a.ptx"
        kept.write_text("tuned by hand")
        result = build_in(tmp_path)
        assert result.exit_code == 1
        assert f"{kept.name} is not what this build makes" in result.stderr
        assert contents(tmp_path) == {kept.name: b"tuned by hand"}

    @pytest.mark.parametrize(
        "text",
        [
            '{"name": "my hub project", "kernels": ["flash-attn"], "secret": "only copy"}',
            '{"schema_version": 1, "kernels": [{"name": "flash-attn"}]}',
            '{"schema_version": "1", "kernels": []}',
            'not "kernels" at all',
        ],
    )
    def test_a_manifest_of_another_program_is_refused(self, tmp_path: Path, text: str) -> None:
        (tmp_path / "manifest.json").write_text(text)
        check_refused(build_in(tmp_path), "manifest.json")
        assert contents(tmp_path) == {"manifest.json": text.encode()}

    @pytest.mark.usefixtures("topk_is_all")
    @pytest.mark.parametrize("dots", [False, True])
    @pytest.mark.parametrize("schema", [1, 2, 3])
    def test_kernels_of_the_past_go_if_the_manifest_vouches_for_them(
        self, artifacts: Path, schema: int, dots: bool
    ) -> None:
        """Whatever the manifest's schema: else a set could not be brought up to a new one."""
        wanted = contents(artifacts)
        if dots:
            (artifacts / ".DS_Store").touch()
        old = ("router_old.sm_90a.cubin", "router_old.sm_90a.ptx")
        list_old_kernel(artifacts, made=b"old", schema=schema)
        for name in old:
            (artifacts / name).write_bytes(b"old")
        result = build_in(artifacts)
        assert result.exit_code == 0, result.stderr
        assert contents(artifacts) == wanted | ({".DS_Store": b""} if dots else {})
        assert [line for line in result.stderr.splitlines() if "removed" in line] == [
            f"removed {name}" for name in old
        ]

    def test_the_user_stands_in_it(self, stale: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        """A shell must not be left in a folder that is no more."""
        monkeypatch.chdir(stale)
        result = build_in(".")
        assert result.exit_code == 0, result.output
        assert set(os.listdir(".")) == FILES
        assert os.path.samefile(".", stale)
        assert not [name for name in os.listdir(stale.parent) if name.startswith("..")]

    def test_the_user_stands_in_a_dot_folder_of_it(
        self, stale: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        (stale / ".trash").mkdir()
        monkeypatch.chdir(stale / ".trash")
        assert build_in("..").exit_code == 0
        assert os.path.samefile("..", stale)

    def test_the_users_folder_is_gone(
        self, artifacts: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        (artifacts.parent / "gone").mkdir()
        monkeypatch.chdir(artifacts.parent / "gone")
        (artifacts.parent / "gone").rmdir()
        result = build_in(artifacts)
        assert result.exit_code == 0, result.output
        assert result.stdout.rstrip().endswith(str(artifacts))
        result = build_in("artifacts")
        assert result.exit_code == 1
        assert "the current folder is gone" in result.stderr

    def test_a_symlink_to_it_is_followed(self, stale: Path) -> None:
        release = stale.rename(stale.parent / "7")
        current = stale.parent / "current"
        current.symlink_to("7")
        result = build_in(current)
        assert result.exit_code == 0, result.stderr
        assert os.readlink(current) == "7"
        assert set(contents(release)) == FILES
        check_whole(release)
        assert "removed" not in result.stderr

    @pytest.mark.parametrize("below", [".", "set/a"])
    @pytest.mark.parametrize("target", ["nowhere", "artifacts"])
    def test_a_symlink_to_nothing_is_refused(self, tmp_path: Path, target: str, below: str) -> None:
        """A volume that is not mounted: its mount point is not to be filled in its place."""
        (tmp_path / "artifacts").symlink_to(target)
        result = build_in(tmp_path / "artifacts" / below)
        assert result.exit_code == 1
        assert isinstance(result.exception, SystemExit), result.exception
        assert "symbolic link" in result.stderr
        assert os.listdir(tmp_path) == ["artifacts"]

    def test_dot_files_stay_as_they_are(self, stale: Path) -> None:
        """Notebooks', editors' and desktops': a dangling link is emacs's lock."""
        (stale / ".ipynb_checkpoints").mkdir(mode=0o700)
        (stale / ".ipynb_checkpoints" / "a-checkpoint.ipynb").write_text("{}")
        (stale / ".#manifest.json").symlink_to("me@host.1234:567")
        (stale / ".DS_Store").write_bytes(b"finder")
        os.mkfifo(stale / ".pipe")
        names = (".ipynb_checkpoints", ".#manifest.json", ".DS_Store", ".pipe")
        before = {name: (stale / name).lstat() for name in names}
        result = build_in(stale)
        assert result.exit_code == 0, result.stderr
        assert {name: (stale / name).lstat() for name in names} == before
        assert (stale / ".ipynb_checkpoints" / "a-checkpoint.ipynb").read_text() == "{}"
        assert set(os.listdir(stale)) == FILES | set(names)
        check_whole(stale)

    @pytest.mark.parametrize("dots", [False, True])
    def test_mode_and_owner_of_the_folder_stay(self, stale: Path, dots: bool) -> None:
        if dots:
            (stale / ".DS_Store").touch()
        if os.geteuid() == 0:
            os.chown(stale, 1234, 2345)
        stale.chmod(0o2775)
        before = stale.stat()
        assert build_in(stale).exit_code == 0
        after = stale.stat()
        assert stat.filemode(after.st_mode) == "drwxrwsr-x"
        assert (after.st_uid, after.st_gid) == (before.st_uid, before.st_gid)
        assert (stale / CUBIN).stat().st_gid == before.st_gid

    def test_files_that_are_up_to_date_stay_the_same_files(self, stale: Path) -> None:
        others = [stale / name for name in FILES - {CUBIN, "manifest.json"} if "sm_90a" not in name]
        before = {path: path.stat().st_ino for path in others}
        assert build_in(stale).exit_code == 0
        assert {path: path.stat().st_ino for path in others} == before

    def test_a_read_only_folder_is_refused_before_anything_is_compiled(
        self, stale: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(os, "access", lambda path, mode: path != stale)
        monkeypatch.setattr(build, "_compile_all", None)
        before = tree(stale.parent)
        result = build_in(stale)
        assert result.exit_code == 1
        assert f"no file can be made in {stale} (it is read-only)" in result.stderr
        assert tree(stale.parent) == before

    def test_a_hard_link_elsewhere_keeps_its_bytes(self, stale: Path) -> None:
        copy = stale.parent / "copy.cubin"
        (stale / CUBIN).write_bytes(b"mine")
        os.link(stale / CUBIN, copy)
        assert build_in(stale).exit_code == 0
        assert copy.read_bytes() == b"mine"
        assert (stale / CUBIN).read_bytes() != b"mine"
