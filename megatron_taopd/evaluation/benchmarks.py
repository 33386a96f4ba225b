"""The paper's six benchmarks by EvalScope, on an OpenAI-compatible server.

EvalScope runs in processes of its own, so that it may live in another environment, and reads its
data sets from local files only.
"""

from __future__ import annotations

import csv
import json
import logging
import os
import shutil
import subprocess
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from statistics import mean
from typing import Any

from megatron_taopd.checkpoints.files import sum_of
from megatron_taopd.data.records import read_records
from megatron_taopd.data.rows import as_answer
from megatron_taopd.evaluation.tables import mean_and_std
from megatron_taopd.formats.files import file_written_aside
from megatron_taopd.parallel import progress
from megatron_taopd.serving.supervise import supervised

logger = logging.getLogger(__name__)

SUFFIXES = (".jsonl", ".json", ".jsonl.gz", ".parquet", ".csv")
# Not as a script, which every process that HumanEval starts to run a program would import again.
_RUN = """
import json, os, sys
from evalscope import run_task
task = json.load(open(sys.argv[1]))
run_task(task | {"api_key": os.environ.get("TAOPD_API_KEY", "EMPTY")})
"""


class Missing(Exception):
    """There is no score for a benchmark, and why."""


@dataclass(frozen=True)
class Benchmark:
    """One of EvalScope's.

    Attributes:
        columns: of its rows, that EvalScope reads.
        defaults: of columns that may be missing, from the row's number.
        split: that EvalScope looks for.
        arguments: for EvalScope's adapter.
        runs_code: written by the model, on this machine.
    """

    columns: tuple[str, ...]
    defaults: dict[str, Callable[[int], Any]] = field(default_factory=dict)
    split: str = "test"
    arguments: dict[str, Any] = field(default_factory=dict)
    runs_code: bool = False


_AIME = Benchmark(("problem", "answer"))
PAPER = {
    "aime24": _AIME,
    "aime25": _AIME,
    "gpqa_diamond": Benchmark(
        ("Question", "Correct Answer", *(f"Incorrect Answer {i}" for i in (1, 2, 3))),
        split="train",
    ),
    "humaneval": Benchmark(
        ("task_id", "prompt", "canonical_solution", "test", "entry_point"),
        # EvalScope starts an interpreter for each program and counts that, too.
        arguments={"subset_list": ["default"], "review_timeout": 30},
        runs_code=True,
    ),
    "ifeval": Benchmark(("key", "prompt", "instruction_id_list", "kwargs"), split="train"),
    "math_500": Benchmark(
        ("problem", "answer", "level", "unique_id", "solution"),
        # Levels divide the report of EvalScope, not the score.
        {"level": lambda _: 1, "unique_id": str, "solution": lambda _: ""},
    ),
}


@dataclass(frozen=True)
class Endpoint:
    """A server, and how it is to generate."""

    url: str  # without /v1
    model: str  # as the server calls it
    max_tokens: int
    temperature: float
    top_p: float
    concurrency: int
    api_key: str | None = None
    sums: dict[str, Any] | None = None  # of the files it serves, if they are known
    ends: tuple[int, ...] = ()  # ids at which an answer ends, beside those that the server knows
    template_kwargs: dict[str, Any] = field(default_factory=dict)  # of the server's chat template


@dataclass
class Scores:
    """Holds the scores of one checkpoint."""

    checkpoint: str
    by_benchmark: dict[str, list[float]] = field(default_factory=dict)  # of each seed, in [0, 1]
    rows: dict[str, int] = field(default_factory=dict)
    missing: dict[str, str] = field(default_factory=dict)  # and why


