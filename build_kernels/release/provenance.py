"""Make the statement that is signed: the files of a release, and how they were built.

It holds no time, no path and no name of a machine, and it is derived from the commit alone. So
whoever signs the same commit signs the same bytes.
"""

from __future__ import annotations

import json
import re
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from build_kernels.building.compilers import NVRTC_DISTRIBUTION
from build_kernels.building.plan import PTXAS, packaging_problem
from build_kernels.git import GitError, NoGitError, git
from dsv4_router_runtime.artifacts.files import MAX_JSON_BYTES, read_file
from dsv4_router_runtime.artifacts.folder import MANIFEST_NAME, ArtifactSet, subjects
from dsv4_router_runtime.artifacts.manifest import SCHEMA_VERSION, parse_manifest
from dsv4_router_runtime.artifacts.statement import BUILD_TYPE, PREDICATE_TYPE, STATEMENT_TYPE

from .errors import SigningError

LOCAL_BUILDER = "urn:x-dsv4-router:local"
LOCK_FILE = "build_kernels/requirements-build.txt"


def make_statement(root: Path, artifacts: ArtifactSet, builder_id: str = LOCAL_BUILDER) -> bytes:
    """Return the statement about a set whose cubins were checked; SigningError if it is not so.

    root: the checkout, without a change since its commit, whose manifest is the set's.
    """
    if not re.fullmatch(r"[A-Za-z][A-Za-z0-9+.-]*:[!-~]+", builder_id):
        raise SigningError(f"--builder-id: expected a URI (got {builder_id!r:.80})")
    commit = _clean_commit(root)
    text = _tracked(root, commit, f"artifacts/{MANIFEST_NAME}")
    place = artifacts.folder / MANIFEST_NAME
    # The opened one too: another build may have been published since.
    opened = parse_manifest(text, source=f"{MANIFEST_NAME} of {commit}") == artifacts.manifest
    if not opened or read_file(place, most_bytes=MAX_JSON_BYTES) != text:
        raise SigningError(
            f"{place} is not the manifest of commit {commit[:12]}; "
            "build and commit it first, or sign artifacts/ of this checkout"
        )
    if problem := packaging_problem(artifacts.manifest):
        raise SigningError(f"{artifacts.folder}: {problem}; make them with `build-kernels build`")
    project = tomllib.loads(_tracked(root, commit, "pyproject.toml").decode())["project"]
    manifest = artifacts.manifest
    statement = {
        "_type": STATEMENT_TYPE,
        "subject": [
            {"name": name, "digest": {"sha256": digest}}
            for name, digest in sorted(subjects(manifest, text).items())
        ],
        "predicateType": PREDICATE_TYPE,
        "predicate": {
            "buildDefinition": {
                "buildType": BUILD_TYPE,
                "externalParameters": {
                    "release": project["version"],
                    "architectures": sorted(manifest.driver),
                },
                "internalParameters": {
                    "manifestSchema": SCHEMA_VERSION,
                    "ptxas": manifest.toolchain.get(PTXAS, ""),
                },
                "resolvedDependencies": [
                    {"name": "source", "digest": {"gitCommit": commit}},
                    *_wheels(root, commit, manifest.toolchain),
                ],
            },
            "runDetails": {"builder": {"id": builder_id}},
        },
    }
    return json.dumps(statement, indent=1, sort_keys=True).encode()


def locked_hashes(requirements: str) -> dict[tuple[str, str], list[str]]:
    """Return the sha256 that a requirements file allows, by distribution and version."""
    found: dict[tuple[str, str], list[str]] = {}
    for line in requirements.replace("\\\n", " ").splitlines():
        if named := re.match(r"([A-Za-z0-9._-]+)(?:\[[^\]]*\])?==([^\s;]+)", line):
            hashes = re.findall(r"--hash=sha256:([0-9a-f]{64})\b", line)
            found[_normal(named[1]), named[2]] = sorted(hashes)
    return found


def _wheels(root: Path, commit: str, toolchain: Mapping[str, str]) -> list[dict[str, Any]]:
    """Return a resource for each pinned distribution of the builder, of the version that built.

    Its sha256 is the digest if the lock file allows one wheel. Of several, which one was installed
    is recorded nowhere: all are annotated.
    """
    settings = tomllib.loads(_tracked(root, commit, "build_kernels/pyproject.toml").decode())
    listed = settings["tool"]["hatch"]["metadata"]["hooks"]["custom"]["dependencies"]
    pinned = dict(requirement.split("==") for requirement in listed if "==" in requirement)
    renamed = {"nvrtc": NVRTC_DISTRIBUTION}
    built = {renamed.get(name, name): made for name, made in toolchain.items() if name != PTXAS}
    has_lock = _git(root, "ls-tree", "--name-only", commit, LOCK_FILE)
    allowed = locked_hashes(_tracked(root, commit, LOCK_FILE).decode()) if has_lock else {}
    wheels = []
    for name, version in sorted((pinned | built).items()):
        wheel: dict[str, Any] = {"name": name, "uri": f"pkg:pypi/{_normal(name)}@{version}"}
        hashes = allowed.get((_normal(name), version), [])
        if len(hashes) == 1:
            wheel["digest"] = {"sha256": hashes[0]}
        elif hashes:
            wheel["annotations"] = {"locked_sha256": hashes}
        wheels.append(wheel)
    return wheels


def _normal(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def _clean_commit(root: Path) -> str:
    """Return the checkout's commit; SigningError if there is none, or if the tree is not its."""
    if Path(_git(root, "rev-parse", "--show-toplevel")).resolve() != root.resolve():
        raise SigningError(f"{root} is no git checkout of its own; sign in one")
    commit = _git(root, "rev-parse", "--verify", "HEAD")
    # Named, as a user's settings may leave new files out.
    if changed := _git(root, "status", "--porcelain", "--untracked-files=normal"):
        first = changed.splitlines()[0]
        raise SigningError(
            f"{root} is not as in commit {commit[:12]} ({first.strip()}, ...); commit or remove "
            "what is new, since the statement names that commit"
        )
    return commit


def _tracked(root: Path, commit: str, name: str) -> bytes:
    """Return a file as the commit has it: git may have been told not to look at the tree's."""
    return _run_git(root, "cat-file", "blob", f"{commit}:{name}")


def _git(root: Path, *arguments: str) -> str:
    return _run_git(root, *arguments).decode(errors="replace").strip()


def _run_git(root: Path, *arguments: str) -> bytes:
    try:
        return git(*arguments, folder=root)
    except NoGitError as error:
        raise SigningError("no git is installed, which tells the commit to sign for") from error
    except GitError as error:
        reason = str(error).splitlines()[-1]
        raise SigningError(f"{root}: no commit to sign for ({reason})") from error
