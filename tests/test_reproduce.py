"""Two builds in other surroundings: what is other, what a difference says, what is left behind."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

pytest.importorskip("click", reason="needs the builder")
pytest.importorskip("hatchling", reason="needs the extra `release`")

from builds import CHECKOUT, topk_set
from click.testing import CliRunner, Result
from processes import family

from build_kernels.building.build import BuildError
from build_kernels.cli import main as cli
from build_kernels.release import reproduce, surroundings, two_builds
from build_kernels.release.surroundings import Source, make_place, read_source, two_surroundings
from build_kernels.release.two_builds import Selection, quick_selection
from build_kernels.specs import KERNELS

ROOT = Path(__file__).parents[1]
NEEDS_GIT = pytest.mark.skipif(not (ROOT / ".git").exists(), reason="not run: no git checkout")
ONE = ("--kernel=router_topk", "--arch=sm_90a")
PROBE = """
import glob, json, locale, os, time
mask = os.umask(0)
names = os.listdir(".")
walked = next(os.walk("."))
assert names == [entry.name for entry in os.scandir()] == glob.glob("*") == walked[2]
print(json.dumps([
    mask, names, hash("a"), time.localtime(0).tm_hour, locale.setlocale(locale.LC_ALL, ""),
    os.getcwd(), os.path.expanduser("~"), os.environ["TMPDIR"], int(os.stat("a").st_mtime),
    oct(os.stat("a").st_mode), oct(os.stat(".").st_mode),
]))
"""


def call(*arguments: str | Path) -> Result:
    return CliRunner().invoke(cli.main, ["reproduce", *map(str, arguments)])


@pytest.fixture
def source(tmp_path: Path) -> Source:
    """A checkout of three files."""
    root = tmp_path / "source"
    root.mkdir()
    for name in "abc":
        (root / name).write_text(name)
    return Source(root=root, files=("a", "b", "c"), commit="0" * 40, epoch=1, changed=False)


@pytest.fixture
def outputs(tmp_path: Path, source: Source, monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """The output folders of the two builds that the command runs, to spoil."""
    places = [make_place(tmp_path / "work", each, source, []) for each in two_surroundings()]
    for place in places:
        topk_set(place.output / "artifacts")
    monkeypatch.setattr(reproduce, "build_twice", lambda *_: tuple(places))
    monkeypatch.setattr(reproduce, "read_source", lambda: source)
    return [place.output for place in places]


def test_whatever_a_build_should_not_depend_on_is_other(tmp_path: Path, source: Source) -> None:
    seen = []
    for around in two_surroundings():
        place = make_place(tmp_path, around, source, [])
        done = subprocess.run(
            [sys.executable, "-c", PROBE],
            cwd=place.checkout,
            env=place.environment(),
            umask=around.umask,
            capture_output=True,
            text=True,
            check=True,
        )
        seen.append(json.loads(done.stdout))
        assert place.environment()["SOURCE_DATE_EPOCH"] == "1"
    for first, second in zip(*seen, strict=True):
        assert first != second
    assert seen[1][1] == ["c", "b", "a"]
    jobs = [around.jobs for around in two_surroundings()]
    assert jobs[0] == 1 < jobs[1]


def test_quick_takes_a_kernel_of_each_language() -> None:
    chosen = quick_selection()
    specs = [spec for spec in KERNELS if spec.name in chosen.names]
    assert len(specs) == len(chosen.names) == len({type(spec.source) for spec in KERNELS}) == 2
    assert len({type(spec.source) for spec in specs}) == 2
    assert len(chosen.archs) == 1
    assert not chosen.is_whole
    assert Selection().is_whole


@NEEDS_GIT
def test_the_source_is_the_commit_with_its_files() -> None:
    found = read_source()
    commit, epoch = subprocess.run(
        ["git", "log", "-1", "--format=%H %ct"],
        cwd=ROOT,
        capture_output=True,
        check=True,
        text=True,
    ).stdout.split()
    assert (found.commit, found.epoch) == (commit, int(epoch))
    assert {"pyproject.toml", "artifacts/manifest.json"} <= set(found.files)
    assert not [name for name in found.files if name.endswith((".cubin", ".pyc"))]


def test_a_wheel_takes_a_signature_and_the_kernels_that_are_not_compiled(tmp_path: Path) -> None:
    artifacts = topk_set(tmp_path / "artifacts", ["sm_90a"])
    for name in ("manifest.dsse.json", ".hidden"):
        (artifacts / name).touch()
    documents = {"artifacts/manifest.json", "artifacts/manifest.dsse.json"}
    kernels = {f"artifacts/router_topk.sm_90a.{kind}" for kind in ("cubin", "ptx")}
    assert set(two_builds._built_files(tmp_path, Selection())) == documents
    assert set(two_builds._built_files(tmp_path, quick_selection())) == documents | kernels


class TestReport:
    def test_of_no_difference(self, outputs) -> None:
        result = call(*ONE)
        assert result.exit_code == 0
        assert result.stdout.startswith(f"commit {'0' * 40}, SOURCE_DATE_EPOCH 1\n")
        assert "7 files are the same, 0 differ" in result.stdout

    def test_of_a_difference(self, outputs, monkeypatch: pytest.MonkeyPatch) -> None:
        commands = []

        def asked(command: list[str], **_: object) -> subprocess.CompletedProcess:
            commands.append(command)
            return subprocess.CompletedProcess(command, 1, "router_topk changed\n", "")

        cubin = outputs[1] / "artifacts" / "router_topk.sm_90a.cubin"
        data = cubin.read_bytes()
        cubin.write_bytes(data[:7] + b"\x55" + data[8:])
        monkeypatch.setattr(subprocess, "run", asked)
        result = call(*ONE)
        assert result.exit_code == 1
        (command,) = commands
        folders = [str(output / "artifacts") for output in outputs]
        assert command[1:] == ["-m", "build_kernels", "diff", *folders]
        size = len(data)
        assert (
            "artifacts/router_topk.sm_90a.cubin differs:\n"
            f"  byte 7, the first of 1 ({size} and {size} bytes): {data[7]:#04x} | 0x55\n"
            "router_topk changed\n"
            "6 files are the same, 1 differ"
        ) in result.stdout
        assert "--keep FOLDER" in result.stderr

    def test_as_json(self, outputs) -> None:
        (outputs[1] / "artifacts" / "manifest.json").unlink()
        result = call(*ONE, "--json")
        assert result.exit_code == 1
        report = json.loads(result.stdout)
        missing = {"file": "artifacts/manifest.json", "field": "file"}
        assert report["differences"] == [missing | {"first": "there", "second": "missing"}]
        assert len(report["files"]) == 7
        assert [each["name"] for each in report["surroundings"]] == ["first", "second"]

    def test_is_cut_off_after_twenty_lines_for_a_file(self, outputs) -> None:
        for output, value in zip(outputs, "ab", strict=True):
            (output / "x.json").write_text(json.dumps({str(key): value for key in range(30)}))
        result = call(*ONE)
        assert "  19: " in result.stdout
        assert "  20: " not in result.stdout
        assert "\n  and 10 more\n" in result.stdout

    def test_keeps_both_outputs(self, outputs, tmp_path: Path) -> None:
        assert call(*ONE, "--keep", tmp_path / "new" / "kept").exit_code == 0
        kept = tmp_path / "new" / "kept"
        assert sorted(path.name for path in kept.iterdir()) == ["first", "second"]
        assert (kept / "second" / "artifacts" / "manifest.json").is_file()


class TestRefused:
    def test_quick_with_kernels(self) -> None:
        result = call("--quick", *ONE)
        assert result.exit_code == 2
        assert "leave --kernel and --arch out" in result.stderr

    def test_a_folder_to_keep_in_that_is_not_empty(self, outputs, tmp_path: Path) -> None:
        (tmp_path / "mine").mkdir()
        (tmp_path / "mine" / "file").touch()
        result = call("--keep", tmp_path / "mine")
        assert result.exit_code == 1
        assert "it is not empty; name a new folder" in result.stderr
        assert os.listdir(tmp_path / "mine") == ["file"]

    def test_no_folder_to_keep_in_stays_if_a_build_fails(
        self, outputs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def fails(*_: object) -> None:
            raise BuildError("no")

        monkeypatch.setattr(reproduce, "build_twice", fails)
        assert call("--keep", tmp_path / "mine").exit_code == 1
        assert not (tmp_path / "mine").exists()
        (tmp_path / "mine").mkdir()
        assert call("--keep", tmp_path / "mine").exit_code == 1
        assert (tmp_path / "mine").exists(), "it was there before"

    def test_a_folder_to_keep_in_that_takes_no_file(
        self, outputs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """It is said before the builds, not after them."""
        monkeypatch.setattr(reproduce, "build_twice", None)
        # These tests may run as root, whom a mode does not keep out.
        monkeypatch.setattr(os, "access", lambda path, _mode: path != tmp_path / "mine")
        (tmp_path / "mine").mkdir()
        result = call("--keep", tmp_path / "mine")
        assert result.exit_code == 1
        assert "no file can be made in it; name a new folder" in result.stderr

    @pytest.mark.parametrize("world", ["no git", "no repository", "no commit", "no checkout"])
    def test_without_a_commit(self, world: str, tmp_path: Path, monkeypatch) -> None:
        monkeypatch.setattr(surroundings, "_ROOT", tmp_path)
        if world != "no checkout":
            (tmp_path / "pyproject.toml").touch()
        if world in ("no commit", "no checkout"):
            subprocess.run(["git", "init", "-q", tmp_path], check=True)
        if world == "no git":
            monkeypatch.setenv("PATH", str(tmp_path))
        monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
        result = call(*ONE)
        assert result.exit_code == 1
        assert "it needs git and a checkout: " in result.stderr
        assert result.stderr.rstrip().endswith("clone the repository and run it there")

    @pytest.mark.parametrize("spoiled", ["no folder", "no manifest", "no JSON", "a cubin missing"])
    def test_a_part_without_the_other_kernels(self, spoiled: str, tmp_path: Path) -> None:
        artifacts = tmp_path / "artifacts"
        if spoiled != "no folder":
            topk_set(artifacts)
        if spoiled == "no manifest":
            (artifacts / "manifest.json").unlink()
        if spoiled == "no JSON":
            (artifacts / "manifest.json").write_text("{")
        if spoiled == "a cubin missing":
            (artifacts / "router_topk.sm_90a.cubin").unlink()
        with pytest.raises(BuildError, match=r"damaged. Run `build-kernels build` first"):
            two_builds._built_files(tmp_path, quick_selection())
        assert two_builds._built_files(tmp_path, Selection()) is not None

    def test_without_hatchling(self, outputs, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setitem(sys.modules, "hatchling", None)
        result = call(*ONE)
        assert result.exit_code == 1
        assert "pip install 'dsv4-router-builder[release]'" in result.stderr


def test_a_failed_build_shows_the_end_of_its_log(tmp_path: Path, source: Source) -> None:
    first = replace(two_surroundings()[0], name="only")
    place = make_place(tmp_path / "work", first, source, [])
    lines = "print('so far', flush=True)\nraise SystemExit('no more')\n"
    (place.checkout / "failing.py").write_text(lines)
    with pytest.raises(BuildError, match=r"the only build failed: .*ended with 1:\n  so far\n"):
        two_builds._run(place, ".", "failing")


@pytest.mark.slow
@pytest.mark.parametrize("deaf", [False, True])
def test_an_interrupted_build_is_ended(
    deaf: bool, tmp_path: Path, source: Source, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also one that does not listen to SIGTERM."""
    place = make_place(tmp_path / "work", two_surroundings()[0], source, [])
    deafness = "signal.signal(signal.SIGTERM, signal.SIG_IGN)\n" * deaf
    (place.checkout / "lasting.py").write_text(
        f"import os, signal, time\n{deafness}open('partial', 'w').write(str(os.getpid()))\n"
        "os.rename('partial', 'pid')\ntime.sleep(60)\n"
    )
    pid = place.checkout / "pid"
    monkeypatch.setattr(two_builds, "_SECONDS_TO_END", 0.5 if deaf else 20)

    def interrupt(*_: object) -> None:
        if pid.exists():
            signal.setitimer(signal.ITIMER_REAL, 0)
            raise KeyboardInterrupt

    before = signal.signal(signal.SIGALRM, interrupt)
    try:
        signal.setitimer(signal.ITIMER_REAL, 0.1, 0.1)
        with pytest.raises(KeyboardInterrupt):
            two_builds._run(place, ".", "lasting")
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
    with pytest.raises(ProcessLookupError):
        os.kill(int(pid.read_text()), 0)


