"""The command's manners: what goes to stdout, what to stderr, which exit status, which words."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("click", reason="needs the extra `build`")

from click.testing import CliRunner, Result

from build_kernels import build as builder
from build_kernels import cli, compilers
from build_kernels import plan as plan_module
from build_kernels.specs import ARCHITECTURES, KERNELS
from build_kernels.staging import build_folder
from dsv4_router_runtime.manifest import parse_manifest

ARCHS = [arch.name for arch in ARCHITECTURES]
TOPK = "router_topk"


def call(*arguments: str | Path) -> Result:
    return CliRunner().invoke(cli.main, [str(argument) for argument in arguments])


@pytest.fixture(scope="module")
def artifacts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("cli") / "artifacts"
    result = call("build", "--kernel", TOPK, "--artifacts", folder, "--json")
    assert result.exit_code == 0, result.stderr
    return folder


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
    assert result.stdout.startswith("0 built, 1 up to date, 2 not asked for in ")
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
    assert "no-such-nvrtc is not installed; install this project's extra `build`" in result.stderr
    assert not (tmp_path / "a").exists()


def test_an_unwritable_place_is_an_error_without_a_traceback(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    command = [sys.executable, "-c", "from build_kernels.cli import main; main()"]
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
    monkeypatch.setattr(builder, "__file__", "/usr/lib/python3/build_kernels/build.py")
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


def test_list_sees_what_is_out_of_date(artifacts: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plan_module, "source_digest", lambda *_: "0" * 64)
    rows = json.loads(call("list", "--artifacts", artifacts, "--json").stdout)
    assert {row["state"] for row in rows if row["kernel"] == TOPK} == {"out of date"}


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


@pytest.mark.parametrize("damage", ["missing", "altered"])
def test_inspect_of_what_is_not_whole_names_the_repair(tmp_path: Path, damage: str) -> None:
    folder = tmp_path / "a"
    assert call("build", "--kernel", TOPK, "--arch", "sm_90a", "--artifacts", folder).exit_code == 0
    cubin = folder / f"{TOPK}.sm_90a.cubin"
    if damage == "missing":
        cubin.unlink()
    else:
        cubin.write_bytes(cubin.read_bytes() + b"x")
    result = call("inspect", TOPK, "--arch", "sm_90a", "--artifacts", folder)
    assert result.exit_code == 1
    assert f"build-kernels build --kernel {TOPK} --arch sm_90a" in result.stderr


def test_inspect_without_a_build_names_the_command(tmp_path: Path) -> None:
    result = call("inspect", TOPK, "--artifacts", tmp_path / "nothing")
    assert result.exit_code == 1
    assert "does not exist; make it with `build-kernels build`" in result.stderr


@pytest.mark.parametrize("text", ["{", '{"schema_version": 99}'])
def test_inspect_of_a_broken_manifest_names_the_repair_once(tmp_path: Path, text: str) -> None:
    (tmp_path / "manifest.json").write_text(text)
    result = call("inspect", TOPK, "--artifacts", tmp_path)
    assert result.exit_code == 1
    assert str(tmp_path / "manifest.json") in result.stderr
    assert result.stderr.count("`build-kernels build`") == 1


@pytest.mark.parametrize("command", [[], ["build"], ["list"], ["inspect"]])
def test_help(command: list[str]) -> None:
    result = call(*command, "--help")
    assert result.exit_code == 0
    assert "Usage" in result.stdout


def test_without_the_extra_it_names_the_extra() -> None:
    code = (
        "import sys; sys.modules['click'] = None; from build_kernels.__main__ import main; main()"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert done.stdout == ""
    assert done.stderr.startswith("error: build-kernels needs the package click")
    assert "pip install 'dsv4-router[build]'" in done.stderr


def test_it_runs_as_a_module() -> None:
    command = [sys.executable, "-m", "build_kernels", "--help"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stdout.startswith("Usage: build-kernels ")
