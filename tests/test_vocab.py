"""Scores and divergences over sharded heads against the dense float64 oracle."""

from __future__ import annotations

import dense
import pytest
import torch
import torch.distributed as dist
from hypothesis import given
from hypothesis import strategies as st
from ranks import run_ranks

from megatron_taopd.parallel import vocab
from megatron_taopd.parallel.vocab import (
    DIVERGENCES,
    VocabShard,
    divergence,
    linear_divergence,
    local_candidates,
    merge_candidates,
    score_hidden,
    score_rows,
    token_log_probs,
)

SIZE, PADDED = 90, 96
# Where the shards of a group start and stop. Columns 90 … 95 are outside the common vocabulary.
LAYOUTS = {
    "one": [0, 96],
    "halves": [0, 48, 96],
    "unequal": [0, 7, 96],
    "first empty": [0, 0, 96],
    "last all padding": [0, 91, 96],
    "quarters": [0, 24, 48, 72, 96],
    "some empty": [0, 5, 5, 93, 96],
}
EIGHTHS = list(range(0, 97, 12))


@pytest.fixture(params=LAYOUTS.values(), ids=LAYOUTS.keys())
def bounds(request):
    return request.param


def shard_of(bounds: list[int], rank: int | None = None, size: int = SIZE) -> VocabShard:
    """This rank's shard, or a given rank's with no group."""
    group = dist.group.WORLD if rank is None else None
    rank = dist.get_rank() if rank is None else rank
    return VocabShard(bounds[rank], bounds[rank + 1], group, size)


def columns(full: torch.Tensor, shard: VocabShard) -> torch.Tensor:
    return full[..., shard.start : shard.stop].clone()


