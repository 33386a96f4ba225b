"""Scores and losses from hidden states: the heads, a bounded number of rows at a time.

Three matmuls a row and model are all that a head needs (one for the teacher's and for scores): bf16
operands, fp32 accumulation and output. Gradients of the weight add up over the chunks in fp32, in
place in Megatron's gradient buffer where there is one.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from megatron_taopd.parallel.vocab import reductions
from megatron_taopd.parallel.vocab.divergences import (
    Divergence,
    TopkDivergence,
    merge_normalizers,
)
from megatron_taopd.parallel.vocab.scores import (
    TopSets,
    check_k,
    local_candidates,
    local_topk_candidates,
    merge_candidates,
    merge_top_sets,
    merge_topk_candidates,
    topk_of,
)
from megatron_taopd.parallel.vocab.shard import VocabShard
from megatron_taopd.types import TokenScores

# Per row and column of a shard: fp32 logits of both models, and on CUDA a narrow gradient.
_BYTES_PER_LOGIT = 4 + 4 + 2
_WEIGHT_BLOCK = 8192  # rows of a head that are widened, or whose gradient is formed, at a time


def rows_within(budget_bytes: int, num_columns: int) -> int:
    """How many rows' logits of both models fit the budget, at least one.

    All ranks of a group must come to the same number, as every chunk is a collective: num_columns
    is that of the widest shard.
    """
    rows = budget_bytes // (_BYTES_PER_LOGIT * max(1, num_columns))
    return max(1, rows // 64 * 64 or rows)


def logits_bytes(num_rows: int, chunk_rows: int, num_columns: int) -> int:
    """Bytes that the logits of both models take at a time, of num_rows rows in chunks."""
    return _BYTES_PER_LOGIT * min(num_rows, chunk_rows) * num_columns


def _chunks(num_rows: int, chunk_rows: int) -> Iterator[slice]:
    assert chunk_rows > 0, chunk_rows
    for start in range(0, num_rows, chunk_rows):
        yield slice(start, min(start + chunk_rows, num_rows))


def _is_narrow(dtype: torch.dtype) -> bool:
    return dtype in (torch.bfloat16, torch.float16)


class _Projection:
    """Logits of the rows asked for, of the columns of one shard, at least fp32.

    On the CPU they lie in one buffer, so that each answer overwrites the one before.
    """

    def __init__(self, hidden: Tensor, weight: Tensor, shard: VocabShard, chunk_rows: int):
        self.hidden, self.weight, self.shard = hidden, shard.rows(weight), shard
        self.buffer = None
        if not hidden.is_cuda:
            rows = min(chunk_rows, len(hidden))
            wide = torch.promote_types(hidden.dtype, torch.float32)
            self.buffer = hidden.new_empty(rows, len(self.weight), dtype=wide)

    def __call__(self, rows: slice) -> Tensor:
        hidden = self.hidden[rows]
        if self.buffer is None:
            narrow = _is_narrow(hidden.dtype)
            logits = torch.mm(
                hidden, self.weight.t(), **({"out_dtype": torch.float32} if narrow else {})
            )
        else:
            logits = self.buffer[: len(hidden)]
            if _is_narrow(hidden.dtype):  # the head is widened block by block, never as a whole
                hidden = hidden.float()
                for start in range(0, len(self.weight), _WEIGHT_BLOCK):
                    block = slice(start, start + _WEIGHT_BLOCK)
                    logits[:, block] = hidden @ self.weight[block].float().t()
            else:
                torch.mm(hidden, self.weight.t(), out=logits)
        if self.shard.absent_columns is not None:
            logits.index_fill_(1, self.shard.absent_columns.to(logits.device), -torch.inf)
        return logits


# ----------------------------------------------------------------------------------------- scores


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

    Memory: logits of chunk_rows rows of both models.

    Collectives: for every chunk, one all-gather of 24K+24 bytes a row and rank.

    Raises:
        ValueError: k is not within 1 … shard.size.
    """
    check_k(k, shard)
    student = _Projection(student_hidden, student_weight, shard, chunk_rows)
    teacher = _Projection(teacher_hidden, teacher_weight, shard, chunk_rows)
    scores = []
    for rows in list(_chunks(len(student_hidden), chunk_rows)) or [slice(0, 0)]:
        local = local_candidates(student(rows).float(), teacher(rows).float(), k, shard.start)
        scores.append(merge_candidates(shard.all_gather(local), k, return_ids))
    return TokenScores.cat(scores)


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
    """As much of `score_hidden` as is known of a teacher that reports its top-n only, n ≥ K.

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
    project = _Projection(student_hidden, student_weight, shard, chunk_rows)
    scores = []
    for rows in list(_chunks(len(student_hidden), chunk_rows)) or [slice(0, 0)]:
        teacher = topk_of(teacher_ids[rows], teacher_log_probs[rows], k, shard)
        own = local_topk_candidates(
            project(rows).float(), teacher[0].gather(1, teacher[2]), k, shard
        )
        scores.append(merge_topk_candidates(shard.all_gather(own), teacher, k, return_ids))
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
    """All that the diagnostic measures, chunk by chunk (at least one), from one pair of logits.

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
        _Projection(student_hidden, student_weight, shard, chunk_rows),
        _Projection(teacher_hidden, teacher_weight, shard, chunk_rows),
    )
    for rows in list(_chunks(len(tokens), chunk_rows)) or [slice(0, 0)]:
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


