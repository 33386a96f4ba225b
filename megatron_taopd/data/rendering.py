"""One conversation → the token ids that one model reads before it answers.

Every message arrives whole, as plain text, once, and the next turn is the assistant's; a
conversation of which that cannot be said is refused. A chat template is a program that may leave
out, repeat, trim or rewrite what it is given, so its rendering is looked at: the *skeleton*, what
it writes around placeholders in messages of the same roles, has to fit around the messages
themselves.
"""

from __future__ import annotations

import copy
import hashlib
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from itertools import chain
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from jinja2 import Environment, meta
from jinja2.exceptions import SecurityError
from tokenizers import AddedToken

TEMPLATES = ("auto", "chat", "plain")
ROLES = ("system", "user", "assistant", "tool")  # that a template need not name to know them
_CALLS = ("tool_calls", "function_call")  # what a message says in addition to its content
_PRIVATE_USE = (range(0xE000, 0xF900), range(0xF0000, 0xFFFFE))  # code points without a meaning
_PLACEHOLDER = "\ue000{}\ue001"

Message = dict[str, Any]


@dataclass(frozen=True)
class Skeleton:
    """What a chat template writes around the messages of a conversation.

    Attributes:
        literals: the texts before, between and after the contents.
        order: the messages whose contents stand between them; an empty one stands nowhere.
        special: the ids of the special tokens among the literals.
    """

    literals: list[str]
    order: list[int]
    special: list[int]

    def filled(self, contents: Sequence[str]) -> str:
        """Return the rendering, if the template does nothing to the contents."""
        return "".join(chain.from_iterable(zip(self.literals, [*contents, ""], strict=True)))

    def arrivals(self, rendering: str, messages: Sequence[Message]) -> list[str]:
        """Return what a rendering has between the literals.

        A template may trim white space and leave out an assistant's reasoning; it may do nothing
        else. The list ends before the first message to which it did.
        """
        contents = [messages[i]["content"] for i in self.order]
        if rendering == self.filled(contents):
            return contents
        arrived: list[str] = []
        if not rendering.startswith(self.literals[0]):
            return arrived
        end = len(self.literals[0])
        for i, literal in zip(self.order, self.literals[1:], strict=True):
            fitting = [
                text for text in _trimmed(messages[i]) if rendering.startswith(text + literal, end)
            ]
            if not fitting:
                return arrived
            arrived.append(max(fitting, key=len))
            end += len(arrived[-1]) + len(literal)
        return arrived if end == len(rendering) else arrived[:-1]


def _trimmed(message: Message) -> set[str]:
    """Return what a template may make of a message."""
    texts = [message["content"]]
    if message["role"] == "assistant" and "</think>" in texts[0]:
        texts.append(texts[0].rpartition("</think>")[2])
    return {
        each
        for text in texts
        for white in (None, "\n")
        for each in (text, text.strip(white), text.lstrip(white), text.rstrip(white))
    }


def special_tokens(tokenizer) -> dict[str, int]:
    """Return the ids of the special tokens; Llama 3 marks many so that it names nowhere else."""
    named = {*tokenizer.all_special_tokens}
    return {
        token.content: i
        for i, token in tokenizer.added_tokens_decoder.items()
        if token.special or token.content in named
    }