def make_logits(kind: str, rows: int = 12, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """[rows, 96] fp32 logits of student and teacher; nan in the columns that must not be read."""
    generator = torch.Generator().manual_seed(seed)
    student, noise = torch.randn(2, rows, PADDED, generator=generator)
    teacher = 0.5 * student + noise + 3
    scale = {"flat": 0.1, "plain": 2.0, "peaked": 12.0, "huge": 1e4}.get(kind, 2.0)
    student, teacher = student * scale, teacher * scale
    if kind == "huge":
        student, teacher = student.clamp(-1e4, 1e4), teacher.clamp(-1e4, 1e4)
    if kind == "tied":  # a handful of values: ties at every place, across shards too
        student, teacher = student.div(4).round(), teacher.div(4).round()
    if kind == "impossible":  # ids without any probability, different ones for the two models
        student[:, 3:60:2], teacher[:, ::3] = -torch.inf, -torch.inf
        student[0, 8:SIZE] = -torch.inf  # fewer than k ids left
    student[:, SIZE:] = teacher[:, SIZE:] = torch.nan
    return student, teacher


def relative_error(got: torch.Tensor, want: torch.Tensor) -> float:
    """Largest |got − want| / |want|, below 1e-9 absolute; equal infinities agree."""
    got, want = got.double(), want.double()
    error = (got - want).abs() / want.abs().clamp(min=1e-9)
    return error.masked_fill(got == want, 0).amax().item() if got.numel() else 0.0


# ----------------------------------------------------------------------------------------- scores


def scores_on_rank(bounds, logits, k):
    """Scores of several (student, teacher) pairs: one call costs more than one pair."""
    shard = shard_of(bounds)
    return [
        score_rows(columns(student, shard), columns(teacher, shard), k, shard, return_ids=True)
        for student, teacher in logits
    ]


@pytest.mark.parametrize("k", [1, 16, SIZE])
def test_scores_match_the_oracle_on_every_layout(bounds, k):
    kinds = ("flat", "plain", "peaked", "huge", "tied", "impossible")
    logits = [make_logits(kind) for kind in kinds]
    by_rank = run_ranks(len(bounds) - 1, scores_on_rank, bounds, logits, k)
    for kind, (student, teacher), scores, *others in zip(kinds, logits, *by_rank, strict=True):
        for other in others:  # bit for bit, or the ranks would select different rows
            for field in vars(scores):
                assert torch.equal(getattr(scores, field), getattr(other, field)), (kind, field)

        assert scores.student_topk_ids.tolist() == dense.topk_ids(student, k, SIZE), kind
        assert scores.teacher_topk_ids.tolist() == dense.topk_ids(teacher, k, SIZE), kind
        expected = {
            "disagreement": dense.disagreement(student, teacher, k, SIZE),
            "compatibility": dense.compatibility(student, teacher, k, SIZE),
            "student_entropy": dense.entropy(student, SIZE),
            "teacher_entropy": dense.entropy(teacher, SIZE),
        }
        for name, want in expected.items():
            assert getattr(scores, name).dtype == torch.float32
            assert relative_error(getattr(scores, name), want) <= 1e-5, (kind, name)


def test_scores_of_eight_ranks_equal_those_of_one():
    logits = [make_logits("tied")]
    (eight,) = run_ranks(8, scores_on_rank, EIGHTHS, logits, 16)[5]
    (one,) = run_ranks(1, scores_on_rank, LAYOUTS["one"], logits, 16)[0]
    assert torch.equal(eight.student_topk_ids, one.student_topk_ids)
    torch.testing.assert_close(eight.disagreement, one.disagreement, rtol=1e-6, atol=1e-8)


def test_with_the_whole_vocabulary_d_is_the_forward_kl_and_c_is_1():
    student, teacher = make_logits("plain")
    shard = VocabShard(0, PADDED, None, SIZE)
    scores = score_rows(student, teacher, SIZE, shard)
    forward_kl = divergence(student, teacher, shard, "forward_kl")
    torch.testing.assert_close(scores.disagreement, forward_kl, rtol=1e-5, atol=1e-7)
    torch.testing.assert_close(scores.compatibility, torch.ones(12), rtol=0, atol=1e-6)


def test_d_is_infinite_where_the_student_excludes_what_the_teacher_wants():
    student, teacher = torch.zeros(2, 2, 8)
    student[0, 5] = -torch.inf
    teacher[:, 5] = 4.0
    scores = score_rows(student, teacher, 2, VocabShard(0, 8, None, 8))
    assert scores.disagreement[0] == torch.inf
    assert 0 < scores.disagreement[1] < torch.inf


@given(
    logits=st.lists(
        st.lists(
            st.sampled_from([-torch.inf, -2.0, -0.0, 0.0, 1.0, 1.5]), min_size=18, max_size=18
        ),
        min_size=2,
        max_size=2,
    ).filter(lambda models: all(max(z[:15]) > -torch.inf for z in models)),
    cuts=st.lists(st.integers(0, 18), max_size=4).map(sorted),
    k=st.integers(1, 15),
)
def test_merging_the_candidates_of_any_shards_gives_the_exact_answer(logits, cuts, k):
    student, teacher = torch.tensor(logits)[:, None]
    bounds = [0, *cuts, 18]
    shards = [shard_of(bounds, rank, size=15) for rank in range(len(cuts) + 1)]
    gathered = torch.stack(
        [local_candidates(columns(student, s), columns(teacher, s), k, s) for s in shards]
    )
    scores = merge_candidates(gathered, k, return_ids=True)
    assert scores.student_topk_ids.tolist() == dense.topk_ids(student, k, 15)
    assert scores.teacher_topk_ids.tolist() == dense.topk_ids(teacher, k, 15)
    assert relative_error(scores.disagreement, dense.disagreement(student, teacher, k, 15)) <= 1e-5
    assert (
        relative_error(scores.compatibility, dense.compatibility(student, teacher, k, 15)) <= 1e-5
    )


@pytest.mark.parametrize("k", [0, SIZE + 1])
def test_k_beyond_the_common_vocabulary_is_refused(k):
    student, teacher = make_logits("plain")
    with pytest.raises(ValueError, match=f"k is {k}: must be within 1 … {SIZE}"):
        score_rows(student, teacher, k, VocabShard(0, PADDED, None, SIZE))


# ------------------------------------------------------------------------------------ divergences


def divergence_on_rank(bounds, logits, kind, grad):
    """(loss, gradient of this rank's columns) of several (student, teacher) pairs."""
    shard = shard_of(bounds)
    results = []
    for student, teacher in logits:
        local = columns(student, shard).requires_grad_()
        loss = divergence(local, columns(teacher, shard), shard, kind, beta=0.3, alpha=0.2)
        loss.backward(grad)
        results.append((loss.detach(), local.grad))
    return results


def sharded_divergence(bounds, logits, kind, grad):
    """(loss, gradient of all columns) of several (student, teacher) pairs."""
    by_rank = run_ranks(len(bounds) - 1, divergence_on_rank, bounds, logits, kind, grad)
    for results in by_rank:
        for (loss, _), (first, _) in zip(results, by_rank[0], strict=True):
            assert torch.equal(loss, first)
    return [
        (pair[0][0], torch.cat([g for _, g in pair], dim=1)) for pair in zip(*by_rank, strict=True)
    ]


@pytest.mark.parametrize("kind", DIVERGENCES)
def test_divergence_and_gradient_match_the_oracle_on_every_layout(bounds, kind):
    logits = [make_logits(k) for k in ("flat", "plain", "peaked", "huge", "tied")]
    grad = torch.linspace(-1, 2, 12)
    results = sharded_divergence(bounds, logits, kind, grad)
    for (student, teacher), (loss, got_grad) in zip(logits, results, strict=True):
        exact = student.double().requires_grad_()
        want = dense.divergence(exact, teacher, kind, SIZE, beta=0.3, alpha=0.2)
        want.backward(grad.double())
        torch.testing.assert_close(loss.double(), want.detach(), rtol=2e-6, atol=2e-7)
        assert (got_grad[:, SIZE:] == 0).all()
        atol = 2e-6 * exact.grad.abs().amax().item() + 1e-7
        torch.testing.assert_close(got_grad.double(), exact.grad, rtol=2e-6, atol=atol)


@pytest.mark.parametrize("kind", DIVERGENCES)
@pytest.mark.parametrize("layout", ["one", "some empty"])
def test_ids_of_no_probability_contribute_nothing_or_infinity(kind, layout):
    zeros_s, zeros_t = make_logits("impossible")
    plain_s, plain_t = make_logits("plain")
    finite = {  # reverse KL only minds the student's choices, forward KL only the teacher's
        "reverse_kl": [(zeros_s, plain_t)],
        "forward_kl": [(plain_s, zeros_t)],
    }.get(kind, [(zeros_s, plain_t), (plain_s, zeros_t), (zeros_s, zeros_t)])
    results = sharded_divergence(LAYOUTS[layout], finite, kind, torch.ones(12))
    for pair, (loss, grad) in zip(finite, results, strict=True):
        want = dense.divergence(*pair, kind, SIZE, beta=0.3, alpha=0.2)
        torch.testing.assert_close(loss.double(), want, rtol=2e-6, atol=2e-7)
        assert grad.isfinite().all()
    if kind in ("reverse_kl", "forward_kl"):
        ((loss, _),) = sharded_divergence(
            LAYOUTS[layout], [(zeros_s, zeros_t)], kind, torch.ones(12)
        )
        assert (loss == torch.inf).all()


@pytest.mark.parametrize("kind", ["jsd", "skewed_reverse_kl"])
def test_a_ratio_beyond_the_range_of_fp32_is_harmless_in_a_mixture(kind):
    """exp(−95) is still a probability > 0 in fp32, exp(+95) is not a number any more."""
    student = torch.tensor([[0.0, -95.0]], requires_grad=True)
    teacher = student.detach().flip(1)
    loss = divergence(student, teacher, VocabShard(0, 2, None, 2), kind)
    loss.sum().backward()
    want = dense.divergence(student.detach(), teacher, kind)
    torch.testing.assert_close(loss.detach().double(), want, rtol=1e-6, atol=0)
    assert student.grad.abs().max() < 1e-30


@pytest.mark.parametrize("kind", DIVERGENCES)
def test_divergence_passes_gradcheck(kind):
    student, teacher = torch.randn(2, 4, 9, dtype=torch.float64, generator=torch.manual_seed(0))
    shard = VocabShard(0, 9, None, 8)
    torch.autograd.gradcheck(
        lambda z: divergence(z, teacher, shard, kind), student.requires_grad_(), atol=1e-8
    )


@pytest.mark.parametrize("kind", DIVERGENCES)
def test_small_divergences_keep_their_digits(kind):
    """A difference of log-sum-exps in fp32 would be off by up to 1e-6 here."""
    student = make_logits("plain")[0]
    teacher = student + 1e-3 * make_logits("flat")[0] + 7  # the shift makes the log-sums differ
    pair = (student, teacher)
    ((loss, _),) = sharded_divergence(LAYOUTS["unequal"], [pair], kind, torch.ones(12))
    want = dense.divergence(*pair, kind, SIZE, beta=0.3, alpha=0.2)
    assert want.max() < 1e-7
    torch.testing.assert_close(loss.double(), want, rtol=0, atol=1e-7)


def test_divergence_refuses_what_it_does_not_know():
    student, teacher = make_logits("plain")
    shard = VocabShard(0, PADDED, None, SIZE)
    with pytest.raises(ValueError, match="kind is 'mse': must be one of reverse_kl, forward_kl"):
        divergence(student, teacher, shard, "mse")
    with pytest.raises(ValueError, match=r"beta is 1.0: must be inside \(0, 1\)"):
        divergence(student, teacher, shard, "jsd", beta=1.0)


# ------------------------------------------------------------- divergences of hidden states


def make_heads(rows: int = 11, seed: int = 0, dtype=torch.float32):
    """Student and teacher hidden states (of other widths) and heads, nan where padded."""
    generator = torch.Generator().manual_seed(seed)
    sizes = ((rows, 24), (PADDED, 24), (rows, 40), (PADDED, 40))
    tensors = [torch.randn(s, generator=generator, dtype=torch.float64) for s in sizes]
    for weight in tensors[1::2]:
        weight[SIZE:] = torch.nan
        weight *= 0.5
    return [t.to(dtype) for t in tensors]


def dense_linear_divergence(heads, kind, row_weight):
    """[R] losses, hidden and weight gradients of their weighted sum, all float64."""
    hidden, weight, teacher_hidden, teacher_weight = (t.double() for t in heads)
    hidden.requires_grad_(), weight.requires_grad_()
    teacher = teacher_hidden @ teacher_weight[:SIZE].t()
    losses = dense.divergence(hidden @ weight[:SIZE].t(), teacher, kind)
    (losses * row_weight.double()).sum().backward()
    return losses.detach(), hidden.grad, weight.grad


def local_heads(heads, shard):
    hidden, weight, teacher_hidden, teacher_weight = heads
    here = slice(shard.start, shard.stop)
    return (
        hidden.clone().requires_grad_(),
        weight[here].clone().requires_grad_(),
        teacher_hidden,
        teacher_weight[here],
    )


def linear_divergence_on_rank(bounds, heads, kind, chunk_rows, row_weight, at_once):
    shard = shard_of(bounds)
    local = local_heads(heads, shard)
    if at_once:
        loss = linear_divergence(*local, shard, kind, chunk_rows, row_weight)
        (3 * loss).backward()  # a factor arrives from outside, as a loss scale does
    else:
        loss = linear_divergence(*local, shard, kind, chunk_rows)
        (3 * loss).backward(row_weight)
    return loss.detach(), local[0].grad / 3, local[1].grad / 3


@pytest.mark.parametrize("at_once", [False, True])
@pytest.mark.parametrize("kind", DIVERGENCES)
def test_linear_divergence_matches_the_oracle_on_every_layout(bounds, kind, at_once):
    check_linear_divergence(bounds, kind, 4, at_once)


@pytest.mark.parametrize("at_once", [False, True])
@pytest.mark.parametrize("chunk_rows", [1, 3, 11, 1000])
def test_linear_divergence_does_not_depend_on_the_chunks(chunk_rows, at_once):
    check_linear_divergence(LAYOUTS["unequal"], "reverse_kl", chunk_rows, at_once)


def check_linear_divergence(bounds, kind, chunk_rows, at_once):
    heads = make_heads()
    row_weight = torch.linspace(-0.5, 1, 11)
    want, want_hidden, want_weight = dense_linear_divergence(heads, kind, row_weight)
    by_rank = run_ranks(
        len(bounds) - 1,
        linear_divergence_on_rank, bounds, heads, kind, chunk_rows, row_weight, at_once,
    )  # fmt: skip
    if at_once:
        want = (want * row_weight).sum()
    for loss, _, _ in by_rank:
        assert torch.equal(loss, by_rank[0][0])
    torch.testing.assert_close(by_rank[0][0].double(), want, rtol=2e-6, atol=2e-7)
    hidden_grad = sum(h for _, h, _ in by_rank)  # what the caller's all-reduce does
    torch.testing.assert_close(hidden_grad.double(), want_hidden, rtol=1e-5, atol=2e-6)
    weight_grad = torch.cat([w for _, _, w in by_rank])
    torch.testing.assert_close(weight_grad.double(), want_weight, rtol=1e-5, atol=2e-6)


class CopyToGroup(torch.autograd.Function):
    """Forward nothing, backward the sum over ranks: what a caller owes to linear_divergence."""

    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, grad):
        grad = grad.clone()
        dist.all_reduce(grad)
        return grad


