"""What the terminal shows of the steps of a run."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from megatron_taopd.monitoring.numbers import number, percent, seconds
from megatron_taopd.parallel.progress import Display, Phase

PLAIN_LINES = 20  # about this many progress lines where there is no terminal to redraw


class ProgressLine:
    """One line that redraws itself in a terminal; elsewhere about PLAIN_LINES lines for a run."""

    def __init__(self, steps: int, first_step: int, display: Display):
        self.steps = steps
        self.display = display
        self.every = max(1, math.ceil(steps / PLAIN_LINES))
        self.evaluated = ""  # the last accuracy, and the step that it is of
        self.run = Phase("steps", steps, before=first_step)
        self.bar = display.add(self.run, "starting") if display.console.is_terminal else None

    def update(self, record: Mapping[str, Any]) -> None:
        """Show the newest record; without a terminal only some steps and each evaluation."""
        step = record["step"]
        accuracy = record.get("eval/accuracy")
        text = self.text(record)
        self.run.done = step
        if self.bar is not None:
            if accuracy is not None:
                self.evaluated = f"  accuracy {percent(accuracy)} at step {step}"
            shown = text if accuracy is not None else text + self.evaluated
            self.display.describe(self.bar, shown)
        elif accuracy is not None or step % self.every == 0 or step >= self.steps:
            line = f"step {step}/{self.steps}  {text}"
            self.display.console.print(line, highlight=False, soft_wrap=True)

    @staticmethod
    def text(record: Mapping[str, Any]) -> str:
        """Put a record into words: its accuracy is there if it was measured in this step."""
        parts = []
        if record.get("loss") is not None:
            parts.append(f"loss {number(record['loss'])}")
        if record.get("eval/accuracy") is not None:
            parts.append(f"accuracy {percent(record['eval/accuracy'])}")
        if record.get("kept_rows") is not None and record.get("valid_rows"):
            parts.append(f"kept {record['kept_rows']:,.0f} of {record['valid_rows']:,.0f} rows")
        if record.get("time/step") is not None:
            parts.append(f"{seconds(record['time/step'])}/step")
        if record.get("perf/tokens_per_second_per_gpu") is not None:
            parts.append(f"{number(record['perf/tokens_per_second_per_gpu'])} tokens/s/GPU")
        if record.get("perf/mfu") is not None:
            parts.append(f"MFU {percent(record['perf/mfu'])}")
        return "  ".join(parts)

    def close(self) -> None:
        """Leave the line as it is and give the terminal back."""
        if self.bar is not None:
            self.display.remove(self.bar, stays=True)
            self.bar = None
