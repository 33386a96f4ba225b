"""Teachers with another tokenizer: which id is which, and what the teacher reads of a response.

Two tokens are the same if both tokenizers write them alike, but for those that end a response: they
are the same by what they do. Columns of the heads that only one model has take part in nothing; a
token that only the student has is spelled out for the teacher, so that it reads the same text.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path

import torch
from jinja2 import TemplateError
from torch import Tensor
from torch.nn.functional import pad
from transformers import (
    AutoConfig,
    AutoTokenizer,
    GenerationConfig,
    PretrainedConfig,
    PreTrainedTokenizerBase,
)

from megatron_taopd.types import RolloutBatch, Sequences, TeacherSequences

MIN_SHARED = 0.9  # of the response tokens: below, the pair is refused


@dataclass(frozen=True)
class Vocabulary:
    """The ids of one model.

    Attributes:
        tokenizer: the model's own.
        size: rows of its embedding, which may be more than the tokenizer has ids.
        ends: the ids at which its responses end, in every engine: those that generation_config.json
            names and then those of config.json, which need not agree.
    """

    tokenizer: PreTrainedTokenizerBase
    size: int
    eos_token_ids: tuple[int, ...]

    @classmethod
    def from_pretrained(cls, hf_dir: str | Path) -> Vocabulary:
        """Read a Hugging Face directory."""
        tokenizer = AutoTokenizer.from_pretrained(hf_dir, local_files_only=True)
        config = AutoConfig.from_pretrained(hf_dir, local_files_only=True).get_text_config()
        generation = GenerationConfig()
        if (Path(hf_dir) / "generation_config.json").is_file():
            generation = GenerationConfig.from_pretrained(hf_dir, local_files_only=True)
        return cls(tokenizer, config.vocab_size, end_ids(generation, config))

    def ending_at(self, stop_token_ids: Sequence[int]) -> Vocabulary:
        """Add further ids that end a response."""
        return replace(
            self, eos_token_ids=tuple(dict.fromkeys([*self.eos_token_ids, *stop_token_ids]))
        )

    def roles(self) -> dict[str, int]:
        """Return which special token ends a turn and which, if another one, ends a text.

        A turn ends with what the chat template puts after an answer, if the model's responses end
        there; else with the tokenizer's end of sequence; else with the first end that is named.
        """
        special = self.tokenizer.added_tokens_decoder
        ends = [index for index in self.eos_token_ids if index in special]
        preferred = [self.after_an_answer(), self.tokenizer.eos_token_id]
        ends.sort(key=lambda index: preferred.index(index) if index in preferred else 2)
        return dict(zip(("end of turn", "end of text"), ends, strict=False))

    def after_an_answer(self) -> int | None:
        """Return the id that the chat template puts after an answer.

        It is None if there is no template, or none that takes a question and an answer.
        """
        if not self.tokenizer.chat_template:
            return None
        question, answer = {"role": "user", "content": "?"}, {"role": "assistant", "content": "42"}
        try:
            rendered = self.tokenizer.apply_chat_template([question, answer], tokenize=False)
        except (TemplateError, ValueError):
            return None
        after = str(rendered).rpartition("42")[2]
        return next(iter(self.tokenizer(after, add_special_tokens=False)["input_ids"]), None)


def end_ids(*configs: PretrainedConfig | GenerationConfig) -> tuple[int, ...]:
    """Return the ids that end a response by any of these, in their order."""
    named = [config.eos_token_id for config in configs]
    listed = [ids if isinstance(ids, list | tuple) else [ids] for ids in named]
    found = [i for ids in listed for i in ids if i is not None and i >= 0]
    return tuple(dict.fromkeys(found))


@dataclass(frozen=True)
class VocabMap:
    """The student's ids in the teacher's.

    Attributes:
        teacher_ids: [size] int64, the teacher's id of each of the student's, no two the same; −1
            for those without a counterpart. The student's ids from size on are never drawn.
        spellings: teacher ids that spell the text of a student id without a counterpart.
        stand_in: the teacher ids of U+FFFD, which stand for ids without any text.
    """

    teacher_ids: Tensor
    spellings: dict[int, list[int]] = field(default_factory=dict)
    stand_in: list[int] = field(default_factory=list)

    @classmethod
    def between(cls, student: Vocabulary, teacher: Vocabulary) -> VocabMap:
        """Match two vocabularies.

        Tokens are matched by their strings, and those that end a turn or a text by this role, which
        comes first. Tokenizers that agree everywhere give the identity, on all ids that both models
        have, ids without a token included; otherwise those have no counterpart.

        Raises:
            ValueError: the teacher's tokenizer has no ids for text that it does not know.
        """
        ours, theirs = student.tokenizer.get_vocab(), teacher.tokenizer.get_vocab()
        if ours == theirs:
            return cls(torch.arange(min(student.size, teacher.size)))
        counterpart = {index: theirs[token] for token, index in ours.items() if token in theirs}
        teacher_roles = teacher.roles()
        for role, index in student.roles().items():
            if role in teacher_roles:
                same = teacher_roles[role]
                counterpart = {i: t for i, t in counterpart.items() if t != same} | {index: same}
        if not (stand_in := _tokenize_text("\ufffd", teacher.tokenizer)):
            raise ValueError(
                f"teacher.path: the tokenizer of {teacher.tokenizer.name_or_path} gives no ids for "
                "U+FFFD; it needs byte-level tokens or an unknown token"
            )
        return cls(
            torch.tensor([counterpart.get(index, -1) for index in range(max(ours.values()) + 1)]),
            {
                index: spelling
                for token, index in ours.items()
                if index not in counterpart
                and (spelling := _spell(token, index, student.tokenizer, teacher.tokenizer))
            },
            stand_in,
        )

    @property
    def size(self) -> int:
        return len(self.teacher_ids)

    @cached_property
    def common(self) -> Tensor:
        """The student's ids that have a counterpart, [n] int64."""
        return (self.teacher_ids >= 0).nonzero()[:, 0]

    @cached_property
    def absent(self) -> Tensor | None:
        """The student's ids below size that have no counterpart, [n] int64; None if all have."""
        absent = (self.teacher_ids < 0).nonzero()[:, 0]
        return absent if len(absent) else None

    @cached_property
    def is_identity(self) -> bool:
        return torch.equal(self.teacher_ids, torch.arange(self.size))

    def to_teacher(self, ids: Tensor) -> Tensor:
        """Return the teacher's ids of student ids, int64 of any shape; −1 without a counterpart."""
        known = ids < self.size
        return self.teacher_ids[ids.where(known, 0)].where(known, -1)

    def columns(self, start: int, stop: int) -> Tensor:
        """Return the rows of the teacher's head for the student's columns [start, stop).

        They are [stop − start] int64; −1 for a column that no row belongs in.
        """
        return self.to_teacher(torch.arange(start, stop))

    def read(
        self, batch: RolloutBatch, prompts: Sequence[Sequence[int]] | None, max_tokens: int
    ) -> tuple[Sequences, dict[str, float]]:
        """Return the batch as the teacher reads it: its own prompts, the responses in its ids.

        A response token with a counterpart becomes that id; any other one is spelled out, so that
        the text stays what the student wrote. The row of a token stands on the last of the
        teacher's tokens before it. Spellings that would make a sequence longer than max_tokens are
        cut to their first id.

        Args:
            prompts: the teacher's token ids of each prompt of the data; None where they are the
                student's.
            max_tokens: the longest sequence that the teacher takes; prompt and response of any
                sequence must fit without spellings.

        Returns:
            The batch itself if the teacher reads the same ids. And metrics: the share of response
            tokens that have a counterpart, and the number of spellings that were cut.

        Raises:
            RuntimeError: fewer than MIN_SHARED of the response tokens have a counterpart.
        """
        same = self.is_identity and prompts is None
        if same and int(batch.tokens.max()) < self.size:
            return batch, {"teacher/shared_tokens": 1.0, "teacher/cut_spellings": 0}
        tokens = batch.response_tokens()
        ids = self.to_teacher(tokens)
        spelled = ids < 0
        shared = int((~spelled).sum())
        if shared < MIN_SHARED * len(ids):
            raise RuntimeError(
                f"of {len(ids)} response tokens, {shared} ({shared / len(ids):.2%}) have a "
                f"counterpart in the teacher's vocabulary; at least {MIN_SHARED:.0%} have to"
            )
        metrics = {"teacher/shared_tokens": shared / len(ids), "teacher/cut_spellings": 0}
        if same:
            return batch, metrics

        sequences = torch.repeat_interleave(batch.response_lengths)  # of each response token
        if prompts is None:
            own = [batch.sequence(i)[:n] for i, n in enumerate(batch.prompt_lengths.tolist())]
        else:
            own = [torch.tensor(prompts[i], dtype=torch.int64) for i in batch.prompts.tolist()]
        prompt_lengths = torch.tensor([len(prompt) for prompt in own])
        spellings = [self.spellings.get(i, self.stand_in) for i in tokens[spelled].tolist()]
        counts = torch.ones_like(ids)  # of the teacher's ids for each response token
        counts[spelled] = torch.tensor([len(ids) for ids in spellings], dtype=torch.int64)

        extra = pad((counts - 1).cumsum(0), (1, 0))
        extra = extra[1:] - extra[batch.cu_responses[:-1]][sequences]
        room = max_tokens - prompt_lengths - batch.response_lengths
        cut = (counts > 1) & (extra > room[sequences])
        metrics["teacher/cut_spellings"] = int(cut.sum())
        counts[cut] = 1

        starts = pad(counts.cumsum(0), (1, 0))
        cu_responses = starts[batch.cu_responses]
        read = ids.repeat_interleave(counts)
        pieces = zip(spellings, counts[spelled].tolist(), strict=True)
        read[read < 0] = torch.tensor([i for spelling, n in pieces for i in spelling[:n]]).long()
        responses = read.split(cu_responses.diff().tolist())
        offset = prompt_lengths - 1 - cu_responses[:-1]
        row_positions = starts[:-1] + offset[sequences]
        return TeacherSequences(
            tokens=torch.cat([part for pair in zip(own, responses, strict=True) for part in pair]),
            cu_seqlens=pad((prompt_lengths + cu_responses.diff()).cumsum(0), (1, 0)),
            cu_rows=batch.cu_rows,
            row_positions=row_positions if batch.valid is None else row_positions[batch.valid],
        ), metrics


def _spell(token: str, index: int, student, teacher) -> list[int]:
    """Spell a student's token in the teacher's ids.

    An ordinary token goes through the teacher's merges as it is written in the vocabulary. In a
    byte-level one that is its bytes, so that part of a character is spelled like any other.
    """
    if index in student.added_tokens_decoder:
        return _tokenize_text(token, teacher)
    return [piece.id for piece in teacher.backend_tokenizer.model.tokenize(token)]


def _tokenize_text(text: str, tokenizer) -> list[int]:
    return tokenizer(text, add_special_tokens=False, split_special_tokens=True)["input_ids"]
