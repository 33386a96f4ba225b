"""Divergences of sharded logits, and their gradients, against the dense float64 oracle."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from support import dense
from support.ranks import run_ranks
from support.rounding import assert_rounded
from support.shards import (
    LAYOUTS,
    PADDED,
    SIZE,
    columns,
    make_logits,
    on_every_layout,
    shard_of,
    spoil,
)

from megatron_taopd.parallel.vocab import (
    DIVERGENCES,
    VocabShard,
    divergence,
    topk_divergence,
)


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
            torch.testing.assert_close(loss, first, rtol=0, atol=0, equal_nan=True)
    return [
        (pair[0][0], torch.cat([g for _, g in pair], dim=1)) for pair in zip(*by_rank, strict=True)
    ]


def loss_and_gradient(divergence, student, grad):
    """(loss [R], gradient in the logits) of `divergence(logits)`: in float64, and in float32."""
    exact, plain = student.double().requires_grad_(), student.clone().requires_grad_()
    want = divergence(exact)
    want.backward(grad.double())
    with dense.in_float32():
        near = divergence(plain)
        near.backward(grad)
    return (want.detach(), exact.grad.nan_to_num()), (near.detach(), plain.grad.nan_to_num())


@on_every_layout
@pytest.mark.parametrize("kind", DIVERGENCES)
def test_divergence_and_gradient_match_the_oracle_on_every_layout(bounds, kind):
    kinds = ("flat", "plain", "peaked", "huge", "tied")
    logits = [make_logits(k) for k in kinds]
    grad = torch.linspace(-1, 2, 12)
    results = sharded_divergence(bounds, logits, kind, grad)
    for name, (student, teacher), got in zip(kinds, logits, results, strict=True):
        exact, plain = loss_and_gradient(
            lambda z, t=teacher: dense.divergence(z, t, kind, SIZE, beta=0.3, alpha=0.2),
            student, grad,
        )  # fmt: skip
        torch.testing.assert_close(got[0].double(), exact[0], rtol=2e-6, atol=2e-7)
        assert (got[1][:, SIZE:] == 0).all()
        assert_rounded(got[1], exact[1], plain[1], name)


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


@pytest.mark.parametrize("kind", DIVERGENCES)
@pytest.mark.parametrize("sign", [1, -1])
@pytest.mark.parametrize("whose", [0, 1], ids=["student", "teacher"])
def test_a_row_with_a_nan_has_a_nan_for_its_loss_and_its_gradient(kind, whose, sign):
    """On the shard that holds it and on all others; and no other row has."""
    clean, spoilt = make_logits("plain"), [*make_logits("plain")]
    for column in (0, 60):
        spoilt[whose] = spoil(clean[whose], 3, column, sign)
        ((loss, grad), _) = sharded_divergence(
            LAYOUTS["some empty"], [spoilt, clean], kind, torch.ones(12)
        )
        sound = torch.arange(12) != 3
        assert loss.isnan().tolist() == (~sound).tolist()
        assert grad[3, :SIZE].isnan().all() and grad[sound].isfinite().all()


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
    """Off by up to 2.5e-8 (a KL) or 7.5e-8 (of a mixture); plain float32 is by up to 4e-7, and a KL
    from two log-sums that were each rounded by 2e-7."""
    student = make_logits("plain", rows=400)[0]
    teacher = student + 1e-3 * make_logits("flat", rows=400)[0] + 7  # the log-sums differ by that
    pair = (student, teacher)
    ((loss, _),) = sharded_divergence(LAYOUTS["unequal"], [pair], kind, torch.ones(400))
    want = dense.divergence(*pair, kind, SIZE, beta=0.3, alpha=0.2)
    assert want.max() < 1e-7
    atol = 8e-8 if kind in ("reverse_kl", "forward_kl") else 2.5e-7
    torch.testing.assert_close(loss.double(), want, rtol=0, atol=atol)


def test_divergence_refuses_what_it_does_not_know():
    student, teacher = make_logits("plain")
    shard = VocabShard(0, PADDED, None, SIZE)
    with pytest.raises(ValueError, match="kind is 'mse': must be one of reverse_kl, forward_kl"):
        divergence(student, teacher, shard, "mse")
    with pytest.raises(ValueError, match=r"beta is 1.0: must be inside \(0, 1\)"):
        divergence(student, teacher, shard, "jsd", beta=1.0)


# ------------------------------------------------------------------------------------- absent ids

ABSENT = torch.tensor([0, 3, 47, 48, 89])


def absent_on_rank(bounds, logits, kind):
    shard = replace(shard_of(bounds), absent=ABSENT)
    student = columns(logits[0], shard).requires_grad_()
    loss = divergence(student, columns(logits[1], shard), shard, kind)
    loss.sum().backward()
    return loss.detach(), student.grad


@pytest.mark.parametrize("kind", DIVERGENCES)
@on_every_layout
def test_absent_ids_take_part_in_nothing(bounds, kind):
    student, teacher = make_logits("plain")
    present = [v for v in range(SIZE) if v not in ABSENT]
    exact, plain = loss_and_gradient(
        lambda z: dense.divergence(z[:, present], teacher[:, present], kind),
        student, torch.ones(12),
    )  # fmt: skip
    student[:, ABSENT], teacher[:, ABSENT] = 50.0, torch.nan
    by_rank = run_ranks(len(bounds) - 1, absent_on_rank, bounds, (student, teacher), kind)
    torch.testing.assert_close(by_rank[0][0].double(), exact[0], rtol=2e-6, atol=2e-7)
    grad = torch.cat([g for _, g in by_rank], dim=1)
    assert (grad[:, ABSENT] == 0).all()
    assert_rounded(grad, exact[1], plain[1])


# ----------------------------------------------------------- teachers that report their top-K only


def make_reports(k: int = 6, rows: int = 12):
    """A teacher's top-K ids and log-probabilities, of a vocabulary larger than the common one."""
    _, teacher = make_logits("plain", rows)
    teacher = torch.cat([teacher[:, :SIZE], teacher.new_full((rows, 10), 2.0)], dim=1)
    teacher[2, :k] = teacher[2, 90:93] = 9.0  # ids that the student does not have
    log_probs, ids = teacher.log_softmax(1).topk(k, dim=1)
    ids[4, -2:], log_probs[4, -2:] = -1, -torch.inf  # this row reports fewer
    log_probs[5] -= log_probs[5].logsumexp(0)  # and this one leaves nothing to the tail
    return ids, log_probs


