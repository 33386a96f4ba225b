"""Prompts: files → chat template or plain text → token ids, kept on disk; in a resumable order."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import astuple, dataclass, field, replace
from itertools import islice
from math import lcm
from pathlib import Path
from typing import Any, NamedTuple

import jinja2
import numpy as np
import tokenizers
import transformers

from megatron_taopd.config.schema import DataSection
from megatron_taopd.data import cache
from megatron_taopd.data.context import TeacherContext, longest_that_fits
from megatron_taopd.data.records import content_of
from megatron_taopd.data.references import ReferenceReader
from megatron_taopd.data.rendering import Message, Renderer
from megatron_taopd.data.rows import Router, Row, Rows
from megatron_taopd.data.sources import Source, sources_of
from megatron_taopd.parallel import progress

BATCH = 1024  # prompts that are tokenised at a time


@dataclass(frozen=True)
class Prompts:
    """The prompts of one or more files that fit, tokenised once.

    Attributes:
        token_ids: the ids of each prompt, up to and including the generation prompt.
        texts: what the user asks, for people (the last message's text).
        answers: the reference answer of each prompt; None where no answer column was asked for.
        dropped: how many prompts of the files were longer than `max_prompt_tokens`.
        teacher_token_ids: the same prompts as the teacher reads them; None if those are the same
            ids.
        messages: what each prompt says, its system message included; what `render` takes.
        duplicates: how many rows were left out since they repeat another one.
        contexts: how many of the prompts have a context for the teacher.
        cut: how many of these contexts have lost their end.
        parts: of files with weights, in their order: (how many of the prompts are its own, weight).
        references: the ids of each prompt's reference response, its end included; None where no
            column has them.
        valid: which of these tokens are valid; None where all are.
        teachers: the number of each prompt's teacher, −1 where none is known (of held-out prompts
            only); None: there is one teacher.
    """

    token_ids: Sequence[list[int]]
    texts: Sequence[str]
    answers: Sequence[str | None]
    dropped: int
    teacher_token_ids: Sequence[list[int]] | None = None
    messages: Sequence[list[Message]] = field(default_factory=list)
    duplicates: int = 0
    contexts: int = 0
    cut: int = 0
    parts: tuple[tuple[int, int], ...] = ()
    references: cache.Ragged[list[int]] | None = None
    valid: cache.Ragged[list[bool]] | None = None
    teachers: Sequence[int] | None = None

    def __len__(self) -> int:
        return len(self.token_ids)

    def of_teacher(self, number: int) -> Prompts:
        """Return the prompts that are for this teacher; counts stay those of the files."""
        if self.teachers is None:
            return self
        own = [place for place, teacher in enumerate(self.teachers) if teacher == number]

        def chosen(column: Sequence) -> list:
            return [column[place] for place in own]

        return replace(
            self,
            token_ids=chosen(self.token_ids),
            texts=chosen(self.texts),
            answers=chosen(self.answers),
            teacher_token_ids=self.teacher_token_ids and chosen(self.teacher_token_ids),
            messages=chosen(self.messages),
        )


class TeacherReader(NamedTuple):
    """A teacher that reads the same messages by its own tokenizer and chat template.

    Attributes:
        template_kwargs: of its chat template; None: `data.template_kwargs`.
        context: that it reads besides, and its system message.
        max_prompt_tokens: longer prompts are dropped; None: `data.max_prompt_tokens`.
    """

    tokenizer: Any
    template_kwargs: Mapping[str, Any] | None = None
    context: TeacherContext = TeacherContext()
    max_prompt_tokens: int | None = None


def load_prompts(
    prompts: Any,
    tokenizer,
    data: DataSection,
    answer_column: str | None = None,
    teachers: TeacherReader | Mapping[str, TeacherReader | None] | None = None,
) -> Prompts:
    """Return prompts in token ids, from the cache if they are there.

    A prompt is a string or a list of chat messages ({role, content}); a content may be a list of
    text parts. Dotted column names reach into nested records (DAPO-Math-17k: `prompt`,
    `reward_model.ground_truth`; GSM8K: `question`, `answer`). Every message arrives whole, as plain
    text, once (`Renderer`).

    Args:
        prompts: the value of `data.prompts`: a path, or a list (`sources_of`).
        tokenizer: a transformers tokenizer.
        data: says where a prompt stands in a record and how it is rendered. Prompts over its
            `max_prompt_tokens` are dropped; with a teacher, those that are for either. Reading ends
            after `limit` prompts that fit, of each of the files that have weights.
        answer_column: of the reference answers, text or numbers; None reads none.
        teachers: how the teacher reads, None if it reads what the student does; of several, by
            name, that of each. Then `data.teacher_column` and the prompts' own `teacher` say which
            one a prompt is for.

    Raises:
        ValueError: in one line, with file, line and column: the file is missing, unreadable or of
            an unknown type; a column is missing; a prompt is neither text nor messages, or one
            that `Renderer` refuses; an answer is missing or blank; no prompt is left; as
            `Router.check`. Or the cache cannot be written.
    """
    return open_prompts(tokenised(prompts, tokenizer, data, answer_column, teachers))


def tokenised(
    prompts: Any,
    tokenizer,
    data: DataSection,
    answer_column: str | None = None,
    teachers: TeacherReader | Mapping[str, TeacherReader | None] | None = None,
    routed: bool = True,
    end: int | None = None,
) -> Path:
    """Return the cache entry of prompts, which is made if need be; see `load_prompts`.

    Args:
        routed: every prompt has to be for one of several teachers.
        end: the id that ends a reference response; None: `data.response_column` is not read.

    Raises:
        ValueError: also where a prompt has no reference response and `end` is given; how many have
            none, and the first of them.
    """
    if end is None:
        data = replace(data, response_column=None)
    student = Renderer(tokenizer, data.template, data.template_kwargs)
    named = isinstance(teachers, Mapping)
    readers = teachers if isinstance(teachers, Mapping) else {"": teachers}
    readings = [
        _reading(f"teachers.{name}" if named else "teacher", reader, data, student)
        for name, reader in readers.items()
    ]
    sources = sources_of(prompts)
    files = [source.files() for source in sources]
    stats = _stats(files)
    routing = [*readers, [source.teacher for source in sources], data.teacher_column, routed]
    key = cache.digest(
        {
            "files": [content_of(each) for each in files],
            "types": [[path.suffix for path in each] for each in files],
            "weights": [str(source.weight) for source in sources],
            "renderers": [student.fingerprint()]
            + [reading.renderer and reading.renderer.fingerprint() for reading in readings],
            "columns": [data.prompt_column, data.answer_column, answer_column],
            "references": [data.response_column, data.excluded_column, end],
            "context": [astuple(reading.context) for reading in readings],
            "teachers": routing if named else None,
            "deduplicate": data.deduplicate,
            "system": data.system,
            "max_prompt_tokens": [data.max_prompt_tokens, *(each.limit for each in readings)],
            "limit": data.limit,
            "versions": [m.__version__ for m in (transformers, tokenizers, jinja2)],
        }
    )
    entry = cache.place(data.cache_dir) / key
    if cache.about(entry) is None:
        with cache.written(entry) as (aside, about):
            router = Router([*readers], data.teacher_column, routed) if named else None
            references = None if end is None else ReferenceReader(tokenizer, end)
            writer = _Writer(aside, student, readings, data, answer_column, router, references)
            for source, own in zip(sources, files, strict=True):
                writer.add(source, own)
            about |= writer.close([source.weight for source in sources])
            if _stats(files) != stats:
                raise ValueError(f"{prompts}: changed while it was read; try again")
    return entry


class _Reading(NamedTuple):
    """How a teacher reads prompts.

    Attributes:
        key: of its section.
        renderer: None: it reads what the student does.
        limit: tokens of its longest prompt.
    """

    key: str
    renderer: Renderer | None
    context: TeacherContext
    limit: int


def _reading(
    key: str, reader: TeacherReader | None, data: DataSection, student: Renderer
) -> _Reading:
    """Say how a teacher reads, whose renderer is left out if the student's gives the same."""
    if reader is None:
        return _Reading(key, None, TeacherContext(), data.max_prompt_tokens)
    reader.context.check()
    kwargs = data.template_kwargs if reader.template_kwargs is None else reader.template_kwargs
    renderer = Renderer(reader.tokenizer, data.template, kwargs, f"{key}.template_kwargs")
    limit = reader.max_prompt_tokens or data.max_prompt_tokens
    told_alike = reader.context.column is None and reader.context.system is None
    alike = told_alike and renderer.fingerprint() == student.fingerprint()
    return _Reading(key, None if alike else renderer, reader.context, limit)


