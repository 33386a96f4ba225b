"""Invariants 1, 2 and 5: the whole step, over layouts, against dense float64."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from ranks import run_ranks
from step import dense_step, make_batch, make_model, step_on_ranks

SIZE = 200  # the student's vocabulary; the teacher has 216 tokens, of which these are common


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    root = tmp_path_factory.mktemp("pair")
    return (
        make_model(root / "student", SIZE, 32, layers=4, seed=0),
        make_model(root / "teacher", 216, 48, layers=4, seed=1, tied=False),
    )


@pytest.fixture(scope="module")
def oracle(pair):
    return dense_step(*pair, make_batch(SIZE), SIZE)


LAYOUTS = {  # world size, student (tp, pp, sequence), teacher
    "one rank": (1, (1, 1, False), (1, 1, False)),
    "TP2 | PP2": (2, (2, 1, False), (1, 2, False)),
    "TP2 SP | TP2 SP": (2, (2, 1, True), (2, 1, True)),
    "PP2 | TP2": (2, (1, 2, False), (2, 1, False)),
    "DP2 | DP2": (2, (1, 1, False), (1, 1, False)),
    "DP2 | PP2": (2, (1, 1, False), (1, 2, False)),
    "TP2 PP2 | TP1": (4, (2, 2, False), (1, 1, False)),
    "TP2 PP2 SP | PP4": (4, (2, 2, True), (1, 4, False)),
    "TP2 DP2 | PP2": (4, (2, 1, False), (1, 2, False)),
    "PP2 DP2 | TP4": (4, (1, 2, False), (4, 1, False)),
    "TP4 | TP2 PP2": (4, (4, 1, False), (2, 2, False)),
}


@pytest.mark.parametrize("name", LAYOUTS)
def test_step_agrees_with_dense_float64(pair, oracle, name):
    world_size, student, teacher = LAYOUTS[name]
    results = run_ranks(world_size, step_on_ranks, *pair, student, teacher, make_batch(SIZE), SIZE)
    for result in results:
        assert_agrees(result, oracle)


def assert_agrees(result, oracle):
    scores = result["scores"]
    fields = ("disagreement", "compatibility", "student_entropy", "teacher_entropy")
    for field, expected in zip(fields, oracle["scores"], strict=True):
        torch.testing.assert_close(
            getattr(scores, field).double(), expected, rtol=2e-4, atol=2e-5, msg=field
        )
    assert torch.equal(result["mask"], oracle["mask"])
    assert result["metrics"]["loss"] == pytest.approx(oracle["loss"], rel=1e-5)
    assert result["metrics"]["kept_rows"] == int(oracle["mask"].sum())
    assert relative_error(result["gradients"], oracle["gradients"]) < 1e-5
    # Clipping goes by this norm; shards must all be counted, and replicas once.
    assert result["grad_norm"] == pytest.approx(oracle["grad_norm"], rel=1e-5)


def relative_error(gradients, expected) -> float:
    """Worst over tensors of |g − e| / |e| in the Frobenius norm, and none missing."""
    assert gradients.keys() == expected.keys()
    return max(((gradients[n].double() - e).norm() / e.norm()).item() for n, e in expected.items())


@pytest.mark.parametrize("parallel", [(2, 1, False), (1, 2, False), (1, 1, False)])
def test_self_distillation_is_zero(pair, parallel):
    """Invariant 1: the teacher is the student, in another layout."""
    _, teacher = pair
    batch = make_batch(216)
    (result, _) = run_ranks(2, step_on_ranks, teacher, teacher, parallel, (1, 2, False), batch, 216)
    assert abs(result["metrics"]["loss"]) <= 1e-6
    assert max(g.abs().max().item() for g in result["gradients"].values()) <= 1e-6


@pytest.mark.parametrize(
    "change", [{"micro_batch_tokens": 20}, {"micro_batch_tokens": 400}, {"chunk_rows": 1000}]
)
def test_micro_batch_packing_and_chunks_change_nothing(pair, oracle, change):
    layout = ((2, 1, False), (1, 2, False))
    step = partial(step_on_ranks, **change)
    for result in run_ranks(2, step, *pair, *layout, make_batch(SIZE), SIZE):
        assert_agrees(result, oracle)
