"""What a run leaves behind for people and programs, and what it shows while it goes."""

from __future__ import annotations

import importlib.util
import json
import math
import os
import re
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from megatron_taopd.formats.files import reason_of
from megatron_taopd.monitoring.report import (
    Sample,
    answered,
    number,
    percent,
    seconds,
    summarize,
    write_report,
)
from megatron_taopd.parallel import watchdog

if TYPE_CHECKING:
    from megatron_taopd.evaluation.in_loop import Example

PLAIN_LINES = 20  # about this many progress lines where there is no terminal to redraw


class Monitor:
    """Metrics of each step → metrics.jsonl, TensorBoard, W&B, a progress line, report.html.

    Every rank may hold one, so that the loop needs no case distinctions: all ranks time their
    spans, rank 0 writes.

    Args:
        run_dir: created if need be; holds metrics.jsonl, tensorboard/ and report.html.
        steps: of the whole run.
        tensorboard: write scalars for TensorBoard.
        wandb_project: log there, too; None for not.
        prometheus: (host, port) where the newest numbers can be scraped; None for nowhere.
        rank: of this process.
        first_step: the step that is logged first. Records of this step and later ones, which a
            run killed after its last checkpoint has left, are removed.
        name: of the run; the directory's name if None.
        config_yaml: the configuration, for the report and W&B.
        synchronize: waits for the device, so that spans count the work they started
            (torch.cuda.synchronize).
        console: for the progress line.

    Raises:
        ValueError: TensorBoard or W&B is asked for and not installed (on every rank alike).
    """

    def __init__(
        self,
        run_dir: str | Path,
        steps: int,
        tensorboard: bool = True,
        wandb_project: str | None = None,
        prometheus: tuple[str, int] | None = None,
        rank: int = 0,
        first_step: int = 0,
        name: str | None = None,
        config_yaml: str = "",
        synchronize: Callable[[], None] | None = None,
        console: Console | None = None,
    ):
        if tensorboard:
            _require("tensorboard", "log.tensorboard: true")
        if wandb_project is not None:
            _require("wandb", f"log.wandb_project: {wandb_project}")
        if prometheus is not None:
            _require("prometheus_client", f"log.prometheus_port: {prometheus[1]}")
        self.run_dir = Path(run_dir)
        self.steps = steps
        self.name = name or self.run_dir.resolve().name
        self.config_yaml = config_yaml
        self.records: list[dict[str, Any]] = []
        self.samples: Sequence[Sample] = ()
        self.examples: Sequence[Example] = ()  # of the last evaluation, for the report
        self._synchronize = synchronize or (lambda: None)
        self._times: dict[str, float] = defaultdict(float)
        self._noted: set[str] = set()
        self._writes = rank == 0
        if not self._writes:
            return
        self.run_dir.mkdir(parents=True, exist_ok=True)
        self.records = truncate_records(self.run_dir / "metrics.jsonl", first_step)
        self._file = open(self.run_dir / "metrics.jsonl", "ab", buffering=0)  # noqa: SIM115
        self._unwritten = b""
        self._tensorboard = self._wandb = self._prometheus = None
        if tensorboard:
            from torch.utils.tensorboard import SummaryWriter

            self._tensorboard = SummaryWriter(
                self.run_dir / "tensorboard", purge_step=first_step or None
            )
        if wandb_project is not None:
            import wandb

            # A resumed run goes on in the same W&B run: the id is the directory's, not the name's.
            id_file = self.run_dir / "wandb_id"
            if not id_file.exists():
                id_file.write_text(wandb.util.generate_id())
            self._wandb = wandb.init(
                project=wandb_project,
                name=self.name,
                id=id_file.read_text(),
                dir=self.run_dir,
                resume="allow",
                config=yaml.safe_load(config_yaml),
            )
        if prometheus is not None:
            self._prometheus = PrometheusGauges(*prometheus, self.name)
        self._progress = ProgressLine(steps, first_step, console or Console())

    @property
    def report_path(self) -> Path:
        return self.run_dir / "report.html"

    @contextmanager
    def span(self, phase: str) -> Iterator[None]:
        """Add the time spent inside to `time/<phase>` of the step that is logged next."""
        self._synchronize()
        start = time.perf_counter()
        try:
            with watchdog.phase(phase):
                yield
        finally:
            self._synchronize()
            self._times[f"time/{phase}"] += time.perf_counter() - start

    def seconds(self, phase: str) -> float:
        """Time spent in a phase of the step that is logged next, so far."""
        return self._times[f"time/{phase}"]

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
        if not self._writes:
            return record
        self.records.append(record)
        self._unwritten += json.dumps(record).encode() + b"\n"
        self._write_records()
        values = {key: value for key, value in record.items() if value is not None}
        if self._tensorboard:
            with self._lost_on_disk_error("tensorboard"):
                for key, value in values.items():
                    self._tensorboard.add_scalar(key, value, step)
        if self._wandb:
            self._wandb.log(values, step=step)
        if self._prometheus:
            self._prometheus.set(values)
        self._progress.update(record)
        if "eval/accuracy" in record:
            self.write_report()
        return record

    def _write_records(self) -> None:
        """What cannot be written now, because the disk is full, say, is kept for the next time."""
        try:
            while self._unwritten:
                self._unwritten = self._unwritten[self._file.write(self._unwritten) :]
        except OSError as error:
            self.note(self._file.name, f"{reason_of(error)}; lines are kept and written later")

    @contextmanager
    def _lost_on_disk_error(self, name: str) -> Iterator[None]:
        """What only shows a run does not end it."""
        try:
            yield
        except OSError as error:
            self.note(str(self.run_dir / name), f"{reason_of(error)}; some of it is lost")

    def note(self, key: str, text: str) -> None:
        """Tell the person at the terminal, once for each key."""
        if self._writes and key not in self._noted:
            self._noted.add(key)
            self._progress.console.print(f"{key}: {text}", highlight=False, soft_wrap=True)

    def write_report(self, samples: Sequence[Sample] | None = None) -> None:
        """Write report.html anew; `samples` are shown from now on."""
        if samples is not None:
            self.samples = samples
        if self._writes:
            with self._lost_on_disk_error("report.html"):
                write_report(
                    self.report_path,
                    self.records,
                    self.name,
                    self.config_yaml,
                    [*self.samples, *map(answered, self.examples)],
                )

    def close(self) -> None:
        """Write the report and close everything."""
        if not self._writes:
            return
        self._progress.close()
        self.write_report()
        self._write_records()
        self._unwritten = b""
        self._file.close()
        if self._tensorboard:
            with self._lost_on_disk_error("tensorboard"):
                self._tensorboard.close()
        if self._wandb:
            self._wandb.finish()
        if self._prometheus:
            self._prometheus.close()


