"""The ways to get scores and losses: ours, the textbook's and other projects'."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from importlib.util import find_spec

import torch
import torch.distributed as dist
from torch import Tensor

from benchmarks.vocab_parallel.problem import Problem, Setup
from megatron_taopd import TokenScores, VocabShard, linear_divergence, score_hidden
from megatron_taopd.step.selection import budget


@dataclass(frozen=True)
class Way:
    """One way to get the scores (a function Problem → TokenScores) or the loss (→ scalar).

    Attributes:
        copies: how many tensors as large as its logits it holds at its worst, rounded up. This and
            the next two only serve to skip what cannot fit.
        rows_at_once: rows of which it has logits at the same time; None for all it gets.
        gathered: whether it has logits of all columns on every rank.
        ratio: share of the rows it gets.
        package: the package that has it, if it is not ours.
        ranks: "one" or "several" if it makes no sense otherwise.
        exact: whether its results are to be compared.
    """

    name: str
    what: str
    run: Callable[[Problem], TokenScores | Tensor]
    copies: int = 2
    rows_at_once: int | None = None
    gathered: bool = False
    ratio: float = 1.0
    package: str | None = None
    ranks: str = "any"
    exact: bool = True

    def expected_bytes(self, setup: Setup) -> int:
        """Estimate the bytes of all ranks together, inputs included."""
        rows = budget(self.ratio, setup.rows)
        logits = (
            4
            * min(rows, self.rows_at_once or rows)
            * setup.vocab
            * (setup.tp if self.gathered else 1)
        )
        gradients = 2 * 4 * setup.vocab * setup.hidden if self.what == "loss" else 0
        return setup.input_bytes + self.copies * logits + gradients

    def reason_to_skip(self, setup: Setup) -> str | None:
        if self.ranks == ("several" if setup.tp == 1 else "one"):
            return f"for {self.ranks} rank{'s' * (self.ranks == 'several')}"
        if self.package and find_spec(self.package) is None:
            return f"{self.package} is not installed"
        if (needed := self.expected_bytes(setup)) > setup.memory_limit:
            return f"needs {needed / 1e9:.2g} GB"
        return None

    def __call__(self, problem: Problem) -> TokenScores | Tensor:
        """The scores, or the loss after its backward pass."""
        if self.what == "scores":
            with torch.no_grad():
                return self.run(problem)
        loss = self.run(problem)
        loss.backward()
        return loss.detach()


def ways(setup: Setup) -> list[Way]:
    score, loss = partial(Way, what="scores"), partial(Way, what="loss")
    ours = partial(loss, "ours", run=our_loss, copies=6, rows_at_once=setup.chunk_rows)
    matmuls = {"copies": 1, "rows_at_once": setup.chunk_rows, "exact": False}
    trl, liger = {"package": "trl", "ranks": "one"}, {"package": "liger_kernel", "ranks": "one"}
    every = [
        score("ours", run=our_scores, copies=5, rows_at_once=setup.chunk_rows),
        score("matmuls alone", run=scoring_matmuls, **matmuls),
        score("full logits, gathered", run=gathered_scores, copies=8, gathered=True),
        score("many collectives", run=textbook_scores, copies=7, ranks="several"),
        ours(),
        *(ours(ratio=ratio) for ratio in setup.ratios),
        loss("ours, one chunk", run=our_loss_in_one_chunk, copies=6),
        loss("matmuls alone", run=loss_matmuls, **matmuls),
        loss("full logits, gathered", run=gathered_loss, copies=9, gathered=True),
        loss("many collectives", run=textbook_loss, copies=7, ranks="several"),
        loss("TRL, full logits", run=trl_loss, copies=10, **trl),
        loss("TRL, chunked", run=trl_chunked_loss, copies=2, rows_at_once=4096, **trl),
        loss("Liger, chunked", run=liger_loss, copies=8, rows_at_once=2047, **liger),
    ]
    return [way for way in every if way.what in setup.only]


def our_scores(p: Problem) -> TokenScores:
    return score_hidden(
        p.student_hidden,
        p.student_weight,
        p.teacher_hidden,
        p.teacher_weight,
        p.k,
        p.shard,
        chunk_rows=p.chunk_rows,
    )


def our_loss(p: Problem) -> Tensor:
    return linear_divergence(
        p.student_hidden,
        p.student_weight,
        p.teacher_hidden,
        p.teacher_weight,
        p.shard,
        "reverse_kl",
        chunk_rows=p.chunk_rows,
        row_weight=torch.full((p.num_rows,), 1 / p.num_rows, device=p.student_hidden.device),
    )


def our_loss_in_one_chunk(p: Problem) -> Tensor:
    return our_loss(replace(p, chunk_rows=p.num_rows))


def scoring_matmuls(p: Problem) -> None:
    """The floor: both heads, into buffers that are there already."""
    buffer = p.student_hidden.new_empty(p.chunk_rows, len(p.student_weight))
    for rows in p.chunks():
        logits = buffer[: rows.stop - rows.start]
        torch.mm(p.student_hidden[rows], p.student_weight.t(), out=logits)
        torch.mm(p.teacher_hidden[rows], p.teacher_weight.t(), out=logits)


@torch.no_grad()
def loss_matmuls(p: Problem) -> Tensor:
    """The floor: both heads, and the student's two gradients from anything of the right shape."""
    logits = p.student_hidden.new_empty(p.chunk_rows, len(p.student_weight))
    hidden_grad = torch.empty_like(p.student_hidden)
    weight_grad = torch.zeros_like(p.student_weight)
    for rows in p.chunks():
        chunk = logits[: rows.stop - rows.start]
        torch.mm(p.teacher_hidden[rows], p.teacher_weight.t(), out=chunk)
        torch.mm(p.student_hidden[rows], p.student_weight.t(), out=chunk)
        torch.mm(chunk, p.student_weight, out=hidden_grad[rows])
        weight_grad.addmm_(chunk.t(), p.student_hidden[rows])
    return torch.zeros((), requires_grad=True)


