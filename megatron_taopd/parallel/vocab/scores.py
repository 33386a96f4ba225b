"""D, C, entropies and top-K sets of rows of logits, exactly, in one all-gather."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property
from typing import NamedTuple

import torch
from torch import Tensor

from megatron_taopd.parallel.vocab.normalizers import NO_ID, order_key
from megatron_taopd.parallel.vocab.reductions import top_columns_and_entropy_sums
from megatron_taopd.parallel.vocab.shard import VocabShard
from megatron_taopd.types import TokenScores


@torch.no_grad()
def score_rows(
    student_logits: Tensor,
    teacher_logits: Tensor,
    k: int,
    shard: VocabShard,
    return_ids: bool = False,
) -> TokenScores:
    """Score each row exactly, D, C and both entropies (Eq. 9, 10), in one all-gather.

    Every rank sends its local top-K of both models, each candidate with the logits of both, and
    per model the max, Σe and Σe·z of its columns. The global top-K are among the candidates, D
    needs nothing but their logits, and C needs the teacher's normaliser besides.

    Equal logits rank by lowest id. A logit of −inf is a probability of 0; where the student has
    that on an id of U to which the teacher gives mass, D is +inf.

    Args:
        student_logits, teacher_logits: [R, V] this rank's columns, used in fp32.
        k: size of the top-K sets.
        return_ids: whether to fill in student_topk_ids and teacher_topk_ids.

    Collectives: one all-gather of 24K+24 bytes a row and rank.

    Raises:
        ValueError: k is not within 1 … shard.size.
    """
    check_k(k, shard)
    local = local_candidates(
        shard.columns(student_logits).float(), shard.columns(teacher_logits).float(), k, shard.start
    )
    return merge_candidates(shard.all_gather(local), k, return_ids)


def check_k(k: int, shard: VocabShard) -> None:
    """Refuse a k for which there is no top-K set: ValueError outside 1 … shard.size."""
    if not 1 <= k <= shard.size:
        raise ValueError(f"k is {k}: must be within 1 … {shard.size}, the common vocabulary")


def local_candidates(
    student: Tensor, teacher: Tensor, k: int, start: int, token_logits: Tensor | None = None
) -> Tensor:
    """Return [R, 6K+6] int32, or [R, 6K+7]: what a rank sends, floats and ids by their bits.

    Fields: the student's top ids, its logits there, the teacher's logits there (K each); the same
    with the models exchanged; then (max, Σe, Σe·z) of the student and of the teacher; and the
    teacher's logit of one given token, where that is asked for.

    Args:
        student, teacher: [R, width] fp32 logits of the columns that take part.
        start: id of the first of them.
        token_logits: [R, 1] the teacher's; −inf for tokens that are not among these columns.
    """
    fields, sums = [], []
    for own, other in ((student, teacher), (teacher, student)):
        columns, own_sums = top_columns_and_entropy_sums(own, k)
        empty = k - columns.shape[1]
        fields.append(torch.nn.functional.pad((columns + start).int(), (0, empty), value=NO_ID))
        for logits in (own, other):
            at_ids = logits.gather(1, columns)
            at_ids = torch.nn.functional.pad(at_ids, (0, empty), value=-torch.inf)
            fields.append(at_ids.view(torch.int32))
        sums.append(own_sums)
    if token_logits is not None:
        sums.append(token_logits)
    return torch.cat([*fields, *(s.view(torch.int32) for s in sums)], dim=1)


def merge_candidates(gathered: Tensor, k: int, return_ids: bool = False) -> TokenScores:
    """Merge every rank's `local_candidates`, [tp, R, …], into scores. A pure function."""
    candidates, token_logits = gathered.tensor_split([6 * k + 6], dim=2)
    tops = merge_top_sets(candidates, k)
    teacher_log_prob = None
    if token_logits.shape[2]:
        token_logit = token_logits.view(torch.float32).double().amax((0, 2))
        teacher_log_prob = (token_logit - tops.teacher_max - tops.teacher_sum.log()).float()
    return TokenScores(
        disagreement=tops.disagreement().float(),
        compatibility=tops.compatibility().float(),
        student_entropy=tops.student_entropy.float(),
        teacher_entropy=tops.teacher_entropy.float(),
        topk_overlap=tops.overlap().float(),
        teacher_log_prob=teacher_log_prob,
        student_topk_ids=tops.student.ids.long() if return_ids else None,
        teacher_topk_ids=tops.teacher.ids.long() if return_ids else None,
    )