class ReduceFromGroup(torch.autograd.Function):
    """Forward the sum over ranks, backward nothing: how sharded embeddings come together."""

    @staticmethod
    def forward(ctx, x):
        x = x.clone()
        dist.all_reduce(x)
        return x

    @staticmethod
    def backward(ctx, grad):
        return grad


def tied_on_rank(bounds, embedding, tokens, teacher_hidden, teacher_weight, at_once):
    shard = shard_of(bounds)
    weight = embedding[shard.start : shard.stop].clone().requires_grad_()
    local = torch.nn.functional.one_hot(tokens, PADDED)[:, shard.start : shard.stop].float()
    hidden = CopyToGroup.apply(ReduceFromGroup.apply(local @ weight).tanh())
    row_weight = torch.ones(len(tokens)) if at_once else None
    teacher = (teacher_hidden, teacher_weight[shard.start : shard.stop])
    linear_divergence(hidden, weight, *teacher, shard, "reverse_kl", 4, row_weight).sum().backward()
    return weight.grad


@pytest.mark.parametrize("at_once", [False, True])
def test_gradients_meet_in_a_tied_embedding(at_once):
    _, embedding, teacher_hidden, teacher_weight = make_heads()
    embedding = embedding.nan_to_num(0.0)  # one row is looked up by a matrix product here
    tokens = torch.tensor([3, 70, 3, 20, 89, 0, 50, 51, 20, 7, 88])
    exact = embedding.double().requires_grad_()
    student = exact[tokens].tanh() @ exact[:SIZE].t()
    teacher = teacher_hidden.double() @ teacher_weight[:SIZE].double().t()
    dense.divergence(student, teacher).sum().backward()
    for bounds in LAYOUTS["one"], LAYOUTS["quarters"]:
        by_rank = run_ranks(
            len(bounds) - 1,
            tied_on_rank, bounds, embedding, tokens, teacher_hidden, teacher_weight, at_once,
        )  # fmt: skip
        torch.testing.assert_close(torch.cat(by_rank).double(), exact.grad, rtol=1e-5, atol=2e-6)


