"""What is in the two wheels, and that a wheel has every kernel, made from these sources."""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import shutil
import subprocess
import sys
import types
from pathlib import Path
from types import SimpleNamespace

import pytest

pytest.importorskip("elftools", reason="needs the builder")

from builds import ARCHS, TOPK, topk_set

from build_kernels.building import plan
from dsv4_router_runtime.artifacts.folder import open_artifacts

HOOK = Path(plan.__file__).with_name("wheel_hook.py")
ROOT = HOOK.parents[2]
CUBINS = {f"{TOPK.name}.{arch}.cubin" for arch in ARCHS}


class Aborted(Exception):
    """Hatchling's application prints the message and exits."""


@pytest.fixture
def checkout(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A checkout whose specs name router_topk alone, built."""
    monkeypatch.setattr(plan, "KERNELS", (TOPK,))
    topk_set(tmp_path / "artifacts")
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    return tmp_path


@pytest.fixture
def package(checkout: Path, monkeypatch: pytest.MonkeyPatch) -> object:
    """Run the hook for a target, without hatchling; returns what goes where."""
    interface = types.ModuleType("hatchling.builders.hooks.plugin.interface")
    vars(interface)["BuildHookInterface"] = SimpleNamespace
    for name in ("hatchling", "hatchling.builders", "hatchling.builders.hooks"):
        monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
    monkeypatch.setitem(sys.modules, "hatchling.builders.hooks.plugin", types.ModuleType("plugin"))
    monkeypatch.setitem(sys.modules, interface.__name__, interface)
    monkeypatch.setattr(sys, "path", list(sys.path))
    spec = importlib.util.spec_from_file_location("wheel_hook", HOOK)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)

    def abort(message: str) -> None:
        raise Aborted(message)

    def run(target: str = "wheel", version: str = "standard") -> dict[str, str]:
        data: dict = {"force_include": {}, "sbom_files": []}
        app = SimpleNamespace(abort=abort)
        hook = module.ArtifactsHook(root=str(checkout), target_name=target, app=app)
        hook.initialize(version, data)
        return data["force_include"]

    return run


def refused(package, target: str) -> str:
    with pytest.raises(Aborted) as caught:
        package(target)
    message = str(caught.value)
    assert message.startswith(f"error: no {target} is made: ")
    assert "`build-kernels build" in message
    assert "\n" not in message
    return message


@pytest.mark.parametrize("evidence", [False, True])
def test_a_wheel_carries_manifest_cubins_and_evidence(checkout, package, evidence) -> None:
    if evidence:
        (checkout / "artifacts" / "evidence.json").write_text("{}")
    names = {"manifest.json", *CUBINS, *(["evidence.json"] if evidence else [])}
    assert package("wheel") == {
        str(checkout / "artifacts" / name): f"dsv4_router_runtime/_artifacts/{name}"
        for name in names
    }


def test_a_wheel_carries_the_signatures_of_its_set(checkout, package) -> None:
    sets = pytest.importorskip("signed_sets", reason="needs the extra `test`")
    manifest = open_artifacts(checkout / "artifacts").manifest
    payload = json.dumps(sets.statement(manifest)).encode()
    sets.write_envelope(checkout / "artifacts", sets.signed(payload))
    carried = f"dsv4_router_runtime/_artifacts/{sets.ENVELOPE_NAME}"
    assert carried in package("wheel").values()
    other = json.dumps(sets.statement(sets.small_manifest(manifest))).encode()
    sets.write_envelope(checkout / "artifacts", sets.signed(other))
    with pytest.raises(Aborted, match="is signed for another set"):
        package("wheel")
    sets.write_envelope(checkout / "artifacts", {})
    with pytest.raises(Aborted, match="payload: missing"):
        package("wheel")


def test_an_sdist_gets_nothing_that_it_has_not(package) -> None:
    assert package("sdist") == {}


@pytest.mark.parametrize("target", ["wheel", "sdist"])
class TestRefused:
    def test_without_cubins(self, checkout, package, target) -> None:
        for path in (checkout / "artifacts").glob("*.cubin"):
            path.unlink()
        assert "router_topk.sm_100a.cubin: missing" in refused(package, target)

    def test_without_artifacts(self, checkout, package, target) -> None:
        (checkout / "artifacts").rename(checkout / "elsewhere")
        assert "manifest.json" in refused(package, target)

    def test_an_altered_cubin(self, checkout, package, target) -> None:
        (checkout / "artifacts" / min(CUBINS)).write_bytes(b"\x7fELF")
        assert "altered or truncated" in refused(package, target)

    @pytest.mark.quick(1)
    def test_a_part_of_the_kernels(self, checkout, package, target, tmp_path_factory) -> None:
        part = topk_set(tmp_path_factory.mktemp("part") / "artifacts", ["sm_90a"])
        (checkout / "artifacts").rename(checkout / "elsewhere")
        part.rename(checkout / "artifacts")
        words = "2 of 3 kernels are missing (router_topk.sm_100a, ...)"
        assert words in refused(package, target)

    def test_a_kernel_of_the_past(self, package, target, monkeypatch) -> None:
        one = dataclasses.replace(TOPK, archs=("sm_90a",))
        monkeypatch.setattr(plan, "KERNELS", (one,))
        message = refused(package, target)
        assert "no spec names router_topk.sm_100a, router_topk.sm_103a" in message

    def test_a_source_that_was_edited_after_the_build(self, package, target, monkeypatch) -> None:
        edited = plan.compilers.source_files(TOPK)[0]
        read = Path.read_bytes
        monkeypatch.setattr(Path, "read_bytes", lambda p: read(p) + b"/" * (p == edited))
        words = "3 kernels are older than their sources (router_topk.sm_100a, ...)"
        assert words in refused(package, target)


def test_no_compiler_is_needed(package, monkeypatch) -> None:
    """Neither is installed where a wheel is built, nor is its version known."""

    def missing(*_: object) -> None:
        raise plan.compilers.CompileError("no compiler here")

    monkeypatch.setattr(plan.compilers, "toolchain_versions", missing)
    assert package("wheel")


def test_an_editable_install_needs_no_artifacts(checkout, package) -> None:
    (checkout / "artifacts").rename(checkout / "elsewhere")
    assert package("wheel", "editable") == {}


@pytest.mark.parametrize(
    ("folder", "package", "scripts"),
    [
        (".", "dsv4_router_runtime", {}),
        ("build_kernels", "build_kernels", {"build-kernels": "build_kernels.__main__:main"}),
    ],
)
def test_each_wheel_holds_one_package_and_only_the_builders_a_script(
    folder: str, package: str, scripts: dict[str, str]
) -> None:
    wheel = pytest.importorskip("hatchling.builders.wheel", reason="needs the extra `test`")
    builder = wheel.WheelBuilder(str(ROOT / folder))
    names = {Path(file.distribution_path) for file in builder.recurse_included_files()}
    sources = {path.relative_to(ROOT) for path in (ROOT / package).rglob("*.py")}
    assert {path for path in names if path.suffix == ".py"} == sources
    assert Path(package, "py.typed") in names
    assert Path("build_kernels", "pyproject.toml") not in names
    assert builder.metadata.core.scripts == scripts


def test_the_builder_has_the_runtimes_version_and_requires_it() -> None:
    wheel = pytest.importorskip("hatchling.builders.wheel", reason="needs the extra `test`")
    runtime, builder = (
        wheel.WheelBuilder(str(place)).metadata for place in (ROOT, ROOT / "build_kernels")
    )
    assert builder.version == runtime.version
    assert f"dsv4-router=={runtime.version}" in builder.core.dependencies
    assert not [name for name in runtime.core.dependencies if "cuda-bindings" not in name]


def test_what_the_hook_imports_is_the_standard_library() -> None:
    code = (
        "import sys\n"
        "from build_kernels.building.plan import packaging_problem\n"
        "from build_kernels.building.sbom import sbom_text\n"
        "from dsv4_router_runtime.artifacts.folder import open_artifacts\n"
        "foreign = ('click', 'rich', 'elftools', 'cutlass', 'cuda', 'numpy', 'torch')\n"
        "print([name for name in foreign if name in sys.modules])\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"
