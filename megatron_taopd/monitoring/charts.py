"""Line charts over the steps of a run, as the numbers that chart.html draws.

A chart is inline SVG in the page's own colours, so that it is sharp at any size and follows the
reader's light or dark theme. Lines are in the chart's own units, WIDTH × HEIGHT, and stretched to
the room that there is; the texts of its axes are not in it, but stand in percent of its sides, so
that they have the same size on a telephone.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from statistics import fmean
from typing import Any

from megatron_taopd.monitoring.numbers import number, percent, seconds
from megatron_taopd.monitoring.summary import PHASES, Points, Record, column, phase_times
from megatron_taopd.monitoring.throughput import PHASES as MEASURED

WIDTH, HEIGHT = 600, 200
LOG_DECADES = 5
MOST_POINTS = 240  # per line; longer runs are averaged over neighbouring steps
COLORS = {phase: color for color, phase in enumerate(PHASES, 1)}  # of phases, by their place


@dataclass(frozen=True)
class Line:
    """A line, or the upper edge of a stacked area.

    Attributes:
        color: 1–9, an entry of the page's palette.
        band: (step, low), (step, high): a range drawn behind the line.
        smooth: draw a running mean, with the values themselves faintly behind it.
        marks: draw a dot at each point.
    """

    label: str
    points: Points
    color: int = 1
    band: tuple[Points, Points] | None = None
    smooth: bool = False
    marks: bool = False


@dataclass(frozen=True)
class Chart:
    """A plot over steps, from zero up or, if `log`, over at most LOG_DECADES powers of ten.

    Attributes:
        limit: a value that is drawn across as a rule, if it is not far above all others, and its
            name.
        along: what the horizontal axis is, and `whole` whether it counts something.
    """

    title: str
    note: str
    lines: list[Line]
    format: Callable[[float], str]
    log: bool = False
    stacked: bool = False
    limit: tuple[float, str] | None = None
    along: str = "step"
    whole: bool = True


@dataclass(frozen=True)
class Scale:
    """Where values of both axes lie in the chart."""

    x_low: float
    x_high: float
    y_ticks: list[float]
    log: bool

    def x(self, value: float) -> float:
        """Place a step."""
        return WIDTH * (value - self.x_low) / (self.x_high - self.x_low)

    def y(self, value: float) -> float:
        """Place a value; on a logarithmic axis those below its end lie on it."""
        low, high = self.y_ticks[0], self.y_ticks[-1]
        if self.log:
            share = math.log(max(value, low) / low) / math.log(high / low)
        else:
            share = (value - low) / (high - low)
        return HEIGHT * (1 - share)

    def path(self, points: Points) -> str:
        """Write the SVG path through some points."""
        return "M" + "L".join(f"{self.x(x):.1f} {self.y(y):.1f}" for x, y in points)

    def area(self, upper: Points, lower: Points) -> str:
        """Write the SVG path around what lies between two lines."""
        return f"{self.path(upper)}L{self.path(lower[::-1])[1:]}Z"


def charts_of(
    records: Sequence[Record], config: Mapping[str, Any], sampling: str, ranks: Points = ()
) -> list[dict[str, Any]]:
    """Prepare every chart for which there is something in the records, for chart.html.

    Args:
        config: of the run, as in its YAML file.
        sampling: how evaluations draw their responses, in words.
        ranks: (first step, ranks) of each start of the run.
    """
    charts = _charts(records, config, sampling, ranks)
    return [drawn(chart) for chart in charts if any(line.points for line in chart.lines)]


def _charts(
    records: Sequence[Record], config: Mapping[str, Any], sampling: str, ranks: Points
) -> list[Chart]:
    def line(key: str, label: str, color: int = 1, **options) -> Line:
        return Line(label, column(records, key), color, **options)

    def quantiles(name: str, label: str, color: int) -> Line:
        low, middle, high = (
            column(records, f"scores/{name}_{quantile}") for quantile in ("q05", "q50", "q95")
        )
        return Line(label, middle, color, band=(low, high))

    def share(part: str, whole: str, label: str, color: int) -> Line:
        wholes = dict(column(records, whole))
        points = [(x, y / wholes[x]) for x, y in column(records, part) if wholes.get(x)]
        return Line(label, points, color)

    loss = str((config.get("loss") or {}).get("kind", "divergence")).replace("_", " ")
    trained = [record for record in records if "loss" in record]
    ends = (column(records, "eval/accuracy_low"), column(records, "eval/accuracy_high"))
    interval = "95 % interval (Wilson)" if all(ends) else ""
    clip = float((config.get("optimizer") or {}).get("clip") or 0)
    throughput = tokens_per_second(records)
    return [
        Chart(
            "Held-out accuracy",
            ", ".join(filter(None, [sampling, "checkable answers", interval])),
            [line("eval/accuracy", "accuracy", marks=True, band=ends)],
            percent,
        ),
        Chart(
            "Loss",
            f"{loss}, mean over the kept rows of the batch, nats",
            [line("loss", "loss", smooth=True)],
            number,
        ),
        Chart(
            "What is trained on",
            "rows that carry loss; tokens that the training pass runs",
            [
                share("kept_rows", "valid_rows", "kept rows / response rows", 1),
                share("tokens_trained", "tokens_rolled_out", "tokens trained / rolled out", 2),
            ],
            percent,
        ),
        Chart(
            "Operations",
            "of teacher, scoring and training, by formula; full OPD is 100 %",
            [line("flops/of_full_opd", "share of full OPD's operations")],
            percent,
        ),
        Chart(
            "Gradient norm",
            _about_clipping(column(records, "grad_norm"), clip),
            [line("grad_norm", "gradient norm", smooth=True)],
            number,
            limit=(clip, "optimizer.clip") if clip else None,
        ),
        Chart(
            "Disagreement D",
            "top-K union, nats, log scale · median, 5–95 % of rows",
            [quantiles("disagreement", "D", 2)],
            number,
            log=True,
        ),
        Chart(
            "Compatibility C",
            "teacher mass on the student's top-K · median, 5–95 % of rows",
            [quantiles("compatibility", "C", 3)],
            number,
        ),
        Chart(
            "Top-K overlap",
            "share of the student's top-K that is in the teacher's, mean over the rows",
            [line("selection/topk_overlap", "overlap", 3, smooth=True)],
            percent,
        ),
        Chart(
            "Entropy H",
            "full vocabulary, nats · medians, 5–95 % of the student's rows",
            [
                quantiles("student_entropy", "student", 1),
                line("scores/teacher_entropy_q50", "teacher", 2),
            ],
            number,
        ),
        Chart(
            "Engine–trainer gap",
            "|Δ log p| of the sampled tokens, nats, log scale",
            [
                line("rollout/logprob_gap_max", "largest", 2),
                line("rollout/logprob_gap_mean", "mean", 1),
            ],
            number,
            log=True,
        ),
        Chart(
            "Time per step",
            "phases of rank 0, stacked; evaluation and checkpoint follow the step",
            [Line(phase, phase_times(trained, phase), color) for phase, color in COLORS.items()],
            seconds,
            stacked=True,
        ),
        Chart(
            "Tokens per second",
            "prompts and responses of a step, over its time",
            [
                Line("all ranks", throughput, 1, smooth=True),
                Line(
                    "per device",
                    column(records, "perf/tokens_per_second_per_gpu")
                    or _per_device(throughput, ranks),  # of runs from before there was the metric
                    2,
                    smooth=True,
                ),
            ],
            number,
        ),
        Chart(
            "Model FLOPs utilization",
            "operations by formula, recomputation left out, over what the devices can do",
            [
                line("perf/mfu", "step", 1, smooth=True),
                *(
                    line(f"perf/mfu_{phase}", phase, color, smooth=True)
                    for color, phase in enumerate(MEASURED, 2)
                ),
            ],
            percent,
        ),
        Chart(
            "Response length",
            "mean tokens, the stop token included",
            [
                line("rollout/response_length_mean", "tokens", 4, smooth=True),
                line("rollout/horizon", "horizon", 2),
            ],
            number,
        ),
        Chart(
            "Truncated responses",
            "share that hit the length limit",
            [line("rollout/truncated_share", "truncated", 4, smooth=True)],
            percent,
        ),
        Chart("Learning rate", "", [line("lr", "learning rate")], number),
    ]


def drawn(chart: Chart) -> dict[str, Any]:
    """Prepare a chart with at least one point for chart.html.

    Returns:
        `title`, `note`, `along`; `legend`, (color, label) of the lines, empty if there is one only;
        `rows` and `columns`, (percent from the top or left, text) of the ticks; `paths`, (class,
        color, d); `limit`, (percent from the top, text) or None; `hover`, what charts.js shows;
        `words`, the ends of each line for those who do not see them.
    """
    lines = [line for line in chart.lines if line.points]
    shown = _stack(lines) if chart.stacked else lines
    scale = _scale(chart, shown)
    paths = []
    floor: Points = [(scale.x_low, scale.y_ticks[0]), (scale.x_high, scale.y_ticks[0])]
    for line in shown:
        if chart.stacked:
            paths.append(("area", line.color, scale.area(line.points, floor)))
            floor = line.points
            continue
        if line.band and all(line.band):
            low, high = (_thin(edge) for edge in line.band)
            paths.append(("band", line.color, scale.area(high, low)))
        points = _thin(line.points)
        if line.smooth and len(points) > 8:
            paths.append(("raw", line.color, scale.path(points)))
            points = _smooth(points)
        paths.append(("line", line.color, scale.path(points)))
        if line.marks:
            paths.append(("dots", line.color, dots((scale.x(x), scale.y(y)) for x, y in points)))
    limit = None
    if chart.limit and scale.y_ticks[0] <= chart.limit[0] <= scale.y_ticks[-1]:
        value, name = chart.limit
        limit = (f"{100 * scale.y(value) / HEIGHT:.1f}", f"{name} {chart.format(value)}")
    return {
        "title": chart.title,
        "note": chart.note,
        "along": chart.along,
        "legend": [(line.color, line.label) for line in lines] if len(lines) > 1 else [],
        "rows": [(f"{100 * scale.y(y) / HEIGHT:.1f}", chart.format(y)) for y in scale.y_ticks],
        "columns": [
            (f"{100 * scale.x(x) / WIDTH:.1f}", number(x) if x >= 1e4 else f"{x:g}")
            for x in ticks(scale.x_low, scale.x_high)
            if scale.x_low <= x <= scale.x_high and (x == int(x) or not chart.whole)
        ],
        "paths": paths,
        "limit": limit,
        "hover": _hover(chart, scale),
        "words": _words(chart, lines),
    }


def dots(points: Iterable[tuple[float, float]]) -> str:
    """Write the SVG path of dots, which have the width of its stroke, however it is stretched."""
    return "".join(f"M{x:.1f} {y:.1f}h0" for x, y in points)


def tokens_per_second(records: Sequence[Record]) -> Points:
    """List (step, tokens of prompts and responses over the step's seconds)."""
    times = dict(column(records, "time/step"))
    counts = column(records, "tokens_rolled_out")
    return [(step, tokens / times[step]) for step, tokens in counts if times.get(step)]


def _per_device(throughput: Points, ranks: Points) -> Points:
    """Divide by the ranks that the run had at each step; nothing if it never had several."""
    if all(number <= 1 for _, number in ranks):
        return []
    return [
        (step, y / [number for first, number in ranks if first <= step or first == ranks[0][0]][-1])
        for step, y in throughput
    ]


def _about_clipping(norms: Points, clip: float) -> str:
    if not clip or not norms:
        return "before clipping" if norms else ""
    share = sum(norm > clip for _, norm in norms) / len(norms)
    return f"before clipping at {number(clip)}, which {percent(share)} of the steps exceed"


def _words(chart: Chart, lines: list[Line]) -> str:
    """Say from what to what each line goes."""
    said = []
    for line in lines:
        (first, start), (last, end) = line.points[0], line.points[-1]
        values = f"{chart.format(start)} at {chart.along} {number(first)}"
        if last != first:
            values += f", {chart.format(end)} at {chart.along} {number(last)}"
        said.append(f"{line.label} {values}")
    return "; ".join(said)


def _scale(chart: Chart, lines: list[Line]) -> Scale:
    """Choose the range of both axes so that all lines and bands fit."""
    xs = [x for line in lines for x, _ in line.points]
    edges = chain.from_iterable(line.band or () for line in lines)
    ys = [y for points in chain((line.points for line in lines), edges) for _, y in points]
    if chart.log:
        positive = [y for y in ys if y > 1e-30] or [1.0]
        top = math.ceil(math.log10(max(positive)))
        bottom = max(math.floor(math.log10(min(positive))), top - LOG_DECADES)
        y_ticks = [10.0**power for power in range(min(bottom, top - 1), top + 1)]
    else:
        if chart.limit and chart.limit[0] <= 3 * max(ys):
            ys.append(chart.limit[0])
        y_ticks = ticks(min(0.0, *ys), max(ys))
    end = max(xs) if max(xs) > min(xs) else min(xs) + 1
    return Scale(min(xs), end, y_ticks, chart.log)


def _hover(chart: Chart, scale: Scale) -> dict[str, Any]:
    """Format the values by step, so that the script needs to know nothing of formats."""
    lines = [line for line in chart.lines if line.points]
    by_step: dict[float, dict[int, str]] = {}
    for i, line in enumerate(lines):
        edges = [dict(edge) for edge in line.band] if line.band else []
        for x, y in line.points[:: math.ceil(len(line.points) / MOST_POINTS)]:
            text = chart.format(y)
            if edges and all(x in edge for edge in edges):
                text += f" ({' – '.join(chart.format(edge[x]) for edge in edges)})"
            by_step.setdefault(x, {})[i] = text
    return {
        "labels": [line.label for line in lines],
        "colors": [line.color for line in lines],
        "at": [
            [x if chart.whole else number(x), round(100 * scale.x(x) / WIDTH, 1), by_step[x]]
            for x in sorted(by_step)
        ],
    }


def _stack(lines: list[Line]) -> list[Line]:
    """Add the lines up, at every step that any of them has."""
    steps = sorted({x for line in lines for x, _ in line.points})
    total = dict.fromkeys(steps, 0.0)
    stacked = []
    for line in lines:
        for x, y in line.points:
            total[x] += y
        stacked.append(Line(line.label, _thin(sorted(total.items())), line.color))
    return stacked


def _thin(points: Points) -> Points:
    """Average neighbouring steps until there are at most MOST_POINTS points."""
    size = math.ceil(len(points) / MOST_POINTS)
    if size <= 1:
        return points
    groups = (points[start : start + size] for start in range(0, len(points), size))
    return [(fmean(x for x, _ in group), fmean(y for _, y in group)) for group in groups]


def _smooth(points: Points) -> Points:
    """Replace each value by the mean over about a tenth of the points around it."""
    reach = max(2, len(points) // 20)
    return [
        (x, fmean(y for _, y in points[max(0, i - reach) : i + reach + 1]))
        for i, (x, _) in enumerate(points)
    ]


def ticks(low: float, high: float, count: int = 4) -> list[float]:
    """Choose about `count` + 1 round values that enclose [low, high]."""
    size = max(abs(low), abs(high))
    if size < 1e-300:
        return [0.0, 1.0]
    span = high - low if high - low > 1e-9 * size else size
    magnitude = 10.0 ** math.floor(math.log10(span / count))
    step = next(m * magnitude for m in (1, 2, 2.5, 5, 10) if m * magnitude * count >= span * 0.999)
    first = math.floor(low / step + 1e-9)
    last = max(math.ceil(high / step - 1e-9), first + 1)
    return [float(f"{i * step:.12g}") for i in range(first, last + 1)]