# ----------------------------------------------------------------------------------------- losses


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
        """grad·(1[v = token] − p(v))."""
        columns, here = self.shard.locate(tokens[:, None])
        top, log_sum = saved.split(1, dim=1)
        logits.sub_(top).sub_(log_sum).exp_().mul_(-grad[:, None])
        if logits.shape[1]:
            logits.scatter_add_(1, columns, grad[:, None].masked_fill(~here, 0))
        return logits if out is logits else out.copy_(logits)


class _HeadGradients:
    """Gradients of hidden [R, D] and weight [V, D], filled chunk by chunk where they are needed.

    The weight's is added to main_grad, [V, D], if that is given.
    """

    def __init__(
        self,
        hidden: Tensor,
        weight: Tensor,
        shard: VocabShard,
        needed: tuple,
        main_grad: Tensor | None,
    ):
        wide = torch.promote_types(weight.dtype, torch.float32)  # chunks add up in fp32
        assert main_grad is None or main_grad.dtype == wide, (main_grad.dtype, weight.dtype)
        self.inputs, self.head = hidden, shard.rows(weight)
        self.hidden = torch.empty_like(hidden) if needed[0] else None
        self.weight, self.in_place = None, main_grad is not None
        if needed[1]:
            self.weight = main_grad if self.in_place else torch.zeros_like(weight, dtype=wide)
        self.narrow = _is_narrow(weight.dtype)

    def buffer(self, logits: Tensor) -> Tensor:
        """Where the gradient of these logits is to be written: in their place, unless it is to be
        an operand of another dtype."""
        if self.narrow and logits.is_cuda:
            return torch.empty_like(logits, dtype=self.head.dtype)
        return logits

    def add(self, logits_grad: Tensor, rows: slice) -> None:
        """Args: logits_grad: [n, V] of these rows, as it was written to `buffer`."""
        inputs = self.inputs[rows]
        if self.hidden is not None and (logits_grad.is_cuda or not self.narrow):
            self.hidden[rows] = logits_grad @ self.head
        elif self.hidden is not None:
            pairs = zip(
                logits_grad.split(_WEIGHT_BLOCK, dim=1), self.head.split(_WEIGHT_BLOCK), strict=True
            )
            self.hidden[rows] = sum(grad @ head.float() for grad, head in pairs)
        if self.weight is None:
            return
        total = self.weight[: len(self.head)]
        if self.narrow and logits_grad.is_cuda:  # a block at a time: the product is not in place
            for start in range(0, len(self.head), _WEIGHT_BLOCK):
                block = slice(start, start + _WEIGHT_BLOCK)
                total[block] += torch.mm(logits_grad[:, block].t(), inputs, out_dtype=torch.float32)
        else:
            total.addmm_(logits_grad.t(), inputs.to(logits_grad.dtype))

    def get(self) -> tuple[Tensor | None, Tensor | None]:
        """What autograd is told. Of a weight whose gradient is where it belongs already, an empty
        sparse one, which takes no memory and yet lets the hook fire by which DDP counts gradients.
        """
        if self.weight is None:
            return self.hidden, None
        if self.in_place:
            return self.hidden, _empty_sparse(self.weight.shape, self.head)
        return self.hidden, self.weight.to(self.head.dtype)


def _empty_sparse(shape: torch.Size, like: Tensor) -> Tensor:
    """[V, D] of which no row is there."""
    return torch.sparse_coo_tensor(
        torch.empty(1, 0, dtype=torch.int64, device=like.device),
        like.new_empty(0, shape[1]),
        shape,
        check_invariants=False,
    )


