"""Everything that reads whole rows of the vocabulary, and every collective that this takes.

Both heads are cut along the same tensor-parallel group at the same columns, so that column v is the
same token in both. A rank works on its own columns and tells the others a few numbers a row; what
crosses the group is counted in each docstring, in bytes a row and rank with fp32 logits. Results
that are not a shard of something are the same, bit for bit, on every rank of the group.

Shapes: R rows · V vocabulary columns of this shard · K top-k · D model width · tp ranks
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_taopd.types import TokenScores

DIVERGENCES = ("reverse_kl", "forward_kl", "jsd", "skewed_reverse_kl")

# Sorts behind every real id among candidates of equal logit.
_NO_ID = torch.iinfo(torch.int32).max


@dataclass(frozen=True)
class VocabShard:
    """The columns [start, stop) of both heads that this rank holds.

    Attributes:
        start, stop: global ids of the first column and of the one past the last. The shards of a
            group do not overlap and cover [0, size) together; they may be unequal, or empty.
        group: the ranks that hold the other shards; None when this shard is all there is.
        size: the common vocabulary. Columns of ids ≥ size (padding, or tokens that only one model
            has) never take part in anything, and get zero gradients.
    """

    start: int
    stop: int
    group: dist.ProcessGroup | None
    size: int

    @property
    def width(self) -> int:
        """How many columns of this shard take part. They are its first ones."""
        return max(0, min(self.stop, self.size) - self.start)

    @property
    def world_size(self) -> int:
        return 1 if self.group is None else dist.get_world_size(self.group)

    def columns(self, logits: Tensor) -> Tensor:
        """[R, V] → [R, width], a view."""
        assert logits.shape[1] == self.stop - self.start, (logits.shape, self)
        return logits[:, : self.width]

    def rows(self, weight: Tensor) -> Tensor:
        """[V, D] → [width, D], a view."""
        assert weight.shape[0] == self.stop - self.start, (weight.shape, self)
        return weight[: self.width]

    def all_gather(self, local: Tensor) -> Tensor:
        """[R, n] of this rank → [tp, R, n] of all of them, by rank. No collective for no rows."""
        if self.world_size == 1 or local.numel() == 0:
            return local.expand(self.world_size, *local.shape)
        gathered = local.new_empty(self.world_size * local.shape[0], *local.shape[1:])
        dist.all_gather_into_tensor(gathered, local.contiguous(), group=self.group)
        return gathered.view(self.world_size, *local.shape)


# ------------------------------------------------------------------------------------------ heads


def _is_narrow(dtype: torch.dtype) -> bool:
    return dtype in (torch.bfloat16, torch.float16)


def _logits(hidden: Tensor, weight: Tensor) -> Tensor:
    """hidden [R, D] · weight [V, D] → [R, V], fp32 when the inputs are narrower.

    Logits rounded to bf16 would tie at the K-th place in many rows.
    """
    if not _is_narrow(hidden.dtype):
        return hidden @ weight.t()
    if hidden.is_cuda:
        return torch.mm(hidden, weight.t(), out_dtype=torch.float32)
    wide = hidden.float()  # the head is widened block by block, never as a whole
    return torch.cat([wide @ block.float().t() for block in weight.split(8192)], dim=1)


def _hidden_grad(logits_grad: Tensor, weight: Tensor) -> Tensor:
    """logits_grad [R, V] · weight [V, D] → [R, D] in the weight's dtype."""
    if not _is_narrow(weight.dtype):
        return logits_grad @ weight
    if weight.is_cuda:
        return logits_grad.to(weight.dtype) @ weight
    blocks = zip(logits_grad.split(8192, dim=1), weight.split(8192), strict=True)
    return sum(grad @ block.float() for grad, block in blocks).to(weight.dtype)


def _add_weight_grad(total: Tensor, logits_grad: Tensor, hidden: Tensor) -> None:
    """Add logits_grad [R, V] · hidden [R, D] to total [V, D], at least fp32."""
    if _is_narrow(hidden.dtype) and hidden.is_cuda:
        narrow = logits_grad.to(hidden.dtype)
        total += torch.mm(narrow.t(), hidden, out_dtype=torch.float32)
    else:
        total.addmm_(logits_grad.t(), hidden.to(logits_grad.dtype))


