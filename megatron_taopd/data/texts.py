"""What all models read: their vocabularies, the map between them, and the prompts of a run."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from megatron_taopd.config.schema import Config, TeacherSection, teacher_name
from megatron_taopd.data.context import TeacherContext
from megatron_taopd.data.prompts import Prompts, TeacherReader, open_prompts, tokenised
from megatron_taopd.data.vocab_map import VocabMap, Vocabulary
from megatron_taopd.parallel.objects import gather, once_per_node


@dataclass(frozen=True)
class Texts:
    """The texts of a run, in the ids of all models.

    Attributes:
        vocab_maps: from the student's ids to those of each teacher, by its name.
        prompts: of training.
        held_out: of the evaluation, with answers; None without `eval.prompts`.
    """

    student: Vocabulary
    vocab_maps: dict[str, VocabMap]
    prompts: Prompts
    held_out: Prompts | None

    @property
    def common_vocabulary(self) -> int:
        """The student's ids from here on are never drawn: a teacher, and no text, has them."""
        return min(vocab_map.size for vocab_map in self.vocab_maps.values())

    @property
    def teachers(self) -> Tensor | None:
        """[P] int64, the number of each training prompt's teacher; None: there is one."""
        return None if self.prompts.teachers is None else torch.tensor(self.prompts.teachers[:])

    def remarks(self, config: Config) -> Iterator[str]:
        """Tell what became of the training prompts' rows."""
        prompts, teachers = self.prompts, config.each_teacher
        columns = {t.context_column for t in teachers.values() if t.context_column is not None}
        if prompts.duplicates:
            rest = "answer and context" if columns else "answer"
            yield f"{prompts.duplicates} prompts dropped: they repeat another with its {rest}"
        if prompts.dropped:
            limits = dict.fromkeys(config.prompt_limit(model)[0] for model in config.models)
            yield f"{prompts.dropped} prompts dropped: over {' or '.join(limits)}"
        if prompts.references is not None:
            longest = config.rollout.max_new_tokens
            over = int((prompts.references.lengths() > longest).sum())
            cut = f"; {over} of them are cut at rollout.max_new_tokens {longest}" if over else ""
            yield f"{len(prompts)} reference responses in {config.data.response_column!r}{cut}"
        if columns:
            cut = f"; {prompts.cut} of these are cut" if prompts.cut else ""
            named = " or ".join(map(repr, sorted(columns)))
            yield (
                f"{prompts.contexts} of {len(prompts)} prompts have a {named} for the teacher{cut}"
            )
        if prompts.teachers is not None:
            counts = Counter(prompts.teachers[:])
            each = (f"{counts[i]} for {teacher_name(key)}" for i, key in enumerate(teachers))
            yield f"{len(prompts)} prompts: {', '.join(each)}"


def open_texts(config: Config) -> Texts:
    """Read tokenizers and prompts, which one rank of each node tokenises and the others map.

    Raises:
        ValueError: see `load_prompts` and `VocabMap.between`; on every rank. The nodes do not read
            the same prompts.

    Collectives: those of `once_per_node`, and a gather of some bytes.
    """
    student, teachers = _read_vocabularies(config)

    def work() -> tuple[Path, Path | None]:
        held_out = None if config.eval.prompts is None else _held_out(config, student)
        return _training(config, student, teachers), held_out

    entries = once_per_node(work)
    # The name of an entry is a digest of all that it is made of.
    names = gather([entry and entry.name for entry in entries])
    if differing := [rank for rank, those in enumerate(names) if those != names[0]]:
        raise ValueError(
            f"data.prompts or eval.prompts: rank {differing[0]} reads others than rank 0; the same "
            "files, tokenizers and versions have to be on every node"
        )
    training, held_out = entries
    return Texts(
        student,
        vocab_maps(config, student, teachers),
        open_prompts(training),
        None if held_out is None else open_prompts(held_out),
    )


def vocabularies(config: Config) -> tuple[Vocabulary, dict[str, Vocabulary]]:
    """Read the student's vocabulary, ending also at `rollout.stop_token_ids`, and the teachers' by
    the key of each.
    """
    student, teachers = _read_vocabularies(config)
    return student.ending_at(config.rollout.stop_token_ids), teachers


def _read_vocabularies(config: Config) -> tuple[Vocabulary, dict[str, Vocabulary]]:
    student, *teachers = (Vocabulary.from_pretrained(each.path) for each in config.models.values())
    return student, dict(zip(config.each_teacher, teachers, strict=True))


def vocab_maps(
    config: Config, student: Vocabulary, teachers: Mapping[str, Vocabulary]
) -> dict[str, VocabMap]:
    """Match the student's ids, which end also at `rollout.stop_token_ids`, with each teacher's.

    Args:
        teachers: by key.

    Returns:
        By the teachers' names. Raises as `VocabMap.between`.
    """
    student = student.ending_at(config.rollout.stop_token_ids)
    return {teacher_name(key): VocabMap.between(student, own) for key, own in teachers.items()}


def training_prompts(
    config: Config, student: Vocabulary, teachers: Mapping[str, Vocabulary]
) -> Prompts:
    """Read `data.prompts`, for each teacher too if it reads its own. Raises as `load_prompts`."""
    return open_prompts(_training(config, student, teachers))


def held_out_prompts(config: Config, student: Vocabulary) -> Prompts:
    """Read `eval.prompts`, which is given, with answers. Raises as `load_prompts`."""
    return open_prompts(_held_out(config, student))


def _training(config: Config, student: Vocabulary, teachers: Mapping[str, Vocabulary]) -> Path:
    data, end = config.data, None
    readers = {
        teacher_name(key): teacher_reader(section, teachers[key])
        for key, section in config.each_teacher.items()
    }
    those = readers if config.teachers else readers["teacher"]
    if data.response_column is not None:
        end = student.ending_at(config.rollout.stop_token_ids).roles().get("end of turn")
        if end is None:
            raise ValueError(
                f"data.response_column: {data.response_column!r}: no special token ends a response "
                "of the student, so that a reference response would have no end; name one in "
                "rollout.stop_token_ids"
            )
    return tokenised(data.prompts, student.tokenizer, data, teachers=those, end=end)


def teacher_reader(section: TeacherSection, teacher: Vocabulary) -> TeacherReader | None:
    """Return how a teacher reads prompts; None if it reads what the student does."""
    if section.prompt != "own":
        return None
    context = TeacherContext(
        section.context_column,
        section.context_template,
        section.system,
        cut=section.context_overflow == "cut",
    )
    return TeacherReader(
        teacher.tokenizer, section.template_kwargs, context, section.max_prompt_tokens
    )


def _held_out(config: Config, student: Vocabulary) -> Path:
    section = config.eval
    assert section.prompts is not None
    data = replace(config.data, deduplicate=False, limit=section.limit)
    teachers = None
    if config.teachers and data.teacher_column is not None:
        teachers = dict.fromkeys(config.teachers)
    return tokenised(
        section.prompts, student.tokenizer, data, data.answer_column, teachers, routed=False
    )
