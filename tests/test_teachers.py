"""Several teachers: one step over layouts against dense float64, and what it costs."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import pytest
import torch
from support.ranks import run_ranks
from support.several_teachers import Taught, dense_step_of_several, step_of_several
from support.step import assert_gradients, make_batch, make_model

from megatron_taopd.data.vocab_map import VocabMap

SIZE = 200  # the student's vocabulary
FIELDS = ("disagreement", "compatibility", "student_entropy", "teacher_entropy")
OTHER_IDS = torch.randperm(216, generator=torch.Generator().manual_seed(5))
# Another tokenizer: other ids, seven of the student's without a counterpart, which are spelled out.
OTHER = VocabMap(
    OTHER_IDS[:SIZE].index_fill(0, torch.tensor([0, 7, 99, 100, 123, 198, 199]), -1),
    {7: [3, 4], 99: [5], 100: [6, 7, 8], 123: [9, 10], 198: [11], 199: [12, 12, 12, 12]},
    stand_in=[13],
)
BATCH = make_batch(SIZE, num_sequences=15)
OF_PROMPT = torch.arange(15) % 3  # taught by math, code and served in turn
PROMPTS = [
    [17 * i % 216, *range(i % 5)] if i % 3 == 1 else BATCH.sequence(i)[:n].tolist()
    for i, n in enumerate(BATCH.prompt_lengths.tolist())
]


@pytest.fixture(scope="module")
def student(tmp_path_factory):
    path = tmp_path_factory.mktemp("student")
    return make_model(path, SIZE, 32, layers=4, seed=0)


@pytest.fixture(scope="module")
def teachers(tmp_path_factory):
    """Of three sizes: one in a layout of its own, one with another tokenizer, one served."""
    root = tmp_path_factory.mktemp("teachers")
    same = VocabMap(torch.arange(SIZE))
    return {
        "math": Taught(make_model(root / "math", 216, 48, 4, seed=1, tied=False), (1, 2), same),
        "code": Taught(make_model(root / "code", 216, 64, 2, seed=2, tied=False), (2, 1), OTHER),
        "served": Taught(make_model(root / "served", 208, 40, 2, seed=3), None, same),
    }


@pytest.fixture(scope="module")
def oracle(student, teachers):
    return dense_step_of_several(student, teachers, BATCH, PROMPTS, OF_PROMPT)


def assert_agrees(result, oracle, names):
    for field, expected in zip(FIELDS, oracle["scores"], strict=True):
        found = getattr(result["scores"], field).double()
        torch.testing.assert_close(found, expected, rtol=2e-4, atol=2e-5, msg=field)
    assert torch.equal(result["mask"], oracle["mask"])
    assert result["metrics"]["loss"] == pytest.approx(oracle["loss"], rel=1e-5)
    assert_gradients(result["gradients"], oracle["gradients"], oracle["rounding"])
    for name, expected in zip(names, oracle["of"], strict=True):
        for key, value in expected.items():
            found = result["metrics"][f"teacher/{name}/{key}"]
            assert found == pytest.approx(value, rel=2e-4), (name, key)


LAYOUTS = {"TP2": (2, (2, 1, False)), "PP2": (2, (1, 2, False)), "DP2": (2, (1, 1, False)),
           "TP2 SP": (2, (2, 1, True)), "TP2 PP2": (4, (2, 2, False))}  # fmt: skip


@pytest.mark.parametrize("name", LAYOUTS)
def test_a_step_of_three_teachers_agrees_with_dense_float64(student, teachers, oracle, name):
    """Selection, and the mean of the loss, are over the rows of all of them."""
    ranks, parallel = LAYOUTS[name]
    for result in run_ranks(
        ranks, step_of_several, student, parallel, teachers, BATCH, PROMPTS, OF_PROMPT
    ):
        assert_agrees(result, oracle, teachers)


@pytest.mark.parametrize("name", ["TP2", "DP2"])
def test_a_budget_within_each_teachers_rows(student, teachers, oracle, name):
    expected = dense_step_of_several(student, teachers, BATCH, PROMPTS, OF_PROMPT, "teacher")
    assert not torch.equal(expected["mask"], oracle["mask"])
    ranks, parallel = LAYOUTS[name]
    step = partial(step_of_several, scope="teacher")
    for result in run_ranks(ranks, step, student, parallel, teachers, BATCH, PROMPTS, OF_PROMPT):
        assert_agrees(result, expected, teachers)


@pytest.mark.parametrize("name", ["TP2", "DP2"])
def test_a_replay_of_three_teachers_agrees_with_dense_float64(student, teachers, oracle, name):
    ranks, parallel = LAYOUTS[name]
    step = partial(step_of_several, replay=True)
    for result in run_ranks(ranks, step, student, parallel, teachers, BATCH, PROMPTS, OF_PROMPT):
        assert_agrees(result, oracle, teachers)


def test_offloaded_trunks_take_turns(student, teachers, oracle):
    """The largest first, when the fewest rows have been read; never two on the device."""
    offloaded = {
        name: replace(each, offload=True) if each.parallel else each
        for name, each in teachers.items()
    }
    step = partial(step_of_several, look=order_of_turns)
    for result in run_ranks(2, step, student, (1, 1), offloaded, BATCH, PROMPTS, OF_PROMPT):
        assert_agrees(result, oracle, teachers)
        assert result["look"] == [0, 1]


def order_of_turns(distiller, _lesson):
    return distiller.teachers.in_turn