def _chunks(num_rows: int, chunk_rows: int) -> Iterator[slice]:
    assert chunk_rows > 0, chunk_rows
    for start in range(0, num_rows, chunk_rows):
        yield slice(start, min(start + chunk_rows, num_rows))


# ----------------------------------------------------------------------------------------- scores


@torch.no_grad()
def score_rows(
    student_logits: Tensor,
    teacher_logits: Tensor,
    k: int,
    shard: VocabShard,
    return_ids: bool = False,
) -> TokenScores:
    """D, C and both entropies of each row (Eq. 9, 10), exactly, in one all-gather.

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
    _check_k(k, shard)
    local = local_candidates(student_logits, teacher_logits, k, shard)
    return merge_candidates(shard.all_gather(local), k, return_ids)


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
    """`score_rows` of hidden states: logits exist for chunk_rows rows at a time only.

    Args:
        student_hidden: [R, D_s], and teacher_hidden: [R, D_t], the same rows on every rank.
        student_weight: [V, D_s], and teacher_weight: [V, D_t], this rank's rows of the heads.

    Collectives: for every chunk, one all-gather of 24K+24 bytes a row and rank.

    Raises:
        ValueError: k is not within 1 … shard.size.
    """
    _check_k(k, shard)
    chunks = list(_chunks(len(student_hidden), chunk_rows)) or [slice(0, 0)]
    return TokenScores.cat(
        [
            score_rows(
                _logits(student_hidden[rows], student_weight),
                _logits(teacher_hidden[rows], teacher_weight),
                k,
                shard,
                return_ids,
            )
            for rows in chunks
        ]
    )


def _check_k(k: int, shard: VocabShard) -> None:
    if not 1 <= k <= shard.size:
        raise ValueError(f"k is {k}: must be within 1 … {shard.size}, the common vocabulary")


def local_candidates(
    student_logits: Tensor, teacher_logits: Tensor, k: int, shard: VocabShard
) -> Tensor:
    """[R, 6K+6] int32, what this rank sends: floats and ids by their bits.

    Fields: the student's top ids, its logits there, the teacher's logits there (K each); the same
    with the models exchanged; then (max, Σe, Σe·z) of the student and of the teacher.
    """
    student = shard.columns(student_logits).float()
    teacher = shard.columns(teacher_logits).float()
    fields, sums = [], []
    for own, other in ((student, teacher), (teacher, student)):
        columns = _topk_columns(own, k)
        empty = k - columns.shape[1]
        ids = torch.nn.functional.pad((columns + shard.start).int(), (0, empty), value=_NO_ID)
        fields.append(ids)
        for logits in (own, other):
            at_ids = logits.gather(1, columns)
            at_ids = torch.nn.functional.pad(at_ids, (0, empty), value=-torch.inf)
            fields.append(at_ids.view(torch.int32))
        sums.append(_entropy_sums(own))
    return torch.cat([*fields, *(s.view(torch.int32) for s in sums)], dim=1)


def merge_candidates(gathered: Tensor, k: int, return_ids: bool = False) -> TokenScores:
    """[tp, R, 6K+6] candidates of every rank → scores. A pure function."""
    candidates, sums = gathered[..., : 6 * k], gathered[..., 6 * k :]
    ids, own, other, ids_t, own_t, other_t = (
        field.transpose(0, 1).flatten(1) for field in candidates.split(k, dim=2)
    )
    student_ids, z_s, z_t = _best(ids, own, other, k)
    teacher_ids, z_t_too, z_s_too = _best(ids_t, own_t, other_t, k)
    sums = sums.view(torch.float32).double()
    student_entropy, _, _ = _merge_entropy_sums(sums[..., :3])
    teacher_entropy, teacher_max, teacher_sum = _merge_entropy_sums(sums[..., 3:])

    compatibility = (z_t - teacher_max[:, None]).exp().sum(1) / teacher_sum

    # An id in both sets must count once: sorted by id, its second copy gets no mass from anyone.
    union, order = torch.cat([student_ids, teacher_ids], dim=1).sort(dim=1)
    again = torch.nn.functional.pad(union.diff(dim=1) == 0, (1, 0))
    z_s = torch.cat([z_s, z_s_too], dim=1).gather(1, order).masked_fill(again, -torch.inf)
    z_t = torch.cat([z_t, z_t_too], dim=1).gather(1, order).masked_fill(again, -torch.inf)
    log_p_t, log_p_s = z_t.log_softmax(1), z_s.log_softmax(1)
    disagreement = _mean(log_p_t.exp(), log_p_t - log_p_s)

    return TokenScores(
        disagreement=disagreement.clamp(min=0).float(),
        compatibility=compatibility.clamp(max=1).float(),
        student_entropy=student_entropy.float(),
        teacher_entropy=teacher_entropy.float(),
        student_topk_ids=student_ids.long() if return_ids else None,
        teacher_topk_ids=teacher_ids.long() if return_ids else None,
    )


def _best(ids: Tensor, own: Tensor, other: Tensor, k: int) -> tuple[Tensor, Tensor, Tensor]:
    """The k best of the candidates [R, tp·K] (int32 bits): ids, and both logits in float64."""
    own, other = own.view(torch.float32), other.view(torch.float32)
    best = _order_key(own, ids).topk(k, dim=1).indices
    return ids.gather(1, best), own.gather(1, best).double(), other.gather(1, best).double()


def _order_key(logits: Tensor, ids: Tensor) -> Tensor:
    """int64 keys that are all different and sort by (logit, lowest id), so that topk is exact.

    An fp32 number's bits, read as an integer, sort like the number, once those of negative numbers
    are flipped (all but the sign). Adding 0 turns −0 into 0, which would differ.
    """
    bits = (logits + 0.0).view(torch.int32)
    return ((bits ^ ((bits >> 31) & 0x7FFFFFFF)).long() << 32) - ids


def _topk_columns(logits: Tensor, k: int) -> Tensor:
    """[R, min(k, V)] the columns of the highest logits, as a set: equal logits by lowest column."""
    num_columns = logits.shape[1]
    if num_columns <= k:
        return torch.arange(num_columns, device=logits.device).expand(len(logits), -1)
    # topk breaks ties as it likes. That matters only where the first one left out ties with the
    # last one taken, which one more place shows without another pass over the row.
    values, columns = logits.topk(k + 1, dim=1)
    columns = columns[:, :k].contiguous()
    tied = (values[:, k - 1] == values[:, k]).nonzero()[:, 0]
    if len(tied):
        every = torch.arange(num_columns, device=logits.device)
        columns[tied] = _order_key(logits[tied], every).topk(k, dim=1).indices
    return columns


def _entropy_sums(logits: Tensor) -> Tensor:
    """[R, 3]: m = max z, Σ exp(z−m) without the max itself, Σ exp(z−m)·(z−m).

    The max contributes a known 1, in which fp32 would lose the rest of a peaked row.
    """
    lowest = torch.finfo(logits.dtype).min  # finite stand-in for the max of nothing
    if logits.shape[1] == 0:
        return logits.new_tensor([lowest, 0.0, 0.0]).expand(len(logits), -1)
    top, column = logits.max(dim=1, keepdim=True)
    top = top.clamp(min=lowest)
    shifted = (logits - top).clamp_(min=-200)  # exp is 0 there, and 0·(z−m) is 0 also for z = −inf
    weights = shifted.exp().scatter_(1, column, 0.0)
    return torch.cat(
        [top, weights.sum(1, keepdim=True), shifted.mul_(weights).sum(1, keepdim=True)], dim=1
    )


def _merge_entropy_sums(sums: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """[tp, R, 3] float64 → entropy, max and Σ exp(z − max), each [R]."""
    top, rest, weighted = sums.unbind(2)
    mass = 1 + rest
    top_of_all = top.amax(0)
    shift = top - top_of_all
    total = (shift.exp() * mass).sum(0)
    mean = (shift.exp() * (weighted + shift * mass)).sum(0) / total
    return total.log() - mean, top_of_all, total  # both terms ≥ 0: nothing cancels


# ------------------------------------------------------------------------------------ divergences


def _log_normalizer(logits: Tensor) -> tuple[Tensor, Tensor]:
    """max z and log Σ exp(z − max) of each row, [R, 1] each, the latter in float64.

    They stay apart: their fp32 sum would have no digits left for log p when logits are around 1e4.
    Columns that are all −inf, or none, have a finite max and a log-sum of 0, and so no mass.
    """
    lowest = torch.finfo(logits.dtype).min
    if logits.shape[1] == 0:
        top = logits.new_full((len(logits), 1), lowest)
        return top, torch.zeros_like(top, dtype=torch.float64)
    top = logits.amax(1, keepdim=True).clamp_(min=lowest)
    total = (logits - top).exp_().sum(1, keepdim=True, dtype=torch.float64)
    return top, total.clamp_(min=1).log_()


def _merge_normalizers(tops: Tensor, log_sums: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """[tp, R] float64 of the shards → those of the whole rows [R], and log p(shard) [tp, R]."""
    top = tops.amax(0)
    log_totals = tops - top + log_sums
    log_sum = log_totals.logsumexp(0)
    return top, log_sum, log_totals - log_sum


class _Normalizers(NamedTuple):
    """What turns logits of both models into log p and log(p_S/p_T), [R, 1] each.

    The teacher's log Σ exp(z − max) is given by how much the student's exceeds it. Near agreement
    that is a small number with all its digits, while rounding either log-sum to fp32 would put an
    error of up to 5e-7 on every log-ratio of the row.
    """

    student_top: Tensor
    teacher_top: Tensor
    log_sum: Tensor
    excess: Tensor

    @classmethod
    def of(cls, student_logits: Tensor, teacher_logits: Tensor) -> _Normalizers:
        student_top, log_sum = _log_normalizer(student_logits)
        teacher_top, teacher_log_sum = _log_normalizer(teacher_logits)
        parts = (student_top, teacher_top, log_sum, log_sum - teacher_log_sum)
        return cls(*(part.to(student_logits.dtype) for part in parts))

    def student_log_probs(self, logits: Tensor) -> Tensor:
        return (logits - self.student_top).sub_(self.log_sum)

    def teacher_log_probs(self, logits: Tensor) -> Tensor:
        return (logits - self.teacher_top).sub_(self.log_sum - self.excess)

    def log_ratio(self, student_logits: Tensor, teacher_logits: Tensor) -> Tensor:
        """log p_S − log p_T; nan where both are −inf."""
        shifted = teacher_logits - self.teacher_top
        return (student_logits - self.student_top).sub_(shifted).sub_(self.excess)


def _mean(p: Tensor, values: Tensor) -> Tensor:
    """[R] Σ p·value over the columns; p = 0 contributes 0 whatever the value. Overwrites values."""
    return values.mul_(p).masked_fill_(p == 0, 0).sum(1)


def _mixture_log_ratio(log_ratio: Tensor, weight: float) -> Tensor:
    """log(p/m) for m = weight·q + (1−weight)·p, from log_ratio = log(p/q)."""
    return (-log_ratio).exp_().mul_(weight).add_(1 - weight).log_().neg_()


@dataclass(frozen=True)
class _Divergence:
    """One kind of divergence of rows of logits: its value, and its gradient in the student's.

    With m = w·p_T + (1−w)·p_S the kinds are

        reverse_kl          KL(p_S ‖ p_T)
        forward_kl          KL(p_T ‖ p_S)
        jsd                 w·KL(p_T ‖ m) + (1−w)·KL(p_S ‖ m)       w = beta
        skewed_reverse_kl   KL(p_S ‖ m)                             w = 1 − alpha

    and all gradients but forward KL's (p_S − p_T) are p_S·(h − E[h]), E being under p_S, with

        reverse_kl          h = log(p_S/p_T)                        E[h] = the loss
        jsd                 h = (1−w)·log(p_S/m)
        skewed_reverse_kl   h = log(p_S/m) − (1−w)·p_S/m

    so that a row's two normalisers and E[h], known from the forward pass, leave nothing to
    communicate in the backward pass.
    """

    shard: VocabShard
    kind: str = "reverse_kl"
    beta: float = 0.5
    alpha: float = 0.1

    def __post_init__(self):
        if self.kind not in DIVERGENCES:
            raise ValueError(f"kind is {self.kind!r}: must be one of {', '.join(DIVERGENCES)}")
        for name in ("beta", "alpha"):
            if not 0 < getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}: must be inside (0, 1)")

    @property
    def teacher_share(self) -> float:
        return self.beta if self.kind == "jsd" else 1 - self.alpha

    def forward(self, student_logits: Tensor, teacher_logits: Tensor) -> tuple[Tensor, Tensor]:
        """Loss [R], and [R, 5] what the gradient needs: the normalisers and E[h]."""
        dtype = student_logits.dtype
        of_shard = _Normalizers.of(student_logits, teacher_logits)
        sent = [*of_shard]
        if self.kind in ("reverse_kl", "forward_kl"):
            sent.append(self._kl_within(student_logits, teacher_logits, of_shard)[:, None])
        gathered = self.shard.all_gather(torch.cat(sent, dim=1)).double().unbind(2)
        student_tops, teacher_tops, log_sums, excesses = gathered[:4]
        student_top, log_sum, student_mass = _merge_normalizers(student_tops, log_sums)
        teacher_top, teacher_log_sum, teacher_mass = _merge_normalizers(
            teacher_tops, log_sums - excesses
        )
        parts = (student_top, teacher_top, log_sum, log_sum - teacher_log_sum)
        normalizers = _Normalizers(*(part[:, None].to(dtype) for part in parts))

        if self.kind == "reverse_kl":
            loss = mean = _chain_rule(student_mass, teacher_mass, gathered[4])
        elif self.kind == "forward_kl":
            loss = mean = _chain_rule(teacher_mass, student_mass, gathered[4])
        else:
            loss, mean = self._mixture_loss(student_logits, teacher_logits, normalizers)
        return loss.to(dtype), torch.cat([*normalizers, mean[:, None].to(dtype)], dim=1)

    def gradient(
        self, student_logits: Tensor, teacher_logits: Tensor, saved: Tensor, grad: Tensor
    ) -> Tensor:
        """[R, width] d(Σ grad·loss) / d student_logits."""
        *normalizers, mean = saved.split(1, dim=1)
        normalizers = _Normalizers(*normalizers)
        p = normalizers.student_log_probs(student_logits).exp_()
        if self.kind == "forward_kl":
            return p.sub_(normalizers.teacher_log_probs(teacher_logits).exp_()).mul_(grad[:, None])
        h = normalizers.log_ratio(student_logits, teacher_logits)
        if self.kind != "reverse_kl":
            h = self._mixture_h(_mixture_log_ratio(_bounded(h), self.teacher_share))
        return h.sub_(mean).mul_(p).masked_fill_(p == 0, 0).mul_(grad[:, None])

    def _kl_within(self, student_logits, teacher_logits, of_shard: _Normalizers) -> Tensor:
        """[R] the KL of the two distributions within this shard, each renormalised there."""
        log_ratio = of_shard.log_ratio(student_logits, teacher_logits)
        if self.kind == "reverse_kl":
            return _mean(of_shard.student_log_probs(student_logits).exp_(), log_ratio)
        return _mean(of_shard.teacher_log_probs(teacher_logits).exp_(), log_ratio.neg_())

    def _mixture_h(self, log_ratio: Tensor) -> Tensor:
        """h, elementwise, from log(p_S/m)."""
        student_share = 1 - self.teacher_share
        if self.kind == "jsd":
            return log_ratio * student_share
        return log_ratio - log_ratio.exp().mul_(student_share)

    def _mixture_loss(self, student_logits, teacher_logits, normalizers: _Normalizers):
        """Loss and E[h], each [R] float64, given the normalisers of the whole rows."""
        p_s = normalizers.student_log_probs(student_logits).exp_()
        log_ratio = _bounded(normalizers.log_ratio(student_logits, teacher_logits))
        to_mixture = _mixture_log_ratio(log_ratio, self.teacher_share)
        if self.kind == "jsd":
            teacher_to_mixture = _mixture_log_ratio(log_ratio.neg_(), 1 - self.teacher_share)
            p_t = normalizers.teacher_log_probs(teacher_logits).exp_()
            other = _mean(p_t, teacher_to_mixture)
        else:
            other = _mean(p_s, self._mixture_h(to_mixture))
        sent = torch.stack([_mean(p_s, to_mixture), other], dim=1)
        student_kl, other = self.shard.all_gather(sent).double().sum(0).unbind(1)
        if self.kind == "jsd":
            return self.beta * other + (1 - self.beta) * student_kl, (1 - self.beta) * student_kl
        return student_kl, other


def _chain_rule(log_p: Tensor, log_q: Tensor, within: Tensor) -> Tensor:
    """[R] KL(p ‖ q) from the log masses of the shards and the KLs within them, [tp, R] each.

    KL = Σ_shards p(shard)·(log p(shard) − log q(shard) + KL within), in which no term is big when
    the distributions are close, as the terms of Σ p·(z_p − z_q) − log Z_p + log Z_q would be.
    """
    return _mean(log_p.exp().t(), (log_p - log_q + within).t())


def _bounded(log_ratio: Tensor) -> Tensor:
    """log(p/q) within ±80, in place, so that exp is finite in fp32; nan, where both are 0, is 0.

    Beyond that the smaller of the two is nothing in a sum over the mixture.
    """
    return log_ratio.nan_to_num_(nan=0.0).clamp_(-80, 80)


class _LogitDivergence(torch.autograd.Function):
    @staticmethod
    def forward(ctx, student_logits, teacher_logits, divergence):
        loss, saved = divergence.forward(student_logits, teacher_logits)
        ctx.save_for_backward(student_logits, teacher_logits, saved)
        ctx.divergence = divergence
        return loss

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):
        return ctx.divergence.gradient(*ctx.saved_tensors, grad), None, None


def divergence(
    student_logits: Tensor,
    teacher_logits: Tensor,
    shard: VocabShard,
    kind: str = "reverse_kl",
    beta: float = 0.5,
    alpha: float = 0.1,
) -> Tensor:
    """[R] the divergence of each row over the common vocabulary, in nats (Eq. 6).

    reverse_kl is KL(p_S ‖ p_T), forward_kl is KL(p_T ‖ p_S), jsd is β·KL(p_T ‖ m) +
    (1−β)·KL(p_S ‖ m) with m = β·p_T + (1−β)·p_S, and skewed_reverse_kl is KL(p_S ‖ m) with
    m = α·p_S + (1−α)·p_T. The teacher is a constant. A probability of exactly 0 (logit −inf)
    contributes 0; where only the second argument of a KL has it, that KL is +inf.

    Args:
        student_logits, teacher_logits: [R, V] this rank's columns. fp32, or float64 throughout;
            narrower ones are widened to fp32.

    Collectives: forward, one all-gather of 20 bytes a row and rank; for jsd and skewed_reverse_kl
    two, of 16 and 8 bytes. Backward, none.

    Raises:
        ValueError: an unknown kind; beta or alpha outside (0, 1).
    """
    wide = torch.promote_types(student_logits.dtype, torch.float32)
    return _LogitDivergence.apply(
        shard.columns(student_logits).to(wide),
        shard.columns(teacher_logits.detach()).to(wide),
        _Divergence(shard, kind, beta, alpha),
    )


# ------------------------------------------------------------- divergences of rows of hidden states


@dataclass(frozen=True)
class _DivergenceRows:
    """The divergence of each row from a teacher given by its hidden states."""

    divergence: _Divergence
    teacher_hidden: Tensor
    teacher_head: Tensor

    def targets(self, rows: slice) -> Tensor:
        return _logits(self.teacher_hidden[rows], self.teacher_head)

    def forward(self, logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        return self.divergence.forward(logits, targets)

    def gradient(self, logits: Tensor, targets: Tensor, saved: Tensor, grad: Tensor) -> Tensor:
        return self.divergence.gradient(logits, targets, saved, grad)


@dataclass(frozen=True)
class _TokenRows:
    """The log-probability of one given token a row."""

    shard: VocabShard
    tokens: Tensor

    def targets(self, rows: slice) -> tuple[Tensor, Tensor]:
        """The rows [n] whose token is one of this shard's columns, and that column [n]."""
        columns = self.tokens[rows] - self.shard.start
        here = ((columns >= 0) & (columns < self.shard.width)).nonzero()[:, 0]
        return here, columns[here]

    def forward(self, logits: Tensor, targets: tuple) -> tuple[Tensor, Tensor]:
        token_logit = logits.new_full((len(logits), 1), -torch.inf)
        here, columns = targets
        token_logit[here, 0] = logits[here, columns]
        top, log_sum = _log_normalizer(logits)
        sent = torch.cat([top, log_sum.to(logits.dtype), token_logit], dim=1)
        tops, log_sums, token_logits = self.shard.all_gather(sent).double().unbind(2)
        top, log_sum, _ = _merge_normalizers(tops, log_sums)
        log_probs = token_logits.amax(0) - top - log_sum
        return log_probs.to(logits.dtype), torch.stack([top, log_sum], dim=1).to(logits.dtype)

    def gradient(self, logits: Tensor, targets: tuple, saved: Tensor, grad: Tensor) -> Tensor:
        """grad·(1[v = token] − p(v))."""
        top, log_sum = saved.split(1, dim=1)
        logits_grad = (logits - top).sub_(log_sum).exp_().mul_(-grad[:, None])
        here, columns = targets
        logits_grad[here, columns] += grad[here]
        return logits_grad


