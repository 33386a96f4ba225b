"""Scores of all response rows, which the selection ranks; and log-probabilities of sequences."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_taopd.data import batching
from megatron_taopd.models.gpt import pick_rows
from megatron_taopd.models.student import FrozenStudent
from megatron_taopd.parallel import platform
from megatron_taopd.parallel.copies import to_device
from megatron_taopd.parallel.exchange import Routes, RowShard
from megatron_taopd.parallel.faults import Fault, by_rank
from megatron_taopd.parallel.layout import Layout
from megatron_taopd.parallel.vocab import token_log_probs
from megatron_taopd.step.batch_scores import NAMES, BatchScores, HeldRows
from megatron_taopd.step.output_heads import Heads
from megatron_taopd.types import RolloutBatch, TokenScores, WantedRows, ranges

PROBED_ROWS = 1024


@dataclass(frozen=True)
class ScoredBatch:
    """A batch whose rows have been scored, and what training on it needs.

    Attributes:
        assigned: who scored each sequence, and so has its teacher rows.
        teacher_rows: on the student's last stage, what the teachers say of this rank's sequences,
            by the number of each.
        scores: each row's on one rank, the first of the TP group that scored it, on its device.
        gap: |log p_trainer − log p_engine| of some sampled tokens, on the CPU, the same on every
            rank.
        kept_outputs: what this rank's layers returned, for a replay (`models.replay`), or None.
    """

    batch: RolloutBatch
    assigned: batching.Assignment
    teacher_rows: dict[int, RowShard]
    scores: BatchScores
    gap: Tensor
    kept_outputs: list[list[Tensor]] | None


def score(
    batch: RolloutBatch,
    assigned: batching.Assignment,
    teacher_rows: dict[int, RowShard],
    student: FrozenStudent,
    heads: Heads | None,
    k: int,
    keep_outputs: bool = False,
    sampled: bool = False,
) -> ScoredBatch:
    """Score every response row of the batch with the current student (Eq. 3–5).

    On about PROBED_ROWS rows the trainer's log-probability of the sampled token is compared with
    the engine's.

    Args:
        assigned: of all rows, over the student's layout.
        teacher_rows: on the last stage, what each teacher says of its sequences of this rank:
            hidden states, or what `TopkOutputHeads` take.
        heads: None except on the last stage.
        k: size of the top-K sets.
        keep_outputs: keep the layers' outputs for a replay (`models.replay`).
        sampled: also give the student's log-probability of every sampled token, for which its
            logits are computed once more.

    Raises:
        Fault: hidden states or scores that are not finite, on every rank alike: which of them, the
            rank that scored them and their sequences. (A D of +inf is a score like any other.)

    Collectives: the trunk's forward; those of the heads' scores, 24K+28 bytes (12K+12 of top-K
    rows) per row and rank over TP, and 12 with `sampled`; an all-reduce of 4 bytes per probed row
    and 4 more over all ranks. The scores stay where they are; those of a sequence that a
    context-parallel group shares go to its first rank, in all-to-alls of 32 bytes a row (36 with
    `sampled`).
    """
    layout = student.layout
    stride = max(1, batch.num_rows // PROBED_ROWS)

    def score_micro_batch(micro_batch: batching.MicroBatch, hidden_states: Tensor):
        assert heads is not None  # on the last stage, which alone comes here
        own = heads.of(micro_batch.teacher)
        # The engine draws from all of the student's tokens, those that the teacher lacks included.
        whole = replace(own.shard, absent=None)
        rows = pick_rows(hidden_states, micro_batch.rows, layout)
        read = teacher_rows[micro_batch.teacher].at(micro_batch.row_ids)
        scores = own.scores(rows, read, micro_batch.targets, k)
        # Heads of either kind have both.
        assert scores.topk_overlap is not None and scores.teacher_log_prob is not None
        probed = (micro_batch.row_ids % stride == 0).nonzero()[:, 0]
        probed = to_device(probed, rows.device)
        log_probs = torch.zeros_like(scores.disagreement)
        log_probs[probed] = token_log_probs(
            rows[probed], own.student, micro_batch.targets[probed], whole, own.chunk_rows
        )
        return torch.stack(
            [
                scores.disagreement,
                scores.compatibility,
                scores.student_entropy,
                scores.teacher_entropy,
                scores.topk_overlap,
                scores.teacher_log_prob,
                *([own.student_log_probs(rows, micro_batch.targets)] if sampled else []),
                log_probs,
                culprits(rows.isfinite().all(1), own.sound(read), scores),
            ]
        )

    with student.keep_outputs() if keep_outputs else nullcontext() as kept:
        columns = student.forward(assigned.micro_batches, score_micro_batch)

    held = HeldRows(batch.cu_rows, _sequences_held(assigned, layout), dist.group.WORLD)
    height = 8 + sampled
    if assigned.shared.any():
        table = _of_whole_sequences(columns, assigned, layout, batch, held, height)
    else:
        table = _in_canonical_order(columns, assigned, held, height)
    *scores, log_probs, faults = table
    ids = held.ids()
    probed = (ids % stride == 0).nonzero()[:, 0]
    told = torch.zeros(1 + -(-batch.num_rows // stride), device=platform.device())
    told[0] = (faults > 0).sum()
    at = to_device(1 + ids[probed] // stride, told.device)
    told[at] = log_probs[to_device(probed, told.device)]
    dist.all_reduce(told)
    faulty, *_ = found = told.cpu()
    if faulty:
        raise _fault(faults.cpu(), batch.sequences_of(ids))
    gap = (found[1:] - batch.log_probs[::stride]).abs()
    scored = BatchScores(TokenScores(*scores), held)
    return ScoredBatch(batch, assigned, teacher_rows, scored, gap, kept)


def _sequences_held(assigned: batching.Assignment, layout: Layout) -> Tensor:
    """Return [n] int64, ascending: the sequences whose scores this rank alone has."""
    sequences = assigned.sequences()
    if layout.cp_rank > 0:
        sequences = sequences[~assigned.shared[sequences]]
    return sequences if layout.is_last_stage and layout.tp_rank == 0 else sequences[:0]


def _of_whole_sequences(
    columns: list[Tensor], assigned: batching.Assignment, layout: Layout, batch: RolloutBatch,
    held: HeldRows, height: int,
) -> Tensor:  # fmt: skip
    """Send what was found of shared sequences to the first rank of each context-parallel group.

    Returns:
        [height, r] fp32, of the rows that are held, in their order.
    """
    ids, rows = torch.empty(0, dtype=torch.int64), torch.empty(0, height, device=platform.device())
    if columns and layout.tp_rank == 0:
        ids = torch.cat([m.row_ids for m in assigned.micro_batches])
        rows = torch.cat(columns, dim=1).T.contiguous()
    starts, data_ranks = assigned.runs(batch)
    scored = starts, layout.last_stage_rank(data_ranks, 0)
    wanted = batch.cu_rows[:-1], layout.last_stage_rank(assigned.owner, 0)
    routes = Routes.between(batch.num_rows, scored, wanted)
    return routes.send_all([RowShard(ids, rows)]).at(held.ids()).T


def _in_canonical_order(
    columns: list[Tensor], assigned: batching.Assignment, held: HeldRows, height: int
) -> Tensor:
    """Return [height, r] fp32: what was found of the rows that are held, in their order."""
    if not len(held.sequences):
        return torch.zeros(height, 0, device=platform.device())
    packed = torch.tensor([i for m in assigned.micro_batches for i in m.sequences])
    counts = held.cu_rows.diff()[packed]
    order = packed.argsort()
    rows = ranges((counts.cumsum(0) - counts)[order], counts[order])
    table = torch.cat(columns, dim=1)
    return table[:, to_device(rows, table.device)]


def whole_scores(scored: ScoredBatch) -> TokenScores:
    """Put the scores of all rows together, [R] each on the CPU of every rank: for few rows.

    Collectives: an all-reduce of 24 bytes a row over all ranks.
    """
    rows, held = scored.scores.rows, scored.scores.held
    columns = [getattr(rows, name) for name in (*NAMES, "topk_overlap", "teacher_log_prob")]
    return TokenScores(*_everywhere(torch.stack(columns), held.ids(), held.num_rows))


_CULPRITS = {1: "teacher hidden states", 2: "student hidden states", 4: "scores"}


def culprits(student: Tensor, teacher: Tensor, scores: TokenScores) -> Tensor:
    """Tell whose numbers are not finite: [R] float32, a sum of keys of _CULPRITS. 0: nobody's.

    Args:
        student, teacher: [R] bool, the rows whose hidden states are finite. Scores can be at fault
            only where both are.
    """
    sound = ~scores.disagreement.isnan()
    for values in (scores.compatibility, scores.student_entropy, scores.teacher_entropy):
        sound &= values.isfinite()
    return (1 * ~teacher + 2 * ~student + 4 * (student & teacher & ~sound)).float()


def _fault(faults: Tensor, sequences: Tensor) -> Fault:
    """Say whose numbers are not finite, on which ranks and in which sequences.

    Args:
        faults: [r] of `culprits`, of the rows held here, and sequences: [r] the sequence of each.
    """
    bits = faults[faults > 0].int().unique().tolist()
    bad = sequences[faults > 0].unique().tolist()
    found = by_rank([(bits, bad)] if bad else [])
    seen = [bit for [(bits, _)] in found.values() for bit in bits]
    whose = [name for bit, name in _CULPRITS.items() if any(bit & each for each in seen)]
    what = f"{' and '.join(whose)} are not finite"
    return Fault(what, [*found], sorted(i for [(_, bad)] in found.values() for i in bad))


def sequence_log_probs(
    student: FrozenStudent,
    sequences: Sequence[Sequence[int]],
    micro_batch_tokens: int,
    chunk_rows: int = 1024,
) -> Tensor:
    """Return the student's log-probability of every token but the first of each sequence.

    It is at temperature 1 over all the student's tokens: [Σ(n−1)] float32 for sequences of n
    tokens, on the CPU, the same on every rank.

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
    assigned = batching.assign(batch, WantedRows.all(batch), layout, micro_batch_tokens)

    def log_probs(micro_batch: batching.MicroBatch, hidden_states: Tensor) -> Tensor:
        hidden = pick_rows(hidden_states, micro_batch.rows, layout)
        targets = micro_batch.targets
        return token_log_probs(hidden, student.head_weight, targets, whole, chunk_rows)[None]

    columns = student.forward(assigned.micro_batches, log_probs)
    return gather_rows(columns, assigned, rows, 1, layout)[0]


def gather_rows(
    columns: list[Tensor],
    assigned: batching.Assignment,
    num_rows: int,
    height: int,
    layout: Layout,
) -> Tensor:
    """Put what the ranks of the last stage say of their rows together, on the CPU of every rank.

    Args:
        columns: [height, r] fp32 of each micro-batch; empty on other stages.

    Returns:
        [height, R] fp32, R being num_rows.

    Collectives: an all-reduce of 4·height bytes a row over all ranks.
    """
    ids = torch.empty(0, dtype=torch.int64)
    found = torch.empty(height, 0, device=platform.device())
    if columns and layout.tp_rank == 0:
        ids = torch.cat([m.row_ids for m in assigned.micro_batches])
        found = torch.cat(columns, dim=1)
    return _everywhere(found, ids, num_rows)


def _everywhere(found: Tensor, ids: Tensor, num_rows: int) -> Tensor:
    """Return [height, R] on the CPU of every rank, of which each has [height, r], the rows `ids`.

    Each row is written by one rank, so the sum over all ranks is a gather.
    """
    table = torch.zeros(len(found), num_rows, device=platform.device())
    table[:, to_device(ids, table.device)] = found
    dist.all_reduce(table)
    return table.cpu()
