"""The command's manners: what goes to stdout, what to stderr, which exit status, which words."""

from __future__ import annotations

import io
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("click", reason="needs the builder")

from builds import topk_set
from click.testing import CliRunner, Result
from rich.console import Console
from watchdog import ends_within

from build_kernels.building import build as builder
from build_kernels.building import compilers
from build_kernels.building import plan as plan_module
from build_kernels.building.staging import build_folder
from build_kernels.cli import main as cli
from build_kernels.cli.listing import list_rows, print_rows
from build_kernels.specs import ARCHITECTURES, KERNELS
from dsv4_router_runtime.artifacts.manifest import parse_manifest

ARCHS = [arch.name for arch in ARCHITECTURES]
TOPK = "router_topk"
KERNELS_AND_ARCHS = (*(spec.name for spec in KERNELS), *ARCHS)


def call(*arguments: str | Path) -> Result:
    return CliRunner().invoke(cli.main, [str(argument) for argument in arguments])


@pytest.fixture(scope="module")
def artifacts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return topk_set(tmp_path_factory.mktemp("cli") / "artifacts")


@pytest.mark.slow
def test_build_prints_json_on_stdout_and_talks_on_stderr(tmp_path: Path) -> None:
    options = ("--kernel", TOPK, "--arch", "sm_90a", "--arch", "sm_100a", "--jobs", "1")
    result = call("build", *options, "--artifacts", tmp_path / "a", "--json")
    assert result.exit_code == 0
    report = json.loads(result.stdout)
    assert report.keys() == {"built", "up_to_date", "kept", "removed", "seconds"}
    assert report["built"] == [f"{TOPK}.sm_90a", f"{TOPK}.sm_100a"]
    assert "building from scratch" in result.stderr
    assert f"compiled {TOPK}.sm_90a" in result.stderr


def test_build_says_what_it_did(artifacts: Path) -> None:
    result = call("build", "--kernel", TOPK, "--arch", "sm_90a", "--artifacts", artifacts)
    assert result.exit_code == 0
    assert result.stdout.startswith("0 built, 1 up to date, 2 not requested in ")
    assert result.stderr == ""


@pytest.mark.parametrize("command", ["build", "inspect"])
def test_an_unknown_architecture_lists_the_allowed_ones(command: str) -> None:
    arguments = [TOPK] if command == "inspect" else []
    result = call(command, *arguments, "--arch", "sm_80")
    assert result.exit_code == 2
    assert "'sm_80'" in result.stderr
    assert all(arch in result.stderr for arch in ARCHS)
    assert result.stdout == ""


@pytest.mark.parametrize("arguments", [("build", "--kernel", "gemm"), ("inspect", "gemm")])
def test_an_unknown_kernel_lists_the_allowed_ones(arguments: tuple[str, ...]) -> None:
    result = call(*arguments)
    assert result.exit_code == 2
    assert all(spec.name in result.stderr for spec in KERNELS)


@pytest.mark.parametrize("jobs", ["0", "-1", "many"])
def test_jobs_is_at_least_one(jobs: str) -> None:
    assert call("build", "--jobs", jobs).exit_code == 2


@pytest.mark.parametrize("option", [("--arch", "sm_90a"), ("--kernel", TOPK)])
def test_locked_checks_the_whole_set(option: tuple[str, str]) -> None:
    result = call("build", "--locked", *option)
    assert result.exit_code == 2
    assert "--locked checks the whole set" in result.stderr


def test_a_failed_build_exits_1_with_the_compilers_words(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_args: object, **_options: object) -> None:
        raise builder.BuildError("router_topk.sm_90a: error: [bold]identifier[/bold] undefined")

    monkeypatch.setattr(builder, "run_build", fail)
    result = call("build", "--kernel", TOPK, "--artifacts", tmp_path / "a")
    assert result.exit_code == 1
    assert "error: router_topk.sm_90a: error: [bold]identifier[/bold] undefined" in result.stderr
    assert result.stdout == ""