# Each breaks one thing that the builds should agree on; none is part of a source digest.
FAULTS = {
    "build_kernels/building/build.py": (
        "    return Built(entry=entry, cubin=compiled.cubin, ptx=compiled.ptx)\n",
        "    cubin = compiled.cubin[:-1] + bytes([hash('x') % 256])\n"
        "    from dataclasses import replace\n"
        "    from build_kernels.building.entry import sha256\n"
        "    entry = replace(entry, cubin_sha256=sha256(cubin))\n"
        "    ptx = compiled.ptx + '// ' + str(Path.home())\n"
        "    return Built(entry=entry, cubin=cubin, ptx=ptx)\n",
    ),
    "build_kernels/building/sbom.py": (
        '        "version": 1,\n',
        '        "version": 1 + len(__import__("time").strftime("%Z")),\n',
    ),
    "build_kernels/building/wheel_hook.py": (
        "        if self.target_name ==",
        "        import os, time\n"
        "        os.environ['SOURCE_DATE_EPOCH'] = str(int(time.time()))\n"
        "        if self.target_name ==",
    ),
}


@pytest.fixture
def repository(tmp_path: Path) -> Path:
    """A copy of this checkout with one commit, and the built artifacts."""
    root = tmp_path / "repository"
    for name in read_source().files:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, root / name)
    shutil.copytree(CHECKOUT, root / "artifacts", dirs_exist_ok=True)
    git = ("git", "-C", str(root), "-c", "user.name=t", "-c", "user.email=t@example.org")
    for command in (("init", "-q"), ("add", "."), ("commit", "-q", "-m", "All")):
        subprocess.run([*git, *command], check=True)
    return root


