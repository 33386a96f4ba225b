"""Rows of hidden states from the ranks that have them to the ranks that need them.

The plan of a step is a pure function of token counts, so every rank knows where every row is and
where it has to go: rows travel in one all-to-all, with no negotiation before it.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_taopd.parallel import platform


@dataclass(frozen=True)
class HeldRows:
    """Hidden states of some response rows.

    Attributes:
        ids: [n] int64 on the CPU, ascending canonical row numbers.
        rows: [n, D] on this rank's device.
    """

    ids: Tensor
    rows: Tensor

    @classmethod
    def from_unordered(cls, ids: Tensor, rows: Tensor) -> HeldRows:
        order = ids.argsort()
        return cls(ids[order], rows[order.to(rows.device)])

    def at(self, ids: Tensor) -> Tensor:
        """[len(ids), D], in the order asked for. KeyError for a row that is not held."""
        ids = ids.cpu()
        where = torch.searchsorted(self.ids, ids)
        if len(ids) and not torch.equal(self.ids[where.clamp(max=len(self.ids) - 1)], ids):
            raise KeyError("asked for a row that this rank does not hold")
        return self.rows[where.to(self.rows.device)]


def send_rows(held: HeldRows, ids: Tensor, source: Tensor, destination: Tensor) -> HeldRows:
    """Move rows between ranks, as all of them have agreed.

    Args:
        held: what this rank has (possibly nothing: then [0, D]).
        ids, source, destination: [P] int64 on the CPU, equal on every rank: row `ids[i]` goes from
            global rank `source[i]` to `destination[i]`. A row may go to several ranks, and also to
            its own.

    Returns:
        The rows that came to this rank.

    Collectives: one all-to-all over the world, P·D elements in total, of which rows that stay on
    their rank cost nothing on the wire.
    """
    rank, world_size = dist.get_rank(), dist.get_world_size()
    outgoing = (source == rank).nonzero()[:, 0]
    outgoing = outgoing[destination[outgoing].argsort(stable=True)]
    incoming = (destination == rank).nonzero()[:, 0]
    incoming = incoming[source[incoming].argsort(stable=True)]
    send_counts = destination[outgoing].bincount(minlength=world_size).tolist()
    receive_counts = source[incoming].bincount(minlength=world_size).tolist()
    sent = held.at(ids[outgoing])
    received = sent.new_empty(len(incoming), sent.shape[1])
    # Bytes, because gloo moves no bfloat16.
    dist.all_to_all_single(
        received.view(torch.uint8), sent.view(torch.uint8), receive_counts, send_counts
    )
    return HeldRows.from_unordered(ids[incoming], received)


def no_rows(width: int, dtype: torch.dtype) -> HeldRows:
    """What a rank holds that holds nothing."""
    return HeldRows(
        torch.empty(0, dtype=torch.int64),
        torch.empty(0, width, dtype=dtype, device=platform.device()),
    )
