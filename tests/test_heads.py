"""Scores and losses of hidden states over sharded heads against the dense float64 oracle."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
import torch.distributed as dist
from support import dense
from support.ranks import run_ranks
from support.rounding import assert_rounded
from support.shards import (
    LAYOUTS,
    PADDED,
    SIZE,
    local_heads,
    make_heads,
    on_every_layout,
    shard_of,
)

from megatron_taopd.parallel.memory import peak_memory
from megatron_taopd.parallel.vocab import (
    DIVERGENCES,
    VocabShard,
    linear_divergence,
    linear_topk_divergence,
    projection,
    rows_within,
    score_hidden,
    score_sampled,
    token_log_probs,
)
from megatron_taopd.step.output_heads import TopkOutputHeads
from megatron_taopd.teacher.topk import TopkRows


def of_heads(losses, heads, row_weight, dtype=torch.float64):
    """[R] `losses(hidden, weight, …)`, hidden and weight gradients of their weighted sum, dense."""
    hidden, weight, *others = (t.to(dtype, copy=True) for t in heads)
    hidden.requires_grad_(), weight.requires_grad_()
    values = losses(hidden, weight, *others)
    (values * row_weight.to(dtype)).sum().backward()
    return values.detach(), hidden.grad, weight.grad


def of_heads_in_float32(losses, heads, row_weight):
    with dense.in_float32():
        return of_heads(losses, heads, row_weight, torch.float32)


def linear_losses(kind, present=slice(SIZE)):
    """`losses` of `of_heads`: a divergence over these columns."""

    def losses(hidden, weight, teacher_hidden, teacher_weight):
        teacher = teacher_hidden @ teacher_weight[present].t()
        return dense.divergence(hidden @ weight[present].t(), teacher, kind)

    return losses


def assert_gradients(by_rank, losses, heads, row_weight):
    """Those of the ranks, (…, hidden, weight), against dense ones: hidden's as a caller's
    all-reduce adds them up, the weight's as the shards lie."""
    _, *exact = of_heads(losses, heads, row_weight)
    _, *plain = of_heads_in_float32(losses, heads, row_weight)
    hidden, weight = (list(grads) for grads in zip(*by_rank, strict=True))
    for name, got, *wanted in zip(
        ("hidden", "weight"), (sum(hidden), torch.cat(weight)), exact, plain, strict=True
    ):
        assert_rounded(got, *wanted, name)


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


@on_every_layout
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
    losses = linear_losses(kind)
    want, _, _ = of_heads(losses, heads, row_weight)
    by_rank = run_ranks(
        len(bounds) - 1,
        linear_divergence_on_rank, bounds, heads, kind, chunk_rows, row_weight, at_once,
    )  # fmt: skip
    if at_once:
        want = (want * row_weight).sum()
    for loss, _, _ in by_rank:
        assert torch.equal(loss, by_rank[0][0])
    torch.testing.assert_close(by_rank[0][0].double(), want, rtol=2e-6, atol=2e-7)
    assert_gradients([grads for _, *grads in by_rank], losses, heads, row_weight)


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


def tied_on_rank(bounds, embedding, tokens, teacher_hidden, teacher_weight, kind, at_once):
    shard = shard_of(bounds)
    weight = embedding[shard.start : shard.stop].clone().requires_grad_()
    local = torch.nn.functional.one_hot(tokens, PADDED)[:, shard.start : shard.stop].float()
    hidden = CopyToGroup.apply(ReduceFromGroup.apply(local @ weight).tanh())
    row_weight = torch.ones(len(tokens)) if at_once else None
    teacher = (teacher_hidden, teacher_weight[shard.start : shard.stop])
    linear_divergence(hidden, weight, *teacher, shard, kind, 4, row_weight).sum().backward()
    return weight.grad


