"""Attention, matrix products and the vocabulary's kernels against float64, and their pace."""

from __future__ import annotations

import math
from collections.abc import Callable
from itertools import product

import torch
from torch import Tensor

from benchmarks.first_gpu.result import Result, Setting
from benchmarks.first_gpu.runs import seconds_of
from benchmarks.vocab_parallel import roofline
from benchmarks.vocab_parallel.ways import dense_scores
from megatron_taopd import VocabShard, divergence, score_rows
from megatron_taopd.config.schema import LossSection
from megatron_taopd.models.attention import PackedAttention, Packing
from megatron_taopd.parallel import platform
from megatron_taopd.parallel.vocab import DIVERGENCES, reductions
from megatron_taopd.parallel.vocab.divergences import Divergence
from megatron_taopd.parallel.vocab.normalizers import Normalizers
from megatron_taopd.parallel.vocab.projection import HeadGradients, Projection
from megatron_taopd.parallel.vocab.shard import ALIGNMENT

LOSS = LossSection()
K = 16
BF16 = 2**-7  # of a number that was rounded to bf16 a few times on its way


# --------------------------------------------------------------------------------------- attention


def attention(setting: Setting) -> Result:
    """Compare packed attention with its definition in float64, forward and backward.

    Several query heads share a key-value head; one segment has one token, and the last one is
    padding, of which no gradient comes back.
    """
    result = Result()
    lengths = [5, 1, 12, 6] if setting.small else [1000, 1, 517, 2048, 42]
    heads, groups, width = (4, 2, 16) if setting.small else (32, 8, 128)
    tokens, padding = sum(lengths), slice(-lengths[-1], None)
    draw = Draw()
    inputs = [draw(tokens, n, width).bfloat16().requires_grad_() for n in (heads, groups, groups)]
    grad = draw(tokens, heads, width).bfloat16()
    grad[padding] = 0
    angles = torch.cat([torch.arange(n) for n in lengths])[:, None, None] * torch.logspace(
        0, -3, width // 2
    ).repeat(2)
    rotation = tuple(t.bfloat16().to(platform.device()) for t in (angles.cos(), angles.sin()))

    starts = torch.tensor([0, *lengths]).cumsum(0).int().to(platform.device())
    packing = Packing(
        qkv_format="thd", cu_seqlens_q=starts, cu_seqlens_kv=starts, max_seqlen_q=max(lengths),
        max_seqlen_kv=max(lengths), lengths=lengths, key_lengths=lengths, rotation=rotation,
    )  # fmt: skip
    module = PackedAttention(Shape(width))

    def ours() -> list[Tensor]:
        out = module(*inputs, packed_seq_params=packing)
        return [out.detach(), *torch.autograd.grad(out, inputs, grad.flatten(1))]

    wide = [t.detach().double().requires_grad_() for t in inputs]
    out = attention_in_float64(*wide, [t.double() for t in rotation], lengths)
    exact = [out.detach(), *torch.autograd.grad(out, wide, grad.double().flatten(1))]
    for name, got, expected in zip(
        ("output", "∂query", "∂key", "∂value"), ours(), exact, strict=True
    ):
        error = (got.double() - expected).norm() / expected.norm()
        result.most(f"{name}: relative error", error, 2 * BF16)
        if name != "output":
            result.most(f"{name} of padding", got[padding].abs().max(), 0.0)
        if name in ("∂query", "∂key"):  # a token that sees itself alone
            alone = got[lengths[0]].abs().max() / expected.abs().max()
            result.most(f"{name} of the one-token segment, of the largest", alone, BF16)
    result.figures["forward and backward, ms"] = 1e3 * seconds_of(ours, 5)
    return result


class Shape:
    """What `PackedAttention` asks of a configuration."""

    def __init__(self, kv_channels: int):
        self.kv_channels = kv_channels


def attention_in_float64(
    query: Tensor, key: Tensor, value: Tensor, rotation: list[Tensor], lengths: list[int]
) -> Tensor:
    """Return softmax(q·kᵀ/√d + mask)·v segment by segment, [T, heads × d]."""
    cosines, sines = rotation

    def rotate(x: Tensor) -> Tensor:
        first, second = x.chunk(2, dim=-1)
        return x * cosines + torch.cat([-second, first], dim=-1) * sines

    shared = query.shape[1] // key.shape[1]
    parts = []
    segments = zip(*(x.split(lengths) for x in (rotate(query), rotate(key), value)), strict=True)
    for q, k, v in segments:
        k, v = (x.repeat_interleave(shared, dim=1) for x in (k, v))
        scores = torch.einsum("qhd,khd->hqk", q, k) / math.sqrt(q.shape[-1])
        later = torch.ones(len(q), len(q), dtype=torch.bool, device=q.device).triu(1)
        weights = scores.masked_fill(later, -torch.inf).softmax(-1)
        parts.append(torch.einsum("hqk,khd->qhd", weights, v))
    return torch.cat(parts).flatten(1)


