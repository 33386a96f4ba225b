"""Rows of hidden states from the ranks that have them to the ranks that need them.

The plan of a step is a pure function of token counts, so every rank knows where every row is and
where it has to go: rows travel in one all-to-all, with no negotiation before it.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_taopd.parallel import platform
from megatron_taopd.parallel.copies import to_device

_ROWS_AT_A_TIME = 256  # that are copied by their numbers, which takes a temporary of so many


@dataclass(frozen=True)
class RowShard:
    """Hidden states of some response rows.

    Attributes:
        ids: [n] int64 on the CPU, canonical row numbers in any order, each once.
        rows: [n, D] on this rank's device.
    """

    ids: Tensor
    rows: Tensor

    @cached_property
    def _order(self) -> Tensor:
        """The order that sorts the ids, [n] int64: sorting the rows themselves would copy them."""
        return self.ids.argsort()

    def places(self, ids: Tensor) -> Tensor:
        """Return [len(ids)] int64: where each of these rows lies here, −1 where it is not held."""
        if not len(self.ids):
            return torch.full_like(ids, -1)
        where = torch.searchsorted(self.ids, ids, sorter=self._order)
        where = self._order[where.clamp(max=len(self.ids) - 1)]
        return where.where(self.ids[where] == ids, -1)

    def at(self, ids: Tensor) -> Tensor:
        """Return [len(ids), D], in the order asked for; ids are on the host.

        Raises:
            KeyError: a row is not held.
        """
        where = self.places(ids)
        if (where < 0).any():
            raise KeyError("asked for a row that this rank does not hold")
        return self.rows[to_device(where, self.rows.device)]


def send_rows(held: list[RowShard], ids: Tensor, source: Tensor, destination: Tensor) -> RowShard:
    """Move rows between ranks, as all of them have agreed.

    Args:
        held: what this rank has, in any number of pieces (of no rows: [0, D]). The list is emptied:
            a piece that nobody else refers to is freed as soon as its rows are in the send buffer,
            so that no more than twice the rows that are held or received exist at a time.
        ids, source, destination: [P] int64 on the CPU, equal on every rank: row `ids[i]` goes from
            global rank `source[i]` to `destination[i]`. A row may go to several ranks, and also to
            its own.

    Returns:
        The rows that came to this rank.

    Raises:
        KeyError: a row that this rank was to send is not held.

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
    sent = _take(held, ids[outgoing])
    received = sent.new_empty(len(incoming), sent.shape[1])
    # Bytes, because gloo moves no bfloat16.
    dist.all_to_all_single(
        received.view(torch.uint8), sent.view(torch.uint8), receive_counts, send_counts
    )
    return RowShard(ids[incoming], received)


def _take(held: list[RowShard], ids: Tensor) -> Tensor:
    """Take rows out of pieces: [len(ids), D], in the order asked for; the list is emptied."""
    rows = held[0].rows.new_empty(len(ids), held[0].rows.shape[1])
    missing = len(ids)
    while held:
        piece = held.pop()
        where = piece.places(ids)
        here = (where >= 0).nonzero()[:, 0]
        missing -= len(here)
        moves = [to_device(places, rows.device) for places in (here, where[here])]
        for to, of in zip(*(places.split(_ROWS_AT_A_TIME) for places in moves), strict=True):
            rows[to] = piece.rows[of]
    if missing:
        raise KeyError("asked for a row that this rank does not hold")
    return rows


def no_rows(width: int, dtype: torch.dtype) -> RowShard:
    """Return what a rank holds that holds nothing: rows [0, width] on its device."""
    return RowShard(
        torch.empty(0, dtype=torch.int64),
        torch.empty(0, width, dtype=dtype, device=platform.device()),
    )