class PrometheusGauges:
    """The newest record at http://HOST:PORT/metrics: `taopd_time_step{run="…"}` for time/step.

    Raises:
        ValueError: the port cannot be listened on.
    """

    def __init__(self, host: str, port: int, run: str):
        from prometheus_client import CollectorRegistry, start_http_server

        self.run = run
        self.registry = CollectorRegistry()
        self.gauges: dict[str, Any] = {}
        try:
            self.server, self.thread = start_http_server(port, host, self.registry)
        except OSError as error:
            reason = reason_of(error)
            raise ValueError(f"log.prometheus_port: {port} of {host}: {reason}") from error

    def set(self, values: Mapping[str, float]) -> None:
        from prometheus_client import Gauge

        for key, value in values.items():
            if key not in self.gauges:
                name = "taopd_" + re.sub(r"\W", "_", key)
                gauge = Gauge(name, f"{key} of the last step", ["run"], registry=self.registry)
                self.gauges[key] = gauge.labels(self.run)
            self.gauges[key].set(value)

    def close(self) -> None:
        self.server.shutdown()
        self.server.server_close()
        self.thread.join()


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
        step = record["step"]
        evaluated = record.get("eval/accuracy") is not None
        self.accuracy = record["eval/accuracy"] if evaluated else self.accuracy
        text = self.text(record)
        if self.bar:
            self.bar.update(self.task, completed=step, description=text)
        elif evaluated or step % self.every == 0 or step >= self.steps:
            self.console.print(f"step {step}/{self.steps}  {text}", highlight=False, soft_wrap=True)

    def text(self, record: Mapping[str, Any]) -> str:
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
        if self.bar:
            self.bar.stop()


def truncate_records(path: Path, first_step: int) -> list[dict[str, Any]]:
    """Remove the records of `first_step` and later, and a line cut off by a kill, in one move.

    Returns:
        The records that stay.
    """
    if not path.exists():
        return []
    kept = []
    with open(path, encoding="utf-8") as lines:
        for line in lines:
            if not line.endswith("\n"):
                break
            record = json.loads(line)
            if record["step"] < first_step:
                kept.append(record)
    temporary = path.with_suffix(".tmp")
    temporary.write_text("".join(json.dumps(record) + "\n" for record in kept), encoding="utf-8")
    os.replace(temporary, path)
    return kept


def summary_table(records: Sequence[Mapping[str, Any]], report: str | Path | None = None) -> Table:
    """The end of a run in a few lines, for the terminal."""
    s = summarize(records)
    table = Table(title=f"{s['steps']} steps", title_justify="left", show_header=False)
    table.add_column(style="bold")
    table.add_column(justify="right")
    table.add_column(style="dim")
    if s["accuracy_first"] is not None:
        first, last = s["accuracy_first"], s["accuracy_last"]
        shown, change = percent(first), "one evaluation"
        if last is not None:
            shown, change = f"{shown} → {percent(last)}", f"{100 * (last - first):+.1f} points"
        table.add_row("held-out accuracy", shown, change)
    if s["loss_first"] is not None:
        table.add_row("loss", f"{number(s['loss_first'])} → {number(s['loss_last'])}", "")
    for label, part, whole in (
        ("rows kept", s["kept_rows"], s["valid_rows"]),
        ("tokens trained", s["tokens_trained"], s["tokens_rolled_out"]),
    ):
        if part is not None and whole:
            table.add_row(label, f"{part:,} of {whole:,}", percent(part / whole))
    if s["operations"] is not None:
        table.add_row("operations", percent(s["operations"]), "of full OPD's")
    table.add_section()
    total = sum(s["phases"].values())
    for phase, spent in s["phases"].items():
        table.add_row(phase, seconds(spent), percent(spent / total))
    if report is not None:
        table.caption = f"report: {os.path.relpath(report)}"
        table.caption_justify = "left"
    return table


def _plain(value: Any) -> int | float | None:
    value = value.item() if hasattr(value, "item") else value
    return value if math.isfinite(value) else None


def _require(module: str, key: str) -> None:
    if importlib.util.find_spec(module) is None:
        raise ValueError(f"{key}: {module} is not installed; pip install {module}, or leave it out")