# ----------------------------------------------------------------------------------------- products


def products(setting: Setting) -> Result:
    """Compare a head's matrix products with float64, for no rows and odd widths.

    On CUDA these are `mm` and `addmm` of bf16 with `out_dtype` fp32, the second on top of what is
    in its output; a width of 389 is three aligned blocks and a rest, 384 has no rest, 100 is one.
    """
    result, draw = Result(), Draw()
    largest = {"logits": 0.0, "∂hidden": 0.0, "∂weight": 0.0}
    widths = [389, 384, 100] if setting.small else [389, 384, 100, 75_697]
    for rows, size in product([0, 1, 11], widths):
        columns = -(-(size + 1) // ALIGNMENT) * ALIGNMENT + ALIGNMENT
        hidden, weight = draw(rows, 24).bfloat16(), draw(columns, 24).bfloat16()
        weight[size:] = torch.nan  # of ids that take no part
        shard = VocabShard(0, columns, None, size)
        logits = Projection(hidden, weight, shard, max(rows, 1))(slice(0, rows))
        main_grad = torch.ones(columns, 24, device=platform.device())
        gradients = HeadGradients(hidden, weight, shard, (True, True), main_grad)
        written = gradients.buffer(draw(rows, shard.padded_width))
        written.copy_(draw(rows, shard.padded_width))
        written[:, size:] = 0
        gradients.add(written, slice(0, rows))

        wide, head = written[:, :size].double(), weight[:size].double()
        exact = {
            "logits": (logits[:, :size], hidden.double() @ head.t()),
            "∂hidden": (gradients.hidden, wide @ head),
            "∂weight": (main_grad[:size], 1 + wide.t() @ hidden.double()),
        }
        for name, (got, expected) in exact.items():
            largest[name] = max(largest[name], largest_error(got, expected))
        result.most(
            f"{rows} × {size}: what is added to ids that take no part",
            (main_grad[size:] - 1).abs().max(),
            0.0,
        )
    result.most("logits: error, of the largest", largest["logits"], 1e-5)
    result.most("∂hidden: error, of the largest", largest["∂hidden"], BF16)
    result.most("∂weight: error, of the largest", largest["∂weight"], 1e-5)
    return result


# ------------------------------------------------------------------------------------------ kernels


def kernels(setting: Setting) -> Result:
    """Compare scores and losses of rows of logits with float64, and reading with copying.

    An error may be ten times that of the same formula in plain float32. A shard of 75,697 ids has
    rows of 75,776 columns, as heads make them.
    """
    result = Result()
    sizes, rows = ([512, 397], 64) if setting.small else ([151_936, 75_697], 2048)
    for size in sizes:
        columns = -(-size // ALIGNMENT) * ALIGNMENT
        shard = VocabShard(0, columns, None, size)
        student, teacher = draw_logits(6 if setting.small else 48, columns)
        compare_scores(result, student, teacher, shard)
        for kind in DIVERGENCES:
            compare_losses(result, student, teacher, shard, kind)
        find_nan(result, student, teacher, shard)
        measure_reading(result, rows, columns, goal=not setting.small)
    measure_reading(result, rows, sizes[1], goal=False)  # misaligned, as no head has them
    return result


def compare_scores(result: Result, student: Tensor, teacher: Tensor, shard: VocabShard) -> None:
    """Compare D, C and both entropies."""
    ours = score_rows(student, teacher, K, shard)
    exact, plain = (
        dense_scores(student[:, : shard.size].to(dtype), teacher[:, : shard.size].to(dtype), K)
        for dtype in (torch.float64, torch.float32)
    )
    names = {
        "disagreement": "D", "compatibility": "C", "student_entropy": "H of the student",
        "teacher_entropy": "H of the teacher",
    }  # fmt: skip
    for name, short in names.items():
        _compare(
            result,
            f"{short}, V = {shard.size:,}",
            *(getattr(s, name) for s in (ours, plain, exact)),
        )


def compare_losses(
    result: Result, student: Tensor, teacher: Tensor, shard: VocabShard, kind: str
) -> None:
    """Compare a divergence and its gradient."""

    def both(loss: Callable[[Tensor, Tensor], Tensor], dtype: torch.dtype) -> list[Tensor]:
        own = student.to(dtype, copy=True).requires_grad_()
        losses = loss(own, teacher.to(dtype))
        return [losses.detach(), *torch.autograd.grad(losses.sum(), own)]

    ours = both(lambda s, t: divergence(s, t, shard, kind), torch.float32)
    plain, exact = (
        both(lambda s, t: plain_divergence(kind, s[:, : shard.size], t[:, : shard.size]), dtype)
        for dtype in (torch.float32, torch.float64)
    )
    for name, *values in zip((kind, f"∂ {kind}"), ours, plain, exact, strict=True):
        _compare(result, f"{name}, V = {shard.size:,}", *values)


def plain_divergence(kind: str, student: Tensor, teacher: Tensor) -> Tensor:
    """Return [R], by the definition."""
    log_p, log_q = student.log_softmax(1), teacher.log_softmax(1)

    def kl(log_a: Tensor, log_b: Tensor) -> Tensor:
        return (log_a.exp() * (log_a - log_b)).sum(1)

    if kind == "reverse_kl":
        return kl(log_p, log_q)
    if kind == "forward_kl":
        return kl(log_q, log_p)
    share = LOSS.beta if kind == "jsd" else 1 - LOSS.alpha  # of the teacher, in the mixture
    log_m = torch.logaddexp(log_q + math.log(share), log_p + math.log(1 - share))
    if kind == "jsd":
        return share * kl(log_q, log_m) + (1 - share) * kl(log_p, log_m)
    return kl(log_p, log_m)


def find_nan(result: Result, student: Tensor, teacher: Tensor, shard: VocabShard) -> None:
    """See that a logit that is no number shows in its row, and in no other."""
    for whose, place in (("student", 0), ("teacher", 1)):
        found = []
        for spoilt in (False, True):
            logits = [student.clone(), teacher.clone()]
            if spoilt:
                logits[place][2, 7] = torch.nan
            scores = score_rows(*logits, K, shard)
            entropy = (scores.student_entropy, scores.teacher_entropy)[place]
            losses = [divergence(*logits, shard, kind) for kind in DIVERGENCES]
            found.append(torch.stack([scores.disagreement, entropy, *losses]))
        sound, spoilt = found
        others = torch.arange(sound.shape[1], device=sound.device) != 2
        hidden = (~spoilt[:, 2].isnan()).sum()
        moved = (sound[:, others] != spoilt[:, others]).sum()
        name = f"a nan of the {whose}, V = {shard.size:,}"
        result.most(f"{name}: results of its row that are numbers", hidden, 0)
        result.most(f"{name}: results of other rows that change", moved, 0)


def measure_reading(result: Result, rows: int, columns: int, goal: bool) -> None:
    """Time each reduction of rows of logits, as a share of the bandwidth of a copy."""
    student, teacher = draw_logits(rows, columns)
    copy = torch.empty_like(student)
    spent = seconds_of(lambda: copy.copy_(student), 10)
    bandwidth = 2 * student.nbytes / spent
    result.figures[f"copy, {rows} × {columns:,}, GB/s"] = bandwidth / 1e9
    kind = "reverse_kl"
    _loss, saved = Divergence(VocabShard(0, columns, None, columns), kind).forward(student, teacher)
    *parts, mean = saved.split(1, dim=1)
    normalizers, grad = Normalizers(*parts), torch.ones(rows, device=student.device)
    out = copy.bfloat16() if student.is_cuda else copy  # as operands of a head in half precision
    calls: dict[str, Callable[[], object]] = {
        "entropy_sums": lambda: reductions.top_columns_and_entropy_sums(student, K),
        "log_normalizer": lambda: reductions.log_normalizer(student),
        "kl_within": lambda: reductions.kl_within(kind, student, teacher, normalizers),
        "mixture_sums": lambda: reductions.mixture_sums("jsd", 0.5, student, teacher, normalizers),
        "logits_gradient": lambda: reductions.logits_gradient(
            kind, 1.0, student, teacher, normalizers, mean, grad, out
        ),
    }
    for name, run in calls.items():
        moved = roofline.Problem(rows, columns, 0, 0).kernel_bytes(name)
        share = moved / seconds_of(run, 10) / bandwidth
        name = f"{name}, {columns:,} columns: share of copy bandwidth"
        if goal:
            result.least(name, share, 0.7, goal=True)
        else:
            result.figures[name] = share


# -------------------------------------------------------------------------------------------- parts


class Draw:
    """Normal numbers on this rank's device, the same on every one."""

    def __init__(self) -> None:
        self.generator = torch.Generator().manual_seed(0)

    def __call__(self, *shape: int) -> Tensor:
        return torch.randn(*shape, generator=self.generator).to(platform.device())


def draw_logits(rows: int, columns: int) -> tuple[Tensor, Tensor]:
    """Draw logits of two models that half agree, [rows, columns] fp32 on the device."""
    torch.manual_seed(0)
    student = torch.randn(rows, columns, device=platform.device()).mul_(3)
    teacher = torch.randn(rows, columns, device=platform.device()).add_(student)
    return student, teacher


def largest_error(got: Tensor, exact: Tensor) -> float:
    """Return the largest error of any entry, of the largest one; 0 where there are none."""
    if not exact.numel():
        return 0.0
    return float((got.double() - exact).abs().max() / exact.abs().max())


def _compare(result: Result, name: str, ours: Tensor, plain: Tensor, exact: Tensor) -> None:
    allowed = 10 * max(largest_error(plain, exact), 2**-23)
    result.most(f"{name}: error, of the largest", largest_error(ours, exact), allowed)
