"""From a spec's configuration to a kernel's cubin and PTX: what the builder calls.

No GPU is needed: a kernel is traced with pointers to nothing, for an architecture that is named.
"""

import cutlass.cute as cute

from build_kernels.kernels import decode, hash_layer
from build_kernels.kernels.arguments import trace_arguments
from build_kernels.kernels.gemm import TileGemm
from build_kernels.kernels.gemm_sm90 import TileGemmSm90
from build_kernels.kernels.gemm_sm100 import TileGemmSm100
from build_kernels.kernels.shapes import MAX_EXPERTS
from dsv4_router_runtime.parameters import ABI


def make_kernel(*, role: str, arch: str, token_tile: int, **config):
    """A kernel for an architecture, sm_90* or sm_10*; `config`: layout, chunk and stages of its
    TileGemm."""
    gemm = TileGemmSm90 if arch.startswith("sm_90") else TileGemmSm100

    def make_gemm(**shared) -> TileGemm:
        return gemm(token_tile=token_tile, **shared, **config)

    if role == "hash":
        return hash_layer.RouterHash(make_gemm(sums_bytes=hash_layer.SUMS_BYTES))
    return decode.RouterDecode(
        make_gemm(
            sums_bytes=decode.sums_bytes(token_tile),
            num_facts=decode.max_owned(token_tile),
            num_names=decode.max_owned(token_tile) * MAX_EXPERTS,
        )
    )


def launch_facts(*, role: str, **config) -> dict:
    """Return the names of a kernel's parameters, and the part of its launch that it decides."""
    made = make_kernel(role=role, **config)
    return {
        "parameters": tuple(parameter.name for parameter in ABI[role]),
        "block": (made.num_threads, 1, 1),
        "dynamic_shared_bytes": made.gemm.shared_bytes,
    }


def compile_kernel(
    *, role: str, symbol: str, arch: str, dump_dir: str, **config
) -> tuple[bytes, str]:
    """Compile one kernel for `arch`, with no GPU: (cubin, ptx). Its entry is symbol_0."""
    made = make_kernel(role=role, arch=arch, **config)
    type(made).kernel.set_name_prefix(symbol, remove_cutlass_symbol=True, keep_mangled_name=False)

    compiled = cute.compile(
        made,
        *trace_arguments(role),
        options=f"--gpu-arch {arch} --keep-cubin --keep-ptx --dump-dir {dump_dir}",
    )
    ptx = compiled.__ptx__
    return compiled.__cubin__, ptx if isinstance(ptx, str) else ptx.decode()
