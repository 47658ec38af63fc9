"""The GPU: driver calls, loading, tensor maps, launch sites and scratch memory."""