class Renderer:
    """Renders conversations for one tokenizer.

    Args:
        tokenizer: a transformers tokenizer.
        template: `chat` applies the tokenizer's chat template with its generation prompt; `plain`
            joins the messages by blank lines and adds only what the tokenizer itself adds (a bos);
            `auto` is `chat` where the tokenizer has a chat template.
        kwargs: variables of the chat template, such as {"enable_thinking": False}.
        key: of the configuration, that has them.

    Raises:
        ValueError: an unknown `template`, or no chat template where it asks for one; a variable
            that the chat template does not name.
    """

    def __init__(
        self,
        tokenizer,
        template: str = "auto",
        kwargs: Mapping[str, Any] | None = None,
        key: str = "data.template_kwargs",
    ):
        if template not in TEMPLATES:
            raise ValueError(f"template: {template!r} is not one of {', '.join(TEMPLATES)}")
        if template == "auto":
            template = "chat" if tokenizer.chat_template else "plain"
        if template == "chat" and not tokenizer.chat_template:
            raise ValueError("template: chat, but the tokenizer has no chat template; plain works")
        self.tokenizer = tokenizer
        self.source = tokenizer.get_chat_template() if template == "chat" else None
        self.name = f"the chat template of {tokenizer.name_or_path}"
        self.kwargs, self.key = dict(kwargs or {}), key
        if self.kwargs:
            self._check_kwargs()
        self._skeletons: dict[tuple, Skeleton] = {}
        self._readers: dict[str, tuple[Any, dict[int, int]]] = {}

        self.special = special_tokens(tokenizer)
        longest_first = sorted(self.special, key=len, reverse=True)
        self._spelled = re.compile("|".join(map(re.escape, longest_first)) or "(?!)")
        # Text may be unknown, and is no control token then; unless that is the name of one.
        unknown = {tokenizer.unk_token} - {tokenizer.bos_token, tokenizer.eos_token}
        self._control = {i for token, i in self.special.items() if token not in unknown}
        self._added = (
            self._control_ids(self._encode("a", whole=True)) if self.source is None else []
        )

    def __call__(self, messages: Sequence[Message]) -> list[int]:
        """Return the token ids of a conversation; see `batch`."""
        return self.batch([messages])[0]

    def batch(self, conversations: Sequence[Sequence[Message]]) -> list[list[int]]:
        """Return the token ids of conversations, up to and including the generation prompt.

        What a message says stays text: where it spells a special token ("<|im_end|>"), its
        characters are tokenised like any others, where they stand. (Added tokens that their
        tokenizer does not call special, such as Qwen's <think>, are matched in any text.)

        Raises:
            ValueError: of one of them, and it does not say of which: `check` refuses it; the
                template changes the text of a message, but for the white space around it and the
                reasoning of an assistant's turn, or reads the clock; the tokenizer has no ids for
                the characters of a special token that a message spells.
        """
        conversations = [self._without_idle_keys(messages) for messages in conversations]
        skeletons = [self.check(messages) for messages in conversations]
        if self.source is None:
            texts = ["\n\n".join(m["content"] for m in messages) for messages in conversations]
            rendered = self._encode_all(texts, whole=True, special_as_text=True)
            for ids, text in zip(rendered, texts, strict=True):
                self._compare(ids, self._added, text)
            return rendered
        renderings = self._apply_all(conversations)
        rendered = self._encode_all(renderings)
        for i, skeleton in enumerate(skeletons):
            assert skeleton is not None  # there is a template
            arrived = skeleton.arrivals(renderings[i], conversations[i])
            if len(arrived) < len(skeleton.order):
                changed = skeleton.order[len(arrived)]
                raise ValueError(
                    f"{_named(changed, conversations[i])}: {self.name} changes its text: it has "
                    "to arrive as it is"
                )
            plain = not any(map(self._spelled.search, arrived))
            if not plain or self._control_ids(rendered[i]) != skeleton.special:
                rendered[i] = self._literally(skeleton, arrived)
        return rendered

    def fingerprint(self) -> list[Any]:
        """Return plain values that change with whatever the ids of a conversation depend on."""
        tokenizer = self.tokenizer
        if tokenizer.is_fast:
            rules = tokenizer.backend_tokenizer.to_str()
        else:
            with TemporaryDirectory() as directory:
                saved = map(Path, tokenizer.save_pretrained(directory))
                rules = "".join(f.read_bytes().hex() for f in sorted(saved) if f.is_file())
        named = [tokenizer.special_tokens_map, *map(str, tokenizer.added_tokens_decoder.values())]
        return [
            type(tokenizer).__name__,
            hashlib.sha256(rules.encode()).hexdigest(),
            str(named),
            self.source,
            self.kwargs,
        ]

    def check(self, messages: Sequence[Message]) -> Skeleton | None:
        """Return the skeleton of a conversation that could be rendered (None: plain).

        That depends on the roles and on which contents are empty, and is remembered.

        Raises:
            ValueError: the last turn is the assistant's, or empty; a role that the template does
                not know; the template raises, or leaves out or repeats a message.
        """
        last = len(messages) - 1
        for i, message in enumerate(messages):
            if not self._knows(message["role"]):
                raise ValueError(
                    f"{_named(i, messages)}: {self._known_roles()}; rename it, or take it out"
                )
        if messages[last]["role"] == "assistant":
            raise _ends_with_answer(messages)
        if not messages[last]["content"]:
            raise ValueError(f"{_named(last, messages)} is empty, and the last; nothing is asked")
        messages = self._without_idle_keys(messages)
        if any(len(message) > 2 for message in messages):
            self._check_further_keys(messages)
            return self._read_skeleton(messages)
        if self.source is None:
            return None
        shape = tuple((message["role"], not message["content"]) for message in messages)
        if shape not in self._skeletons:
            self._skeletons[shape] = self._read_skeleton(messages)
        return self._skeletons[shape]

    def _without_idle_keys(self, messages: Sequence[Message]) -> Sequence[Message]:
        """Leave out keys of which the template's source says nothing, unless they are calls."""
        if all(len(message) == 2 for message in messages):
            return messages
        source = self.source or ""
        return [
            {
                key: value
                for key, value in message.items()
                if key in ("role", "content") or key in source or (key in _CALLS and value)
            }
            for message in messages
        ]

    def _knows(self, role: str) -> bool:
        """Tell whether a role is one of ROLES or a string in the template's source.

        Many a template writes any role as it stands, which its model has never seen.
        """
        if role in ROLES or self.source is None:
            return role in ROLES
        return bool(re.search(rf"""['"]{re.escape(role)}['"]""", self.source))

    def _known_roles(self) -> str:
        roles = ", ".join(ROLES)
        if self.source is None:
            return f"the roles of a prompt are {roles}"
        return f"{self.name} does not name that role, and it is none of {roles}"

    def _check_further_keys(self, messages: Sequence[Message]) -> None:
        for i, message in enumerate(messages):
            further = {k: v for k, v in message.items() if k not in ("role", "content")}
            for text in strings(further):
                if found := self._spelled.search(text):
                    raise ValueError(
                        f"{_named(i, messages)} spells the special token {found[0]!r} outside its "
                        "content"
                    )
            for key in set(_CALLS) & {key for key, value in further.items() if value}:
                if self.source is None:
                    raise ValueError(
                        f"{_named(i, messages)}: plain text has no place for its {key}"
                    )
                without = {k: v for k, v in message.items() if k != key}
                others = [*messages[:i], without, *messages[i + 1 :]]
                if self._apply(messages) == self._apply(others):
                    raise ValueError(f"{_named(i, messages)}: {self.name} leaves out its {key}")

    def _read_skeleton(self, messages: Sequence[Message]) -> Skeleton:
        marked = [
            {**message, "content": message["content"] and _PLACEHOLDER.format(i)}
            for i, message in enumerate(messages)
        ]
        rendering = self._apply(marked)
        parts = re.split(_PLACEHOLDER.format(r"(\d+)"), rendering)
        literals, order = parts[::2], [*map(int, parts[1::2])]
        for i, message in enumerate(messages):
            if message["content"] and (times := order.count(i)) != 1:
                what = f"repeats it {times} times" if times else "leaves it out"
                raise ValueError(f"{_named(i, messages)}: {self.name} {what}")
        last = marked[-1]
        if last["role"] not in ROLES and rendering == self._try([*marked[:-1], _assistants(last)]):
            raise _ends_with_answer(messages)
        special = self._control_ids(self._encode("a".join(literals)))
        return Skeleton(literals, order, special)

    def _apply(self, messages: Sequence[Message]) -> str:
        return self._apply_all([messages])[0]

    def _apply_all(self, conversations: Sequence[Sequence[Message]]) -> list[str]:
        try:
            return self.tokenizer.apply_chat_template(
                list(conversations),
                add_generation_prompt=True,
                tokenize=False,
                **{"strftime_now": self._refuse_clock, **self.kwargs},
            )
        except (SecurityError, _Clock):  # which no prompt is to blame for
            raise
        except Exception as error:  # whatever a template raises or trips over
            raise ValueError(f"{self.name} refuses it: {' '.join(str(error).split())}") from None

    def _refuse_clock(self, _format: str) -> str:
        """Stand in for transformers' `strftime_now`, which gives a template the date of today."""
        assert self.source is not None
        found = re.search(r"set\s+(\w+)\s*=\s*strftime_now", self.source)
        remedy = "have it written without in chat_template.jinja, or take data.template: plain"
        if found and found[1] in self._variables():
            remedy = f'pin it by {self.key}: {{{found[1]}: "26 Jul 2024"}}'
        raise _Clock(
            f"{self.name} writes the date of the day, so that ids would change overnight; {remedy}"
        )

    def _variables(self) -> set[str]:
        """Return the variables that the chat template takes from outside."""
        # transformers' own tag, which jinja does not know.
        source = re.sub(r"{%-?\s*(end)?generation\s*-?%}", "", self.source or "")
        parsed = Environment(extensions=["jinja2.ext.loopcontrols"]).parse(source)
        ours = {"messages", "add_generation_prompt", "raise_exception", "strftime_now"}
        return meta.find_undeclared_variables(parsed) - ours - {*self.tokenizer.special_tokens_map}

    def _check_kwargs(self) -> None:
        if self.source is None:
            raise ValueError(
                f"{self.key}: {self.kwargs}, but no chat template is applied; take it out"
            )
        known = self._variables()
        for name in self.kwargs:
            if name in known:
                continue
            close = get_close_matches(name, known, n=3, cutoff=0.5)
            there = f"did you mean {' or '.join(close)}?" if close else "it names no such thing"
            if not close and known:
                there = f"it names {', '.join(sorted(known))}"
            raise ValueError(f"{self.key}: {self.name} does not name {name!r}; {there}")

    def _try(self, messages: Sequence[Message]) -> str | None:
        try:
            return self._apply(messages)
        except ValueError:
            return None

    def _encode(self, text: str, whole: bool = False) -> list[int]:
        return self._encode_all([text], whole)[0]

    def _encode_all(
        self, texts: list[str], whole: bool = False, special_as_text: bool = False
    ) -> list[list[int]]:
        """Return the ids of texts; `whole`: with what the tokenizer adds to one."""
        return self.tokenizer(
            texts,
            add_special_tokens=whole,
            split_special_tokens=special_as_text,
            return_attention_mask=False,
            return_token_type_ids=False,
        )["input_ids"]

    def _control_ids(self, ids: Iterable[int]) -> list[int]:
        return [i for i in ids if i in self._control]

    def _literally(self, skeleton: Skeleton, arrived: Sequence[str]) -> list[int]:
        """Return the ids of a rendering of which only the literals have special tokens.

        It is read by a copy of the tokenizer for which all special tokens are text, and those
        behind a mark that stands nowhere else are tokens.
        """
        text = skeleton.filled(arrived)
        mark = next(c for c in map(chr, chain(*_PRIVATE_USE)) if c not in text)
        if mark not in self._readers:
            self._readers[mark] = self._reader(mark)
        reader, originals = self._readers[mark]
        marked = [self._spelled.sub(rf"{mark}\g<0>", literal) for literal in skeleton.literals]
        text = Skeleton(marked, skeleton.order, []).filled(arrived)
        ids = reader(text, add_special_tokens=False, split_special_tokens=True)["input_ids"]
        ids = [originals.get(i, i) for i in ids]
        self._compare(ids, skeleton.special, "\n".join(arrived))
        return ids

    def _reader(self, mark: str) -> tuple[Any, dict[int, int]]:
        reader, flags = copy.deepcopy(self.tokenizer), self.tokenizer.added_tokens_decoder
        reader.add_tokens(
            [
                AddedToken(
                    mark + token,
                    single_word=flags[i].single_word,
                    lstrip=flags[i].lstrip,
                    rstrip=flags[i].rstrip,
                    normalized=flags[i].normalized,
                    special=False,
                )
                for token, i in self.special.items()
            ]
        )
        return reader, {
            reader.convert_tokens_to_ids(mark + token): i for token, i in self.special.items()
        }

    def _compare(self, ids: Iterable[int], expected: list[int], text: str) -> None:
        """Refuse ids of which text has become special tokens."""
        if self._control_ids(ids) == expected:
            return
        found = self._spelled.search(text)
        what = f"the special token {found[0]!r}" if found else "a special token"
        raise ValueError(
            f"it spells {what}, and the tokenizer {self.tokenizer.name_or_path} has no other ids "
            "for that; take it out"
        )


class _Clock(ValueError):
    """A template reads the clock."""


def _ends_with_answer(messages: Sequence[Message]) -> ValueError:
    return ValueError(
        f"{_named(len(messages) - 1, messages)} is the assistant's: a prompt ends with a question"
    )


def _assistants(message: Message) -> Message:
    return {**message, "role": "assistant"}


def _named(i: int, messages: Sequence[Message]) -> str:
    return f"message {i + 1} of {len(messages)} (role {messages[i]['role']!r})"


def strings(value: Any) -> Iterator[str]:
    """Yield every string inside plain values, keys included."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        for pair in value.items():
            yield from chain.from_iterable(map(strings, pair))
    elif isinstance(value, list | tuple):
        yield from chain.from_iterable(map(strings, value))
