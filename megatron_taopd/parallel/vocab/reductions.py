"""What rows of logits come down to within one shard, and the gradient that goes back to them.

The torch code is the reference, and what runs on the CPU: in blocks of rows that stay in a core's
cache, where the passes over a row cost a fraction of the head's matmul. On CUDA fp32 logits go to
`kernels`, which read each logit once for the scores and twice for a loss.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor

BLOCK_COLUMNS = 64  # columns of which a first look at the top-K knows only the highest logit
_CACHE_BYTES = 1 << 20

# Sorts behind every real id among candidates of equal logit.
NO_ID = torch.iinfo(torch.int32).max


def _fused(logits: Tensor) -> bool:
    return logits.is_cuda and logits.dtype == torch.float32 and logits.numel() > 0


def _blocks(*tensors: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """Some rows of each at a time: as many as fit the cache, on an accelerator all."""
    first = tensors[0]
    bytes_per_row = max(1, first.shape[1] * first.element_size())
    rows = len(first) if first.is_cuda else _CACHE_BYTES // bytes_per_row
    return zip(*(t.split(max(1, rows)) for t in tensors), strict=True)


def _in_blocks(reduce: Callable[..., Tensor], *tensors: Tensor) -> Tensor:
    return torch.cat([reduce(*block) for block in _blocks(*tensors)])


# ------------------------------------------------------------------------------ top-K and entropies


def top_columns_and_entropy_sums(logits: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The highest logits of each row, and what its entropy needs.

    Args:
        logits: [R, V] fp32.

    Returns:
        [R, min(k, V)] int64 columns, as a set: equal logits by lowest column; and [R, 3] fp32:
        m = max z, Σ exp(z−m) without the max itself, Σ exp(z−m)·(z−m). The max contributes a known
        1, in which fp32 would lose the rest of a peaked row. Rows of −inf, or of no columns, have
        a finite m and no rest.
    """
    if _fused(logits):
        from megatron_taopd.parallel.vocab import kernels

        sums, block_tops = kernels.entropy_sums_and_block_tops(logits)
        return _top_columns(logits, block_tops, k), sums
    blocks = ((_top_columns(z, _block_tops(z), k), _entropy_sums(z)) for (z,) in _blocks(logits))
    columns, sums = map(torch.cat, zip(*blocks, strict=True))
    return columns, sums


def order_key(logits: Tensor, ids: Tensor) -> Tensor:
    """int64 keys that are all different and sort by (logit, lowest id), so that topk is exact.

    An fp32 number's bits, read as an integer, sort like the number, once those of negative numbers
    are flipped (all but the sign). Adding 0 turns −0 into 0, which would differ. A nan, whatever
    its bits, sorts like +inf: a row that has one has it among its top-K.
    """
    bits = (logits + 0.0).nan_to_num(torch.inf, torch.inf, -torch.inf).view(torch.int32)
    return ((bits ^ ((bits >> 31) & 0x7FFFFFFF)).long() << 32) - ids


def _block_tops(logits: Tensor) -> Tensor:
    """[R, ⌈V/BLOCK_COLUMNS⌉] the highest logit of each block of columns."""
    whole = logits.shape[1] // BLOCK_COLUMNS
    tops = logits[:, : whole * BLOCK_COLUMNS].unflatten(1, (whole, BLOCK_COLUMNS)).amax(2)
    if whole * BLOCK_COLUMNS == logits.shape[1]:
        return tops
    return torch.cat([tops, logits[:, whole * BLOCK_COLUMNS :].amax(1, keepdim=True)], dim=1)


def _top_columns(logits: Tensor, block_tops: Tensor, k: int) -> Tensor:
    """[R, min(k, V)] columns: the k highest logits lie in the k blocks of highest tops.

    (k blocks whose tops come before another block's, by logit and then by column, hold k logits
    that come before all of that block.)
    """
    num_columns, num_blocks = logits.shape[1], block_tops.shape[1]
    if num_columns <= k:
        return torch.arange(num_columns, device=logits.device).expand(len(logits), -1)
    blocks = torch.arange(num_blocks, device=logits.device)
    if num_blocks > k:
        blocks = order_key(block_tops, blocks).topk(k, dim=1, sorted=False).indices
    columns = blocks[..., None] * BLOCK_COLUMNS + torch.arange(BLOCK_COLUMNS, device=logits.device)
    columns = columns.flatten(-2).expand(len(logits), -1)
    here = columns.clamp(max=num_columns - 1)
    keys = order_key(logits.gather(1, here), columns)
    keys = keys.masked_fill(columns >= num_columns, torch.iinfo(torch.int64).min)
    return columns.gather(1, keys.topk(k, dim=1).indices)


