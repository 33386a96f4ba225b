"""One batch of the method, in the paper's order, as loop, tests, benchmarks and doctor run it."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_taopd.config.schema import LossSection, SelectionSection, TrainSection
from megatron_taopd.data import batching
from megatron_taopd.models.replay import kept_bytes
from megatron_taopd.models.student import Student
from megatron_taopd.parallel.copies import to_device
from megatron_taopd.parallel.exchange import RowShard
from megatron_taopd.parallel.faults import Fault
from megatron_taopd.step.batch_scores import NAMES
from megatron_taopd.step.by_teacher import (
    choose_by_teacher,
    losses_by_teacher,
    metrics_by_teacher,
)
from megatron_taopd.step.extensions.row_weights import RowWeights
from megatron_taopd.step.guard import Guard
from megatron_taopd.step.output_heads import Heads
from megatron_taopd.step.scoring import ScoredBatch, score
from megatron_taopd.step.selection import Choice, choose, look
from megatron_taopd.step.training import train_on
from megatron_taopd.teacher.teachers import Parts, Teachers
from megatron_taopd.types import RolloutBatch, WantedRows

Span = Callable[[str], AbstractContextManager]


@dataclass(frozen=True)
class Selection:
    """The rows of a batch that are trained on, and what is known of them.

    Attributes:
        choice: of the rows whose scores this rank has.
        kept: the same on every rank but for `ids`, which are known where they were scored.
        metrics: of `selection.Look`.
    """

    choice: Choice
    kept: WantedRows
    metrics: dict[str, float]


@dataclass(frozen=True)
class Lesson:
    """What the student was taught by one batch.

    Attributes:
        selection: the rows that were kept.
        trained: what `train_on` says of them.
    """

    scored: ScoredBatch
    selection: Selection
    trained: dict[str, float]


@dataclass
class Distiller:
    """A student, its teachers, and how the one learns from the others.

    Attributes:
        heads: of all; None except on the student's last stage.
        guard: knows the losses of the steps before.
    """

    student: Student
    teachers: Teachers
    heads: Heads | None
    guard: Guard
    selection: SelectionSection
    loss: LossSection
    train: TrainSection

    def learn(
        self, batch: RolloutBatch, parts: Parts, seed: int, span: Span = lambda _: nullcontext()
    ) -> Lesson:
        """Teach the student one batch that its teachers have read.

        Args:
            batch: the same on every rank.
            parts: what the teachers have read, every sequence once; emptied.
            seed: of the `random` selector; give each step its own.
            span: names the parts of the work.

        Raises:
            Fault: its numbers mean nothing, on every rank alike. What it has taken of
                `train.mini_batches` stays.

        Collectives: those of `dispatch`, `score`, `select` and `train_on`.
        """
        batch = self.teachers.routed(batch)
        with span("teacher"):
            assigned = self.assign(batch)
            teacher_rows = self.dispatch(parts, batch, assigned)
        if not batch.num_rows:
            raise Fault("no response has a token", key="rollout")

        # Each response row gets its D, C and H (Eq. 3–5) …
        with span("scoring"):
            scored = self.score(batch, assigned, teacher_rows)

        # … of which the ⌈ρ|I|⌉ most teachable of the whole batch are kept (Eq. 12–13) …
        with span("selection"):
            selection = self.select(scored, seed)

        # … and the loss falls on these alone (Eq. 6–7).
        with span("training"):
            trained = self.train_on(scored, selection.kept)
        return Lesson(scored, selection, trained)

    def read(self, batch: RolloutBatch) -> Parts:
        """Let the teachers read a batch as a whole. Collectives: the teachers'."""
        with self.teachers.reading() as reading:
            reading.take(torch.arange(batch.num_sequences), batch)
            return reading.finish()

    def assign(self, batch: RolloutBatch) -> batching.Assignment:
        """Deal all rows of a batch to the student's ranks."""
        everything = WantedRows.all(batch)
        return batching.assign(
            batch, everything, self.student.layout, self.train.micro_batch_tokens
        )

    def dispatch(
        self, parts: Parts, batch: RolloutBatch, assigned: batching.Assignment
    ) -> dict[int, RowShard]:
        """Send the teachers' rows to the ranks that score them (`Teachers.dispatch`)."""
        return self.teachers.dispatch(parts, batch, self.student.layout, assigned)

    def score(
        self, batch: RolloutBatch, assigned: batching.Assignment, teacher_rows: dict[int, RowShard]
    ) -> ScoredBatch:
        """Score all rows (`scoring.score`), and keep the layers' outputs for a replay that fits."""
        budget = self.train.replay_memory_mib
        keep = self.train.schedule == "replay" and replay_mib(self.student, assigned) <= budget
        k, sampled = self.selection.k, self.loss.weights != "none"
        return score(batch, assigned, teacher_rows, self.student, self.heads, k, keep, sampled)

    def select(self, scored: ScoredBatch, seed: int) -> Selection:
        """Pick the rows to train on (`selection.choose`, or with a scope `choose_by_teacher`).

        Collectives: those of `choose` and `look` over all ranks, of several teachers also those of
        `metrics_by_teacher`; on the last stage a broadcast of a byte for each row that a
        data-parallel rank has scored, over TP, and before that of those that a context-parallel
        group shares, over it.
        """
        section = self.selection
        scores, teachers = scored.scores, scored.batch.teachers
        scores.describe(*NAMES)  # all at once
        if teachers is None or section.scope == "batch":
            choice = choose(section.selector, scores, section.ratio, seed, section.concentrate)
        else:
            choice = choose_by_teacher(section, scores, teachers, seed)
        seen = look(choice)
        kept = seen.wanted(scored.batch, self._kept_here(scored, choice.mask))
        metrics = seen.metrics
        if teachers is not None:
            metrics |= metrics_by_teacher([*self.teachers.engines], teachers, scores, kept)
        return Selection(choice, kept, metrics)

    def _kept_here(self, scored: ScoredBatch, mask: Tensor) -> Tensor:
        """Return [k] int64, the kept rows of the sequences that this rank has scored, or a part of.

        The first rank of a TP group has the mask, so that the others cannot differ by a bit; of
        rows that a context-parallel group shares, the group's first.
        """
        layout, assigned = self.student.layout, scored.assigned
        if not layout.is_last_stage:
            return torch.empty(0, dtype=torch.int64)
        ids = scored.batch.rows_of(assigned.sequences())
        if layout.tp_rank == 0 and assigned.shared.any():
            mask = self._with_shared(mask.byte(), assigned.shared[scored.batch.sequences_of(ids)])
        if layout.tp > 1:
            mask = mask.byte() if len(mask) else mask.new_empty(len(ids), dtype=torch.uint8)
            first = layout.last_stage_rank(layout.data_rank, 0)
            dist.broadcast(mask, src=first, group=layout.groups.tp)
        return ids[mask.bool().cpu()]

    def _with_shared(self, mask: Tensor, shared: Tensor) -> Tensor:
        """Tell a context-parallel group the mask of the rows that it shares.

        Args:
            mask: [r] uint8, of all rows on the first of the group, of those not shared on others.
            shared: [R] bool on the CPU, those shared among the rows of this rank's sequences.

        Returns:
            [R] uint8, of all of these.
        """
        layout, shared = self.student.layout, to_device(shared, mask.device)
        whole = mask.new_empty(len(shared))
        whole[slice(None) if layout.cp_rank == 0 else ~shared] = mask
        told = whole[shared]
        first = layout.last_stage_rank(layout.dp_rank * layout.cp, 0)
        dist.broadcast(told, src=first, group=layout.groups.cp)
        whole[shared] = told
        return whole

    def weigh(self, scored: ScoredBatch, kept: WantedRows) -> RowWeights | None:
        """Weigh the kept rows, if that is asked for (`RowWeights.by_discrepancy`)."""
        if self.loss.weights == "none":
            return None
        shared = bool(scored.assigned.shared.any())
        return RowWeights.by_discrepancy(scored.scores, scored.batch, kept, self.loss.gamma, shared)

    def train_on(self, scored: ScoredBatch, kept: WantedRows) -> dict[str, float]:
        """Take the optimizer steps of a batch (`training.train_on`).

        Returns:
            With `loss.weights` also `loss/weight_mean`, the kept rows' mean weight; of several
            teachers `losses_by_teacher`; of a student of experts what `ExpertLoad.take` says.
        """
        train, loss, weights = self.train, self.loss, self.weigh(scored, kept)
        models = self.student, self.heads
        metrics = train_on(scored, kept, *models, train, loss, self.guard, weights)
        if (teachers := scored.batch.teachers) is not None:
            metrics |= losses_by_teacher([*self.teachers.engines], teachers, kept, metrics)
        if weights:
            metrics["loss/weight_mean"] = weights.mean
        if self.student.expert_load:
            metrics |= self.student.expert_load.take()
        return metrics


def replay_mib(student: Student, assigned: batching.Assignment) -> float:
    """Return the MiB that the layers' outputs of a batch take on the rank that has the most."""
    most = int(assigned.tokens_by_rank(student.layout.data_ranks).max())
    return kept_bytes(student.trunk, most) / 2**20
