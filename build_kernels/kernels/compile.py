"""Compile a kernel from a spec's configuration to its cubin and PTX. Needs no GPU.

The kernel is traced with dummy arguments, for a named architecture: without a name and without a
GPU the DSL would pick one in silence.
"""

import cutlass.cute as cute

from build_kernels.kernels.arguments import trace_arguments
from build_kernels.kernels.decode import RouterDecode
from build_kernels.kernels.gemm import shared_bytes
from build_kernels.kernels.gemm_sm90 import TileGemmSm90
from build_kernels.kernels.gemm_sm100 import TileGemmSm100
from build_kernels.kernels.hash import RouterHash
from build_kernels.kernels.prefill import RouterPrefill
from dsv4_router_runtime.parameters import ABI

KERNELS = {"decode": RouterDecode, "prefill": RouterPrefill, "hash": RouterHash}


def make_kernel(*, role: str, arch: str, **config):
    """Make the kernel of a role for sm_90* or sm_10*; `config` is that of its TileGemm."""
    gemm = TileGemmSm90 if arch.startswith("sm_90") else TileGemmSm100
    return KERNELS[role](gemm(**config))


def launch_properties(*, role: str, **config) -> dict:
    """Return the names of a kernel's parameters, and the part of its launch that it decides."""
    kernel = make_kernel(role=role, **config)
    return {
        "parameters": tuple(parameter.name for parameter in ABI[role]),
        "block": (kernel.num_threads, 1, 1),
        "dynamic_shared_bytes": shared_bytes(kernel.shared_storage()),
    }


def compile_kernel(
    *, role: str, symbol: str, arch: str, dump_dir: str, **config
) -> tuple[bytes, str]:
    """Compile one kernel for `arch`: return (cubin, ptx). The symbol becomes `symbol`_0."""
    kernel = make_kernel(role=role, arch=arch, **config)
    type(kernel).kernel.set_name_prefix(symbol, remove_cutlass_symbol=True, keep_mangled_name=False)
    compiled = cute.compile(
        kernel,
        *trace_arguments(role),
        options=f"--gpu-arch {arch} --keep-cubin --keep-ptx --dump-dir {dump_dir}",
    )
    ptx = compiled.__ptx__
    return compiled.__cubin__, ptx if isinstance(ptx, str) else ptx.decode()
