"""`reductions` on CUDA, in Triton: a program a row, which reads each logit once.

A program walks along its row in steps of STEP columns. Each of its lanes reduces every STEP-th
column on its own, with a running max; the lanes are brought together at the end of the row.

What is not a number in a row is not one in what the row comes down to, as in the reference: a max
or a comparison as CUDA has them would leave a nan out, and `_larger` does not.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from megatron_taopd.parallel.vocab.normalizers import BLOCK_COLUMNS, Normalizers

STEP = 4096
NUM_WARPS = 8

_STEP, _BLOCK = tl.constexpr(STEP), tl.constexpr(BLOCK_COLUMNS)
_LOWEST = tl.constexpr(torch.finfo(torch.float32).min)  # the max of nothing, as in the reference
_KINDS = {"reverse_kl": 0, "forward_kl": 1, "jsd": 2, "skewed_reverse_kl": 3}
_REVERSE, _FORWARD, _JSD = tl.constexpr(0), tl.constexpr(1), tl.constexpr(2)


def _grid(*logits: Tensor) -> tuple[int]:
    for tensor in logits:
        assert tensor.stride(1) == 1, tensor.stride()
    return (len(logits[0]),)


def _in_step(student: Tensor, teacher: Tensor) -> tuple[Tensor, Tensor]:
    """Return both with one stride of rows, as chunks of two heads have anyway."""
    if student.stride(0) != teacher.stride(0):
        return student.contiguous(), teacher.contiguous()
    return student, teacher


def _numbers(*parts: Tensor | float) -> Tensor:
    """Return [R, n] fp32: the numbers that each row's program comes with."""
    like = next(part for part in parts if isinstance(part, Tensor))
    columns = [p if isinstance(p, Tensor) else like.new_full((len(like), 1), p) for p in parts]
    return torch.cat(columns, dim=1)


