"""The sizes that the kernels, their specs and topk.cu share. Pure: imports no compiler.

MAX_EXPERTS and MAX_TOP_K are the runtime's, which refuses larger problems.
"""

from dsv4_router_runtime.artifacts.limits import MAX_EXPERTS, MAX_TOP_K
from dsv4_router_runtime.parameters import TICKETS

# The MMA tiler of the decode kernels is (TILE_M, token tile, K_BLOCK). 64 is the M of wgmma and the
# smallest M of tcgen05.mma; 64 BF16 along K are the 128 bytes that the swizzle spans.
TILE_M = 64
K_BLOCK = 64
MMA_K = 16
# K is cut into slices. Each is summed from zero, then groups of them, then the groups: exact.py has
# the order. The CTAs of a cluster share the slices. 16 is the largest cluster there is.
NUM_SLICES = 16
GROUP_SLICES = 4
MAX_DECODE_TOKENS = TICKETS["decode"]

# M is an expert in router_decode, and a (token, slot) in router_hash.
EXPERT_TILE = TILE_M
HASH_TOKEN_TILE = TILE_M // MAX_TOP_K

# router_prefill: the same for more tokens, in several tiles of them.
MAX_PREFILL_TOKENS = TICKETS["prefill"]

# The workspace of both: a 4-byte ticket counter per token, then an 8-byte candidate per token
# and expert.
CANDIDATE_BYTES = 8


def workspace_bytes(max_tokens: int) -> int:
    """Return the bytes of the workspace of a kernel that takes up to max_tokens."""
    return max_tokens * (4 + MAX_EXPERTS * CANDIDATE_BYTES)


# A merging warp that still misses a candidate after this time traps. A launch takes microseconds;
# a process whose GPU is shared may stand still for seconds.
MERGE_WAIT_LIMIT_MS = 10_000

# router_topk: one warp per token.
TOPK_WARPS = 4
# The constants of topk.cu, passed to NVRTC as macros.
TOPK_DEFINES = {"MAX_EXPERTS": MAX_EXPERTS, "MAX_TOP_K": MAX_TOP_K, "WARPS": TOPK_WARPS}
