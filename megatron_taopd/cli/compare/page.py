"""comparison.html: several runs in one page, drawn like the report of one."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from megatron_taopd.cli.compare.curves import AXES, CURVES, Run, as_rows, band, grouped
from megatron_taopd.diagnostics.bootstrap import t_interval
from megatron_taopd.formats.files import file_written_aside
from megatron_taopd.monitoring import charts
from megatron_taopd.monitoring.numbers import number, percent, seconds
from megatron_taopd.monitoring.pages import environment

COLORS = 8  # of the page's palette, for groups one after the other
FORMATS = {"eval/accuracy": percent, "loss": number}
# What runs are expected to differ in.
EXPECTED = ("run.dir", "run.seed", "run.name")
SHARE = (0.0, 1.0)  # the bounds of one


def write(
    path: Path, runs: Sequence[Run], by: str, compared: Mapping[str, dict], remarks: Sequence[str]
) -> None:
    """Write the page in one move.

    Args:
        compared: of each of AXES, what `curves.compare` says.
        remarks: what the comparison has to do without, in lines.

    Raises:
        ValueError: it cannot be written.
    """
    with file_written_aside(path) as aside:
        aside.write_text(render(runs, by, compared, remarks), encoding="utf-8")


def render(
    runs: Sequence[Run], by: str, compared: Mapping[str, dict], remarks: Sequence[str]
) -> str:
    """Render the page as HTML."""
    tables = []
    for axis, figures in compared.items():
        header, rows = as_rows(figures, by)
        tables.append((f"At equal {AXES[axis]}: {number(figures['at'])}", header, rows))
    return (
        environment()
        .get_template("comparison.html")
        .render(
            by=by,
            runs=runs,
            groups=grouped(runs),
            final=final(runs),
            tables=tables,
            charts=[charts.drawn(chart) for chart in drawings(runs) if any_points(chart)],
            size=(charts.WIDTH, charts.HEIGHT),
            differences=differences(runs, by),
            remarks=remarks,
        )
    )


def any_points(chart: charts.Chart) -> bool:
    """Tell whether there is something to draw."""
    return any(line.points for line in chart.lines)


def drawings(runs: Sequence[Run]) -> list[charts.Chart]:
    """Draw each curve along the steps and along each of AXES: a line for each group."""
    drawn = []
    for name, label in CURVES.items():
        for axis, along in {"step": "step", **AXES}.items():
            lines = []
            for place, (group, members) in enumerate(grouped(runs).items()):
                if (curve := band(members, axis, name)) is None:
                    continue
                x, middle, spread = (values.tolist() for values in curve)
                edges = None
                if any(spread):
                    edges = tuple(
                        [(at, m + sign * s) for at, m, s in zip(x, middle, spread, strict=True)]
                        for sign in (-1, 1)
                    )
                points = list(zip(x, middle, strict=True))
                lines.append(charts.Line(group, points, 1 + place % COLORS, edges))  # type: ignore[arg-type]
            drawn.append(
                charts.Chart(
                    f"{label[0].upper()}{label[1:]} by {along}",
                    "mean of the seeds, ± their standard deviation",
                    lines,
                    FORMATS[name],
                    along=along,
                    whole=axis != "hours",
                )
            )
    return drawn


def final(runs: Sequence[Run]) -> tuple[list[str], list[list[str]]]:
    """Lay out where each group has ended, with intervals over its seeds: header, rows."""
    header = [
        "runs",
        "seeds",
        "steps",
        "accuracy before",
        "accuracy after",
        "loss",
        "time of steps",
    ]
    rows = []
    for group, members in grouped(runs).items():
        before, after = ([] for _ in range(2))
        for run in members:
            _, accuracy = run.curve("step", "eval/accuracy")
            before += accuracy[:1].tolist()
            after += accuracy[-1:].tolist()
        losses = [_last_tenth(run) for run in members]
        hours = np.mean([run.positions["hours"][-1] for run in members])
        steps = sorted({run.steps for run in members})
        rows.append(
            [
                group,
                ", ".join(str(run.seed) for run in members),
                f"{steps[0]}" if len(steps) == 1 else f"{steps[0]}–{steps[-1]}",
                over_seeds(before, percent, SHARE),
                over_seeds(after, percent, SHARE),
                over_seeds([loss for loss in losses if loss is not None], number),
                seconds(3600 * float(hours)),
            ]
        )
    return header, rows


def over_seeds(
    values: Sequence[float],
    written: Callable[[float], str],
    bounds: tuple[float, float] = (-math.inf, math.inf),
) -> str:
    """Write a mean and its 95 % interval over seeds (t), cut at bounds; one value has none."""
    if not values:
        return "none"
    mean = written(float(np.mean(values)))
    if len(values) == 1:
        return mean
    _, low, high = t_interval(np.array(values)).clip(*bounds).tolist()
    return f"{mean} [{written(low)}, {written(high)}]"


def _last_tenth(run: Run) -> float | None:
    _, losses = run.curve("step", "loss")
    return float(losses[-max(1, len(losses) // 10) :].mean()) if len(losses) else None


def differences(runs: Sequence[Run], by: str) -> list[tuple[str, list[tuple[str, str]]]]:
    """List the keys in which the runs differ, and of each value whose it is.

    Keys that are the same in all runs are left out, and those that seeds differ in.
    """
    flat = {run.path.name: dict(flatten(run.tree)) for run in runs}
    found = []
    for key in dict.fromkeys(key for values in flat.values() for key in values):
        of: dict[str, list[str]] = {}
        for name, values in flat.items():
            shown = yaml.safe_dump(values.get(key), default_flow_style=True).strip()
            of.setdefault(shown.removesuffix("...").strip(), []).append(name)
        if len(of) > 1 and key not in EXPECTED:
            found.append((key, [(value, ", ".join(names)) for value, names in of.items()]))
    return sorted(found, key=lambda each: each[0] != by)


def flatten(tree: Mapping[str, Any], prefix: str = "") -> list[tuple[str, Any]]:
    """List dotted keys and their values."""
    pairs: list[tuple[str, Any]] = []
    for name, value in tree.items():
        if isinstance(value, dict):
            pairs += flatten(value, f"{prefix}{name}.")
        else:
            pairs.append((f"{prefix}{name}", value))
    return pairs
