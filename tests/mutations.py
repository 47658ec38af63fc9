"""Seeded mutations of a JSON document or of any bytes: the same number gives the same mutation."""

from __future__ import annotations

import copy
import json
import random
from typing import Any

# What Python, JSON, file names and terminals stumble on.
VALUES = (
    *(None, True, False, 0, 1, -1, 2, 64, 255, 256, 512, 1024, 65535, 2**31 - 1, 2**31, 2**32),
    *(2**53, 2**63 - 1, 2**63, 2**64, -(2**63), 10**30, 10**39, 0.5, -0.0, 1e308, 5e-324),
    *("", "x", "\x00", "\x1b[2J", "[/red]", "\ud800", "é", "../x", "/dev/zero", "sm_00", "NaN"),
    *("K", "E", "N", "K_block", "k_splits", "expert_tiles", "token_tiles", "none", "pointer"),
    *("int32", "float32", "bfloat16", "passed", "failed", "not run", "a" * 100, "x" * 5000),
    *([], {}, [[]], [{}], [1, 2, 3], [1, None], {"": 0}, {"x": {"y": []}}, [0] * 300),
)
# JSON that no encoder of Python writes.
TEXTS = (
    *("NaN", "Infinity", "-Infinity", "1e999", "-1e999", "9" * 300, "9" * 4300, "9" * 5000),
    *("1" + "0" * 400 + ".0", '"\\ud800"', '"\\udc00\\ud800"', "[" * 50 + "]" * 50, "-", "01"),
    *(
        "[" * 3000 + "]" * 3000,
        '{"a":' * 2000 + "1" + "}" * 2000,
        "[" * 100_000,
        '"',
        "tru",
        "/**/",
    ),
)
MARK = "\x02here\x02"


def mutated_json(document: str, number: int, name: str) -> bytes:
    """Mutation `number` of `document`: of its tree, then now and then of its text or its bytes."""
    random_ = random.Random(f"{name} {number}")
    tree = json.loads(document)
    for _ in range(random_.choice((1, 1, 1, 2, 3, 8))):
        tree = _mutated_tree(tree, random_)
    text = json.dumps(tree, ensure_ascii=random_.random() < 0.95)
    while (marked := json.dumps(MARK)) in text:
        text = text.replace(marked, random_.choice(TEXTS), 1)
    if random_.random() < 0.1:
        text = _with_a_key_twice(text, random_)
    data = text.encode("utf-8", "surrogatepass")
    return mutated_bytes(data, number, name) if random_.random() < 0.1 else data


def _mutated_tree(tree: Any, random_: random.Random) -> Any:
    places = _places(tree)
    if not places:
        return _copied(random_.choice(VALUES))
    parent, key = random_.choice(places)
    way = random_.random()
    if way < 0.35:
        parent[key] = _copied(random_.choice(VALUES))
    elif way < 0.39:
        parent[key] = MARK
    elif way < 0.65:
        parent[key] = _near(parent[key], random_)
    elif way < 0.75:
        del parent[key]
    elif way < 0.85:
        other, place = random_.choice(places)
        parent[key], other[place] = _copied(other[place]), _copied(parent[key])
    elif isinstance(parent, dict):
        new = random_.choice([key + "x", key[:-1], key.upper(), "", "schema_version", "x" * 200])
        parent[new] = parent.pop(key)
    else:
        parent.insert(key, _copied(random_.choice(places)[0]))
    return tree


def _places(tree: Any) -> list[tuple[Any, Any]]:
    found, left = [], [tree]
    while left:
        node = left.pop()
        keys = (
            range(len(node)) if isinstance(node, list) else node if isinstance(node, dict) else ()
        )
        for key in keys:
            found.append((node, key))
            left.append(node[key])
    return found


def _near(value: Any, random_: random.Random) -> Any:
    """A value of the same kind, a little off."""
    if isinstance(value, bool):
        return not value
    if isinstance(value, int):
        return random_.choice(
            [value + 1, value - 1, -value, value * 2, value // 2, value << 33, str(value)]
        )
    if isinstance(value, str) and value:
        at = random_.randrange(len(value))
        return random_.choice([value[:at], value * 2, value[:at] + "\ud800" + value[at:], [value]])
    if isinstance(value, list):
        return random_.choice(
            [value[::-1], value * 2, value[1:], {str(at): item for at, item in enumerate(value)}]
        )
    if isinstance(value, dict):
        return random_.choice([list(value), list(value.values()), {**value, "new": 1}])
    return [value]


def _copied(value: Any) -> Any:
    # Without it, a tree might come to hold itself, and a case depend on the one before.
    return copy.deepcopy(value)


def _with_a_key_twice(text: str, random_: random.Random) -> str:
    at = [index for index, char in enumerate(text) if char == "{"]
    if not at:
        return text
    place = random_.choice(at) + 1
    end = text.find(",", place)
    return text[:place] + text[place : end + 1] + text[place:] if end > 0 else text


def mutated_bytes(data: bytes, number: int, name: str) -> bytes:
    """Mutation `number` of any bytes: flips, cuts, repeats, words of 2, 4 and 8 bytes."""
    random_ = random.Random(f"bytes {name} {number}")
    new = bytearray(data)
    for _ in range(random_.choice((1, 1, 2, 4, 16))):
        at = random_.randrange(len(new) + 1)
        # Headers first and last, where sizes and places are stated.
        if random_.random() < 0.4:
            at = random_.choice((at % 64, max(0, len(new) - 1 - at % 2600)))
        until = min(len(new), at + random_.choice((1, 2, 8, 64, 1000)))
        way = random_.random()
        if way < 0.4 and at < len(new):
            new[at] ^= 1 << random_.randrange(8)
        elif way < 0.6:
            size = random_.choice((2, 4, 8))
            word = random_.choice((0, 1, 0x7F, 2 ** (8 * size - 1), 2 ** (8 * size) - 1))
            new[at : at + size] = word.to_bytes(size, "little")
        elif way < 0.7:
            new[at:until] = b""
        elif way < 0.8:
            new[at:at] = new[at:until]
        elif way < 0.9:
            new[at:until] = random_.randbytes(until - at)
        elif way < 0.93:
            del new[at:]
        else:
            new[at:at] = random_.choice(TEXTS).encode() if random_.random() < 0.5 else b"\x00" * 100
    return bytes(new)
