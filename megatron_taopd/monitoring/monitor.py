"""What a run leaves behind for people and programs, and what it shows while it goes."""

from __future__ import annotations

import json
import math
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from torch.profiler import record_function

from megatron_taopd.config.schema import LogSection, RunSection
from megatron_taopd.config.values import check_installed
from megatron_taopd.formats.files import file_written_aside, reason_of
from megatron_taopd.monitoring.progress import ProgressLine
from megatron_taopd.monitoring.report import Kept, write_report
from megatron_taopd.monitoring.samples import Answers, Samples, Snapshot
from megatron_taopd.monitoring.sessions import Sessions
from megatron_taopd.monitoring.sinks import open_sinks, truncate_records
from megatron_taopd.parallel import watchdog
from megatron_taopd.parallel.progress import Display, Phase, display

if TYPE_CHECKING:
    from megatron_taopd.evaluation.in_loop import Example


class Monitor:
    """Metrics of each step → metrics.jsonl, TensorBoard, W&B, a progress line, report.html.

    Every rank may hold one, so that the loop needs no case distinctions: all ranks time their
    spans, rank 0 writes.

    Args:
        run: its directory is created if need be and holds metrics.jsonl, tensorboard/ and
            report.html; its name, or the directory's, is the report's title.
        log: where the records go in addition to metrics.jsonl.
        steps: of the whole run.
        rank: of this process.
        first_step: the step that is logged first. Records of this step and later ones, which a
            run killed after its last checkpoint has left, are removed.
        config_yaml: the configuration, for the report and W&B.
        synchronize: waits for the device, so that spans count the work they started
            (torch.cuda.synchronize).
        console: for the progress line.

    Raises:
        ValueError: a package that `log` asks for is not installed (on every rank alike).
    """

    def __init__(
        self,
        run: RunSection,
        log: LogSection,
        steps: int,
        rank: int = 0,
        first_step: int = 0,
        config_yaml: str = "",
        synchronize: Callable[[], None] | None = None,
        console: Console | None = None,
    ):
        check_installed(log)
        self.run_dir = Path(run.dir)
        self.name = run.name or self.run_dir.resolve().name
        self.config_yaml = config_yaml
        self.records: list[dict[str, Any]] = []
        self._synchronize = synchronize or (lambda: None)
        self._times: dict[str, float] = defaultdict(float)
        self._longest: dict[str, float] = defaultdict(float)  # span of each phase, in this step
        self._expected: dict[str, float] = {}  # likewise, in the step before
        self._stepped = False  # a whole step is done
        self._noted: set[str] = set()
        self._num_samples, self._looked = log.samples, False
        self._writes = rank == 0
        if self._writes:
            self.run_dir.mkdir(parents=True, exist_ok=True)
            self.records = truncate_records(self.run_dir / "metrics.jsonl", first_step)
            self.sessions = Sessions(self.run_dir / "sessions.json", first_step)
            self._samples_file = self.run_dir / "samples.json"
            self.samples = Samples()
            self._sinks = open_sinks(log, self.run_dir, self.name, config_yaml, first_step)
            self._display = Display(console) if console else display()
            self._progress = ProgressLine(steps, first_step, self._display)
            with self._survived(str(self._samples_file), "the report begins anew"):
                self.samples = Samples.read(self._samples_file, first_step)

    @property
    def report_path(self) -> Path:
        """Path of the report, whether it is written yet or not."""
        return self.run_dir / "report.html"

    @property
    def times(self) -> dict[str, float]:
        """`time/<phase>` in seconds since the step that was logged last."""
        return dict(self._times)

    @contextmanager
    def span(self, phase: str) -> Iterator[None]:
        """Add the time spent inside to `time/<phase>` of the step that is logged next."""
        self._synchronize()
        start = time.perf_counter()
        try:
            with watchdog.phase(phase), self._shown(phase), record_function(phase):
                yield
        finally:
            self._synchronize()
            spent = time.perf_counter() - start
            self._times[f"time/{phase}"] += spent
            self._longest[phase] = max(self._longest[phase], spent)

    @contextmanager
    def _shown(self, phase: str) -> Iterator[None]:
        """Show a phase in the terminal, with the time that it took in the step before.

        A log hears of the parts of the first step, of evaluations and checkpoints: lines about
        every step's parts would fill it.
        """
        if not self._writes or phase == "step":  # which has a line of its own
            yield
            return
        quiet = self._stepped and phase not in ("eval", "checkpoint")
        with (
            self._display.hushed() if quiet else nullcontext(),
            self._display.shown(Phase(phase, seconds=self._expected.get(phase))),
        ):
            yield

    def log(self, step: int, metrics: Mapping[str, Any]) -> dict[str, Any]:
        """Record one step; call once per step, in order, on every rank.

        Args:
            metrics: plain numbers or one-element tensors; the spans since the last step are added.
                A value that is not finite becomes null.

        Returns:
            The record.
        """
        record = {"step": step} | {
            k: _plain(v) for k, v in (*metrics.items(), *self._times.items())
        }
        self._times.clear()
        self._expected |= self._longest
        self._longest.clear()
        self._stepped = self._stepped or "time/step" in record
        if not self._writes:
            return record
        self.records.append(record)
        for sink in self._sinks:
            with self._survived(sink.name, sink.when_full):
                sink.log(record)
        self._progress.update(record)
        if "eval/accuracy" in record:
            self.write_report()
        return record

    def keep_tokens(self, look: Callable[[], Snapshot | None] | None, newest: bool) -> None:
        """Keep a look at a step's tokens for the report: of the first step and of the newest.

        Every rank calls this, and looks alike, whatever rank 0 has kept of earlier starts.

        Args:
            look: takes it, and returns None but on rank 0; None of a step without tokens.
            newest: take it in any case; otherwise only if it is the first of this start.
        """
        if look is None or not self._num_samples or (self._looked and not newest):
            return
        self._looked = True
        snapshot = look()
        if snapshot is not None and self._writes and (newest or not self.samples.steps):
            self.samples.keep(self.samples.steps, snapshot)
            self._write_samples()

    def keep_answers(self, step: int, examples: Sequence[Example]) -> None:
        """Keep the answers of an evaluation for the report: of the first and of the newest."""
        if self._writes and examples:
            self.samples.keep(self.samples.evaluations, Answers(step, list(examples)))
            self._write_samples()

    def keep_outcome(self, step: int, correct: Sequence[int], samples: int) -> None:
        """Write evaluation.json: the right responses to each problem, of `samples`, of the newest
        evaluation. Runs are compared by it problem by problem.
        """
        file = self.run_dir / "evaluation.json"
        if self._writes:
            with self._survived(str(file), "the run cannot be compared problem by problem"):
                found = {"step": step, "samples": samples, "correct": list(correct)}
                with file_written_aside(file) as aside:
                    aside.write_text(json.dumps(found))

    def _write_samples(self) -> None:
        with self._survived(str(self._samples_file), "a resumed run's report lacks them"):
            self.samples.write(self._samples_file)

    @contextmanager
    def _survived(self, name: str, consequence: str) -> Iterator[None]:
        """Report what went wrong with a file: what only shows a run does not end it."""
        try:
            yield
        except OSError as error:
            self.note(name, f"{reason_of(error)}; {consequence}")
        except ValueError as error:  # which names the file
            self.note(name, f"{str(error).removeprefix(name + ': ')}; {consequence}")

    def note(self, key: str, text: str) -> None:
        """Tell the person at the terminal, once for each key."""
        if self._writes and key not in self._noted:
            self._noted.add(key)
            self._display.console.print(f"{key}: {text}", highlight=False, soft_wrap=True)

    def write_report(self) -> None:
        """Write report.html anew."""
        if not self._writes:
            return
        with self._survived(str(self.sessions.path), "the next start does not know of this one"):
            self.sessions.write()
        with self._survived(str(self.report_path), "some of it is lost"):
            kept = Kept.of(self.run_dir, self.samples, self.sessions.entries)
            write_report(self.report_path, self.records, self.name, self.config_yaml, kept)

    def close(self) -> None:
        """Write the report and close everything; a second time does no harm."""
        if not self._writes or not self._sinks:  # closed already
            return
        self._progress.close()
        self.write_report()
        while self._sinks:
            sink = self._sinks.pop(0)
            with self._survived(sink.name, "some of it is lost"):
                sink.close()


def _plain(value: Any) -> int | float | None:
    value = value.item() if hasattr(value, "item") else value
    return value if math.isfinite(value) else None
