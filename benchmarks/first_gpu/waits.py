"""What the host waits for in a warm step, as torch's debug mode for it reports.

`torch.cuda.set_sync_debug_mode` raises or warns in operators that wait for the stream. It does not
see collectives, `torch.cuda.synchronize`, events, and copies from pageable memory that the driver
waits for although they are `non_blocking`.
"""

from __future__ import annotations

import traceback
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from unittest import mock

import torch

import megatron_taopd
from benchmarks.first_gpu.result import Result, Setting
from benchmarks.first_gpu.runs import TINY, precision, run_of
from megatron_taopd import loop
from megatron_taopd.models import pipeline
from megatron_taopd.monitoring.monitor import Monitor

# What a step may wait for, in whichever phase: a fixed few, however many layers and micro-batches.
BUDGET = {"step": 6, "teacher": 0, "scoring": 1, "selection": 3, "training": 3, "sync": 0}
MESSAGE = "called a synchronizing CUDA operation"
WARM_UP = 2  # steps
PACKAGE = f"{Path(megatron_taopd.__file__).parent}/"


class Waits:
    """Counts waits by phase and line; the spans of a run's monitor are the phases."""

    def __init__(self) -> None:
        self.counts: Counter[tuple[str, str]] = Counter()
        self.phase = "step"

    @contextmanager
    def counted(self) -> Iterator[None]:
        """Count in a block, in which whatever waits warns."""
        with warnings.catch_warnings(), mock.patch.object(Monitor, "span", self._of(Monitor.span)):
            warnings.simplefilter("always")
            warnings.showwarning = self._note
            with sync_debug_mode("warn"):
                yield

    def _of(self, span: Callable) -> Callable:
        @contextmanager
        def named(monitor: Monitor, name: str) -> Iterator[None]:
            outer, self.phase = self.phase, name
            try:
                with span(monitor, name):
                    yield
            finally:
                self.phase = outer

        return named

    def _note(self, message, _category, filename, lineno, *_) -> None:
        if MESSAGE not in str(message):
            return
        ours = [frame for frame in traceback.extract_stack() if frame.filename.startswith(PACKAGE)]
        line = f"{filename}:{lineno}"
        if ours:
            line = f"{ours[-1].filename.removeprefix(PACKAGE)}:{ours[-1].lineno} {ours[-1].name}"
        self.counts[self.phase, line] += 1


@contextmanager
def sync_debug_mode(mode: str) -> Iterator[None]:
    """Let what waits raise ("error"), warn ("warn") or neither ("default") in a block."""
    if not torch.cuda.is_available():
        yield
        return
    before = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode(mode)
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode(before)


def within(mode: str, function: Callable) -> Callable:
    """Return a function that runs in a debug mode."""

    def run(*arguments, **options):
        with sync_debug_mode(mode):
            return function(*arguments, **options)

    return run


def warm_step(setting: Setting) -> Result:
    """Take a step that may wait nowhere in a pass over micro-batches, and seldom elsewhere.

    In a pass, its layers, heads and losses, forward and backward, an operator that waits raises;
    only when all gradients are there does Megatron look at the number of rows once.
    """
    result, waits = Result(), Waits()
    overrides = (
        f"train={{precision: {precision()}, micro_batch_tokens: 256, schedule: replay}}",
        "rollout={prompts: 16, max_new_tokens: 16}",
    )
    with run_of(TINY, f"{setting.scratch}/run", *overrides) as run:
        for step in range(1, WARM_UP + 1):
            loop.take_step(run, step)
        config = run.student.config
        finish = within("warn", config.finalize_model_grads_func)
        with (
            mock.patch.object(pipeline, "_run", within("error", pipeline._run)),
            mock.patch.object(config, "finalize_model_grads_func", finish),
            waits.counted(),
        ):
            metrics, _ = loop.take_step(run, WARM_UP + 1)
    result.figures["loss of the step"] = metrics["loss"]
    by_phase: Counter[str] = Counter()
    for (phase, line), count in waits.counts.items():
        by_phase[phase] += count
        result.figures[f"{phase}: {line}"] = count
    for phase, most in BUDGET.items():
        result.most(f"waits in {phase}", by_phase[phase], most)
    if not torch.cuda.is_available():
        result.notes.append("Nothing waits for a CPU: this has run the code, and counted nothing.")
    return result
