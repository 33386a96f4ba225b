"""Bars with the time left, for phases that may take seconds: one form for all, on rank 0 alone.

    for record in track(records, len(records), "tokenising prompts"): ...
    with phase("converting", total_bytes, unit="MB", scale=1e-6) as bar: bar.advance(written)
    with phase("waiting for servers", seconds=900): ...

In a terminal a phase of more than SHOWN_S is a bar, which goes when the phase ends. Elsewhere,
where a bar would fill a log, it is silent for QUIET_S; then there is a line after 5 s, 10 s, 20 s
and so on, and one at its end. Phases can be nested, and begun in any thread.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Iterable, Iterator, Sized
from contextlib import contextmanager, nullcontext
from datetime import timedelta
from typing import TypeVar

import torch.distributed as dist
from rich.console import Console
from rich.progress import (
    BarColumn,
    Progress,
    TaskID,
    TextColumn,
)
from rich.table import Column

from megatron_taopd.parallel import watchdog

SHOWN_S = 1.0  # before a bar is drawn
QUIET_S = 5.0  # before the first line where there is no terminal

T = TypeVar("T")


class Phase:
    """A phase that goes on.

    Attributes:
        done: what has been done of it, in the unit of `total`; `before` of that when it began.
        total: what there is to do; None: nobody knows.
        seconds: that it will take, or may take at most; None: it is counted instead.
    """

    def __init__(
        self,
        what: str,
        total: float | None = None,
        seconds: float | None = None,
        unit: str = "",
        before: float = 0.0,
    ):
        self.what, self.seconds, self.unit = what, seconds, unit
        self.done = self.before = before
        self.total = total if seconds is None else seconds
        self.began = time.monotonic()

    def advance(self, count: float = 1, total: float | None = None) -> None:
        """Count what was done since the last call; `total` is what there is, if it is known now."""
        self.done += count
        self.total = self.total if total is None else total

    @property
    def elapsed(self) -> float:
        """Seconds since it began."""
        return time.monotonic() - self.began

    @property
    def completed(self) -> float:
        """What the bar shows as done."""
        return self.done if self.seconds is None else min(self.elapsed, self.seconds)

    @property
    def left(self) -> float | None:
        """Seconds that it will go on if it goes on like this; None: nobody knows."""
        if self.total is None or self.completed <= self.before:
            return None
        to_do = max(0.0, self.total - self.completed)
        return self.elapsed * to_do / (self.completed - self.before)

    @property
    def count(self) -> str:
        """How far it is, in words; empty where only time passes."""
        if self.seconds is not None or (self.total is None and not self.done):
            return ""
        of = "" if self.total is None else f"/{self.total:,.0f}"
        return f"{self.done:,.0f}{of}{' ' * bool(self.unit)}{self.unit}"

    @property
    def times(self) -> str:
        """How long it has gone on, and will."""
        left = "" if self.left is None else f", {clock(self.left)} left"
        return clock(self.elapsed) + left

    def __str__(self) -> str:
        return f"{self.what}: {', '.join(filter(None, [self.count, self.times]))}"


class Display:
    """Shows the phases of one process on one console."""

    def __init__(self, console: Console):
        self.console = console
        self._lock = threading.RLock()
        self._phases: list[Phase] = []  # outermost first
        self._hushed = 0
        self._bars: _Bars | None = None

    @contextmanager
    def shown(self, phase: Phase) -> Iterator[None]:
        """Show a phase while the block runs."""
        ended = threading.Event()
        with self._lock:
            self._phases.append(phase)
        follow = self._draw if self.console.is_terminal else self._speak
        thread = threading.Thread(target=follow, args=(phase, ended), daemon=True)
        thread.start()
        try:
            yield
        finally:
            with self._lock:
                self._phases.remove(phase)
            ended.set()
            thread.join()

    @contextmanager
    def hushed(self) -> Iterator[None]:
        """Keep what goes on inside out of logs; bars in a terminal are drawn all the same."""
        self._hushed += 1
        try:
            yield
        finally:
            self._hushed -= 1

    def add(self, phase: Phase, text: str) -> TaskID:
        """Draw a bar until `remove`, with a text behind it."""
        with self._lock:
            if self._bars is None:
                self._bars = _Bars(self.console)
                self._bars.start()
            return self._bars.add_phase(phase, text)

    def describe(self, task: TaskID, text: str) -> None:
        """Replace the text behind a bar."""
        if self._bars is not None:
            self._bars.update(task, text=text)

    def remove(self, task: TaskID, stays: bool = False) -> None:
        """Take a bar away, or leave it as it is; with the last one the terminal is given back."""
        with self._lock:
            if self._bars is not None and self._bars.remove_phase(task, stays):
                self._bars.stop()
                self._bars = None

    def _draw(self, phase: Phase, ended: threading.Event) -> None:
        if ended.wait(SHOWN_S):
            return
        task = self.add(phase, phase.what)
        ended.wait()
        self.remove(task)

    def _speak(self, phase: Phase, ended: threading.Event) -> None:
        wait, spoken = QUIET_S, False
        while not ended.wait(phase.began + wait - time.monotonic()):
            wait *= 2
            if self._phases[-1:] == [phase] and not self._hushed:  # those outside wait for it
                spoken = True
                self._print(str(phase))
        if spoken:
            self._print(f"{phase.what}: done in {clock(phase.elapsed)}")

    def _print(self, line: str) -> None:
        self.console.print(line, highlight=False, markup=False, soft_wrap=True)


class _Bars(Progress):
    """The bars of a terminal; each asks its phase how far it is whenever they are drawn."""

    def __init__(self, console: Console):
        self._of: dict[TaskID, Phase] = {}
        # Where there is no room for all, texts are cut; counts and times of no bar are.
        rest = Column(ratio=1, no_wrap=True)
        super().__init__(
            BarColumn(bar_width=min(24, console.width // 6)),
            TextColumn("{task.fields[count]}", markup=False),
            TextColumn("{task.fields[times]}", markup=False),
            TextColumn("{task.fields[text]}", markup=False, table_column=rest),
            console=console,
            expand=True,
        )

    def add_phase(self, phase: Phase, text: str) -> TaskID:
        shown = {"text": text, "count": phase.count, "times": phase.times}
        task = self.add_task("", total=phase.total, **shown)
        self._of[task] = phase
        return task

    def remove_phase(self, task: TaskID, stays: bool) -> bool:
        """Remove a bar; return whether it was the last one."""
        phase = self._of.pop(task)
        if stays:
            self._follow(task, phase)
            self.stop_task(task)
        else:
            self.remove_task(task)
        return not self._of

    def _follow(self, task: TaskID, phase: Phase) -> None:
        self.update(
            task,
            completed=phase.completed,
            total=phase.total,
            count=phase.count,
            times=phase.times,
        )

    def get_renderables(self):
        for task, phase in [*self._of.items()]:
            self._follow(task, phase)
        yield from super().get_renderables()


def clock(seconds: float) -> str:
    """Write a duration as 0:01:23, as rich's columns do."""
    return str(timedelta(seconds=round(seconds)))


