"""Invariants 1, 2 and 5: the whole step, over layouts, against dense float64."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import pytest
import torch
from safetensors.torch import load_file
from support import dense
from support.ranks import run_ranks
from support.step import (
    OPTIMIZER,
    assert_gradients,
    dense_gradients,
    dense_step,
    make_batch,
    make_model,
    make_pair,
    row_logits,
    step_on_ranks,
    with_invalid_tokens,
)

from megatron_taopd.config.schema import LossSection
from megatron_taopd.parallel.memory import peak_memory

FIELDS = (
    "disagreement",
    "compatibility",
    "student_entropy",
    "teacher_entropy",
    "teacher_log_prob",  # of the sampled tokens
)
SIZE = 200  # the student's vocabulary; the teacher has 216 tokens, of which these are common


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    return make_pair(tmp_path_factory.mktemp("pair"))


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


@pytest.mark.parametrize("replay", [False, True])
@pytest.mark.parametrize("weights", ["none", "discrepancy"])
def test_tokens_that_are_not_valid_have_no_part_in_the_step(pair, weights, replay):
    """Not in scores, selection, budget, loss or weights; those behind the last are not trained."""
    batch, loss = with_invalid_tokens(make_batch(SIZE)), {"weights": weights}
    oracle = dense_step(*pair, batch, SIZE, loss=loss)
    assert 0.3 < len(oracle["mask"]) / len(batch.response_tokens()) < 0.7
    names = ["DP2 | DP2"] if replay else ["TP2 | PP2", "TP2 PP2 SP | PP4", "TP2 DP2 | PP2"]
    step = partial(step_on_ranks, loss=loss, replay=replay)
    for name in names:
        world_size, *layout = LAYOUTS[name]
        for result in run_ranks(world_size, step, *pair, *layout, batch, SIZE):
            assert_agrees(result, oracle)
            assert result["metrics"]["tokens_trained"] == tokens_to_the_last(batch, oracle["mask"])


@pytest.mark.parametrize("replay", [False, True])
def test_the_loss_of_references_is_told_and_nothing_else_changes(pair, oracle, replay):
    """Half of the sequences are the data's; some micro-batches have one source, some both."""
    references = torch.arange(12) % 4 < 2
    batch = replace(make_batch(SIZE), references=references)
    losses = dense.divergence(*(z.detach() for z in row_logits(*pair, batch, SIZE)[:2]))
    theirs = oracle["mask"] & references[batch.row_sequences()]
    assert 0 < theirs.sum() < oracle["mask"].sum()
    added = (losses[theirs].sum() / oracle["mask"].sum()).item()
    step = partial(step_on_ranks, replay=replay)
    for name in ["DP2 | DP2"] if replay else ["TP2 | PP2", "TP2 PP2 SP | PP4", "TP2 DP2 | PP2"]:
        world_size, *layout = LAYOUTS[name]
        for result in run_ranks(world_size, step, *pair, *layout, batch, SIZE):
            assert_agrees(result, oracle)
            assert result["metrics"]["loss_of_references"] == pytest.approx(added, rel=1e-5)


def tokens_to_the_last(batch, mask) -> int:
    """Tokens of all sequences up to the row of the last token kept of each, that one included."""
    kept = torch.zeros_like(batch.valid)
    kept[batch.valid.nonzero()[:, 0][mask]] = True
    responses = zip(
        kept.split(batch.response_lengths.tolist()), batch.prompt_lengths.tolist(), strict=True
    )
    return sum(p + int(own.nonzero().max()) for own, p in responses if own.any())


