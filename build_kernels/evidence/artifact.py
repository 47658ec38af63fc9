"""One built kernel as the rungs see it: its manifest entry, its cubin and its PTX."""

from __future__ import annotations

import hashlib
import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from dsv4_router_runtime.artifacts.files import MAX_CODE_BYTES, read_file
from dsv4_router_runtime.artifacts.folder import open_artifacts
from dsv4_router_runtime.artifacts.manifest import Kernel, TensorMapRecipe
from dsv4_router_runtime.device.tensor_map import EncodeArguments, encode_arguments
from dsv4_router_runtime.errors import repair_command

_ENTRY = re.compile(r"\.entry\s+([\w$]+)\s*\((.*?)\)", re.S)
_PARAMETER = re.compile(
    r"\.param\s+(?:\.align\s+(\d+)\s+)?\.(b8|u32|s32|b32|f32|u64|b64|s64|f64)\b[^,\[]*(?:\[(\d+)\])?"
)
_TARGET = re.compile(r"^\.target\s+(\w+)", re.M)
_BLOCK = re.compile(r"\.(?:reqntid|maxntid)\s+(\d+)(?:\s*,\s*(\d+))?(?:\s*,\s*(\d+))?")
_INSTRUCTION = re.compile(
    r"(?:^|[;{}])\s*(?:[\w$]+:(?!:)\s*)?(?:@!?%?\w+\s+)?([a-z][a-z0-9_]*(?:[.:]+\w+)*)", re.M
)
_COMMENT = re.compile(r"//[^\n]*|/\*.*?\*/", re.S)
_BITS = re.compile(r"\d+")


NO_PTX = (
    "the set carries no PTX, as a wheel's does not; `build-kernels build --artifacts FOLDER` makes "
    "the same bytes with their PTX, for `build-kernels verify --artifacts FOLDER`"
)
# The options of a call as the rungs leave them: off, their pointers null.
OPTIONS_OFF: Mapping[str, int | float] = {
    **dict.fromkeys(("bias_vl", "image_mask", "padding_mask", "num_valid_tokens"), 0),
    **dict.fromkeys(("tid2eid", "input_ids", "to_physical", "logical_count"), 0),
    **dict.fromkeys(("vocab_size", "input_ids_are_int64", "max_replicas", "ids_are_int64"), 0),
    **{"num_shared_slots": 0, "gate_temp": 1.0, "norm_topk_prob": 1},
}


class ArtifactReadError(Exception):
    """An artifact whose files are missing or not the manifest's, or whose PTX cannot be read."""


@dataclass(frozen=True, kw_only=True)
class PtxParameter:
    """A kernel parameter as the PTX declares it: `type` such as u32, f32, b8 (an array)."""

    type: str
    size: int


@dataclass(frozen=True, kw_only=True)
class Artifact:
    """A manifest entry, its cubin and its PTX; `ptx` is empty if the set carries none."""

    kernel: Kernel
    cubin_path: Path
    cubin: bytes
    ptx: str

    @property
    def has_ptx(self) -> bool:
        return bool(self.ptx)

    @property
    def cubin_sha256(self) -> str:
        return _sha256(self.cubin)

    @property
    def ptx_sha256(self) -> str:
        return _sha256(self.ptx.encode())


def load_artifact(folder: Path, key: str) -> Artifact:
    """Read the artifact called `key` (name.arch) in `folder`.

    ArtifactReadError if a file is missing or is not the one that the manifest's hashes are of: what
    is found out about other bytes would be stored as evidence about these. A set that carries no
    PTX at all, as a wheel's, gives an artifact without it.
    """
    kernels = {kernel.key: kernel for kernel in open_artifacts(folder).manifest.kernels}
    if key not in kernels:
        raise ArtifactReadError(f"no kernel {key} in {folder}; known: {', '.join(sorted(kernels))}")
    kernel = kernels[key]
    cubin_path, ptx_path = folder / kernel.file, folder / f"{key}.ptx"
    repair = f"make it with `{repair_command(str(cubin_path))}`"
    try:
        cubin = read_file(cubin_path, most_bytes=MAX_CODE_BYTES)
        ptx = None
        if carries_ptx(folder):
            ptx = read_file(ptx_path, most_bytes=MAX_CODE_BYTES)
    except OSError as error:
        raise ArtifactReadError(f"{error}; {repair}") from error
    found = (_sha256(cubin), kernel.ptx_sha256 if ptx is None else _sha256(ptx))
    if found != (kernel.cubin_sha256, kernel.ptx_sha256):
        raise ArtifactReadError(
            f"{key}: cubin or PTX in {folder} is not the one that the manifest records; {repair}"
        )
    return Artifact(kernel=kernel, cubin_path=cubin_path, cubin=cubin, ptx=(ptx or b"").decode())


