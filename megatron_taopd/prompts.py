"""Prompts: jsonl or parquet → chat template or plain text → token ids, in a resumable order."""

from __future__ import annotations

import gzip
import json
import re
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

TEMPLATES = ("auto", "chat", "plain")


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
    messages: list[list[dict[str, str]]] = field(default_factory=list)

    def __len__(self) -> int:
        return len(self.token_ids)


def load_prompts(
    path: str | Path,
    tokenizer,
    prompt_column: str = "prompt",
    answer_column: str | None = "answer",
    template: str = "auto",
    system: str | None = None,
    max_prompt_tokens: int = 1024,
    limit: int | None = None,
    teacher_tokenizer=None,
) -> Prompts:
    """Read prompts from a .jsonl, .json (lines) or .parquet file; the first two also as .gz.

    A prompt is a string or a list of chat messages ({role, content}). Dotted column names reach
    into nested records (DAPO-Math-17k: `prompt`, `reward_model.ground_truth`; GSM8K: `question`,
    `answer`). What a user wrote stays text: where it spells a special token ("<|im_end|>"), that
    token's characters are tokenised like any others. (Added tokens that their tokenizer does not
    call special, such as Qwen's <think>, are matched wherever they stand.)

    Args:
        tokenizer: a transformers tokenizer.
        answer_column: None reads no answers.
        template: `chat` applies the tokenizer's chat template with its generation prompt; `plain`
            joins the messages by blank lines and adds only what the tokenizer itself adds (a bos);
            `auto` is `chat` where the tokenizer has a chat template.
        system: put before the messages that have no system message of their own.
        max_prompt_tokens: longer prompts are dropped; with a teacher's tokenizer, those that are
            longer for either model.
        limit: stop after this many prompts that fit.
        teacher_tokenizer: renders the same messages, with its own chat template, for a teacher.

    Raises:
        ValueError: the file is missing, unreadable or of an unknown type; a column is missing; a
            prompt is neither text nor messages; there is no chat template; no prompt is left.
    """
    encoders = [
        _encoder(each, template) for each in (tokenizer, teacher_tokenizer) if each is not None
    ]

    prompts, texts, answers, said, dropped = [], [], [], [], 0
    for where, record in read_records(Path(path)):
        if limit is not None and len(prompts) == limit:
            break
        messages = _as_messages(_column(record, prompt_column, where), prompt_column, where)
        answer = None if answer_column is None else _column(record, answer_column, where)
        if system is not None and messages[0]["role"] != "system":
            messages = [{"role": "system", "content": system}, *messages]
        renderings = [encode(messages) for encode in encoders]
        if max(map(len, renderings)) > max_prompt_tokens:
            dropped += 1
            continue
        prompts.append(renderings)
        texts.append(messages[-1]["content"])
        answers.append(None if answer is None else str(answer))
        said.append(messages)
    if not prompts:
        raise ValueError(
            f"{path}: no prompt is left: {dropped} have more than "
            f"max_prompt_tokens = {max_prompt_tokens} tokens"
        )
    ours, *others = map(list, zip(*prompts, strict=True))
    theirs = next((other for other in others if other != ours), None)
    return Prompts(ours, texts, answers, dropped, theirs, said)


def render(
    conversations: Iterable[list[dict[str, str]]], tokenizer, template: str
) -> list[list[int]]:
    """The token ids of prompts (`Prompts.messages`) in another tokenizer and chat template.

    Raises:
        ValueError: there is no chat template where `template` asks for one.
    """
    return [*map(_encoder(tokenizer, template), conversations)]


def read_texts(
    path: str | Path, prompt_column: str, answer_column: str, limit: int
) -> Iterator[str]:
    """What the messages say, and the answers where there are some, of the first `limit` records."""
    for where, record in islice(read_records(Path(path)), limit):
        prompt = _column(record, prompt_column, where)
        yield from (message["content"] for message in _as_messages(prompt, prompt_column, where))
        with suppress(ValueError):
            yield str(_column(record, answer_column, where))


