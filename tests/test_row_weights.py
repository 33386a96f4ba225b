"""How much a kept row counts, by the accumulated discrepancy before it."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support import dense
from support.ranks_of_threads import on_threads
from test_horizon import make_batch

from megatron_taopd.data.batching import split_mini_batches
from megatron_taopd.step.batch_scores import BatchScores, HeldRows
from megatron_taopd.step.extensions.row_weights import RowWeights, discrepancy_weights
from megatron_taopd.types import TokenScores, WantedRows


def scores_of(student, teacher) -> TokenScores:
    nothing = torch.zeros_like(student)
    return TokenScores(*[nothing] * 4, student_log_prob=student, teacher_log_prob=teacher)


def random_log_probs(rows: int, seed: int = 0):
    generator = torch.Generator().manual_seed(seed)
    student, teacher = -5 * torch.rand(2, rows, generator=generator)
    unknown = torch.rand(rows, generator=generator) < 0.1
    return (log_p.masked_fill(unknown, -torch.inf) for log_p in (student, teacher))


def test_by_hand():
    """d = 1, 3, 0, 4 and, of a second response, nothing at all."""
    student = torch.tensor([-1.0, -5.0, -2.0, -1.0, -3.0, -0.5])
    teacher = torch.tensor([-2.0, -2.0, -2.0, -5.0, -3.0, -0.5])
    whole = BatchScores.whole(scores_of(student, teacher), torch.tensor([0, 4, 6]))
    wanted = [1.5, 1.5 - 0.5 / 8, 1.25, 1.25, 1.5, 1.5]
    assert discrepancy_weights(whole, 0.5).tolist() == wanted


def test_a_token_that_one_model_lacks_adds_nothing():
    student = torch.tensor([-1.0, -torch.inf, -1.0])
    teacher = torch.tensor([-2.0, -torch.inf, -2.0])
    whole = BatchScores.whole(scores_of(student, teacher))
    assert discrepancy_weights(whole, 1.0).tolist() == [2.0, 1.5, 1.5]


@settings(max_examples=30, deadline=None)
@given(
    lengths=st.lists(st.integers(1, 30), min_size=1, max_size=6),
    owner=st.lists(st.integers(0, 2), min_size=6, max_size=6),
    seed=st.integers(0, 99),
)
def test_every_rank_learns_the_weights_of_all_kept_rows(lengths, owner, seed):
    batch, owner = make_batch(lengths), torch.tensor(owner[: len(lengths)])
    student, teacher = random_log_probs(batch.num_rows, seed)
    exact = dense.discrepancy_weights(student, teacher, lengths, 0.7)
    mask = torch.rand(batch.num_rows, generator=torch.Generator().manual_seed(seed)) < 0.4
    everything = WantedRows.known(batch, mask.nonzero()[:, 0])

    def told(rank, group):
        held = HeldRows(batch.cu_rows, (owner == rank).nonzero()[:, 0], group)
        ids = held.ids()
        own = BatchScores(scores_of(student[ids], teacher[ids]), held)
        kept = replace(everything, ids=ids[mask[ids]])
        return RowWeights.by_discrepancy(own, batch, kept, 0.7)

    for weights in on_threads(3, told):
        torch.testing.assert_close(weights.values.double(), exact[mask], rtol=1e-6, atol=0)
        assert weights.mean == pytest.approx(exact[mask].mean().item() if mask.any() else 1)
        for sequence in range(len(lengths)):
            rows = slice(*batch.cu_rows[sequence : sequence + 2].tolist())
            torch.testing.assert_close(
                weights.of([sequence]).double(), exact[rows][mask[rows]], rtol=1e-6, atol=0
            )


def test_each_optimizer_step_has_a_mean_of_its_own():
    batch = make_batch([3, 8, 5, 12])
    student, teacher = random_log_probs(batch.num_rows)
    whole = BatchScores.whole(scores_of(student, teacher), batch.cu_rows)
    mask = torch.arange(batch.num_rows) % 3 != 1
    kept = WantedRows.known(batch, mask.nonzero()[:, 0])
    weights = RowWeights.by_discrepancy(whole, batch, kept, 2.0)
    exact = discrepancy_weights(whole, 2.0)
    for part in split_mini_batches(batch, kept, 2):
        sequences = (part.counts > 0).nonzero()[:, 0].tolist()
        of_part = exact[part.ids]
        scaled = weights.within(part).of(sequences)
        torch.testing.assert_close(scaled, of_part / of_part.mean())
        assert 0 < len(sequences) < 4