class _Head(torch.autograd.Function):
    """hidden [R, D] → logits → a value a row [R], or Σ row_weight·value, chunk by chunk.

    Without row_weight the backward pass computes the logits again. With it, a chunk's gradient is
    formed while its logits are there; only one factor, the gradient of the sum, comes later.

    `open_targets()` gives a function from a slice of rows to what `value` compares their logits
    with. It is called anew for each pass, since it may hold a buffer.
    """

    @staticmethod
    def forward(ctx, hidden, weight, value, open_targets, shard, chunk_rows, row_weight, main_grad):
        needed = ctx.needs_input_grad[:2]
        at_once = row_weight is not None and any(needed)
        grads = _HeadGradients(hidden, weight, shard, needed, main_grad) if at_once else None
        project, targets = _Projection(hidden, weight, shard, chunk_rows), open_targets()
        values = [hidden.new_empty(0, dtype=torch.promote_types(hidden.dtype, torch.float32))]
        saved = []
        for rows in _chunks(len(hidden), chunk_rows):
            logits, chunk_targets = project(rows), targets(rows)
            chunk_values, chunk_saved = value.forward(logits, chunk_targets)
            values.append(chunk_values)
            if at_once:
                grad, out = row_weight[rows].to(logits.dtype), grads.buffer(logits)
                grads.add(value.gradient(logits, chunk_targets, chunk_saved, grad, out), rows)
            else:
                saved.append(chunk_saved)
        ctx.at_once, ctx.main_grad = row_weight is not None, main_grad if needed[1] else None
        if ctx.at_once:
            ctx.save_for_backward(*(grads.get() if grads else ()))
            return torch.cat(values).mul_(row_weight).sum()
        ctx.save_for_backward(hidden, weight, *saved)
        ctx.value, ctx.open_targets, ctx.shard, ctx.chunk_rows = (
            value, open_targets, shard, chunk_rows,
        )  # fmt: skip
        return torch.cat(values)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):
        if ctx.at_once:
            # In place: the head's gradient is as large as the head. (A second backward pass through
            # the same graph is refused by autograd, which sees that a saved tensor has changed.)
            if ctx.main_grad is not None:  # what is there cannot be multiplied any more
                torch._assert_async(grad == 1, "the sum must be what is differentiated")
            grads = (g if g is None or g.is_sparse else g.mul_(grad) for g in ctx.saved_tensors)
            return *grads, None, None, None, None, None, None
        hidden, weight, *saved = ctx.saved_tensors
        needed = ctx.needs_input_grad[:2]
        grads = _HeadGradients(hidden, weight, ctx.shard, needed, ctx.main_grad)
        project = _Projection(hidden, weight, ctx.shard, ctx.chunk_rows)
        targets = ctx.open_targets()
        chunks = _chunks(len(hidden), ctx.chunk_rows)
        for rows, chunk_saved in zip(chunks, saved, strict=True):
            logits = project(rows)
            out = grads.buffer(logits)
            grads.add(ctx.value.gradient(logits, targets(rows), chunk_saved, grad[rows], out), rows)
        return *grads.get(), None, None, None, None, None, None


def _through_head(
    hidden, weight, value, open_targets, shard, chunk_rows, row_weight=None
) -> Tensor:
    main_grad = getattr(weight, "main_grad", None)  # of a parameter under Megatron's DDP
    if not torch.is_grad_enabled():  # which needs_input_grad does not tell
        hidden, weight = hidden.detach(), weight.detach()
    return _Head.apply(
        hidden, weight, value, open_targets, shard, chunk_rows, row_weight, main_grad
    )


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

    A student_weight with a `main_grad`, [V, D] fp32, as Megatron's DDP gives its parameters, has
    its gradient added to that, and autograd sees an empty one: no matrix of the head's size is
    made. With row_weight that happens in the forward pass, so that the sum itself must be what is
    differentiated, not a multiple of it (asserted in the backward pass).

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

    Memory: logits of chunk_rows rows of both models, in whose place the gradient is formed.

    Collectives: for every chunk those of `divergence`; none in the backward pass.

    Raises:
        ValueError: an unknown kind; beta or alpha outside (0, 1).
    """
    value = Divergence(shard, kind, beta, alpha)
    teacher = (teacher_hidden.detach(), teacher_weight.detach(), shard, chunk_rows)
    return _through_head(
        student_hidden,
        student_weight,
        value,
        partial(_Projection, *teacher),
        shard,
        chunk_rows,
        row_weight,
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
    beta: float = 0.5,
    alpha: float = 0.1,
) -> Tensor:
    """`topk_divergence` of hidden states: logits exist for chunk_rows rows at a time only.

    Args:
        student_hidden, student_weight, chunk_rows, row_weight: as for `linear_divergence`, in whose
            way it is differentiable too.
        teacher_ids, teacher_log_probs: [R, K] as for `topk_divergence`.

    Returns:
        [R] fp32 divergences in nats; with row_weight the scalar Σ row_weight·divergence.

    Collectives: for every chunk, one all-gather of 4K+8 bytes a row and rank; none in the backward
    pass.

    Raises:
        ValueError: an unknown kind; beta or alpha outside (0, 1).
    """
    value = TopkDivergence.of(shard, teacher_ids.shape[1], kind, beta, alpha)

    def open_targets():
        return lambda rows: (teacher_ids[rows], teacher_log_probs.detach()[rows])

    return _through_head(
        student_hidden, student_weight, value, open_targets, shard, chunk_rows, row_weight
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

    def open_targets():
        return lambda rows: tokens[rows]

    return _through_head(hidden, weight, _TokenLogProb(shard), open_targets, shard, chunk_rows)
