"""What importing the runtime costs and brings in, proved in fresh interpreters."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import dsv4_router_runtime

FOREIGN = (
    *("torch", "numpy", "cutlass", "build_kernels", "cuda", "triton", "click", "rich"),
    *("vllm", "sglang", "cryptography"),
)
PURE = (
    *("errors", "log", "explain", "doctor", "__main__"),
    "parameters",
    *(f"artifacts.{name}" for name in ("files", "json_reader", "limits", "kernel", "manifest")),
    *(f"artifacts.{name}" for name in ("folder", "dispatch", "evidence", "trust", "ed25519")),
    *(f"device.{name}" for name in ("launch", "tensor_map", "driver", "facts", "load", "memory")),
    *(f"device.{name}" for name in ("launch_site", "workspace", "capture")),
    *("device.own_stream", "steps", "doctor.inputs", "doctor.selftest"),
    "integrations.engine",
    *(f"integrations.vllm.{name}" for name in ("plugin", "eligibility", "contract")),
)


def python(code: str) -> str:
    """What `code` prints in a fresh interpreter that finds the package under test."""
    place = str(Path(dsv4_router_runtime.__file__).parents[1])
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "PYTHONPATH": place},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_import_brings_in_nothing_foreign():
    code = f"""
import sys, dsv4_router_runtime
print([name for name in {FOREIGN} if name in sys.modules])
"""
    assert python(code) == "[]"


def test_pure_modules_bring_in_nothing_foreign():
    code = f"""
import importlib, sys
for module in {PURE}:
    importlib.import_module(f"dsv4_router_runtime.{{module}}")
    print([(module, name) for name in {FOREIGN} if name in sys.modules])
"""
    assert python(code).split("\n") == ["[]"] * len(PURE)


@pytest.mark.slow
@pytest.mark.parametrize("module", ["router", "binding", "device.streams", "reference", "exact"])
def test_the_rest_brings_in_torch_and_no_builder(module):
    pytest.importorskip("torch", reason="torch is the caller's and is not installed here")
    code = f"""
import sys, dsv4_router_runtime.{module}
builders = ("cutlass", "build_kernels")
print("torch" in sys.modules, [name for name in builders if name in sys.modules])
"""
    assert python(code) == "True []"


@pytest.mark.slow
def test_every_public_name_resolves():
    pytest.importorskip("torch", reason="torch is the caller's and is not installed here")
    code = """
import dsv4_router_runtime as package
print([name for name in package.__all__ if getattr(package, name).__name__ != name])
print(set(package.__all__) == set(package._HOME), set(package.__all__) <= set(dir(package)))
"""
    assert python(code) == "[]\nTrue True"


@pytest.mark.parametrize("name", ["Router", "dense_router_dispatch", "router_reference"])
@pytest.mark.parametrize("way", ["from dsv4_router_runtime import {}", "package.{}"])
def test_a_missing_torch_is_said_with_the_extra_that_brings_it(name, way):
    code = f"""
import sys
sys.modules["torch"] = None
import dsv4_router_runtime as package
try:
    {way.format(name)}
except ImportError as error:
    print(type(error).__name__, error.name, error)
"""
    said = python(code)
    assert said.startswith(f"ModuleNotFoundError torch {name} needs torch, which is not installed")
    assert said.endswith("install it, or this package's extra: pip install 'dsv4-router[torch]'")


@pytest.mark.slow
def test_another_missing_module_is_not_blamed_on_torch():
    pytest.importorskip("torch", reason="torch is the caller's and is not installed here")
    code = """
import sys
sys.modules["dsv4_router_runtime.binding"] = None
import dsv4_router_runtime as package
try:
    package.Router
except ImportError as error:
    print(error.name)
"""
    assert python(code) == "dsv4_router_runtime.binding"


def test_the_version_is_the_checkouts_and_brings_in_nothing_foreign():
    code = f"""
import sys, dsv4_router_runtime
print(dsv4_router_runtime.__version__, "__version__" in dir(dsv4_router_runtime))
print([name for name in {FOREIGN} if name in sys.modules])
"""
    project = (Path(dsv4_router_runtime.__file__).parents[1] / "pyproject.toml").read_text()
    stated = re.search(r'^version = "(.+)"$', project, re.M).group(1)
    assert python(code) == f"{stated} True\n[]"


def test_the_version_of_an_installed_package_is_its_metadata(tmp_path):
    """Beside another project's pyproject.toml, which says nothing about this one."""
    shutil.copytree(Path(dsv4_router_runtime.__file__).parent, tmp_path / "dsv4_router_runtime")
    (tmp_path / "pyproject.toml").write_text('[project]\nname = "other"\nversion = "9"\n')
    metadata = tmp_path / "dsv4_router-7.8.9.dist-info"
    metadata.mkdir()
    (metadata / "METADATA").write_text("Metadata-Version: 2.1\nName: dsv4-router\nVersion: 7.8.9\n")
    code = f"import sys; sys.path.insert(0, {str(tmp_path)!r})\n"
    code += "import dsv4_router_runtime as package; print(package.__version__, package.__file__)"
    assert python(code) == f"7.8.9 {tmp_path}/dsv4_router_runtime/__init__.py"


def test_a_copy_without_metadata_has_no_version(tmp_path):
    shutil.copytree(Path(dsv4_router_runtime.__file__).parent, tmp_path / "dsv4_router_runtime")
    code = f"""
import sys, importlib.metadata
sys.path.insert(0, {str(tmp_path)!r})
def missing(name):
    raise importlib.metadata.PackageNotFoundError(name)
importlib.metadata.version = missing
import dsv4_router_runtime
print(dsv4_router_runtime.__version__)
"""
    assert python(code) == "unknown"


@pytest.mark.parametrize("package", ["dsv4_router_runtime", "build_kernels"])
def test_annotations_are_there_for_type_checkers(package):
    """PEP 561: without the marker a type checker takes every name for Any."""
    assert (Path(dsv4_router_runtime.__file__).parents[1] / package / "py.typed").is_file()


def test_import_takes_at_most_100_ms():
    """In one of five fresh interpreters, in CPU time."""
    code = f"""
import sys, time
start = time.process_time()
import dsv4_router_runtime
from dsv4_router_runtime.artifacts import manifest
from dsv4_router_runtime.artifacts import folder as artifacts
from dsv4_router_runtime.artifacts import dispatch
from dsv4_router_runtime.device import launch
from dsv4_router_runtime.device import tensor_map
from dsv4_router_runtime.device import driver
seconds = time.process_time() - start
sys.path.insert(0, {str(Path(__file__).parent)!r})
from cpu_time import scaled_ms, unit
print(scaled_ms(seconds, min(map(unit, range(2, 7)))))
"""
    assert any(float(python(code)) <= 100 for _ in range(5))


def test_import_makes_no_folder_and_sets_no_logging(tmp_path):
    code = f"""
import os, sys
os.chdir({str(tmp_path)!r})
import dsv4_router_runtime
logging = sys.modules.get("logging")
print(os.listdir(), logging is None or logging.root.handlers)
"""
    assert python(code) in ("[] True", "[] []")