class TopSet(NamedTuple):
    """The likeliest ids of one model, highest logit first, equal ones by lowest id.

    Attributes:
        ids: [R, K] int32.
        own, other: [R, K] float64, the model's logits there, and the other model's.
    """

    ids: Tensor
    own: Tensor
    other: Tensor

    def first(self, k: int) -> TopSet:
        return TopSet(*(field[:, :k] for field in self))


@dataclass(frozen=True)
class TopSets:
    """S_S and S_T of rows, and what turns logits into probabilities, all [R] in float64.

    Attributes:
        student_entropy, teacher_entropy: H, in nats.
        student_max, teacher_max: the highest logit.
        student_sum, teacher_sum: Σ exp(z − max).
    """

    student: TopSet
    teacher: TopSet
    student_entropy: Tensor
    student_max: Tensor
    student_sum: Tensor
    teacher_entropy: Tensor
    teacher_max: Tensor
    teacher_sum: Tensor

    def first(self, k: int) -> TopSets:
        """Take the first of both sets, for a smaller K."""
        return replace(self, student=self.student.first(k), teacher=self.teacher.first(k))

    def student_probs(self, logits: Tensor) -> Tensor:
        """Return [R, n]: p_S from the student's logits, over the whole common vocabulary."""
        return (logits - self.student_max[:, None]).exp() / self.student_sum[:, None]

    def teacher_probs(self, logits: Tensor) -> Tensor:
        """Return [R, n]: p_T from the teacher's logits, likewise."""
        return (logits - self.teacher_max[:, None]).exp() / self.teacher_sum[:, None]

    def compatibility(self) -> Tensor:
        """Return [R]: C (Eq. 10)."""
        mass = (self.student.other - self.teacher_max[:, None]).exp().sum(1)
        return (mass / self.teacher_sum).clamp(max=1)

    @cached_property
    def _union(self) -> tuple[Tensor, Tensor]:
        """Both sets sorted by id, [R, 2K] each: the order, and where an id comes again."""
        union, order = torch.cat([self.student.ids, self.teacher.ids], dim=1).sort(dim=1)
        return order, torch.nn.functional.pad(union.diff(dim=1) == 0, (1, 0))

    def overlap(self) -> Tensor:
        """Return [R]: |S_S ∩ S_T| / K."""
        _, again = self._union
        return again.double().sum(1) / self.student.ids.shape[1]

    def disagreement(self) -> Tensor:
        """Return [R]: D (Eq. 9), in nats."""
        # An id in both sets must count once: its second copy gets no mass from anyone.
        order, again = self._union
        z_s = torch.cat([self.student.own, self.teacher.other], dim=1)
        z_t = torch.cat([self.student.other, self.teacher.own], dim=1)
        log_p_s, log_p_t = (
            z.gather(1, order).masked_fill(again, -torch.inf).log_softmax(1) for z in (z_s, z_t)
        )
        p_t = log_p_t.exp()
        return (log_p_t - log_p_s).mul_(p_t).masked_fill_(p_t == 0, 0).sum(1).clamp(min=0)


def merge_top_sets(gathered: Tensor, k: int) -> TopSets:
    """Merge every rank's candidates, [tp, R, 6K+6], into both top-K sets. A pure function."""
    candidates, sums = gathered[..., : 6 * k], gathered[..., 6 * k :]
    ids, own, other, ids_t, own_t, other_t = (
        field.transpose(0, 1).flatten(1) for field in candidates.split(k, dim=2)
    )
    sums = sums.view(torch.float32).double()
    return TopSets(
        TopSet(*best_candidates(ids, own, other, k)),
        TopSet(*best_candidates(ids_t, own_t, other_t, k)),
        *merge_entropy_sums(sums[..., :3]),
        *merge_entropy_sums(sums[..., 3:]),
    )


def best_candidates(
    ids: Tensor, own: Tensor, other: Tensor, k: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the k best of [R, tp·K] candidates (int32 bits): ids, and both logits in float64."""
    own, other = own.view(torch.float32), other.view(torch.float32)
    best = order_key(own, ids).topk(k, dim=1).indices
    return ids.gather(1, best), own.gather(1, best).double(), other.gather(1, best).double()


def merge_entropy_sums(sums: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Merge the shards' [tp, R, 3] float64 into entropy, max and Σ exp(z − max), each [R]."""
    top, rest, weighted = sums.unbind(2)
    mass = 1 + rest
    top_of_all = top.amax(0)
    shift = top - top_of_all
    total = (shift.exp() * mass).sum(0)
    mean = (shift.exp() * (weighted + shift * mass)).sum(0) / total
    return total.log() - mean, top_of_all, total  # both terms ≥ 0: nothing cancels
