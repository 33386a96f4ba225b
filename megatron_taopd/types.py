"""The values that travel between the steps of the loop.

Shape legend, used throughout the package:
    N sequences · T packed tokens · R response rows · V vocabulary columns of this shard · K top-k
    D model width · L layers

A *response row* is the position **before** the token it predicts: a sequence of prompt length p and
total length n has its rows at positions p-1 … n-2, one for each response token. Batch-wide vectors
are [R] in canonical order: the rows of sequence 0, then of sequence 1, and so on.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from functools import cached_property
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor


class Sequences:
    """Sequences of tokens end to end, and where their response rows stand: what a trunk runs.

    A subclass has, besides what follows from them below:
        tokens: [T] int64.
        cu_seqlens: [N+1] int64, where each sequence starts; the last entry is T.
        cu_rows: [N+1] int64, where each sequence's rows start in a canonical [R] vector.
        row_positions: [R] int64, the position of each row inside its sequence, ascending there and
            never the last one.
    """

    tokens: Tensor
    cu_seqlens: Tensor
    if TYPE_CHECKING:  # an attribute or a property, as the subclass likes

        @property
        def cu_rows(self) -> Tensor: ...

        @property
        def row_positions(self) -> Tensor: ...

    @property
    def num_sequences(self) -> int:
        return len(self.cu_seqlens) - 1

    @property
    def num_rows(self) -> int:
        return int(self.cu_rows[-1])

    @property
    def lengths(self) -> Tensor:
        """[N] int64, prompt and response tokens of each sequence."""
        return self.cu_seqlens.diff()

    def sequence(self, index: int) -> Tensor:
        """[n] int64, the tokens of one sequence."""
        return self.tokens[self.cu_seqlens[index] : self.cu_seqlens[index + 1]]

    def row_sequences(self) -> Tensor:
        """[R] int64, the sequence each row belongs to."""
        return torch.repeat_interleave(self.cu_rows.diff())

    def rows_of(self, sequences: Tensor) -> Tensor:
        """[r] int64, the rows of these sequences, one sequence after the other."""
        first, counts = self.cu_rows[sequences], self.cu_rows.diff()[sequences]
        within = torch.arange(int(counts.sum())) - (counts.cumsum(0) - counts).repeat_interleave(
            counts
        )
        return first.repeat_interleave(counts) + within


@dataclass(frozen=True)
class RolloutBatch(Sequences):
    """All sequences of one step, identical on every rank (token ids are small).

    Attributes:
        tokens: [T] int64, the sequences end to end, each prompt followed by its response.
        cu_seqlens: [N+1] int64, where each sequence starts; the last entry is T.
        prompt_lengths: [N] int64.
        log_probs: [R] float32, the engine's log-probability of each response token under its full
            distribution at temperature 1 (natural log).
        truncated: [N] bool, the response hit the length limit before a stop token.
        prompts: [N] int64, which prompt of the data each sequence answers.
        weight_versions: [R] int64, the optimizer step whose weights generated each response token.
    """

    tokens: Tensor
    cu_seqlens: Tensor
    prompt_lengths: Tensor
    log_probs: Tensor
    truncated: Tensor
    prompts: Tensor
    weight_versions: Tensor

    @property
    def response_lengths(self) -> Tensor:
        """[N] int64, which is also the number of response rows of each sequence."""
        return self.lengths - self.prompt_lengths

    @property
    def cu_rows(self) -> Tensor:
        """[N+1] int64, where each sequence's rows start in a canonical [R] vector."""
        return torch.nn.functional.pad(self.response_lengths.cumsum(0), (1, 0))

    @cached_property
    def row_positions(self) -> Tensor:
        """[R] int64, the position of each row inside its sequence (p-1 … n-2)."""
        starts = self.cu_rows[:-1] - (self.prompt_lengths - 1)
        return torch.arange(self.num_rows) - starts[self.row_sequences()]

    def response_tokens(self) -> Tensor:
        """[R] int64, the token that each row predicts."""
        starts = self.cu_seqlens[:-1]
        return self.tokens[starts[self.row_sequences()] + self.row_positions + 1]


@dataclass(frozen=True)
class TeacherSequences(Sequences):
    """A batch as a teacher with another tokenizer or chat template reads it.

    Its rows are the batch's, one to one: the row of a response token stands on the last of the
    teacher's tokens before it.

    Attributes:
        tokens: [T] int64, the teacher's ids, end to end.
        cu_seqlens: [N+1] int64, where each sequence starts; the last entry is T.
        cu_rows: [N+1] int64, those of the batch.
        row_positions: [R] int64, the position of each row inside its sequence.
    """

    tokens: Tensor
    cu_seqlens: Tensor
    cu_rows: Tensor
    row_positions: Tensor


@dataclass(frozen=True)
class TokenScores:
    """What the selection needs to know of each row, on the device of the heads.

    Attributes:
        disagreement: [R] float32, D (Eq. 9): KL(teacher ‖ student) on the union of both top-K sets,
            both renormalised there, in nats.
        compatibility: [R] float32, C (Eq. 4): teacher mass on the student's top-K ids, in [0, 1].
        student_entropy: [R] float32, H(p_S) over the whole common vocabulary, in nats.
        teacher_entropy: [R] float32, likewise for the teacher.
        topk_overlap: [R] float32, |S_S ∩ S_T| / K, the share of the student's top-K ids that are
            among the teacher's; None where nobody has counted.
        teacher_log_prob: [R] float32, the teacher's log-probability of the sampled token (natural
            log), −inf where only the student knows that token. It is over the common vocabulary; of
            a teacher that reports its top-K, over its own. None where nobody has asked.
        student_topk_ids: [R, K] int64, highest logit first, on request.
        teacher_topk_ids: [R, K] int64, on request.
    """

    disagreement: Tensor
    compatibility: Tensor
    student_entropy: Tensor
    teacher_entropy: Tensor
    topk_overlap: Tensor | None = None
    teacher_log_prob: Tensor | None = None
    student_topk_ids: Tensor | None = None
    teacher_topk_ids: Tensor | None = None

    @classmethod
    def cat(cls, chunks: list[TokenScores]) -> TokenScores:
        """Concatenate along rows; a field that any chunk lacks is absent."""
        joined: dict[str, Any] = {}
        for field in fields(cls):
            values = [getattr(chunk, field.name) for chunk in chunks]
            joined[field.name] = None if any(v is None for v in values) else torch.cat(values)
        return cls(**joined)
