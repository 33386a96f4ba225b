"""The loss of kept rows: sums that add up, and a policy gradient that means what it says."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
from support import dense
from support.ranks import run_ranks
from support.rounding import assert_rounded

from megatron_taopd.config.schema import LossSection
from megatron_taopd.parallel.vocab import DIVERGENCES, VocabShard, token_log_probs
from megatron_taopd.step.loss import LOSSES, kept_row_loss
from megatron_taopd.step.output_heads import OutputHeads

SIZE = 12
WHOLE = VocabShard(0, SIZE, None, SIZE)


def make_heads(rows: int):
    generator = torch.Generator().manual_seed(rows)
    student_hidden, teacher_hidden = torch.randn(2, rows, 6, generator=generator)
    student_weight, teacher_weight = torch.randn(2, SIZE, 6, generator=generator)
    return student_hidden, student_weight, teacher_hidden, teacher_weight


def loss_and_gradients(kind, heads, shard=WHOLE, tokens=None, rollout_log_probs=None, **parameters):
    hidden, weight, teacher_hidden, teacher_weight = heads
    here = slice(shard.start, shard.stop)
    hidden, weight = hidden.clone().requires_grad_(), weight[here].clone().requires_grad_()
    loss, metrics = kept_row_loss(
        LossSection(kind, **parameters),
        OutputHeads(weight, teacher_weight[here], shard, chunk_rows=4),
        hidden,
        teacher_hidden,
        tokens,
        rollout_log_probs,
    )
    loss.backward()
    return loss.detach(), hidden.grad, weight.grad, metrics


def log_probs(hidden, weight):
    return dense.log_probs(hidden.double() @ weight.double().t())


def summed(loss, heads, dtype=torch.float64):
    """`loss(student's logits, teacher's)`, and its gradients in the student's hidden states and
    weight, dense."""
    hidden, weight, teacher_hidden, teacher_weight = (t.to(dtype, copy=True) for t in heads)
    hidden.requires_grad_(), weight.requires_grad_()
    value = loss(hidden @ weight.t(), teacher_hidden @ teacher_weight.t())
    return value.detach(), *torch.autograd.grad(value, (hidden, weight))


def assert_summed(got, loss, heads):
    """(loss, hidden, weight gradient) are those of `summed`, as near as float32 comes to it."""
    exact = summed(loss, heads)
    with dense.in_float32():
        plain = summed(loss, heads, torch.float32)
    for name, *values in zip(("loss", "hidden", "weight"), got, exact, plain, strict=True):
        assert_rounded(values[0].view_as(values[1]), *values[1:], name)


def reverse_kl(student, teacher):
    return dense.divergence(student, teacher).sum()


@pytest.mark.parametrize("kind", DIVERGENCES)
def test_a_divergence_is_summed_over_rows(kind):
    heads = make_heads(9)
    *got, metrics = loss_and_gradients(kind, heads, beta=0.3, alpha=0.2)
    assert_summed(got, lambda *z: dense.divergence(*z, kind, beta=0.3, alpha=0.2).sum(), heads)
    assert not metrics


def sampled_options(heads, rows):
    generator = torch.Generator().manual_seed(1)
    tokens = torch.randint(SIZE, (rows,), generator=generator)
    on_policy = log_probs(*heads[:2])[torch.arange(rows), tokens].float()
    return {"tokens": tokens, "rollout_log_probs": on_policy + 0.1}


@pytest.mark.parametrize("kind", LOSSES)
def test_micro_batches_add_up(kind):
    """Rows dealt 0 + 2 + 7 give the loss, gradients and metrics of 9 at once."""
    heads = make_heads(9)
    options = sampled_options(heads, 9) if kind == "sampled_token" else {}
    loss, hidden_grad, weight_grad, metrics = loss_and_gradients(kind, heads, **options)
    parts = []
    for rows in slice(0, 0), slice(0, 2), slice(2, 9):
        some = (heads[0][rows], heads[1], heads[2][rows], heads[3])
        parts.append(loss_and_gradients(kind, some, **{n: v[rows] for n, v in options.items()}))
    assert parts[0][0] == 0
    torch.testing.assert_close(sum(p[0] for p in parts), loss)
    torch.testing.assert_close(torch.cat([p[1] for p in parts]), hidden_grad)
    torch.testing.assert_close(sum(p[2] for p in parts), weight_grad)
    assert bool(metrics) == (kind == "sampled_token")
    for name in metrics:
        torch.testing.assert_close(sum(p[3][name] for p in parts), metrics[name])


def expected_sampled_token(heads, rollout_log_probs):
    """Loss and gradients over all tokens of one row, each with its probability of being sampled."""
    total = [0.0, 0.0, 0.0]
    for token in range(SIZE):
        log_p = rollout_log_probs[:, token].float()
        *parts, _ = loss_and_gradients(
            "sampled_token", heads, tokens=torch.tensor([token]), rollout_log_probs=log_p
        )
        total = [t + log_p.double().exp() * p for t, p in zip(total, parts, strict=True)]
    return total


@pytest.mark.parametrize("off_policy", [False, True])
def test_sampled_token_is_unbiased_for_reverse_kl(off_policy):
    """Its expectation, summed out over the vocabulary, has the loss and gradient of the KL.

    Off policy the tokens come from other weights, and the importance ratio makes up for it.
    """
    heads = make_heads(1)
    sampler = heads[1] + 0.5 * make_heads(2)[1] if off_policy else heads[1]
    got = expected_sampled_token(heads, log_probs(heads[0], sampler))
    assert_summed(got, reverse_kl, heads)


def test_the_log_ratio_back_propagated_directly_learns_nothing_from_the_teacher():
    """Why sampled_token is a policy gradient: this one's expected gradient is zero."""
    heads = make_heads(1)
    _, exact, _ = summed(reverse_kl, heads)
    log_p_s, log_p_t = log_probs(*heads[:2]), log_probs(*heads[2:])
    expected = torch.zeros(1, 6)
    for token in range(SIZE):
        hidden = heads[0].clone().requires_grad_()
        log_p = token_log_probs(hidden, heads[1], torch.tensor([token]), WHOLE)
        (log_p - log_p_t[:, token].float()).sum().backward()
        expected += log_p_s[0, token].exp().float() * hidden.grad
    assert expected.norm() < 1e-5
    assert exact.norm() > 0.1


