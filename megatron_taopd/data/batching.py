"""Cut, drop, balance and pack: from the response rows that are wanted to equal work on every rank.

Planning works on lengths alone and is the same on every rank: no collectives. Tokens are only
touched in `build_micro_batch`. A sequence's *length* here is the number of its tokens that a pass
has to run, 0 for a sequence that the pass does not need.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Sequence
from dataclasses import dataclass, replace
from heapq import heapify, heappop, heappush
from itertools import groupby, pairwise
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from megatron_taopd.data.chunks import Chunks, Pieces, chunk_tokens
from megatron_taopd.parallel.copies import to_device
from megatron_taopd.parallel.packing import shared_multiple
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


def balance(
    costs: Sequence[int], parts: int, loads: Sequence[int] | None = None
) -> list[list[int]]:
    """Deal items into `parts` lists of near-equal total cost: longest first to the least loaded.

    Args:
        loads: what each part costs already; None: nothing.

    Returns:
        The item indices of each part, ascending; every index once. Totals differ by at most the
        largest cost. Equal costs go in index order, to the part that has fewest items and then the
        lowest number.
    """
    dealt: list[list[int]] = [[] for _ in range(parts)]
    heap = [(load, 0, part) for part, load in enumerate(loads or [0] * parts)]
    heapify(heap)
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
    cp: int = 1,
    teachers: Tensor | None = None,
) -> list[list[tuple[int, ...]]]:
    """Plan which sequences every data rank runs, in which micro-batches.

    A context-parallel group shares the tokens of a micro-batch. Sequences that fit the part of one
    rank are run by one rank, as by ranks of data parallelism. All of the group share longer ones,
    which come first, in micro-batches of their own.

    Invariants:
        1. every sequence of length > 0 is in exactly one micro-batch of one rank, or of each rank
           of one context-parallel group; no other is;
        2. no rank's part of a micro-batch exceeds `micro_batch_tokens` / cp, padding included;
        3. every rank has the same number of micro-batches, at least one: pipeline schedules and
           gradient reductions need equal counts;
        4. the ranks' token totals differ by at most the longest sequence;
        5. a micro-batch is empty only on a rank that has fewer sequences than micro-batches;
        6. the same arguments give the same plan, everywhere;
        7. the sequences of a micro-batch have one teacher, and on every rank those of one teacher
           come before those of the next, first of the shared ones, then of the others.

    Args:
        lengths: [N] tokens to run of each sequence (`WantedRows`).
        world_size: data-parallel size.
        multiple: what the token count of a micro-batch is padded to.
        cp: context-parallel size.
        teachers: [N] int64, the teacher of each sequence; None: all have the same.

    Returns:
        For each data rank, its micro-batches: tuples of ascending sequence indices.

    Raises:
        ValueError: a sequence is longer than a micro-batch.
    """
    lengths = torch.as_tensor(lengths)
    of_teacher = (torch.zeros_like(lengths) if teachers is None else teachers).tolist()
    long = splits(lengths, micro_batch_tokens, multiple, cp).tolist()
    padded = (chunk_tokens(lengths, cp) * 2 * cp).tolist()
    lengths = lengths.tolist()

    def packed(costs: list[int], part: list[int], tokens: int, multiple: int):
        """Pack the sequences of one teacher after those of another."""
        own = sorted(part, key=of_teacher.__getitem__)
        groups = groupby(own, key=of_teacher.__getitem__)
        return [each for _, group in groups for each in pack(costs, [*group], tokens, multiple)]

    shared = _deal_out([i for i, is_long in enumerate(long) if is_long], padded, world_size)
    shared_packs = [
        packed(padded, part, micro_batch_tokens, shared_multiple(multiple, cp)) for part in shared
    ]
    loads = [sum(padded[i] for i in part) // cp for part in shared for _ in range(cp)]
    wanted = [i for i, length in enumerate(lengths) if length > 0 and not long[i]]
    whole = _deal_out(wanted, lengths, world_size * cp, loads)
    whole_packs = [packed(lengths, part, micro_batch_tokens // cp, multiple) for part in whole]
    before = [shared_packs[rank // cp] for rank in range(world_size * cp)]
    count = max(1, *(len(a) + len(b) for a, b in zip(before, whole_packs, strict=True)))
    return [
        group + _split(own, lengths, count - len(group))
        for group, own in zip(before, whole_packs, strict=True)
    ]


def splits(lengths: Tensor, micro_batch_tokens: int, multiple: int, cp: int) -> Tensor:
    """Mark, [N] bool, the sequences that the ranks of a context-parallel group share.

    They are those that do not fit the part of one rank: keys and values of the others need not be
    sent to anyone.
    """
    if cp == 1:
        return torch.zeros_like(lengths, dtype=torch.bool)
    return lengths > micro_batch_tokens // cp // multiple * multiple


def _deal_out(
    sequences: list[int], costs: Sequence[int], parts: int, loads: Sequence[int] | None = None
) -> list[list[int]]:
    dealt = balance([costs[i] for i in sequences], parts, loads)
    return [[sequences[i] for i in part] for part in dealt]


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
        pieces: of sequences that a context-parallel group shares: all above but `sequences`,
            `cu_seqlens` and `max_seqlen` is of this rank's chunks; None where it has all of them.
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
    pieces: Pieces | None = None

    def to(self, device: torch.device | str) -> MicroBatch:
        """Return it with what a model reads on the device, without waiting for it."""
        names = "tokens", "position_ids", "rows", "targets"
        tensors: dict[str, Any] = {name: to_device(getattr(self, name), device) for name in names}
        return replace(self, **tensors)


def build_micro_batch(
    batch: Sequences,
    sequences: Sequence[int],
    wanted: WantedRows,
    multiple: int = 1,
    each: int = 1,
) -> MicroBatch:
    """Pack the first `wanted.lengths[i]` tokens of each sequence i, with its wanted rows.

    Args:
        sequences: ascending sequence indices of one teacher, possibly none: then it is all padding,
            without rows.
        wanted: all rows for scoring, the kept ones for training; of sequences whose rows are not
            known here there are tokens, but no rows.
        multiple: the token count is padded to it (the tensor-parallel size under sequence
            parallelism).
        each: every sequence is padded to it at its end, and `multiple` is one of it.
    """
    assert all(a < b for a, b in pairwise(sequences)), "not ascending"
    first = sequences[0] if sequences else 0
    chosen = torch.tensor(sequences, dtype=torch.int64)
    lengths = wanted.lengths[chosen]
    padded = -(-lengths // each) * each
    num_tokens = int(padded.sum())
    padding = -num_tokens % multiple if num_tokens else multiple
    segments = torch.cat([padded, lengths.new_tensor([padding] if padding else [])])
    cu_seqlens = _starts(segments)
    tokens = batch.tokens.new_zeros(num_tokens + padding)
    places = ranges(cu_seqlens[: len(lengths)], lengths)
    tokens[places] = batch.tokens[ranges(batch.cu_seqlens[chosen], lengths)]

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


def share(whole: MicroBatch, cp: int, rank: int) -> MicroBatch:
    """Return what a rank of a context-parallel group has of a micro-batch.

    Args:
        whole: all segments of which are multiples of 2·cp.
    """
    chunks = Chunks(whole.cu_seqlens.long().diff(), cp)
    tokens = chunks.of(rank)
    place = torch.full_like(whole.tokens, -1)
    place[tokens] = torch.arange(len(tokens))
    rows = place[whole.rows]
    return replace(
        whole,
        tokens=whole.tokens[tokens],
        position_ids=whole.position_ids[tokens],
        rows=rows[rows >= 0],
        row_ids=whole.row_ids[rows >= 0],
        targets=whole.targets[rows >= 0],
        pieces=chunks.pieces(rank),
    )


@dataclass(frozen=True)
class Placement:
    """Which rank runs which tokens in one pass of a model over a batch; the same on every rank.

    Attributes:
        lengths: [N] int64, tokens run of each sequence, 0 for those without a wanted row.
        owner: [N] int64, the data rank that runs each sequence (0 for those not run); of a shared
            one the first of its context-parallel group.
        shared: [N] bool, the sequences that a context-parallel group shares, in chunks.
        cp: ranks of such a group.
    """

    lengths: Tensor
    owner: Tensor
    shared: Tensor
    cp: int

    def runs(self, batch: Sequences) -> tuple[Tensor, Tensor]:
        """Cut all rows of the batch into runs of one rank each.

        Returns:
            [p] int64, the row that each starts with, ascending; [p] int64, the data rank that has
            it.
        """
        if not self.shared.any():
            return batch.cu_rows[:-1], self.owner
        chunks = torch.where(self.shared, 2 * self.cp, 1)
        sequence = torch.arange(len(chunks)).repeat_interleave(chunks)
        chunk = ranges(torch.zeros_like(chunks), chunks)
        lengths = self.lengths[sequence]
        first = batch.cu_seqlens[sequence] + chunk * chunk_tokens(lengths, self.cp)
        rows = torch.arange(batch.num_rows)
        starts = torch.searchsorted(
            batch.cu_seqlens[batch.row_sequences()] + batch.positions_of(rows), first
        )
        own = self.shared[sequence] * torch.minimum(chunk, 2 * self.cp - 1 - chunk)
        return starts, self.owner[sequence] + own

    def tokens_by_rank(self, data_ranks: int) -> Tensor:
        """Count the tokens that each data rank runs: [data_ranks] int64."""
        tokens = torch.zeros(data_ranks, dtype=torch.int64)
        whole, shared = (~self.shared).nonzero()[:, 0], self.shared.nonzero()[:, 0]
        tokens.index_add_(0, self.owner[whole], self.lengths[whole])
        parts = 2 * chunk_tokens(self.lengths[shared], self.cp)
        for rank in range(self.cp):
            tokens.index_add_(0, self.owner[shared] + rank, parts)
        return tokens


@dataclass(frozen=True)
class Assignment(Placement):
    """Who runs what, and what this rank runs.

    Attributes:
        micro_batches: those of this rank; every rank has equally many.
    """

    micro_batches: list[MicroBatch]

    def sequences(self) -> Tensor:
        """[n] int64, ascending: the sequences that this rank runs, or a part of."""
        return torch.tensor(sorted(i for m in self.micro_batches for i in m.sequences)).long()

    def most_rows(self, wanted: WantedRows) -> int:
        """Count the wanted rows of the micro-batch of this rank that has most.

        Of a shared one it has, about, its part.
        """
        counts = [int(wanted.counts[list(m.sequences)].sum()) for m in self.micro_batches]
        return max(
            -(-count // self.cp) if m.pieces else count
            for m, count in zip(self.micro_batches, counts, strict=True)
        )


def deal(
    batch: Sequences,
    wanted: WantedRows,
    layout: Layout,
    micro_batch_tokens: int,
    rows_held: Tensor | None = None,
) -> tuple[Placement, list[tuple[int, ...]]]:
    """Balance and pack the batch for a model's layout; the same plan on every rank.

    Args: those of `assign`.

    Returns:
        Who runs which sequence; and this rank's micro-batches, ascending sequence indices each.

    Raises:
        ValueError: a sequence is longer than a micro-batch.
    """
    cp, multiple = layout.cp, _multiple(layout)
    ranks = plan(wanted.lengths, layout.dp, micro_batch_tokens, multiple, cp, batch.teachers)
    if rows_held is not None:
        rows = batch.cu_rows.diff().tolist()
        groups = [ranks[i : i + cp] for i in range(0, len(ranks), cp)]
        run = [{i for share in group for packed in share for i in packed} for group in groups]
        sizes = [sum(rows[i] for i in sequences) for sequences in run]
        ranks = [share for g in hand_out(groups, sizes, rows_held.tolist()) for share in g]
    owner = torch.zeros_like(wanted.lengths)
    for rank in reversed(range(len(ranks))):  # so that the first of a group has what it shares
        owner[[sequence for packed in ranks[rank] for sequence in packed]] = rank
    shared = splits(wanted.lengths, micro_batch_tokens, multiple, cp)
    return Placement(wanted.lengths, owner, shared, cp), ranks[layout.data_rank]


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
    placement, own = deal(batch, wanted, layout, micro_batch_tokens, rows_held)
    return build(batch, placement, own, wanted, layout)


def build(
    batch: Sequences,
    placement: Placement,
    own: Sequence[tuple[int, ...]],
    wanted: WantedRows,
    layout: Layout,
) -> Assignment:
    """Build the micro-batches that `deal` has dealt to this rank."""
    micro_batches = [
        _build(batch, packed, wanted, layout, any(placement.shared[list(packed)])) for packed in own
    ]
    return Assignment(**vars(placement), micro_batches=micro_batches)


def _build(
    batch: Sequences, packed: Sequence[int], wanted: WantedRows, layout: Layout, shared: bool
) -> MicroBatch:
    """Build a micro-batch of this rank, or its part of one that its group shares."""
    if not shared:
        return build_micro_batch(batch, packed, wanted, _multiple(layout))
    multiple = shared_multiple(_multiple(layout), layout.cp)
    whole = build_micro_batch(batch, packed, wanted, multiple, 2 * layout.cp)
    return share(whole, layout.cp, layout.cp_rank)


def _multiple(layout: Layout) -> int:
    """Return what the tokens of a rank's micro-batch are padded to a multiple of."""
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

    What is left of a sequence that a context-parallel group shares is cut into chunks anew.

    Args:
        assigned: of a pass over these sequences at no shorter lengths.

    Returns:
        The assignment, some of whose micro-batches may be padding only; and for each of its
        micro-batches [T'] int64, where each token stood in the longer one, −1 for padding. Tokens
        of a shared one are counted through all ranks of the group, one rank after another.
    """
    lengths, micro_batches, places = wanted.lengths, [], []
    for longer in assigned.micro_batches:
        starts = dict(zip(longer.sequences, longer.cu_seqlens.tolist(), strict=False))
        sequences = [i for i in longer.sequences if lengths[i] > 0]
        shorter = _build(batch, sequences, wanted, layout, longer.pieces is not None)
        first = torch.tensor([starts[i] for i in sequences], dtype=torch.int64)
        place = torch.full((int(shorter.cu_seqlens[-1]),), -1)
        own = ranges(shorter.cu_seqlens[: len(first)].long(), lengths[sequences])
        place[own] = ranges(first, lengths[sequences])
        if longer.pieces is not None:
            before, after = (
                Chunks(m.cu_seqlens.long().diff(), layout.cp) for m in (longer, shorter)
            )
            place[own] = before.places()[place[own]]
            place = place[after.of(layout.cp_rank)]
        places.append(place)
        micro_batches.append(shorter)
    return replace(assigned, lengths=lengths, micro_batches=micro_batches), places


def _starts(lengths: Tensor) -> Tensor:
    """Return [S+1] int64: where segments of these lengths [S] start and the last one ends."""
    return torch.nn.functional.pad(lengths.cumsum(0), (1, 0))
