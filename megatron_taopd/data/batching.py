"""Cut, drop, balance and pack: from a mask over response rows to equal work on every rank.

Planning works on lengths alone and is the same on every rank: no collectives. Tokens are only
touched in `build_micro_batch`. A sequence's *length* here is the number of its tokens that a pass
has to run, 0 for a sequence that the pass does not need.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Sequence
from dataclasses import dataclass, replace
from heapq import heappop, heappush
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from megatron_taopd.parallel.copies import to_device
from megatron_taopd.types import RolloutBatch, Sequences

if TYPE_CHECKING:
    from megatron_taopd.parallel.layout import Layout


def cut_lengths(batch: Sequences, mask: Tensor) -> Tensor:
    """Return [N] int64: how many tokens of each sequence a pass runs to reach its last wanted row.

    A row at position t sees the tokens 0 … t, so its sequence runs t+1 of them; a sequence without
    a wanted row is dropped (0). With a mask that keeps everything that is all but the last token of
    each sequence, which predicts nothing that was generated: the lengths of the scoring pass.

    Args:
        mask: [R] bool, the wanted rows.
    """
    rows = mask.to(batch.tokens.device).nonzero().squeeze(1)
    needed = batch.row_positions[rows] + 1
    lengths = torch.zeros_like(batch.lengths)
    return lengths.scatter_reduce_(0, batch.row_sequences()[rows], needed, "amax")


def split_mini_batches(batch: RolloutBatch, mask: Tensor, n: int) -> list[Tensor]:
    """Deal the sequences into n groups of near-equal kept rows, for n optimizer steps per batch.

    Selection stays batch-wide: this only says which kept rows belong to which step.

    Args:
        mask: [R] bool, the kept rows.

    Returns:
        n masks [R] bool that partition `mask`, whole sequences each, in deterministic order. Their
        kept counts differ by at most the largest count of one sequence. A mask is empty only if
        fewer than n sequences have kept rows.
    """
    mask = mask.to(batch.tokens.device)
    sequence_of_row = batch.row_sequences()
    kept = torch.bincount(sequence_of_row[mask], minlength=batch.num_sequences)
    group = torch.empty_like(batch.prompt_lengths)
    for index, sequences in enumerate(balance(kept.tolist(), n)):
        group[sequences] = index
    return [mask & (group[sequence_of_row] == index) for index in range(n)]


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
    lengths: Tensor | Sequence[int], world_size: int, micro_batch_tokens: int, multiple: int = 1
) -> list[list[tuple[int, ...]]]:
    """Plan which sequences every data-parallel rank runs, in which micro-batches.

    Invariants:
        1. every sequence of length > 0 is in exactly one micro-batch of one rank, no other is;
        2. no micro-batch exceeds `micro_batch_tokens`, its padding to `multiple` included;
        3. every rank has the same number of micro-batches, at least one: pipeline schedules and
           gradient reductions need equal counts;
        4. the ranks' token totals differ by at most the longest sequence;
        5. a micro-batch is empty only on a rank that has fewer sequences than micro-batches;
        6. the same arguments give the same plan, everywhere.

    Args:
        lengths: [N] tokens to run of each sequence (`cut_lengths`).
        world_size: data-parallel size.
        multiple: what the token count of a micro-batch is padded to.

    Returns:
        For each rank, its micro-batches: tuples of ascending sequence indices.

    Raises:
        ValueError: a sequence is longer than a micro-batch.
    """
    lengths = torch.as_tensor(lengths).tolist()
    wanted = [index for index, length in enumerate(lengths) if length > 0]
    ranks = [
        pack(lengths, [wanted[i] for i in part], micro_batch_tokens, multiple)
        for part in balance([lengths[i] for i in wanted], world_size)
    ]
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
    """

    tokens: Tensor
    position_ids: Tensor
    sequences: tuple[int, ...]
    cu_seqlens: Tensor
    max_seqlen: int
    rows: Tensor
    row_ids: Tensor
    targets: Tensor

    def to(self, device: torch.device | str) -> MicroBatch:
        """Return it with what a model reads on the device, without waiting for it."""
        names = "tokens", "position_ids", "rows", "targets"
        tensors: dict[str, Any] = {name: to_device(getattr(self, name), device) for name in names}
        return replace(self, **tensors)


