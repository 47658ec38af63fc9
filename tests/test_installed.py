"""An installed wheel alone: no checkout, no PTX. Its set is shown and verified like a build's."""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import subprocess
import sys
import types
from pathlib import Path

import pytest

pytest.importorskip("click", reason="needs the builder")
pytest.importorskip("elftools", reason="needs the builder")

from builds import tasks_here, topk_set

from build_kernels.evidence import climb
from build_kernels.evidence.climb import verify

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[1]
PACKAGES = ("build_kernels", "dsv4_router_runtime")
KEY = "router_topk.sm_100a"


def _wheel_contents(root: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
    """Return what the wheel hook adds to a wheel of `root`: source by place in the wheel."""
    interface = types.ModuleType("hatchling.builders.hooks.plugin.interface")
    interface.BuildHookInterface = types.SimpleNamespace  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, interface.__name__, interface)
    for name in ("hatchling", "hatchling.builders", "hatchling.builders.hooks"):
        monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
    monkeypatch.setitem(sys.modules, "hatchling.builders.hooks.plugin", types.ModuleType("plugin"))
    monkeypatch.setattr(sys, "path", list(sys.path))
    place = ROOT / "build_kernels/building/wheel_hook.py"
    spec = importlib.util.spec_from_file_location("hook", place)
    assert spec is not None
    assert spec.loader is not None
    hook = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(hook)
    build_data: dict = {"force_include": {}, "sbom_files": []}
    # A wheel must carry every kernel; these tests are content with one.
    monkeypatch.setattr("build_kernels.building.plan.packaging_problem", lambda manifest: None)
    hook.ArtifactsHook(root=str(root), target_name="wheel").initialize("standard", build_data)
    return {place: source for source, place in build_data["force_include"].items()}


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A site-packages folder as `pip install` of the wheel leaves it."""
    base = tmp_path_factory.mktemp("installed")
    built = base / "checkout" / "artifacts"
    topk_set(built, ["sm_100a"])
    shutil.copy(ROOT / "pyproject.toml", base / "checkout")
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setattr(climb, "run_tasks", tasks_here)
        verify(built, rungs=["structure"])
    site = base / "site"
    for package in PACKAGES:
        ignored = shutil.ignore_patterns("__pycache__")
        shutil.copytree(ROOT / package, site / package, ignore=ignored)
    with pytest.MonkeyPatch.context() as monkeypatch:
        for place, source in _wheel_contents(base / "checkout", monkeypatch).items():
            (site / place).parent.mkdir(exist_ok=True)
            shutil.copy2(source, site / place)
    return site


def call(site: Path, folder: Path, *arguments: str) -> subprocess.CompletedProcess:
    """Run build-kernels of the installed package in another folder."""
    return subprocess.run(
        [sys.executable, "-m", "build_kernels", *arguments],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(site)},
        capture_output=True,
        text=True,
        check=False,
    )


def _contents(site: Path) -> dict[str, bytes]:
    folder = site / "dsv4_router_runtime" / "_artifacts"
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def test_the_wheel_carries_cubins_manifest_and_evidence(site: Path) -> None:
    assert set(_contents(site)) == {f"{KEY}.cubin", "manifest.json", "evidence.json"}


def test_list_tells_the_installed_sets_state_and_evidence(site: Path, tmp_path: Path) -> None:
    done = call(site, tmp_path, "list", "--json")
    assert done.returncode == 0, done.stderr
    rows = {f"{row['kernel']}.{row['arch']}": row for row in json.loads(done.stdout)}
    assert rows[KEY]["state"] == "built"
    assert rows[KEY]["structure"] == "passed"
    assert {row["state"] for key, row in rows.items() if key != KEY} == {"not built"}


def test_inspect_works_on_the_installed_set(site: Path, tmp_path: Path) -> None:
    done = call(site, tmp_path, "inspect", "router_topk")
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(f"{KEY}: router_topk in {KEY}.cubin")
    missing = call(site, tmp_path, "inspect", "router_hash")
    assert missing.returncode == 1
    assert "not built: manifest.json lists no router_hash.sm_90a" in missing.stderr
    assert "pip install --force-reinstall dsv4-router" in missing.stderr


@pytest.mark.slow
def test_verify_says_what_needs_the_ptx_and_changes_no_installed_file(
    site: Path, tmp_path: Path
) -> None:
    before = _contents(site)
    done = call(site, tmp_path, "verify", "--json")
    assert done.returncode == 0, done.stderr
    rows = {row["rung"]: row for row in json.loads(done.stdout)}
    assert (rows["structure"]["status"], rows["structure"]["scope"]) == ("passed", "quick")
    assert "the set carries no PTX" in rows["structure"]["assumptions"][0]
    for rung in ("protocol", "emulated"):
        assert rows[rung]["status"] == "not run"
        assert "build-kernels build --artifacts FOLDER" in rows[rung]["reason"]
    assert "the evidence is printed and not kept: the set is part of an installed" in done.stderr
    named = call(site, tmp_path, "verify", "--rung", "emulated")
    assert named.returncode == 1
    assert f"1 not shown: {KEY} emulated" in named.stderr
    assert _contents(site) == before
    assert [path.name for path in (site / "dsv4_router_runtime").glob(".*")] == []


@pytest.mark.slow
def test_stored_evidence_stands_where_the_ptx_is_missing(site: Path, tmp_path: Path) -> None:
    """Unless the rung is asked for by name."""
    other = shutil.copytree(site, tmp_path / "site")
    path = other / "dsv4_router_runtime" / "_artifacts" / "evidence.json"
    document = json.loads(path.read_bytes())
    code = "from build_kernels.evidence.rungs.emulated import RUNG; print(RUNG.present_checker())"
    checker = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout
    document["evidence"][0]["rungs"]["emulated"] = {
        "status": "passed",
        "scope": "full",
        "checker": checker.strip(),
    }
    path.write_text(json.dumps(document))
    for arguments, status in (((), "passed"), (("--rung", "emulated"), "not run")):
        done = call(other, tmp_path, "verify", "--json", *arguments)
        rows = {row["rung"]: row for row in json.loads(done.stdout)}
        assert rows["emulated"]["status"] == status


def test_records_are_not_merged_into_an_installed_set(site: Path, tmp_path: Path) -> None:
    record = tmp_path / "record.json"
    manifest = json.loads(_contents(site)["manifest.json"])
    (kernel,) = manifest["kernels"]
    facts = {name: kernel[name] for name in ("cubin_sha256", "ptx_sha256", "arch")}
    run = {"gpu": "B200", "driver": "580", "date": "2026-01-31", "cases": {"t": 1}, "failed": []}
    document = {"schema_version": 2, "records": [{"artifact": KEY, **facts, **run}]}
    record.write_text(json.dumps(document))
    done = call(site, tmp_path, "verify", "--record", str(record))
    assert done.returncode == 1
    assert "the records cannot be merged: the set is part of an installed package" in done.stderr


def test_mutants_say_that_they_need_the_ptx(site: Path, tmp_path: Path) -> None:
    pytest.importorskip("torch")
    pytest.importorskip("numpy")
    pytest.importorskip("sentryward")
    done = subprocess.run(
        [sys.executable, "-m", "build_kernels.mutants"],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(site)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 1
    assert done.stdout == ""
    assert "the set carries no PTX" in done.stderr