def topk_on_rank(bounds, student, reports, kind, absent, grad):
    shard = replace(shard_of(bounds), absent=absent)
    student = columns(student, shard).requires_grad_()
    loss = topk_divergence(student, *reports, shard, kind, beta=0.3, alpha=0.2)
    loss.backward(grad)
    return loss.detach(), student.grad


@pytest.mark.parametrize("absent", [None, torch.tensor([1, 47, 48])], ids=["", "absent ids"])
@pytest.mark.parametrize("logits", ["plain", "peaked"])
@pytest.mark.parametrize("kind", DIVERGENCES)
@on_every_layout
def test_topk_divergence_matches_the_oracle(bounds, kind, logits, absent):
    student, _ = make_logits(logits)
    reports = make_reports()
    grad = torch.linspace(-1, 2, 12)
    by_rank = run_ranks(len(bounds) - 1, topk_on_rank, bounds, student, reports, kind, absent, grad)
    gone = () if absent is None else tuple(absent.tolist())
    exact, plain = loss_and_gradient(
        lambda z: dense.topk_divergence(z, *reports, kind, SIZE, gone, beta=0.3, alpha=0.2),
        student, grad,
    )  # fmt: skip
    torch.testing.assert_close(by_rank[0][0].double(), exact[0], rtol=2e-6, atol=1e-6)
    assert_rounded(torch.cat([g for _, g in by_rank], dim=1), exact[1], plain[1])


@pytest.mark.parametrize("kind", DIVERGENCES)
def test_reporting_less_can_only_shrink_a_divergence(kind):
    student, teacher = (z[:, :SIZE] for z in make_logits("plain"))
    shard = VocabShard(0, SIZE, None, SIZE)
    values = [divergence(student, teacher, shard, kind)]
    for k in (20, 5, 1):
        log_probs, ids = teacher.log_softmax(1).topk(k, dim=1)
        values.append(topk_divergence(student, ids, log_probs, shard, kind))
        assert (values[-1] <= values[-2] + 1e-6).all(), k
    log_probs, ids = teacher.double().log_softmax(1).topk(SIZE - 1, dim=1)
    all_but_one = topk_divergence(student, ids, log_probs, shard, kind)
    torch.testing.assert_close(all_but_one, values[0], rtol=1e-4, atol=1e-4)
