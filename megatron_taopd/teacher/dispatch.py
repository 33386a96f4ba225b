"""The teacher's hidden states: from the ranks that computed them to those that score the rows."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_taopd.parallel.exchange import Routes, RowShard, Traffic, send_rows
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
    """Send a teacher's hidden states at its response rows to the ranks that will score them.

    Args:
        parts: (places in the batch, what was read); every sequence of this teacher once. The list
            is emptied, so that rows are freed when all are sent.
        batch: the whole batch; the same on every rank.
        student: layout of the model whose last stage scores.
        owner: [N] int64, the student's data-parallel rank that scores each sequence.

    Returns:
        On the student's last-stage ranks the rows of their sequences, elsewhere none.

    Collectives: all-to-alls (`exchange.rounds`) of R · D · tp elements together over all ranks, tp
    being the student's.
    """
    sequences = torch.cat([places for places, _ in parts]).sort().values
    held, holders = _in_batch(parts, batch)
    routes = _routes(batch.cu_rows.diff(), sequences, student, owner, holders)
    outgoing, incoming = (
        Traffic(batch.rows_of(those), counts)
        for those, counts in (routes.outgoing(), routes.incoming())
    )
    return send_rows(held, outgoing, incoming, routes.rounds)


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
        counts = batch.cu_rows.diff()[places]
        ends = counts.cumsum(0)
        sequence = torch.searchsorted(ends, part.held.ids, right=True)
        moved_by = batch.cu_rows[places] - (ends - counts)
        held.append(RowShard(part.held.ids + moved_by[sequence], part.held.rows))
    return held, holders


def _routes(
    rows: Tensor, sequences: Tensor, student: Layout, owner: Tensor, holders: Tensor
) -> Routes:
    """Say which rank sends the rows of each of these sequences to which; rows: [N] int64.

    Each rank of the student's last-stage TP group needs them; the copies are taken in turn from
    the ranks that have them, and from the destination itself if it does.
    """
    sources, destinations = [], []
    for tp_rank in range(student.tp):
        destination = student.last_stage_rank(owner[sequences], tp_rank)
        source = holders[sequences, tp_rank % holders.shape[1]]
        has_it = (holders[sequences] == destination[:, None]).any(1)
        sources.append(torch.where(has_it, destination, source))
        destinations.append(destination)
    return Routes(
        sequences.repeat(student.tp),
        torch.cat(sources),
        torch.cat(destinations),
        rows[sequences].repeat(student.tp),
    )