def _stats(files: Sequence[Sequence[Path]]) -> list[tuple[int, int]]:
    found = [path.stat() for each in files for path in each]
    return [(stat.st_size, stat.st_mtime_ns) for stat in found]


class _Writer:
    """Writes the columns of an entry.

    Args:
        student: how the student reads.
        readings: how each teacher does, by its number.
        router: says which teacher a prompt is for; None: there is one.
        reader: of reference responses; None: none are asked for.
    """

    def __init__(
        self,
        directory: Path,
        student: Renderer,
        readings: Sequence[_Reading],
        data: DataSection,
        answer_column: str | None,
        router: Router | None,
        reader: ReferenceReader | None,
    ):
        self.student, self.readings, self.router = student, readings, router
        self.reader, self.masked = reader, reader is not None and data.excluded_column is not None
        self.data, self.answer_column = data, answer_column
        self.sizes = list[int]()
        self.counts = {"rows": 0, "duplicates": 0, "dropped": 0, "contexts": 0, "cut": 0}
        self.differ = False  # the ids of the two models
        self.of_teacher = Counter[int]()  # prompts
        names = ["ids"]
        if any(reading.renderer for reading in readings):
            names.append("teacher_ids")
        self.ids = [cache.Column(directory, name, "<i4") for name in names]
        self.messages = cache.Column(directory, "messages", "u1")
        self.answers = self.teachers = None
        if answer_column is not None:
            self.answers = cache.Column(directory, "answers", "u1")
        if router is not None:
            self.teachers = cache.Column(directory, "teachers", "<i4")
        self.references = cache.Column(directory, "references", "<i4") if reader else None
        self.valid = cache.Column(directory, "valid", "u1") if self.masked else None

    def add(self, source: Source, files: Sequence[Path]) -> None:
        """Read, tokenise and write the prompts of a source. Raises as `load_prompts`."""
        if self.router is not None:
            self.router.default = source.teacher
        columns = [reading.context.column for reading in self.readings]
        rows = Rows(files, self.data, self.answer_column, self.router, columns)
        name, contexts = ", ".join(source.paths), dict[int, int]()
        each, found, dropped = iter(rows), 0, 0
        with progress.phase(f"tokenising {name}", unit="rows") as shown:
            while batch := [*islice(each, self._room(found))]:
                ours = _rendered(self.student, batch, [row.messages for row in batch])
                fitting = []
                for row, *renderings in zip(batch, ours, self._theirs(batch, ours), strict=True):
                    contexts.setdefault(row.teacher, 0)
                    contexts[row.teacher] += row.context is not None
                    if not self._fit(row, renderings):
                        dropped += 1
                        continue
                    found += 1
                    fitting.append(row)
                    self._write(row, renderings)
                self._write_references(fitting)
                shown.advance(rows.read - shown.done)
        if rows.unanswered:
            raise ValueError(
                f"{rows.unanswered[0]}: column {self.data.response_column!r} "
                f"(data.response_column) has no reference response, and so it is with "
                f"{len(rows.unanswered)} of {rows.read} rows; give each one, or take them out"
            )
        if not rows.read:
            raise ValueError(f"{name}: no prompt is left: it is empty; give a file with records")
        if not found:
            if self.router is not None:
                self.router.check(self.of_teacher)
            limits = [self.data.max_prompt_tokens, *(reading.limit for reading in self.readings)]
            most = " or, for the teacher, ".join(map(str, dict.fromkeys(limits)))
            raise ValueError(
                f"{name}: no prompt is left: {dropped} have more than max_prompt_tokens = {most} "
                "tokens"
            )
        for number, count in contexts.items():
            reading = self.readings[number]
            if reading.context.column is not None and not count:
                raise ValueError(
                    f"{name}: column {reading.context.column!r} ({reading.key}.context_column) is "
                    "null or blank in every row; name another one, or none"
                )
        self.sizes.append(found)
        self.counts["rows"] += rows.read
        self.counts["duplicates"] += rows.duplicates
        self.counts["dropped"] += dropped

    def _theirs(self, batch: Sequence[Row], ours: Sequence[list[int]]) -> list[list[int]]:
        """Return each row's ids as its teacher reads it; an error names the first refused row."""
        theirs = [*ours]
        for number, reading in enumerate(self.readings):
            places = [place for place, row in enumerate(batch) if row.teacher == number]
            if reading.renderer is None or not places:
                continue
            rows, told = [batch[place] for place in places], []
            for row in rows:
                with _told(row.where):
                    told.append(reading.context.messages(row.messages, row.context))
            for place, ids in zip(places, _rendered(reading.renderer, rows, told), strict=True):
                theirs[place] = ids
        return theirs

    def _fit(self, row: Row, renderings: list[list[int]]) -> bool:
        """Tell whether a prompt is short enough, once its context is cut, if that is to be."""
        reading = self.readings[row.teacher]
        context, limit, renderer = reading.context, reading.limit, reading.renderer
        if len(renderings[0]) > self.data.max_prompt_tokens:
            return False
        if len(renderings[1]) > limit:
            if row.context is None or renderer is None or not context.cut:
                return False

            def teachers(beginning: str) -> list[int]:
                return renderer(context.messages(row.messages, beginning))

            kept = longest_that_fits(
                row.context, lambda beginning: len(teachers(beginning)) <= limit
            )
            if not kept:
                return False
            renderings[1] = teachers(kept)
            self.counts["cut"] += 1
        self.counts["contexts"] += row.context is not None
        return True

    def _room(self, found: int) -> int:
        """How many rows to take at a time: nothing is read behind the limit."""
        return BATCH if self.data.limit is None else min(BATCH, self.data.limit - found)

    def _write(self, row: Row, renderings: Sequence[list[int]]) -> None:
        for column, ids in zip(self.ids, renderings, strict=False):
            column.append(ids)
        self.differ |= renderings[1] != renderings[0]
        self.of_teacher[row.teacher] += 1
        if self.teachers is not None:
            self.teachers.append([row.teacher])
        self.messages.append(json.dumps(row.messages, ensure_ascii=False, default=str).encode())
        if self.answers is not None and row.answer is not None:
            self.answers.append(row.answer.encode())

    def _write_references(self, rows: Sequence[Row]) -> None:
        references = [row.reference for row in rows if row.reference is not None]
        if self.reader is None or self.references is None or not references:
            return
        for ids, valid in self.reader(references):
            self.references.append(ids)
            if self.valid is not None:
                self.valid.append(bytes(valid))

    def close(self, weights: Sequence[Any]) -> dict[str, Any]:
        """Return what is to be known of the entry. Raises ValueError as `Router.check`."""
        if self.router is not None:
            self.router.check(self.of_teacher)
        columns = self.messages, self.answers, self.teachers, self.references, self.valid
        for column in (*self.ids, *columns):
            if column is not None:
                column.close()
        parts = []
        if len(weights) > 1:
            whole = lcm(*(weight.denominator for weight in weights))
            parts = [*zip(self.sizes, (int(w * whole) for w in weights), strict=True)]
        return {
            **self.counts,
            "parts": parts,
            "teacher": self.differ,
            "answers": self.answers is not None,
            "routed": self.teachers is not None,
            "references": self.references is not None,
            "valid": self.valid is not None,
        }


