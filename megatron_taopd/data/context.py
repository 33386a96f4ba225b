"""What a teacher reads that the student does not: a context for each prompt, a system message.

The student, its rollout engine and the evaluation render a prompt's own messages. The teacher's are
made here, from a column of their own, and rendered by the teacher's renderer alone.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache

from jinja2 import StrictUndefined, TemplateError, meta
from jinja2.sandbox import ImmutableSandboxedEnvironment

from megatron_taopd.data.rendering import Message

KEY = "teacher.context_template"


@dataclass(frozen=True)
class TeacherContext:
    """How the teacher's messages are made.

    Attributes:
        column: of a prompt's context; None: there is none.
        template: Jinja, of what the last message says to the teacher, from `prompt`, what it says
            to the student, and `context`.
        system: message in the place of the student's; None: the same.
        cut: a context that makes a prompt too long loses its end; otherwise the prompt is dropped.
    """

    column: str | None = None
    template: str = "{{ prompt }}\n\n{{ context }}"
    system: str | None = None
    cut: bool = False

    def check(self) -> None:
        """Refuse a template that cannot be read, or leaves the context out.

        Raises:
            ValueError: one line with the key, what is wrong and what would be right.
        """
        if self.column is None:
            return
        try:
            named = meta.find_undeclared_variables(_environment().parse(self.template))
            _compiled(self.template)
        except TemplateError as error:
            raise ValueError(f"{KEY}: {' '.join(str(error).split())}") from None
        if unknown := sorted(named - {"prompt", "context"}):
            raise ValueError(f"{KEY}: {unknown[0]!r} is unknown; it has `prompt` and `context`")
        if "context" not in named:
            raise ValueError(f"{KEY}: {self.template!r} leaves out {{{{ context }}}}")

    def messages(self, messages: Sequence[Message], context: str | None) -> list[Message]:
        """Return a prompt's messages as the teacher reads them; context: None: it has none.

        Raises:
            ValueError: the template fails.
        """
        told = list(messages)
        if self.system is not None:
            told = told[told[0]["role"] == "system" :]
            told.insert(0, {"role": "system", "content": self.system})
        if context is not None:
            try:
                text = _compiled(self.template).render(prompt=told[-1]["content"], context=context)
            except TemplateError as error:
                raise ValueError(f"{KEY}: {' '.join(str(error).split())}") from None
            told[-1] = {**told[-1], "content": text}
        return told


def longest_that_fits(text: str, fits: Callable[[str], bool]) -> str | None:
    """Return the longest beginning of a text for which `fits` holds; None if it holds for none.

    Of the lengths it tries, halving what is left, each that fits is taken to mean that all shorter
    ones do.
    """
    if not fits(""):
        return None
    fitting, too_long = 0, len(text) + 1
    while too_long - fitting > 1:
        middle = (fitting + too_long) // 2
        if fits(text[:middle]):
            fitting = middle
        else:
            too_long = middle
    return text[:fitting]


@cache
def _environment() -> ImmutableSandboxedEnvironment:
    """Return what chat templates are run in by transformers, but for its own functions."""
    return ImmutableSandboxedEnvironment(undefined=StrictUndefined, keep_trailing_newline=True)


@cache
def _compiled(template: str):
    return _environment().from_string(template)
