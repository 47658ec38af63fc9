"""Load one built kernel for the rungs: its manifest entry, its cubin and its PTX."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from build_kernels.building.entry import sha256
from build_kernels.errors import BuilderError
from dsv4_router_runtime.artifacts.files import MAX_CODE_BYTES, read_file
from dsv4_router_runtime.artifacts.folder import open_artifacts
from dsv4_router_runtime.artifacts.kernel import Kernel, TensorMapRecipe
from dsv4_router_runtime.device.tensor_map import EncodeArguments, encode_arguments
from dsv4_router_runtime.errors import repair_command
from dsv4_router_runtime.parameters import PARAMETERS_OFF, TABLE

NO_PTX = (
    "the set carries no PTX, as a wheel's does not; `build-kernels build --artifacts FOLDER` makes "
    "the same bytes with their PTX, for `build-kernels verify --artifacts FOLDER`"
)


class ArtifactReadError(BuilderError):
    """An artifact whose files are missing or are not those of the manifest."""


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
        return sha256(self.cubin)

    @property
    def ptx_sha256(self) -> str:
        return sha256(self.ptx.encode())


def load_artifact(folder: Path, key: str) -> Artifact:
    """Read the artifact called `key` (name.arch) in `folder`.

    ArtifactReadError if a file is missing or its hash is not the manifest's: results for other
    bytes would be stored as evidence for these. A set without any PTX, such as a wheel's, gives an
    artifact without PTX.
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
    found = (sha256(cubin), kernel.ptx_sha256 if ptx is None else sha256(ptx))
    if found != (kernel.cubin_sha256, kernel.ptx_sha256):
        raise ArtifactReadError(
            f"{key}: cubin or PTX in {folder} is not the one that the manifest records; {repair}"
        )
    return Artifact(kernel=kernel, cubin_path=cubin_path, cubin=cubin, ptx=(ptx or b"").decode())


def carries_ptx(folder: Path) -> bool:
    """Return whether the set carries PTX: a build's does, a wheel's does not."""
    return any(folder.glob("*.ptx"))


def null_pointers(kernel: Kernel) -> tuple[str, ...]:
    """Return the names of the pointers that are null if every option is off."""
    given = {item.name for item in TABLE} if kernel.role == "hash" else set()
    return tuple(
        parameter.name
        for parameter in kernel.parameters
        if parameter.kind == "pointer"
        and parameter.name in PARAMETERS_OFF
        and parameter.name not in given
    )


def encoded_map(
    recipe: TensorMapRecipe, *, num_tokens: int, num_experts: int, k: int, row: int
) -> EncodeArguments:
    """Encode a recipe for a tensor at address 0 whose rows lie `row` elements apart."""
    block = recipe.box[0]
    sizes = {"N": num_tokens, "E": num_experts, "K": k, "K_in_block": block, "K_block": k // block}
    strides = dict.fromkeys(recipe.dims, row) | {"K_block": block} | {recipe.dims[0]: 1}
    return encode_arguments(recipe, address=0, sizes=sizes, strides=strides)