def prepare(name: str, data: Path, out: Path, limit: int | None) -> int:
    """Write a benchmark's rows as EvalScope reads them; how many.

    Args:
        data: has a directory of the benchmark's name, with or without underscores, and in it one
            file with the original rows: .jsonl (also .gz), .json (lines), .parquet or .csv.
        out: gets `<split>.jsonl`.
        limit: the first rows only.

    Raises:
        Missing: there is no such file, or it has not the columns.
    """
    benchmark = PAPER[name]
    source = _file_of(name, data)
    try:
        rows = list(islice(_rows(source), limit))
    except ValueError as error:
        raise Missing(str(error)) from None
    if not rows:
        raise Missing(f"{source} has no rows")
    out.mkdir(parents=True, exist_ok=True)
    with open(out / f"{benchmark.split}.jsonl", "w", encoding="utf-8") as file:
        for number, row in enumerate(rows):
            row = {key: make(number) for key, make in benchmark.defaults.items()} | row
            if lacking := [column for column in benchmark.columns if column not in row]:
                raise Missing(f"{source} has no column {lacking[0]!r}")
            if "answer" in row:
                row["answer"] = _answer(row["answer"], f"{source} row {number + 1}")
            file.write(json.dumps({column: row[column] for column in benchmark.columns}) + "\n")
    return len(rows)


def _answer(value: Any, where: str) -> str:
    try:
        return as_answer(value, "answer", where)
    except ValueError as error:
        raise Missing(str(error)) from None


def _file_of(name: str, data: Path) -> Path:
    for folder in (data / name, data / name.replace("_", "")):
        if files := sorted(f for f in folder.glob("*") if f.name.endswith(SUFFIXES)):
            if len(files) > 1:
                raise Missing(f"{folder} has {len(files)} files of rows; one is expected")
            return files[0]
    raise Missing(f"no file of rows in {data / name}")


def _rows(source: Path) -> Iterator[dict[str, Any]]:
    if source.suffix == ".csv":
        with open(source, newline="", encoding="utf-8") as file:
            yield from csv.DictReader(file)
    else:
        yield from (row for _, row in read_records(source))


def score(
    name: str, data: Path, rows: int, endpoint: Endpoint, seed: int, out: Path, python: str
) -> float:
    """Return EvalScope's primary metric of one benchmark and seed, in [0, 1].

    Args:
        data: what `prepare` has written, and how many rows.
        out: directory for EvalScope's task, log, answers and report. Answers that are there to the
            same rows and settings, of the same files of the model, are taken, and only the others
            asked for; what else is there is deleted.
        python: interpreter of an environment that has EvalScope.

    Raises:
        Missing: EvalScope failed, or some row has no score.
    """
    generation = {
        "temperature": endpoint.temperature,
        "top_p": endpoint.top_p,
        "max_tokens": endpoint.max_tokens,
        "seed": seed,
    }
    extra = {
        "stop_token_ids": list(endpoint.ends),
        "chat_template_kwargs": endpoint.template_kwargs,
    }
    if extra := {key: value for key, value in extra.items() if value}:
        generation["extra_body"] = extra
    split = data / f"{PAPER[name].split}.jsonl"
    asked = {"generation": generation, "rows": sum_of(split), "model": endpoint.sums}
    asked, record = json.dumps(asked), out / "asked.json"
    known = endpoint.sums is not None and record.is_file() and record.read_text() == asked
    if not known:
        shutil.rmtree(out, ignore_errors=True)
        out.mkdir(parents=True)
        with file_written_aside(record) as aside:
            aside.write_text(asked)
    task = {
        "model": endpoint.model,
        "model_id": "model",
        "eval_type": "openai_api",
        "api_url": f"{endpoint.url}/v1",
        "datasets": [name],
        "dataset_args": {name: {"dataset_id": str(data.resolve()), **PAPER[name].arguments}},
        "generation_config": generation,
        "judge": {"strategy": "rule"},
        "eval_batch_size": endpoint.concurrency,
        "seed": seed,
        "work_dir": str(out.resolve()),
        "no_timestamp": True,
        "use_cache": str(out.resolve()) if known else None,
        "rerun_review": known,  # else the address of the server has to be the same, too
    }
    (out / "task.json").write_text(json.dumps(task, indent=1))
    environment = {
        **os.environ,
        "HF_HUB_OFFLINE": "1",
        # Beside the rows: what is below them would be read as rows, too.
        "HF_DATASETS_CACHE": str(data.resolve().with_name(f"{name}.cache")),
        "TAOPD_API_KEY": endpoint.api_key or "EMPTY",
    }
    with open(out / "output.txt", "w") as log:
        command = supervised([python, "-c", _RUN, out / "task.json"])
        code = subprocess.run(command, stdout=log, stderr=log, env=environment).returncode
    report = out / "reports" / "model" / f"{name}.json"
    if code or not report.is_file():
        raise Missing(f"EvalScope failed; see {out / 'output.txt'}")
    return _primary(json.loads(report.read_text()), rows, report)


