"""The SBOM of the runtime's wheel: valid, complete, and the same bytes for the same set."""

from __future__ import annotations

import hashlib
import json
import re
import subprocess
import sys
import tomllib
import zipfile
from dataclasses import replace
from pathlib import Path

import pytest

pytest.importorskip("elftools", reason="needs the builder")

from builds import topk_set

from build_kernels.building.sbom import sbom_text
from dsv4_router_runtime.artifacts.manifest import Manifest, parse_manifest

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
TEXT = (ROOT / "artifacts" / "manifest.json").read_bytes()
MANIFEST = parse_manifest(TEXT)
SCHEMA_ERRORS = {
    "another kind": ('"CycloneDX"', '"SPDX"'),
    "a key of our own": ('"version": 1\n', '"version": 1, "x": 1\n'),
    "a short digest": ('"content": "', '"content": "x'),
    "another phase": ('"phase": "build"', '"phase": "made"'),
    "no serial number": ("urn:uuid:", "urn:"),
}


def sbom(manifest: Manifest = MANIFEST, text: bytes = TEXT) -> dict:
    return json.loads(sbom_text(PROJECT, manifest, text))


def problem(text: str) -> object:
    """Return what the official schema says against a document."""
    validation = pytest.importorskip("cyclonedx.validation.json", reason="needs the extra `test`")
    schema = pytest.importorskip("cyclonedx.schema")
    return validation.JsonStrictValidator(schema.SchemaVersion.V1_6).validate_str(text)


@pytest.mark.slow
def test_it_is_valid() -> None:
    assert problem(sbom_text(PROJECT, MANIFEST, TEXT)) is None


@pytest.mark.slow
@pytest.mark.parametrize("name", SCHEMA_ERRORS)
def test_the_schema_finds_an_error(name: str) -> None:
    old, new = SCHEMA_ERRORS[name]
    text = sbom_text(PROJECT, MANIFEST, TEXT)
    assert old in text
    assert problem(text.replace(old, new)) is not None


def test_each_cubin_and_the_manifest_is_a_component_with_its_digest() -> None:
    files = {
        item["name"]: item["hashes"] for item in sbom()["components"] if item["type"] == "file"
    }
    wanted = {kernel.file: kernel.cubin_sha256 for kernel in MANIFEST.kernels}
    wanted["manifest.json"] = hashlib.sha256(TEXT).hexdigest()
    assert files == {
        f"dsv4_router_runtime/_artifacts/{name}": [{"alg": "SHA-256", "content": digest}]
        for name, digest in wanted.items()
    }


def test_the_requirements_are_the_projects() -> None:
    found = {
        (item["purl"], item["scope"], item["properties"][0]["value"])
        for item in sbom()["components"]
        if item["type"] == "library"
    }
    (requirement,) = PROJECT["dependencies"]
    (torch,) = PROJECT["optional-dependencies"]["torch"]
    assert found == {
        ("pkg:pypi/cuda-bindings", "required", requirement),
        ("pkg:pypi/torch", "optional", torch),
    }
    root = sbom()["metadata"]["component"]
    assert root["purl"] == f"pkg:pypi/dsv4-router@{PROJECT['version']}"


def test_what_made_the_cubins_is_the_formulation() -> None:
    (formula,) = sbom()["formulation"]
    tools = {item["name"]: item["version"] for item in formula["components"]}
    wanted = dict(MANIFEST.toolchain)
    wanted["nvidia-cuda-nvrtc-cu12"] = wanted.pop("nvrtc")
    assert tools == wanted
    assert {item.get("purl", "").partition("@")[0] for item in formula["components"]} == {
        f"pkg:pypi/{name}" if name != "ptxas" else "" for name in wanted
    }


def test_every_reference_leads_to_one_component() -> None:
    document = sbom()
    root, components = document["metadata"]["component"], document["components"]
    refs = [item["bom-ref"] for item in (root, *components, *document["formulation"])]
    refs += [item["bom-ref"] for item in document["formulation"][0]["components"]]
    assert len(refs) == len(set(refs))
    first, *others = document["dependencies"]
    assert first["ref"] == root["bom-ref"]
    assert first["dependsOn"] == [item["ref"] for item in others]
    assert first["dependsOn"] == [item["bom-ref"] for item in components]


def test_the_serial_number_is_the_contents() -> None:
    assert sbom() == sbom()
    (first, *rest) = MANIFEST.kernels
    changed = sbom(replace(MANIFEST, kernels=(replace(first, cubin_sha256="0" * 64), *rest)))
    numbers = {sbom()["serialNumber"], changed["serialNumber"], sbom(text=b"{}")["serialNumber"]}
    assert len(numbers) == 3
    assert sbom(replace(MANIFEST, kernels=tuple(reversed(MANIFEST.kernels)))) == sbom()


@pytest.mark.slow
def test_a_wheel_carries_it_where_pep_770_says(tmp_path: Path, monkeypatch) -> None:
    wheel = pytest.importorskip("hatchling.builders.wheel", reason="needs the extra `release`")
    from build_kernels.building import plan

    for name in ("pyproject.toml", "README.md", "LICENSE"):
        (tmp_path / name).write_bytes((ROOT / name).read_bytes())
    hook = "build_kernels/building/wheel_hook.py"
    for name in (hook, "dsv4_router_runtime/__init__.py"):
        (tmp_path / name).parent.mkdir(parents=True)
        (tmp_path / name).write_bytes((ROOT / name).read_bytes())
    topk_set(tmp_path / "artifacts")
    monkeypatch.setattr(plan, "packaging_problem", lambda manifest: None)
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    before = sorted(path.name for path in tmp_path.iterdir())
    (path,) = wheel.WheelBuilder(str(tmp_path)).build(directory=str(tmp_path / "dist"))
    with zipfile.ZipFile(path) as archive:
        (name,) = [name for name in archive.namelist() if "/sboms/" in name]
        text = archive.read(name).decode()
        listed = {
            item["name"]: item["hashes"][0]["content"]
            for item in json.loads(text)["components"]
            if item["type"] == "file"
        }
        digests = {
            name: hashlib.sha256(archive.read(name)).hexdigest()
            for name in archive.namelist()
            if "/_artifacts/" in name
        }
    assert re.fullmatch(r"dsv4_router-[\d.]+\.dist-info/sboms/dsv4-router\.cdx\.json", name)
    assert listed == digests
    assert problem(text) is None
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted([*before, "dist"])


@pytest.mark.slow
def test_it_is_the_same_in_every_process() -> None:
    code = (
        "import hashlib, tomllib; from build_kernels.building.sbom import sbom_text\n"
        "from dsv4_router_runtime.artifacts.manifest import parse_manifest\n"
        "text = open('artifacts/manifest.json', 'rb').read()\n"
        "project = tomllib.load(open('pyproject.toml', 'rb'))['project']\n"
        "print(sbom_text(project, parse_manifest(text), text))"
    )
    texts = {
        subprocess.run(
            [sys.executable, "-c", code],
            cwd=ROOT,
            env={"PYTHONHASHSEED": seed, "PYTHONPATH": str(ROOT)},
            capture_output=True,
            check=True,
        ).stdout
        for seed in ("1", "2")
    }
    assert len(texts) == 1
