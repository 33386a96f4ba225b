"""The teacher's hidden states: from the ranks that computed them to those that score the rows."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_taopd.parallel.exchange import RowShard, send_rows
from megatron_taopd.parallel.layout import Layout
from megatron_taopd.types import Sequences


@dataclass(frozen=True)
class ReadRows:
    """What the teacher has made of some sequences.

    Attributes:
        held: this rank's share of their rows, numbered within these sequences.
        holders: [n, h] int64, for each sequence the global ranks that hold its rows.
    """

    held: RowShard
    holders: Tensor


def dispatch(
    parts: list[tuple[Tensor, ReadRows]], batch: Sequences, student: Layout, owner: Tensor
) -> RowShard:
    """Send the teacher's hidden states at all response rows to the ranks that will score them.

    Args:
        parts: (places in the batch, what was read); every sequence of the batch once. The list is
            emptied, so that rows are freed when all are sent.
        batch: the whole batch; the same on every rank.
        student: layout of the model whose last stage scores.
        owner: [N] int64, the student's data-parallel rank that scores each sequence.

    Returns:
        On the student's last-stage ranks the rows of their sequences, elsewhere none.

    Collectives: all-to-alls (`exchange.rounds`) of R · D · tp elements together over all ranks, tp
    being the student's.
    """
    held, holders = _in_batch(parts, batch)
    return send_rows(held, *_routes(batch, student, owner, holders))


def _in_batch(
    parts: list[tuple[Tensor, ReadRows]], batch: Sequences
) -> tuple[list[RowShard], Tensor]:
    """Number the parts' rows as in the batch, and find [N, h] who holds those of each sequence.

    Empties the list of parts.
    """
    holders = parts[0][1].holders.new_empty(batch.num_sequences, parts[0][1].holders.shape[1])
    held = []
    while parts:
        places, part = parts.pop()
        holders[places] = part.holders
        held.append(RowShard(batch.rows_of(places)[part.held.ids], part.held.rows))
    return held, holders


def _routes(batch: Sequences, student: Layout, owner: Tensor, holders: Tensor):
    """Return (row, source rank, destination rank) of every copy that has to be delivered.

    Each rank of the student's last-stage TP group needs the row; the copies are taken in turn from
    the ranks that have it, and from the destination itself if it does.
    """
    sequences = batch.row_sequences()
    sources, destinations = [], []
    for tp_rank in range(student.tp):
        destination = student.last_stage_rank(owner, tp_rank)
        source = holders[:, tp_rank % holders.shape[1]]
        has_it = (holders == destination[:, None]).any(1)
        sources.append(torch.where(has_it, destination, source)[sequences])
        destinations.append(destination[sequences])
    ids = torch.arange(batch.num_rows)
    return ids.repeat(student.tp), torch.cat(sources), torch.cat(destinations)
