"""What both models read: their vocabularies, the map between them, and the prompts of a run."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

from megatron_taopd.config.schema import Config, TeacherSection
from megatron_taopd.data.context import TeacherContext
from megatron_taopd.data.prompts import Prompts, TeacherReader, open_prompts, tokenised
from megatron_taopd.data.vocab_map import VocabMap, Vocabulary
from megatron_taopd.parallel.objects import gather, once_per_node


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

    def remarks(self, config: Config) -> Iterator[str]:
        """Tell what became of the training prompts' rows."""
        prompts, teacher = self.prompts, config.teacher
        if prompts.duplicates:
            rest = "answer" if teacher.context_column is None else "answer and context"
            yield f"{prompts.duplicates} prompts dropped: they repeat another with its {rest}"
        if prompts.dropped:
            limits = "data.max_prompt_tokens"
            if teacher.max_prompt_tokens is not None:
                limits += " or teacher.max_prompt_tokens"
            yield f"{prompts.dropped} prompts dropped: over {limits}"
        if prompts.references is not None:
            longest = config.rollout.max_new_tokens
            over = int((prompts.references.lengths() > longest).sum())
            cut = f"; {over} of them are cut at rollout.max_new_tokens {longest}" if over else ""
            yield f"{len(prompts)} reference responses in {config.data.response_column!r}{cut}"
        if teacher.context_column is not None:
            cut = f"; {prompts.cut} of these are cut" if prompts.cut else ""
            yield (
                f"{prompts.contexts} of {len(prompts)} prompts have a {teacher.context_column!r} "
                f"for the teacher{cut}"
            )


def open_texts(config: Config) -> Texts:
    """Read tokenizers and prompts, which one rank of each node tokenises and the others map.

    Raises:
        ValueError: see `load_prompts` and `VocabMap.between`; on every rank. The nodes do not read
            the same prompts.

    Collectives: those of `once_per_node`, and a gather of some bytes.
    """
    student = Vocabulary.from_pretrained(config.student.path)
    teacher = Vocabulary.from_pretrained(config.teacher.path)
    vocab_map = VocabMap.between(student.ending_at(config.rollout.stop_token_ids), teacher)

    def work() -> tuple[Path, Path | None]:
        held_out = None if config.eval.prompts is None else _held_out(config, student)
        return _training(config, student, teacher), held_out

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
        teacher,
        vocab_map,
        open_prompts(training),
        None if held_out is None else open_prompts(held_out),
    )


def vocabularies(config: Config) -> tuple[Vocabulary, Vocabulary]:
    """Read the student's vocabulary, ending also at `rollout.stop_token_ids`, and the teacher's."""
    student, teacher = map(Vocabulary.from_pretrained, (config.student.path, config.teacher.path))
    return student.ending_at(config.rollout.stop_token_ids), teacher


def training_prompts(config: Config, student: Vocabulary, teacher: Vocabulary) -> Prompts:
    """Read `data.prompts`, for the teacher too if it reads its own. Raises as `load_prompts`."""
    return open_prompts(_training(config, student, teacher))


def held_out_prompts(config: Config, student: Vocabulary) -> Prompts:
    """Read `eval.prompts`, which is given, with answers. Raises as `load_prompts`."""
    return open_prompts(_held_out(config, student))


def _training(config: Config, student: Vocabulary, teacher: Vocabulary) -> Path:
    reader, data = teacher_reader(config.teacher, teacher), config.data
    end = None
    if data.response_column is not None:
        end = student.ending_at(config.rollout.stop_token_ids).roles().get("end of turn")
        if end is None:
            raise ValueError(
                f"data.response_column: {data.response_column!r}: no special token ends a response "
                "of the student, so that a reference response would have no end; name one in "
                "rollout.stop_token_ids"
            )
    return tokenised(data.prompts, student.tokenizer, data, teacher=reader, end=end)


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
    return tokenised(section.prompts, student.tokenizer, data, data.answer_column)
