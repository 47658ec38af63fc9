"""The largest problem and the largest launch: every bound that a manifest or a call is held to.

Hardware limits are those of the CUDA C++ Programming Guide, "Technical Specifications per Compute
Capability", and are the same from 9.0 on; those of tensor maps are the driver API's reference's, at
cuTensorMapEncodeTiled.
"""

from __future__ import annotations

# The largest problem that kernels are made for, and that a call may bring.
MAX_EXPERTS = 512
MAX_TOP_K = 8
MAX_SHARED_SLOTS = 8
K_MULTIPLE = 64
# num_tokens is an int32 parameter, and so is the number of K blocks.
MAX_TOKENS = MAX_K_BLOCKS = 2**31 - 1

# From 9.0 on there are clusters and tensor maps. A cubin's ELF header has a byte for the number.
MIN_COMPUTE_CAPABILITY = 90
MAX_COMPUTE_CAPABILITY = 255

MAX_CLUSTER_CTAS = 16
MAX_PORTABLE_CLUSTER_CTAS = 8
MAX_THREADS_PER_CTA = 1024
MAX_BLOCK = (1024, 1024, 64)
MAX_GRID = (2**31 - 1, 65535, 65535)
# CTAs along an axis of the grid that no problem's size decides: k_splits or a number. More than
# seven for each SM of the largest GPU.
MAX_FIXED_CTAS = 1024
# A kernel may wait for other CTAs this long at most: longer than any server's own watchdog.
MAX_WAIT_LIMIT_MS = 600_000
# As cuDriverGetVersion counts: clusters and tensor maps came with CUDA 12.0.
MIN_DRIVER = 12000
MAX_DRIVER = 99990
MAX_REGISTERS_PER_THREAD = 255
# A CTA's registers are those of its SM at most, given out to a warp in units of 8 per thread.
MAX_REGISTERS_PER_CTA = 65536
REGISTER_UNIT = 8
THREADS_PER_WARP = 32
# A CTA may have 227 KB: 228 KB of a multiprocessor less the 1 KB that the driver keeps.
MAX_DYNAMIC_SHARED_BYTES = 227 * 1024
MAX_STATIC_SHARED_BYTES = 48 * 1024
MAX_LOCAL_BYTES = 512 * 1024
# 4096 before CUDA 12.1.
MAX_PARAMETER_BYTES = 32764

MAX_MAP_DIMS = 5
MAX_BOX_EXTENT = 256
BOX_ROW_ALIGNMENT_BYTES = 16
# Of a tensor map's address and of its strides.
MAP_ALIGNMENT_BYTES = 16

# A kernel's scratch, per stream. Four times the bytes of FP32 pairs of 64 tokens, 512 experts and
# 16 splits of K; the kernels here take 7.9 MB at most.
MAX_SCRATCH_BYTES = 16 * 2**20
