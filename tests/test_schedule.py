"""Which batch is generated when, and what a run that resumes begins with."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from megatron_taopd.config.schema import RolloutSection
from megatron_taopd.data.prompts import PromptStream
from megatron_taopd.rollout.engine import Sampling
from megatron_taopd.rollout.mix import Mix
from megatron_taopd.rollout.schedule import RolloutSchedule
from megatron_taopd.step.extensions.horizon import Horizon

PROMPTS = [[i] for i in range(10)]


class Recorder:
    """Notes what it is asked for; its batches are there when asked for their result."""

    def __init__(self):
        self.log = []

    def submit(self, prompts, indices, step, sampling):
        self.log.append(("begin", step, indices, sampling.max_new_tokens))
        return SimpleNamespace(result=lambda: self.log.append(("end", step)))


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
        rollouts.run_ahead(step)
        rollouts.settle()
    assert rollouts.engine.log == [("begin", 1, [0, 1], 8), ("begin", 2, [2, 3], 8)]
    assert rollouts.consumed == 4


def test_ahead_the_next_batch_is_begun_before_this_one_trains_and_ends_before_weights_change():
    rollouts = schedule(ahead=1)
    for step in (1, 2):
        rollouts.take(step)
        rollouts.run_ahead(step)
        rollouts.settle()
    assert [entry[:2] for entry in rollouts.engine.log] == [
        ("begin", 1), ("begin", 2), ("end", 2), ("begin", 3), ("end", 3)
    ]  # fmt: skip


@pytest.mark.parametrize("ahead", [0, 1])
def test_a_run_that_resumes_goes_on_with_the_prompts_it_has_not_trained_on(ahead):
    rollouts = schedule(ahead)
    rollouts.take(1)
    rollouts.run_ahead(1)
    assert rollouts.consumed == 2
    resumed = schedule(ahead, consumed=rollouts.consumed)
    resumed.take(2)
    assert resumed.engine.log[0][:3] == ("begin", 2, [2, 3])


@pytest.mark.parametrize("ahead", [0, 1])
def test_an_interrupted_step_gives_its_prompts_back(ahead):
    rollouts = schedule(ahead)
    rollouts.take(1)
    rollouts.run_ahead(1)
    before = rollouts.consumed
    rollouts.take(2)
    rollouts.run_ahead(2)
    rollouts.rewind(before)
    assert (rollouts.consumed, rollouts.next) == (2, None)


@pytest.mark.parametrize("ahead", [0, 1])
def test_steps_that_take_more_prompts_are_given_back_and_resumed_as_well(ahead):
    """With a share of the data, and two samples, steps take 2, 3, 2, 3 prompts."""
    keys = {"samples": 2, "mix": {"dataset": 0.25}}
    rollouts = schedule(ahead, **keys)
    taken = []
    for step in (1, 2, 3):
        rollouts.take(step)
        rollouts.run_ahead(step)
        taken.append(rollouts.consumed)
        resumed = schedule(ahead, consumed=taken[-1], **keys)
        resumed.take(step + 1)
        resumed.run_ahead(step + 1)
        assert resumed.consumed == [5, 7, 10][step - 1]
    assert taken == [2, 5, 7]
    rollouts.rewind(5)
    assert (rollouts.consumed, rollouts.next) == (5, None)