def _rendered(
    renderer: Renderer, batch: Sequence[Row], messages: Sequence[Sequence[Message]]
) -> list[list[int]]:
    """Return the token ids of what rows say; an error names the first that is refused."""
    try:
        return renderer.batch(messages)
    except ValueError:
        for row, said in zip(batch, messages, strict=True):
            with _told(row.where):
                renderer(said)
        raise


def open_prompts(entry: Path) -> Prompts:
    """Open a cache entry that `tokenised` has returned."""
    about = cache.about(entry)
    if about is None:
        raise ValueError(
            f"data.cache_dir: {entry} is gone or damaged, which was there just now; start again, "
            "or name a directory that nobody cleans"
        )
    ids = cache.column(entry, "ids", "<i4", np.ndarray.tolist)
    messages = cache.column(entry, "messages", "u1", _json)
    answers: Sequence[str | None] = [None] * len(ids)
    if about["answers"]:
        answers = cache.column(entry, "answers", "u1", _text)
    teacher = teachers = None
    if about["teacher"]:
        teacher = cache.column(entry, "teacher_ids", "<i4", np.ndarray.tolist)
    if about["routed"]:
        teachers = cache.column(entry, "teachers", "<i4", np.ndarray.item)
    references = valid = None
    if about["references"]:
        references = cache.column(entry, "references", "<i4", np.ndarray.tolist)
    if about["valid"]:
        valid = cache.column(entry, "valid", "u1", _flags)
    return Prompts(
        token_ids=ids,
        texts=cache.Ragged(messages.values, messages.offsets, _last_text),
        answers=answers,
        dropped=about["dropped"],
        teacher_token_ids=teacher,
        messages=messages,
        duplicates=about["duplicates"],
        contexts=about["contexts"],
        cut=about["cut"],
        parts=tuple((size, weight) for size, weight in about["parts"]),
        references=references,
        valid=valid,
        teachers=teachers,
    )


