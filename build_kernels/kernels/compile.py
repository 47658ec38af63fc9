"""From a spec's configuration to a decode kernel's cubin and PTX: what the builder calls.

No GPU is needed: a kernel is traced with pointers to nothing, for an architecture that is named.
"""

import cutlass.cute as cute
from cutlass import BFloat16, Float32, Int32, Uint64
from cutlass.cute.runtime import make_ptr

from build_kernels.kernels.decode import (
    EXPERT_TILE,
    NUM_SPLITS,
    WORKSPACE_BYTES,
    RouterDecode,
)
from build_kernels.kernels.decode_sm90 import RouterDecodeSm90
from build_kernels.kernels.decode_sm100 import RouterDecodeSm100


def decode_kernel(*, arch: str, **config) -> RouterDecode:
    """The decode kernel of an architecture, sm_90* or sm_10*; `config` as for RouterDecode."""
    kind = RouterDecodeSm90 if arch.startswith("sm_90") else RouterDecodeSm100
    return kind(**config)


def launch_facts(*, arch: str, **config) -> dict:
    """What a launch needs besides its arguments, and the workspace's size in bytes."""
    kernel = decode_kernel(arch=arch, **config)
    return {
        "block": [kernel.num_threads, 1, 1],
        "cluster": [NUM_SPLITS, 1, 1],
        "dynamic_shared_bytes": kernel.shared_bytes,
        "expert_tile": EXPERT_TILE,
        "workspace_bytes": WORKSPACE_BYTES,
    }


def compile_kernel(*, symbol: str, arch: str, dump_dir: str, **config) -> tuple[bytes, str]:
    """Compile one decode kernel for `arch`, with no GPU: (cubin, ptx). Its entry is symbol_0."""
    kernel = decode_kernel(arch=arch, **config)
    type(kernel).kernel.set_name_prefix(symbol, remove_cutlass_symbol=True, keep_mangled_name=False)

    def pointer(dtype, align):
        return make_ptr(dtype, align, cute.AddressSpace.gmem, assumed_align=align)

    compiled = cute.compile(
        kernel,
        pointer(BFloat16, 16),
        pointer(BFloat16, 16),
        pointer(Uint64, 16),
        pointer(Float32, 4),
        pointer(Float32, 4),
        pointer(Int32, 4),
        *[Int32(1)] * 4,
        Float32(1.0),
        *[Int32(1)] * 2,
        options=f"--gpu-arch {arch} --keep-cubin --keep-ptx --dump-dir {dump_dir}",
    )
    ptx = compiled.__ptx__
    return compiled.__cubin__, ptx if isinstance(ptx, str) else ptx.decode()