class _HeadGradients:
    """Gradients of hidden [R, D] and weight [V, D], filled chunk by chunk where they are needed."""

    def __init__(self, hidden: Tensor, weight: Tensor, shard: VocabShard, needed: tuple):
        wide = torch.promote_types(weight.dtype, torch.float32)  # chunks add up in fp32
        self.inputs, self.head = hidden, shard.rows(weight)
        self.hidden = torch.empty_like(hidden) if needed[0] else None
        self.weight = torch.zeros_like(weight, dtype=wide) if needed[1] else None

    def add(self, logits_grad: Tensor, rows: slice) -> None:
        if self.hidden is not None:
            self.hidden[rows] = _hidden_grad(logits_grad, self.head)
        if self.weight is not None:
            _add_weight_grad(self.weight[: len(self.head)], logits_grad, self.inputs[rows])

    def get(self) -> tuple[Tensor | None, Tensor | None]:
        return self.hidden, None if self.weight is None else self.weight.to(self.head.dtype)


class _Head(torch.autograd.Function):
    """hidden [R, D] → logits → a value a row [R], or Σ row_weight·value, chunk by chunk.

    Without row_weight the backward pass computes the logits again. With it, a chunk's gradient is
    formed while its logits are there; only one factor, the gradient of the sum, comes later.
    """

    @staticmethod
    def forward(ctx, hidden, weight, values_of, shard, chunk_rows, row_weight):
        needed = ctx.needs_input_grad[:2]
        head = shard.rows(weight)
        at_once = row_weight is not None and any(needed)
        grads = _HeadGradients(hidden, weight, shard, needed) if at_once else None
        values = [hidden.new_empty(0, dtype=torch.promote_types(hidden.dtype, torch.float32))]
        saved = []
        for rows in _chunks(len(hidden), chunk_rows):
            logits, targets = _logits(hidden[rows], head), values_of.targets(rows)
            chunk_values, chunk_saved = values_of.forward(logits, targets)
            values.append(chunk_values)
            saved.append(chunk_saved)
            if at_once:
                grad = row_weight[rows].to(logits.dtype)
                grads.add(values_of.gradient(logits, targets, chunk_saved, grad), rows)
        ctx.at_once = row_weight is not None
        if ctx.at_once:
            ctx.save_for_backward(*(grads.get() if grads else ()))
            return torch.cat(values).mul_(row_weight).sum()
        ctx.save_for_backward(hidden, weight, *saved)
        ctx.values_of, ctx.shard, ctx.chunk_rows = values_of, shard, chunk_rows
        return torch.cat(values)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):
        if ctx.at_once:
            # In place: the head's gradient is as large as the head. (A second backward pass through
            # the same graph is refused by autograd, which sees that a saved tensor has changed.)
            hidden_grad, weight_grad = (g if g is None else g.mul_(grad) for g in ctx.saved_tensors)
            return hidden_grad, weight_grad, None, None, None, None
        hidden, weight, *saved = ctx.saved_tensors
        head = ctx.shard.rows(weight)
        grads = _HeadGradients(hidden, weight, ctx.shard, ctx.needs_input_grad[:2])
        chunks = _chunks(len(hidden), ctx.chunk_rows)
        for rows, chunk_saved in zip(chunks, saved, strict=True):
            logits, targets = _logits(hidden[rows], head), ctx.values_of.targets(rows)
            grads.add(ctx.values_of.gradient(logits, targets, chunk_saved, grad[rows]), rows)
        return *grads.get(), None, None, None, None