@triton.jit
def _larger(a, b):
    """Return the maximum as torch does: nan if either is."""
    return tl.maximum(a, b, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def _row_of(logits, stride, columns, num_columns):
    """Load one step of this program's row; −inf past its end."""
    start = logits + tl.program_id(0).to(tl.int64) * stride
    return tl.load(start + columns, mask=columns < num_columns, other=-float("inf"))


@triton.jit
def _gap(a, b):
    """Return −|a − b|, but no less than −200, where exp is 0 already."""
    return _larger(-tl.abs(a - b), -200.0)


@triton.jit
def _weight(z, gap):
    """Return exp(gap) of a logit or a lane's max; 0 of −inf and of a lane that has seen nothing."""
    return tl.where(z <= _LOWEST, 0.0, tl.exp(gap))


@triton.jit
def _entropy_sums_kernel(logits, stride, num_columns, sums, tops, num_blocks):
    row = tl.program_id(0).to(tl.int64)
    lanes = tl.arange(0, _STEP)
    top = tl.full([_STEP], _LOWEST, tl.float32)
    rest = tl.zeros([_STEP], tl.float32)
    weighted = tl.zeros([_STEP], tl.float32)
    for start in range(0, num_columns, _STEP):
        z = _row_of(logits, stride, start + lanes, num_columns)

        blocks = start // _BLOCK + tl.arange(0, _STEP // _BLOCK)
        block_tops = tl.reduce(tl.reshape(z, [_STEP // _BLOCK, _BLOCK]), 1, _larger)
        tl.store(tops + row * num_blocks + blocks, block_tops, mask=blocks < num_blocks)

        # The lane's max counts as a 1 that is not in `rest`. A higher logit takes its place.
        higher = z > top
        gap = _gap(z, top)
        weight = _weight(z, gap)
        moved = weight * (weighted + gap * (1 + rest))
        weighted = tl.where(higher, moved, weighted + weight * gap)
        rest = tl.where(higher, weight * (1 + rest), rest + weight)
        top = _larger(top, z)

    top_of_all = tl.reduce(top, 0, _larger)
    gap = _gap(top, top_of_all)
    weight = _weight(top, gap)
    highest = lanes == tl.argmax(top, axis=0)  # whose max is left out
    tl.store(sums + row * 3, top_of_all)
    tl.store(sums + row * 3 + 1, tl.sum(tl.where(highest, rest, weight * (1 + rest)), axis=0))
    tl.store(sums + row * 3 + 2, tl.sum(weight * (weighted + gap * (1 + rest)), axis=0))


def entropy_sums_and_block_tops(logits: Tensor) -> tuple[Tensor, Tensor]:
    """Return `reference.entropy_sums` and `reference.block_tops` of [R, V] fp32 logits."""
    num_columns = logits.shape[1]
    num_blocks = -(-num_columns // BLOCK_COLUMNS)
    sums = logits.new_empty(len(logits), 3)
    tops = logits.new_empty(len(logits), num_blocks)
    _entropy_sums_kernel[_grid(logits)](
        logits, logits.stride(0), num_columns, sums, tops, num_blocks,
        num_warps=NUM_WARPS,
    )  # fmt: skip
    return sums, tops


@triton.jit
def _log_normalizer_kernel(logits, stride, num_columns, out):
    lanes = tl.arange(0, _STEP)
    top = tl.full([_STEP], _LOWEST, tl.float32)
    total = tl.zeros([_STEP], tl.float32)
    for start in range(0, num_columns, _STEP):
        z = _row_of(logits, stride, start + lanes, num_columns)
        weight = _weight(z, _gap(z, top))
        total = tl.where(z > top, total * weight + 1, total + weight)
        top = _larger(top, z)
    top_of_all = tl.reduce(top, 0, _larger)
    weight = _weight(top, _gap(top, top_of_all))
    total = tl.sum((weight * total).to(tl.float64), axis=0)
    row = tl.program_id(0).to(tl.int64)
    tl.store(out + row * 2, top_of_all.to(tl.float64))
    tl.store(out + row * 2 + 1, total)


def log_normalizer(logits: Tensor) -> Tensor:
    """Return `reductions.log_normalizer` of [R, V] fp32 logits."""
    out = logits.new_empty(len(logits), 2, dtype=torch.float64)
    _log_normalizer_kernel[_grid(logits)](
        logits, logits.stride(0), logits.shape[1], out, num_warps=NUM_WARPS
    )
    out[:, 1].clamp_(min=1).log_()
    return out


@triton.jit
def _load(numbers, index: tl.constexpr, count: tl.constexpr):
    """Load the index-th of the `count` numbers that this program's row comes with."""
    return tl.load(numbers + tl.program_id(0).to(tl.int64) * count + index)


@triton.jit
def _probs(z, top, log_sum):
    return tl.exp(z - top - log_sum)


@triton.jit
def _log_ratio(z_s, z_t, top_s, top_t, excess):
    return (z_s - top_s) - (z_t - top_t) - excess


@triton.jit
def _bounded(ratio):
    """Return what `reference._bounded` does."""
    return tl.clamp(ratio, -80.0, 80.0, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def _term(p, value):
    """Return p·value, and 0 for p = 0 whatever the value."""
    return p * tl.where(p == 0, 0.0, value)


@triton.jit
def _mixture_log_ratio(ratio, weight):
    return -tl.log(tl.exp(-ratio) * weight + (1 - weight))


@triton.jit
def _mixture_h(to_mixture, teacher_share, KIND: tl.constexpr):
    if KIND == _JSD:
        h = to_mixture * (1 - teacher_share)
    else:
        h = to_mixture - tl.exp(to_mixture) * (1 - teacher_share)
    return h


@triton.jit
def _kl_within_kernel(
    student, teacher, stride, num_columns, numbers, out,
    KIND: tl.constexpr,
):  # fmt: skip
    top_s, top_t = _load(numbers, 0, 4), _load(numbers, 1, 4)
    log_sum, excess = _load(numbers, 2, 4), _load(numbers, 3, 4)
    total = tl.zeros([_STEP], tl.float32)
    for start in range(0, num_columns, _STEP):
        columns = start + tl.arange(0, _STEP)
        z_s = _row_of(student, stride, columns, num_columns)
        z_t = _row_of(teacher, stride, columns, num_columns)
        ratio = _log_ratio(z_s, z_t, top_s, top_t, excess)
        if KIND == _REVERSE:
            p = _probs(z_s, top_s, log_sum)
            total += _term(p, ratio)
        else:
            p = _probs(z_t, top_t, log_sum - excess)
            total -= _term(p, ratio)
    tl.store(out + tl.program_id(0), tl.sum(total.to(tl.float64), axis=0).to(tl.float32))


def kl_within(kind: str, student: Tensor, teacher: Tensor, normalizers: Normalizers) -> Tensor:
    """Return `reductions.kl_within` of [R, V] fp32 logits."""
    student, teacher = _in_step(student, teacher)
    out = student.new_empty(len(student))
    _kl_within_kernel[_grid(student, teacher)](
        student, teacher, student.stride(0), student.shape[1],
        _numbers(*normalizers), out,
        KIND=_KINDS[kind], num_warps=NUM_WARPS,
    )  # fmt: skip
    return out


@triton.jit
def _mixture_sums_kernel(
    student, teacher, stride, num_columns, numbers, out,
    KIND: tl.constexpr,
):  # fmt: skip
    top_s, top_t = _load(numbers, 0, 5), _load(numbers, 1, 5)
    log_sum, excess = _load(numbers, 2, 5), _load(numbers, 3, 5)
    teacher_share = _load(numbers, 4, 5)
    student_kl = tl.zeros([_STEP], tl.float32)
    other = tl.zeros([_STEP], tl.float32)
    for start in range(0, num_columns, _STEP):
        columns = start + tl.arange(0, _STEP)
        z_s = _row_of(student, stride, columns, num_columns)
        z_t = _row_of(teacher, stride, columns, num_columns)
        p_s = _probs(z_s, top_s, log_sum)
        ratio = _bounded(_log_ratio(z_s, z_t, top_s, top_t, excess))
        to_mixture = _mixture_log_ratio(ratio, teacher_share)
        student_kl += _term(p_s, to_mixture)
        if KIND == _JSD:
            p_t = _probs(z_t, top_t, log_sum - excess)
            other += _term(p_t, _mixture_log_ratio(-ratio, 1 - teacher_share))
        else:
            other += _term(p_s, _mixture_h(to_mixture, teacher_share, KIND))
    row = tl.program_id(0).to(tl.int64)
    tl.store(out + row * 2, tl.sum(student_kl.to(tl.float64), axis=0).to(tl.float32))
    tl.store(out + row * 2 + 1, tl.sum(other.to(tl.float64), axis=0).to(tl.float32))


def mixture_sums(
    kind: str, teacher_share: float, student: Tensor, teacher: Tensor, normalizers: Normalizers
) -> Tensor:
    """Return `reductions.mixture_sums` of [R, V] fp32 logits."""
    student, teacher = _in_step(student, teacher)
    out = student.new_empty(len(student), 2)
    _mixture_sums_kernel[_grid(student, teacher)](
        student, teacher, student.stride(0), student.shape[1],
        _numbers(*normalizers, teacher_share), out,
        KIND=_KINDS[kind], num_warps=NUM_WARPS,
    )  # fmt: skip
    return out


@triton.jit
def _logits_gradient_kernel(
    student, teacher, stride, num_columns, numbers, out, stride_out,
    KIND: tl.constexpr,
):  # fmt: skip
    columns = tl.program_id(1) * _STEP + tl.arange(0, _STEP)
    top_s, top_t = _load(numbers, 0, 7), _load(numbers, 1, 7)
    log_sum, excess = _load(numbers, 2, 7), _load(numbers, 3, 7)
    mean, grad = _load(numbers, 4, 7), _load(numbers, 5, 7)
    teacher_share = _load(numbers, 6, 7)
    z_s = _row_of(student, stride, columns, num_columns)
    z_t = _row_of(teacher, stride, columns, num_columns)
    p_s = _probs(z_s, top_s, log_sum)
    if KIND == _FORWARD:
        value = p_s - _probs(z_t, top_t, log_sum - excess)
    else:
        h = _log_ratio(z_s, z_t, top_s, top_t, excess)
        if KIND != _REVERSE:
            h = _mixture_h(_mixture_log_ratio(_bounded(h), teacher_share), teacher_share, KIND)
        value = _term(p_s, h - mean)
    row_out = out + tl.program_id(0).to(tl.int64) * stride_out
    tl.store(row_out + columns, (value * grad).to(out.dtype.element_ty), mask=columns < num_columns)


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
    """Write `reductions.logits_gradient` of [R, V] fp32 logits to `out`, which may be narrower."""
    student, teacher = _in_step(student, teacher)
    (rows,) = _grid(student, teacher, out)
    _logits_gradient_kernel[(rows, triton.cdiv(student.shape[1], STEP))](
        student, teacher, student.stride(0), student.shape[1],
        _numbers(*normalizers, mean, grad[:, None], teacher_share), out, out.stride(0),
        KIND=_KINDS[kind], num_warps=NUM_WARPS,
    )  # fmt: skip
    return out
