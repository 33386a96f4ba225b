"""Scores and losses from a teacher that reports the log-probabilities of its top-n ids only.

The student's part is exact. What is unknown of the teacher is bounded: scores and losses are lower
bounds of what a teacher with a head would give, and equal to it where nothing is left unknown.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_taopd.parallel.vocab import reductions
from megatron_taopd.parallel.vocab.divergences import Divergence, OfLogits, merge_normalizers
from megatron_taopd.parallel.vocab.normalizers import NO_ID, order_key
from megatron_taopd.parallel.vocab.projection import Projection, chunks, through_head
from megatron_taopd.parallel.vocab.reductions import top_columns_and_entropy_sums
from megatron_taopd.parallel.vocab.scores import best_candidates, check_k, merge_entropy_sums
from megatron_taopd.parallel.vocab.shard import VocabShard
from megatron_taopd.types import TokenScores

# What fp32 log-probabilities leave of 1 − Σ p when they cover a row.
SMALLEST_TAIL = 1e-6

# ----------------------------------------------------------------------------------------- scores


@torch.no_grad()
def score_topk(
    student_hidden: Tensor,
    student_weight: Tensor,
    teacher_ids: Tensor,
    teacher_log_probs: Tensor,
    k: int,
    shard: VocabShard,
    chunk_rows: int,
    return_ids: bool = False,
) -> TokenScores:
    """Score rows as far as can be known of a teacher that reports its top-n only, n ≥ K.

    The student's part is exact, p_T is known of the reported ids, and of any other id that it is no
    more than the smallest reported one and no more than what all of them leave of 1. Then

        disagreement     the least D (Eq. 9) that is possible, unknown ids of U counted as one
        compatibility    Ĉ = Σ_{v∈S_S, v reported} p_T(v) ≤ C (Eq. 17, whose case is n = K)
        teacher_entropy  of the reported ids and, as one, all others: no more than H(p_T)

    Where all of S_S is reported, D and C are exact. (D on the reported ids of U alone is near 0
    where the student puts its mass on a token that the teacher does not think of: on the tiny pair,
    K = n = 16, it is off by up to 9 nats and correlates at .93, this bound by .9 and at .997.)

    Args:
        student_hidden, student_weight, k, shard, chunk_rows: as for `score_hidden`.
        teacher_ids: [R, n] int64, and teacher_log_probs: [R, n], as for `topk_divergence`. Mass of
            reported ids outside of the common vocabulary is taken off before anything else; of
            unreported ones it is not known.

    Memory: student logits of chunk_rows rows, and 24·n·K bytes for each of them.

    Collectives: for every chunk, one all-gather of 12K+12 bytes a row and rank.

    Raises:
        ValueError: k is not within 1 … min(n, shard.size).
    """
    check_k(k, shard)
    if k > teacher_ids.shape[1]:
        raise ValueError(f"k is {k}: the teacher reports {teacher_ids.shape[1]} ids a row")
    project = Projection(student_hidden, student_weight, shard, chunk_rows)
    scores = []
    for rows in list(chunks(len(student_hidden), chunk_rows)) or [slice(0, 0)]:
        teacher = topk_of(teacher_ids[rows], teacher_log_probs[rows], k, shard)
        own = local_topk_candidates(
            project(rows).float(), teacher[0].gather(1, teacher[2]), k, shard
        )
        scores.append(merge_topk_candidates(shard.all_gather(own), teacher, k, return_ids))
    return TokenScores.cat(scores)


def local_topk_candidates(
    student: Tensor, teacher_ids: Tensor, k: int, shard: VocabShard
) -> Tensor:
    """Return [R, 3K+3] int32: what a rank sends where the teacher's part is known to all.

    Fields: the student's top ids, its logits there (K each); its logits at S_T (K); and the
    student's (max, Σe, Σe·z).

    Args:
        student: [R, width] fp32 logits.
        teacher_ids: [R, K] S_T; negative where there is none.
    """
    columns, sums = top_columns_and_entropy_sums(student, k)
    empty = k - columns.shape[1]
    ids = torch.nn.functional.pad((columns + shard.start).int(), (0, empty), value=NO_ID)
    own = torch.nn.functional.pad(student.gather(1, columns), (0, empty), value=-torch.inf)
    floats = torch.cat([own, shard.at_ids(student, teacher_ids), sums], dim=1)
    return torch.cat([ids, floats.view(torch.int32)], dim=1)


def topk_of(ids: Tensor, log_probs: Tensor, k: int, shard: VocabShard) -> tuple[Tensor, ...]:
    """Return what the scores take of a teacher's report, float64 but for the ids.

    Args:
        ids, log_probs: [R, n] as for `topk_divergence`.

    Returns:
        ids [R, n] and log p [R, n] with −1 and −inf for those that do not take part; the place
        [R, K] in them of S_T, equal probabilities by lowest id; [R] mass of the common vocabulary,
        as far as it is known (an upper bound); [R] mass of what is not reported; [R] the most that
        any of that can have.
    """
    reported = log_probs.double()
    common = participates(ids, shard)
    ids = ids.masked_fill(~common, -1)
    log_p = reported.masked_fill(~common, -torch.inf)
    first = order_key(log_p.float(), ids).topk(k, dim=1).indices
    foreign = reported.exp().masked_fill(common, 0).sum(1)
    mass = (1 - foreign).clamp(min=SMALLEST_TAIL)
    tail = 1 - reported.exp().sum(1)
    most = reported.masked_fill(reported == -torch.inf, 0).amin(1).exp()
    return ids, log_p, first, mass, tail, most


def merge_topk_candidates(
    gathered: Tensor, teacher: tuple[Tensor, ...], k: int, return_ids: bool = False
) -> TokenScores:
    """Merge every rank's [tp, R, 3K+3] and `topk_of` into the scores of `score_topk`.

    With x and y the shares of U that teacher and student give to its unknown ids, and D' the
    divergence on the known ones, D ≥ kl(x ‖ y) + (1−x)·D', which is least at logit x = logit y + D'
    or, where the teacher cannot have so much there, at the most that it can. A pure function.
    """
    ids, log_p, first, common, tail, most = teacher
    own_ids, own, at_teacher = (
        field.transpose(0, 1) for field in gathered[..., : 3 * k].split(k, dim=2)
    )
    own = own.flatten(1)
    student_ids, z_s, _ = best_candidates(own_ids.flatten(1), own, own, k)
    z_at_teacher = at_teacher.contiguous().view(torch.float32).amax(1).double()
    sums = gathered[..., 3 * k :].contiguous().view(torch.float32).double()
    student_entropy, _, _ = merge_entropy_sums(sums)

    same = student_ids[:, :, None] == ids[:, None, :]
    log_p_at_student = log_p[:, None, :].masked_fill(~same, -torch.inf).amax(2)
    compatibility = log_p_at_student.exp().sum(1) / common

    teacher_ids, log_p_first = ids.gather(1, first), log_p.gather(1, first)
    in_both = (student_ids[:, :, None] == teacher_ids[:, None, :]).any(2)
    known = same.any(2)
    log_p_known = torch.cat([log_p_first, log_p_at_student.masked_fill(in_both, -torch.inf)], 1)
    z_known = torch.cat(
        [
            z_at_teacher.masked_fill(teacher_ids < 0, -torch.inf),
            z_s.masked_fill(in_both | ~known, -torch.inf),
        ],
        dim=1,
    )
    z_unknown = z_s.masked_fill(known, -torch.inf)
    log_p_t, log_p_s = log_p_known.log_softmax(1), z_known.log_softmax(1)
    p_t = log_p_t.exp()
    within = (log_p_t - log_p_s).mul_(p_t).masked_fill_(p_t == 0, 0).sum(1)

    unknown = z_unknown > -torch.inf
    bound = torch.minimum(unknown.sum(1) * most, tail.clamp(min=SMALLEST_TAIL))
    y = z_unknown.logsumexp(1) - z_known.logsumexp(1)
    x = torch.minimum(y + within, bound.log() - log_p_known.logsumexp(1))
    log_x, log_not_x = torch.nn.functional.logsigmoid(torch.stack([x, -x]))
    log_y, log_not_y = torch.nn.functional.logsigmoid(torch.stack([y, -y]))
    split = log_x.exp() * (log_x - log_y) + log_not_x.exp() * (log_not_x - log_not_y + within)
    disagreement = split.where(unknown.any(1), within)
    disagreement = disagreement.masked_fill((teacher_ids < 0).all(1), 0)  # nothing is known

    p = log_p.exp() / common[:, None]
    rest = tail.clamp(min=0) / common
    teacher_entropy = torch.special.entr(p).sum(1) + torch.special.entr(rest)
    return TokenScores(
        disagreement=disagreement.clamp(min=0).float(),
        compatibility=compatibility.clamp(max=1).float(),
        student_entropy=student_entropy.float(),
        teacher_entropy=teacher_entropy.float(),
        topk_overlap=(in_both.sum(1) / k).float(),
        student_topk_ids=student_ids.long() if return_ids else None,
        teacher_topk_ids=teacher_ids if return_ids else None,
    )


# ----------------------------------------------------------------------------------------- losses


@dataclass(frozen=True)
class TopkDivergence:
    """`Divergence` over K+1 events: each id that the teacher reports, and any other id, the tail.

    As a row of K+1 logits u (the ids' own, the tail's log-sum-exp) the student's distribution is
    one that `Divergence` knows; a column v of event b then gets du_b · exp(z_v − u_b), which is
    du_b for the only column of an id.
    """

    events: Divergence
    shard: VocabShard

    @classmethod
    def of(cls, shard: VocabShard, k: int, kind: str, **parameters: float) -> TopkDivergence:
        """Compare k ids and the tail. Raises ValueError as `Divergence` does."""
        whole = VocabShard(0, k + 1, None, k + 1)
        return cls(Divergence(whole, kind, **parameters), shard)

    def forward(self, student: Tensor, targets: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        """Return the loss [R], and [R, K+3] for the gradient: du, and the tail's normaliser.

        Args:
            student: [R, width] logits.
            targets: [R, K] ids and the teacher's log-probabilities of them.
        """
        ids, log_probs = targets
        columns, here = self.shard.locate(ids)
        ids_logits = self.shard.at_ids(student, ids)
        tail = reductions.log_normalizer(self._without_ids(student.clone(), columns, here))
        gathered = self.shard.all_gather(torch.cat([tail.to(student.dtype), ids_logits], dim=1))
        tail_tops, tail_log_sums = gathered[..., 0].double(), gathered[..., 1].double()
        tail_top, tail_log_sum, _ = merge_normalizers(tail_tops, tail_log_sums)
        ids_logits = gathered[..., 2:].double().amax(0)
        top = torch.maximum(tail_top, ids_logits.amax(1))
        tail_logit = tail_top - top + tail_log_sum
        u = torch.cat([ids_logits - top[:, None], tail_logit[:, None]], dim=1)

        loss, saved = self.events.forward(u, self._teacher(ids, log_probs))
        du = self.events.gradient(
            u, self._teacher(ids, log_probs), saved, u.new_ones(len(u)), torch.empty_like(u)
        )
        parts = [du, tail_top[:, None], tail_log_sum[:, None]]
        return loss.to(student.dtype), torch.cat(parts, dim=1).to(student.dtype)

    def gradient(
        self, student: Tensor, targets: tuple, saved: Tensor, grad: Tensor, out: Tensor
    ) -> Tensor:
        """Write d(Σ grad·loss) / d student, [R, width], to out, which may be student."""
        columns, here = self.shard.locate(targets[0])
        k = columns.shape[1]
        du = saved[:, : k + 1] * grad[:, None]
        tail_top, tail_log_sum = saved[:, k + 1 :].split(1, dim=1)
        logits = self._without_ids(student if out is student else student.clone(), columns, here)
        logits.sub_(tail_top).sub_(tail_log_sum).exp_().mul_(du[:, k:])
        if student.shape[1]:
            logits.scatter_add_(1, columns, du[:, :k].masked_fill(~here, 0))
        return logits if out is student else out.copy_(logits)

    def _without_ids(self, logits: Tensor, columns: Tensor, here: Tensor) -> Tensor:
        """Set the columns of these ids to −inf, in place."""
        if logits.shape[1] == 0:
            return logits
        bound = logits.new_full(columns.shape, torch.inf).masked_fill_(here, -torch.inf)
        return logits.scatter_reduce_(1, columns, bound, "amin")

    def _teacher(self, ids: Tensor, log_probs: Tensor) -> Tensor:
        """Return [R, K+1] float64: log masses of the events; −inf of ids that do not take part."""
        log_probs = log_probs.double()
        tail = (1 - log_probs.exp().sum(1, keepdim=True)).clamp_(min=SMALLEST_TAIL).log_()
        known = participates(ids, self.shard)
        return torch.cat([log_probs.masked_fill(~known, -torch.inf), tail], dim=1)


def participates(ids: Tensor, shard: VocabShard) -> Tensor:
    """Tell which ids are of the common vocabulary: bool, in their shape."""
    common = (ids >= 0) & (ids < shard.size)
    if shard.absent is not None:
        common &= ~torch.isin(ids, shard.absent)
    return common


def topk_divergence(
    student_logits: Tensor,
    teacher_ids: Tensor,
    teacher_log_probs: Tensor,
    shard: VocabShard,
    kind: str = "reverse_kl",
    beta: float = 0.5,
    alpha: float = 0.1,
) -> Tensor:
    """Return [R]: `divergence` from a teacher that reports its top-K only, in nats.

    The distributions compared are those of K+1 events: each reported id, and all other ids
    together. Merging events can only shrink a divergence, so this is a lower bound of the one over
    the whole vocabulary, equal to it where teacher and student agree within the tail.

    Args:
        student_logits: [R, V] this rank's columns.
        teacher_ids: [R, K] int64 global ids, all different within a row; negative ones, those
            ≥ shard.size and absent ones are left out, and the rest is renormalised.
        teacher_log_probs: [R, K] of these ids over the teacher's whole vocabulary (natural log;
            −inf in places that are not used). The tail has what they leave of 1, at least 1e-6.

    Collectives: forward, one all-gather of 4K+8 bytes a row and rank. Backward, none.

    Raises:
        ValueError: an unknown kind; beta or alpha outside (0, 1).
    """
    wide = torch.promote_types(student_logits.dtype, torch.float32)
    return OfLogits.apply(
        shard.columns(student_logits).to(wide),
        (teacher_ids, teacher_log_probs.detach()),
        TopkDivergence.of(shard, teacher_ids.shape[1], kind, beta=beta, alpha=alpha),
    )


def linear_topk_divergence(
    student_hidden: Tensor,
    student_weight: Tensor,
    teacher_ids: Tensor,
    teacher_log_probs: Tensor,
    shard: VocabShard,
    kind: str = "reverse_kl",
    chunk_rows: int = 1024,
    row_weight: Tensor | None = None,
    **parameters: float,
) -> Tensor:
    """Compute `topk_divergence` of hidden states: logits exist for chunk_rows rows at a time only.

    Args:
        student_hidden, student_weight, chunk_rows, row_weight: as for `linear_divergence`, in whose
            way it is differentiable too.
        teacher_ids, teacher_log_probs: [R, K], kind, and beta, alpha among the parameters: as for
            `topk_divergence`.

    Returns:
        [R] fp32 divergences in nats; with row_weight the scalar Σ row_weight·divergence.

    Collectives: for every chunk, one all-gather of 4K+8 bytes a row and rank; none in the backward
    pass.

    Raises:
        ValueError: an unknown kind; beta or alpha outside (0, 1).
    """
    value = TopkDivergence.of(shard, teacher_ids.shape[1], kind, **parameters)

    def open_targets():
        return lambda rows: (teacher_ids[rows], teacher_log_probs.detach()[rows])

    return through_head(
        student_hidden, student_weight, value, open_targets, shard, chunk_rows, row_weight
    )
