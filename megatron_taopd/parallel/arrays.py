"""Arrays that some ranks have and all ranks need."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor


def from_sources(
    own: Tensor, sources: Sequence[int], group: dist.ProcessGroup | None
) -> list[Tensor]:
    """Give every rank the arrays of the ranks that have some.

    Args:
        own: [n] int32 on the CPU, of any length; of a rank that is no source it does not count.
        sources: ranks that may have an array, the same on every rank.
        group: over all ranks; None: there is only this one.

    Returns:
        Those of the sources that have one, in their order.

    Collectives: an all-reduce of 8 bytes a source; a broadcast of each array.
    """
    if group is None:
        return [own] if len(own) else []
    rank, lengths = dist.get_rank(), torch.zeros(len(sources), dtype=torch.int64)
    if rank in sources:
        lengths[sources.index(rank)] = len(own)
    dist.all_reduce(lengths, group=group)
    found = []
    for source, length in zip(sources, lengths.tolist(), strict=True):
        if length:
            found.append(own if source == rank else torch.empty(length, dtype=torch.int32))
            dist.broadcast(found[-1], source, group=group)
    return found
