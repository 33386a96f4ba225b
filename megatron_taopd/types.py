"""The values that travel between the steps of the loop.

Shape legend, used throughout the package:
    N sequences · T packed tokens · R response rows · V vocabulary columns of this shard · K top-k
    D model width · L layers

A *response row* is the position **before** the token it predicts: a sequence of prompt length p and
total length n has its rows at positions p-1 … n-2, one for each response token that is valid: one
that is not (tool output, say) is read like any other and has no row. Batch-wide vectors are [R] in
canonical order: the rows of sequence 0, then of sequence 1, and so on.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from functools import cached_property
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn.functional import pad


def ranges(starts: Tensor, counts: Tensor) -> Tensor:
    """Return [Σ counts] int64: `counts[i]` integers from `starts[i]` on, range after range.

    Both are [n] int64, on the CPU.
    """
    before = counts.cumsum(0) - counts
    return torch.arange(int(counts.sum())) + (starts - before).repeat_interleave(counts)


class Sequences:
    """Sequences of tokens end to end, and where their response rows stand: what a trunk runs.

    A subclass has, besides what follows from them below:
        tokens: [T] int64.
        cu_seqlens: [N+1] int64, where each sequence starts; the last entry is T.
        cu_rows: [N+1] int64, where each sequence's rows start in a canonical [R] vector.
        row_positions: [R] int64, the position of each row inside its sequence, ascending there and
            never the last one.

    Attributes:
        teachers: [N] int64, the number of each sequence's teacher; None: all have the same.
    """

    teachers: Tensor | None = None
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
        return ranges(self.cu_rows[sequences], self.cu_rows.diff()[sequences])

    def sequences_of(self, rows: Tensor) -> Tensor:
        """[r] int64, the sequence of each of these rows."""
        return torch.searchsorted(self.cu_rows, rows, right=True) - 1

    def positions_of(self, rows: Tensor) -> Tensor:
        """[r] int64, the position of each of these rows inside its sequence."""
        return self.row_positions[rows]

    def reach(self) -> Tensor:
        """[N] int64, tokens of each sequence up to its last row, that one included; 0 without."""
        has_rows = self.cu_rows.diff() > 0
        last = (self.cu_rows[1:] - 1)[has_rows]
        reach = torch.zeros_like(self.cu_rows[1:])
        reach[has_rows] = self.positions_of(last) + 1
        return reach


@dataclass(frozen=True)
class RolloutBatch(Sequences):
    """All sequences of one step, identical on every rank (token ids are small).

    Attributes:
        tokens: [T] int64, the sequences end to end, each prompt followed by its response.
        cu_seqlens: [N+1] int64, where each sequence starts; the last entry is T.
        prompt_lengths: [N] int64.
        log_probs: [R] float32, the engine's log-probability of each row's token under its full
            distribution at temperature 1 (natural log); NaN of references.
        truncated: [N] bool, the response hit the length limit before a stop token.
        prompts: [N] int64, which prompt of the data each sequence answers.
        weight_versions: [R] int64, the optimizer step whose weights generated each row's token; −1
            of references.
        valid: [M] bool, which of all response tokens, one sequence after the other, have rows;
            None: all of them.
        references: [N] bool, the sequences whose response is the data's; None: all are the
            student's own.
        teachers: [N] int64, the number of each sequence's teacher; None: all have the same.
    """

    tokens: Tensor
    cu_seqlens: Tensor
    prompt_lengths: Tensor
    log_probs: Tensor
    truncated: Tensor
    prompts: Tensor
    weight_versions: Tensor
    valid: Tensor | None = None
    references: Tensor | None = None
    teachers: Tensor | None = None

    @property
    def is_valid(self) -> Tensor:
        """[M] bool, `valid`, also where all are."""
        return torch.ones(int(self.cu_responses[-1])).bool() if self.valid is None else self.valid

    @property
    def is_reference(self) -> Tensor:
        """[N] bool, `references`, also where there is none."""
        if self.references is None:
            return torch.zeros(self.num_sequences, dtype=torch.bool)
        return self.references

    @property
    def response_lengths(self) -> Tensor:
        """[N] int64, the tokens of each response, valid or not."""
        return self.lengths - self.prompt_lengths

    @cached_property
    def cu_responses(self) -> Tensor:
        """[N+1] int64, where each response starts among all response tokens; the end is M."""
        return pad(self.response_lengths.cumsum(0), (1, 0))

    @cached_property
    def cu_rows(self) -> Tensor:
        """[N+1] int64, where each sequence's rows start in a canonical [R] vector."""
        if self.valid is None:
            return self.cu_responses
        return pad(self.valid.cumsum(0), (1, 0))[self.cu_responses]

    @cached_property
    def _valid_tokens(self) -> Tensor | None:
        """[R] int64, where each row's token is among all response tokens; None: all have rows."""
        return None if self.valid is None else self.valid.nonzero()[:, 0]

    @property
    def row_positions(self) -> Tensor:
        """[R] int64, the position of each row inside its sequence (p-1 … n-2)."""
        positions = ranges(self.prompt_lengths - 1, self.response_lengths)
        return positions if self.valid is None else positions[self.valid]

    def positions_of(self, rows: Tensor) -> Tensor:
        """[r] int64, the position of each of these rows inside its sequence."""
        sequences = self.sequences_of(rows)
        tokens = rows if self._valid_tokens is None else self._valid_tokens[rows]
        return tokens - self.cu_responses[sequences] + self.prompt_lengths[sequences] - 1

    def response_tokens(self) -> Tensor:
        """[M] int64, all tokens of the responses, one response after the other."""
        first = self.cu_seqlens[:-1] + self.prompt_lengths
        return self.tokens[ranges(first, self.response_lengths)]

    def row_tokens(self) -> Tensor:
        """[R] int64, the token that each row predicts."""
        tokens = self.response_tokens()
        return tokens if self.valid is None else tokens[self.valid]

    def only(self, sequences: Tensor) -> RolloutBatch:
        """Return a batch of these sequences [n], in the order given."""
        lengths, rows = self.lengths[sequences], self.rows_of(sequences)
        responses = ranges(self.cu_responses[sequences], self.response_lengths[sequences])
        return RolloutBatch(
            tokens=self.tokens[ranges(self.cu_seqlens[sequences], lengths)],
            cu_seqlens=pad(lengths.cumsum(0), (1, 0)),
            prompt_lengths=self.prompt_lengths[sequences],
            log_probs=self.log_probs[rows],
            truncated=self.truncated[sequences],
            prompts=self.prompts[sequences],
            weight_versions=self.weight_versions[rows],
            valid=None if self.valid is None else self.valid[responses],
            references=None if self.references is None else self.references[sequences],
            teachers=None if self.teachers is None else self.teachers[sequences],
        )

    def followed_by(self, other: RolloutBatch) -> RolloutBatch:
        """Return a batch of these sequences and then the other's."""

        def joined(name: str) -> Tensor:
            return torch.cat([getattr(self, name), getattr(other, name)])

        def unless_none(name: str, flags: str) -> Tensor | None:
            none = getattr(self, name) is None and getattr(other, name) is None
            return None if none else joined(flags)

        return RolloutBatch(
            tokens=joined("tokens"),
            cu_seqlens=pad(joined("lengths").cumsum(0), (1, 0)),
            prompt_lengths=joined("prompt_lengths"),
            log_probs=joined("log_probs"),
            truncated=joined("truncated"),
            prompts=joined("prompts"),
            weight_versions=joined("weight_versions"),
            valid=unless_none("valid", "is_valid"),
            references=unless_none("references", "is_reference"),
            teachers=None if self.teachers is None else joined("teachers"),
        )


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
class WantedRows:
    """The response rows of a batch that a pass needs.

    All ranks know how many there are of each sequence and how far they reach, from which the plan
    follows; which ones they are is known to the ranks that hold their sequence.

    Attributes:
        counts: [N] int64, the wanted rows of each sequence.
        lengths: [N] int64, tokens up to the last one of each sequence, which a pass has to run; 0
            where none is wanted.
        ids: [k] int64 on the CPU, ascending: the wanted rows that are known here; None: of every
            sequence all rows are wanted.
    """

    counts: Tensor
    lengths: Tensor
    ids: Tensor | None

    @classmethod
    def all(cls, batch: Sequences) -> WantedRows:
        """Want every row, as a scoring pass does."""
        return cls(batch.cu_rows.diff(), batch.reach(), None)

    @classmethod
    def known(cls, batch: Sequences, ids: Tensor) -> WantedRows:
        """Want these rows [k], ascending, and no others of the whole batch."""
        counts = ids.new_zeros(batch.num_sequences)
        counts.index_add_(0, batch.sequences_of(ids), torch.ones_like(ids))
        last = ids[(counts.cumsum(0) - 1)[counts > 0]]
        lengths = torch.zeros_like(counts)
        lengths[counts > 0] = batch.positions_of(last) + 1
        return cls(counts, lengths, ids)

    @property
    def known_ids(self) -> Tensor:
        """[k] int64, the wanted rows that are known here, where they are not all rows."""
        assert self.ids is not None, "all rows are wanted"
        return self.ids

    @property
    def num_rows(self) -> int:
        """The wanted rows of all sequences."""
        return int(self.counts.sum())

    def of(self, batch: Sequences, sequences: Tensor) -> Tensor:
        """[r] int64, the wanted rows of these sequences [n], one sequence after the other.

        Those of a sequence that is not known here are left out.
        """
        if self.ids is None:
            return batch.rows_of(sequences)
        return self.between(batch.cu_rows[sequences], batch.cu_rows[sequences + 1])

    def between(self, first: Tensor, end: Tensor) -> Tensor:
        """[r] int64, the wanted rows known here of the runs [first, end) of rows, [n] each."""
        starts, ends = (torch.searchsorted(self.known_ids, rows) for rows in (first, end))
        return self.known_ids[ranges(starts, ends - starts)]

    def within(self, batch: Sequences, chosen: Tensor) -> WantedRows:
        """Want what this wants of some sequences; chosen: [N] bool."""
        ids = self.of(batch, chosen.nonzero()[:, 0])
        return WantedRows(self.counts * chosen, self.lengths * chosen, ids)


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
        student_log_prob: [R] float32, the student's log-probability of it over the common
            vocabulary, −inf likewise. None where nobody has asked.
        student_topk_ids: [R, K] int64, highest logit first, on request.
        teacher_topk_ids: [R, K] int64, on request.
    """

    disagreement: Tensor
    compatibility: Tensor
    student_entropy: Tensor
    teacher_entropy: Tensor
    topk_overlap: Tensor | None = None
    teacher_log_prob: Tensor | None = None
    student_log_prob: Tensor | None = None
    student_topk_ids: Tensor | None = None
    teacher_topk_ids: Tensor | None = None

    def at(self, rows: Tensor) -> TokenScores:
        """Return the scores of these rows [r], int64 on the scores' device."""
        chosen: dict[str, Any] = {}
        for field in fields(self):
            values = getattr(self, field.name)
            chosen[field.name] = None if values is None else values[rows]
        return TokenScores(**chosen)

    @classmethod
    def cat(cls, chunks: list[TokenScores]) -> TokenScores:
        """Concatenate along rows; a field that any chunk lacks is absent."""
        joined: dict[str, Any] = {}
        for field in fields(cls):
            values = [getattr(chunk, field.name) for chunk in chunks]
            joined[field.name] = None if any(v is None for v in values) else torch.cat(values)
        return cls(**joined)
