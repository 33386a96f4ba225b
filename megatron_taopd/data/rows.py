"""A record → a prompt's messages and its reference answer, or one line that says what is wrong."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from decimal import Decimal
from hashlib import blake2b
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

from megatron_taopd.config.schema import DataSection
from megatron_taopd.data.records import read_records
from megatron_taopd.data.references import Reference, as_spans
from megatron_taopd.data.rendering import Message, strings
from megatron_taopd.data.sources import sources_of

_canonical = json.JSONEncoder(sort_keys=True, default=str).encode


class Row(NamedTuple):
    """A prompt as it stands in a file.

    Attributes:
        where: it stands, for errors.
        answer: None if none was asked for.
        context: of the teacher alone; None: the row has none, or none was asked for.
        teacher: the number of its teacher.
        reference: its response; None: the row has none, or none was asked for.
    """

    where: str
    messages: list[Message]
    answer: str | None
    context: str | None = None
    teacher: int = 0
    reference: Reference | None = None


class Rows:
    """The prompts of files, one at a time.

    With `data.deduplicate`, a row is left out whose prompt, answer, if the file has answers,
    context and reference, if they are asked for, and teacher are those of a row before it. What of
    it would be refused was refused there. So is a row whose teacher is not known (`Router`).

    Args:
        router: says which teacher a row is for; None: the only one.
        context_columns: of each teacher by its number; None where it has no context.

    Attributes:
        read: rows so far.
        unanswered: where those of them stand that lack a reference which is asked for.
        duplicates: of these, those that were left out.

    Raises:
        ValueError: while it is read; a column is missing, a prompt is neither text nor messages, or
            an answer is asked for and is neither text nor a number. As `read_records`.
    """

    def __init__(
        self,
        files: Sequence[Path],
        data: DataSection,
        answer_column: str | None,
        router: Router | None = None,
        context_columns: Sequence[str | None] = (None,),
    ):
        self.files, self.data, self.router = files, data, router
        self.answer_column, self.context_columns = answer_column, context_columns
        self.read = self.duplicates = 0
        self.unanswered = list[str]()

    def __iter__(self) -> Iterator[Row]:
        data, seen = self.data, set()
        for path in self.files:
            for where, record in read_records(path):
                self.read += 1
                prompt = _column(record, data.prompt_column, where)
                teacher = 0
                if self.router is not None:
                    teacher = self.router.of(record)
                    if teacher < 0 and self.router.required:
                        continue  # `Router.check` tells of it
                column = self.context_columns[teacher]
                if data.deduplicate:
                    answer = _value(record, data.answer_column)
                    row = [prompt, answer, teacher]
                    for each in (column, data.response_column):
                        if each is not None:
                            row.append(_value(record, each))
                    said = blake2b(_canonical(row).encode(), digest_size=16).digest()
                    if said in seen:
                        self.duplicates += 1
                        continue
                    seen.add(said)
                yield self._row(where, prompt, record)._replace(
                    context=_context(record, column, where), teacher=teacher
                )

    def _row(self, where: str, prompt: Any, record: dict[str, Any]) -> Row:
        column, system, answer = self.data.prompt_column, self.data.system, None
        messages = _as_messages(prompt, column, where)
        if (answers := self.answer_column) is not None:
            answer = as_answer(_column(record, answers, where), answers, where)
        reference = self._reference(record, messages, where)
        where = f"{where}: column {column!r}"
        if system is not None and messages[0]["role"] != "system":
            messages = [{"role": "system", "content": system}, *messages]
            where += " (after data.system)"
        return Row(where, messages, answer, reference=reference)

    def _reference(
        self, record: dict[str, Any], messages: list[Message], where: str
    ) -> Reference | None:
        """Return a row's reference; taken off the messages of its prompt if it is their last one.

        Without one the row is noted.
        """
        if (column := self.data.response_column) is None:
            return None
        value, in_prompt = _column(record, column, where), column == self.data.prompt_column
        if in_prompt or isinstance(value, list):
            said = _as_messages(value, column, where)
            value = said[-1]["content"] if said[-1]["role"] == "assistant" else None
            if in_prompt and value is not None and len(messages) > 1:
                messages.pop()
        if value is None or (isinstance(value, str) and not value.strip()):
            self.unanswered.append(where)
            return None
        if not isinstance(value, str):
            raise ValueError(
                f"{where}: column {column!r} is {json.dumps(value, default=str)[:40]}; a reference "
                "response is text, or messages whose last one is the assistant's"
            )
        _check_unicode(value, column, where)
        if (spans := self.data.excluded_column) is None:
            return Reference(value)
        try:
            return Reference(value, as_spans(_column(record, spans, where), value))
        except ValueError as error:
            raise ValueError(f"{where}: column {spans!r} is {error}") from None


class Router:
    """Says which teacher each row is for, and counts those of which it cannot.

    Args:
        names: of the teachers, by number.
        column: with the name of a row's teacher; None: there is none.
        required: every row has to be for one of them, and each of them has to have rows.

    Attributes:
        default: the teacher of rows that do not name one; None: they have none.
        unknown: rows that name a teacher that there is not, by that name.
        without: rows without a teacher.
    """

    def __init__(self, names: Sequence[str], column: str | None, required: bool):
        self.names, self.column, self.required = names, column, required
        self.default: str | None = None
        self.unknown, self.without = Counter[str](), 0

    def of(self, record: dict[str, Any]) -> int:
        """Return the number of a row's teacher; −1 where it is not known."""
        name = None if self.column is None else _value(record, self.column)
        if name is None or (isinstance(name, str) and not name.strip()):
            name = self.default
        if name in self.names:
            return self.names.index(name)
        if name is None:
            self.without += 1
        else:
            self.unknown[str(name)] += 1
        return -1

    def check(self, prompts: Mapping[int, int]) -> None:
        """Refuse rows whose teacher is not known, and teachers without prompts.

        Args:
            prompts: how many each teacher has, by its number.

        Raises:
            ValueError: one line with the numbers of such rows.
        """
        if not self.required:
            return
        wrong = []
        if self.without:
            wrong.append(
                f"{self.without} rows have no teacher: name data.teacher_column, or a teacher for "
                "each file"
            )
        if self.unknown:
            counted = self.unknown.most_common(4)
            each = ", ".join(f"{count} rows name {name!r}" for name, count in counted)
            wrong.append(f"{each}, and teachers has {', '.join(self.names)}")
        for number, name in enumerate(self.names):
            if not prompts.get(number):
                wrong.append(f"0 prompts that fit are for teachers.{name}: take it out")
        if wrong:
            raise ValueError(f"data.prompts: {'; '.join(wrong)}")


