"""The loss of the kept rows of one micro-batch.

Everything is a *sum* over the rows given. The caller divides by the number of kept rows of the
whole batch (Eq. 7), so that nothing depends on how the rows were dealt to micro-batches and ranks.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from megatron_taopd.config.schema import LossSection
from megatron_taopd.parallel.vocab import DIVERGENCES

if TYPE_CHECKING:  # whoever checks a configuration looks at LOSSES, and needs no Megatron for it
    from megatron_taopd.step.output_heads import OutputHeads, TopkOutputHeads

LOSSES = (*DIVERGENCES, "sampled_token")


def metric_names(kind: str) -> tuple[str, ...]:
    """Return the names of what `kept_row_loss` says of rows besides their loss."""
    return ("log_ratio", "importance_ratio", "truncated_ratio") if kind == "sampled_token" else ()


def kept_row_loss(
    loss: LossSection,
    heads: OutputHeads | TopkOutputHeads,
    student_hidden: Tensor,
    teacher_rows: Tensor,
    tokens: Tensor,
    rollout_log_probs: Tensor,
    weights: Tensor | None = None,
) -> tuple[Tensor, dict[str, Tensor]]:
    """Sum the loss over rows, and what the log wants to know of it.

    Args:
        loss: its kind, one of LOSSES, and the parameters of that.
        student_hidden: [R, D_s] the kept rows, the same on every rank of the heads' group; possibly
            none.
        teacher_rows: what the teacher says of them, as the heads take it.
        tokens: [R] int64 the sampled tokens, for sampled_token only.
        rollout_log_probs: [R] fp32 their log-probabilities when they were sampled, likewise.
        weights: [R] fp32, constants by which each row's loss is multiplied; None: 1.

    Returns:
        The scalar loss, differentiable in student_hidden (this shard's part: see
        `linear_divergence`) and the student's head; and the detached fp32 scalars of
        `metric_names`, without weights. For sampled_token `log_ratio`, Σ log p_S(y) − log p_T(y),
        which is the one-sample estimate of the reverse KL; `importance_ratio`, Σ p_S(y)/μ(y), not
        truncated; and `truncated_ratio`, the number of rows whose ratio is above loss.max_ratio. A
        teacher that reports its top-K only has a log p_T that is not renormalised over the common
        vocabulary.

    Collectives: for every chunk those of the heads' divergence, or for sampled_token one all-gather
    of 12 bytes a row and rank for each model that has a head here.

    Raises:
        ValueError: an unknown kind; beta or alpha outside (0, 1).
    """
    if loss.kind not in LOSSES:
        raise ValueError(f"loss kind is {loss.kind!r}: must be one of {', '.join(LOSSES)}")
    if weights is None:
        weights = torch.ones(len(student_hidden), device=student_hidden.device)
    if loss.kind != "sampled_token":
        return heads.divergence(student_hidden, teacher_rows, loss, weights), {}
    return sampled_token_loss(
        heads.student_log_probs(student_hidden, tokens),
        heads.teacher_log_probs(teacher_rows, tokens),
        rollout_log_probs,
        weights,
        loss.max_ratio,
    )


def sampled_token_loss(
    student_log_probs: Tensor,
    teacher_log_probs: Tensor,
    rollout_log_probs: Tensor,
    weights: Tensor,
    max_ratio: float | None = None,
) -> tuple[Tensor, dict[str, Tensor]]:
    """Reverse KL from the sampled token alone, as a policy gradient.

    The advantage is A = −(log p_S(y) − log p_T(y)), detached, and the loss −Σ (p_S(y)/μ(y))·A with
    μ the policy that sampled y. Its gradient, Σ (p_S/μ)·(log p_S − log p_T)·∇log p_S, is unbiased
    for that of KL(p_S ‖ p_T) at the contexts given, whatever the age of μ, as long as μ is the full
    distribution at temperature 1; on policy the ratio is 1. A ratio above `max_ratio` counts as
    `max_ratio` (truncated importance sampling), which bounds what one stale token weighs and biases
    the estimate by what it cuts off. (The log-ratio back-propagated directly has the gradient
    ∇log p_S(y), zero on average whatever the teacher says.)

    A token outside the common vocabulary (log-probabilities −inf) has p_S(y)/μ(y) = 0 and
    contributes nothing.

    Args:
        student_log_probs: [R], differentiable.
        teacher_log_probs, rollout_log_probs, weights: [R], constants.
        max_ratio: None: no ratio is truncated.

    Returns:
        The scalar loss, and the sums described at `kept_row_loss`.
    """
    known = student_log_probs.detach() > -torch.inf
    log_ratio = (student_log_probs - teacher_log_probs).detach().where(known, 0.0)
    importance = (student_log_probs - rollout_log_probs.detach()).exp()
    ratio = importance.detach()
    bound = torch.inf if max_ratio is None else max_ratio
    # A constant factor: `clamp` of the ratio itself would take the truncated rows' gradient away.
    factor = torch.where(ratio > bound, bound / ratio, 1.0)
    loss = (weights * factor * importance * log_ratio).sum()
    return loss, {
        "log_ratio": log_ratio.sum(),
        "importance_ratio": ratio.sum(),
        "truncated_ratio": (ratio > bound).sum().float(),
    }