@pytest.mark.parametrize("at_once", [False, True])
@pytest.mark.parametrize("kind", DIVERGENCES)
def test_gradients_meet_in_a_tied_embedding(kind, at_once):
    _, embedding, teacher_hidden, teacher_weight = make_heads()
    embedding = embedding.nan_to_num(0.0)  # one row is looked up by a matrix product here
    tokens = torch.tensor([3, 70, 3, 20, 89, 0, 50, 51, 20, 7, 88])

    def gradient(dtype):
        tied = embedding.to(dtype, copy=True).requires_grad_()
        student = tied[tokens].tanh() @ tied[:SIZE].t()
        teacher = teacher_hidden.to(dtype) @ teacher_weight[:SIZE].to(dtype).t()
        dense.divergence(student, teacher, kind).sum().backward()
        return tied.grad

    exact = gradient(torch.float64)
    with dense.in_float32():
        plain = gradient(torch.float32)
    for bounds in LAYOUTS["one"], LAYOUTS["halves"], LAYOUTS["quarters"]:
        by_rank = run_ranks(
            len(bounds) - 1,
            tied_on_rank, bounds, embedding, tokens, teacher_hidden, teacher_weight, kind, at_once,
        )  # fmt: skip
        assert_rounded(torch.cat(by_rank), exact, plain)


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
    want, want_hidden, want_weight = of_heads(linear_losses("reverse_kl"), heads, row_weight)
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

    project = projection.Projection.__call__

    def recorded(self, rows):
        seen.append(rows.stop - rows.start)
        return project(self, rows)

    monkeypatch.setattr(projection.Projection, "__call__", recorded)
    heads, shard = make_heads(rows=10), VocabShard(0, PADDED, None, SIZE)
    score_hidden(*heads, 4, shard, chunk_rows=4)
    assert seen == [4, 4, 3, 3, 3, 3]  # both models' rows of each chunk
    seen.clear()
    local = local_heads(heads, shard)
    linear_divergence(*local, shard, "reverse_kl", 4, torch.ones(10)).backward()
    assert seen == [4, 4, 3, 3, 3, 3]  # with row_weight nothing is computed twice
    seen.clear()
    linear_divergence(*local, shard, "reverse_kl", 4).sum().backward()
    assert seen == [4, 4, 3, 3, 3, 3] * 2


def test_one_backward_pass_when_gradients_are_formed_at_once():
    shard = VocabShard(0, PADDED, None, SIZE)
    local = local_heads(make_heads(), shard)
    loss = linear_divergence(*local, shard, "reverse_kl", 4, torch.ones(11))
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


# ------------------------------------------------------------------------------- an aligned width

ODD, ROWS_OF_HEADS = 389, 448  # 389 ids of 448 rows, as of two ranks with 224 each


@pytest.mark.parametrize("at_once", [False, True])
@pytest.mark.parametrize("kind", DIVERGENCES)
def test_an_odd_vocabulary_is_computed_at_an_aligned_width(kind, at_once):
    """The second rank's 165 ids take 224 columns. The rows of the head behind them, of which some
    are nan here and others huge, leave no trace, and have gradients of exactly zero."""
    generator = torch.Generator().manual_seed(0)
    sizes = ((11, 24), (ROWS_OF_HEADS, 24), (11, 40), (ROWS_OF_HEADS, 40))
    heads = [torch.randn(s, generator=generator) for s in sizes]
    for weight in heads[1::2]:
        weight[ODD:], weight[-2:] = 1e30, torch.nan
    row_weight, losses = torch.linspace(-0.5, 1, 11), linear_losses(kind, slice(ODD))
    bounds, by_rank = [0, 224, ROWS_OF_HEADS], []
    want, *_ = of_heads(losses, heads, row_weight)
    for loss, hidden, weight, widths in run_ranks(
        2, odd_on_rank, bounds, heads, kind, row_weight, at_once
    ):
        assert widths == {224}
        expected = (want * row_weight).sum() if at_once else want
        torch.testing.assert_close(loss.double(), expected, rtol=2e-6, atol=2e-7)
        by_rank.append((hidden, weight))
    assert not by_rank[1][1][ODD - 224 :].any()
    assert_gradients(by_rank, losses, heads, row_weight)


