"""Both output projections over rows of hidden states: all that scoring and loss ask of them.

Of several teachers one head is on the device at a time (`HeadsInTurn`).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Protocol, Self

import torch
from torch import Tensor

from megatron_taopd.config.schema import LossSection
from megatron_taopd.data.vocab_map import VocabMap
from megatron_taopd.models import weights
from megatron_taopd.models.student import FrozenStudent
from megatron_taopd.parallel import platform
from megatron_taopd.parallel.copies import HostCopies
from megatron_taopd.parallel.vocab import (
    VocabShard,
    linear_divergence,
    linear_topk_divergence,
    participates,
    score_sampled,
    score_topk,
    token_log_probs,
)
from megatron_taopd.teacher.topk import TopkRows
from megatron_taopd.types import TokenScores


class _StudentHead:
    """The student's side, which does not depend on what is known of the teacher."""

    student: Tensor
    shard: VocabShard
    chunk_rows: int

    def of(self, _teacher: int) -> Self:
        """Return itself: there is one teacher."""
        return self

    def student_log_probs(self, student_hidden: Tensor, tokens: Tensor) -> Tensor:
        """Return the student's log-probability of one token a row, [R] (`token_log_probs`)."""
        return token_log_probs(student_hidden, self.student, tokens, self.shard, self.chunk_rows)


@dataclass(frozen=True)
class OutputHeads(_StudentHead):
    """Both heads, cut at the same vocabulary boundaries; on the student's last stage.

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
        """Tell which of the teacher's rows are finite, [R] bool."""
        return teacher_rows.isfinite().all(1)

    def scores(
        self, student_hidden: Tensor, teacher_rows: Tensor, tokens: Tensor, k: int
    ) -> TokenScores:
        """Score rows and the sampled tokens (`score_sampled`); teacher_rows are hidden states."""
        return score_sampled(
            student_hidden,
            self.student,
            teacher_rows,
            self.teacher,
            tokens,
            k,
            self.shard,
            self.chunk_rows,
        )

    def divergence(
        self, student_hidden: Tensor, teacher_rows: Tensor, loss: LossSection, weights: Tensor
    ) -> Tensor:
        """Sum the divergence over rows, each times its weight [R] (`linear_divergence`)."""
        return linear_divergence(
            student_hidden,
            self.student,
            teacher_rows,
            self.teacher,
            self.shard,
            loss.kind,
            self.chunk_rows,
            weights,
            beta=loss.beta,
            alpha=loss.alpha,
        )

    @torch.no_grad()
    def teacher_log_probs(self, teacher_rows: Tensor, tokens: Tensor) -> Tensor:
        """Return the teacher's, likewise."""
        return token_log_probs(teacher_rows, self.teacher, tokens, self.shard, self.chunk_rows)


@dataclass(frozen=True)
class TopkOutputHeads(_StudentHead):
    """The student's head, and a teacher that has none here but has said what its top-K are.

    Its rows are `TopkRows`, packed; attributes and methods are those of `OutputHeads`. Scores and
    divergences are bounds (`score_topk`, `topk_divergence`).
    """

    student: Tensor
    shard: VocabShard
    chunk_rows: int

    @staticmethod
    def sound(teacher_rows: Tensor) -> Tensor:
        """Tell which rows mean something, [R] bool; a log-probability may be −inf."""
        teacher = TopkRows.unpack(teacher_rows)
        return (teacher.log_probs < torch.inf).all(1) & (teacher.token_log_probs < torch.inf)

    def scores(
        self, student_hidden: Tensor, teacher_rows: Tensor, tokens: Tensor, k: int
    ) -> TokenScores:
        """Score rows (`score_topk`); the teacher has reported the sampled tokens."""
        teacher = TopkRows.unpack(teacher_rows)
        scores = score_topk(
            student_hidden,
            self.student,
            teacher.ids,
            teacher.log_probs,
            k,
            self.shard,
            self.chunk_rows,
        )
        known = participates(tokens, self.shard)
        log_probs = teacher.token_log_probs.masked_fill(~known, -torch.inf)
        return replace(scores, teacher_log_prob=log_probs)

    def divergence(
        self, student_hidden: Tensor, teacher_rows: Tensor, loss: LossSection, weights: Tensor
    ) -> Tensor:
        """Sum the divergence over rows, each times its weight [R] (`linear_topk_divergence`)."""
        teacher = TopkRows.unpack(teacher_rows)
        return linear_topk_divergence(
            student_hidden,
            self.student,
            teacher.ids,
            teacher.log_probs,
            self.shard,
            loss.kind,
            self.chunk_rows,
            weights,
            beta=loss.beta,
            alpha=loss.alpha,
        )

    def teacher_log_probs(self, teacher_rows: Tensor, _tokens: Tensor) -> Tensor:
        """Return the teacher's, as reported: over its own whole vocabulary."""
        return TopkRows.unpack(teacher_rows).token_log_probs


