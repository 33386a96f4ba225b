"""The length at which responses stop being worth their tokens."""

from __future__ import annotations

import pytest
import torch
from support.ranks_of_threads import on_threads

from megatron_taopd.config.schema import RolloutSection
from megatron_taopd.step.batch_scores import HeldRows
from megatron_taopd.step.extensions.horizon import PROBE_EVERY, Horizon
from megatron_taopd.types import RolloutBatch


def make_batch(responses: list[int], prompt: int = 10) -> RolloutBatch:
    lengths = torch.tensor(responses)
    return RolloutBatch(
        tokens=torch.zeros(int(lengths.sum()) + prompt * len(lengths), dtype=torch.int64),
        cu_seqlens=torch.nn.functional.pad((lengths + prompt).cumsum(0), (1, 0)),
        prompt_lengths=torch.full_like(lengths, prompt),
        log_probs=torch.zeros(int(lengths.sum())),
        truncated=torch.zeros(len(lengths), dtype=torch.bool),
        prompts=torch.arange(len(lengths)),
        weight_versions=torch.zeros(int(lengths.sum()), dtype=torch.int64),
    )


def falling(batch: RolloutBatch, scale: float) -> torch.Tensor:
    """Mass that falls exponentially along each response."""
    places = torch.arange(batch.num_rows) - batch.cu_rows[batch.row_sequences()]
    return (-places / scale).exp()


def test_none_and_a_number_do_not_look():
    batch = make_batch([20, 100])
    for setting, length in (("none", 100), (30, 30), (500, 100)):
        horizon = Horizon(setting, 100, 16, 1.0)
        assert horizon.length(1) == length
        assert horizon.observe(batch, falling(batch, 10), length) == {"rollout/horizon": length}
        assert horizon.length(2) == length


@pytest.mark.parametrize(
    ("growth", "lengths"),
    [
        ("linear", [10, 30, 50, 70, 90, 90, 90]),
        ("geometric", [10, 17, 30, 52, 90, 90, 90]),  # 10·9^(i/4)
    ],
)
def test_it_grows_with_the_number_of_the_step(growth, lengths):
    """From the first step on, whatever was seen before; and has nothing to remember."""
    mapping = {"start": 10, "end": 90, "steps": 5, "growth": growth}
    section = RolloutSection(horizon=mapping, max_new_tokens=100)
    horizon, batch = Horizon.of(section), make_batch([20, 100])
    assert [horizon.length(step) for step in range(1, 8)] == lengths
    assert horizon.observe(batch, falling(batch, 10), 30) == {"rollout/horizon": 30}
    resumed = Horizon.of(section)
    resumed.load(horizon.state())
    assert [resumed.length(step) for step in (3, 2, 6)] == [lengths[2], lengths[1], 90]


def test_it_grows_linearly_unless_told_otherwise():
    horizon = Horizon.of(RolloutSection(horizon={"start": 1, "end": 5, "steps": 2}))
    assert [horizon.length(step) for step in (1, 2, 3)] == [1, 5, 5]


def test_auto_stops_where_the_next_token_yields_what_the_average_one_has():
    batch, horizon = make_batch([100] * 4), Horizon("auto", 100, 5, 1.0)
    assert horizon.length(1) == 100  # nothing is known yet
    metrics = horizon.observe(batch, falling(batch, 20), 100)
    assert metrics == {
        "rollout/horizon": 100, "rollout/horizon_mass": 1, "rollout/horizon_tokens": 1,
    }  # fmt: skip
    best = horizon.length(2)
    mass = (-torch.arange(100) / 20).exp()
    average = mass[:best].sum() / (10 + best)
    assert mass[best] < average < mass[best - 2]
    assert best < 40


def test_even_mass_pays_to_the_end_and_the_floor_holds():
    batch = make_batch([100] * 4)
    even, early = Horizon("auto", 100, 5, 1.0), Horizon("auto", 100, 30, 1.0)
    even.observe(batch, torch.ones(400), 100)
    early.observe(batch, falling(batch, 1), 100)
    assert even.length(2) == 100
    assert early.length(2) == 30


def test_cheap_prompts_make_shorter_responses():
    batch = make_batch([100] * 4, prompt=50)
    lengths = []
    for weight in (0.1, 1.0):
        horizon = Horizon("auto", 100, 1, weight)
        horizon.observe(batch, falling(batch, 20), 100)
        lengths.append(horizon.length(2))
    assert lengths[0] < lengths[1]


def test_responses_are_generated_in_full_now_and_then():
    """What lies behind the horizon is believed until it is looked at again."""
    horizon = Horizon("auto", 100, 5, 1.0)
    full, short = make_batch([100] * 4), make_batch([20] * 4)
    horizon.observe(full, falling(full, 20), 100)
    late = horizon.mass[50:].clone()
    horizon.observe(short, falling(short, 20), 20)
    assert torch.equal(horizon.mass[50:], late)
    lengths = [horizon.length(step) for step in range(2, 2 * PROBE_EVERY + 2)]
    assert lengths.count(100) == 2


def test_the_metrics_say_what_is_given_up():
    horizon = Horizon("auto", 100, 5, 1.0)
    full, short = make_batch([100] * 4), make_batch([20] * 4)
    horizon.observe(full, falling(full, 20), 100)
    metrics = horizon.observe(short, falling(short, 20), 20)
    mass = (-torch.arange(100) / 20).exp()
    assert metrics["rollout/horizon_mass"] == pytest.approx((mass[:20].sum() / mass.sum()).item())
    assert metrics["rollout/horizon_tokens"] == pytest.approx(30 / 110)


@pytest.mark.parametrize("owner", [[0, 1, 0, 1], [1, 1, 1, 1]])
def test_ranks_learn_the_same_from_their_own_responses(owner):
    batch = make_batch([20, 100, 60, 1])
    teachability, alone = falling(batch, 20), Horizon("auto", 100, 5, 1.0)
    said = alone.observe(batch, teachability, 100)

    def learned(rank, group):
        held = HeldRows(batch.cu_rows, (torch.tensor(owner) == rank).nonzero()[:, 0], group)
        horizon = Horizon("auto", 100, 5, 1.0)
        return horizon, horizon.observe(batch, teachability[held.ids()], 100, held)

    for horizon, metrics in on_threads(2, learned):
        assert metrics == pytest.approx(said)
        assert torch.equal(horizon.reach, alone.reach)
        torch.testing.assert_close(horizon.mass, alone.mass, rtol=1e-12, atol=0)
    # By hand: 100 tokens in one response of four, 20 in two, the first one in all.
    assert alone.reach[[0, 1, 19, 20, 60, 99]].tolist() == [1, 0.75, 0.75, 0.5, 0.25, 0.25]


def test_it_goes_on_where_it_was():
    batch = make_batch([100] * 4)
    first, second = Horizon("auto", 100, 5, 1.0), Horizon("auto", 100, 5, 1.0)
    first.observe(batch, falling(batch, 20), 100)
    second.load(first.state())
    for horizon in (first, second):
        horizon.observe(batch, falling(batch, 10), 100)
    assert first.length(3) == second.length(3)
    assert torch.equal(first.mass, second.mass)
