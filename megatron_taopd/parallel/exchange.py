"""Rows of hidden states from the ranks that have them to the ranks that need them.

The plan of a step is a pure function of token counts, so every rank knows where every row is and
where it has to go: rows travel in all-to-alls, with no negotiation before them.
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
_MOST_ROUNDS = 32  # a rank has this share of what it sends in its send buffer
_FEWEST_ROWS = 128  # of a round, or all of them, on the rank that moves most


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

    They go in `rounds` of about equally many rows of each pair of ranks, so that a rank has every
    row at most twice, where it was and where it comes to, and in addition the rows that it sends in
    one round.

    Args:
        held: what this rank has, in any number of pieces (of no rows: [0, D]). The list is emptied.
        ids, source, destination: [P] int64 on the CPU, equal on every rank: row `ids[i]` goes from
            global rank `source[i]` to `destination[i]`. A row may go to several ranks, and also to
            its own.

    Returns:
        The rows that came to this rank.

    Raises:
        KeyError: a row that this rank was to send is not held.

    Collectives: `rounds` all-to-alls over the world, P·D elements in total, of which rows that stay
    on their rank cost nothing on the wire.
    """
    rank, world_size = dist.get_rank(), dist.get_world_size()
    by_rank = (each.bincount(minlength=world_size) for each in (source, destination))
    count = rounds(max(int(rows.max()) for rows in by_rank))
    outgoing, send_counts = _in_rounds(source == rank, destination, count, world_size)
    incoming, receive_counts = _in_rounds(destination == rank, source, count, world_size)
    sent, width = send_counts.sum(1).tolist(), held[0].rows.shape[1]
    received = held[0].rows.new_empty(len(incoming), width)
    # One for all rounds: gloo's threads let go of what they have sent at their leisure.
    buffer = held[0].rows.new_empty(max(sent), width)
    arrivals = received.split(receive_counts.sum(1).tolist())
    for i, departing in enumerate(ids[outgoing].split(sent)):
        leaving = buffer[: len(departing)]
        _take(held, departing, leaving)
        # Bytes, because gloo moves no bfloat16.
        dist.all_to_all_single(
            arrivals[i].view(torch.uint8),
            leaving.view(torch.uint8),
            receive_counts[i].tolist(),
            send_counts[i].tolist(),
        )
    held.clear()
    return RowShard(ids[incoming], received)


def rounds(most_rows: int) -> int:
    """Return in how many rounds rows are sent.

    Args:
        most_rows: that any rank sends or receives, its own included.
    """
    return max(1, min(_MOST_ROUNDS, -(-most_rows // _FEWEST_ROWS)))


def _in_rounds(own: Tensor, partner: Tensor, count: int, world_size: int) -> tuple[Tensor, Tensor]:
    """Deal a rank's copies to rounds: the rows of a pair of ranks evenly, in their order.

    Both ranks of a pair see the same rows in the same order, and so deal them alike.

    Args:
        own: [P] bool, the copies that this rank sends, or receives.
        partner: [P] the other rank of each.

    Returns:
        [p] int64, the places of its copies, by round and partner; [count, world_size] how many.
    """
    places = own.nonzero()[:, 0]
    places = places[partner[places].argsort(stable=True)]
    partners = partner[places]
    of_pair = partners.bincount(minlength=world_size)
    within = torch.arange(len(places)) - (of_pair.cumsum(0) - of_pair)[partners]
    cells = within * count // of_pair[partners] * world_size + partners
    counts = cells.bincount(minlength=count * world_size).view(count, world_size)
    return places[cells.argsort(stable=True)], counts


def _take(held: list[RowShard], ids: Tensor, out: Tensor) -> None:
    """Copy rows out of pieces to `out`, [len(ids), D], in the order asked for."""
    missing = len(ids)
    for piece in held:
        where = piece.places(ids)
        here = (where >= 0).nonzero()[:, 0]
        missing -= len(here)
        moves = [to_device(places, out.device) for places in (here, where[here])]
        for to, of in zip(*(places.split(_ROWS_AT_A_TIME) for places in moves), strict=True):
            out[to] = piece.rows[of]
    if missing:
        raise KeyError("asked for a row that this rank does not hold")


def no_rows(width: int, dtype: torch.dtype) -> RowShard:
    """Return what a rank holds that holds nothing: rows [0, width] on its device."""
    return RowShard(
        torch.empty(0, dtype=torch.int64),
        torch.empty(0, width, dtype=dtype, device=platform.device()),
    )
