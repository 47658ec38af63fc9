"""The outputs of calls, recorded: digests of their bits, and the arrays if there is room for them.

A `.json` file holds the digests alone, some 100 KB; a `.npz` file holds the arrays too.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

HEADER = "recording"


def canonical(values: np.ndarray) -> np.ndarray:
    """The bits, with one pattern for every NaN."""
    if values.dtype != np.float32:
        return np.ascontiguousarray(values)
    bits = np.ascontiguousarray(values).view(np.uint32)
    return np.where(np.isnan(values), np.uint32(0x7FC00000), bits)


def digest(arrays: Mapping[str, Any]) -> str:
    """A digest of arrays and numbers, by name."""
    total = hashlib.blake2b(digest_size=16)
    for name, value in sorted(arrays.items()):
        array = canonical(np.asarray(value))
        total.update(f"{name} {array.dtype.str} {array.shape} ".encode())
        total.update(array.tobytes())
    return total.hexdigest()


@dataclass(frozen=True, kw_only=True)
class Recording:
    """Calls by the names of their cases.

    machine: the GPU, its architecture, and the version of torch. kernels: sha256 of the PTX, by
    name. inputs, outputs: digests. arrays: the outputs; empty if only digests were kept.
    """

    machine: dict[str, str]
    kernels: dict[str, str] = field(default_factory=dict)
    inputs: dict[str, str] = field(default_factory=dict)
    outputs: dict[str, dict[str, str]] = field(default_factory=dict)
    arrays: dict[str, dict[str, np.ndarray]] = field(default_factory=dict)

    def add(self, case: str, given: Mapping[str, Any], outputs: Mapping[str, np.ndarray]) -> None:
        self.inputs[case] = digest(given)
        self.outputs[case] = {name: digest({name: array}) for name, array in outputs.items()}
        self.arrays[case] = dict(outputs)

    def write(self, path: Path) -> None:
        header = {name: value for name, value in asdict(self).items() if name != "arrays"}
        text = json.dumps(header, indent=1, sort_keys=True) + "\n"
        if path.suffix == ".json":
            path.write_text(text)
            return
        members = {
            f"{case}/{name}": array
            for case, outputs in self.arrays.items()
            for name, array in outputs.items()
        }
        np.savez_compressed(path, **members, **{HEADER: np.frombuffer(text.encode(), np.uint8)})


def read_recording(path: Path) -> Recording:
    if path.suffix == ".json":
        return Recording(**json.loads(path.read_text()))
    with np.load(path, allow_pickle=False) as members:
        recording = Recording(**json.loads(members[HEADER].tobytes()))
        for member in members.files:
            if member != HEADER:
                case, name = member.rsplit("/", 1)
                recording.arrays.setdefault(case, {})[name] = members[member]
    return recording


def differences(
    recording: Recording, case: str, given: Mapping[str, Any], outputs: Mapping[str, np.ndarray]
) -> list[str]:
    """A line for each output whose bits are not the recorded ones; for other inputs, one line."""
    if digest(given) != recording.inputs[case]:
        return [
            f"inputs: not those of the recording, which torch {recording.machine['torch']} drew"
        ]
    recorded = recording.outputs[case]
    lines = [f"{name}: recorded and not given" for name in recorded.keys() - outputs.keys()]
    for name, array in outputs.items():
        if digest({name: array}) == recorded.get(name):
            continue
        line = f"{name}: other bits"
        if (expected := recording.arrays.get(case, {}).get(name)) is not None:
            at = np.argwhere(canonical(array) != canonical(expected))
            first = tuple(at[0].tolist())
            line += f" in {len(at)} of {array.size}; first {first}: {array[first]!r} for "
            line += f"{expected[first]!r}"
        lines.append(line)
    return lines
