"""The values of the tables that a layer binds, checked once; this waits for the current stream.

A hash table is copied, so that its check stays true. A physical map is read in place, since servers
rebalance in place: later changes are theirs, and the kernels hold the values in bounds.
"""

from __future__ import annotations

import torch

from .checks import wrong


def copied_hash_table(tid2eid: torch.Tensor, num_experts: int) -> torch.Tensor:
    """The table [vocab, top_k] in new memory, contiguous, int32, every row distinct experts."""
    with torch.no_grad(), torch.inference_mode(False):
        table = tid2eid.detach().to(torch.int64, copy=True).contiguous()
        outside = (table < 0) | (table >= num_experts)
        if outside.any():
            row, column = outside.nonzero()[0].tolist()
            got = f"{table[row, column].item()} at [{row}, {column}]"
            raise wrong("tid2eid", f"ids in 0..{num_experts - 1}", got)
        twice = (table.sort(1)[0].diff(dim=1) == 0).any(1)
        if twice.any():
            row = int(twice.nonzero()[0])
            raise wrong("tid2eid", "distinct ids in each row", f"{table[row].tolist()} at [{row}]")
        return table.to(torch.int32)


def check_physical_map(to_physical: torch.Tensor, logical_count: torch.Tensor) -> None:
    """Refuse counts beyond the map's replicas, and ids in use outside 0..2**31 - 1."""
    max_replicas = to_physical.shape[1]
    with torch.no_grad():
        unfit = (logical_count < 1) | (logical_count > max_replicas)
        if unfit.any():
            expert = int(unfit.nonzero()[0])
            got = f"{logical_count[expert].item()} at [{expert}]"
            raise wrong("logical_count", f"1..{max_replicas}, to_physical's replicas", got)
        replicas = torch.arange(max_replicas, device=to_physical.device)
        outside = (to_physical < 0) | (to_physical > 2**31 - 1)
        bad = (replicas < logical_count[:, None]) & outside
        if bad.any():
            expert, replica = bad.nonzero()[0].tolist()
            got = f"{to_physical[expert, replica].item()} at [{expert}, {replica}]"
            raise wrong("to_physical", f"ids in 0..{2**31 - 1}", got)