def assert_agrees(result, oracle):
    scores = result["scores"]
    for field, expected in zip(FIELDS, oracle["scores"], strict=True):
        torch.testing.assert_close(
            getattr(scores, field).double(), expected, rtol=2e-4, atol=2e-5, msg=field
        )
    assert torch.equal(result["mask"], oracle["mask"])
    assert result["metrics"]["loss"] == pytest.approx(oracle["loss"], rel=1e-5)
    assert result["metrics"]["kept_rows"] == int(oracle["mask"].sum())
    assert_gradients(result["gradients"], oracle["gradients"], oracle["rounding"])
    # Clipping goes by this norm; shards must all be counted, and replicas once.
    assert result["grad_norm"] == pytest.approx(oracle["grad_norm"], rel=1e-5)


@pytest.mark.parametrize("name", ["TP2 | PP2", "PP2 | TP2", "TP2 DP2 | PP2"])
def test_an_untied_student_agrees_with_dense_float64(tmp_path, pair, name):
    student = make_model(tmp_path, SIZE, 32, layers=4, seed=0, tied=False)
    world_size, *layout = LAYOUTS[name]
    batch = make_batch(SIZE)
    oracle = dense_step(student, pair[1], batch, SIZE)
    for result in run_ranks(world_size, step_on_ranks, student, pair[1], *layout, batch, SIZE):
        assert_agrees(result, oracle)


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("name", ["DP2 | DP2", "PP2 DP2 | TP4"])
def test_gradients_are_complete_when_their_reduction_begins(tmp_path, pair, name, tied):
    """It overlaps the backward pass; every parameter reports once a micro-batch, the head, whose
    gradient autograd does not carry, too."""
    student = make_model(tmp_path, SIZE, 32, layers=4, seed=0, tied=tied)
    world_size, *layout = LAYOUTS[name]
    batch = make_batch(SIZE)
    oracle = dense_step(student, pair[1], batch, SIZE)
    for result in run_ranks(world_size, step_on_ranks, student, pair[1], *layout, batch, SIZE):
        assert_agrees(result, oracle)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("parallel", [(1, 1, False), (2, 1, True), (1, 2, False)])
def test_training_makes_no_matrix_of_the_heads_size(tmp_path, parallel, tied, dtype):
    """Beyond the gradient buffer: neither the loss nor the embedding's backward pass does."""
    student = make_model(tmp_path, 50_000, 128, layers=2, seed=0, tied=tied)
    world_size = parallel[0] * parallel[1]
    for memory, matrix in run_ranks(
        world_size, memory_of_training, student, parallel, make_batch(50_000), dtype
    ):
        assert 0 < memory < matrix


def memory_of_training(student_dir, parallel, batch, dtype):
    """Temporaries of two micro-batches and more, and a matrix of this rank's head; in bytes."""
    from megatron.core import parallel_state

    from megatron_taopd.data import batching
    from megatron_taopd.models.gpt import pick_rows
    from megatron_taopd.models.student import Student
    from megatron_taopd.parallel import layout as layouts
    from megatron_taopd.parallel import platform
    from megatron_taopd.step.loss import kept_row_loss
    from megatron_taopd.step.output_heads import OutputHeads
    from megatron_taopd.types import WantedRows

    platform.emulate_cuda()
    try:
        layout = layouts.student_layout(*parallel)
        student = Student(student_dir, layout, dtype, "full", OPTIMIZER, 1, 50_000)
        shard = student.shard
        width = shard.stop - shard.start
        teacher_head = torch.randn(width, 16).to(dtype)
        heads = layout.is_last_stage and OutputHeads(student.head_weight, teacher_head, shard, 2)
        everything = WantedRows.all(batch)
        assigned = batching.assign(batch, everything, layout, micro_batch_tokens=40)

        def loss(micro_batch, hidden_states):
            hidden = pick_rows(hidden_states, micro_batch.rows, layout)
            taught = torch.randn(len(hidden), 16).to(dtype)
            total, _ = kept_row_loss(LossSection("jsd"), heads, hidden, taught, None, None)
            return total, torch.tensor(len(hidden), dtype=torch.int), {}

        # gloo copies all gradients that it reduces.
        student.config.finalize_model_grads_func = lambda *_, **__: None
        with peak_memory() as memory:
            student.forward_backward(assigned.micro_batches, loss)
        return memory.temporaries, width * 128 * dtype.itemsize
    finally:
        parallel_state.destroy_model_parallel()