def _primary(report: dict, rows: int, path: Path) -> float:
    identity = report["primary_metric_identity"]
    metrics = [metric for metric in report["metrics"] if metric["identity"] == identity]
    if identity is None or len(metrics) != 1:
        raise Missing(f"{path} has no primary metric")
    if (scored := metrics[0]["num"]) != rows:
        raise Missing(f"{scored} of {rows} rows have a score; see {path}")
    return metrics[0]["score"]


def evaluate(
    checkpoint: str,
    endpoint: Endpoint,
    prepared: dict[str, tuple[Path, int]],
    missing: dict[str, str],
    seeds: Sequence[int],
    out: Path,
    python: str,
) -> Scores:
    """Return all benchmarks and seeds of one checkpoint; what fails with any seed has no score.

    Args:
        prepared: of each benchmark what `prepare` has written, and how many rows.
        missing: the others, and why.
        out: gets BENCHMARK/seed_N/.
    """
    scores = Scores(checkpoint, missing=dict(missing))
    for name, (data, rows) in prepared.items():
        values = []
        try:
            for seed in progress.track(seeds, None, f"{name}, seeds"):
                folder = out / name / f"seed_{seed}"
                values.append(score(name, data, rows, endpoint, seed, folder, python))
                logger.info("%s  %s  seed %d  %.1f%%", checkpoint, name, seed, 100 * values[-1])
        except Missing as reason:
            scores.missing[name] = str(reason)
            logger.info("%s  %s  missing: %s", checkpoint, name, reason)
        else:
            scores.by_benchmark[name], scores.rows[name] = values, rows
    return scores


def average(scores: Scores) -> tuple[str, list[float]]:
    """Return what the average is of, and its value by seed; never of fewer benchmarks unsaid."""
    there = [name for name in PAPER if name in scores.by_benchmark]
    title = "six-benchmark average"
    if len(there) < len(PAPER):
        title = f"average of {len(there)} of {len(PAPER)}"
    by_seed = zip(*(scores.by_benchmark[name] for name in there), strict=True)
    return title, [mean(values) for values in by_seed]


def table(scores: Scores, seeds: Sequence[int]) -> tuple[list[str], list[list[str]]]:
    """Return header and rows of one checkpoint's benchmarks, in percent."""
    header = ["benchmark", "rows", *(f"seed {seed}" for seed in seeds), "mean ± std"]
    rows = [
        [name, str(scores.rows[name]), *(f"{100 * v:.1f}" for v in values), mean_and_std(values)]
        for name, values in scores.by_benchmark.items()
    ]
    title, values = average(scores)
    if values:
        rows.append([title, "", *(f"{100 * v:.1f}" for v in values), mean_and_std(values)])
    blank = [""] * (len(seeds) + 1)
    rows += [[name, *blank, "missing"] for name in scores.missing]
    return header, rows


def comparison(all_scores: Sequence[Scores], names: Sequence[str]) -> tuple[list[str], list]:
    """Return header and rows of several checkpoints; last the average, and of how many it is."""
    rows = []
    for scores in all_scores:
        cells = [
            mean_and_std(scores.by_benchmark[name]) if name in scores.by_benchmark else "missing"
            for name in names
        ]
        title, values = average(scores)
        last = f"{mean_and_std(values)} ({title})" if values else "none"
        rows.append([scores.checkpoint, *cells, last])
    return ["checkpoint", *names, "average"], rows
