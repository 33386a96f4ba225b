"""Both heads over all response rows, chunk by chunk: the scores that the selection ranks."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import dataclass, replace

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_taopd import batching
from megatron_taopd.models.gpt import pick_rows
from megatron_taopd.parallel import platform
from megatron_taopd.parallel.exchange import HeldRows
from megatron_taopd.parallel.vocab import VocabShard, score_hidden, token_log_probs
from megatron_taopd.student import Student
from megatron_taopd.types import RolloutBatch, TokenScores


@dataclass(frozen=True)
class Heads:
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


def score(
    batch: RolloutBatch,
    assigned: batching.Assignment,
    student: Student,
    heads: Heads | None,
    teacher_rows: HeldRows,
    k: int,
    keep_outputs: bool = False,
    probe_rows: int = 1024,
) -> tuple[TokenScores, Tensor, list[list[Tensor]] | None]:
    """Score every response row of the batch with the current student.

    Args:
        assigned: of all rows, over the student's layout.
        heads: None except on the last stage.
        teacher_rows: on the last stage, the teacher's hidden states of this rank's sequences.
        k: size of the top-K sets.
        keep_outputs: keep the layers' outputs for a replay (`models.replay`).
        probe_rows: on about so many rows the trainer's log-probability of the sampled token is
            compared with the engine's.

    Returns:
        The scores [R], and |log p_trainer − log p_engine| at the probed rows; on the CPU, the same
        on every rank. And the kept outputs of this rank, or None.

    Collectives: the trunk's forward; one all-gather of 24K+24 bytes per row and rank over TP; an
    all-reduce of 20 bytes per row over all ranks.
    """
    layout = student.layout
    stride = max(1, batch.num_rows // probe_rows)
    # The engine draws from all of the student's tokens, those that the teacher lacks included.
    whole = heads and replace(heads.shard, absent=None)

    def score_micro_batch(micro_batch: batching.MicroBatch, hidden_states: Tensor):
        rows = pick_rows(hidden_states, micro_batch.rows, layout)
        scores = score_hidden(
            rows,
            heads.student,
            teacher_rows.at(micro_batch.row_ids),
            heads.teacher,
            k,
            heads.shard,
            heads.chunk_rows,
        )
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
            ]
        )

    with student.keep_outputs() if keep_outputs else nullcontext() as kept:
        columns = student.forward(assigned.micro_batches, score_micro_batch)

    # Each row is written by one rank, so the sum over all ranks is a gather.
    table = torch.zeros(5, batch.num_rows, device=platform.device())
    if columns and layout.tp_rank == 0:
        ids = torch.cat([m.row_ids for m in assigned.micro_batches]).to(table.device)
        table[:, ids] = torch.cat(columns, dim=1)
    dist.all_reduce(table)
    *scores, log_probs = table.cpu()
    probed = torch.arange(0, batch.num_rows, stride)
    return TokenScores(*scores), (log_probs[probed] - batch.log_probs[probed]).abs(), kept