def test_on_policy_the_loss_is_the_log_ratio_and_only_weighs_the_gradient():
    """Σ log-ratio·∇log p_S(y), row by row: the log-ratio itself is a constant."""
    heads = make_heads(9)
    options = sampled_options(heads, 9)
    rows, tokens = torch.arange(9), options["tokens"]
    options["rollout_log_probs"] = log_probs(*heads[:2])[rows, tokens].float()
    loss, *gradients, metrics = loss_and_gradients("sampled_token", heads, **options)

    def wanted(student, teacher):
        log_p_s, log_p_t = (dense.log_probs(z)[rows, tokens] for z in (student, teacher))
        log_ratio = (log_p_s - log_p_t).detach()
        return (log_ratio * (1 + log_p_s - log_p_s.detach())).sum()

    assert_summed([loss, *gradients], wanted, heads)
    torch.testing.assert_close(metrics["log_ratio"], loss)
    torch.testing.assert_close(metrics["importance_ratio"].item(), 9.0, rtol=1e-5, atol=0)


def test_a_ratio_above_the_most_counts_as_that_and_keeps_its_gradient():
    heads = make_heads(9)
    options = sampled_options(heads, 9)
    rows, tokens = torch.arange(9), options["tokens"]
    on_policy = log_probs(*heads[:2])[rows, tokens].float()
    options["rollout_log_probs"] = on_policy - torch.linspace(-1, 1, 9).float()
    *got, metrics = loss_and_gradients("sampled_token", heads, max_ratio=1.6, **options)

    def wanted(student, teacher):
        log_p_s, log_p_t = (dense.log_probs(z)[rows, tokens] for z in (student, teacher))
        ratios = (log_p_s.detach() - options["rollout_log_probs"]).exp().clamp(max=1.6)
        return (ratios * (log_p_s - log_p_t).detach() * (1 + log_p_s - log_p_s.detach())).sum()

    assert_summed(got, wanted, heads)
    ratios = torch.linspace(-1, 1, 9).exp()
    assert metrics["truncated_ratio"] == (ratios > 1.6).sum() == 3
    torch.testing.assert_close(metrics["importance_ratio"], ratios.sum())


def test_a_token_only_one_model_knows_contributes_nothing():
    heads = make_heads(3)
    options = sampled_options(heads, 3)
    common = VocabShard(0, SIZE, None, SIZE - 2)
    options["tokens"] = torch.tensor([1, SIZE - 1, 4])
    loss, hidden_grad, weight_grad, metrics = loss_and_gradients(
        "sampled_token", heads, common, **options
    )
    assert loss.isfinite()
    assert weight_grad.isfinite().all()
    assert (hidden_grad[1] == 0).all()
    rest = [0, 2]
    some = (heads[0][rest], heads[1], heads[2][rest], heads[3])
    without, _, _, metrics_without = loss_and_gradients(
        "sampled_token", some, common, **{n: v[rest] for n, v in options.items()}
    )
    torch.testing.assert_close(loss, without)
    torch.testing.assert_close(metrics, metrics_without)


def loss_on_rank(bounds, kind, heads, options):
    rank = dist.get_rank()
    shard = VocabShard(bounds[rank], bounds[rank + 1], dist.group.WORLD, SIZE)
    return loss_and_gradients(kind, heads, shard, **options)


@pytest.mark.parametrize("kind", LOSSES)
def test_shards_agree_with_the_whole(kind):
    heads = make_heads(9)
    options = sampled_options(heads, 9) if kind == "sampled_token" else {}
    loss, hidden_grad, weight_grad, metrics = loss_and_gradients(kind, heads, **options)
    by_rank = run_ranks(2, loss_on_rank, [0, 5, SIZE], kind, heads, options)
    for rank_loss, _, _, rank_metrics in by_rank:
        torch.testing.assert_close(rank_loss, loss, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(rank_metrics, metrics, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(sum(r[1] for r in by_rank), hidden_grad, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(
        torch.cat([r[2] for r in by_rank]), weight_grad, rtol=1e-5, atol=1e-5
    )


def test_unknown_losses_are_refused():
    with pytest.raises(ValueError, match="loss kind is 'kl': must be one of reverse_kl, "):
        loss_and_gradients("kl", make_heads(1))
