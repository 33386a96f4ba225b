"""The teacher's hidden states: from the ranks that computed them to those that score the rows."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_taopd.data.batching import Placement
from megatron_taopd.parallel.exchange import Routes, RowShard
from megatron_taopd.parallel.layout import Layout
from megatron_taopd.types import Sequences


@dataclass(frozen=True)
class ReadRows:
    """What the teacher has made of some sequences.

    Attributes:
        held: this rank's share of their rows, numbered within these sequences.
        holders: [n, h] int64, for each sequence the global ranks that hold its rows; or [p, h],
            for each run of rows.
        starts: [p] int64, the row that each run starts with, ascending from 0 on; None: the
            sequences are the runs.
    """

    held: RowShard
    holders: Tensor
    starts: Tensor | None = None


def dispatch(
    parts: list[tuple[Tensor, ReadRows]], batch: Sequences, student: Layout, scorers: Placement
) -> RowShard:
    """Send a teacher's hidden states at its response rows to the ranks that will score them.

    Args:
        parts: (places in the batch, what was read); every sequence of this teacher once. The list
            is emptied, so that rows are freed when all are sent.
        batch: the whole batch; the same on every rank.
        student: layout of the model whose last stage scores.
        scorers: who scores which sequence, or which part of it.

    Returns:
        On the student's last-stage ranks the rows that they score, elsewhere none.

    Collectives: all-to-alls (`exchange.rounds`) of R · D · tp elements together over all ranks, tp
    being the student's.
    """
    others = torch.ones(batch.num_sequences, dtype=torch.bool)
    for places, _ in parts:
        others[places] = False
    held, runs = _in_batch(parts, batch)
    return _routes(batch, student, scorers, runs, others).send_all(held)


def _in_batch(
    parts: list[tuple[Tensor, ReadRows]], batch: Sequences
) -> tuple[list[RowShard], tuple[Tensor, Tensor]]:
    """Number the parts' rows as in the batch, and find who holds the rows of which run.

    Empties the list of parts.

    Returns:
        The rows; [p] int64 the row that each run starts with, ascending, and [p, h] its holders.
    """
    held, starts, holders = [], [], []
    while parts:
        places, part = parts.pop()
        counts = batch.cu_rows.diff()[places]
        ends = counts.cumsum(0)
        moved_by = batch.cu_rows[places] - (ends - counts)
        if part.starts is None:
            runs, own = batch.cu_rows[places][counts > 0], part.holders[counts > 0]
        else:
            runs = part.starts[part.starts < counts.sum()]
            own = part.holders[: len(runs)]
            runs = runs + moved_by[torch.searchsorted(ends, runs, right=True)]
        sequence = torch.searchsorted(ends, part.held.ids, right=True)
        held.append(RowShard(part.held.ids + moved_by[sequence], part.held.rows))
        starts.append(runs)
        holders.append(own)
    order = torch.cat(starts).argsort(stable=True)
    return held, (torch.cat(starts)[order], torch.cat(holders)[order])


def _routes(
    batch: Sequences,
    student: Layout,
    scorers: Placement,
    runs: tuple[Tensor, Tensor],
    others: Tensor,
) -> Routes:
    """Say which rank sends the rows of which run to which.

    Args:
        others: [N] bool, sequences without runs: another teacher's.

    Each rank of the student's last-stage TP group needs them; the copies are taken in turn from
    the ranks that have them, and from the destination itself if it does.
    """
    starts, holders = runs
    foreign = batch.cu_rows[:-1][others & (batch.cu_rows.diff() > 0)]
    numbers = torch.cat([torch.arange(len(starts)), torch.full_like(foreign, -1)])
    starts, order = torch.cat([starts, foreign]).sort(stable=True)
    plain = Routes.between(batch.num_rows, (starts, numbers[order]), scorers.runs(batch))
    plain = plain.only(plain.source >= 0)
    holders, sources, destinations = holders[plain.source], [], []
    for tp_rank in range(student.tp):
        destination = student.last_stage_rank(plain.destination, tp_rank)
        source = holders[:, tp_rank % holders.shape[1]]
        has_it = (holders == destination[:, None]).any(1)
        sources.append(torch.where(has_it, destination, source))
        destinations.append(destination)
    first, end, rows = (x.repeat(student.tp) for x in (plain.first, plain.end, plain.rows))
    return Routes(first, end, torch.cat(sources), torch.cat(destinations), rows)
