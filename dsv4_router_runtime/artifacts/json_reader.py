"""JSON read with its place in mind: whatever does not fit is an error that names the path.

    artifacts/manifest.json: kernels[1].launch.block: expected 3 ints >= 1 (got [256]); repair ...

Uses nothing but the standard library. Keys and values are the matter of a document's schema:
`manifest` here, the evidence and the GPU tests' records in the builder. Accepted is the JSON of
RFC 8259 in UTF-8, and of it only what every reader sees alike: no key twice, no NaN or Infinity,
no number that a 64-bit int or a double cannot hold, no half of a surrogate pair.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Iterator, Mapping
from typing import Any, TypeVar

from dsv4_router_runtime.errors import ManifestError

from .files import MAX_JSON_BYTES

T = TypeVar("T")
V = TypeVar("V")

# For JsonNode.string.
SHA256 = r"[0-9a-f]{64}", "64 lower-case hex digits"
MAX_INTEGER = 2**63 - 1
MAX_SHOWN = 80
# Of a key that the schema leaves free, such as a test's name with its parameters.
MAX_KEY = 255
# Of JSON values that a schema leaves free; those that are written nest 4 deep.
MAX_DEPTH = 16
# Half of a surrogate pair: JSON can escape one, but neither a file nor a terminal takes it.
_HALF_PAIR = re.compile("[\ud800-\udfff]")


class FrozenMap(Mapping[str, V]):
    """A mapping that cannot be changed and, unlike MappingProxyType, can be pickled and copied."""

    __slots__ = ("_members",)
    _members: dict[str, V]

    def __init__(self, members: Mapping[str, V]) -> None:
        object.__setattr__(self, "_members", dict(members))

    def __setattr__(self, name: str, value: Any) -> None:
        raise AttributeError(f"{type(self).__name__} cannot be changed (got {name}=...)")

    def __getitem__(self, key: str) -> V:
        return self._members[key]

    def __iter__(self) -> Iterator[str]:
        return iter(self._members)

    def __len__(self) -> int:
        return len(self._members)

    def __repr__(self) -> str:
        return repr(self._members)

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self._members,)


class _Object(dict[str, Any]):
    """A JSON object that remembers a key written twice, which JSON itself lets pass."""

    twice: str | None = None

    def __repr__(self) -> str:
        text = super().__repr__()
        return text if self.twice is None else f"<{self.twice!r} twice in {text}>"


def _object(pairs: list[tuple[str, Any]]) -> _Object:
    result = _Object()
    for key, value in pairs:
        if key in result:
            result.twice = key
        result[key] = value
    return result


def _integer(digits: str) -> int:
    # Longer ones are refused here: Python neither prints nor reads back more than 4300 digits.
    if len(digits) > MAX_SHOWN // 2:
        raise ValueError(f"an integer of {len(digits)} digits; at most {MAX_INTEGER} is read")
    return int(digits)


def _real(digits: str) -> float:
    number = float(digits)
    if not math.isfinite(number):
        raise ValueError(f"a number that no double holds: {digits[:MAX_SHOWN]}")
    return number


def _constant(name: str) -> Any:
    raise ValueError(f"{name} is no JSON")


def read_json(text: str | bytes, read: Callable[[JsonNode], T], *, source: str) -> T:
    """Parse `text` and return the result of `read`; ManifestError if it is not such JSON."""
    try:
        try:
            if len(text) > MAX_JSON_BYTES:
                raise ValueError(f"{len(text)} bytes; at most {MAX_JSON_BYTES} are read")
            document = json.loads(
                text.decode("utf-8-sig") if isinstance(text, bytes) else text,
                object_pairs_hook=_object,
                parse_int=_integer,
                parse_float=_real,
                parse_constant=_constant,
            )
        except ValueError as error:
            problem = f"not valid JSON ({error})"
            raise ManifestError(source=source, path="$", problem=problem) from error
        return read(JsonNode(document, "", source))
    except RecursionError as error:
        problem = "nested too deeply to be read"
        raise ManifestError(source=source, path="$", problem=problem) from error


def shown(value: Any) -> str:
    """Write a JSON value as ASCII, and no more of it than a message has room for."""
    text = ""
    for piece in json.JSONEncoder().iterencode(value):
        text += piece[: MAX_SHOWN + 1]
        if len(text) > MAX_SHOWN:
            return text[: MAX_SHOWN - 3] + "..."
    return text


class JsonNode:
    """A JSON value and its path, with one method per shape of a schema."""

    __slots__ = ("path", "source", "value")

    def __init__(self, value: Any, path: str, source: str) -> None:
        self.value = value
        self.path = path
        self.source = source

    def error(self, problem: str) -> ManifestError:
        return ManifestError(source=self.source, path=self.path or "$", problem=problem)

    def expected(self, what: str) -> ManifestError:
        return self.error(f"expected {what} (got {shown(self.value)})")

    def _check_object(self) -> None:
        if not isinstance(self.value, dict):
            raise self.expected("an object")
        twice = self.value.twice if isinstance(self.value, _Object) else None
        if twice is not None:
            raise self.error(f"the key {shown(twice)} is written twice")

    def member(self, key: str) -> JsonNode:
        """Return the member `key` of an object, null if it has none."""
        return JsonNode(self.value.get(key), self._path_of(key), self.source)

    def _path_of(self, key: str) -> str:
        return f"{self.path}.{key}" if self.path else key

    def members(self, *required: str, optional: tuple[str, ...] = ()) -> dict[str, JsonNode]:
        """The object's members; exactly `required`, plus any of `optional`."""
        self._check_object()
        for key in self.value:
            if key not in required and key not in optional:
                allowed = ", ".join(sorted((*required, *optional)))
                raise self.error(f"unknown key {shown(key)} (allowed: {allowed})")
        return self.known_members(*required, optional=optional)

    def known_members(self, *required: str, optional: tuple[str, ...] = ()) -> dict[str, JsonNode]:
        """Return members as `members` does; other keys are ignored."""
        self._check_object()
        for key in required:
            if key not in self.value:
                raise JsonNode(None, self._path_of(key), self.source).error("missing")
        known = (*required, *optional)
        return {key: self.member(key) for key in self.value if key in known}

    def items(self, what: str, length: int | None = None) -> list[JsonNode]:
        if not isinstance(self.value, list) or (length is not None and len(self.value) != length):
            raise self.expected(what)
        return [
            JsonNode(member, f"{self.path}[{index}]", self.source)
            for index, member in enumerate(self.value)
        ]

    def is_int(self) -> bool:
        return isinstance(self.value, int) and not isinstance(self.value, bool)

    def integer(self, low: int = 0, high: int = MAX_INTEGER) -> int:
        if not self.is_int() or not low <= self.value <= high:
            raise self.expected(f"an int from {low} to {high}")
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

    def text(self, what: str, most: int, *, least: int = 0) -> str:
        """Return a free string of `least` to `most` characters."""
        value = self.value
        good = isinstance(value, str) and least <= len(value) <= most
        if not good or _HALF_PAIR.search(value):
            raise self.expected(f"{what}, a string of {least} to {most} characters")
        return str(value)

    def int3(self) -> tuple[int, int, int]:
        values = self.value
        good = isinstance(values, list) and len(values) == 3
        if not good or not all(JsonNode(v, "", "").is_int() and v >= 1 for v in values):
            raise self.expected("3 ints >= 1")
        return (values[0], values[1], values[2])

    def mapping(
        self, read: Callable[[JsonNode], V], *, keys: tuple[str, ...] | str
    ) -> FrozenMap[V]:
        """Return the members, each read by `read`; `keys` is the allowed keys or a pattern."""
        self._check_object()
        for key in self.value:
            if isinstance(keys, str):
                if not re.fullmatch(keys, key):
                    raise self.error(f"the key {shown(key)} is no name (expected {keys})")
            elif key not in keys:
                raise self.error(f"unknown key {shown(key)} (allowed: {', '.join(keys)})")
        return FrozenMap({key: read(self.member(key)) for key in sorted(self.value)})

    def plain(self, depth: int = MAX_DEPTH) -> Any:
        """Return a copy of a value that the schema leaves free: bounded, and fit to be written."""
        value = self.value
        if isinstance(value, dict | list) and depth == 0:
            raise self.error(f"nested more than {MAX_DEPTH} deep")
        if isinstance(value, list):
            return [item.plain(depth - 1) for item in self.items("a list")]
        if isinstance(value, dict):
            self._check_object()
            for key in value:
                JsonNode(key, self.path, self.source).text("a key", MAX_KEY)
            return {key: self.member(key).plain(depth - 1) for key in value}
        if isinstance(value, str):
            return self.text("a text", MAX_JSON_BYTES)
        if self.is_int():
            return self.integer(low=-MAX_INTEGER)
        return value