@pytest.fixture(scope="module")
def expert_pair(tmp_path_factory, pair):
    path = tmp_path_factory.mktemp("experts")
    return pair[0], make_model(path, 216, 48, layers=4, seed=1, tied=False, experts=8)


EXPERT_LAYOUTS = {  # world size, student (tp, pp, sequence), teacher (tp, pp, sequence, ep)
    "TP2 | EP2": (2, (2, 1, False), (1, 1, False, 2)),
    "PP2 DP2 | TP2 SP EP2": (4, (1, 2, False), (2, 1, True, 2)),
    "TP2 DP2 | PP2 EP2": (4, (2, 1, True), (1, 2, False, 2)),
}


@pytest.mark.parametrize("name", EXPERT_LAYOUTS)
def test_a_teacher_of_experts_agrees_with_dense_float64(expert_pair, name):
    world_size, student, teacher = EXPERT_LAYOUTS[name]
    batch = make_batch(SIZE)
    oracle = dense_step(*expert_pair, batch, SIZE)
    step = partial(step_on_ranks, offload=True)
    for result in run_ranks(world_size, step, *expert_pair, student, teacher, batch, SIZE):
        assert_agrees(result, oracle)
        assert result["fingerprints"][0] == result["fingerprints"][1]


def test_ranks_of_experts_that_read_nothing(expert_pair):
    """One sequence: of four expert-parallel ranks three run padding, for their experts' sake."""
    batch = make_batch(SIZE, num_sequences=1, seed=3)
    oracle = dense_step(*expert_pair, batch, SIZE)
    layout = (2, 2, False), (1, 1, False, 4)
    for result in run_ranks(4, step_on_ranks, *expert_pair, *layout, batch, SIZE):
        assert_agrees(result, oracle)


@pytest.fixture(scope="module")
def expert_student(tmp_path_factory, pair):
    """A student of experts, its teacher, and what a step of theirs is."""
    path = tmp_path_factory.mktemp("experts")
    student = make_model(path, SIZE, 32, layers=4, seed=5, tied=False, experts=4)
    return (student, pair[1]), dense_step(student, pair[1], make_batch(SIZE), SIZE)


STUDENTS_OF_EXPERTS = {  # world size, student (tp, pp, sequence, seed, ep), teacher
    "one rank": (1, (1, 1, False, 0, 1), (1, 1, False)),
    "EP2": (2, (1, 1, False, 0, 2), (1, 1, False)),
    "DP2": (2, (1, 1, False, 0, 1), (1, 2, False)),
    "TP2 SP EP2": (4, (2, 1, True, 0, 2), (1, 2, False)),
    "PP2 EP2": (4, (1, 2, False, 0, 2), (2, 1, False)),
    "EP2 DP2": (4, (1, 1, False, 0, 2), (1, 4, False)),
}


@pytest.mark.parametrize("replay", [False, True])
@pytest.mark.parametrize("name", STUDENTS_OF_EXPERTS)
def test_a_student_of_experts_agrees_with_dense_float64(expert_student, name, replay):
    pair, oracle = expert_student
    world_size, *layout = STUDENTS_OF_EXPERTS[name]
    step = partial(step_on_ranks, replay=replay)
    for result in run_ranks(world_size, step, *pair, *layout, make_batch(SIZE), SIZE):
        assert_agrees(result, oracle)


