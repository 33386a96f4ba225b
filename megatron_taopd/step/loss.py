"""The loss of the kept rows of one micro-batch.

Everything is a *sum* over the rows given. The caller divides by the number of kept rows of the
whole batch (Eq. 7), so that nothing depends on how the rows were dealt to micro-batches and ranks.
"""

from __future__ import annotations

import torch
from torch import Tensor

from megatron_taopd.parallel.vocab import (
    DIVERGENCES,
    VocabShard,
    linear_divergence,
    linear_topk_divergence,
    token_log_probs,
)

LOSSES = (*DIVERGENCES, "sampled_token")


def kept_row_loss(
    kind: str,
    student_hidden: Tensor,
    student_weight: Tensor,
    teacher_hidden: Tensor,
    teacher_weight: Tensor,
    shard: VocabShard,
    chunk_rows: int = 1024,
    beta: float = 0.5,
    alpha: float = 0.1,
    tokens: Tensor | None = None,
    rollout_log_probs: Tensor | None = None,
) -> tuple[Tensor, dict[str, Tensor]]:
    """Sum over rows of the loss, and sums for the log.

    Args:
        kind: one of LOSSES.
        student_hidden: [R, D_s], and teacher_hidden: [R, D_t], the kept rows, the same on every
            rank of shard.group; possibly none.
        student_weight: [V, D_s], and teacher_weight: [V, D_t], this rank's rows of the heads.
        beta, alpha: of jsd and of skewed_reverse_kl.
        tokens: [R] int64 the sampled tokens, for sampled_token only.
        rollout_log_probs: [R] fp32 their log-probabilities when they were sampled, likewise.

    Returns:
        The scalar loss, differentiable in student_hidden (this shard's part: see
        `linear_divergence`) and student_weight; and detached fp32 scalars. For a divergence there
        are none. For sampled_token `log_ratio`, Σ log p_S(y) − log p_T(y), which is the one-sample
        estimate of the reverse KL; and `importance_ratio`, Σ p_S(y)/μ(y).

    Collectives: for every chunk those of `linear_divergence`, or for sampled_token two all-gathers
    of 12 bytes a row and rank.

    Raises:
        ValueError: an unknown kind; beta or alpha outside (0, 1).
    """
    _check(kind)
    if kind == "sampled_token":
        log_p_s = token_log_probs(student_hidden, student_weight, tokens, shard, chunk_rows)
        with torch.no_grad():
            log_p_t = token_log_probs(teacher_hidden, teacher_weight, tokens, shard, chunk_rows)
        return sampled_token_loss(log_p_s, log_p_t, rollout_log_probs)
    loss = linear_divergence(
        student_hidden,
        student_weight,
        teacher_hidden,
        teacher_weight,
        shard,
        kind,
        chunk_rows,
        row_weight=torch.ones(len(student_hidden), device=student_hidden.device),
        beta=beta,
        alpha=alpha,
    )
    return loss, {}


def kept_row_topk_loss(
    kind: str,
    student_hidden: Tensor,
    student_weight: Tensor,
    teacher_ids: Tensor,
    teacher_log_probs: Tensor,
    teacher_token_log_probs: Tensor,
    shard: VocabShard,
    chunk_rows: int = 1024,
    beta: float = 0.5,
    alpha: float = 0.1,
    tokens: Tensor | None = None,
    rollout_log_probs: Tensor | None = None,
) -> tuple[Tensor, dict[str, Tensor]]:
    """`kept_row_loss` from a teacher that reports its top-K and the sampled token only.

    A divergence is that of K+1 events, all other tokens being one: a lower bound of the whole one
    (`topk_divergence`). sampled_token loses nothing, but that the teacher's log-probability is not
    renormalised over the common vocabulary.

    Args:
        teacher_ids, teacher_log_probs: [R, K] as for `topk_divergence`.
        teacher_token_log_probs: [R] of the sampled tokens, over the teacher's whole vocabulary.

    Collectives: for every chunk those of `linear_topk_divergence`, or for sampled_token one
    all-gather of 12 bytes a row and rank.

    Raises:
        ValueError: an unknown kind; beta or alpha outside (0, 1).
    """
    _check(kind)
    if kind == "sampled_token":
        log_p_s = token_log_probs(student_hidden, student_weight, tokens, shard, chunk_rows)
        return sampled_token_loss(log_p_s, teacher_token_log_probs, rollout_log_probs)
    loss = linear_topk_divergence(
        student_hidden,
        student_weight,
        teacher_ids,
        teacher_log_probs,
        shard,
        kind,
        chunk_rows,
        row_weight=torch.ones(len(student_hidden), device=student_hidden.device),
        beta=beta,
        alpha=alpha,
    )
    return loss, {}


def _check(kind: str) -> None:
    if kind not in LOSSES:
        raise ValueError(f"loss kind is {kind!r}: must be one of {', '.join(LOSSES)}")


def sampled_token_loss(
    student_log_probs: Tensor, teacher_log_probs: Tensor, rollout_log_probs: Tensor
) -> tuple[Tensor, dict[str, Tensor]]:
    """Reverse KL from the sampled token alone, as a policy gradient.

    The advantage is A = −(log p_S(y) − log p_T(y)), detached, and the loss −Σ (p_S(y)/μ(y))·A with
    μ the policy that sampled y. Its gradient, Σ (p_S/μ)·(log p_S − log p_T)·∇log p_S, is unbiased
    for that of KL(p_S ‖ p_T) at the contexts given, whatever the age of μ, as long as μ is the full
    distribution at temperature 1; on policy the ratio is 1. No clipping: it would bias. (The
    log-ratio back-propagated directly has the gradient ∇log p_S(y), zero on average whatever the
    teacher says.)

    A token outside the common vocabulary (log-probabilities −inf) has p_S(y)/μ(y) = 0 and
    contributes nothing.

    Args:
        student_log_probs: [R], differentiable.
        teacher_log_probs, rollout_log_probs: [R], constants.

    Returns:
        The scalar loss, and the sums described at `kept_row_loss`.
    """
    known = student_log_probs.detach() > -torch.inf
    log_ratio = (student_log_probs - teacher_log_probs).detach().where(known, 0.0)
    importance = (student_log_probs - rollout_log_probs.detach()).exp()
    loss = (importance * log_ratio).sum()
    return loss, {"log_ratio": log_ratio.sum(), "importance_ratio": importance.detach().sum()}
