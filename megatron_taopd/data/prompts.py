"""Prompts: jsonl or parquet → chat template or plain text → token ids, in a resumable order."""

from __future__ import annotations

import gzip
import json
import zlib
from codecs import BOM_UTF8
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from decimal import Decimal
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from megatron_taopd.config.schema import DataSection
from megatron_taopd.data.rendering import Message, Renderer
from megatron_taopd.parallel import progress, watchdog


@dataclass(frozen=True)
class Prompts:
    """The prompts of one file that fit, tokenised once.

    Attributes:
        token_ids: the ids of each prompt, up to and including the generation prompt.
        texts: what the user asks, for people (the last message's text).
        answers: the reference answer of each prompt; None where no answer column was asked for.
        dropped: how many prompts of the file were longer than `max_prompt_tokens`.
        teacher_token_ids: the same prompts as the teacher reads them; None if those are the same
            ids.
        messages: what each prompt says, its system message included; what `render` takes.
    """

    token_ids: list[list[int]]
    texts: list[str]
    answers: list[str | None]
    dropped: int
    teacher_token_ids: list[list[int]] | None = None
    messages: list[list[Message]] = field(default_factory=list)

    def __len__(self) -> int:
        return len(self.token_ids)


def load_prompts(
    path: str | Path,
    tokenizer,
    data: DataSection,
    answer_column: str | None = None,
    limit: int | None = None,
    teacher_tokenizer=None,
) -> Prompts:
    """Read prompts from a .jsonl, .json (lines) or .parquet file; the first two also as .gz.

    A prompt is a string or a list of chat messages ({role, content}); a content may be a list of
    text parts. Dotted column names reach into nested records (DAPO-Math-17k: `prompt`,
    `reward_model.ground_truth`; GSM8K: `question`, `answer`). Every message arrives whole, as plain
    text, once (`Renderer`).

    Args:
        tokenizer: a transformers tokenizer.
        data: says where a prompt stands in a record and how it is rendered. Prompts over its
            `max_prompt_tokens` are dropped; with a teacher's tokenizer, those that are for either.
        answer_column: of the reference answers, text or numbers; None reads none.
        limit: stop after this many prompts that fit.
        teacher_tokenizer: renders the same messages, with its own chat template, for a teacher.

    Raises:
        ValueError: in one line, with file, line and column: the file is missing, unreadable or of
            an unknown type; a column is missing; a prompt is neither text nor messages, or one
            that `Renderer` refuses; an answer is missing or blank; no prompt is left.
    """
    renderers = [
        Renderer(t, data.template) for t in (tokenizer, teacher_tokenizer) if t is not None
    ]

    prompts, texts, answers, said, dropped = [], [], [], [], 0
    records = _read(Path(path), data.prompt_column, answer_column, data.system)
    for where, messages, answer in progress.track(records, limit, f"tokenising {path}"):
        with _told(where):
            renderings = [render(messages) for render in renderers]
        if max(map(len, renderings)) > data.max_prompt_tokens:
            dropped += 1
            continue
        prompts.append(renderings)
        texts.append(messages[-1]["content"])
        answers.append(answer)
        said.append(messages)
        if len(prompts) == limit:
            break
    if not prompts:
        raise ValueError(
            f"{path}: no prompt is left: {dropped} have more than "
            f"max_prompt_tokens = {data.max_prompt_tokens} tokens"
        )
    ours, *others = map(list, zip(*prompts, strict=True))
    theirs = next((other for other in others if other != ours), None)
    return Prompts(ours, texts, answers, dropped, theirs, said)


def render(conversations: Iterable[Sequence[Message]], tokenizer, template: str) -> list[list[int]]:
    """Return the token ids of prompts (`Prompts.messages`) in another tokenizer and chat template.

    Raises:
        ValueError: there is no chat template where `template` asks for one; it does not fit one of
            the prompts.
    """
    renderer, rendered = Renderer(tokenizer, template), []
    shown = progress.track(conversations, None, "tokenising prompts")
    for number, messages in enumerate(shown, 1):
        with _told(f"prompt {number}"):
            rendered.append(renderer(messages))
    return rendered


def check_prompts(
    path: str | Path,
    tokenizers: Iterable,
    prompt_column: str,
    answer_column: str | None,
    template: str,
    system: str | None,
    limit: int | None,
) -> None:
    """Refuse what `load_prompts` would, as far as it can be told without tokenising.

    That is columns, answers, roles and who speaks last.

    Args:
        tokenizers: of all models that read the prompts.
        limit: records that are looked at.

    Raises:
        ValueError: as `load_prompts`.
    """
    renderers = [Renderer(tokenizer, template) for tokenizer in tokenizers]
    records = _read(Path(path), prompt_column, answer_column, system)
    for where, messages, _ in islice(records, limit):
        with _told(where):
            for renderer in renderers:
                renderer.check(messages)


