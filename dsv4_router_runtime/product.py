"""The matrix product of calls that no fused kernel serves: how cuBLAS is asked for it."""

from __future__ import annotations

# cuBLAS takes 2 to 8 times as long for a result whose rows are no multiple of 8 elements. us, cold,
# on one H200, of K = 7168 and N = 512 / 1024 / 4096: as it is, and transposed, then copied:
#     E = 132     15.7 / 24.5 / 65.7       10.7 / 13.1 / 25.5
#     E = 300     22.6 / 33.2 / 108        12.8 / 19.6 / 41.1
# A transposed result has rows of N elements. So the last N % 8 rows stay as they are, for 9 us.
WELL_SHAPED = 8
LEAST_TRANSPOSED = 512


def transposed_rows(num_tokens: int, num_experts: int) -> int:
    """Return how many rows of logits, from the first, are computed transposed and then copied."""
    if num_experts % WELL_SHAPED == 0 or num_tokens < LEAST_TRANSPOSED:
        return 0
    return num_tokens // WELL_SHAPED * WELL_SHAPED
