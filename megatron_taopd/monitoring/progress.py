"""What the terminal shows while a run goes."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

from megatron_taopd.monitoring.numbers import number, percent, seconds

PLAIN_LINES = 20  # about this many progress lines where there is no terminal to redraw


class ProgressLine:
    """One line that redraws itself in a terminal; elsewhere about PLAIN_LINES lines for a run."""

    def __init__(self, steps: int, first_step: int, console: Console):
        self.steps = steps
        self.console = console
        self.every = max(1, math.ceil(steps / PLAIN_LINES))
        self.accuracy: float | None = None
        self.bar: Progress | None = None
        if console.is_terminal:
            self.bar = Progress(
                BarColumn(bar_width=24),
                TextColumn("{task.completed:.0f}/{task.total:.0f}"),
                TimeRemainingColumn(),
                TextColumn("{task.description}"),
                console=console,
            )
            self.task = self.bar.add_task("starting", total=steps, completed=first_step)
            self.bar.start()

    def update(self, record: Mapping[str, Any]) -> None:
        """Show the newest record; without a terminal only some steps and each evaluation."""
        step = record["step"]
        evaluated = record.get("eval/accuracy") is not None
        self.accuracy = record["eval/accuracy"] if evaluated else self.accuracy
        text = self.text(record)
        if self.bar:
            self.bar.update(self.task, completed=step, description=text)
        elif evaluated or step % self.every == 0 or step >= self.steps:
            self.console.print(f"step {step}/{self.steps}  {text}", highlight=False, soft_wrap=True)

    def text(self, record: Mapping[str, Any]) -> str:
        """Put a record into words; the accuracy is that of the last evaluation."""
        parts = []
        if record.get("loss") is not None:
            parts.append(f"loss {number(record['loss'])}")
        if self.accuracy is not None:
            parts.append(f"accuracy {percent(self.accuracy)}")
        if record.get("kept_rows") is not None and record.get("valid_rows"):
            parts.append(f"kept {record['kept_rows']:,.0f} of {record['valid_rows']:,.0f} rows")
        if record.get("time/step") is not None:
            parts.append(f"{seconds(record['time/step'])}/step")
        return "  ".join(parts)

    def close(self) -> None:
        """Leave the line as it is and give the terminal back."""
        if self.bar:
            self.bar.stop()