@pytest.mark.parametrize("sequence", [False, True])
def test_ranks_that_share_a_key_value_head(tmp_path, sequence):
    """TP4 with two key-value heads in the student; and in a teacher with groups of its own."""
    pair = (
        make_model(tmp_path / "student", SIZE, 32, layers=2, seed=0, key_value_heads=2),
        make_model(tmp_path / "teacher", 216, 48, layers=2, seed=1, tied=False, key_value_heads=1),
    )
    batch = make_batch(SIZE)
    oracle = dense_step(*pair, batch, SIZE)
    for layout in ((4, 1, sequence), (2, 2, sequence)), ((1, 2, False), (4, 1, sequence)):
        for result in run_ranks(4, step_on_ranks, *pair, *layout, batch, SIZE):
            assert_agrees(result, oracle)


@pytest.mark.parametrize("parallel", [(2, 1, False), (1, 2, False), (1, 1, False)])
def test_self_distillation_is_zero(pair, parallel):
    """Invariant 1: the teacher is the student, in another layout."""
    _, teacher = pair
    batch = make_batch(216)
    (result, _) = run_ranks(2, step_on_ranks, teacher, teacher, parallel, (1, 2, False), batch, 216)
    assert abs(result["metrics"]["loss"]) <= 1e-5
    assert max(g.abs().max().item() for g in result["gradients"].values()) <= 1e-5


@pytest.mark.parametrize(
    "change", [{"micro_batch_tokens": 20}, {"micro_batch_tokens": 400}, {"chunk_rows": 1000}]
)
def test_micro_batch_packing_and_chunks_change_nothing(pair, oracle, change):
    layout = ((2, 1, False), (1, 2, False))
    step = partial(step_on_ranks, **change)
    for result in run_ranks(2, step, *pair, *layout, make_batch(SIZE), SIZE):
        assert_agrees(result, oracle)


@pytest.mark.parametrize("recompute", ["selective", "full"])
def test_recomputation_changes_nothing(pair, oracle, recompute):
    step = partial(step_on_ranks, recompute=recompute)
    for result in run_ranks(2, step, *pair, (2, 1, True), (1, 2, False), make_batch(SIZE), SIZE):
        assert_agrees(result, oracle)


REPLAYED = [name for name, (_, student, _) in LAYOUTS.items() if student[1] == 1]


@pytest.mark.parametrize("name", REPLAYED)
def test_a_replayed_step_agrees_with_dense_float64(pair, oracle, name):
    world_size, student, teacher = LAYOUTS[name]
    step = partial(step_on_ranks, replay=True)
    results = run_ranks(world_size, step, *pair, student, teacher, make_batch(SIZE), SIZE)
    for result in results:
        assert_agrees(result, oracle)


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("recompute", ["none", "selective", "full"])
def test_both_schedules_have_the_same_gradients(tmp_path, pair, recompute, tied):
    """Element by element, also where micro-batches, or all of a rank's, have no kept row."""
    student = make_model(tmp_path, SIZE, 32, layers=4, seed=0, tied=tied)
    batch, layout = make_batch(SIZE), ((2, 1, True), (1, 2, False))
    mask = torch.zeros(batch.num_rows, dtype=torch.bool)
    mask[batch.cu_rows[4] : batch.cu_rows[6] - 1] = True
    results = [
        run_ranks(
            4,
            partial(step_on_ranks, mask=mask, recompute=recompute, replay=replay),
            student, pair[1], *layout, batch, SIZE,
        )[0]
        for replay in (False, True)
    ]  # fmt: skip
    two_pass, replayed = (result["gradients"] for result in results)
    for name, gradient in two_pass.items():
        torch.testing.assert_close(replayed[name], gradient, rtol=1e-4, atol=1e-5, msg=name)
    assert results[1]["metrics"]["loss"] == pytest.approx(results[0]["metrics"]["loss"], rel=1e-5)


@pytest.mark.parametrize("kind", ["forward_kl", "jsd", "skewed_reverse_kl"])
def test_other_divergences(pair, kind):
    loss = {"kind": kind, "beta": 0.5, "alpha": 0.1}
    batch = make_batch(SIZE)
    step = partial(step_on_ranks, loss=loss)
    expected = dense_step(*pair, batch, SIZE, loss=loss)
    for result in run_ranks(2, step, *pair, (1, 2, False), (1, 1, False), batch, SIZE):
        assert_agrees(result, expected)


