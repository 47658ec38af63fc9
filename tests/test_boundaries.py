"""What importing the runtime costs and brings in, proved in fresh interpreters."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

import dsv4_router_runtime

FOREIGN = ("torch", "numpy", "cutlass", "build_kernels", "cuda", "triton", "click", "rich")
PURE = (
    "errors",
    "parameters",
    "json_reader",
    "manifest",
    "artifacts",
    "dispatch",
    "launch",
    "tensor_map",
    "driver",
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


@pytest.mark.parametrize("module", PURE)
def test_pure_modules_bring_in_nothing_foreign(module):
    code = f"""
import sys, dsv4_router_runtime.{module}
print([name for name in {FOREIGN} if name in sys.modules])
"""
    assert python(code) == "[]"


@pytest.mark.parametrize("module", ["router", "binding", "workspace", "reference"])
def test_the_rest_brings_in_torch_and_no_builder(module):
    pytest.importorskip("torch", reason="torch is the caller's and is not installed here")
    code = f"""
import sys, dsv4_router_runtime.{module}
builders = ("cutlass", "build_kernels")
print("torch" in sys.modules, [name for name in builders if name in sys.modules])
"""
    assert python(code) == "True []"


def test_every_public_name_resolves():
    pytest.importorskip("torch", reason="torch is the caller's and is not installed here")
    code = """
import dsv4_router_runtime as package
print([name for name in package.__all__ if getattr(package, name).__name__ != name])
print(set(package.__all__) == set(package._HOME), set(package.__all__) <= set(dir(package)))
"""
    assert python(code) == "[]\nTrue True"


def test_import_takes_at_most_100_ms():
    """The best of five fresh interpreters: the cost itself, without what else the machine does."""
    code = """
import time
start = time.perf_counter()
import dsv4_router_runtime
from dsv4_router_runtime import manifest, artifacts, dispatch, launch, tensor_map, driver
print((time.perf_counter() - start) * 1e3)
"""
    assert min(float(python(code)) for _ in range(5)) <= 100


def test_import_makes_no_folder_and_sets_no_logging(tmp_path):
    code = f"""
import os, sys
os.chdir({str(tmp_path)!r})
import dsv4_router_runtime
logging = sys.modules.get("logging")
print(os.listdir(), logging is None or logging.root.handlers)
"""
    assert python(code) in ("[] True", "[] []")