def _sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def carries_ptx(folder: Path) -> bool:
    """Does the set carry PTX? A build's does, a wheel's does not."""
    return any(folder.glob("*.ptx"))


def is_decode(kernel: Kernel) -> bool:
    """Does the kernel multiply (and so read tensor maps), or only select from logits?"""
    return any(parameter.kind == "tensor_map" for parameter in kernel.parameters)


def is_hashed(kernel: Kernel) -> bool:
    """Does the kernel take a token's experts from a table, and read their rows of W_gate only?"""
    return kernel.role == "hash"


def null_pointers(kernel: Kernel) -> tuple[str, ...]:
    """The options' pointers that are null while every option is off."""
    given = ("tid2eid", "input_ids") if is_hashed(kernel) else ()
    return tuple(
        parameter.name
        for parameter in kernel.parameters
        if parameter.kind == "pointer"
        and parameter.name in OPTIONS_OFF
        and parameter.name not in given
    )


def encoded_map(
    recipe: TensorMapRecipe, *, num_tokens: int, num_experts: int, k: int, row: int
) -> EncodeArguments:
    """A recipe's map over a tensor at address 0 whose rows lie `row` elements apart."""
    block = recipe.box[0]
    sizes = {"N": num_tokens, "E": num_experts, "K": k, "K_in_block": block, "K_block": k // block}
    strides = dict.fromkeys(recipe.dims, row) | {"K_block": block} | {recipe.dims[0]: 1}
    return encode_arguments(recipe, address=0, sizes=sizes, strides=strides)


def ptx_target(ptx: str) -> str:
    """The architecture that the PTX is written for."""
    found = _TARGET.findall(ptx)
    if len(found) != 1:
        raise ArtifactReadError(f"expected one .target in the PTX (found {found})")
    return str(found[0])


def bounded_block(ptx: str) -> tuple[int, int, int] | None:
    """The block that the PTX requires (.reqntid) or is bounded to (.maxntid), if it says so."""
    found = _BLOCK.search(_COMMENT.sub("", ptx))
    if found is None:
        return None
    x, y, z = (int(number or 1) for number in found.groups())
    return x, y, z


def ptx_entry(ptx: str) -> tuple[str, tuple[PtxParameter, ...]]:
    """The PTX's one kernel: its symbol and its parameters in order."""
    found = _ENTRY.findall(_COMMENT.sub("", ptx))
    if len(found) != 1:
        raise ArtifactReadError(f"expected one .entry in the PTX (found {len(found)})")
    symbol, text = found[0]
    parameters = []
    for declaration in text.split(","):
        match = _PARAMETER.search(declaration)
        if match is None:
            raise ArtifactReadError(f"cannot read the parameter {declaration.strip()!r}")
        _, kind, count = match.groups()
        bits = _BITS.search(kind)
        size = int(bits.group()) // 8 if bits else 0
        parameters.append(PtxParameter(type=kind, size=size * int(count or 1)))
    return str(symbol), tuple(parameters)


def ptx_opcodes(ptx: str) -> Counter[str]:
    """How often each instruction occurs, modifiers and all: `tcgen05.commit.cta_group::1`."""
    _, _, body = _COMMENT.sub("", ptx).partition(".entry")
    return Counter(_INSTRUCTION.findall(body))


def count_starting(opcodes: Counter[str], prefix: str) -> int:
    """Occurrences of an opcode with any further modifiers: "st.async" counts "st.async.shared"."""
    return sum(
        count for name, count in opcodes.items() if name == prefix or name.startswith(prefix + ".")
    )