class Heads(Protocol):
    """The heads that a student learns by."""

    def of(self, teacher: int, /) -> OutputHeads | TopkOutputHeads:
        """Return the student's with that of the teacher of this number, which then is here."""
        ...


class HeadsInTurn:
    """The heads of several teachers, of which one is on the device at a time.

    The others wait in (pinned) memory of the host. All take their turn in the same memory of the
    device, which is that of the largest.

    Args:
        each: of every teacher by its number, read one at a time.
    """

    def __init__(self, each: Iterable[OutputHeads | TopkOutputHeads]):
        self.each: dict[int, OutputHeads | TopkOutputHeads] = {}
        self.waiting: dict[int, Tensor] = {}
        self.here: int | None = None
        for number, heads in enumerate(each):
            if isinstance(heads, OutputHeads):
                [copy], wait = HostCopies().take([heads.teacher])
                wait()
                self.waiting[number], heads = copy, replace(heads, teacher=copy)
            self.each[number] = heads
        memory = max(self.waiting.values(), key=Tensor.numel, default=torch.empty(0))
        memory = torch.empty_like(memory.flatten(), device=platform.device())
        for number, heads in self.each.items():
            if isinstance(heads, OutputHeads):
                place = memory[: heads.teacher.numel()].view(heads.teacher.shape)
                self.each[number] = replace(heads, teacher=place)

    def of(self, teacher: int) -> OutputHeads | TopkOutputHeads:
        """Return the student's with that of the teacher of this number, which then is here.

        What was computed with another one before is done by then: the copy is in the stream's
        order, and neither scores nor gradients need a teacher's head later.
        """
        heads = self.each[teacher]
        if isinstance(heads, OutputHeads) and teacher != self.here:
            heads.teacher.copy_(self.waiting[teacher], non_blocking=True)
            self.here = teacher
        return heads


def open_heads(
    student: FrozenStudent, teacher_dir: str | None, vocab_map: VocabMap, chunk_rows: int
) -> OutputHeads | TopkOutputHeads | None:
    """Read what the student's last stage scores and trains with; None on its other stages.

    Args:
        teacher_dir: Hugging Face directory of the teacher; None for one that reports its top-K.
        vocab_map: which row of the teacher's head is which id of the student's.
    """
    if not student.layout.is_last_stage:
        return None
    return _open(student, teacher_dir, vocab_map, chunk_rows)


def open_all_heads(
    student: FrozenStudent, teachers: Sequence[tuple[str | None, VocabMap]], chunk_rows: int
) -> Heads | None:
    """Read the heads of all teachers as `open_heads` does; of several, one at a time.

    Args:
        teachers: (teacher_dir, vocab_map) of each by its number.
    """
    if not student.layout.is_last_stage:
        return None
    opened = (_open(student, *teacher, chunk_rows) for teacher in teachers)
    return next(opened) if len(teachers) == 1 else HeadsInTurn(opened)


def _open(
    student: FrozenStudent, teacher_dir: str | None, vocab_map: VocabMap, chunk_rows: int
) -> OutputHeads | TopkOutputHeads:
    shard = student.trunk.vocab_shard(vocab_map.size, vocab_map.absent)
    if teacher_dir is None:
        return TopkOutputHeads(student.head_weight, shard, chunk_rows)
    columns = vocab_map.columns(shard.start, shard.stop)
    teacher = weights.load_head(teacher_dir, columns, student.dtype)
    return OutputHeads(student.head_weight, teacher, shard, chunk_rows)
