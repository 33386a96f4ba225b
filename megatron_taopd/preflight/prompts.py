"""The texts of a configuration, as its run reads them."""

from __future__ import annotations

import sys
from dataclasses import replace

from megatron_taopd.config.schema import Config
from megatron_taopd.data.prompts import Prompts, load_prompts
from megatron_taopd.data.vocab_map import Vocabulary

ANY_LENGTH = sys.maxsize


def vocabularies(config: Config) -> tuple[Vocabulary, Vocabulary]:
    """Read the student's vocabulary, ending also at `rollout.stop_token_ids`, and the teacher's."""
    student, teacher = map(Vocabulary.from_pretrained, (config.student.path, config.teacher.path))
    return student.ending_at(config.rollout.stop_token_ids), teacher


def read_prompts(
    config: Config, student: Vocabulary, teacher: Vocabulary | None, most: int = ANY_LENGTH
) -> Prompts:
    """Read prompts as the run does, up to so many tokens; without a teacher, the evaluation's."""
    data, both = config.data, teacher is not None and config.teacher.prompt == "own"
    return load_prompts(
        data.prompts if teacher else config.eval.prompts,
        student.tokenizer,
        replace(data, max_prompt_tokens=most),
        None if teacher else data.answer_column,
        data.limit if teacher else config.eval.limit,
        teacher.tokenizer if both else None,
    )