def build_micro_batch(
    batch: Sequences,
    sequences: Sequence[int],
    lengths: Tensor,
    mask: Tensor,
    multiple: int = 1,
) -> MicroBatch:
    """Pack the first `lengths[i]` tokens of each sequence i, with its wanted rows.

    Args:
        sequences: ascending sequence indices, possibly none: then it is all padding, without rows.
        lengths: [N] int64, tokens to run of each sequence (`cut_lengths` of the mask, or more).
        mask: [R] bool, the wanted rows; all True for scoring, the kept rows for training.
        multiple: the token count is padded to it (the tensor-parallel size under sequence
            parallelism).
    """
    assert all(a < b for a, b in pairwise(sequences)), "not ascending"
    chosen = torch.tensor(sequences, dtype=torch.int64)
    kept = lengths[chosen]
    num_tokens = int(kept.sum())
    padding = -num_tokens % multiple if num_tokens else multiple
    segments = torch.cat([kept, kept.new_tensor([padding] if padding else [])])
    cu_seqlens = _starts(segments)
    segment = torch.repeat_interleave(segments)
    position_ids = torch.arange(len(segment)) - cu_seqlens[segment]

    sources = batch.cu_seqlens[chosen][segment[:num_tokens]] + position_ids[:num_tokens]
    tokens = torch.nn.functional.pad(batch.tokens[sources], (0, padding))

    counts = batch.cu_rows.diff()[chosen]
    owner = torch.repeat_interleave(counts)
    offset = torch.arange(len(owner)) - _starts(counts)[owner]
    row_ids = batch.cu_rows[chosen][owner] + offset
    wanted = mask.to(row_ids.device)[row_ids]
    owner, row_ids = owner[wanted], row_ids[wanted]
    positions = batch.row_positions[row_ids]
    assert (positions < kept[owner]).all(), "a wanted row lies behind the cut"
    return MicroBatch(
        tokens=tokens,
        position_ids=position_ids,
        sequences=tuple(sequences),
        cu_seqlens=cu_seqlens.int(),
        max_seqlen=int(segments.max()),
        rows=cu_seqlens[owner] + positions,
        row_ids=row_ids,
        targets=batch.tokens[batch.cu_seqlens[chosen][owner] + positions + 1],
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


def assign(
    batch: Sequences,
    mask: Tensor,
    layout: Layout,
    micro_batch_tokens: int,
    rows_held: Tensor | None = None,
) -> Assignment:
    """Cut, drop, balance and pack the batch for a model's layout; the same plan on every rank.

    Args:
        mask: [R] bool, the wanted rows.
        micro_batch_tokens: the most tokens in a micro-batch.
        rows_held: [dp] int64, the rows that each data-parallel rank has from the parts of a batch
            before this one, all of whose rows it keeps: see `hand_out`.

    Raises:
        ValueError: a sequence is longer than a micro-batch.
    """
    lengths = cut_lengths(batch, mask)
    multiple = layout.tp if layout.sequence else 1
    ranks = plan(lengths, layout.dp, micro_batch_tokens, multiple)
    if rows_held is not None:
        rows = batch.cu_rows.diff().tolist()
        sizes = [sum(rows[i] for packed in share for i in packed) for share in ranks]
        ranks = hand_out(ranks, sizes, rows_held.tolist())
    owner = torch.zeros_like(lengths)
    for rank, micro_batches in enumerate(ranks):
        owner[[sequence for packed in micro_batches for sequence in packed]] = rank
    own = [
        build_micro_batch(batch, sequences, lengths, mask, multiple)
        for sequences in ranks[layout.dp_rank]
    ]
    return Assignment(lengths, owner, own)


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
    batch: Sequences, assigned: Assignment, mask: Tensor, layout: Layout
) -> tuple[Assignment, list[Tensor]]:
    """Cut an assignment's sequences after their last wanted row; nothing is re-packed.

    Args:
        assigned: of a pass over these sequences at no shorter lengths.
        mask: [R] bool, the wanted rows.

    Returns:
        The assignment, some of whose micro-batches may be padding only; and for each of its
        micro-batches [T'] int64, where each token stood in the longer one, −1 for padding.
    """
    lengths = cut_lengths(batch, mask)
    multiple = layout.tp if layout.sequence else 1
    micro_batches, places = [], []
    for longer in assigned.micro_batches:
        starts = dict(zip(longer.sequences, longer.cu_seqlens.tolist(), strict=False))
        sequences = [i for i in longer.sequences if lengths[i] > 0]
        shorter = build_micro_batch(batch, sequences, lengths, mask, multiple)
        segments = [torch.arange(int(lengths[i])) + starts[i] for i in sequences]
        place = torch.cat([*segments, torch.empty(0, dtype=torch.int64)])
        padding = len(shorter.tokens) - len(place)
        places.append(torch.nn.functional.pad(place, (0, padding), value=-1))
        micro_batches.append(shorter)
    return Assignment(lengths, assigned.owner, micro_batches), places


def _starts(lengths: Tensor) -> Tensor:
    """Return [S+1] int64: where segments of these lengths [S] start and the last one ends."""
    return torch.nn.functional.pad(lengths.cumsum(0), (1, 0))