def odd_on_rank(bounds, heads, kind, row_weight, at_once):
    shard, widths = shard_of(bounds, size=ODD), set()
    mask = VocabShard.mask

    def recorded(self, logits):
        widths.add(logits.shape[1])
        return mask(self, logits)

    VocabShard.mask = recorded
    try:
        local = local_heads(heads, shard)
        if at_once:
            loss = linear_divergence(*local, shard, kind, 4, row_weight)
            loss.backward()
        else:
            loss = linear_divergence(*local, shard, kind, 4)
            loss.backward(row_weight)
    finally:
        VocabShard.mask = mask
    return loss.detach(), local[0].grad, local[1].grad, widths


@pytest.mark.parametrize(
    ("start", "stop", "size", "width"),
    [
        (0, 75968, 151669, 75968),  # Qwen3 with TP2: all columns of the first rank take part,
        (75968, 151936, 151669, 75776),  # 75,701 of the second's
        (0, 151936, 151669, 151680),
        (132944, 151936, 151669, 18816),
        (90, 96, 90, 0),
        (0, 96, 90, 96),
    ],
)
def test_the_width_that_is_computed(start, stop, size, width):
    assert VocabShard(start, stop, None, size).padded_width == width


# -------------------------------------------------------------------- under Megatron's main_grad


def micro_batches_on_rank(bounds, heads, kind, at_once, main_grad: bool):
    """Three, chunked: gradients of hidden, the weight's sum, and what autograd saw of that."""
    shard = shard_of(bounds)
    _, weight, *_ = local_heads(heads, shard)
    total = torch.zeros(weight.shape)
    if main_grad:
        weight.main_grad = total
    hidden_grads, seen = [], []
    for part in range(3):
        rows = slice(4 * part, 4 * part + 4)
        hidden, _, teacher_hidden, teacher_weight = local_heads(heads, shard)
        hidden = hidden.detach()[rows].requires_grad_()
        row_weight = torch.arange(1.0, 1 + len(hidden))
        local = (hidden, weight, teacher_hidden[rows], teacher_weight)
        if at_once:
            linear_divergence(*local, shard, kind, 3, row_weight).backward()
        else:
            linear_divergence(*local, shard, kind, 3).backward(row_weight)
        hidden_grads.append(hidden.grad)
        seen.append(weight.grad)
        total += weight.grad.float()  # as DDP's hook does
        weight.grad = None
    return torch.cat(hidden_grads), total, seen


@pytest.mark.parametrize("at_once", [False, True])
@pytest.mark.parametrize("kind", DIVERGENCES)
@pytest.mark.parametrize("layout", ["one", "unequal", "some empty"])
def test_a_main_grad_gets_what_autograd_would_have_got(layout, kind, at_once):
    heads, bounds = make_heads(rows=12), LAYOUTS[layout]
    both = [
        run_ranks(len(bounds) - 1, micro_batches_on_rank, bounds, heads, kind, at_once, main_grad)
        for main_grad in (False, True)
    ]
    for plain, direct in zip(*both, strict=True):
        torch.testing.assert_close(direct[0], plain[0], rtol=0, atol=0)
        torch.testing.assert_close(direct[1], plain[1], rtol=1e-5, atol=1e-6)
        assert all(grad.is_sparse and grad._nnz() == 0 for grad in direct[2])


def test_bf16_gradients_of_micro_batches_add_up_in_fp32():
    """A `.grad` of each is rounded to bf16 before it is added to an fp32 buffer; a main_grad's is
    not."""
    heads, shard = make_heads(rows=12, dtype=torch.bfloat16), [0, PADDED]
    row_weight = torch.arange(1.0, 5).repeat(3)
    _, _, want = of_heads(linear_losses("reverse_kl"), heads, row_weight)

    def error(main_grad: bool) -> float:
        result = run_ranks(1, micro_batches_on_rank, shard, heads, "reverse_kl", True, main_grad)
        return ((result[0][1].double() - want).norm() / want.norm()).item()

    assert error(main_grad=True) < 1e-5
    assert error(main_grad=False) > 1e-4


