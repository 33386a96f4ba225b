"""Divergences of rows of logits: values in one or two small all-gathers, gradients in none."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_taopd.parallel.vocab import reductions
from megatron_taopd.parallel.vocab.normalizers import Normalizers
from megatron_taopd.parallel.vocab.reference import weighted_sum
from megatron_taopd.parallel.vocab.shard import VocabShard

DIVERGENCES = ("reverse_kl", "forward_kl", "jsd", "skewed_reverse_kl")


@dataclass(frozen=True)
class Divergence:
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

    def forward(self, student: Tensor, teacher: Tensor) -> tuple[Tensor, Tensor]:
        """Return the loss [R], and [R, 5] for the gradient: the normalisers and E[h].

        Args:
            student, teacher: [R, width] logits of the columns that take part.
        """
        dtype = student.dtype
        student_parts = reductions.log_normalizer(student).split(1, dim=1)
        teacher_parts = reductions.log_normalizer(teacher).split(1, dim=1)
        of_shard = _normalizers((*student_parts, *teacher_parts), dtype)
        sent = [*of_shard]
        if self.kind in ("reverse_kl", "forward_kl"):
            sent.append(reductions.kl_within(self.kind, student, teacher, of_shard)[:, None])
        gathered = self.shard.all_gather(torch.cat(sent, dim=1)).double().unbind(2)
        student_tops, teacher_tops, log_sums, excesses = gathered[:4]
        student_top, log_sum, student_mass = merge_normalizers(student_tops, log_sums)
        teacher_top, teacher_log_sum, teacher_mass = merge_normalizers(
            teacher_tops, log_sums - excesses
        )
        merged = (student_top, log_sum, teacher_top, teacher_log_sum)
        normalizers = _normalizers([part[:, None] for part in merged], dtype)

        if self.kind == "reverse_kl":
            loss = mean = _chain_rule(student_mass, teacher_mass, gathered[4])
        elif self.kind == "forward_kl":
            loss = mean = _chain_rule(teacher_mass, student_mass, gathered[4])
        else:
            sums = reductions.mixture_sums(
                self.kind, self.teacher_share, student, teacher, normalizers
            )
            student_kl, other = self.shard.all_gather(sums).double().sum(0).unbind(1)
            loss, mean = student_kl, other
            if self.kind == "jsd":
                mean = (1 - self.beta) * student_kl
                loss = self.beta * other + mean
        return loss.to(dtype), torch.cat([*normalizers, mean[:, None].to(dtype)], dim=1)

    def gradient(
        self, student: Tensor, teacher: Tensor, saved: Tensor, grad: Tensor, out: Tensor
    ) -> Tensor:
        """Write d(Σ grad·loss) / d student, [R, width], to out, which may be student."""
        *normalizers, mean = saved.split(1, dim=1)
        return reductions.logits_gradient(
            self.kind,
            self.teacher_share,
            student,
            teacher,
            Normalizers(*normalizers),
            mean,
            grad,
            out,
        )


def _normalizers(of_models: Sequence[Tensor], dtype: torch.dtype) -> Normalizers:
    """Make them of max and log-sum of the student, then of the teacher, float64 [R, 1] each."""
    student_top, log_sum, teacher_top, teacher_log_sum = of_models
    parts = (student_top, teacher_top, log_sum, log_sum - teacher_log_sum)
    return Normalizers(*(part.to(dtype) for part in parts))


def merge_normalizers(tops: Tensor, log_sums: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Merge the shards' [tp, R] float64 into the whole rows', [R], and log p(shard), [tp, R]."""
    top = tops.amax(0)
    log_totals = tops - top + log_sums
    log_sum = log_totals.logsumexp(0)
    return top, log_sum, log_totals - log_sum


def _chain_rule(log_p: Tensor, log_q: Tensor, within: Tensor) -> Tensor:
    """Return [R]: KL(p ‖ q) from the shards' log masses and the KLs within them, [tp, R] each.

    KL = Σ_shards p(shard)·(log p(shard) − log q(shard) + KL within), in which no term is big when
    the distributions are close, as the terms of Σ p·(z_p − z_q) − log Z_p + log Z_q would be.
    """
    return weighted_sum(log_p.exp().t(), (log_p - log_q + within).t())


class OfLogits(torch.autograd.Function):
    """Makes a divergence differentiable in the student's logits; the teacher is a constant."""

    @staticmethod
    def forward(ctx, student, targets, divergence):
        loss, saved = divergence.forward(student, targets)
        ctx.save_for_backward(student, saved)
        ctx.targets, ctx.divergence = targets, divergence
        return loss

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):
        student, saved = ctx.saved_tensors
        out = torch.empty_like(student)
        return ctx.divergence.gradient(student, ctx.targets, saved, grad, out), None, None


def divergence(
    student_logits: Tensor,
    teacher_logits: Tensor,
    shard: VocabShard,
    kind: str = "reverse_kl",
    beta: float = 0.5,
    alpha: float = 0.1,
) -> Tensor:
    """Return [R]: the divergence of each row over the common vocabulary, in nats (Eq. 6).

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
    return OfLogits.apply(
        shard.columns(student_logits).to(wide),
        shard.columns(teacher_logits.detach()).to(wide),
        Divergence(shard, kind, beta, alpha),
    )
