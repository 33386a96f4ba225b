"""What both models read: their vocabularies, the map between them, and the prompts of a run."""

from __future__ import annotations

from dataclasses import dataclass

from megatron_taopd.config.schema import Config
from megatron_taopd.data.prompts import Prompts, load_prompts
from megatron_taopd.data.vocab_map import VocabMap, Vocabulary


@dataclass(frozen=True)
class Texts:
    """The texts of a run, in the ids of both models.

    Attributes:
        vocab_map: from the student's ids to the teacher's.
        prompts: of training.
        held_out: of the evaluation, with answers; None without `eval.prompts`.
    """

    student: Vocabulary
    teacher: Vocabulary
    vocab_map: VocabMap
    prompts: Prompts
    held_out: Prompts | None


def open_texts(config: Config) -> Texts:
    """Read tokenizers and prompts.

    Raises:
        ValueError: see `load_prompts` and `VocabMap.between`.
    """
    student = Vocabulary.from_pretrained(config.student.path)
    teacher = Vocabulary.from_pretrained(config.teacher.path)
    vocab_map = VocabMap.between(student.ending_at(config.rollout.stop_token_ids), teacher)
    prompts = load_prompts(
        config.data.prompts,
        student.tokenizer,
        config.data,
        limit=config.data.limit,
        teacher_tokenizer=teacher.tokenizer if config.teacher.prompt == "own" else None,
    )
    held_out = None
    if config.eval.prompts is not None:
        answers, limit = config.data.answer_column, config.eval.limit
        held_out = load_prompts(config.eval.prompts, student.tokenizer, config.data, answers, limit)
    return Texts(student, teacher, vocab_map, prompts, held_out)