def test_a_gradient_added_ahead_takes_no_factor():
    shard = VocabShard(0, PADDED, None, SIZE)
    local = local_heads(make_heads(), shard)
    local[1].main_grad = torch.zeros_like(local[1])
    loss = linear_divergence(*local, shard, "reverse_kl", 4, torch.ones(11))
    with pytest.raises(RuntimeError, match="the sum must be what is differentiated"):
        (3 * loss).backward()


def test_without_grad_no_gradient_is_formed(monkeypatch):
    monkeypatch.setattr(projection, "HeadGradients", None)
    shard = VocabShard(0, PADDED, None, SIZE)
    local = local_heads(make_heads(), shard)
    with torch.no_grad():
        loss = linear_divergence(*local, shard, "reverse_kl", 4, torch.ones(11))
    frozen = [t.detach() for t in local]
    assert torch.equal(linear_divergence(*frozen, shard, "reverse_kl", 4, torch.ones(11)), loss)
    assert not loss.requires_grad


# ---------------------------------------------------------------- absent ids, and top-K teachers

ABSENT = torch.tensor([0, 3, 47, 48, 89])


def sampled_on_rank(bounds, heads, tokens):
    shard = replace(shard_of(bounds), absent=ABSENT)
    local = local_heads(heads, shard)
    return score_sampled(*local, tokens, 16, shard, 4), score_hidden(*local, 16, shard, 4)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_sampled_tokens_have_the_teachers_log_probability(layout):
    """One of each shard, and of tokens that take no part; the other scores stay, bit for bit."""
    heads = make_heads()
    tokens = torch.tensor([1, SIZE - 2, 2, 3, 80, 46, 49, SIZE, 50, 24, 70])
    by_rank = run_ranks(len(LAYOUTS[layout]) - 1, sampled_on_rank, LAYOUTS[layout], heads, tokens)
    logits = heads[2].double() @ heads[3].double().t()
    present = torch.tensor([v for v in range(SIZE) if v not in ABSENT])
    want = torch.full_like(logits, -torch.inf)
    want[:, present] = dense.log_probs(logits[:, present])
    want = want.gather(1, tokens[:, None])[:, 0]
    assert want.isinf().tolist() == [i in (3, 7) for i in range(11)]
    for scores, others in by_rank:
        got = scores.teacher_log_prob
        assert got.dtype == torch.float32 and others.teacher_log_prob is None
        torch.testing.assert_close(got.double(), want, rtol=1e-6, atol=2e-6)
        for field in ("disagreement", "compatibility", "student_entropy", "teacher_entropy"):
            assert torch.equal(getattr(scores, field), getattr(others, field))


def test_a_topk_teacher_says_nothing_of_tokens_it_lacks():
    shard = VocabShard(0, PADDED, None, SIZE, ABSENT)
    heads = TopkOutputHeads(torch.randn(PADDED, 8), shard, chunk_rows=2)
    tokens = torch.tensor([1, 47, SIZE])  # the others are the student's alone
    reported = TopkRows(
        torch.arange(5).repeat(3, 1), torch.full((3, 5), -2.0), torch.tensor([-0.5, -1.0, -1.5])
    )
    scores = heads.scores(torch.randn(3, 8), reported.pack(), tokens, 2)
    assert scores.teacher_log_prob.tolist() == [-0.5, -torch.inf, -torch.inf]


def absent_on_rank(bounds, heads, kind):
    shard = replace(shard_of(bounds), absent=ABSENT)
    local = local_heads(heads, shard)
    losses = linear_divergence(*local, shard, kind, 4)
    losses.sum().backward()
    scores = score_hidden(*local, 16, shard, chunk_rows=4)
    tokens = torch.full((len(losses),), 47)
    log_probs = token_log_probs(*local[:2], tokens, shard).detach()
    return losses.detach(), local[0].grad, local[1].grad, scores, log_probs