_display: Display | None = None


def display() -> Display:
    """Return the display of this process, on what stdout is when it is first asked for."""
    global _display
    if _display is None:
        _display = Display(Console())
    return _display


def is_first() -> bool:
    """Tell whether this is rank 0, the only one that shows anything."""
    return (dist.get_rank() if dist.is_initialized() else int(os.environ.get("RANK", 0))) == 0


@contextmanager
def phase(
    what: str, total: float | None = None, seconds: float | None = None, unit: str = ""
) -> Iterator[Phase]:
    """Show a phase on rank 0 while the block runs; what it yields is told how far it is.

    Args:
        what: it is, in words.
        total: what there is to do, in `unit`; None: nobody knows yet.
        seconds: instead of counting: how long it will take, or may take at most.
    """
    begun = Phase(what, total, seconds, unit)
    with display().shown(begun) if is_first() else nullcontext():
        yield begun


def track(items: Iterable[T], total: int | None, what: str) -> Iterator[T]:
    """Yield the items, and show how many of them are done; each is a sign of life for the watchdog.

    Args:
        total: how many there are; None for their length, or where they have none.
    """
    if total is None and isinstance(items, Sized):
        total = len(items)
    with phase(what, total) as shown:
        for item in items:
            watchdog.heartbeat()
            yield item
            shown.advance()