def _context(record: dict[str, Any], column: str | None, where: str) -> str | None:
    if column is None:
        return None
    context = _column(record, column, where)
    if context is None or (isinstance(context, str) and not context.strip()):
        return None
    if not isinstance(context, str):
        raise ValueError(
            f"{where}: column {column!r} is {json.dumps(context, default=str)[:40]}; a "
            "context is text, or null where there is none"
        )
    _check_unicode(context, column, where)
    return context


def read_texts(prompts: Any, prompt_column: str, answer_column: str, limit: int) -> Iterator[str]:
    """Yield what the messages of the first `limit` records say, and the answers that there are.

    Args:
        prompts: the value of `data.prompts`.
    """
    files = [file for source in sources_of(prompts) for file in source.files()]
    for where, record in islice((r for file in files for r in read_records(file)), limit):
        prompt = _column(record, prompt_column, where)
        yield from (message["content"] for message in _as_messages(prompt, prompt_column, where))
        with suppress(ValueError):
            yield as_answer(_column(record, answer_column, where), answer_column, where)


def _value(record: dict[str, Any], column: str) -> Any:
    """Return a column by its name or, where no column is called that, by its dotted path; or None
    if there is none.
    """
    if column in record:
        return record[column]
    value: Any = record
    for name in column.split("."):
        if not isinstance(value, dict) or name not in value:
            return None
        value = value[name]
    return value


def _column(record: dict[str, Any], column: str, where: str) -> Any:
    """Return the value of a column that has to be there, though it may be null."""
    value = _value(record, column)
    if value is None and not _has(record, column):
        names = ", ".join(sorted(record)).encode(errors="backslashreplace").decode()
        raise ValueError(f"{where}: no column {column!r}; columns: {names}")
    return value


def _has(record: dict[str, Any], column: str) -> bool:
    if column in record:
        return True
    path, _, name = column.rpartition(".")
    outer = _value(record, path) if path else None
    return isinstance(outer, dict) and name in outer


def _as_messages(prompt: Any, column: str, where: str) -> list[Message]:
    """Return a prompt's messages; keys without a value, which parquet fills in, are left out."""
    if isinstance(prompt, str) and prompt:
        prompt = [{"role": "user", "content": prompt}]
    if not isinstance(prompt, list) or not prompt:
        raise _no_prompt(prompt, column, where)
    messages = []
    for message in prompt:
        given = _without_nulls(message)
        content = given.get("content", "" if given.get("tool_calls") else None)
        if isinstance(content, list) and all(map(_is_text_part, content)):
            content = "".join(part["text"] for part in content)
        if not (isinstance(given.get("role"), str) and isinstance(content, str)):
            raise _no_prompt(prompt, column, where)
        given["content"] = content
        for text in strings(given):
            _check_unicode(text, column, where)
        messages.append(given)
    return messages


def _without_nulls(message: Any) -> Message:
    items = message.items() if isinstance(message, dict) else ()
    return {key: value for key, value in items if value is not None}


def _no_prompt(prompt: Any, column: str, where: str) -> ValueError:
    return ValueError(
        f"{where}: column {column!r} is {str(prompt)[:40]!r}; "
        "text or a list of messages {role, content} is needed"
    )


def _is_text_part(part: Any) -> bool:
    return (
        isinstance(part, dict) and part.get("type") == "text" and isinstance(part.get("text"), str)
    )


def as_answer(answer: Any, column: str, where: str) -> str:
    """Return the reference answer as text; numbers as they are written without an exponent.

    Raises:
        ValueError: it is neither text that is not blank nor a finite number.
    """
    if isinstance(answer, str) and answer.strip():
        _check_unicode(answer, column, where)
        return answer
    if isinstance(answer, int | float | Decimal) and not isinstance(answer, bool):
        number = Decimal(str(answer))
        if number.is_finite():
            return f"{number:f}"
    raise ValueError(
        f"{where}: column {column!r} is {json.dumps(answer, default=str)[:40]}; "
        "a reference answer is text that is not blank, or a number"
    )


def _check_unicode(text: str, column: str, where: str) -> None:
    """Refuse half a surrogate pair, which JSON can spell and no tokenizer or file takes."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ValueError(
            f"{where}: column {column!r} has {error.object[error.start]!r}, half a surrogate pair, "
            "which is no text"
        ) from None
