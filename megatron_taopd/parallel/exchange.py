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
from megatron_taopd.types import ranges

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


@dataclass(frozen=True)
class Traffic:
    """The rows that this rank sends to others, or gets from them; its own included.

    Attributes:
        ids: [p] int64 on the CPU, canonical numbers, one partner after another; both ranks of a
            pair have them in one order.
        counts: [world_size] int64, how many are of each partner.
    """

    ids: Tensor
    counts: Tensor


@dataclass(frozen=True)
class Routes:
    """Which rank sends which runs of consecutive rows to which: the same on every rank.

    Attributes:
        first, end: [P] int64 on the CPU, the rows of each run; a run may go to several ranks.
        source, destination: [P] int64, ranks.
        rows: [P] int64, how many rows of each go.
    """

    first: Tensor
    end: Tensor
    source: Tensor
    destination: Tensor
    rows: Tensor

    @property
    def rounds(self) -> int:
        """In how many rounds they are sent (`rounds`)."""
        sent, received = (self._by_rank(each) for each in (self.source, self.destination))
        return rounds(int(torch.maximum(sent, received).max()))

    @classmethod
    def between(
        cls, num_rows: int, sources: tuple[Tensor, Tensor], destinations: tuple[Tensor, Tensor]
    ) -> Routes:
        """Route all rows: of two ways to cut them into runs, the runs that both have whole.

        Args:
            sources, destinations: [p] int64 the row that each run starts with, ascending from 0 on,
                and [p] the rank that has it.
        """
        first = torch.cat([sources[0], destinations[0]]).unique()
        first = first[first < num_rows]
        end = torch.cat([first[1:], first.new_tensor([num_rows])])[: len(first)]
        source, destination = (
            ranks[torch.searchsorted(starts, first, right=True) - 1]
            for starts, ranks in (sources, destinations)
        )
        return cls(first, end, source, destination, end - first)

    def only(self, runs: Tensor) -> Routes:
        """Return the routes of some of the runs, [P] bool."""
        return Routes(*(values[runs] for values in vars(self).values()))

    def outgoing(self) -> tuple[Tensor, Tensor]:
        """Return the runs that this rank sends, by partner, and [world_size] rows to each."""
        return self._of_own(self.source, self.destination)

    def incoming(self) -> tuple[Tensor, Tensor]:
        """Return the runs that come here, by partner, and [world_size] rows of each."""
        return self._of_own(self.destination, self.source)

    def _of_own(self, own: Tensor, partner: Tensor) -> tuple[Tensor, Tensor]:
        places = (own == dist.get_rank()).nonzero()[:, 0]
        places = places[partner[places].argsort(stable=True)]
        return places, self._by_rank(partner, places)

    def send_all(self, held: list[RowShard]) -> RowShard:
        """Move all rows of the runs: `send_rows`, of which both sides know the numbers."""
        outgoing, incoming = (
            Traffic(ranges(self.first[runs], self.rows[runs]), counts)
            for runs, counts in (self.outgoing(), self.incoming())
        )
        return send_rows(held, outgoing, incoming, self.rounds)

    def _by_rank(self, ranks: Tensor, places: Tensor | slice = slice(None)) -> Tensor:
        total = torch.zeros(dist.get_world_size(), dtype=torch.int64)
        return total.index_add_(0, ranks[places], self.rows[places])


def tell_ids(outgoing: Traffic, counts: Tensor) -> Traffic:
    """Tell every rank which rows it will get; return those that come to this one.

    Args:
        counts: [world_size] int64, how many come of each rank.

    Collectives: an all-to-all of 8 bytes for each row.
    """
    sent = to_device(outgoing.ids, platform.device())
    received = sent.new_empty(int(counts.sum()))
    dist.all_to_all_single(received, sent, counts.tolist(), outgoing.counts.tolist())
    return Traffic(received.cpu(), counts)


def send_rows(held: list[RowShard], outgoing: Traffic, incoming: Traffic, count: int) -> RowShard:
    """Move rows between ranks, as all of them have agreed.

    They go in rounds of about equally many rows of each pair of ranks, so that a rank has every
    row at most twice, where it was and where it comes to, and in addition the rows that it sends in
    one round.

    Args:
        held: what this rank has, in any number of pieces (of no rows: [0, D]). The list is emptied.
        outgoing, incoming: what it sends, also to itself, and what comes to it.
        count: of rounds, the same on every rank (`Routes.rounds`).

    Returns:
        The rows that came to this rank.

    Raises:
        KeyError: a row that this rank was to send is not held.

    Collectives: `count` all-to-alls over the world, D elements for each row and destination, of
    which rows that stay on their rank cost nothing on the wire.
    """
    departing, send_counts = _in_rounds(outgoing, count)
    arriving, receive_counts = _in_rounds(incoming, count)
    sent, width = send_counts.sum(1).tolist(), held[0].rows.shape[1]
    received = held[0].rows.new_empty(len(arriving), width)
    # One for all rounds: gloo's threads let go of what they have sent at their leisure.
    buffer = held[0].rows.new_empty(max(sent), width)
    arrivals = received.split(receive_counts.sum(1).tolist())
    for i, ids in enumerate(departing.split(sent)):
        leaving = buffer[: len(ids)]
        _take(held, ids, leaving)
        # Bytes, because gloo moves no bfloat16.
        dist.all_to_all_single(
            arrivals[i].view(torch.uint8),
            leaving.view(torch.uint8),
            receive_counts[i].tolist(),
            send_counts[i].tolist(),
        )
    held.clear()
    return RowShard(arriving, received)


def rounds(most_rows: int) -> int:
    """Return in how many rounds rows are sent.

    Args:
        most_rows: that any rank sends or receives, its own included.
    """
    return max(1, min(_MOST_ROUNDS, -(-most_rows // _FEWEST_ROWS)))


def _in_rounds(traffic: Traffic, count: int) -> tuple[Tensor, Tensor]:
    """Deal a rank's rows to rounds: those of a pair of ranks evenly, in their order.

    Both ranks of a pair see the same rows in the same order, and so deal them alike.

    Returns:
        [p] int64, the ids by round and partner; [count, world_size] how many.
    """
    # Of n rows the w-th goes in round ⌊w · count / n⌋.
    rounds_of = torch.arange(count + 1)[:, None]
    ends = -(-rounds_of * traffic.counts // count)
    counts = ends.diff(dim=0)
    starts = traffic.counts.cumsum(0) - traffic.counts + ends[:-1]
    return traffic.ids[ranges(starts.flatten(), counts.flatten())], counts


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