def _entropy_sums(logits: Tensor) -> Tensor:
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


# ------------------------------------------------------------------------------------- normalisers


class Normalizers(NamedTuple):
    """What turns logits of both models into log p and log(p_S/p_T), [R, 1] each.

    A model's max z and log Σ exp(z − max) stay apart: their fp32 sum would have no digits left for
    log p when logits are around 1e4. The teacher's log-sum is given by how much the student's
    exceeds it. Near agreement that is a small number with all its digits, while rounding either
    log-sum to fp32 would put an error of up to 5e-7 on every log-ratio of the row.
    """

    student_top: Tensor
    teacher_top: Tensor
    log_sum: Tensor
    excess: Tensor

    def student_log_probs(self, logits: Tensor) -> Tensor:
        return (logits - self.student_top).sub_(self.log_sum)

    def teacher_log_probs(self, logits: Tensor) -> Tensor:
        return (logits - self.teacher_top).sub_(self.log_sum - self.excess)

    def log_ratio(self, student_logits: Tensor, teacher_logits: Tensor) -> Tensor:
        """log p_S − log p_T; nan where both are −inf."""
        shifted = teacher_logits - self.teacher_top
        return (student_logits - self.student_top).sub_(shifted).sub_(self.excess)


def log_normalizer(logits: Tensor) -> Tensor:
    """[R, 2] float64: max z and log Σ exp(z − max) of each row.

    Columns that are all −inf, or none, have a finite max and a log-sum of 0, and so no mass.
    """
    if _fused(logits):
        from megatron_taopd.parallel.vocab import kernels

        return kernels.log_normalizer(logits)
    return _in_blocks(_log_normalizer, logits)


def _log_normalizer(logits: Tensor) -> Tensor:
    lowest = torch.finfo(logits.dtype).min
    if logits.shape[1] == 0:
        return logits.new_tensor([lowest, 0.0], dtype=torch.float64).expand(len(logits), -1)
    top = logits.amax(1, keepdim=True).clamp_(min=lowest)
    total = (logits - top).exp_().sum(1, keepdim=True, dtype=torch.float64)
    return torch.cat([top.double(), total.clamp_(min=1).log_()], dim=1)


# ------------------------------------------------------------------------------------ divergences


def weighted_sum(p: Tensor, values: Tensor) -> Tensor:
    """[R] Σ p·value over the columns; p = 0 contributes 0 whatever the value. Overwrites values."""
    total = values.mul_(p).sum(1)
    if total.is_cuda or not total.isfinite().all():  # masking costs more than it all: only on need
        total = values.masked_fill_(p == 0, 0).sum(1)
    return total


def kl_within(kind: str, student: Tensor, teacher: Tensor, normalizers: Normalizers) -> Tensor:
    """[R] the KL of two distributions within a shard, each renormalised there.

    Args:
        kind: reverse_kl or forward_kl.
        student, teacher: [R, V] logits.
        normalizers: of this shard.
    """
    if _fused(student):
        from megatron_taopd.parallel.vocab import kernels

        return kernels.kl_within(kind, student, teacher, normalizers)
    return _in_blocks(lambda *rows: _kl_within(kind, *rows), student, teacher, *normalizers)


def _kl_within(kind: str, student: Tensor, teacher: Tensor, *normalizers: Tensor) -> Tensor:
    of_shard = Normalizers(*normalizers)
    log_ratio = of_shard.log_ratio(student, teacher)
    if kind == "reverse_kl":
        return weighted_sum(of_shard.student_log_probs(student).exp_(), log_ratio)
    return weighted_sum(of_shard.teacher_log_probs(teacher).exp_(), log_ratio.neg_())