@pytest.mark.parametrize("at_once", [False, True])
@pytest.mark.parametrize("kind", DIVERGENCES)
def test_self_distillation_is_nothing(kind, at_once):
    hidden, weight, _, _ = make_heads()
    heads = (hidden, weight, hidden, weight)
    ones = torch.ones(len(hidden))
    by_rank = run_ranks(
        2, linear_divergence_on_rank, LAYOUTS["halves"], heads, kind, 4, ones, at_once
    )
    loss, hidden_grad, weight_grad = by_rank[0]
    assert loss.abs().max() <= 1e-6
    assert hidden_grad.norm() <= 1e-6
    assert weight_grad.norm() <= 1e-6


def score_hidden_on_rank(bounds, heads, k, chunk_rows):
    shard = shard_of(bounds)
    return score_hidden(*local_heads(heads, shard), k, shard, chunk_rows, return_ids=True)


def test_scores_of_hidden_states_do_not_depend_on_the_chunks():
    heads = make_heads(rows=30)
    student = heads[0].double() @ heads[1][:SIZE].double().t()
    teacher = heads[2].double() @ heads[3][:SIZE].double().t()
    for chunk_rows in (1, 7, 30, 100):
        scores = run_ranks(2, score_hidden_on_rank, LAYOUTS["unequal"], heads, 16, chunk_rows)[0]
        assert scores.student_topk_ids.tolist() == dense.topk_ids(student, 16)
        want = dense.disagreement(student, teacher, 16)
        torch.testing.assert_close(scores.disagreement.double(), want, rtol=1e-5, atol=1e-6)
        want = dense.compatibility(student, teacher, 16)
        torch.testing.assert_close(scores.compatibility.double(), want, rtol=1e-5, atol=1e-6)


