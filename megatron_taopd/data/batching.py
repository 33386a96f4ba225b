"""Cut, drop, balance and pack: from the response rows that are wanted to equal work on every rank.

Planning works on lengths alone and is the same on every rank: no collectives. Tokens are only
touched in `build_micro_batch`. A sequence's *length* here is the number of its tokens that a pass
has to run, 0 for a sequence that the pass does not need.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Sequence
from dataclasses import dataclass, replace
from heapq import heappop, heappush
from itertools import groupby, pairwise
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from megatron_taopd.parallel.copies import to_device
from megatron_taopd.types import RolloutBatch, Sequences, WantedRows, ranges

if TYPE_CHECKING:
    from megatron_taopd.parallel.layout import Layout


def split_mini_batches(batch: RolloutBatch, kept: WantedRows, n: int) -> list[WantedRows]:
    """Deal the sequences into n groups of near-equal kept rows, for n optimizer steps per batch.

    Selection stays batch-wide: this only says which kept rows belong to which step.

    Returns:
        n parts of `kept`, whole sequences each, in deterministic order. Their kept counts differ by
        at most the largest count of one sequence. A part is empty only if fewer than n sequences
        have kept rows.
    """
    if n == 1:
        return [kept]
    group = torch.empty_like(kept.counts)
    for index, sequences in enumerate(balance(kept.counts.tolist(), n)):
        group[sequences] = index
    return [kept.within(batch, group == index) for index in range(n)]


def balance(costs: Sequence[int], parts: int) -> list[list[int]]:
    """Deal items into `parts` lists of near-equal total cost: longest first to the least loaded.

    Returns:
        The item indices of each part, ascending; every index once. Totals differ by at most the
        largest cost. Equal costs go in index order, to the part that has fewest items and then the
        lowest number.
    """
    dealt: list[list[int]] = [[] for _ in range(parts)]
    heap = [(0, 0, part) for part in range(parts)]
    for index in sorted(range(len(costs)), key=lambda i: (-costs[i], i)):
        load, items, part = heappop(heap)
        dealt[part].append(index)
        heappush(heap, (load + costs[index], items + 1, part))
    return [sorted(part) for part in dealt]


def pack(
    lengths: Sequence[int], sequences: Sequence[int], micro_batch_tokens: int, multiple: int = 1
) -> list[tuple[int, ...]]:
    """Pack sequences into few micro-batches, best fit decreasing.

    Args:
        lengths: [N] tokens of every sequence of the batch.
        sequences: which of them to pack.
        micro_batch_tokens: the most tokens in a micro-batch, its padding to `multiple` included.

    Returns:
        Sequence indices of each micro-batch, ascending; the largest sequences come first, so that a
        micro-batch that does not fit in memory says so at once.

    Raises:
        ValueError: a sequence is longer than a micro-batch.
    """
    capacity = micro_batch_tokens // multiple * multiple
    packed: list[list[int]] = []
    space: list[tuple[int, int]] = []  # (free tokens, micro-batch), ascending
    for index in sorted(sequences, key=lambda i: (-lengths[i], i)):
        length = lengths[index]
        if length > capacity:
            raise ValueError(
                f"train.micro_batch_tokens: {micro_batch_tokens} is too small for sequence {index} "
                f"of {length} tokens; give at least {-(-length // multiple) * multiple}"
            )
        place = bisect_left(space, (length, 0))
        if place == len(space):
            free, target = capacity, len(packed)
            packed.append([])
        else:
            free, target = space.pop(place)
        packed[target].append(index)
        insort(space, (free - length, target))
    return [tuple(sorted(micro_batch)) for micro_batch in packed]


def plan(
    lengths: Tensor | Sequence[int],
    world_size: int,
    micro_batch_tokens: int,
    multiple: int = 1,
    teachers: Tensor | None = None,
) -> list[list[tuple[int, ...]]]:
    """Plan which sequences every data-parallel rank runs, in which micro-batches.

    Invariants:
        1. every sequence of length > 0 is in exactly one micro-batch of one rank, no other is;
        2. no micro-batch exceeds `micro_batch_tokens`, its padding to `multiple` included;
        3. every rank has the same number of micro-batches, at least one: pipeline schedules and
           gradient reductions need equal counts;
        4. the ranks' token totals differ by at most the longest sequence;
        5. a micro-batch is empty only on a rank that has fewer sequences than micro-batches;
        6. the same arguments give the same plan, everywhere;
        7. the sequences of a micro-batch have one teacher, and on every rank those of one teacher
           come before those of the next.

    Args:
        lengths: [N] tokens to run of each sequence (`WantedRows`).
        world_size: data-parallel size.
        multiple: what the token count of a micro-batch is padded to.
        teachers: [N] int64, the teacher of each sequence; None: all have the same.

    Returns:
        For each rank, its micro-batches: tuples of ascending sequence indices.

    Raises:
        ValueError: a sequence is longer than a micro-batch.
    """
    lengths = torch.as_tensor(lengths).tolist()
    wanted = [index for index, length in enumerate(lengths) if length > 0]
    of_teacher = [0] * len(lengths) if teachers is None else teachers.tolist()
    ranks = []
    for part in balance([lengths[i] for i in wanted], world_size):
        own = sorted((wanted[i] for i in part), key=of_teacher.__getitem__)
        ranks.append(
            [
                micro_batch
                for _, group in groupby(own, key=of_teacher.__getitem__)
                for micro_batch in pack(lengths, [*group], micro_batch_tokens, multiple)
            ]
        )
    count = max(1, *map(len, ranks))
    return [_split(micro_batches, lengths, count) for micro_batches in ranks]


def _split(
    micro_batches: list[tuple[int, ...]], lengths: Sequence[int], count: int
) -> list[tuple[int, ...]]:
    """Split the largest micro-batches in two until there are `count`; then add empty ones."""
    micro_batches = list(micro_batches)
    while len(micro_batches) < count:
        divisible = [m for m in micro_batches if len(m) > 1]
        if not divisible:
            micro_batches.append(())
            continue
        largest = max(divisible, key=lambda m: sum(lengths[i] for i in m))
        halves = balance([lengths[i] for i in largest], 2)
        place = micro_batches.index(largest)
        micro_batches[place : place + 1] = [tuple(largest[i] for i in half) for half in halves]
    return micro_batches


@dataclass(frozen=True)
class MicroBatch:
    """Sequences packed end to end, and the response rows wanted of them.

    Attributes:
        tokens: [T] int64, T a multiple of what was asked for (and > 0); padding is 0.
        position_ids: [T] int64, from 0 in every segment.
        sequences: the sequences of the batch that it holds, ascending.
        cu_seqlens: [S+1] int32, always on the host: where the segments start, the last entry T.
            Padding is a segment of its own, the last one, so that no sequence attends to it.
        max_seqlen: the longest segment, padding included.
        rows: [r] int64, packed positions of the wanted rows, in canonical order.
        row_ids: [r] int64, always on the host: where these rows stand in the batch-wide [R]
            vectors.
        targets: [r] int64, the token after each row: the response token that it predicts.
        teacher: the number of its sequences' teacher; of padding alone any that the batch has.
    """

    tokens: Tensor
    position_ids: Tensor
    sequences: tuple[int, ...]
    cu_seqlens: Tensor
    max_seqlen: int
    rows: Tensor
    row_ids: Tensor
    targets: Tensor
    teacher: int = 0

    def to(self, device: torch.device | str) -> MicroBatch:
        """Return it with what a model reads on the device, without waiting for it."""
        names = "tokens", "position_ids", "rows", "targets"
        tensors: dict[str, Any] = {name: to_device(getattr(self, name), device) for name in names}
        return replace(self, **tensors)


def build_micro_batch(
    batch: Sequences, sequences: Sequence[int], wanted: WantedRows, multiple: int = 1
) -> MicroBatch:
    """Pack the first `wanted.lengths[i]` tokens of each sequence i, with its wanted rows.

    Args:
        sequences: ascending sequence indices of one teacher, possibly none: then it is all padding,
            without rows.
        wanted: all rows for scoring, the kept ones for training; of sequences whose rows are not
            known here there are tokens, but no rows.
        multiple: the token count is padded to it (the tensor-parallel size under sequence
            parallelism).
    """
    assert all(a < b for a, b in pairwise(sequences)), "not ascending"
    first = sequences[0] if sequences else 0
    chosen = torch.tensor(sequences, dtype=torch.int64)
    lengths = wanted.lengths[chosen]
    num_tokens = int(lengths.sum())
    padding = -num_tokens % multiple if num_tokens else multiple
    segments = torch.cat([lengths, lengths.new_tensor([padding] if padding else [])])
    cu_seqlens = _starts(segments)
    sources = ranges(batch.cu_seqlens[chosen], lengths)
    tokens = torch.nn.functional.pad(batch.tokens[sources], (0, padding))

    row_ids = wanted.of(batch, chosen)
    segment = torch.searchsorted(chosen, batch.sequences_of(row_ids))
    positions = batch.positions_of(row_ids)
    assert (positions < lengths[segment]).all(), "a wanted row lies behind the cut"
    return MicroBatch(
        tokens=tokens,
        position_ids=ranges(torch.zeros_like(segments), segments),
        sequences=tuple(sequences),
        cu_seqlens=cu_seqlens.int(),
        max_seqlen=int(segments.max()),
        rows=cu_seqlens[segment] + positions,
        row_ids=row_ids,
        targets=batch.tokens[batch.cu_seqlens[chosen[segment]] + positions + 1],
        teacher=0 if batch.teachers is None else int(batch.teachers[first]),
    )


@dataclass(frozen=True)
class Assignment:
    """Who runs what in one pass of a model over the wanted rows of a batch.

    Attributes:
        lengths: [N] int64, tokens run of each sequence, 0 for those without a wanted row.
        owner: [N] int64, the data-parallel rank that runs each sequence (0 for those not run).
        micro_batches: those of this rank; every rank has equally many.
    """

    lengths: Tensor
    owner: Tensor
    micro_batches: list[MicroBatch]

    def sequences(self) -> Tensor:
        """[n] int64, ascending: the sequences that this rank runs."""
        return torch.tensor(sorted(i for m in self.micro_batches for i in m.sequences)).long()

    def most_rows(self, wanted: WantedRows) -> int:
        """Count the wanted rows of the micro-batch of this rank that has most."""
        return max(int(wanted.counts[list(m.sequences)].sum()) for m in self.micro_batches)


def deal(
    batch: Sequences,
    wanted: WantedRows,
    layout: Layout,
    micro_batch_tokens: int,
    rows_held: Tensor | None = None,
) -> tuple[Tensor, list[tuple[int, ...]]]:
    """Balance and pack the batch for a model's layout; the same plan on every rank.

    Args: those of `assign`.

    Returns:
        [N] int64, the data-parallel rank that runs each sequence (0 for those not run); and this
        rank's micro-batches, ascending sequence indices each.

    Raises:
        ValueError: a sequence is longer than a micro-batch.
    """
    multiple = _multiple(layout)
    ranks = plan(wanted.lengths, layout.dp, micro_batch_tokens, multiple, batch.teachers)
    if rows_held is not None:
        rows = batch.cu_rows.diff().tolist()
        sizes = [sum(rows[i] for packed in share for i in packed) for share in ranks]
        ranks = hand_out(ranks, sizes, rows_held.tolist())
    owner = torch.zeros_like(wanted.lengths)
    for rank, micro_batches in enumerate(ranks):
        owner[[sequence for packed in micro_batches for sequence in packed]] = rank
    return owner, ranks[layout.dp_rank]


def assign(
    batch: Sequences,
    wanted: WantedRows,
    layout: Layout,
    micro_batch_tokens: int,
    rows_held: Tensor | None = None,
) -> Assignment:
    """Balance and pack the batch for a model's layout, and build this rank's micro-batches.

    Args:
        wanted: rows; the same counts and lengths on every rank.
        micro_batch_tokens: the most tokens in a micro-batch.
        rows_held: [dp] int64, the rows that each data-parallel rank has from the parts of a batch
            before this one, all of whose rows it keeps: see `hand_out`.

    Raises:
        ValueError: a sequence is longer than a micro-batch.
    """
    owner, own = deal(batch, wanted, layout, micro_batch_tokens, rows_held)
    return build(batch, owner, own, wanted, layout)


def build(
    batch: Sequences,
    owner: Tensor,
    own: Sequence[tuple[int, ...]],
    wanted: WantedRows,
    layout: Layout,
) -> Assignment:
    """Build the micro-batches that `deal` has dealt to this rank."""
    multiple = _multiple(layout)
    micro_batches = [build_micro_batch(batch, packed, wanted, multiple) for packed in own]
    return Assignment(wanted.lengths, owner, micro_batches)


def _multiple(layout: Layout) -> int:
    """Return what the tokens of a micro-batch are padded to a multiple of."""
    return layout.tp if layout.sequence else 1


def hand_out(shares: list, sizes: Sequence[int], held: Sequence[int]) -> list:
    """Deal one share to each rank: the largest to the one that holds least, and so on.

    Every rank's work is a share of the same plan as before, and what the ranks hold afterwards
    differs by at most the larger of two numbers: by how much it differed before, and by how much
    the shares do. Ranks that hold equally much take the shares as they are numbered.

    Args:
        shares: one for each rank.
        sizes: of the shares, in rows.
        held: rows that each rank has already.

    Returns:
        The share of each rank.
    """
    if len(set(held)) <= 1:
        return shares
    emptiest_first = sorted(range(len(held)), key=lambda rank: (held[rank], rank))
    largest_first = sorted(range(len(sizes)), key=lambda share: (-sizes[share], share))
    taken = dict(zip(emptiest_first, largest_first, strict=True))
    return [shares[taken[rank]] for rank in range(len(held))]


def rows_by_rank(batch: Sequences, owner: Tensor, world_size: int) -> Tensor:
    """Count the response rows that each data-parallel rank runs: [world_size] int64.

    Args:
        owner: [N] int64, the rank of each sequence.
    """
    rows = torch.zeros(world_size, dtype=torch.int64)
    return rows.index_add_(0, owner, batch.cu_rows.diff())


def shorten(
    batch: Sequences, assigned: Assignment, wanted: WantedRows, layout: Layout
) -> tuple[Assignment, list[Tensor]]:
    """Cut an assignment's sequences after their last wanted row; nothing is re-packed.

    Args:
        assigned: of a pass over these sequences at no shorter lengths.

    Returns:
        The assignment, some of whose micro-batches may be padding only; and for each of its
        micro-batches [T'] int64, where each token stood in the longer one, −1 for padding.
    """
    lengths, micro_batches, places = wanted.lengths, [], []
    for longer in assigned.micro_batches:
        starts = dict(zip(longer.sequences, longer.cu_seqlens.tolist(), strict=False))
        sequences = [i for i in longer.sequences if lengths[i] > 0]
        shorter = build_micro_batch(batch, sequences, wanted, _multiple(layout))
        first = torch.tensor([starts[i] for i in sequences], dtype=torch.int64)
        place = ranges(first, lengths[sequences])
        padding = len(shorter.tokens) - len(place)
        places.append(torch.nn.functional.pad(place, (0, padding), value=-1))
        micro_batches.append(shorter)
    return Assignment(lengths, assigned.owner, micro_batches), places


def _starts(lengths: Tensor) -> Tensor:
    """Return [S+1] int64: where segments of these lengths [S] start and the last one ends."""
    return torch.nn.functional.pad(lengths.cumsum(0), (1, 0))