def test_a_missing_compiler_is_said_plainly(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(compilers, "NVRTC_DISTRIBUTION", "no-such-nvrtc")
    result = call("build", "--artifacts", tmp_path / "a")
    assert result.exit_code == 1
    assert "no-such-nvrtc is not installed; run `pip install dsv4-router-builder`" in result.stderr
    assert not (tmp_path / "a").exists()


def test_an_unwritable_place_is_an_error_without_a_traceback(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    command = [sys.executable, "-c", "from build_kernels.__main__ import main; main()"]
    command += ["build", "--kernel", TOPK, "--artifacts", str(tmp_path / "file" / "artifacts")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    last = done.stderr.splitlines()[-1]
    assert last.startswith(f"error: cannot build {tmp_path / 'file' / 'artifacts'}: no file can be")
    assert last.endswith("name a folder in a writable place with --artifacts FOLDER")
    assert "Errno" not in done.stderr
    assert "Traceback" not in done.stderr


def test_a_place_that_takes_no_files_is_said_with_the_way_out() -> None:
    result = call("build", "--kernel", TOPK, "--artifacts", "/proc/artifacts")
    assert result.exit_code == 1
    assert "no file can be made in /proc (" in result.stderr
    assert "with --artifacts FOLDER" in result.stderr
    assert "Errno" not in result.stderr


def test_a_refused_second_build_draws_no_progress(tmp_path: Path) -> None:
    with build_folder(tmp_path / "a"):
        result = call("build", "--kernel", TOPK, "--artifacts", tmp_path / "a")
    assert result.exit_code == 1
    assert "another build of" in result.stderr
    assert "compiling" not in result.stderr


def test_outside_a_checkout_the_folder_must_be_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(builder, "__file__", "/usr/lib/python3/build_kernels/building/build.py")
    result = call("build")
    assert result.exit_code == 1
    assert "this is not a checkout; say where to build with --artifacts" in result.stderr


def test_list_tells_state_loading_and_validation_apart(artifacts: Path) -> None:
    rows = json.loads(call("list", "--artifacts", artifacts, "--json").stdout)
    assert [(row["kernel"], row["arch"]) for row in rows] == [
        (spec.name, arch) for spec in KERNELS for arch in spec.archs
    ]
    states = {row["state"] for row in rows if row["kernel"] == TOPK}
    assert states == {"built"}
    assert {row["state"] for row in rows if row["kernel"] != TOPK} == {"not built"}
    by_arch = {row["arch"]: row for row in rows}
    assert by_arch["sm_103a"]["validated_on"] == "nowhere"
    assert by_arch["sm_103a"]["loads_on"] == "B300, GB300"
    table = call("list", "--artifacts", artifacts)
    assert table.exit_code == 0
    assert all(word in table.stdout for word in ("can load on", "validated on", "nowhere", "B300"))


def _states(*arguments: str | Path) -> dict[str, str]:
    result = call("list", "--kernel", TOPK, "--json", "--artifacts", *arguments)
    return {row["arch"]: row["state"] for row in json.loads(result.stdout)}


def test_list_sees_what_is_out_of_date(artifacts: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plan_module, "source_digest", lambda *_: "0" * 64)
    assert set(_states(artifacts).values()) == {"out of date"}
    result = call("list", "--artifacts", artifacts)
    assert "3 out of date: the sources or tools here are not those that made it" in result.stderr


def test_list_sees_what_is_damaged(artifacts: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(artifacts, tmp_path / "a"))
    (folder / f"{TOPK}.sm_90a.cubin").unlink()
    (folder / f"{TOPK}.sm_103a.ptx").write_text("another kernel")
    states = {"sm_90a": "damaged", "sm_100a": "built", "sm_103a": "damaged"}
    assert _states(folder) == states
    (folder / f"{TOPK}.sm_103a.ptx").unlink()
    assert _states(folder) == states


@pytest.mark.parametrize("name", ["manifest.json", f"{TOPK}.sm_90a.cubin", f"{TOPK}.sm_90a.ptx"])
def test_a_fifo_in_the_folder_holds_no_command_up(
    artifacts: Path, tmp_path: Path, name: str
) -> None:
    folder = Path(shutil.copytree(artifacts, tmp_path / "a"))
    (folder / name).unlink()
    os.mkfifo(folder / name)
    with ends_within(20):
        if name == "manifest.json":
            result = call("list", "--artifacts", folder)
            assert result.exit_code == 1
            assert f"{folder / name}: cannot be read (a FIFO" in result.stderr
        else:
            assert _states(folder)["sm_90a"] == "damaged"
        verified = call("verify", "--rung", "structure", "--artifacts", folder)
        assert verified.exit_code == 1
        assert "a FIFO, not a regular file" in verified.stderr


def test_list_without_compilers_cannot_compare_the_sources(
    artifacts: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(compilers, "NVRTC_DISTRIBUTION", "no-such-nvrtc")
    assert set(_states(artifacts).values()) == {"unknown"}
    result = call("list", "--artifacts", artifacts)
    assert result.exit_code == 0
    assert "3 unknown: not compared with the sources: no-such-nvrtc is not" in result.stderr


def test_list_of_a_broken_manifest_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "manifest.json").write_text("{")
    result = call("list", "--artifacts", tmp_path)
    assert result.exit_code == 1
    assert str(tmp_path / "manifest.json") in result.stderr


def test_list_shows_the_chosen_kernels_and_architectures(artifacts: Path) -> None:
    options = ("--kernel", TOPK, "--kernel", "router_hash", "--arch", "sm_90a")
    rows = json.loads(call("list", "--artifacts", artifacts, *options, "--json").stdout)
    assert [(row["kernel"], row["arch"]) for row in rows] == [
        ("router_hash", "sm_90a"),
        (TOPK, "sm_90a"),
    ]


@pytest.mark.slow
def test_a_familys_target_is_listed_if_it_is_asked_for_or_built(tmp_path: Path) -> None:
    family = topk_set(tmp_path / "family", ["sm_90a", "sm_100f"])
    assert _states(family) == {
        **{"sm_90a": "built", "sm_100a": "not built", "sm_103a": "not built"},
        "sm_100f": "built",
    }
    asked = call("list", "--artifacts", family, "--arch", "sm_103f", "--kernel", TOPK, "--json")
    (row,) = json.loads(asked.stdout)
    assert (row["arch"], row["state"], row["validated_on"]) == ("sm_103f", "not built", "nowhere")
    assert row["loads_on"].startswith("B300")


def test_list_check_fails_for_what_is_not_built(artifacts: Path) -> None:
    assert call("list", "--artifacts", artifacts, "--kernel", TOPK, "--check").exit_code == 0
    result = call("list", "--artifacts", artifacts, "--check")
    assert result.exit_code == 1
    assert "45 not built: the manifest does not list it" in result.stderr
    assert call("list", "--artifacts", artifacts).exit_code == 0


@pytest.mark.slow
def test_modules_that_compile_are_skipped_without_compilers() -> None:
    """As on a GPU machine that has the runtime's packages alone, where `-m gpu` is to run."""
    code = """
import importlib.metadata, sys
import pytest

found = importlib.metadata.version
def version(name):
    if name == "nvidia-cuda-nvrtc-cu12":
        raise importlib.metadata.PackageNotFoundError(name)
    return found(name)
importlib.metadata.version = version
sys.exit(pytest.main(["-q", "-p", "no:cacheprovider", "-p", "no:xdist", *sys.argv[1:]]))
"""
    modules = [Path(__file__), Path(__file__).with_name("test_staging.py")]
    command = [sys.executable, "-c", code, "--collect-only", *map(str, modules)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == pytest.ExitCode.NO_TESTS_COLLECTED, done.stdout
    assert "SKIPPED [2] " in done.stdout
    assert "not run: nvidia-cuda-nvrtc-cu12 is not installed; run `pip install " in done.stdout


@pytest.mark.quick(1)
@pytest.mark.parametrize("width", [80, 200])
def test_list_is_readable_on_a_terminal_of(width: int, artifacts: Path) -> None:
    rows = list_rows(artifacts)
    for row in rows:
        row["validated_on"] = "[/red] NVIDIA H200"  # a GPU's name is no markup
        row["lint"] = "does not apply"
    output = io.StringIO()
    print_rows(Console(file=output, width=width), rows)
    lines = output.getvalue().splitlines()
    assert max(map(len, lines)) <= width
    for words in (
        *KERNELS_AND_ARCHS,
        "not built",
        "does not",
        "[/red]",
        "GB300",
        "emulated",
    ):
        assert any(words in line for line in lines), words


def test_inspect_prints_the_manifests_entry(artifacts: Path) -> None:
    manifest = parse_manifest((artifacts / "manifest.json").read_bytes())
    entries = json.loads(call("inspect", TOPK, "--artifacts", artifacts, "--json").stdout)
    assert [entry["arch"] for entry in entries] == sorted(ARCHS)
    by_arch = {kernel.arch: kernel for kernel in manifest.kernels}
    for entry in entries:
        kernel = by_arch[entry["arch"]]
        assert entry["cubin_sha256"] == kernel.cubin_sha256
        assert entry["resources"]["opcodes"] == dict(kernel.resources.opcodes)
        assert [item["name"] for item in entry["parameters"]][:2] == ["logits", "e_bias"]


def test_inspect_for_people_names_abi_resources_and_opcodes(artifacts: Path) -> None:
    output = call("inspect", TOPK, "--arch", "sm_90a", "--artifacts", artifacts).stdout
    for words in ("block [128, 1, 1]", "registers", "spills 0 B", "REDUX", "out_ids_stride"):
        assert words in output
    assert "sm_100a" not in output


@pytest.mark.quick(1)
@pytest.mark.parametrize("damage", ["missing", "altered"])
def test_inspect_of_what_is_not_whole_names_the_repair(tmp_path: Path, damage: str) -> None:
    folder = topk_set(tmp_path / "a", ["sm_90a"])
    cubin = folder / f"{TOPK}.sm_90a.cubin"
    if damage == "missing":
        cubin.unlink()
    else:
        cubin.write_bytes(cubin.read_bytes() + b"x")
    result = call("inspect", TOPK, "--arch", "sm_90a", "--artifacts", folder)
    assert result.exit_code == 1
    assert str(cubin) in result.stderr
    assert f"repair it with `build-kernels build --artifacts {folder}`" in result.stderr


def test_inspect_without_a_build_names_the_command(tmp_path: Path) -> None:
    result = call("inspect", TOPK, "--artifacts", tmp_path)
    assert result.exit_code == 1
    assert f"{tmp_path / 'manifest.json'}: cannot be read" in result.stderr
    assert f"repair it with `build-kernels build --artifacts {tmp_path}`" in result.stderr


@pytest.mark.parametrize(
    "command", [["list"], ["inspect", TOPK], ["verify"], ["verify", "--rung", "structure"]]
)
def test_a_folder_that_is_not_there_is_an_error_with_the_repair(
    command: list[str], tmp_path: Path
) -> None:
    result = call(*command, "--artifacts", tmp_path / "nothing")
    assert result.exit_code == 1
    folder = tmp_path / "nothing"
    assert f"repair it with `build-kernels build --artifacts {folder}`" in result.stderr
    assert result.stdout == ""
    assert list(tmp_path.iterdir()) == []


def test_inspect_shows_several_kernels_and_what_is_built_of_them(artifacts: Path) -> None:
    result = call("inspect", TOPK, TOPK, "--artifacts", artifacts, "--json")
    assert [(entry["name"], entry["arch"]) for entry in json.loads(result.stdout)] == [
        (TOPK, arch) for arch in sorted(ARCHS)
    ]
    missing = call("inspect", TOPK, "router_hash", "--artifacts", artifacts)
    assert missing.exit_code == 1
    assert "not built: manifest.json lists no router_hash.sm_90a" in missing.stderr
    assert missing.stdout == ""


def test_an_unknown_kernel_is_answered_with_the_nearest_and_the_names_once() -> None:
    for arguments in (("inspect", "router_hsh"), ("list", "--kernel", "router_hsh")):
        result = call(*arguments)
        assert result.exit_code == 2
        assert "no kernel is called 'router_hsh'; did you mean router_hash" in result.stderr
        assert result.stderr.count("router_decode_kmajor_n64") == 1


def test_the_version_is_told_with_the_compilers(monkeypatch: pytest.MonkeyPatch) -> None:
    lines = call("--version").stdout.splitlines()
    assert lines[0].startswith("dsv4-router")
    assert {line.split()[0] for line in lines} >= {"nvidia-cutlass-dsl", "nvrtc"}
    monkeypatch.setattr(compilers, "NVRTC_DISTRIBUTION", "no-such-nvrtc")
    result = call("--version")
    assert result.exit_code == 0
    assert "no toolchain: no-such-nvrtc is not installed" in result.stdout


MODULES = ("build_kernels list", "build_kernels --help", "build_kernels.mutants --help")


@pytest.mark.quick(1)
@pytest.mark.parametrize("module", MODULES)
@pytest.mark.parametrize("target", ["/dev/full", "&-"])
def test_a_stdout_that_takes_nothing_is_a_plain_error(
    artifacts: Path, module: str, target: str
) -> None:
    options = f"--artifacts {artifacts}" if module.endswith("list") else ""
    command = f"{sys.executable} -m {module} {options} >{target}"
    done = subprocess.run(["sh", "-c", command], capture_output=True, text=True, check=False)
    assert done.returncode == 1
    reason = "No space left on device" if target == "/dev/full" else "standard output is closed"
    assert reason in done.stderr.splitlines()[-1]
    assert done.stderr.splitlines()[-1].startswith("error: ")
    assert "Traceback" not in done.stderr
    assert "Exception ignored" not in done.stderr


@pytest.mark.slow
def test_a_closed_stderr_and_a_reader_that_leaves_early_are_no_tracebacks(artifacts: Path) -> None:
    command = f"{sys.executable} -m build_kernels list --artifacts {artifacts}"
    for ending in ("2>&-", "| head -1"):
        done = subprocess.run(
            ["sh", "-c", f"{command} {ending}"], capture_output=True, text=True, check=False
        )
        assert done.returncode == 0
        assert "Traceback" not in done.stdout + done.stderr


@pytest.mark.parametrize(
    ("number", "before", "ending"),
    [("TERM", "DFL", "ended"), ("HUP", "DFL", "ended"), ("HUP", "IGN", "went on")],
)
def test_a_signal_that_ends_a_command_lets_it_clean_up(
    number: str, before: str, ending: str
) -> None:
    code = (
        "import os, signal\nfrom build_kernels.cli.console import stop_like_interrupt\n"
        # Or it is as these tests inherited it: under nohup ignored.
        f"signal.signal(signal.SIG{number}, signal.SIG_{before})\n"
        f"stop_like_interrupt()\ntry:\n    os.kill(os.getpid(), signal.SIG{number})\n"
        "    print('went on')\nexcept KeyboardInterrupt:\n    print('ended')\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.stdout == f"{ending}\n"


@pytest.mark.slow
@pytest.mark.parametrize("encoding", ["ascii:strict", "utf-8:strict"])
def test_what_the_output_cannot_hold_is_escaped(tmp_path: Path, encoding: str) -> None:
    """An arrow, and a name of a folder that is no text."""
    folder = os.fsencode(tmp_path) + b"/f\xff"
    os.mkdir(folder)
    (tmp_path / "manifest.json").write_text('{"schema_version": 99, "kernels": []}')
    with open(folder + b"/manifest.json", "w") as file:
        file.write('{"schema_version": 98, "kernels": []}')
    for arguments, status, words in (
        (("diff", folder, tmp_path), 1, "schema_version 98"),
        (("clean", "--dry-run", "--artifacts", folder), 0, "\\udcff"),
    ):
        done = subprocess.run(
            [sys.executable, "-m", "build_kernels", *arguments],
            env=os.environ | {"PYTHONIOENCODING": encoding},
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == status, done.stderr
        assert words in done.stdout
        assert "Traceback" not in done.stderr


@pytest.mark.parametrize("text", ["{", '{"schema_version": 99}'])
def test_inspect_of_a_broken_manifest_names_the_repair_once(tmp_path: Path, text: str) -> None:
    (tmp_path / "manifest.json").write_text(text)
    result = call("inspect", TOPK, "--artifacts", tmp_path)
    assert result.exit_code == 1
    assert str(tmp_path / "manifest.json") in result.stderr
    assert result.stderr.count(f"`build-kernels build --artifacts {tmp_path}`") == 1


@pytest.mark.parametrize(
    "command", [[], ["build"], ["clean"], ["list"], ["inspect"], ["verify"], ["diff"], ["budget"]]
)
def test_help(command: list[str]) -> None:
    result = call(*command, "--help")
    assert result.exit_code == 0
    assert "Usage" in result.stdout


def test_without_a_requirement_it_names_the_distribution() -> None:
    code = (
        "import sys; sys.modules['click'] = None; from build_kernels.__main__ import main; main()"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert done.stdout == ""
    assert done.stderr.startswith("error: build-kernels needs the package click")
    assert "pip install 'dsv4-router-builder'" in done.stderr


@pytest.mark.parametrize("module", ["build_kernels", "build_kernels.bench"])
@pytest.mark.parametrize("package", ["click", "rich"])
def test_a_module_without_a_requirement_names_the_distribution(module: str, package: str) -> None:
    code = (
        f"import sys, runpy; sys.modules[{package!r}] = None; "
        f"runpy.run_module({module!r}, run_name='__main__')"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert "Traceback" not in done.stderr
    assert f"needs the package {package}" in done.stderr
    assert "pip install 'dsv4-router-builder'" in done.stderr


@pytest.mark.parametrize(
    ("module", "name"),
    [("build_kernels", "build-kernels"), ("build_kernels.bench", "python -m build_kernels.bench")],
)
def test_it_runs_as_a_module(module: str, name: str) -> None:
    command = [sys.executable, "-m", module, "--help"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stdout.startswith(f"Usage: {name} ")


def test_clean_removes_what_a_build_made_and_keeps_what_is_tracked(
    artifacts: Path, tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(artifacts, tmp_path / "a"))
    (folder / "evidence.json").write_text("{}")
    (folder / ".keep").write_text("an editor's")
    (folder / "manifest.dsse.json").write_text("{}")
    (folder / f"{TOPK}.sm_90a.cubin").write_text("damaged")
    built = {path.name for path in folder.glob("router_*")}
    assert len(built) == 6
    kept = {".keep", "manifest.json", "manifest.dsse.json", "evidence.json"}
    dry = call("clean", "--dry-run", "--artifacts", folder)
    assert dry.exit_code == 0
    assert f"would remove {TOPK}.sm_90a.cubin" in dry.stderr
    assert {path.name for path in folder.glob("router_*")} == built
    report = json.loads(call("clean", "--artifacts", folder, "--json").stdout)
    assert set(report["removed"]) == built
    assert {path.name for path in folder.iterdir()} == kept
    again = call("clean", "--artifacts", folder)
    assert again.exit_code == 0
    assert again.stdout.startswith("0 files removed")
    assert {path.name for path in tmp_path.iterdir()} == {"a", ".a.lock"}


def test_a_dry_run_of_clean_leaves_what_a_killed_build_left(
    artifacts: Path, tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(artifacts, tmp_path / "a"))
    with build_folder(folder) as private:
        shutil.copytree(private, tmp_path / "kept")
    (tmp_path / "kept").rename(private)
    assert call("clean", "--dry-run", "--artifacts", folder).exit_code == 0
    assert private.is_dir()
    assert call("clean", "--artifacts", folder).exit_code == 0
    assert not private.exists()


def test_clean_refuses_a_folder_that_is_not_its_own(artifacts: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(artifacts, tmp_path / "a"))
    (folder / "notes.txt").write_text("mine")
    result = call("clean", "--artifacts", folder)
    assert result.exit_code == 1
    assert "cannot clean" in result.stderr
    assert "notes.txt" in result.stderr
    assert len(list(folder.glob("router_*"))) == 6
    for wrong, words in ((tmp_path / "absent", "no such folder"), (Path(__file__), "is a file")):
        refused = call("clean", "--artifacts", wrong)
        assert refused.exit_code in (1, 2)
        assert words in refused.stderr
    (folder / "notes.txt").unlink()
    with build_folder(folder):
        busy = call("clean", "--artifacts", folder)
    assert busy.exit_code == 1
    assert "is running" in busy.stderr