def test_bf16_heads_give_fp32_logits():
    heads = make_heads(dtype=torch.bfloat16)
    student = heads[0].double() @ heads[1][:SIZE].double().t()
    teacher = heads[2].double() @ heads[3][:SIZE].double().t()
    shard = VocabShard(0, PADDED, None, SIZE)
    scores = score_hidden(*heads, 16, shard, chunk_rows=4)
    want = dense.disagreement(student, teacher, 16)
    torch.testing.assert_close(scores.disagreement.double(), want, rtol=1e-5, atol=1e-6)

    row_weight = torch.ones(11)
    want, want_hidden, want_weight = dense_linear_divergence(heads, "reverse_kl", row_weight)
    for weights in (None, row_weight):
        local = local_heads(heads, shard)
        losses = linear_divergence(*local, shard, "reverse_kl", 4, weights)
        torch.testing.assert_close(losses.sum().double(), want.sum(), rtol=1e-5, atol=0)
        losses.sum().backward()
        for got, exact in ((local[0].grad, want_hidden), (local[1].grad, want_weight)):
            assert got.dtype == torch.bfloat16  # rounded once, at the end
            torch.testing.assert_close(got.double(), exact, rtol=2**-8, atol=1e-5)


def test_no_more_than_chunk_rows_of_logits_ever_exist(monkeypatch):
    seen = []
    project = vocab._logits
    monkeypatch.setattr(vocab, "_logits", lambda h, w: seen.append(len(h)) or project(h, w))
    heads, shard = make_heads(rows=10), VocabShard(0, PADDED, None, SIZE)
    score_hidden(*heads, 4, shard, chunk_rows=4)
    assert seen == [4, 4] * 2 + [2, 2]
    seen.clear()
    local = local_heads(heads, shard)
    linear_divergence(*local, shard, "reverse_kl", 4, torch.ones(10)).backward()
    assert seen == [4, 4] * 2 + [2, 2]  # with row_weight nothing is computed twice
    seen.clear()
    linear_divergence(*local, shard, "reverse_kl", 4).sum().backward()
    assert seen == [4, 4, 4, 4, 2, 2] * 2