def mixture_sums(
    kind: str, teacher_share: float, student: Tensor, teacher: Tensor, normalizers: Normalizers
) -> Tensor:
    """[R, 2] this shard's part of KL(p_S ‖ m), and of KL(p_T ‖ m) (jsd) or E[h] (skewed).

    Args:
        kind: jsd or skewed_reverse_kl.
        teacher_share: w, of the teacher in the mixture m.
        student, teacher: [R, V] logits.
        normalizers: of the whole rows.
    """
    if _fused(student):
        from megatron_taopd.parallel.vocab import kernels

        return kernels.mixture_sums(kind, teacher_share, student, teacher, normalizers)
    return _in_blocks(
        lambda *rows: _mixture_sums(kind, teacher_share, *rows), student, teacher, *normalizers
    )


def _mixture_sums(
    kind: str, teacher_share: float, student: Tensor, teacher: Tensor, *normalizers: Tensor
) -> Tensor:
    whole = Normalizers(*normalizers)
    p_s = whole.student_log_probs(student).exp_()
    log_ratio = _bounded(whole.log_ratio(student, teacher))
    to_mixture = _mixture_log_ratio(log_ratio, teacher_share)
    if kind == "jsd":
        teacher_to_mixture = _mixture_log_ratio(log_ratio.neg_(), 1 - teacher_share)
        other = weighted_sum(whole.teacher_log_probs(teacher).exp_(), teacher_to_mixture)
    else:
        other = weighted_sum(p_s, _mixture_h(kind, to_mixture, teacher_share))
    return torch.stack([weighted_sum(p_s, to_mixture), other], dim=1)


def _bounded(log_ratio: Tensor) -> Tensor:
    """log(p/q) within ±80, in place, so that exp is finite in fp32; nan where both are 0, or either
    is nan.

    Beyond that the smaller of the two is nothing in a sum over the mixture.
    """
    return log_ratio.clamp_(-80, 80)


def _mixture_log_ratio(log_ratio: Tensor, weight: float) -> Tensor:
    """log(p/m) for m = weight·q + (1−weight)·p, from log_ratio = log(p/q)."""
    return (-log_ratio).exp_().mul_(weight).add_(1 - weight).log_().neg_()


def _mixture_h(kind: str, to_mixture: Tensor, teacher_share: float) -> Tensor:
    """h of `divergences`, elementwise, from log(p_S/m)."""
    student_share = 1 - teacher_share
    if kind == "jsd":
        return to_mixture * student_share
    return to_mixture - to_mixture.exp().mul_(student_share)


def logits_gradient(
    kind: str,
    teacher_share: float,
    student: Tensor,
    teacher: Tensor,
    normalizers: Normalizers,
    mean: Tensor,
    grad: Tensor,
    out: Tensor,
) -> Tensor:
    """Write grad·p_S·(h − mean), for forward_kl grad·(p_S − p_T), to `out` and return it.

    Args:
        kind, teacher_share, student, teacher: as above.
        normalizers, mean: [R, 1] each, of the whole rows: what `divergences` saves.
        grad: [R], of each row's loss.
        out: [R, V]; may be `student` itself.
    """
    if _fused(student):
        from megatron_taopd.parallel.vocab import kernels

        return kernels.logits_gradient(
            kind, teacher_share, student, teacher, normalizers, mean, grad, out
        )

    for z_s, z_t, row_mean, row_grad, rows_out, *row_normalizers in _blocks(
        student, teacher, mean, grad[:, None], out, *normalizers
    ):
        whole = Normalizers(*row_normalizers)
        p = whole.student_log_probs(z_s).exp_()
        if kind == "forward_kl":
            torch.sub(p, whole.teacher_log_probs(z_t).exp_(), out=rows_out)
        else:
            h = whole.log_ratio(z_s, z_t)
            if kind != "reverse_kl":
                h = _mixture_h(kind, _mixture_log_ratio(_bounded(h), teacher_share), teacher_share)
            torch.mul(h.sub_(row_mean), p, out=rows_out)
            if out.is_cuda or not rows_out.sum().isfinite():
                rows_out.masked_fill_(p == 0, 0)
        rows_out.mul_(row_grad)
    return out
