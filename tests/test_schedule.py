"""Which batch is generated when, and what a run that resumes begins with."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from megatron_taopd.config.schema import Growth, RolloutSection
from megatron_taopd.data.prompts import PromptStream
from megatron_taopd.rollout.engine import Sampling
from megatron_taopd.rollout.mix import Mix
from megatron_taopd.rollout.schedule import RolloutSchedule
from megatron_taopd.step.extensions.horizon import Horizon

PROMPTS = [[i] for i in range(10)]


class Recorder:
    """Notes what it is asked for."""

    def __init__(self):
        self.log = []

    def submit(self, prompts, indices, step, sampling):
        self.log.append((step, indices, sampling.max_new_tokens))
        return SimpleNamespace(step=step)


def schedule(ahead, consumed=0, horizon=32, **keys):
    prompts = SimpleNamespace(token_ids=PROMPTS, references=[[5]] * len(PROMPTS), valid=None)
    mix = Mix(RolloutSection(prompts=2, **keys), prompts, seed=0)
    stream = PromptStream(len(PROMPTS), shuffle=False, consumed=consumed)
    sampling = Sampling(max_new_tokens=32)
    rule = Horizon(horizon, longest=32, floor=1, prompt_weight=0.5)
    return RolloutSchedule(Recorder(), mix, stream, sampling, rule, ahead)


def test_on_policy_a_batch_is_generated_in_its_step():
    rollouts = schedule(ahead=0, horizon=8)
    for step in (1, 2):
        assert rollouts.take(step).length == 8
    assert rollouts.engine.log == [(1, [0, 1], 8), (2, [2, 3], 8)]
    assert rollouts.consumed == 4


@pytest.mark.parametrize("ahead", [1, 2, 3])
def test_ahead_so_many_batches_are_begun_when_a_step_takes_its_own(ahead):
    rollouts = schedule(ahead, horizon=Growth(3, 9, 4))
    for step in (1, 2):
        begun = rollouts.take(step)
        assert begun.step == begun.pending.step == step
        assert [number for number, *_ in rollouts.engine.log] == [*range(1, step + ahead + 1)]
        assert rollouts.consumed == 2 * step
    lengths = [length for *_, length in rollouts.engine.log]
    assert lengths == [3, 5, 7, 9, 9][: 2 + ahead]  # of the step that trains on it


@pytest.mark.parametrize("ahead", [0, 1, 2])
def test_a_run_that_resumes_goes_on_with_the_prompts_it_has_not_trained_on(ahead):
    rollouts = schedule(ahead)
    rollouts.take(1)
    assert rollouts.consumed == 2 and rollouts.state() == {}
    resumed = schedule(ahead, consumed=rollouts.consumed)
    resumed.take(2)
    assert resumed.engine.log[0][:2] == (2, [2, 3])


@pytest.mark.parametrize("ahead", [0, 1, 2])
def test_an_interrupted_step_gives_its_prompts_back(ahead):
    for steps, given_back in (([1, 2], 2), ([1], 2), ([1, 2], 3)):
        rollouts = schedule(ahead)
        for step in steps:
            rollouts.take(step)
        rollouts.give_back(given_back)
        assert rollouts.consumed == 2 * len(steps) - 2 * (given_back in steps)
        assert rollouts.stream.consumed == rollouts.consumed


@pytest.mark.parametrize("ahead", [0, 1, 2])
def test_steps_that_take_more_prompts_are_given_back_and_resumed_as_well(ahead):
    """With a share of the data, and two samples, steps take 2, 3, 2, 3 prompts."""
    keys = {"samples": 2, "mix": {"dataset": 0.25}}
    rollouts = schedule(ahead, **keys)
    taken = []
    for step in (1, 2, 3):
        rollouts.take(step)
        taken.append(rollouts.consumed)
        resumed = schedule(ahead, consumed=taken[-1], **keys)
        resumed.take(step + 1)
        assert resumed.consumed == [5, 7, 10][step - 1]
    assert taken == [2, 5, 7]
    rollouts.give_back(3)
    assert rollouts.consumed == rollouts.stream.consumed == 5
