"""What rows of logits come down to within one shard, in torch: the reference, and the CPU's way.

It goes through blocks of rows that stay in a core's cache, where the passes over a row cost a
fraction of the head's matmul. Functions are those of `reductions`, which says what they compute.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from megatron_taopd.parallel.vocab.normalizers import BLOCK_COLUMNS, Normalizers, order_key

_CACHE_BYTES = 1 << 20


def _blocks(*tensors: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """Yield some rows of each at a time: as many as fit the cache, on an accelerator all."""
    first = tensors[0]
    bytes_per_row = max(1, first.shape[1] * first.element_size())
    rows = len(first) if first.is_cuda else _CACHE_BYTES // bytes_per_row
    return zip(*(t.split(max(1, rows)) for t in tensors), strict=True)


def _in_blocks(reduce: Callable[..., Tensor], *tensors: Tensor) -> Tensor:
    return torch.cat([reduce(*block) for block in _blocks(*tensors)])


def top_columns_and_entropy_sums(logits: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Return what `reductions.top_columns_and_entropy_sums` does."""
    blocks = ((top_columns(z, block_tops(z), k), entropy_sums(z)) for (z,) in _blocks(logits))
    columns, sums = map(torch.cat, zip(*blocks, strict=True))
    return columns, sums


def block_tops(logits: Tensor) -> Tensor:
    """Return [R, ⌈V/BLOCK_COLUMNS⌉]: the highest logit of each block of columns."""
    whole = logits.shape[1] // BLOCK_COLUMNS
    tops = logits[:, : whole * BLOCK_COLUMNS].unflatten(1, (whole, BLOCK_COLUMNS)).amax(2)
    if whole * BLOCK_COLUMNS == logits.shape[1]:
        return tops
    return torch.cat([tops, logits[:, whole * BLOCK_COLUMNS :].amax(1, keepdim=True)], dim=1)


def top_columns(logits: Tensor, tops: Tensor, k: int) -> Tensor:
    """Find the [R, min(k, V)] columns of the k highest logits, given the `block_tops`.

    They lie in the k blocks of highest tops.

    (k blocks whose tops come before another block's, by logit and then by column, hold k logits
    that come before all of that block.)
    """
    num_columns, num_blocks = logits.shape[1], tops.shape[1]
    if num_columns <= k:
        return torch.arange(num_columns, device=logits.device).expand(len(logits), -1)
    blocks = torch.arange(num_blocks, device=logits.device)
    if num_blocks > k:
        blocks = order_key(tops, blocks).topk(k, dim=1, sorted=False).indices
    columns = blocks[..., None] * BLOCK_COLUMNS + torch.arange(BLOCK_COLUMNS, device=logits.device)
    columns = columns.flatten(-2).expand(len(logits), -1)
    here = columns.clamp(max=num_columns - 1)
    keys = order_key(logits.gather(1, here), columns)
    keys = keys.masked_fill(columns >= num_columns, torch.iinfo(torch.int64).min)
    return columns.gather(1, keys.topk(k, dim=1).indices)


def entropy_sums(logits: Tensor) -> Tensor:
    """Return the [R, 3] sums of `reductions.top_columns_and_entropy_sums`."""
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


def log_normalizer(logits: Tensor) -> Tensor:
    """Return what `reductions.log_normalizer` does."""
    return _in_blocks(_log_normalizer, logits)


def _log_normalizer(logits: Tensor) -> Tensor:
    lowest = torch.finfo(logits.dtype).min
    if logits.shape[1] == 0:
        return logits.new_tensor([lowest, 0.0], dtype=torch.float64).expand(len(logits), -1)
    top = logits.amax(1, keepdim=True).clamp_(min=lowest)
    total = (logits - top).exp_().sum(1, keepdim=True, dtype=torch.float64)
    return torch.cat([top.double(), total.clamp_(min=1).log_()], dim=1)


def weighted_sum(p: Tensor, values: Tensor) -> Tensor:
    """Return [R]: Σ p·value over the columns, where p = 0 contributes 0. Overwrites the values."""
    total = values.mul_(p).sum(1)
    if total.is_cuda or not total.isfinite().all():  # masking costs more than it all: only on need
        total = values.masked_fill_(p == 0, 0).sum(1)
    return total


def kl_within(kind: str, student: Tensor, teacher: Tensor, normalizers: Normalizers) -> Tensor:
    """Return what `reductions.kl_within` does."""
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
    """Return what `reductions.mixture_sums` does."""
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
    """Keep log(p/q) within ±80, in place, so that exp is finite in fp32.

    It is nan where both are 0, or either is nan.

    Beyond that the smaller of the two is nothing in a sum over the mixture.
    """
    return log_ratio.clamp_(-80, 80)


def _mixture_log_ratio(log_ratio: Tensor, weight: float) -> Tensor:
    """Return log(p/m) for m = weight·q + (1−weight)·p, from log_ratio = log(p/q)."""
    return (-log_ratio).exp_().mul_(weight).add_(1 - weight).log_().neg_()


def _mixture_h(kind: str, to_mixture: Tensor, teacher_share: float) -> Tensor:
    """Return h of `divergences`, elementwise, from log(p_S/m)."""
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
    """Write what `reductions.logits_gradient` does."""
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
