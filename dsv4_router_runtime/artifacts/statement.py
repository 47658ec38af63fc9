"""The signed statement: the files of a release, and how they were built.

An in-toto Statement v1 whose predicate is a SLSA provenance v1. The builder writes all of it. Read
here are its subjects and `predicate.buildDefinition.externalParameters.release`. Keys that are not
read are ignored, as in-toto demands: they are signed too.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from .json_reader import SHA256, JsonNode, read_json

PAYLOAD_TYPE = "application/vnd.in-toto+json"
STATEMENT_TYPE = "https://in-toto.io/Statement/v1"
PREDICATE_TYPE = "https://slsa.dev/provenance/v1"
# Defined by build_kernels/release/README.md.
BUILD_TYPE = "urn:x-dsv4-router:build-kernels:1"


@dataclass(frozen=True, kw_only=True)
class Statement:
    """subjects: sha256 by file name, of the manifest and of every cubin."""

    subjects: Mapping[str, str]
    release: str


def parse_statement(payload: bytes, *, source: str) -> Statement:
    """Read a payload whose signatures were checked; ManifestError names the place in it."""
    return read_json(payload, _statement, source=source)


def read_release(node: JsonNode) -> str:
    """Return a release of a form that `numbers_of` can compare."""
    number = r"(0|[1-9][0-9]{0,5})"
    return node.string(rf"{number}(\.{number}){{0,3}}", "a release of 1 to 4 numbers, as 0.1.0")


def numbers_of(release: str) -> tuple[int, ...]:
    """Return a release's numbers, for comparison: 1.0 is 1.0.0, and 0.10 is after 0.9."""
    numbers = [int(part) for part in release.split(".")]
    return (*numbers, *[0] * (4 - len(numbers)))


def _statement(node: JsonNode) -> Statement:
    at = node.known_members("_type", "subject", "predicateType", "predicate")
    at["_type"].choice((STATEMENT_TYPE,))
    at["predicateType"].choice((PREDICATE_TYPE,))
    predicate = at["predicate"].known_members("buildDefinition")
    definition = predicate["buildDefinition"].known_members("buildType", "externalParameters")
    # The same key may sign what another build made.
    definition["buildType"].choice((BUILD_TYPE,))
    external = definition["externalParameters"].known_members("release")
    subjects: dict[str, str] = {}
    for item in at["subject"].items("a list of subjects"):
        subject = item.known_members("name", "digest")
        name = subject["name"].text("a file name", 255, least=1)
        if name in subjects:
            raise subject["name"].error(f"{name} is named twice")
        digest = subject["digest"].known_members("sha256")
        subjects[name] = digest["sha256"].string(*SHA256)
    return Statement(subjects=subjects, release=read_release(external["release"]))
