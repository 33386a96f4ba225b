"""Both heads over all response rows, chunk by chunk: the scores that the selection ranks."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_taopd.data import batching
from megatron_taopd.models.gpt import pick_rows
from megatron_taopd.models.student import Student
from megatron_taopd.monitoring.guard import Fault
from megatron_taopd.parallel import platform
from megatron_taopd.parallel.exchange import RowShard
from megatron_taopd.parallel.vocab import VocabShard, score_hidden, score_topk, token_log_probs
from megatron_taopd.step.loss import kept_row_loss, kept_row_topk_loss
from megatron_taopd.teacher.topk import TopkRows
from megatron_taopd.types import RolloutBatch, TokenScores


@dataclass(frozen=True)
class OutputHeads:
    """Both output projections, cut at the same vocabulary boundaries; on the student's last stage.

    Attributes:
        student: [V, D_s], the live parameter.
        teacher: [V, D_t].
        shard: the columns both hold.
        chunk_rows: the most rows whose logits exist at a time.
    """

    student: Tensor
    teacher: Tensor
    shard: VocabShard
    chunk_rows: int

    @staticmethod
    def sound(teacher_rows: Tensor) -> Tensor:
        """[R] bool, the rows of the teacher whose numbers mean something."""
        return teacher_rows.isfinite().all(1)

    def scores(self, student_hidden: Tensor, teacher_rows: Tensor, k: int) -> TokenScores:
        """`score_hidden`; teacher_rows are its hidden states."""
        return score_hidden(
            student_hidden, self.student, teacher_rows, self.teacher, k, self.shard, self.chunk_rows
        )

    def loss(
        self, student_hidden: Tensor, teacher_rows: Tensor, **kwargs
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """`kept_row_loss` with these `kwargs`."""
        return kept_row_loss(
            student_hidden=student_hidden,
            student_weight=self.student,
            teacher_hidden=teacher_rows,
            teacher_weight=self.teacher,
            shard=self.shard,
            chunk_rows=self.chunk_rows,
            **kwargs,
        )


@dataclass(frozen=True)
class TopkOutputHeads:
    """The same of a teacher that has no head here, but has said what its top-K are.

    Its rows are `TopkRows`, packed; the attributes are those of `OutputHeads`.
    """

    student: Tensor
    shard: VocabShard
    chunk_rows: int

    @staticmethod
    def sound(teacher_rows: Tensor) -> Tensor:
        """[R] bool, likewise; a log-probability may be −inf."""
        teacher = TopkRows.unpack(teacher_rows)
        return (teacher.log_probs < torch.inf).all(1) & (teacher.token_log_probs < torch.inf)

    def scores(self, student_hidden: Tensor, teacher_rows: Tensor, k: int) -> TokenScores:
        """`score_topk`: bounds."""
        teacher = TopkRows.unpack(teacher_rows)
        return score_topk(
            student_hidden,
            self.student,
            teacher.ids,
            teacher.log_probs,
            k,
            self.shard,
            self.chunk_rows,
        )

    def loss(
        self, student_hidden: Tensor, teacher_rows: Tensor, **kwargs
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """`kept_row_topk_loss` with these `kwargs`."""
        teacher = TopkRows.unpack(teacher_rows)
        return kept_row_topk_loss(
            student_hidden=student_hidden,
            student_weight=self.student,
            teacher_ids=teacher.ids,
            teacher_log_probs=teacher.log_probs,
            teacher_token_log_probs=teacher.token_log_probs,
            shard=self.shard,
            chunk_rows=self.chunk_rows,
            **kwargs,
        )


def score(
    batch: RolloutBatch,
    assigned: batching.Assignment,
    student: Student,
    heads: OutputHeads | TopkOutputHeads | None,
    teacher_rows: RowShard,
    k: int,
    keep_outputs: bool = False,
    probe_rows: int = 1024,
) -> tuple[TokenScores, Tensor, list[list[Tensor]] | None]:
    """Score every response row of the batch with the current student.

    Args:
        assigned: of all rows, over the student's layout.
        heads: None except on the last stage.
        teacher_rows: on the last stage, what the teacher says of this rank's sequences: hidden
            states, or what `TopkOutputHeads` take.
        k: size of the top-K sets.
        keep_outputs: keep the layers' outputs for a replay (`models.replay`).
        probe_rows: on about so many rows the trainer's log-probability of the sampled token is
            compared with the engine's.

    Returns:
        The scores [R], and |log p_trainer − log p_engine| at the probed rows; on the CPU, the same
        on every rank. And the kept outputs of this rank, or None.

    Raises:
        Fault: hidden states or scores that are not finite, on every rank alike: which of them, the
            rank that scored them and their sequences. (A D of +inf is a score like any other.)

    Collectives: the trunk's forward; those of the heads' scores, 24K+24 bytes (12K+12 of top-K
    rows) per row and rank over TP; an all-reduce of 24 bytes per row over all ranks.
    """
    layout = student.layout
    stride = max(1, batch.num_rows // probe_rows)
    # The engine draws from all of the student's tokens, those that the teacher lacks included.
    whole = heads and replace(heads.shard, absent=None)

    def score_micro_batch(micro_batch: batching.MicroBatch, hidden_states: Tensor):
        rows = pick_rows(hidden_states, micro_batch.rows, layout)
        read = teacher_rows.at(micro_batch.row_ids)
        scores = heads.scores(rows, read, k)
        probed = micro_batch.row_ids % stride == 0
        log_probs = torch.zeros_like(scores.disagreement)
        log_probs[probed] = token_log_probs(
            rows[probed], heads.student, micro_batch.targets[probed], whole, heads.chunk_rows
        )
        return torch.stack(
            [
                scores.disagreement,
                scores.compatibility,
                scores.student_entropy,
                scores.teacher_entropy,
                log_probs,
                culprits(rows.isfinite().all(1), heads.sound(read), scores),
            ]
        )

    with student.keep_outputs() if keep_outputs else nullcontext() as kept:
        columns = student.forward(assigned.micro_batches, score_micro_batch)

    # Each row is written by one rank, so the sum over all ranks is a gather.
    table = torch.zeros(6, batch.num_rows, device=platform.device())
    if columns and layout.tp_rank == 0:
        ids = torch.cat([m.row_ids for m in assigned.micro_batches]).to(table.device)
        table[:, ids] = torch.cat(columns, dim=1)
    dist.all_reduce(table)
    *scores, log_probs, faults = table.cpu()
    if faults.any():
        raise _fault(faults, batch.row_sequences(), layout.last_stage_rank(assigned.owner, 0))
    probed = torch.arange(0, batch.num_rows, stride)
    return TokenScores(*scores), (log_probs[probed] - batch.log_probs[probed]).abs(), kept


_CULPRITS = {1: "teacher hidden states", 2: "student hidden states", 4: "scores"}


def culprits(student: Tensor, teacher: Tensor, scores: TokenScores) -> Tensor:
    """[R] float32, a sum of keys of _CULPRITS: whose numbers are not finite. 0: nobody's.

    Args:
        student, teacher: [R] bool, the rows whose hidden states are finite. Scores can be at fault
            only where both are.
    """
    sound = ~scores.disagreement.isnan()
    for values in (scores.compatibility, scores.student_entropy, scores.teacher_entropy):
        sound &= values.isfinite()
    return (1 * ~teacher + 2 * ~student + 4 * (student & teacher & ~sound)).float()


def _fault(faults: Tensor, sequences: Tensor, rank_of: Tensor) -> Fault:
    """
    Args:
        faults: [R] of `culprits`, and sequences: [R] the sequence of each row.
        rank_of: [N] the rank that scored each sequence.
    """
    whose = [name for bit, name in _CULPRITS.items() if (faults.int() & bit).any()]
    bad = sequences[faults > 0].unique()
    what = f"{' and '.join(whose)} are not finite"
    return Fault(what, rank_of[bad].unique().tolist(), bad.tolist())


def sequence_log_probs(
    student: Student,
    sequences: Sequence[Sequence[int]],
    micro_batch_tokens: int,
    chunk_rows: int = 1024,
) -> Tensor:
    """[Σ(n−1)] float32, the student's log-probability of every token but the first of each sequence
    of n, at temperature 1 over all its tokens; on the CPU, the same on every rank.

    Collectives: the trunk's forward; one all-gather of 12 bytes a row and rank over TP; an
    all-reduce of 4 bytes a row over all ranks.
    """
    lengths = torch.tensor([len(tokens) for tokens in sequences])
    rows = int((lengths - 1).sum())
    batch = RolloutBatch(  # every token but the first is the response
        tokens=torch.tensor([token for tokens in sequences for token in tokens]),
        cu_seqlens=torch.nn.functional.pad(lengths.cumsum(0), (1, 0)),
        prompt_lengths=torch.ones_like(lengths),
        log_probs=torch.zeros(rows),
        truncated=torch.zeros(len(lengths), dtype=torch.bool),
        prompts=torch.arange(len(lengths)),
        weight_versions=torch.zeros(rows, dtype=torch.int64),
    )
    layout, shard = student.layout, student.shard
    whole = replace(shard, size=student.trunk.hf.vocab_size, absent=None)
    everything = torch.ones(rows, dtype=torch.bool)
    assigned = batching.assign(batch, everything, layout, micro_batch_tokens)

    def log_probs(micro_batch: batching.MicroBatch, hidden_states: Tensor) -> Tensor:
        hidden = pick_rows(hidden_states, micro_batch.rows, layout)
        return token_log_probs(hidden, student.head_weight, micro_batch.targets, whole, chunk_rows)

    columns = student.forward(assigned.micro_batches, log_probs)
    table = torch.zeros(rows, device=platform.device())
    if columns and layout.tp_rank == 0:
        ids = torch.cat([m.row_ids for m in assigned.micro_batches]).to(table.device)
        table[ids] = torch.cat(columns)
    dist.all_reduce(table)
    return table.cpu()