@pytest.mark.parametrize("kind", DIVERGENCES)
@pytest.mark.parametrize("layout", ["one", "unequal", "quarters"])
def test_absent_ids_take_part_in_nothing(layout, kind):
    heads = make_heads()
    present = [v for v in range(SIZE) if v not in ABSENT]
    everything = torch.ones(len(heads[0]))
    want, _, _ = of_heads(linear_losses(kind, present), heads, everything)
    by_rank = run_ranks(len(LAYOUTS[layout]) - 1, absent_on_rank, LAYOUTS[layout], heads, kind)
    losses, _, _, scores, log_probs = by_rank[0]
    torch.testing.assert_close(losses.double(), want, rtol=2e-6, atol=2e-7)
    gradients = [grads for _, *grads, _, _ in by_rank]
    assert_gradients(gradients, linear_losses(kind, present), heads, everything)
    student, teacher = (
        hidden.double() @ weight[present].double().t() for hidden, weight in (heads[:2], heads[2:])
    )
    compatibility = dense.compatibility(student, teacher, 16)
    torch.testing.assert_close(scores.compatibility.double(), compatibility, rtol=1e-5, atol=1e-6)
    assert (log_probs == -torch.inf).all()


def make_reports(heads, k: int = 6):
    """The top-K of the teacher's head, whose columns from SIZE on are ids of its own."""
    teacher = heads[2] @ heads[3].nan_to_num(0.3).t()
    log_probs, ids = teacher.log_softmax(1).topk(k, dim=1)
    return ids, log_probs


def topk_on_rank(bounds, heads, reports, kind, chunk_rows, row_weight, at_once):
    shard = shard_of(bounds)
    student = local_heads(heads, shard)[:2]
    weights = row_weight if at_once else None
    loss = linear_topk_divergence(*student, *reports, shard, kind, chunk_rows, weights)
    (3 * loss).backward(None if at_once else row_weight)
    return loss.detach(), student[0].grad / 3, student[1].grad / 3


@pytest.mark.parametrize("at_once", [False, True])
@pytest.mark.parametrize("kind", DIVERGENCES)
@on_every_layout
def test_linear_topk_divergence_matches_the_oracle(bounds, kind, at_once):
    heads, row_weight = make_heads(), torch.linspace(-0.5, 1, 11)
    reports = make_reports(heads)

    def losses(hidden, weight):
        return dense.topk_divergence(hidden @ weight[:SIZE].t(), *reports, kind, SIZE)

    want, _, _ = of_heads(losses, heads[:2], row_weight)
    by_rank = run_ranks(
        len(bounds) - 1, topk_on_rank, bounds, heads, reports, kind, 4, row_weight, at_once
    )
    value = (want * row_weight).sum() if at_once else want
    torch.testing.assert_close(by_rank[0][0].double(), value, rtol=2e-6, atol=1e-6)
    assert_gradients([grads for _, *grads in by_rank], losses, heads[:2], row_weight)


# ------------------------------------------------------------------------------------- token log p


def token_log_probs_on_rank(bounds, hidden, weight, tokens, grad):
    shard = shard_of(bounds)
    hidden = hidden.clone().requires_grad_()
    weight = weight[shard.start : shard.stop].clone().requires_grad_()
    log_probs = token_log_probs(hidden, weight, tokens, shard, chunk_rows=4)
    log_probs.backward(grad)
    return log_probs.detach(), hidden.grad, weight.grad


@on_every_layout
def test_token_log_probs_match_the_oracle_on_every_layout(bounds):
    hidden, weight, _, _ = make_heads()
    tokens = torch.tensor([0, 4, 5, 6, 7, 24, 47, 48, 72, 88, 89])
    grad = torch.linspace(-1, 2, 11)

    def log_probs(hidden, weight):
        return dense.log_probs(hidden @ weight[:SIZE].t())[torch.arange(11), tokens]

    want, _, _ = of_heads(log_probs, (hidden, weight), grad)
    by_rank = run_ranks(
        len(bounds) - 1, token_log_probs_on_rank, bounds, hidden, weight, tokens, grad
    )
    torch.testing.assert_close(by_rank[0][0].double(), want, rtol=2e-6, atol=2e-7)
    assert_gradients([grads for _, *grads in by_rank], log_probs, (hidden, weight), grad)


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
    calls = {
        "score": record_collectives(lambda: score_hidden(*local, k, shard, 4)),
        "sampled": record_collectives(lambda: score_sampled(*local, tokens, k, shard, 4)),
    }
    for kind in DIVERGENCES:
        for name, row_weight in ((kind, None), (f"{kind} at once", ones)):
            losses = []
            calls[name] = record_collectives(
                lambda n=kind, w=row_weight, out=losses: out.append(
                    linear_divergence(*local, shard, n, 4, w).sum()
                )
            )
            calls[f"{name} backward"] = record_collectives(losses[0].backward)
    reports, losses = (torch.zeros(len(hidden), k, dtype=torch.int64),) * 2, []
    calls["topk"] = record_collectives(
        lambda: losses.append(linear_topk_divergence(hidden, weight, *reports, shard, "jsd", 4))
    )
    calls["topk backward"] = record_collectives(losses[0].sum().backward)
    calls["tokens"] = record_collectives(lambda: token_log_probs(hidden, weight, tokens, shard, 4))
    log_probs = token_log_probs(hidden, weight, tokens, shard, 4).sum()
    calls["tokens backward"] = record_collectives(log_probs.backward)
    return calls


