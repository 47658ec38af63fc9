"""JSON read with its place in mind: whatever does not fit is an error that names the path.

    artifacts/manifest.json: kernels[1].launch.block: expected 3 ints >= 1 (got [256]); repair ...

Uses nothing but the standard library. What keys and values a document has is `manifest`'s matter.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any, TypeVar

from .errors import ManifestError

T = TypeVar("T")


class _Object(dict[str, Any]):
    """A JSON object that remembers a key written twice, which JSON itself lets pass."""

    twice: str | None = None


def _object(pairs: list[tuple[str, Any]]) -> _Object:
    result = _Object()
    for key, value in pairs:
        if key in result:
            result.twice = key
        result[key] = value
    return result


def read_json(text: str | bytes, read: Callable[[JsonNode], T], *, source: str) -> T:
    """What `read` makes of the document; a ManifestError where it is no JSON or too deep."""
    try:
        try:
            document = json.loads(text, object_pairs_hook=_object)
        except ValueError as error:
            problem = f"not valid JSON ({error})"
            raise ManifestError(source=source, path="$", problem=problem) from error
        return read(JsonNode(document, "", source))
    except RecursionError as error:
        problem = "not a manifest (nested too deeply to be read)"
        raise ManifestError(source=source, path="$", problem=problem) from error


class JsonNode:
    """A JSON value and its path, with one method per shape a schema asks for."""

    __slots__ = ("path", "source", "value")

    def __init__(self, value: Any, path: str, source: str) -> None:
        self.value = value
        self.path = path
        self.source = source

    def error(self, problem: str) -> ManifestError:
        return ManifestError(source=self.source, path=self.path or "$", problem=problem)

    def expected(self, what: str) -> ManifestError:
        got = json.dumps(self.value)
        return self.error(f"expected {what} (got {got if len(got) <= 80 else got[:77] + '...'})")

    def _check_object(self) -> None:
        if not isinstance(self.value, dict):
            raise self.expected("an object")
        twice = self.value.twice if isinstance(self.value, _Object) else None
        if twice is not None:
            raise self.error(f"the key {json.dumps(twice)} is written twice")

    def members(self, *required: str, optional: tuple[str, ...] = ()) -> dict[str, JsonNode]:
        """The object's members; exactly `required`, plus any of `optional`."""
        self._check_object()
        prefix = f"{self.path}." if self.path else ""
        for key in self.value:
            if key not in required and key not in optional:
                allowed = ", ".join(sorted((*required, *optional)))
                raise self.error(f"unknown key {json.dumps(key)} (allowed: {allowed})")
        for key in required:
            if key not in self.value:
                raise JsonNode(None, prefix + key, self.source).error("missing")
        return {
            key: JsonNode(member, prefix + key, self.source) for key, member in self.value.items()
        }

    def items(self, what: str, length: int | None = None) -> list[JsonNode]:
        if not isinstance(self.value, list) or (length is not None and len(self.value) != length):
            raise self.expected(what)
        return [
            JsonNode(member, f"{self.path}[{index}]", self.source)
            for index, member in enumerate(self.value)
        ]

    def is_int(self) -> bool:
        return isinstance(self.value, int) and not isinstance(self.value, bool)

    def integer(self, low: int = 0, high: int | None = None) -> int:
        if not self.is_int() or self.value < low or (high is not None and self.value > high):
            raise self.expected(
                f"an int >= {low}" if high is None else f"an int from {low} to {high}"
            )
        return int(self.value)

    def boolean(self) -> bool:
        if not isinstance(self.value, bool):
            raise self.expected("true or false")
        return self.value

    def choice(self, allowed: tuple[str, ...]) -> str:
        if self.value not in allowed or not isinstance(self.value, str):
            raise self.expected("one of " + ", ".join(allowed))
        return self.value

    def string(self, pattern: str, what: str) -> str:
        if not isinstance(self.value, str) or not re.fullmatch(pattern, self.value):
            raise self.expected(what)
        return self.value

    def int3(self) -> tuple[int, int, int]:
        values = self.value
        good = isinstance(values, list) and len(values) == 3
        if not good or not all(JsonNode(v, "", "").is_int() and v >= 1 for v in values):
            raise self.expected("3 ints >= 1")
        return (values[0], values[1], values[2])

    def mapping(
        self, read: Callable[[JsonNode], Any], *, keys: tuple[str, ...] | None = None
    ) -> Mapping[str, Any]:
        """The object's members, each as `read` has it; with `keys`, no others are allowed."""
        self._check_object()
        for key in self.value:
            if keys is not None and key not in keys:
                raise self.error(f"unknown key {json.dumps(key)} (allowed: {', '.join(keys)})")
        return MappingProxyType(
            {
                key: read(JsonNode(member, f"{self.path}.{key}", self.source))
                for key, member in sorted(self.value.items())
            }
        )