# --- dense, of logits of any float type: also the float64 reference


def dense_scores(student_logits: Tensor, teacher_logits: Tensor, k: int) -> TokenScores:
    """[R, V] logits of the whole vocabulary → scores, by their definitions."""
    log_p, log_q = student_logits.log_softmax(1), teacher_logits.log_softmax(1)
    top = [logits.topk(k, dim=1).indices for logits in (student_logits, teacher_logits)]
    ids = torch.cat(top, dim=1)
    return TokenScores(
        disagreement=disagreement(ids, log_p.gather(1, ids), log_q.gather(1, ids)),
        compatibility=log_q.gather(1, top[0]).exp().sum(1),
        student_entropy=-(log_p.exp() * log_p).sum(1),
        teacher_entropy=-(log_q.exp() * log_q).sum(1),
    )


def disagreement(ids: Tensor, log_p: Tensor, log_q: Tensor) -> Tensor:
    """[R] KL(q ‖ p) over the set of the ids [R, 2K], renormalised; an id twice counts once."""
    ids, order = ids.sort(dim=1)
    again = torch.nn.functional.pad(ids.diff(dim=1) == 0, (1, 0))
    log_p, log_q = (
        x.gather(1, order).masked_fill(again, -torch.inf).log_softmax(1) for x in (log_p, log_q)
    )
    return (log_q.exp() * (log_q - log_p).masked_fill(again, 0)).sum(1)


def dense_loss(student_logits: Tensor, teacher_logits: Tensor) -> Tensor:
    """Mean reverse KL of [R, V] logits of the whole vocabulary."""
    log_p, log_q = student_logits.log_softmax(1), teacher_logits.log_softmax(1)
    return (log_p.exp() * (log_p - log_q)).sum(1).mean()


class GatherColumns(torch.autograd.Function):
    """[R, V/tp] of each rank → [R, V] on every rank; the gradient is this rank's columns of it."""

    @staticmethod
    def forward(ctx, local, shard):
        ctx.columns = slice(shard.start, shard.stop)
        parts = [torch.empty_like(local) for _ in range(shard.world_size)]
        dist.all_gather(parts, local.contiguous(), group=shard.group)
        return torch.cat(parts, dim=1)

    @staticmethod
    def backward(ctx, grad):
        return grad[:, ctx.columns], None


def gathered_logits(p: Problem) -> list[Tensor]:
    """[R, V] fp32 of both models."""
    if p.shard.group is None:
        return [logits.float() for logits in p.logits()]
    return [GatherColumns.apply(logits.float(), p.shard) for logits in p.logits()]


def gathered_scores(p: Problem) -> TokenScores:
    return dense_scores(*gathered_logits(p), p.k)


def gathered_loss(p: Problem) -> Tensor:
    return dense_loss(*gathered_logits(p))


# --- the textbook: a collective wherever the dense formula has a reduction


class SumShards(torch.autograd.Function):
    """Σ over ranks. The gradient is summed, too, if each rank goes on with its own columns."""

    @staticmethod
    def forward(ctx, local, shard, own_columns_follow):
        ctx.shard, ctx.sum_gradient = shard, own_columns_follow
        return all_reduce(local.clone(), shard)

    @staticmethod
    def backward(ctx, grad):
        return all_reduce(grad.clone(), ctx.shard) if ctx.sum_gradient else grad, None, None


