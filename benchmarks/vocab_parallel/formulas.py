"""What scores and losses are, of dense logits of any float type: also the float64 reference."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_taopd import TokenScores


@dataclass(frozen=True)
class Formula:
    """What a loss computes: its name, and it, of [R, V] logits of student and teacher, and of K."""

    name: str
    dense: Callable[[Tensor, Tensor, int], Tensor]


def dense_scores(student_logits: Tensor, teacher_logits: Tensor, k: int) -> TokenScores:
    """[R, V] logits of the whole vocabulary → scores, by their definitions."""
    log_p, log_q = student_logits.log_softmax(1), teacher_logits.log_softmax(1)
    top = [logits.topk(k, dim=1).indices for logits in (student_logits, teacher_logits)]
    ids = torch.cat(top, dim=1)
    return TokenScores(
        disagreement=disagreement(ids, log_p.gather(1, ids), log_q.gather(1, ids)),
        compatibility=log_q.gather(1, top[0]).exp().sum(1),
        student_entropy=-(log_p.exp() * log_p).sum(1),
        teacher_entropy=-(log_q.exp() * log_q).sum(1),
    )


def disagreement(ids: Tensor, log_p: Tensor, log_q: Tensor) -> Tensor:
    """[R] KL(q ‖ p) over the set of the ids [R, 2K], renormalised; an id twice counts once."""
    ids, order = ids.sort(dim=1)
    again = torch.nn.functional.pad(ids.diff(dim=1) == 0, (1, 0))
    log_p, log_q = (
        x.gather(1, order).masked_fill(again, -torch.inf).log_softmax(1) for x in (log_p, log_q)
    )
    return (log_q.exp() * (log_q - log_p).masked_fill(again, 0)).sum(1)


def dense_loss(student_logits: Tensor, teacher_logits: Tensor, k: int = 0) -> Tensor:
    """Mean reverse KL of [R, V] logits of the whole vocabulary."""
    log_p, log_q = student_logits.log_softmax(1), teacher_logits.log_softmax(1)
    return (log_p.exp() * (log_p - log_q)).sum(1).mean()


def on_topk(student_logits: Tensor, teacher_logits: Tensor, k: int) -> Tensor:
    """Mean over rows of Σ q (log q − log p) over the teacher's K ids: neither is renormalised."""
    log_q, ids = teacher_logits.log_softmax(1).topk(k, dim=1)
    return (log_q.exp() * (log_q - student_logits.log_softmax(1).gather(1, ids))).sum(1).mean()


def on_topk_and_rest(student_logits: Tensor, teacher_logits: Tensor, k: int) -> Tensor:
    """Mean forward KL of K+1 events: the teacher's K ids, and all others together."""
    log_q, ids = teacher_logits.log_softmax(1).topk(k, dim=1)
    log_p = student_logits.log_softmax(1)
    rest = log_p.scatter(1, ids, -torch.inf).logsumexp(1)
    q_rest = 1 - log_q.exp().sum(1)
    within = (log_q.exp() * (log_q - log_p.gather(1, ids))).sum(1)
    return (within + q_rest * (q_rest.log() - rest)).mean()


REVERSE_KL = Formula("reverse KL", dense_loss)
ON_TOPK = Formula("forward KL, top K", on_topk)
ON_TOPK_AND_REST = Formula("forward KL, top K + rest", on_topk_and_rest)
