from collections import Counter
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_taopd.data.batching import (
    assign,
    balance,
    build_micro_batch,
    pack,
    plan,
    shorten,
    split_mini_batches,
)
from megatron_taopd.types import RolloutBatch, WantedRows


def rollouts(shapes: list[tuple[int, int]]) -> RolloutBatch:
    """Sequences of (prompt, response) tokens; token j of sequence i is 1000·(i+1) + j."""
    lengths = [p + r for p, r in shapes]
    rows = sum(r for _, r in shapes)
    return RolloutBatch(
        tokens=torch.cat([1000 * (i + 1) + torch.arange(n) for i, n in enumerate(lengths)]),
        cu_seqlens=torch.tensor([0, *lengths]).cumsum(0),
        prompt_lengths=torch.tensor([p for p, _ in shapes]),
        log_probs=torch.zeros(rows),
        truncated=torch.zeros(len(shapes), dtype=torch.bool),
        prompts=torch.arange(len(shapes)),
        weight_versions=torch.zeros(rows, dtype=torch.int64),
    )


def mask_of(batch: RolloutBatch, *rows: int) -> torch.Tensor:
    mask = torch.zeros(batch.num_rows, dtype=torch.bool)
    mask[list(rows)] = True
    return mask


def known(batch, mask):
    return WantedRows.known(batch, mask.nonzero()[:, 0])


shapes = st.lists(st.tuples(st.integers(1, 20), st.integers(1, 30)), min_size=1, max_size=30)
many_lengths = st.lists(st.integers(0, 100), max_size=60)


@st.composite
def masked_batches(draw):
    batch = rollouts(draw(shapes))
    keep = draw(st.sampled_from([0.0, 0.1, 0.5, 1.0]))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 1000)))
    return batch, torch.rand(batch.num_rows, generator=generator) < keep


# Cutting


def test_a_sequence_is_cut_after_its_last_kept_row():
    """Prompts of 3, responses of 4: rows stand at positions 2, 3, 4, 5."""
    batch = rollouts([(3, 4), (3, 4), (3, 4)])
    # Sequence 0 keeps its first and third row, 1 none, 2 its last one.
    assert known(batch, mask_of(batch, 0, 2, 11)).lengths.tolist() == [5, 0, 6]


def test_scoring_runs_all_but_the_last_token():
    batch = rollouts([(3, 4), (1, 1)])
    for everything in (WantedRows.all(batch), known(batch, torch.ones(5, dtype=torch.bool))):
        assert everything.lengths.tolist() == [6, 1] and everything.counts.tolist() == [4, 1]


@given(masked_batches())
def test_cuts_reach_every_wanted_row_and_no_further(case):
    batch, mask = case
    last = [0] * batch.num_sequences
    for row in mask.nonzero().flatten().tolist():
        sequence = int(batch.row_sequences()[row])
        position = int(batch.prompt_lengths[sequence]) - 1 + row - int(batch.cu_rows[sequence])
        last[sequence] = max(last[sequence], position + 1)
    wanted = known(batch, mask)
    assert wanted.lengths.tolist() == last
    counts = batch.row_sequences()[mask].bincount(minlength=batch.num_sequences)
    assert torch.equal(wanted.counts, counts)


# Balancing and packing


@given(many_lengths, st.integers(1, 9))
def test_balance_deals_everything_within_the_largest_cost(costs, parts):
    dealt = balance(costs, parts)
    assert len(dealt) == parts
    assert sorted(i for part in dealt for i in part) == list(range(len(costs)))
    totals = [sum(costs[i] for i in part) for part in dealt]
    assert max(totals) - min(totals) <= max(costs, default=0)


def test_balance_of_equal_costs_deals_equal_counts_in_order():
    assert balance([5] * 6, 3) == [[0, 3], [1, 4], [2, 5]]
    assert balance([0] * 4, 2) == [[0, 2], [1, 3]]