@NEEDS_GIT
@pytest.mark.slow
def test_two_real_builds_differ_where_something_depends_on_the_surroundings(
    repository: Path, tmp_path: Path
) -> None:
    """CI runs `reproduce --quick`, which shows that without these faults nothing differs."""
    for name, (old, new) in FAULTS.items():
        text = (repository / name).read_text()
        assert text.count(old) == 1, name
        (repository / name).write_text(text.replace(old, new))
    (tmp_path / "tmp").mkdir()
    done = subprocess.run(
        [sys.executable, "-m", "build_kernels", "reproduce", *ONE, "--json"],
        cwd=repository,
        env=os.environ | {"PYTHONPATH": str(repository), "TMPDIR": str(tmp_path / "tmp")},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 1, done.stderr
    report = json.loads(done.stdout)
    assert report["uncommitted_changes"] is True
    assert os.listdir(tmp_path / "tmp") == []
    found = {f"{each['file']}: {each['field']}" for each in report["differences"]}
    assert len(report["files"]) == 6
    for pattern in (
        r"artifacts/router_topk.sm_90a.cubin: byte \d+, the first of 1 .*",
        r"artifacts/router_topk.sm_90a.ptx: byte \d+, .*",
        r"artifacts/manifest.json: kernels\[0\].cubin_sha256",
        r"dist/dsv4_router-.*whl: dsv4_router_runtime/__init__.py: date",
        r"dist/dsv4_router-.*whl: .*/sboms/dsv4-router.cdx.json: version",
    ):
        assert [each for each in found if re.fullmatch(pattern, each)], (pattern, found)
    assert not [each for each in found if each.startswith("dist/dsv4_router_builder")]


@NEEDS_GIT
@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_interrupted_it_leaves_neither_a_process_nor_a_file(
    number: signal.Signals, tmp_path: Path
) -> None:
    before = sorted(path.name for path in CHECKOUT.parent.iterdir())
    command = [sys.executable, "-m", "build_kernels", "reproduce", *ONE]
    keep = ["--keep", str(tmp_path / "kept")]
    (tmp_path / "tmp").mkdir()
    with family([*command, *keep], TMPDIR=str(tmp_path / "tmp")) as members:
        members.wait_for("spawn_main")
        # Ctrl-C is for the whole group of a terminal, kill for one process.
        members.signal(number, group=number == signal.SIGINT)
        assert members.head.wait(30) == 130
        assert members.survivors(0.5) == []  # not those that will end by themselves
    assert os.listdir(tmp_path) == ["tmp"]
    assert os.listdir(tmp_path / "tmp") == []
    assert sorted(path.name for path in CHECKOUT.parent.iterdir()) == before
