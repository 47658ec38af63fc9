"""Read and write JSON documents, each of one schema version and bounded in size."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, TypeVar

from build_kernels.errors import BuilderError
from dsv4_router_runtime.artifacts.files import MAX_JSON_BYTES, read_file, reason_of
from dsv4_router_runtime.artifacts.json_reader import JsonNode, read_json
from dsv4_router_runtime.errors import (
    MAX_FILE_SHOWN,
    MAX_PROBLEM_SHOWN,
    ManifestError,
    printable,
)

# Shapes of the names in these documents, and how errors call them.
ARTIFACT_NAME = r"[a-z][a-z0-9_]{0,63}\.sm_[1-9][0-9]{1,2}[af]?", "a kernel and architecture"
MAX_NAME = 400

T = TypeVar("T")


class EvidenceError(BuilderError):
    """An evidence or record file that does not follow its schema."""


@dataclass(frozen=True, kw_only=True)
class Document(Generic[T]):
    """A kind of document. `parse` builds its content, given the version has been checked.

    unreadable, invalid: the formats of the problem if a file cannot be read, or is read and does
    not follow the schema. missing: the content of a file that does not exist; None is an error.
    error: the exception to raise.
    """

    version: int
    parse: Callable[[JsonNode], T]
    unreadable: str
    invalid: str
    missing: T | None = None
    error: type[Exception] = EvidenceError

    def read(self, path: Path) -> T:
        """Read a file; `error` names the file and the place in it."""
        try:
            return self.parse_text(read_file(path, most_bytes=MAX_JSON_BYTES), path)
        except OSError as error:
            if isinstance(error, FileNotFoundError) and self.missing is not None:
                return self.missing
            problem = self.unreadable.format(f"cannot be read ({reason_of(error)})")
            raise self.error(f"{_shown(path)}: {problem}") from error

    def parse_text(self, text: bytes, path: Path) -> T:
        """Parse the text of the file `path`; `error` as for `read`."""
        try:
            return read_json(text, self._content, source=str(path))
        except ManifestError as error:
            problem = f"{error.path}: {printable(error.problem, MAX_PROBLEM_SHOWN)}"
            raise self.error(f"{_shown(path)}: {self.invalid.format(problem)}") from error

    def text(self, members: Mapping[str, Any]) -> bytes:
        """Return a document's text. Sorted and without times: equal members give equal bytes."""
        document = {"schema_version": self.version, **members}
        return (json.dumps(document, indent=1, sort_keys=True) + "\n").encode()

    def _content(self, node: JsonNode) -> T:
        # The version first: a newer schema has other keys, and "unknown key" would hide the cause.
        if not isinstance(node.value, dict):
            raise node.expected("an object")
        stated = node.member("schema_version")
        if not stated.is_int() or stated.value != self.version:
            raise stated.expected(f"{self.version}, the only schema that is read here")
        return self.parse(node)


def _shown(path: Path) -> str:
    return printable(str(path), MAX_FILE_SHOWN)