def _flags(values: np.ndarray) -> list[bool]:
    return values.astype(bool).tolist()


def _text(values: np.ndarray) -> str:
    return values.tobytes().decode()


def _json(values: np.ndarray) -> Any:
    return json.loads(values.tobytes())


def _last_text(values: np.ndarray) -> str:
    return _json(values)[-1]["content"]


def render(
    conversations: Iterable[Sequence[Message]],
    tokenizer,
    template: str,
    kwargs: Mapping[str, Any] | None = None,
) -> list[list[int]]:
    """Return the token ids of prompts (`Prompts.messages`) in another tokenizer and chat template.

    Raises:
        ValueError: there is no chat template where `template` asks for one; it does not fit one of
            the prompts.
    """
    renderer, rendered = Renderer(tokenizer, template, kwargs), []
    shown = progress.track(conversations, None, "tokenising prompts")
    for number, messages in enumerate(shown, 1):
        with _told(f"prompt {number}"):
            rendered.append(renderer(messages))
    return rendered


@contextmanager
def _told(where: str) -> Iterator[None]:
    """Say in errors where the prompt stands."""
    try:
        yield
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from None


def prompt_order(
    num_prompts: int, epoch: int, seed: int, shuffle: bool = True, part: int = 0
) -> np.ndarray:
    """Return the order of an epoch, [num_prompts] int64.

    It is a permutation from (seed, epoch) alone, and from the number of the file if it has a
    weight.
    """
    if not shuffle:
        return np.arange(num_prompts)
    return np.random.default_rng([seed, epoch, part][: 3 if part else 2]).permutation(num_prompts)