def test_one_backward_pass_when_gradients_are_formed_at_once():
    shard = VocabShard(0, PADDED, None, SIZE)
    local = local_heads(make_heads(), shard)
    loss = linear_divergence(*local, shard, "reverse_kl", 4, torch.ones(11))
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_without_grad_no_gradient_is_formed(monkeypatch):
    monkeypatch.setattr(vocab, "_HeadGradients", None)
    shard = VocabShard(0, PADDED, None, SIZE)
    local = local_heads(make_heads(), shard)
    with torch.no_grad():
        loss = linear_divergence(*local, shard, "reverse_kl", 4, torch.ones(11))
    frozen = [t.detach() for t in local]
    assert torch.equal(linear_divergence(*frozen, shard, "reverse_kl", 4, torch.ones(11)), loss)
    assert not loss.requires_grad


# ------------------------------------------------------------------------------------- token log p


def token_log_probs_on_rank(bounds, hidden, weight, tokens, grad):
    shard = shard_of(bounds)
    hidden = hidden.clone().requires_grad_()
    weight = weight[shard.start : shard.stop].clone().requires_grad_()
    log_probs = token_log_probs(hidden, weight, tokens, shard, chunk_rows=4)
    log_probs.backward(grad)
    return log_probs.detach(), hidden.grad, weight.grad


def test_token_log_probs_match_the_oracle_on_every_layout(bounds):
    hidden, weight, _, _ = make_heads()
    tokens = torch.tensor([0, 4, 5, 6, 7, 24, 47, 48, 72, 88, 89])
    grad = torch.linspace(-1, 2, 11)
    exact_hidden, exact_weight = hidden.double(), weight.double()
    exact_hidden.requires_grad_(), exact_weight.requires_grad_()
    want = dense.log_probs(exact_hidden @ exact_weight[:SIZE].t())[torch.arange(11), tokens]
    want.backward(grad.double())
    by_rank = run_ranks(
        len(bounds) - 1, token_log_probs_on_rank, bounds, hidden, weight, tokens, grad
    )
    torch.testing.assert_close(by_rank[0][0].double(), want.detach(), rtol=2e-6, atol=2e-7)
    hidden_grad = sum(h for _, h, _ in by_rank)
    torch.testing.assert_close(hidden_grad.double(), exact_hidden.grad, rtol=1e-5, atol=2e-6)
    weight_grad = torch.cat([w for _, _, w in by_rank])
    torch.testing.assert_close(weight_grad.double(), exact_weight.grad, rtol=1e-5, atol=2e-6)