def read_records(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield (where it stands, record), one at a time."""
    if not path.is_file():
        raise ValueError(f"{path}: no such file; prompts are read from .jsonl, .json or .parquet")
    suffix = Path(path.stem).suffix if path.suffix == ".gz" else path.suffix
    if suffix in (".jsonl", ".json"):
        with (gzip.open if path.suffix == ".gz" else open)(path, "rt", encoding="utf-8") as lines:
            for number, line in enumerate(lines, 1):
                if line.strip():
                    where = f"{path} line {number}"
                    yield where, _parse_line(line, where)
    elif path.suffix == ".parquet":
        import pyarrow.parquet as pq

        row = 0
        for table in pq.ParquetFile(path).iter_batches(batch_size=1024):
            for record in table.to_pylist():
                row += 1
                yield f"{path} row {row}", record
    else:
        raise ValueError(f"{path}: unknown type; .jsonl, .json (also .gz) and .parquet are read")


def _parse_line(line: str, where: str) -> dict[str, Any]:
    try:
        record = json.loads(line)
    except json.JSONDecodeError as error:
        raise ValueError(f"{where}: not JSON ({error.msg}); each line is a JSON object") from None
    if not isinstance(record, dict):
        raise ValueError(f"{where}: {line[:40]!r}; each line is a JSON object")
    return record


def _column(record: dict[str, Any], column: str, where: str) -> Any:
    """A column by its name or, where no column is called that, by its dotted path."""
    if column in record:
        return record[column]
    value: Any = record
    for name in column.split("."):
        if not isinstance(value, dict) or name not in value:
            raise ValueError(f"{where}: no column {column!r}; columns: {', '.join(sorted(record))}")
        value = value[name]
    return value


def _as_messages(prompt: Any, column: str, where: str) -> list[dict[str, str]]:
    if isinstance(prompt, str) and prompt:
        return [{"role": "user", "content": prompt}]
    if isinstance(prompt, list) and prompt and all(_is_message(message) for message in prompt):
        return prompt
    raise ValueError(
        f"{where}: column {column!r} is {str(prompt)[:40]!r}; "
        "text or a list of messages {role, content} is needed"
    )


def _is_message(message: Any) -> bool:
    return isinstance(message, dict) and all(
        isinstance(message.get(key), str) for key in ("role", "content")
    )


def _encoder(tokenizer, template: str) -> Callable[[list[dict[str, str]]], list[int]]:
    if template not in TEMPLATES:
        raise ValueError(f"template: {template!r} is not one of {', '.join(TEMPLATES)}")
    if template == "auto":
        template = "chat" if tokenizer.chat_template else "plain"
    if template == "chat" and not tokenizer.chat_template:
        raise ValueError("template: chat, but the tokenizer has no chat template; plain works")
    return partial({"chat": _encode_chat, "plain": _encode_plain}[template], tokenizer)


def _encode_plain(tokenizer, messages: list[dict[str, str]]) -> list[int]:
    text = "\n\n".join(message["content"] for message in messages)
    return tokenizer(text, split_special_tokens=True)["input_ids"]


def _encode_chat(tokenizer, messages: list[dict[str, str]]) -> list[int]:
    contents = [message["content"] for message in messages]
    if not any(token in content for token in tokenizer.all_special_tokens for content in contents):
        return tokenizer.apply_chat_template(
            messages, add_generation_prompt=True, tokenize=True, return_dict=False
        )
    # The template's special tokens count, the contents' must not: render around private-use marks
    # and tokenise the pieces apart. Only done on need, as a merge may span a piece's border.
    marked = [{**message, "content": f"\ue000{i}\ue001"} for i, message in enumerate(messages)]
    rendered = tokenizer.apply_chat_template(marked, add_generation_prompt=True, tokenize=False)
    token_ids = []
    for i, piece in enumerate(re.split("\ue000(\\d+)\ue001", rendered)):
        is_content = i % 2 == 1
        token_ids += tokenizer(
            contents[int(piece)] if is_content else piece,
            add_special_tokens=False,
            split_special_tokens=is_content,
        )["input_ids"]
    return token_ids


def prompt_order(num_prompts: int, epoch: int, seed: int, shuffle: bool = True) -> np.ndarray:
    """[num_prompts] int64, the order of one epoch: a permutation from (seed, epoch) alone."""
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
        """The next `count` prompt indices."""
        indices: list[int] = []
        while len(indices) < count:
            epoch, start = divmod(self.consumed, self.num_prompts)
            order = prompt_order(self.num_prompts, epoch, self.seed, self.shuffle)
            part = order[start : start + count - len(indices)].tolist()
            indices += part
            self.consumed += len(part)
        return indices