def test_collectives_and_their_bytes():
    """11 rows in chunks of 4, 4, 3; the same on all ranks, whatever their number of columns."""
    k = 16
    by_rank = run_ranks(2, communication_on_rank, LAYOUTS["unequal"], make_heads(), k)
    per_row = {
        "score": [24 * k + 24],
        "sampled": [24 * k + 28],
        "topk": [4 * k + 8],
        "tokens": [12],
    }
    for kind in DIVERGENCES:
        per_row[kind] = [20] if kind in ("reverse_kl", "forward_kl") else [16, 8]
        per_row[f"{kind} at once"] = per_row[kind]
    want = {
        name: [("all_gather_into_tensor", rows * size) for rows in (4, 4, 3) for size in sizes]
        for name, sizes in per_row.items()
    }
    want |= {f"{name} backward": [] for name in per_row if name not in ("score", "sampled")}
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


# ------------------------------------------------------------------------------------------ memory


def test_a_byte_budget_gives_rows():
    assert rows_within(1 << 30, 151_936) == 704  # in tiles of 64
    assert rows_within(1 << 30, 151_936 // 8) == 5632
    assert rows_within(50_000_000, 151_936) == 32
    assert rows_within(1, 151_936) == 1


@pytest.mark.parametrize("rows", [64, 1024])
def test_memory_does_not_grow_with_the_rows(rows):
    """Beyond inputs and gradients: logits of a chunk of both models, and a few rows more."""
    generator = torch.Generator().manual_seed(0)
    width, chunk_rows = 20_000, 32
    heads = [torch.randn(s, generator=generator) for s in ((rows, 8), (width, 8)) * 2]
    shard = VocabShard(0, width, None, width)
    logits_bytes = 2 * chunk_rows * width * 4
    with peak_memory() as scoring:
        score_hidden(*heads, 16, shard, chunk_rows)
    assert logits_bytes <= scoring.peak <= 1.5 * logits_bytes
    for kind in DIVERGENCES:
        for row_weight in (None, torch.ones(rows)):
            student = [t.clone().requires_grad_() for t in heads[:2]]
            with peak_memory() as loss:
                linear_divergence(
                    *student, *heads[2:], shard, kind, chunk_rows, row_weight
                ).sum().backward()
            assert loss.temporaries <= 2.5 * logits_bytes, kind


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_main_grad_is_all_that_a_weights_gradient_takes(dtype):
    rows, width, depth = 12, 20_000, 128
    generator = torch.Generator().manual_seed(0)
    shapes = ((rows, depth), (width, depth)) * 2
    heads = [torch.randn(s, generator=generator).to(dtype) for s in shapes]
    student = [t.requires_grad_() for t in heads[:2]]
    student[1].main_grad = torch.zeros(width, depth)
    shard, matrix = VocabShard(0, width, None, width), heads[1].nbytes
    for row_weight in (None, torch.ones(rows)):
        with peak_memory() as memory:
            linear_divergence(
                *student, *heads[2:], shard, "reverse_kl", 4, row_weight
            ).sum().backward()
        assert memory.peak < matrix
        student[1].grad = None