def all_reduce(x: Tensor, shard: VocabShard, op=dist.ReduceOp.SUM) -> Tensor:
    if shard.group is not None:
        dist.all_reduce(x, op, group=shard.group)
    return x


def sharded_log_softmax(logits: Tensor, shard: VocabShard) -> Tensor:
    """[R, V/tp] → log p of the whole vocabulary's distribution. Two all-reduces."""
    top = all_reduce(logits.detach().amax(1, keepdim=True), shard, dist.ReduceOp.MAX)
    shifted = logits - top
    return shifted - SumShards.apply(shifted.exp().sum(1, keepdim=True), shard, True).log()


def sharded_topk(logits: Tensor, k: int, shard: VocabShard) -> Tensor:
    """[R, K] ids of the highest logits of all shards. Two all-gathers."""
    values, columns = logits.topk(k, dim=1)
    if shard.group is None:
        return columns
    all_values = [torch.empty_like(values) for _ in range(shard.world_size)]
    all_ids = [torch.empty_like(columns) for _ in range(shard.world_size)]
    dist.all_gather(all_values, values, group=shard.group)
    dist.all_gather(all_ids, columns + shard.start, group=shard.group)
    best = torch.cat(all_values, dim=1).topk(k, dim=1).indices
    return torch.cat(all_ids, dim=1).gather(1, best)


def fetch(values: Tensor, ids: Tensor, shard: VocabShard) -> Tensor:
    """[R, n] values at ids, wherever they are. One all-reduce."""
    columns = ids - shard.start
    here = (columns >= 0) & (columns < values.shape[1])
    found = values.gather(1, columns.clamp(0, values.shape[1] - 1)).masked_fill(~here, 0)
    return all_reduce(found, shard)


def textbook_scores(p: Problem) -> TokenScores:
    student_logits, teacher_logits = (logits.float() for logits in p.logits())
    log_p = sharded_log_softmax(student_logits, p.shard)
    log_q = sharded_log_softmax(teacher_logits, p.shard)
    student_ids = sharded_topk(student_logits, p.k, p.shard)
    ids = torch.cat([student_ids, sharded_topk(teacher_logits, p.k, p.shard)], dim=1)
    log_p_at, log_q_at = fetch(log_p, ids, p.shard), fetch(log_q, ids, p.shard)
    return TokenScores(
        disagreement=disagreement(ids, log_p_at, log_q_at),
        compatibility=log_q_at[:, : p.k].exp().sum(1),
        student_entropy=-all_reduce((log_p.exp() * log_p).sum(1), p.shard),
        teacher_entropy=-all_reduce((log_q.exp() * log_q).sum(1), p.shard),
    )


def textbook_loss(p: Problem) -> Tensor:
    log_p, log_q = (sharded_log_softmax(logits.float(), p.shard) for logits in p.logits())
    return SumShards.apply((log_p.exp() * (log_p - log_q)).sum(1), p.shard, False).mean()


# --- other projects' own functions, for which beta = 1 is the reverse KL


def trl_loss(p: Problem) -> Tensor:
    from trl.experimental.gkd import GKDTrainer

    return GKDTrainer.generalized_jsd_loss(*p.logits(), beta=1.0)


def trl_chunked_loss(p: Problem) -> Tensor:
    """What TRL's DistillationTrainer calls, with its own chunks (4096 rows × 32768 columns)."""
    from trl.kernels.chunked_divergence import ChunkedDivergenceFunction

    student, teacher = (p.student_hidden, p.student_weight), (p.teacher_hidden, p.teacher_weight)
    divergence, _ = ChunkedDivergenceFunction.apply(*student, None, *teacher, None, 1.0)
    return divergence.mean()


def liger_loss(p: Problem) -> Tensor:
    """Run Liger's loss with its own chunks (1024 rows), compiled on CUDA, which is its default."""
    from liger_kernel.chunked_loss import LigerFusedLinearJSDLoss

    loss = LigerFusedLinearJSDLoss(
        weight_hard_loss=0.0, weight_soft_loss=1.0, beta=1.0, compiled=p.student_hidden.is_cuda
    )
    labels = torch.zeros(p.num_rows, dtype=torch.long, device=p.student_hidden.device)
    student, teacher = (p.student_hidden, p.student_weight), (p.teacher_hidden, p.teacher_weight)
    return loss(*student, *teacher, labels)
