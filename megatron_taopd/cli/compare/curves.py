"""The logs of several runs, and where they stand at a point that all of them have reached."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from functools import reduce
from pathlib import Path

import numpy as np
import yaml

from megatron_taopd.evaluation import tables

AXES = {"kept_rows": "rows kept so far", "hours": "hours of steps so far"}
CURVES = {"eval/accuracy": "held-out accuracy", "loss": "loss"}
# What an accuracy is the accuracy of, beside the student.
MEASURE = {
    "eval": ("prompts", "limit", "samples", "temperature", "max_new_tokens", "grader"),
    "data": ("template", "system", "answer_column"),
    "rollout": ("top_p", "top_k", "stop_token_ids", "max_new_tokens"),
}
POINTS = 200  # of a curve that runs are averaged at


@dataclass
class Run:
    """The log of one run.

    Attributes:
        group: its selector, or what else runs are compared by.
        positions: of each of AXES, and of `step`, [records] where it stood after the record.
        values: of each of CURVES, [records]; NaN where it was not logged.
        numbers: [records] the step of each record; 0 is before the first.
        measure: the value of each key of MEASURE, as far as it counts.
        tree: its configuration.
    """

    path: Path
    group: str
    seed: int
    steps: int
    positions: dict[str, np.ndarray]
    values: dict[str, np.ndarray]
    numbers: np.ndarray
    measure: dict[str, object]
    tree: dict

    def curve(self, axis: str, name: str) -> tuple[np.ndarray, np.ndarray]:
        """Return positions and values of one of CURVES where it was logged."""
        there = np.isfinite(self.values[name])
        return self.positions[axis][there], self.values[name][there]


def read_all(paths: Sequence[Path], by: str) -> tuple[list[Run], list[str]]:
    """Read the runs that have logged a step, and say what is missing of the others."""
    runs, missing = [], []
    for path in paths:
        try:
            runs.append(read(path, by))
        except ValueError as error:
            missing.append(str(error))
    if not runs:
        raise ValueError(f"no run to compare: {missing[0]}")
    return runs, missing


def read(path: Path, by: str) -> Run:
    """Read one run.

    Raises:
        ValueError: it has no configuration, not that key, or no step.
    """
    config, metrics = path / "config.yaml", path / "metrics.jsonl"
    for file in (config, metrics):
        if not file.is_file():
            raise ValueError(f"{file}: no such file; is {path} a run.dir?")
    tree = yaml.safe_load(config.read_text())
    try:
        group = reduce(lambda node, name: node[name], by.split("."), tree)
    except (KeyError, TypeError):
        raise ValueError(f"{config}: has no {by}") from None
    records = read_records(metrics)
    if not any(record["step"] for record in records):
        raise ValueError(f"{metrics}: no step yet")
    hours = [step_seconds(record) / 3600 for record in records]
    return Run(
        path,
        str(group),
        tree["run"]["seed"],
        records[-1]["step"],
        {
            "kept_rows": np.cumsum(column(records, "kept_rows", 0.0)),
            "hours": np.cumsum(hours),
            "step": column(records, "step", 0.0),
        },
        {name: column(records, name, np.nan) for name in CURVES},
        column(records, "step", 0.0),
        measure_of(tree),
        tree,
    )


def measure_of(tree: dict) -> dict[str, object]:
    """Pick the keys that a run measures accuracy by. Greedy responses have no top_p and top_k, and
    those of an evaluation may have a length of their own.
    """
    values = {
        f"{section}.{key}": (tree.get(section) or {}).get(key)
        for section, keys in MEASURE.items()
        for key in keys
    }
    if not values["eval.temperature"]:
        del values["rollout.top_p"], values["rollout.top_k"]
    if values["eval.max_new_tokens"] is None:
        values["eval.max_new_tokens"] = values["rollout.max_new_tokens"]
    del values["rollout.max_new_tokens"]
    return values


def read_records(metrics: Path) -> list[dict]:
    """Read all whole lines: the last one of a run that goes on may be cut off."""
    lines = metrics.read_text().splitlines(keepends=True)
    return [json.loads(line) for line in lines if line.endswith("\n")]


def column(records: Sequence[dict], name: str, default: float) -> np.ndarray:
    """Return one metric of all records, `default` where it was not logged."""
    values = [record.get(name) for record in records]
    return np.array([default if value is None else value for value in values], dtype=float)


def step_seconds(record: dict) -> float:
    """Return the time of a step, of which evaluation and checkpoint are no part."""
    return record.get("time/step") or 0.0


def grouped(runs: Sequence[Run]) -> dict[str, list[Run]]:
    """Sort runs by seed, group by group."""
    groups = defaultdict(list)
    for run in sorted(runs, key=lambda run: (run.group, run.seed)):
        groups[run.group].append(run)
    return groups


def compare(runs: Sequence[Run], axis: str) -> dict:
    """Compare the groups where the shortest run has got to on this axis.

    Accuracy there is that of the last evaluation before it; the loss is the mean over the last
    tenth of the way, as single steps are noisy.
    """
    at = min(float(run.positions[axis][-1]) for run in runs)
    groups = {}
    for name, members in grouped(runs).items():
        figures = {
            "accuracy": [last_value(*run.curve(axis, "eval/accuracy"), at) for run in members],
            "loss": [mean_value(*run.curve(axis, "loss"), 0.9 * at, at) for run in members],
        }
        groups[name] = {
            "seeds": [run.seed for run in members],
            "steps": [
                int(last_value(run.positions[axis], run.numbers, at) or 0) for run in members
            ],
        } | figures
    return {"at": at, "groups": groups}


def last_value(positions: np.ndarray, values: np.ndarray, at: float) -> float | None:
    """Return the last value up to a position."""
    reached = values[positions <= at * (1 + 1e-9)]
    return float(reached[-1]) if len(reached) else None


def mean_value(positions: np.ndarray, values: np.ndarray, start: float, at: float) -> float | None:
    """Return the mean of the values between two positions, or else the last one before."""
    inside = values[(positions > start) & (positions <= at * (1 + 1e-9))]
    return float(inside.mean()) if len(inside) else last_value(positions, values, at)


def lacking(runs: Sequence[Run]) -> list[str]:
    """List what a comparison of these runs has to do without."""
    lines = []
    for run in runs:
        for name in CURVES:
            if not np.isfinite(run.values[name]).any():
                lines.append(f"{run.path}: never logged {name}")
    groups = grouped(runs)
    seeds = {run.seed for run in runs}
    for name, members in groups.items():
        if absent := sorted(seeds - {run.seed for run in members}):
            lines.append(f"{name}: no run with seed {', '.join(map(str, absent))}")
    longest = max(run.steps for run in runs)
    for run in runs:
        if run.steps < longest:
            lines.append(f"{run.path}: {run.steps} of {longest} steps")
    return lines


def unlike(runs: Sequence[Run], by: str) -> list[str]:
    """List the keys in which runs differ so that their accuracies are of different things."""
    lines = []
    for key in dict.fromkeys(key for run in runs for key in run.measure):
        values: list = []
        for run in runs:
            if (value := run.measure.get(key)) not in values:
                values.append(value)
        if len(values) > 1 and key != by:
            shown = " and ".join(map(repr, values))
            lines.append(f"{key}: {shown}; their accuracies do not compare")
    return lines


def as_rows(compared: dict, by: str) -> tuple[list[str], list[list[str]]]:
    """Lay out a line for each group."""
    header = [by, "seeds", "steps", "accuracy in %", "loss"]
    rows = []
    for name, group in compared["groups"].items():
        accuracies = [value for value in group["accuracy"] if value is not None]
        losses = [value for value in group["loss"] if value is not None]
        steps = sorted(set(group["steps"]))
        rows.append(
            [
                name,
                str(len(group["seeds"])),
                f"{steps[0]}" if len(steps) == 1 else f"{steps[0]}–{steps[-1]}",
                of_seeds(accuracies, group, 100, 1),
                of_seeds(losses, group, 1, 4),
            ]
        )
    return header, rows


def of_seeds(values: list[float], group: dict, scale: float, digits: int) -> str:
    """Format mean and deviation, and of how many seeds they are where some have none."""
    if not values:
        return "none"
    text = tables.mean_and_std(values, scale, digits)
    few = len(values) < len(group["seeds"])
    return f"{text} ({len(values)} of {len(group['seeds'])})" if few else text


def number(value: float) -> str:
    """Format a number with no more digits than say something."""
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def band(members: Sequence[Run], axis: str, name: str) -> tuple[np.ndarray, ...] | None:
    """Average several runs where all of them have values: positions, mean, standard deviation."""
    curves = [run.curve(axis, name) for run in members]
    curves = [(x, y) for x, y in curves if len(x)]
    if not curves:
        return None
    start, end = max(x[0] for x, _ in curves), min(x[-1] for x, _ in curves)
    grid = np.linspace(start, end, POINTS) if end > start else np.array([start])
    values = np.stack([np.interp(grid, x, y) for x, y in curves])
    spread = values.std(axis=0, ddof=1) if len(curves) > 1 else np.zeros(len(grid))
    return grid, values.mean(axis=0), spread
