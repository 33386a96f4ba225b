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
    prompts = training_prompts(config, student, teacher)
    held_out = None if config.eval.prompts is None else held_out_prompts(config, student)
    return Texts(student, teacher, vocab_map, prompts, held_out)


def vocabularies(config: Config) -> tuple[Vocabulary, Vocabulary]:
    """Read the student's vocabulary, ending also at `rollout.stop_token_ids`, and the teacher's."""
    student, teacher = map(Vocabulary.from_pretrained, (config.student.path, config.teacher.path))
    return student.ending_at(config.rollout.stop_token_ids), teacher


def training_prompts(config: Config, student: Vocabulary, teacher: Vocabulary) -> Prompts:
    """Read `data.prompts`, for the teacher too if it reads its own. Raises as `load_prompts`."""
    data = config.data
    own = teacher.tokenizer if config.teacher.prompt == "own" else None
    return load_prompts(data.prompts, student.tokenizer, data, None, data.limit, own)


def held_out_prompts(config: Config, student: Vocabulary) -> Prompts:
    """Read `eval.prompts`, which is given, with answers. Raises as `load_prompts`."""
    data, section = config.data, config.eval
    assert section.prompts is not None
    return load_prompts(section.prompts, student.tokenizer, data, data.answer_column, section.limit)