def test_packing_fills_micro_batches():
    lengths = [60, 50, 40, 30, 20]
    assert pack(lengths, range(5), 100) == [(0, 2), (1, 3, 4)]


@pytest.mark.parametrize("length", [103, 101])
def test_a_sequence_longer_than_a_micro_batch_is_refused(length):
    """102 tokens hold a padded length of 100, the last multiple of 4."""
    message = (
        rf"^train\.micro_batch_tokens: 102 is too small for sequence 1 of {length} tokens; "
        r"give at least 104$"
    )
    with pytest.raises(ValueError, match=message):
        plan([10, length], world_size=2, micro_batch_tokens=102, multiple=4)


def test_the_limit_includes_the_padding():
    """50 + 50 tokens fit 101, but padded to a multiple of 8 they would be 104."""
    assert plan([50, 50], 1, 101, multiple=1) == [[(0, 1)]]
    assert plan([50, 50], 1, 101, multiple=8) == [[(0,), (1,)]]


@given(
    lengths=many_lengths,
    world_size=st.integers(1, 8),
    limit=st.integers(104, 400),
    multiple=st.sampled_from([1, 2, 4, 8]),
)
def test_the_invariants_of_a_plan(lengths, world_size, limit, multiple):
    ranks = plan(lengths, world_size, limit, multiple)
    assert len(ranks) == world_size
    micro_batches = [m for rank in ranks for m in rank]

    # 1: every sequence of length > 0 exactly once
    planned = Counter(i for m in micro_batches for i in m)
    assert planned == Counter(i for i, n in enumerate(lengths) if n > 0)
    # 2: within the limit, padding included
    for m in micro_batches:
        assert -(-sum(lengths[i] for i in m) // multiple) * multiple <= limit
    # 3: the same number of micro-batches everywhere, at least one
    assert len({len(rank) for rank in ranks}) == 1 and ranks[0]
    # 4: balanced tokens
    totals = [sum(lengths[i] for m in rank for i in m) for rank in ranks]
    assert max(totals) - min(totals) <= max(lengths, default=0)
    # 5: empty ones only where there is nothing to split
    for rank in ranks:
        if () in rank:
            assert all(len(m) <= 1 for m in rank)
    # 6: deterministic, and every rank can compute it from a tensor as well
    assert plan(torch.tensor(lengths, dtype=torch.int64), world_size, limit, multiple) == ranks
    assert all(list(m) == sorted(m) for m in micro_batches)


def test_a_micro_batch_is_split_rather_than_left_empty():
    """Rank 0 gets 70 + 20 and needs two micro-batches; rank 1's 40 + 30 would fit in one."""
    ranks = plan([70, 40, 30, 20], world_size=2, micro_batch_tokens=80)
    assert ranks == [[(0,), (3,)], [(1,), (2,)]]


def test_fewer_sequences_than_ranks_leave_fillers():
    assert plan([0, 7, 0], world_size=3, micro_batch_tokens=8) == [[(1,)], [()], [()]]


def test_nothing_to_run_is_one_filler_for_each_rank():
    assert plan([0, 0], world_size=2, micro_batch_tokens=8) == [[()], [()]]
    assert plan([], world_size=2, micro_batch_tokens=8) == [[()], [()]]


# Mini-batches


@given(masked_batches(), st.integers(1, 6))
def test_mini_batches_partition_the_kept_rows_by_sequence(case, n):
    batch, mask = case
    dealt = split_mini_batches(batch, known(batch, mask), n)
    assert len(dealt) == n
    parts = [torch.zeros_like(mask).index_fill_(0, part.ids, True) for part in dealt]
    for part, rows in zip(parts, dealt, strict=True):
        assert torch.equal(rows.lengths, known(batch, part).lengths)
        assert torch.equal(rows.counts, known(batch, part).counts)
    assert torch.equal(torch.stack(parts).sum(0), mask.long())
    sequences = [set(batch.row_sequences()[part].tolist()) for part in parts]
    assert sum(map(len, sequences)) == len(set().union(*sequences))  # no sequence in two of them
    counts = [int(part.sum()) for part in parts]
    largest = torch.bincount(batch.row_sequences()[mask], minlength=1).max()
    assert max(counts) - min(counts) <= largest
    assert min(counts) > 0 or len(set().union(*sequences)) < n


def test_one_mini_batch_is_the_whole_mask():
    batch = rollouts([(2, 5), (3, 4)])
    mask = mask_of(batch, 1, 3, 8)
    (only,) = split_mini_batches(batch, known(batch, mask), 1)
    assert only.ids.tolist() == [1, 3, 8]


# Building


def test_a_packed_micro_batch():
    """Sequence 0 cut to 4 tokens, sequence 2 to 3, padded to a multiple of 4."""
    batch = rollouts([(2, 4), (1, 3), (3, 2)])
    mask = mask_of(batch, 0, 2, 7)  # positions 1 and 3 of sequence 0, position 2 of sequence 2
    micro_batch = build_micro_batch(batch, (0, 2), known(batch, mask), multiple=4)
    assert micro_batch.tokens.tolist() == [1000, 1001, 1002, 1003, 3000, 3001, 3002, 0]
    assert micro_batch.position_ids.tolist() == [0, 1, 2, 3, 0, 1, 2, 0]
    assert micro_batch.cu_seqlens.tolist() == [0, 4, 7, 8]
    assert micro_batch.cu_seqlens.dtype == torch.int32
    assert micro_batch.max_seqlen == 4
    assert micro_batch.rows.tolist() == [1, 3, 6]
    assert micro_batch.row_ids.tolist() == [0, 2, 7]
    assert micro_batch.targets.tolist() == [1002, 1004, 3003]


@pytest.mark.parametrize("multiple", [1, 4])
def test_an_empty_micro_batch_is_one_segment_of_padding(multiple):
    batch = rollouts([(2, 4)])
    micro_batch = build_micro_batch(batch, (), WantedRows.all(batch), multiple)
    assert micro_batch.tokens.tolist() == [0] * multiple
    assert micro_batch.position_ids.tolist() == [*range(multiple)]
    assert micro_batch.cu_seqlens.tolist() == [0, multiple]
    assert micro_batch.max_seqlen == multiple
    for name in ("rows", "row_ids", "targets"):
        value = getattr(micro_batch, name)
        assert value.shape == (0,) and value.dtype == torch.int64


def test_a_wanted_row_behind_the_cut_is_a_mistake():
    batch = rollouts([(2, 4)])
    with pytest.raises(AssertionError, match="behind the cut"):
        build_micro_batch(batch, (0,), replace(WantedRows.all(batch), lengths=torch.tensor([3])))


@settings(max_examples=50)
@given(masked_batches(), st.integers(1, 4), st.sampled_from([1, 2, 8]), st.booleans())
def test_together_the_micro_batches_are_the_batch(case, world_size, multiple, cut):
    """Every wanted row once, at a place where the packed tokens are its own context."""
    batch, mask = case
    wanted = known(batch, mask)
    wanted = wanted if cut else replace(wanted, lengths=batch.lengths)
    lengths, seen = wanted.lengths, []
    for rank in plan(lengths, world_size, 64, multiple):
        for sequences in rank:
            m = build_micro_batch(batch, sequences, wanted, multiple)
            assert len(m.tokens) % multiple == 0 and 0 < len(m.tokens) <= 64
            starts, sizes = m.cu_seqlens[:-1].long(), m.cu_seqlens.diff()
            assert m.cu_seqlens[-1] == len(m.tokens) and m.max_seqlen == sizes.max()
            assert len(sizes) - len(sequences) in (0, 1)  # padding is its own segment
            assert (m.position_ids[starts] == 0).all()
            for start, size, sequence in zip(starts, sizes, sequences, strict=False):
                assert size == lengths[sequence]
                segment = m.tokens[start : start + size]
                assert torch.equal(segment, batch.sequence(sequence)[:size])
            for row, row_id, target in zip(m.rows, m.row_ids, m.targets, strict=True):
                # Tokens are numbered: the row's own token, then the one it predicts.
                assert m.tokens[row] + 1 == target == batch.response_tokens()[row_id]
                assert m.position_ids[row] == batch.row_positions[row_id]
            assert (m.row_ids.diff() > 0).all()
            seen += m.row_ids.tolist()
    assert sorted(seen) == mask.nonzero().flatten().tolist()


def test_a_micro_batch_moves_as_a_whole():
    batch = rollouts([(2, 4)])
    everything = replace(WantedRows.all(batch), lengths=batch.lengths)
    moved = build_micro_batch(batch, (0,), everything).to("meta")
    assert moved.tokens.is_meta and moved.targets.is_meta and moved.max_seqlen == 6


# All of it


@given(masked_batches(), st.integers(1, 4), st.booleans())
def test_the_ranks_of_a_layout_share_the_wanted_rows(case, dp, sequence_parallel):
    batch, mask = case
    layouts = [
        SimpleNamespace(dp=dp, data_rank=r, tp=4, cp=1, sequence=sequence_parallel)
        for r in range(dp)
    ]
    assigned = [
        assign(batch, known(batch, mask), layout, micro_batch_tokens=64) for layout in layouts
    ]
    assert len({len(a.micro_batches) for a in assigned}) == 1
    for rank, a in enumerate(assigned):
        assert torch.equal(a.owner, assigned[0].owner)
        assert torch.equal(a.lengths, known(batch, mask).lengths)
        ids = torch.cat([m.row_ids for m in a.micro_batches])
        assert (a.owner[batch.row_sequences()[ids]] == rank).all()
        assert a.most_rows(known(batch, mask)) == max(len(m.rows) for m in a.micro_batches)
        assert a.sequences().tolist() == sorted(i for m in a.micro_batches for i in m.sequences)
        assert not sequence_parallel or all(len(m.tokens) % 4 == 0 for m in a.micro_batches)
    ids = torch.cat([m.row_ids for a in assigned for m in a.micro_batches])
    assert torch.equal(ids.sort().values, mask.nonzero().flatten())


@pytest.mark.parametrize("world_size", [2, 8, 16])
def test_cut_sequences_are_balanced_within_five_percent(world_size):
    """32 sequences a rank, of 100 to 4,000 tokens, one in ten dropped."""
    generator = torch.Generator().manual_seed(0)
    lengths = torch.randint(100, 4000, (32 * world_size,), generator=generator)
    lengths[::10] = 0
    ranks = plan(lengths, world_size, 8192)
    totals = [sum(int(lengths[i]) for packed in rank for i in packed) for rank in ranks]
    assert max(totals) <= 1.05 * min(totals)
    assert len({len(rank) for rank in ranks}) == 1


@given(masked_batches(), st.integers(1, 3), st.booleans())
def test_a_shortened_assignment_knows_where_its_tokens_stood(case, dp, sequence_parallel):
    batch, mask = case
    everything = WantedRows.all(batch)
    for rank in range(dp):
        layout = SimpleNamespace(dp=dp, data_rank=rank, tp=4, cp=1, sequence=sequence_parallel)
        longer = assign(batch, everything, layout, micro_batch_tokens=64)
        shorter, places = shorten(batch, longer, known(batch, mask), layout)
        assert torch.equal(shorter.lengths, known(batch, mask).lengths)
        assert torch.equal(shorter.owner, longer.owner)
        pairs = zip(longer.micro_batches, shorter.micro_batches, places, strict=True)
        for before, after, place in pairs:
            real = place >= 0
            assert torch.equal(after.tokens[real], before.tokens[place[real]])
            assert torch.equal(after.position_ids[real], before.position_ids[place[real]])
            assert (after.tokens[~real] == 0).all()
            assert len(after.tokens) == len(place)
            wanted = before.row_ids[mask[before.row_ids]]
            assert torch.equal(after.row_ids, wanted)