@pytest.fixture(scope="module")
def weighted_oracle(pair):
    return dense_step(*pair, make_batch(SIZE), SIZE, loss=WEIGHTED)


WEIGHTED = {"kind": "reverse_kl", "weights": "discrepancy", "gamma": 3.0}


@pytest.mark.parametrize("replay", [False, True])
@pytest.mark.parametrize("name", ["one rank", "TP2 | PP2", "PP2 | TP2", "DP2 | DP2"])
def test_weights_by_discrepancy_agree_with_dense_float64(pair, weighted_oracle, name, replay):
    """Of all tokens of a response, sampled ones that are not kept included; Σ w·loss / Σ w."""
    world_size, student, teacher = LAYOUTS[name]
    if replay and student[1] > 1:
        pytest.skip("replay is for one stage")
    step = partial(step_on_ranks, loss=WEIGHTED, replay=replay)
    kept = weighted_oracle["weights"][weighted_oracle["mask"]]
    assert kept.max() > 2 * kept.min()
    for result in run_ranks(world_size, step, *pair, student, teacher, make_batch(SIZE), SIZE):
        assert_agrees(result, weighted_oracle)
        assert result["metrics"]["loss/weight_mean"] == pytest.approx(kept.mean().item(), rel=1e-4)


def test_sampled_token_loss_is_a_policy_gradient(pair):
    """Σ over kept rows of −(ratio)·A·∇log p_S(y), A = −(log p_S − log p_T) held fixed."""
    student_dir, teacher_dir = pair
    batch = make_batch(SIZE)
    mask = torch.rand(batch.num_rows, generator=torch.Generator().manual_seed(3)) < 0.4
    step = partial(step_on_ranks, loss={"kind": "sampled_token"}, mask=mask)
    results = run_ranks(2, step, *pair, (2, 1, False), (1, 2, False), batch, SIZE)

    tokens = batch.response_tokens()[:, None]

    def loss(z_s, z_t):
        log_p, log_q = (z.log_softmax(-1).gather(1, tokens)[:, 0] for z in (z_s, z_t))
        ratio = (log_p - batch.log_probs.to(log_p.dtype)).exp()
        return -(ratio * (log_q - log_p).detach())[mask].mean()

    _, *expected = dense_gradients(loss, student_dir, teacher_dir, batch, SIZE)
    for result in results:
        assert_gradients(result["gradients"], *expected)


def test_the_teacher_does_not_change(pair):
    """A hundred optimizer steps of the student, the teacher moving to the CPU and back in each."""
    step = partial(step_on_ranks, steps=100, offload=True)
    for result in run_ranks(
        2, step, *pair, (2, 1, False), (1, 2, False), make_batch(SIZE, 4), SIZE, timeout=300
    ):
        before, after = result["fingerprints"]
        assert before == after
        weights = result["weights"]
        original = load_file(f"{pair[0]}/model.safetensors")
        assert any(not torch.equal(weights[name], original[name]) for name in original)


def test_the_fingerprint_sees_a_flipped_bit(pair):
    (same, changed), _ = run_ranks(2, fingerprints_around_a_change, pair[1])
    assert same and changed


def fingerprints_around_a_change(teacher_dir):
    from megatron_taopd.parallel import layout as layouts
    from megatron_taopd.parallel import platform
    from megatron_taopd.teacher.megatron import MegatronTeacher

    platform.emulate_cuda()
    layout = layouts.forward_layout(1, 2)
    teacher = MegatronTeacher(teacher_dir, layout, torch.float32, 64)
    first, again = teacher.fingerprint(), teacher.fingerprint()
    if layout.rank == 1:
        weight = next(teacher.trunk.parameters()).data
        weight.view(torch.int32).flatten()[-1] ^= 1
    return first == again, teacher.fingerprint() != first
