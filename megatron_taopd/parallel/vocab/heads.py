"""Scores and losses from hidden states: the heads, a bounded number of rows at a time."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from megatron_taopd.parallel.vocab import reductions
from megatron_taopd.parallel.vocab.divergences import Divergence, merge_normalizers
from megatron_taopd.parallel.vocab.projection import Projection, chunks, through_head
from megatron_taopd.parallel.vocab.scores import (
    TopSets,
    check_k,
    local_candidates,
    merge_candidates,
    merge_top_sets,
)
from megatron_taopd.parallel.vocab.shard import VocabShard
from megatron_taopd.types import TokenScores


@torch.no_grad()
def score_hidden(
    student_hidden: Tensor,
    student_weight: Tensor,
    teacher_hidden: Tensor,
    teacher_weight: Tensor,
    k: int,
    shard: VocabShard,
    chunk_rows: int,
    return_ids: bool = False,
) -> TokenScores:
    """Score hidden states as `score_rows` does logits, which exist for chunk_rows rows at a time.

    Args:
        student_hidden: [R, D_s], and teacher_hidden: [R, D_t], the same rows on every rank.
        student_weight: [V, D_s], and teacher_weight: [V, D_t], this rank's rows of the heads.

    Memory: logits of chunk_rows rows of both models.

    Collectives: for every chunk, one all-gather of 24K+24 bytes a row and rank.

    Raises:
        ValueError: k is not within 1 … shard.size.
    """
    student = Projection(student_hidden, student_weight, shard, chunk_rows)
    teacher = Projection(teacher_hidden, teacher_weight, shard, chunk_rows)
    return _score(student, teacher, k, shard, chunk_rows, return_ids=return_ids)


@torch.no_grad()
def score_sampled(
    student_hidden: Tensor,
    student_weight: Tensor,
    teacher_hidden: Tensor,
    teacher_weight: Tensor,
    tokens: Tensor,
    k: int,
    shard: VocabShard,
    chunk_rows: int,
) -> TokenScores:
    """Score hidden states as `score_hidden` does, the teacher's log-probabilities of tokens too.

    Args:
        tokens: [R] int64 global ids, the sampled token of each row.
        The others are those of `score_hidden`.

    Collectives: for every chunk, one all-gather of 24K+28 bytes a row and rank.

    Raises:
        ValueError: k is not within 1 … shard.size.
    """
    student = Projection(student_hidden, student_weight, shard, chunk_rows)
    teacher = Projection(teacher_hidden, teacher_weight, shard, chunk_rows)
    return _score(student, teacher, k, shard, chunk_rows, tokens)


def _score(
    student: Projection,
    teacher: Projection,
    k: int,
    shard: VocabShard,
    chunk_rows: int,
    tokens: Tensor | None = None,
    return_ids: bool = False,
) -> TokenScores:
    check_k(k, shard)
    scores = []
    for rows in list(chunks(len(student.hidden), chunk_rows)) or [slice(0, 0)]:
        z_s, z_t = student(rows).float(), teacher(rows).float()
        token_logits = None if tokens is None else shard.at_ids(z_t, tokens[rows, None])
        local = local_candidates(z_s, z_t, k, shard.start, token_logits)
        scores.append(merge_candidates(shard.all_gather(local), k, return_ids))
    return TokenScores.cat(scores)


class Compared(NamedTuple):
    """Both models at some rows: their top-K sets, and [R] fp32 in nats over the common vocabulary.

    Attributes:
        forward_kl, reverse_kl: KL(p_T ‖ p_S) and KL(p_S ‖ p_T).
        student_log_probs, teacher_log_probs: of one given token a row.
    """

    tops: TopSets
    forward_kl: Tensor
    reverse_kl: Tensor
    student_log_probs: Tensor
    teacher_log_probs: Tensor


@torch.no_grad()
def compare_hidden(
    student_hidden: Tensor,
    student_weight: Tensor,
    teacher_hidden: Tensor,
    teacher_weight: Tensor,
    tokens: Tensor,
    k: int,
    shard: VocabShard,
    chunk_rows: int,
) -> Iterator[Compared]:
    """Yield all that the diagnostic measures, a chunk of rows at a time (at least one chunk).

    A chunk's logits are computed once for all of it.

    Args:
        tokens: [R] int64 global ids whose log-probabilities are wanted; −inf for one that is not
            in the common vocabulary.
        The others are those of `score_hidden`.

    Memory: logits of chunk_rows rows of both models, and some copies of a part of them.

    Collectives: for every chunk, five all-gathers of 24K+88 bytes a row and rank in all.

    Raises:
        ValueError: k is not within 1 … shard.size.
    """
    check_k(k, shard)
    projections = (
        Projection(student_hidden, student_weight, shard, chunk_rows),
        Projection(teacher_hidden, teacher_weight, shard, chunk_rows),
    )
    for rows in list(chunks(len(tokens), chunk_rows)) or [slice(0, 0)]:
        student, teacher = (project(rows).float() for project in projections)
        local = local_candidates(student, teacher, k, shard.start)
        yield Compared(
            merge_top_sets(shard.all_gather(local), k),
            *(
                Divergence(shard, kind).forward(student, teacher)[0]
                for kind in ("forward_kl", "reverse_kl")
            ),
            *(_TokenLogProb(shard).forward(z, tokens[rows])[0] for z in (student, teacher)),
        )


@dataclass(frozen=True)
class _TokenLogProb:
    """The log-probability of one given token a row."""

    shard: VocabShard

    def forward(self, logits: Tensor, tokens: Tensor) -> tuple[Tensor, Tensor]:
        token_logit = self.shard.at_ids(logits, tokens[:, None])
        sent = torch.cat([reductions.log_normalizer(logits).to(logits.dtype), token_logit], dim=1)
        tops, log_sums, token_logits = self.shard.all_gather(sent).double().unbind(2)
        top, log_sum, _ = merge_normalizers(tops, log_sums)
        log_probs = token_logits.amax(0) - top - log_sum
        return log_probs.to(logits.dtype), torch.stack([top, log_sum], dim=1).to(logits.dtype)

    def gradient(
        self, logits: Tensor, tokens: Tensor, saved: Tensor, grad: Tensor, out: Tensor
    ) -> Tensor:
        """Write grad·(1[v = token] − p(v)), [R, width], to out, which may be the logits."""
        columns, here = self.shard.locate(tokens[:, None])
        top, log_sum = saved.split(1, dim=1)
        logits.sub_(top).sub_(log_sum).exp_().mul_(-grad[:, None])
        if logits.shape[1]:
            logits.scatter_add_(1, columns, grad[:, None].masked_fill(~here, 0))
        return logits if out is logits else out.copy_(logits)


def linear_divergence(
    student_hidden: Tensor,
    student_weight: Tensor,
    teacher_hidden: Tensor,
    teacher_weight: Tensor,
    shard: VocabShard,
    kind: str = "reverse_kl",
    chunk_rows: int = 1024,
    row_weight: Tensor | None = None,
    **parameters: float,
) -> Tensor:
    """Compute `divergence` of hidden states: logits exist for chunk_rows rows at a time only.

    Differentiable in student_hidden and student_weight. The gradient of student_hidden is this
    shard's part of the sum over the vocabulary: **the caller adds the parts up over the group**
    (Megatron's copy to the tensor-parallel region does). The gradient of student_weight is
    complete. The teacher is a constant.

    A student_weight with a `main_grad`, [V, D] fp32, as Megatron's DDP gives its parameters, has
    its gradient added to that, and autograd sees an empty one: no matrix of the head's size is
    made. With row_weight that happens in the forward pass, so that the sum itself must be what is
    differentiated, not a multiple of it (asserted in the backward pass).

    Args:
        student_hidden: [R, D_s], and teacher_hidden: [R, D_t], the same rows on every rank of the
            group; possibly none.
        student_weight: [V, D_s], and teacher_weight: [V, D_t], this rank's rows of the heads, each
            in the dtype of its hidden states.
        kind, and beta, alpha among the parameters: as for `divergence`.
        row_weight: [R], constants. With them, gradients are formed in the forward pass, nothing is
            computed twice, and one backward pass is possible.

    Returns:
        [R] fp32 divergences in nats; with row_weight the scalar Σ row_weight·divergence.

    Memory: logits of chunk_rows rows of both models, in whose place the gradient is formed.

    Collectives: for every chunk those of `divergence`; none in the backward pass.

    Raises:
        ValueError: an unknown kind; beta or alpha outside (0, 1).
    """
    value = Divergence(shard, kind, **parameters)
    teacher = (teacher_hidden.detach(), teacher_weight.detach(), shard, chunk_rows)
    targets = partial(Projection, *teacher)
    return through_head(
        student_hidden, student_weight, value, targets, shard, chunk_rows, row_weight
    )


def token_log_probs(
    hidden: Tensor, weight: Tensor, tokens: Tensor, shard: VocabShard, chunk_rows: int = 1024
) -> Tensor:
    """Return [R] fp32: one token's log-probability a row, at temperature 1, common vocabulary.

    −inf for tokens outside the common vocabulary. Differentiable as `linear_divergence` is without
    row_weight: hidden gets this shard's part of its gradient.

    Args:
        hidden: [R, D].
        weight: [V, D], this rank's rows of the head.
        tokens: [R] int64 global ids.

    Collectives: for every chunk, one all-gather of 12 bytes a row and rank; none in the backward
    pass.
    """

    def open_targets():
        return lambda rows: tokens[rows]

    return through_head(hidden, weight, _TokenLogProb(shard), open_targets, shard, chunk_rows)
