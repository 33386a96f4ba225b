"""Where the records of a run go: metrics.jsonl, TensorBoard, W&B, Prometheus.

A sink has `log(record)`, called once per step in order, and `close()`. Both may raise an OSError,
which does not end the run: the monitor reports it with the sink's `name` and `when_full`.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

import yaml

from megatron_taopd.config.schema import LogSection
from megatron_taopd.formats.files import reason_of

Record = Mapping[str, Any]


class Sink(Protocol):
    """What the monitor asks of a place that records go to."""

    name: str
    when_full: str

    def log(self, record: Record) -> None:
        """Take the record of one step."""

    def close(self) -> None:
        """Write what is left and let go of files and ports."""


def open_sinks(
    log: LogSection, run_dir: Path, name: str, config_yaml: str, first_step: int
) -> list[Sink]:
    """Open what the section asks for; metrics.jsonl, which every run has, is the first.

    Args:
        name: of the run.
        first_step: the step that is logged first; later records in `run_dir` are removed.

    Raises:
        ValueError: the port for Prometheus cannot be listened on.
    """
    sinks: list[Sink] = [JsonLines(run_dir / "metrics.jsonl")]
    if log.tensorboard:
        sinks.append(TensorBoard(run_dir / "tensorboard", first_step))
    if log.wandb_project is not None:
        sinks.append(WandB(run_dir, log.wandb_project, name, config_yaml))
    if log.prometheus_port:
        sinks.append(Prometheus(log.prometheus_host, log.prometheus_port, name))
    return sinks


def finite(record: Record) -> dict[str, Any]:
    """Leave out the values that were not finite."""
    return {key: value for key, value in record.items() if value is not None}


class JsonLines:
    """A file with one JSON object per step. Lines that a full disk refuses are written later."""

    when_full = "lines are kept and written later"

    def __init__(self, path: Path):
        self.name = str(path)
        # Unbuffered, so that a line is in the file as soon as the step is done.
        self._file = open(path, "ab", buffering=0)  # noqa: SIM115
        self._unwritten = b""

    def log(self, record: Record) -> None:
        self._unwritten += json.dumps(record).encode() + b"\n"
        self._write()

    def _write(self) -> None:
        while self._unwritten:
            self._unwritten = self._unwritten[self._file.write(self._unwritten) :]

    def close(self) -> None:
        with self._file:
            self._write()


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


class TensorBoard:
    """Event files with a scalar for each key."""

    when_full = "some of it is lost"

    def __init__(self, directory: Path, first_step: int):
        # Optional, and it takes seconds to import.
        from torch.utils.tensorboard import SummaryWriter

        self.name = str(directory)
        self._writer = SummaryWriter(directory, purge_step=first_step or None)

    def log(self, record: Record) -> None:
        for key, value in finite(record).items():
            self._writer.add_scalar(key, value, record["step"])

    def close(self) -> None:
        self._writer.close()


class WandB:
    """A run of Weights & Biases; a resumed run goes on in the same one."""

    when_full = "some of it is lost"

    def __init__(self, run_dir: Path, project: str, name: str, config_yaml: str):
        import wandb  # optional

        self.name = "wandb"
        # The id is the directory's, not the name's.
        id_file = run_dir / "wandb_id"
        if not id_file.exists():
            id_file.write_text(wandb.util.generate_id())
        self._run = wandb.init(
            project=project,
            name=name,
            id=id_file.read_text(),
            dir=run_dir,
            resume="allow",
            config=yaml.safe_load(config_yaml),
        )

    def log(self, record: Record) -> None:
        self._run.log(finite(record), step=record["step"])

    def close(self) -> None:
        self._run.finish()


class Prometheus:
    """The newest record at http://HOST:PORT/metrics: `taopd_time_step{run="…"}` for time/step.

    Raises:
        ValueError: the port cannot be listened on.
    """

    when_full = "some of it is lost"

    def __init__(self, host: str, port: int, run: str):
        from prometheus_client import CollectorRegistry, start_http_server  # optional

        self.name = "prometheus"
        self._run = run
        self._registry = CollectorRegistry()
        self._gauges: dict[str, Any] = {}
        try:
            self._server, self._thread = start_http_server(port, host, self._registry)
        except OSError as error:
            reason = reason_of(error)
            raise ValueError(f"log.prometheus_port: {port} of {host}: {reason}") from error

    def log(self, record: Record) -> None:
        from prometheus_client import Gauge

        for key, value in finite(record).items():
            if key not in self._gauges:
                name = "taopd_" + re.sub(r"\W", "_", key)
                gauge = Gauge(name, f"{key} of the last step", ["run"], registry=self._registry)
                self._gauges[key] = gauge.labels(self._run)
            self._gauges[key].set(value)

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()