def drawn_from(position: int, weights: Sequence[int]) -> tuple[int, int]:
    """Return which part the prompt at a position of the stream is of, and how many of it came
    before.

    The first part has its share of the positions, evenly spread; the second its share of those that
    are left; and so on. Of each sum(weights) positions from the start, each part has exactly its
    weight; in between it is less than len(weights) off.
    """
    left = sum(weights)
    for part, weight in enumerate(weights):
        before, after = -(-position * weight // left), -(-(position + 1) * weight // left)
        if after > before:
            return part, before
        position, left = position - before, left - weight
    raise AssertionError("the last part takes what is left")


@dataclass
class PromptStream:
    """An endless stream of prompt indices, epoch after epoch.

    What comes next is a function of (num_prompts, seed, shuffle, parts, consumed) alone: saving the
    integer `consumed` is all that a resume needs. A batch may straddle epochs.

    Attributes:
        parts: `Prompts.parts`; each has epochs of its own. Without them all prompts are one part.
    """

    num_prompts: int
    seed: int = 0
    shuffle: bool = True
    consumed: int = 0
    parts: tuple[tuple[int, int], ...] = ()

    def take(self, count: int) -> list[int]:
        """Return the next `count` prompt indices."""
        sizes, weights = zip(*(self.parts or ((self.num_prompts, 1),)), strict=True)
        starts = [sum(sizes[:part]) for part in range(len(sizes))]
        orders: dict[tuple[int, int], np.ndarray] = {}
        indices = []
        for position in range(self.consumed, self.consumed + count):
            part, before = drawn_from(position, weights)
            epoch, place = divmod(before, sizes[part])
            if (part, epoch) not in orders:
                order = prompt_order(sizes[part], epoch, self.seed, self.shuffle, part)
                orders[part, epoch] = order
            indices.append(starts[part] + int(orders[part, epoch][place]))
        self.consumed += count
        return indices
