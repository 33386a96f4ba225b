"""Response tokens that are not valid, tool output say: they are read, and have no rows.

What a step makes of them is in test_step.py.
"""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from support import whole_batch

from megatron_taopd.data.vocab_map import VocabMap
from megatron_taopd.monitoring.samples import take
from megatron_taopd.rollout.engine import make_rollout_batch
from megatron_taopd.step.batch_scores import BatchScores
from megatron_taopd.step.distiller import Selection
from megatron_taopd.step.extensions.horizon import Horizon
from megatron_taopd.step.selection import SELECTORS, choose, look
from megatron_taopd.types import RolloutBatch, TokenScores, WantedRows

PROMPTS = [[1, 1], [1], [1, 1, 1]]
RESPONSES = [[2, 3, 4, 5], [6, 7], [8, 9, 2, 3, 4]]
VALID = [[True, False, True, False], [False, False], [False, True, True, True, False]]


def make_batch(valid=VALID) -> RolloutBatch:
    return make_rollout_batch(
        PROMPTS,
        [4, 5, 6],
        [torch.tensor(response) for response in RESPONSES],
        [-torch.tensor(response).float() for response in RESPONSES],
        [False] * 3,
        [torch.arange(len(response)) for response in RESPONSES],
        None if valid is None else [torch.tensor(own) for own in valid],
    )


def test_rows_are_those_of_valid_tokens():
    batch = make_batch()
    assert (batch.num_sequences, batch.num_rows) == (3, 5)
    assert batch.response_lengths.tolist() == [4, 2, 5]
    assert batch.cu_rows.tolist() == [0, 2, 2, 5]
    #       the position before tokens 2 and 4 of the first, and 9, 2, 3 of the third response
    assert batch.row_positions.tolist() == [1, 3, 3, 4, 5]
    assert batch.positions_of(torch.tensor([4, 1, 2])).tolist() == [5, 3, 3]
    assert batch.row_tokens().tolist() == [2, 4, 9, 2, 3]
    assert batch.response_tokens().tolist() == [token for own in RESPONSES for token in own]
    assert batch.log_probs.tolist() == [-2, -4, -9, -2, -3]
    assert batch.weight_versions.tolist() == [0, 2, 1, 2, 3]
    assert batch.row_sequences().tolist() == [0, 0, 2, 2, 2]
    assert batch.reach().tolist() == [4, 0, 6]  # what a pass has to run


def test_all_valid_is_as_none_was_said():
    batch, plain = make_batch([[True] * len(own) for own in RESPONSES]), make_batch(None)
    for name in ("cu_rows", "row_positions", "log_probs", "weight_versions"):
        assert torch.equal(getattr(batch, name), getattr(plain, name))
    assert torch.equal(batch.row_tokens(), plain.row_tokens())
    assert plain.cu_rows is plain.cu_responses  # nothing is counted


def test_another_tokenizers_rows_are_those_of_the_same_tokens():
    """Token 7 is spelled in three of the teacher's ids; nothing that is not valid is left out."""
    ids = torch.arange(100, 110)
    ids[7] = -1
    vocab_map = VocabMap(ids, {7: [200, 201, 202]})
    own = {4: [50], 5: [50, 51], 6: [50]}
    whole, _ = vocab_map.read(
        make_batch(None),
        own,
        100,
    )
    read, metrics = vocab_map.read(make_batch(), own, 100)
    assert torch.equal(read.tokens, whole.tokens) and metrics["teacher/shared_tokens"] == 10 / 11
    valid = torch.tensor([v for own in VALID for v in own])
    assert torch.equal(read.row_positions, whole.row_positions[valid])
    assert read.cu_rows.tolist() == [0, 2, 2, 5]


@pytest.fixture(scope="module")
def scores():
    generator = torch.Generator().manual_seed(0)
    return TokenScores(*torch.rand(4, 5, generator=generator).unbind())


@pytest.mark.parametrize("selector", [*SELECTORS])
def test_a_sequence_without_rows_changes_no_choice(scores, selector):
    """Quantiles, budget, ties and metrics are those of the other sequences alone."""
    found = [
        choose(selector, BatchScores.whole(scores, torch.tensor(cu_rows)), 0.5, seed=3)
        for cu_rows in ([0, 2, 2, 5], [0, 2, 5])
    ]
    assert torch.equal(*(choice.mask for choice in found))
    expected = whole_batch.select(selector, scores, 0.5, 3, cu_rows=torch.tensor([0, 2, 5]))
    assert torch.equal(found[0].mask, expected)
    if found[0].mask.any():
        assert look(found[0]).metrics == look(found[1]).metrics


def test_training_runs_up_to_the_last_kept_token(scores):
    batch = make_batch()
    choice = choose("full", BatchScores.whole(scores, batch.cu_rows), 1.0, seed=0)
    choice = replace(choice, mask=torch.tensor([True, False, True, True, False]))
    wanted = look(choice).wanted(batch, choice.mask.nonzero()[:, 0])
    known = WantedRows.known(batch, choice.mask.nonzero()[:, 0])
    # Prompts and what follows up to the row of tokens 2 and 2: [1 1] and [1 1 1 8 9].
    assert wanted.lengths.tolist() == known.lengths.tolist() == [2, 0, 5]
    assert wanted.counts.tolist() == known.counts.tolist() == [1, 0, 2]


def test_concentrating_leaves_sequences_without_rows_alone(scores):
    whole = [
        choose("teachability", BatchScores.whole(scores, torch.tensor(cu)), 0.2, 0, 0.4).mask
        for cu in ([0, 2, 2, 5], [0, 2, 5])
    ]
    assert torch.equal(*whole) and whole[0].sum() == 1


def test_a_horizon_learns_of_places_in_the_response():
    """Not of places among those that are valid: it is the response that it cuts."""
    horizon = Horizon("auto", 5, 1, 1.0)
    horizon.observe(make_batch(), torch.tensor([1.0, 2.0, 4.0, 8.0, 16.0]), 5)
    assert (3 * horizon.mass).tolist() == [1, 4, 2 + 8, 16, 0]
    assert (3 * horizon.reach).tolist() == [3, 3, 2, 2, 1]


class Digits:
    def decode(self, tokens, skip_special_tokens=False):
        return "".join(map(str, tokens.tolist()))


def test_a_report_shows_the_valid_tokens(scores):
    batch = make_batch()
    whole = BatchScores.whole(replace(scores, teacher_log_prob=torch.zeros(5)), batch.cu_rows)
    choice = choose("full", whole, 1.0, seed=0)
    kept = WantedRows.known(batch, torch.arange(5))
    seen = take(1, batch, Selection(choice, kept, {}), Digits(), 4)
    first, third = seen.responses
    assert first.tokens == ["2", "4"] and third.tokens == ["9", "2", "3"]
    assert first.scores["log_p"] == [-2, -4] and (first.length, third.length) == (2, 3)
    assert sorted(point[-1] for point in seen.points) == ["2", "2", "3", "4", "9"]
