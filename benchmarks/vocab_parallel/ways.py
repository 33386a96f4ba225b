"""The ways to get scores and losses: ours, the textbook's and other projects'."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache, partial

import torch
import torch.distributed as dist
from torch import Tensor

from benchmarks.vocab_parallel import peers
from benchmarks.vocab_parallel.formulas import (
    ON_TOPK,
    ON_TOPK_AND_REST,
    REVERSE_KL,
    Formula,
    dense_loss,
    dense_scores,
    disagreement,
)
from benchmarks.vocab_parallel.problem import Problem, Setup
from megatron_taopd import TokenScores, VocabShard, linear_divergence, score_hidden
from megatron_taopd.parallel.vocab.topk_teacher import linear_topk_divergence
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
        peer: who has it, if it is not ours.
        ranks: "one" or "several" if it makes no sense otherwise.
        exact: whether its results are to be compared.
        computes: what it computes, if a loss.
    """

    name: str
    what: str
    run: Callable[[Problem], TokenScores | Tensor]
    copies: int = 2
    rows_at_once: int | None = None
    gathered: bool = False
    ratio: float = 1.0
    peer: peers.Peer | peers.Compiler | None = None
    ranks: str = "any"
    exact: bool = True
    computes: Formula = REVERSE_KL

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
        if self.peer and (reason := self.peer.absence(setup)):
            return reason
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
    trl, liger = {"peer": peers.TRL, "ranks": "one"}, {"peer": peers.LIGER, "ranks": "one"}
    compiler = {"peer": peers.COMPILER}
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
        loss("full logits, compiled", run=compiled(full_loss), copies=7, ranks="one", **compiler),
        loss("many collectives", run=textbook_loss, copies=7, ranks="several"),
        loss(
            "many collectives, compiled",
            run=compiled(textbook_loss),
            copies=5,
            ranks="several",
            **compiler,
        ),
        loss("TRL, full logits", run=peers.trl_loss, copies=10, **trl),
        loss("TRL, chunked", run=peers.trl_chunked_loss, copies=2, rows_at_once=4096, **trl),
        loss("Liger, chunked", run=peers.liger_loss, copies=8, rows_at_once=2047, **liger),
        loss("ms-swift", run=peers.ms_swift_loss, copies=12, peer=peers.MS_SWIFT),
        loss(
            "ours, top K",
            run=our_topk_loss,
            copies=4,
            rows_at_once=setup.chunk_rows,
            computes=ON_TOPK_AND_REST,
        ),
        loss("verl", run=peers.verl_loss, copies=8, peer=peers.VERL, computes=ON_TOPK),
    ]
    return [way for way in every if way.what in setup.only]


@cache
def compiled(loss: Callable[[Problem], Tensor]) -> Callable[[Problem], Tensor]:
    """Let torch.compile have all of it, and compile once more for another number of rows."""
    return torch.compile(loss, dynamic=False, fullgraph=True)


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
        row_weight=p.of_the_mean,
    )


def our_loss_in_one_chunk(p: Problem) -> Tensor:
    return our_loss(replace(p, chunk_rows=p.num_rows))


def our_topk_loss(p: Problem) -> Tensor:
    return linear_topk_divergence(
        p.student_hidden,
        p.student_weight,
        *p.reported,
        p.shard,
        "forward_kl",
        chunk_rows=p.chunk_rows,
        row_weight=p.of_the_mean,
    )


@torch.no_grad()
def report(p: Problem) -> tuple[Tensor, Tensor]:
    """What a teacher's server would send: [R, K] ids, and the log-probabilities of them."""
    parts = []
    for rows in p.chunks():
        logits = (p.teacher_hidden[rows] @ p.teacher_weight.t()).float()
        ids = sharded_topk(logits, p.k, p.shard)
        parts.append((ids, fetch(sharded_log_softmax(logits, p.shard), ids, p.shard)))
    ids, log_probs = (torch.cat(each) for each in zip(*parts, strict=True))
    return ids, log_probs


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


def full_loss(p: Problem) -> Tensor:
    return dense_loss(*(logits.float() for logits in p.logits()))


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
