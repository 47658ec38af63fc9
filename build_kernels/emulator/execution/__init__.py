"""Run warps: registers and divergence, CTAs and clusters, asynchronous operations, the schedule."""