def test_a_token_outside_the_common_vocabulary_has_no_probability():
    hidden, weight, _, _ = make_heads(rows=2)
    shard = VocabShard(0, PADDED, None, SIZE)
    log_probs = token_log_probs(hidden, weight, torch.tensor([SIZE - 1, SIZE]), shard)
    assert log_probs.isfinite().tolist() == [True, False]
    assert log_probs[1] == -torch.inf


# ---------------------------------------------------------------------------------- communication


def record_collectives(fn) -> list[tuple[str, int]]:
    """(name, bytes this rank contributes) of every collective that fn() runs."""
    names = [
        n for n in dir(dist)
        if n.startswith(("all_", "reduce", "broadcast", "gather", "scatter", "send", "recv",
                         "isend", "irecv", "barrier", "batch_isend", "monitored"))
    ]  # fmt: skip
    calls, originals = [], {n: getattr(dist, n) for n in names if callable(getattr(dist, n))}

    def recorder(name, original):
        def call(*args, **kwargs):
            tensors = [a for a in args if isinstance(a, torch.Tensor)]
            calls.append((name, tensors[-1].nbytes if tensors else 0))
            return original(*args, **kwargs)

        return call

    for name, original in originals.items():
        setattr(dist, name, recorder(name, original))
    try:
        fn()
    finally:
        for name, original in originals.items():
            setattr(dist, name, original)
    return calls


def communication_on_rank(bounds, heads, k):
    shard = shard_of(bounds)
    local = local_heads(heads, shard)
    hidden, weight = local[:2]
    tokens = torch.zeros(len(hidden), dtype=torch.int64)
    ones = torch.ones(len(hidden))
    calls = {"score": record_collectives(lambda: score_hidden(*local, k, shard, 4))}
    for kind in DIVERGENCES:
        for name, row_weight in ((kind, None), (f"{kind} at once", ones)):
            losses = []
            calls[name] = record_collectives(
                lambda n=kind, w=row_weight, out=losses: out.append(
                    linear_divergence(*local, shard, n, 4, w).sum()
                )
            )
            calls[f"{name} backward"] = record_collectives(losses[0].backward)
    calls["tokens"] = record_collectives(lambda: token_log_probs(hidden, weight, tokens, shard, 4))
    log_probs = token_log_probs(hidden, weight, tokens, shard, 4).sum()
    calls["tokens backward"] = record_collectives(log_probs.backward)
    return calls


def test_collectives_and_their_bytes():
    """11 rows in chunks of 4, 4, 3; the same on all ranks, whatever their number of columns."""
    k = 16
    by_rank = run_ranks(2, communication_on_rank, LAYOUTS["unequal"], make_heads(), k)
    per_row = {"score": [24 * k + 24], "tokens": [12]}
    for kind in DIVERGENCES:
        per_row[kind] = [20] if kind in ("reverse_kl", "forward_kl") else [16, 8]
        per_row[f"{kind} at once"] = per_row[kind]
    want = {
        name: [("all_gather_into_tensor", rows * size) for rows in (4, 4, 3) for size in sizes]
        for name, sizes in per_row.items()
    }
    want |= {f"{name} backward": [] for name in per_row if name != "score"}
    for calls in by_rank:
        assert calls == want


def zero_rows_on_rank(bounds, heads):
    shard = shard_of(bounds)
    calls = communication_on_rank(bounds, heads, 4)
    scores = score_hidden(*local_heads(heads, shard), 4, shard, 8, return_ids=True)
    results = []
    for row_weight in (None, torch.ones(0)):
        local = local_heads(heads, shard)
        loss = linear_divergence(*local, shard, "jsd", 8, row_weight)
        loss.sum().backward()
        results.append((loss.detach(), local[0].grad, local[1].grad))
    return calls, scores, results


def test_no_rows_are_no_loss_no_gradient_and_no_communication():
    for (calls, scores, results), start in zip(
        run_ranks(2, zero_rows_on_rank, LAYOUTS["halves"], make_heads(rows=0)), (0, 48), strict=True
    ):
        assert not any(calls.values())
        assert scores.disagreement.shape == (0,)
        assert scores.student_topk_ids.shape == (0, 4)
        assert results[0][0].shape == (0,)
        assert results[1][0] == 0
        for _, hidden_grad, weight_grad in results:
            assert hidden_grad.shape == (0, 24)
            assert weight_grad.shape == (48, 24), start
            assert (weight_grad == 0).all()
