"""The summary of .ci/run: what it holds, and what makes it fail."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
# Stands for the builder: prints its arguments, and fails as it is told.
FAKE = """#!/bin/sh
echo "ran $*"
case "$FAILS" in "$1 "*) exit "${FAILS#* }";; esac
"""


def summarise(
    folder: Path, fails: str = "", base: str = "HEAD", *, budgets: bool = True
) -> tuple[int, str]:
    """Run write_summary with a builder that fails so; return the status and the summary."""
    if not (ROOT / ".ci" / "run").is_file() or shutil.which("git") is None:
        pytest.skip("not run: no .ci/run here, or no git")
    function = re.search(
        r"^write_summary\(\) \{\n.*?^\}\n", (ROOT / ".ci" / "run").read_text(), re.M | re.S
    )
    assert function is not None
    (folder / "bin").mkdir()
    (folder / "artifacts").mkdir()
    (folder / "bin" / "build-kernels").write_text(FAKE)
    (folder / "bin" / "build-kernels").chmod(0o755)
    subprocess.run(["git", "init", "-q", folder], check=True)
    if budgets:
        (folder / "build_kernels").mkdir()
        (folder / "build_kernels" / "budgets.toml").write_text("")
        subprocess.run(["git", "-C", folder, "add", "build_kernels"], check=True)
    identity = ("-c", "user.name=a", "-c", "user.email=a@b")
    commit = ("commit", "-q", "--allow-empty", "-m", "One")
    subprocess.run(["git", "-C", folder, *identity, *commit], check=True)
    script = f'set -euo pipefail\n{function[0]}scratch=$PWD summary=out.md\nwrite_summary "$1"\n'
    done = subprocess.run(
        ["bash", "-c", script, "bash", base],
        cwd=folder,
        env=os.environ | {"PATH": f"{folder / 'bin'}:{os.environ['PATH']}", "FAILS": fails},
        capture_output=True,
        text=True,
        check=False,
    )
    written = (folder / "out.md").read_text()
    assert done.stdout == written
    return done.returncode, written


def test_it_has_a_part_of_each_command(tmp_path: Path) -> None:
    status, text = summarise(tmp_path)
    assert status == 0
    assert re.findall(r"^ran (\S+)", text, re.M) == ["diff", "reproduce", "verify", "budget"]
    assert "ran diff HEAD artifacts --markdown" in text
    assert "ran verify --quick --rung faults" in text


@pytest.mark.parametrize(
    ("fails", "status"),
    [("diff 1", 0), ("diff 2", 1), ("reproduce 1", 1), ("verify 1", 1), ("budget 1", 1)],
)
def test_a_change_is_no_failure_and_all_else_is(fails: str, status: int, tmp_path: Path) -> None:
    found, text = summarise(tmp_path, fails)
    assert found == status
    assert text.count("ran ") == 4, "what failed does not hide the rest"


@pytest.mark.parametrize("budgets", [True, False])
def test_budgets_are_compared_with_those_of_the_base(budgets: bool, tmp_path: Path) -> None:
    status, text = summarise(tmp_path, budgets=budgets)
    assert status == 0
    assert ("--since ./before.toml" in text.replace(str(tmp_path), ".")) == budgets


@pytest.mark.parametrize("base", ["HEAD^", "none", "-x", ""])
def test_a_clone_without_the_base_says_so(base: str, tmp_path: Path) -> None:
    status, text = summarise(tmp_path, base=base)
    assert status == 0
    assert f"No comparison: this clone does not hold the commit {base}." in text