def _through_head(hidden, weight, values_of, shard, chunk_rows, row_weight=None) -> Tensor:
    if not torch.is_grad_enabled():  # which needs_input_grad does not tell
        hidden, weight = hidden.detach(), weight.detach()
    return _Head.apply(hidden, weight, values_of, shard, chunk_rows, row_weight)


def linear_divergence(
    student_hidden: Tensor,
    student_weight: Tensor,
    teacher_hidden: Tensor,
    teacher_weight: Tensor,
    shard: VocabShard,
    kind: str = "reverse_kl",
    chunk_rows: int = 1024,
    row_weight: Tensor | None = None,
    beta: float = 0.5,
    alpha: float = 0.1,
) -> Tensor:
    """`divergence` of hidden states: logits exist for chunk_rows rows at a time only.

    Differentiable in student_hidden and student_weight. The gradient of student_hidden is this
    shard's part of the sum over the vocabulary: **the caller adds the parts up over the group**
    (Megatron's copy to the tensor-parallel region does). The gradient of student_weight is
    complete. The teacher is a constant.

    Args:
        student_hidden: [R, D_s], and teacher_hidden: [R, D_t], the same rows on every rank of the
            group; possibly none.
        student_weight: [V, D_s], and teacher_weight: [V, D_t], this rank's rows of the heads, each
            in the dtype of its hidden states.
        kind, beta, alpha: as for `divergence`.
        row_weight: [R], constants. With them, gradients are formed in the forward pass, nothing is
            computed twice, and one backward pass is possible.

    Returns:
        [R] fp32 divergences in nats; with row_weight the scalar Σ row_weight·divergence.

    Collectives: for every chunk those of `divergence`; none in the backward pass.

    Raises:
        ValueError: an unknown kind; beta or alpha outside (0, 1).
    """
    divergence_rows = _DivergenceRows(
        _Divergence(shard, kind, beta, alpha),
        teacher_hidden.detach(),
        shard.rows(teacher_weight.detach()),
    )
    return _through_head(
        student_hidden, student_weight, divergence_rows, shard, chunk_rows, row_weight
    )


def token_log_probs(
    hidden: Tensor, weight: Tensor, tokens: Tensor, shard: VocabShard, chunk_rows: int = 1024
) -> Tensor:
    """[R] fp32 log-probability of one token a row, at temperature 1 over the common vocabulary.

    −inf for tokens outside the common vocabulary. Differentiable as `linear_divergence` is without
    row_weight: hidden gets this shard's part of its gradient.

    Args:
        hidden: [R, D].
        weight: [V, D], this rank's rows of the head.
        tokens: [R] int64 global ids.

    Collectives: for every chunk, one all-gather of 12 bytes a row and rank; none in the backward
    pass.
    """
    return _through_head(hidden, weight, _TokenRows(shard, tokens), shard, chunk_rows)
