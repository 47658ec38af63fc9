"""The files of a release: the hash-locked requirements, and the workflow's commands and actions."""

from __future__ import annotations

import json
import re
import shlex
import tomllib
from pathlib import Path

import pytest

pytest.importorskip("click", reason="needs the builder")

from build_kernels.building.compilers import NVRTC_DISTRIBUTION
from build_kernels.cli.main import main

ROOT = Path(__file__).parents[1]
LOCK = (ROOT / "build_kernels" / "requirements-build.txt").read_text(encoding="utf-8")
WORKFLOW = (ROOT / ".github" / "workflows" / "release.yml").read_text(encoding="utf-8")
RUNTIME, BUILDER = (
    tomllib.loads((ROOT / folder / "pyproject.toml").read_text(encoding="utf-8"))
    for folder in (".", "build_kernels")
)
TOOLS = BUILDER["tool"]["hatch"]["metadata"]["hooks"]["custom"]["dependencies"]
COMMANDS = re.findall(r"python -m build_kernels ([^\n]+)", WORKFLOW)


def locked() -> dict[str, tuple[str, list[str]]]:
    """Return (version, sha256 digests) by distribution."""
    entries = re.sub(r"^#.*\n", "", LOCK, flags=re.M).replace("\\\n", " ").splitlines()
    found = {}
    for entry in entries:
        name, version, hashes = re.fullmatch(
            r"([a-z0-9-]+)==(\S+)(?: ; [^-]+?)?((?: +--hash=sha256:[0-9a-f]{64})+)", entry
        ).groups()
        found[name] = (version, re.findall(r"[0-9a-f]{64}", hashes))
    return found


def test_every_line_is_a_version_with_its_digests() -> None:
    assert len(locked()) > 15
    assert "://" not in LOCK
    assert not re.search(r"^-|--(index|find-links|trusted)", LOCK, re.M)


def test_the_requirements_of_builder_runtime_and_packaging_are_locked() -> None:
    extras = BUILDER["project"]["optional-dependencies"]
    wanted = [*TOOLS, *RUNTIME["project"]["dependencies"], *BUILDER["build-system"]["requires"]]
    wanted += [*extras["release"], *extras.get("sign", [])]
    names = [re.split(r"[^A-Za-z0-9._-]", requirement)[0] for requirement in wanted]
    assert set(names) <= locked().keys()
    pinned = [requirement.split("==") for requirement in wanted if "==" in requirement]
    assert len(pinned) > 5
    for name, version in pinned:
        assert locked()[name][0] == version


def test_the_locked_tools_made_the_tracked_cubins() -> None:
    """With others `build --locked` would fail, minutes later."""
    manifest = json.loads((ROOT / "artifacts" / "manifest.json").read_bytes())
    made = {name: version for name, version in manifest["toolchain"].items() if name != "ptxas"}
    made[NVRTC_DISTRIBUTION] = made.pop("nvrtc")
    assert made == {name: locked()[name][0] for name in made}


def test_the_workflow_is_marked_as_not_run_and_pins_each_action() -> None:
    assert WORKFLOW.startswith("# NOT RUN YET: ")
    used = re.findall(r"uses: (.*)", WORKFLOW)
    assert len(used) == WORKFLOW.count("uses:") > 5
    for action in used:
        assert re.fullmatch(r"[\w./-]+@[0-9a-f]{40} # v[\d.]+", action), action


def test_the_workflow_gives_no_job_more_than_it_needs() -> None:
    assert "\npermissions: {}\n" in WORKFLOW
    build, sign = WORKFLOW.split("\n  build:\n")[1].split("\n  sign:\n")
    assert "secrets." not in build
    assert "id-token" not in build
    # One step has the key, and it compiles nothing.
    (step,) = [step for step in sign.split("\n      - ") if "secrets." in step]
    assert re.findall(r"build_kernels (\w+)", step) == ["sign"]
    assert WORKFLOW.count("--require-hashes") == WORKFLOW.count("pip install") == 2


def test_the_workflows_commands_are_this_projects() -> None:
    names = [command.split()[0] for command in COMMANDS]
    assert names == ["build", "reproduce", "budget", "sign", "reproduce"]
    for command in COMMANDS:
        name, *arguments = shlex.split(command)
        options = [option for each in main.get_command(None, name).params for option in each.opts]
        assert {each for each in arguments if each.startswith("--")} <= set(options), command
