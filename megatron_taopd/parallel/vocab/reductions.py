"""What rows of logits come down to within one shard, and the gradient that goes back to them.

fp32 logits on CUDA go to `kernels`, which read each logit once for the scores and twice for a loss;
everything else goes to `reference`.
"""

from __future__ import annotations

import torch
from torch import Tensor

from megatron_taopd.parallel.vocab import reference
from megatron_taopd.parallel.vocab.normalizers import Normalizers

if torch.cuda.is_available():  # elsewhere nothing calls them, and Triton may not be installed
    from megatron_taopd.parallel.vocab import kernels


def _fused(logits: Tensor) -> bool:
    return logits.is_cuda and logits.dtype == torch.float32 and logits.numel() > 0


def top_columns_and_entropy_sums(logits: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Find the highest logits of each row, and what its entropy needs.

    Args:
        logits: [R, V] fp32.

    Returns:
        [R, min(k, V)] int64 columns, as a set: equal logits by lowest column; and [R, 3] fp32:
        m = max z, Σ exp(z−m) without the max itself, Σ exp(z−m)·(z−m). The max contributes a known
        1, in which fp32 would lose the rest of a peaked row. Rows of −inf, or of no columns, have
        a finite m and no rest.
    """
    if _fused(logits):
        sums, tops = kernels.entropy_sums_and_block_tops(logits)
        return reference.top_columns(logits, tops, k), sums
    return reference.top_columns_and_entropy_sums(logits, k)


def log_normalizer(logits: Tensor) -> Tensor:
    """Return [R, 2] float64: max z and log Σ exp(z − max) of each row.

    Columns that are all −inf, or none, have a finite max and a log-sum of 0, and so no mass.
    """
    return (kernels if _fused(logits) else reference).log_normalizer(logits)


def kl_within(kind: str, student: Tensor, teacher: Tensor, normalizers: Normalizers) -> Tensor:
    """Return [R]: the KL of two distributions within a shard, each renormalised there.

    Args:
        kind: reverse_kl or forward_kl.
        student, teacher: [R, V] logits.
        normalizers: of this shard.
    """
    where = kernels if _fused(student) else reference
    return where.kl_within(kind, student, teacher, normalizers)


def mixture_sums(
    kind: str, teacher_share: float, student: Tensor, teacher: Tensor, normalizers: Normalizers
) -> Tensor:
    """Return [R, 2]: this shard's part of KL(p_S ‖ m), and of KL(p_T ‖ m) (jsd) or E[h] (skewed).

    Args:
        kind: jsd or skewed_reverse_kl.
        teacher_share: w, of the teacher in the mixture m.
        student, teacher: [R, V] logits.
        normalizers: of the whole rows.
    """
    where = kernels if _fused(student) else reference
    return where.mixture_sums(kind, teacher_share, student, teacher, normalizers)


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
    where = kernels if _fused(student) else reference
    return where.logits_gradient(
        kind, teacher_share, student, teacher, normalizers, mean, grad, out
    )