def _read(
    path: Path, prompt_column: str, answer_column: str | None, system: str | None
) -> Iterator[tuple[str, list[Message], str | None]]:
    """Yield (where the prompt stands, its messages, the answer if one is asked for)."""
    for where, record in read_records(path):
        messages = _as_messages(_column(record, prompt_column, where), prompt_column, where)
        answer = None
        if answer_column is not None:
            answer = as_answer(_column(record, answer_column, where), answer_column, where)
        where = f"{where}: column {prompt_column!r}"
        if system is not None and messages[0]["role"] != "system":
            messages = [{"role": "system", "content": system}, *messages]
            where += " (after data.system)"
        yield where, messages, answer


@contextmanager
def _told(where: str) -> Iterator[None]:
    """Say in errors where the prompt stands."""
    try:
        yield
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from None


def read_texts(
    path: str | Path, prompt_column: str, answer_column: str, limit: int
) -> Iterator[str]:
    """Yield what the messages of the first `limit` records say, and the answers that there are."""
    for where, record in islice(read_records(Path(path)), limit):
        prompt = _column(record, prompt_column, where)
        yield from (message["content"] for message in _as_messages(prompt, prompt_column, where))
        with suppress(ValueError):
            yield as_answer(_column(record, answer_column, where), answer_column, where)


def read_records(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield (where it stands, record), one at a time; each of them is a sign of life.

    Raises:
        ValueError: the file is missing, damaged or of an unknown type; a line is no JSON object.
    """
    if not path.is_file():
        raise ValueError(f"{path}: no such file; prompts are read from .jsonl, .json or .parquet")
    suffix = Path(path.stem).suffix if path.suffix == ".gz" else path.suffix
    if suffix in (".jsonl", ".json"):
        records = _read_lines(path)
    elif path.suffix == ".parquet":
        records = _read_parquet(path)
    else:
        raise ValueError(f"{path}: unknown type; .jsonl, .json (also .gz) and .parquet are read")
    for each in records:
        watchdog.heartbeat()
        yield each


def _read_lines(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    number = 0
    try:
        with (gzip.open if path.suffix == ".gz" else open)(path, "rb") as lines:
            for number, line in enumerate(lines, 1):
                if line.strip():
                    where = f"{path} line {number}"
                    yield where, _parse_line(line.removeprefix(BOM_UTF8), where)
    except (OSError, EOFError, zlib.error) as error:
        raise ValueError(f"{path}: cannot be read after line {number}: {error}") from None


def _read_parquet(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    row = 0
    try:
        for table in pq.ParquetFile(path).iter_batches(batch_size=1024):
            for record in table.to_pylist():
                row += 1
                yield f"{path} row {row}", record
    except (pa.ArrowException, OSError) as error:
        reason = " ".join(str(error).split())
        raise ValueError(f"{path}: cannot be read after row {row}: {reason}") from None


def _parse_line(line: bytes, where: str) -> dict[str, Any]:
    try:
        record = json.loads(line.decode())
    except (ValueError, RecursionError) as error:  # not UTF-8, not JSON, or too deep or long for it
        reason = getattr(error, "msg", None) or getattr(error, "reason", None) or str(error)
        raise ValueError(f"{where}: not JSON ({reason}); each line is a JSON object") from None
    if not isinstance(record, dict):
        raise ValueError(f"{where}: {line.decode()[:40]!r}; each line is a JSON object")
    return record


def _column(record: dict[str, Any], column: str, where: str) -> Any:
    """Return a column by its name or, where no column is called that, by its dotted path."""
    if column in record:
        return record[column]
    value: Any = record
    for name in column.split("."):
        if not isinstance(value, dict) or name not in value:
            raise ValueError(f"{where}: no column {column!r}; columns: {', '.join(sorted(record))}")
        value = value[name]
    return value


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
        _check_unicode(content, column, where)
        messages.append({**given, "content": content})
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


def prompt_order(num_prompts: int, epoch: int, seed: int, shuffle: bool = True) -> np.ndarray:
    """Return the order of an epoch, [num_prompts] int64: a permutation from (seed, epoch) alone."""
    if not shuffle:
        return np.arange(num_prompts)
    return np.random.default_rng([seed, epoch]).permutation(num_prompts)


@dataclass
class PromptStream:
    """An endless stream of prompt indices, epoch after epoch.

    What comes next is a function of (num_prompts, seed, shuffle, consumed) alone: saving the
    integer `consumed` is all that a resume needs. A batch may straddle epochs.
    """

    num_prompts: int
    seed: int = 0
    shuffle: bool = True
    consumed: int = 0

    def take(self, count: int) -> list[int]:
        """Return the next `count` prompt indices."""
        indices: list[int] = []
        while len(indices) < count:
            epoch, start = divmod(self.consumed, self.num_prompts)
            order = prompt_order(self.num_prompts, epoch, self.seed, self.shuffle)
            part = order[start : start + count - len(indices)].tolist()
            indices += part
            self.consumed += len(part)
        return indices
