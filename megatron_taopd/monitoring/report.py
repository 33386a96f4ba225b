"""report.html: one self-contained page about a run, drawn from the records of metrics.jsonl.

Charts are inline SVG in the page's own colours, so they are sharp at any size and follow the
reader's light or dark theme; a few lines of script show the values under the pointer.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from html import escape
from itertools import pairwise
from pathlib import Path
from statistics import fmean, median
from typing import TYPE_CHECKING, Any

import yaml
from torch import Tensor

from megatron_taopd.types import RolloutBatch

if TYPE_CHECKING:
    from megatron_taopd.evaluation.in_loop import Example

PHASES = (
    "rollout",
    "teacher",
    "scoring",
    "selection",
    "training",
    "sync",
    "eval",
    "checkpoint",
)
WIDTH, HEIGHT = 560, 230  # of a chart, in its own units
LEFT, RIGHT, TOP, BOTTOM = 52, 14, 10, 26
LOG_DECADES = 5
MOST_POINTS = 240  # per line; longer runs are averaged over neighbouring steps

Record = Mapping[str, Any]
Points = list[tuple[float, float]]


@dataclass(frozen=True)
class Sample:
    """One response to show, token by token.

    Attributes:
        prompt: as a person reads it.
        tokens: the text of each response token.
        kept: whether each of them was trained on; None: it is an answer to a held-out prompt.
        scores: a number of each token to show under the pointer (its teachability, say).
        correct: whether the answer was right, if known.
        note: further words on it.
    """

    prompt: str
    tokens: Sequence[str]
    kept: Sequence[bool] | None
    scores: Sequence[float] | None = None
    correct: bool | None = None
    note: str = ""


def sample_rollouts(
    batch: RolloutBatch,
    kept: Tensor,
    tokenizer,
    count: int = 6,
    scores: Tensor | None = None,
    most_tokens: int = 400,
) -> list[Sample]:
    """The first `count` sequences of a batch of which a row was kept, to show in the report.

    Args:
        kept: [R] bool, the rows trained on.
        scores: [R] float32, what to show of each row under the pointer.
        most_tokens: shown of a response.
    """
    samples = []
    cu_rows = batch.cu_rows.tolist()
    for i in range(batch.num_sequences):
        if len(samples) == count:
            break
        rows = slice(cu_rows[i], min(cu_rows[i + 1], cu_rows[i] + most_tokens))
        if not kept[rows].any():
            continue
        prompt, response = batch.sequence(i).tensor_split([int(batch.prompt_lengths[i])])
        # A token's text can depend on those before it (spaces, bytes of one character).
        texts = [tokenizer.decode(response[:n]) for n in range(len(kept[rows]) + 1)]
        samples.append(
            Sample(
                prompt=tokenizer.decode(prompt, skip_special_tokens=True),
                tokens=[after[len(before) :] for before, after in pairwise(texts)],
                kept=kept[rows].tolist(),
                scores=None if scores is None else scores[rows].tolist(),
            )
        )
    return samples


def answered(example: Example, most_characters: int = 2000) -> Sample:
    """An example of an evaluation, to show in the report."""
    response = example.response
    if len(response) > most_characters:
        half = most_characters // 2
        response = f"{response[:half]} … {response[-half:]}"
    stated = f"it says {example.answer}" if example.answer else "it states no answer"
    note = f"{stated}; the reference is {example.gold}"
    return Sample(example.prompt, [response], None, correct=example.correct, note=note)


def write_report(
    path: str | Path,
    records: Sequence[Record],
    name: str,
    config_yaml: str = "",
    samples: Sequence[Sample] = (),
) -> None:
    """Write the page in one move, so that a reader never finds half of it."""
    temporary = Path(f"{path}.tmp")
    temporary.write_text(render_report(records, name, config_yaml, samples), encoding="utf-8")
    os.replace(temporary, path)


def render_report(
    records: Sequence[Record], name: str, config_yaml: str = "", samples: Sequence[Sample] = ()
) -> str:
    """The page as HTML.

    Args:
        records: those of metrics.jsonl, by step; what they lack is left out of the page.
        name: of the run.
        config_yaml: the whole configuration.
    """
    config = yaml.safe_load(config_yaml) or {}
    sections = [
        f"<header><p class=eyebrow>Megatron TA-OPD</p><h1>{escape(name)}</h1>",
        f"{_facts(config)}</header>",
        _figures(records, config),
        f"<section class=charts>{''.join(_charts(records, config))}</section>",
        _samples(samples, config),
        _time_table(records),
    ]
    if config_yaml:
        sections.append(
            f"<section><details><summary>Full configuration</summary>"
            f"<pre>{escape(config_yaml)}</pre></details></section>"
        )
    return (
        '<!doctype html><html lang=en><head><meta charset=utf-8><meta name=viewport content="'
        f'width=device-width, initial-scale=1"><title>{escape(name)} · TA-OPD</title>'
        f"<style>{CSS}</style></head><body><main>{''.join(sections)}</main>"
        f"<script>{SCRIPT}</script></body></html>\n"
    )


# --- what the page says -------------------------------------------------------------------------


def summarize(records: Sequence[Record]) -> dict[str, Any]:
    """The figures of a run that fit on a card: None where the records lack them.

    Returns:
        `steps`, the last step; `accuracy_first`, `accuracy_last`; `loss_first`, `loss_last`, means
        over the first and last tenth of the steps; `kept_rows`, `valid_rows`, `tokens_trained`,
        `tokens_rolled_out`, sums over the run; `operations`, the mean share of full OPD's;
        `step_time`, the median in seconds; `gap`, the mean
        engine–trainer gap in nats; `phases`, the total seconds of each phase, longest first.
    """
    accuracy = [value for _, value in column(records, "eval/accuracy")]
    loss = [value for _, value in column(records, "loss")]
    tenth = max(1, len(loss) // 10)
    gap = [value for _, value in column(records, "rollout/logprob_gap_mean")]
    operations = [value for _, value in column(records, "flops/of_full_opd")]
    step_times = [value for _, value in column(records, "time/step")]
    phases = {phase: sum(v for _, v in column(records, f"time/{phase}")) for phase in PHASES}
    counts = {}
    for key in ("kept_rows", "valid_rows", "tokens_trained", "tokens_rolled_out"):
        values = [value for _, value in column(records, key)]
        counts[key] = int(sum(values)) if values else None
    return {
        "steps": int(records[-1]["step"]) if records else 0,
        "accuracy_first": accuracy[0] if accuracy else None,
        "accuracy_last": accuracy[-1] if len(accuracy) > 1 else None,
        "loss_first": fmean(loss[:tenth]) if loss else None,
        "loss_last": fmean(loss[-tenth:]) if loss else None,
        **counts,
        "operations": fmean(operations) if operations else None,
        "step_time": median(step_times) if step_times else None,
        "gap": fmean(gap) if gap else None,
        "phases": {
            phase: spent
            for phase, spent in sorted(phases.items(), key=lambda item: -item[1])
            if spent > 0
        },
    }


def column(records: Sequence[Record], key: str) -> Points:
    """(step, value) of the records that have a finite value under this key."""
    return [
        (record["step"], float(record[key]))
        for record in records
        if record.get(key) is not None and math.isfinite(record[key])
    ]


def _facts(config: Mapping[str, Any]) -> str:
    """One line on what was run."""

    def get(key: str) -> Any:
        value: Any = config
        for part in key.split("."):
            value = value.get(part) if isinstance(value, dict) else None
        return value

    def model(role: str) -> str | None:
        if not get(f"{role}.path"):
            return None
        layout = f"TP{get(f'{role}.parallel.tp') or 1} PP{get(f'{role}.parallel.pp') or 1}"
        if (experts := get(f"{role}.parallel.ep") or 1) > 1:
            layout += f" EP{experts}"
        if get(f"{role}.engine") == "sglang":
            bounds = f", top {get(f'{role}.topk')} (scores are bounds)"
            layout = "SGLang" + (bounds if get(f"{role}.form") == "topk" else "")
        return f"<b>{escape(Path(get(f'{role}.path')).name)}</b> <i>{layout}</i>"

    facts = []
    if model("teacher") and model("student"):
        facts.append(f"{model('teacher')} → {model('student')}")
    if get("selection.selector"):
        ratio = get("selection.ratio")
        share = "" if ratio is None else f" at {percent(float(ratio))} of rows"
        facts.append(f"selector <b>{escape(str(get('selection.selector')))}</b>{share}")
    for label, key in (
        ("K", "selection.k"),
        ("loss", "loss.kind"),
        ("lr", "optimizer.lr"),
        ("prompts", "rollout.prompts"),
        ("seed", "run.seed"),
    ):
        if get(key) is not None:
            facts.append(f"{label} <b>{escape(str(get(key)))}</b>")
    return f"<p class=facts>{''.join(f'<span>{fact}</span>' for fact in facts)}</p>"


def sampling(config: Mapping[str, Any]) -> str:
    """How evaluations draw their responses, in words; empty if the configuration does not say."""
    section, rollout = config.get("eval") or {}, config.get("rollout") or {}
    if (temperature := section.get("temperature")) is None:
        return ""
    if temperature == 0:
        return "greedy"
    words = [f"temperature {temperature:g}"]
    if (top_p := rollout.get("top_p", 1)) < 1:
        words.append(f"top-p {top_p:g}")
    if top_k := rollout.get("top_k"):
        words.append(f"top-k {top_k}")
    if (samples := section.get("samples", 1)) > 1:
        words.append(f"mean of {samples} responses")
    return ", ".join(words)


def _figures(records: Sequence[Record], config: Mapping[str, Any]) -> str:
    s = summarize(records)
    cards = []
    if s["accuracy_last"] is not None:
        change = s["accuracy_last"] - s["accuracy_first"]
        cards.append(
            (
                "Held-out accuracy",
                f"<small>{percent(s['accuracy_first'])} →</small> {percent(s['accuracy_last'])}",
                ", ".join(filter(None, [f"{100 * change:+.1f} points", sampling(config)])),
            )
        )
    if s["loss_first"] is not None:
        cards.append(
            (
                "Loss",
                f"<small>{number(s['loss_first'])} →</small> {number(s['loss_last'])}",
                "means of the first and last tenth",
            )
        )
    if s["kept_rows"] and s["valid_rows"]:
        cards.append(
            (
                "Rows kept",
                percent(s["kept_rows"] / s["valid_rows"]),
                f"{number(s['kept_rows'])} of {number(s['valid_rows'])} response rows",
            )
        )
    if s["tokens_trained"] and s["tokens_rolled_out"]:
        cards.append(
            (
                "Tokens trained",
                percent(s["tokens_trained"] / s["tokens_rolled_out"]),
                f"{number(s['tokens_trained'])} of {number(s['tokens_rolled_out'])} rolled out",
            )
        )
    if s["operations"] is not None:
        cards.append(
            ("Operations", percent(s["operations"]), "of full OPD's, with the same recomputation")
        )
    if s["step_time"] is not None:
        cards.append(("Step", seconds(s["step_time"]), f"median of {s['steps']} steps"))
    if s["gap"] is not None:
        cards.append(("Engine gap", number(s["gap"]), "mean |Δ log p| to the trainer"))
    return (
        "<section class=figures>"
        + "".join(
            f"<div{' class=hero' if '→' in value else ''}><h3>{title}</h3>"
            f"<p class=value>{value}</p><p class=note>{note}</p></div>"
            for title, value, note in cards
        )
        + "</section>"
    )


def _time_table(records: Sequence[Record]) -> str:
    phases = summarize(records)["phases"]
    if not phases:
        return ""
    total, longest = sum(phases.values()), max(phases.values())
    rows = "".join(
        f"<tr><td>{phase}</td><td class=bar><span style='width:{100 * spent / longest:.1f}%;"
        f"background:var(--{PHASES.index(phase) + 1})'></span></td>"
        f"<td class=num>{seconds(spent)}</td><td class=num>{percent(spent / total)}</td></tr>"
        for phase, spent in phases.items()
    )
    return (
        f"<section class=card><h2>Where the time went</h2><p class=note>{seconds(total)} in all "
        f"timed phases of rank 0</p><table>{rows}</table></section>"
    )


def _samples(samples: Sequence[Sample], config: Mapping[str, Any]) -> str:
    rollouts = [_sample(sample) for sample in samples if sample.kept is not None]
    answers = [_sample(sample) for sample in samples if sample.kept is None]
    sections = []
    if rollouts:
        sections.append(
            "<h2>Rollouts, as the selector sees them</h2>"
            "<p class=note><mark>Highlighted</mark> tokens were kept: only they carry loss.</p>"
            f"<div class=samples>{''.join(rollouts)}</div>"
        )
    if answers:
        how = f", {sampling(config)}" if sampling(config) else ""
        sections.append(
            "<h2>Held-out prompts, as the student answers them</h2>"
            f"<p class=note>The first ones of the last evaluation{how}; of each its first "
            f"response.</p><div class=samples>{''.join(answers)}</div>"
        )
    return "".join(f"<section class=card>{section}</section>" for section in sections)


def _sample(sample: Sample) -> str:
    tokens, notes = [], []
    for i, token in enumerate(sample.tokens):
        tip = f" title='score {sample.scores[i]:.3f}'" if sample.scores is not None else ""
        text = escape(token).replace("\n", "⏎\n")
        tag = "mark" if sample.kept is not None and sample.kept[i] else "span"
        tokens.append(f"<{tag}{tip}>{text}</{tag}>")
    if sample.kept is not None:
        notes.append(f"{sum(map(bool, sample.kept))} of {len(sample.tokens)} tokens kept")
    if sample.correct is not None:
        notes.append("<em class=good>right</em>" if sample.correct else "<em class=bad>wrong</em>")
    if sample.note:
        notes.append(f" · {escape(sample.note)}")
    return (
        f"<article><p class=prompt>{escape(sample.prompt)}</p>"
        f"<p class=response>{''.join(tokens)}</p><p class=note>{''.join(notes)}</p></article>"
    )


# --- charts -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Line:
    """A line, or the upper edge of a stacked area.

    Attributes:
        color: 1–8, an entry of the page's palette.
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
    """A plot over steps, from zero up or, if `log`, over at most LOG_DECADES powers of ten."""

    title: str
    note: str
    lines: list[Line]
    format: Callable[[float], str]
    log: bool = False
    stacked: bool = False


def _charts(records: Sequence[Record], config: Mapping[str, Any]) -> list[str]:
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
    charts = [
        Chart(
            "Held-out accuracy",
            ", ".join(filter(None, [sampling(config), "checkable answers"])),
            [line("eval/accuracy", "accuracy", marks=True)],
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
            "before clipping",
            [line("grad_norm", "gradient norm", smooth=True)],
            number,
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
            "phases of rank 0, stacked",
            [
                Line(phase, column(trained, f"time/{phase}"), color)
                for color, phase in enumerate(PHASES, 1)
            ],
            seconds,
            stacked=True,
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
    return [_chart(chart) for chart in charts if any(line.points for line in chart.lines)]


def _chart(chart: Chart) -> str:
    lines = [line for line in chart.lines if line.points]
    if chart.stacked:
        lines = _stack(lines)
    xs = [x for line in lines for x, _ in line.points]
    ys = [y for line in lines for _, y in line.points]
    ys += [y for line in lines if line.band for edge in line.band for _, y in edge]
    x_low, x_high = min(xs), max(max(xs), min(xs) + 1)
    if chart.log:
        positive = [y for y in ys if y > 1e-30] or [1.0]
        top = math.ceil(math.log10(max(positive)))
        bottom = max(math.floor(math.log10(min(positive))), top - LOG_DECADES)
        y_ticks = [10.0**power for power in range(min(bottom, top - 1), top + 1)]
    else:
        y_ticks = ticks(min(0.0, *ys), max(ys))
    y_low, y_high = y_ticks[0], y_ticks[-1]

    def x_at(x: float) -> float:
        return LEFT + (x - x_low) / (x_high - x_low) * (WIDTH - LEFT - RIGHT)

    def y_at(y: float) -> float:
        if chart.log:
            share = math.log(max(y, y_low) / y_low) / math.log(y_high / y_low)
        else:
            share = (y - y_low) / (y_high - y_low)
        return HEIGHT - BOTTOM - share * (HEIGHT - TOP - BOTTOM)

    def path(points: Points) -> str:
        return "M" + "L".join(f"{x_at(x):.1f} {y_at(y):.1f}" for x, y in points)

    svg = [f"<text x={LEFT - 8} y={HEIGHT - 6} text-anchor=end>step</text>"]
    for y in y_ticks:
        svg.append(f"<path class=grid d='M{LEFT} {y_at(y):.1f}H{WIDTH - RIGHT}'/>")
        svg.append(
            f"<text x={LEFT - 8} y={y_at(y) + 4:.1f} text-anchor=end>{chart.format(y)}</text>"
        )
    for x in ticks(x_low, x_high, 6):
        if x_low <= x <= x_high and x == int(x):
            svg.append(f"<text x={x_at(x):.1f} y={HEIGHT - 6} text-anchor=middle>{x:g}</text>")
    floor: Points = [(x_low, y_low), (x_high, y_low)]
    for line in lines:
        ink = f"style='--ink:var(--{line.color})'"
        if chart.stacked:
            area = path(line.points) + "L" + path(floor[::-1])[1:] + "Z"
            svg.append(f"<path class=area {ink} d='{area}'/>")
            floor = line.points
            continue
        if line.band and all(line.band):
            low, high = (_thin(edge) for edge in line.band)
            svg.append(f"<path class=band {ink} d='{path(high)}L{path(low[::-1])[1:]}Z'/>")
        points = _thin(line.points)
        if line.smooth and len(points) > 8:
            svg.append(f"<path class=raw {ink} d='{path(points)}'/>")
            points = _smooth(points)
        svg.append(f"<path class=line {ink} d='{path(points)}'/>")
        if line.marks:
            svg += [f"<circle {ink} cx={x_at(x):.1f} cy={y_at(y):.1f} r=3.5 />" for x, y in points]
    return (
        f"<figure class=card><figcaption><h2>{chart.title}</h2><p class=note>{chart.note}</p>"
        f"{_legend(chart)}</figcaption><div class=plot><svg viewBox='0 0 {WIDTH} {HEIGHT}' "
        f"role=img aria-label='{escape(chart.title, quote=True)}'>{''.join(svg)}"
        f"<path class=cursor d=''/></svg><div class=tip hidden></div>"
        f"<script type=application/json>{_hover_data(chart, x_low, x_high)}</script></div></figure>"
    )


def _legend(chart: Chart) -> str:
    lines = [line for line in chart.lines if line.points]
    if len(lines) < 2:
        return ""
    keys = (f"<span><i style='background:var(--{k.color})'></i>{k.label}</span>" for k in lines)
    return f"<p class=legend>{''.join(keys)}</p>"


def _hover_data(chart: Chart, x_low: float, x_high: float) -> str:
    """Formatted values by step, so that the script needs to know nothing of formats."""
    lines = [line for line in chart.lines if line.points]
    by_step: dict[float, dict[int, str]] = {}
    for i, line in enumerate(lines):
        edges = [dict(edge) for edge in line.band] if line.band else []
        for x, y in line.points[:: math.ceil(len(line.points) / MOST_POINTS)]:
            text = chart.format(y)
            if edges and all(x in edge for edge in edges):
                text += f" ({' – '.join(chart.format(edge[x]) for edge in edges)})"
            by_step.setdefault(x, {})[i] = text
    data = {
        "labels": [line.label for line in lines],
        "colors": [line.color for line in lines],
        "at": [
            [
                x,
                round(LEFT + (x - x_low) / (x_high - x_low) * (WIDTH - LEFT - RIGHT), 1),
                by_step[x],
            ]
            for x in sorted(by_step)
        ],
    }
    return json.dumps(data, ensure_ascii=False, separators=(",", ":")).replace("</", "<\\/")


def _stack(lines: list[Line]) -> list[Line]:
    """Running sums over the lines, at every step that any of them has."""
    steps = sorted({x for line in lines for x, _ in line.points})
    total = dict.fromkeys(steps, 0.0)
    stacked = []
    for line in lines:
        for x, y in line.points:
            total[x] += y
        stacked.append(Line(line.label, _thin(sorted(total.items())), line.color))
    return stacked


def _thin(points: Points) -> Points:
    """At most MOST_POINTS points: means over neighbouring steps."""
    size = math.ceil(len(points) / MOST_POINTS)
    if size <= 1:
        return points
    groups = (points[start : start + size] for start in range(0, len(points), size))
    return [(fmean(x for x, _ in group), fmean(y for _, y in group)) for group in groups]


def _smooth(points: Points) -> Points:
    """A centred running mean over about a tenth of the points."""
    reach = max(2, len(points) // 20)
    return [
        (x, fmean(y for _, y in points[max(0, i - reach) : i + reach + 1]))
        for i, (x, _) in enumerate(points)
    ]


def ticks(low: float, high: float, count: int = 4) -> list[float]:
    """About `count` + 1 round values that enclose [low, high]."""
    size = max(abs(low), abs(high))
    if size < 1e-300:
        return [0.0, 1.0]
    span = high - low if high - low > 1e-9 * size else size
    magnitude = 10.0 ** math.floor(math.log10(span / count))
    step = next(m * magnitude for m in (1, 2, 2.5, 5, 10) if m * magnitude * count >= span * 0.999)
    first = math.floor(low / step + 1e-9)
    last = max(math.ceil(high / step - 1e-9), first + 1)
    return [float(f"{i * step:.12g}") for i in range(first, last + 1)]


def number(value: float) -> str:
    """Three significant digits, with k and M for the large and an exponent for the tiny."""
    if value == 0:
        return "0"
    for factor, unit in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= 10 * factor or (abs(value) >= factor and factor > 1e3):
            return f"{value / factor:.3g}{unit}"
    if abs(value) >= 1000:
        return f"{value:,.0f}"
    return f"{value:.3g}".replace("e-0", "e−").replace("e-", "e−")


def percent(value: float) -> str:
    value *= 100
    digits = f"{value:.1f}".removesuffix(".0") if abs(value) >= 0.1 else f"{value:.2g}"
    return f"{digits} %"


def seconds(value: float) -> str:
    if value >= 3600:
        return f"{value / 3600:.3g} h"
    if value >= 60:
        return f"{value / 60:.3g} min"
    return f"{value:.3g} s" if value >= 1 or value == 0 else f"{1000 * value:.3g} ms"


CSS = """
:root {
  color-scheme: light dark;
  --page: #f6f5f1; --card: #fff; --rule: #e6e4dc;
  --text: #16150f; --soft: #57554c; --faint: #85827a;
  --1: #2a78d6; --2: #e0632c; --3: #1a9a6c; --4: #5b46b8;
  --5: #d49a00; --6: #d0558f; --7: #5f7a8a; --8: #9a6b3f;
  --mark: #ffe08a; --on-mark: #3d2f00; --good: #137a4d; --bad: #b3372a;
}
@media (prefers-color-scheme: dark) {
  :root {
    --page: #12120f; --card: #1c1c18; --rule: #32312b;
    --text: #f2f0e8; --soft: #b9b6aa; --faint: #8a877b;
    --1: #5aa2f0; --2: #f08350; --3: #3dbd8c; --4: #a495f2;
    --5: #e0b23c; --6: #ec85b3; --7: #93aebd; --8: #c99a6c;
    --mark: #6b5310; --on-mark: #ffeeb8; --good: #57c995; --bad: #f08a7c;
  }
}
* { box-sizing: border-box; }
body {
  margin: 0; background: var(--page); color: var(--text);
  font: 15px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", Arial, sans-serif;
}
main { max-width: 1200px; margin: 0 auto; padding: 40px 24px 64px; }
section { margin-top: 12px; }
h1, h2, h3, p { margin: 0; }
h1 { font-size: 34px; line-height: 1.15; letter-spacing: -.02em; margin: 4px 0 10px; }
h2 { font-size: 15px; font-weight: 650; }
h3 { font-size: 13px; font-weight: 500; color: var(--soft); }
h1, .response, .prompt { overflow-wrap: anywhere; }
.note { font-size: 13px; line-height: 1.4; color: var(--soft); }
.eyebrow {
  font-size: 12px; font-weight: 600; letter-spacing: .08em; text-transform: uppercase;
  color: var(--1);
}
.facts { display: flex; flex-wrap: wrap; gap: 4px 20px; color: var(--soft); }
.facts b { color: var(--text); font-weight: 600; }
.facts i { font-style: normal; font-size: 13px; color: var(--faint); }
.card, .figures > div, pre {
  background: var(--card); border: 1px solid var(--rule); border-radius: 12px; padding: 18px 20px;
}
.charts, .samples { display: grid; gap: 12px; }
.figures { display: flex; flex-wrap: wrap; gap: 12px; margin-top: 28px; }
.figures > div { flex: 1 1 150px; }
.figures > .hero { flex: 1.5 1 218px; }
.value {
  font-size: 27px; font-weight: 650; line-height: 1.35; letter-spacing: -.02em;
  white-space: nowrap;
}
.value small { font-size: 17px; font-weight: 500; color: var(--faint); letter-spacing: 0; }
.charts, .samples { grid-template-columns: repeat(auto-fit, minmax(min(440px, 100%), 1fr)); }
figure { margin: 0; display: flex; flex-direction: column; justify-content: space-between; }
.plot { position: relative; margin-top: 10px; }
svg { display: block; width: 100%; height: auto; overflow: visible; }
svg text { font-size: 12px; fill: var(--faint); font-variant-numeric: tabular-nums; }
.grid { stroke: var(--rule); }
.line, .raw { fill: none; stroke: var(--ink); stroke-linejoin: round; stroke-linecap: round; }
.line { stroke-width: 2; }
.raw { opacity: .3; }
.band { fill: var(--ink); opacity: .16; }
.area { fill: var(--ink); stroke: var(--card); }
circle { fill: var(--ink); stroke: var(--card); stroke-width: 1.5; }
.cursor { stroke: var(--faint); fill: none; }
.legend {
  display: flex; flex-wrap: wrap; gap: 2px 14px; margin-top: 4px;
  font-size: 13px; color: var(--soft);
}
.legend i, .tip i {
  display: inline-block; width: 9px; height: 9px; border-radius: 3px; margin-right: 6px;
}
.tip {
  position: absolute; top: 0; z-index: 1; pointer-events: none; padding: 6px 10px;
  background: var(--card); border: 1px solid var(--rule); border-radius: 8px;
  box-shadow: 0 4px 16px #0002; font-size: 12.5px; white-space: nowrap;
  font-variant-numeric: tabular-nums;
}
.tip b { font-weight: 500; color: var(--soft); }
.samples { margin-top: 12px; }
article { border: 1px solid var(--rule); border-radius: 10px; padding: 12px 14px; }
.prompt { font-size: 14px; color: var(--soft); white-space: pre-wrap; }
.response {
  margin: 6px 0; white-space: pre-wrap;
  font: 14px/1.75 ui-monospace, SFMono-Regular, Menlo, Consolas, monospace;
}
mark { background: var(--mark); color: var(--on-mark); border-radius: 4px; padding: 1px 0; }
em { font-style: normal; font-weight: 600; margin-left: 8px; }
em:first-child { margin-left: 0; }
.good { color: var(--good); }
.good::before { content: "✓ "; }
.bad { color: var(--bad); }
.bad::before { content: "✗ "; }
table { border-collapse: collapse; width: 100%; margin-top: 10px; }
td { padding: 5px 0; border-top: 1px solid var(--rule); font-variant-numeric: tabular-nums; }
tr:first-child td { border-top: 0; }
.num { text-align: right; padding-left: 16px; white-space: nowrap; }
.bar { width: 65%; padding-left: 16px; }
.bar span { display: block; height: 10px; border-radius: 3px; min-width: 2px; }
summary { cursor: pointer; color: var(--soft); padding: 8px 0; }
pre { overflow-x: auto; font: 13px/1.55 ui-monospace, SFMono-Regular, Menlo, Consolas, monospace; }
"""

SCRIPT = """
for (const plot of document.querySelectorAll(".plot")) {
  const [svg, tip, cursor] = ["svg", ".tip", ".cursor"].map((s) => plot.querySelector(s));
  const {labels, colors, at} = JSON.parse(plot.querySelector("script").textContent);
  svg.addEventListener("pointermove", (event) => {
    const box = svg.getBoundingClientRect();
    const scale = box.width / svg.viewBox.baseVal.width;
    const distance = ([, x]) => Math.abs(x - (event.clientX - box.left) / scale);
    const [step, x, values] = at.reduce((a, b) => (distance(b) < distance(a) ? b : a));
    const rows = labels.map((label, i) => values[i] === undefined ? "" :
      `<br><i style="background: var(--${colors[i]})"></i>${label} ${values[i]}`);
    tip.innerHTML = `<b>step ${step}</b>` + rows.join("");
    tip.hidden = false;
    const right = x * scale + 12;
    const fits = right + tip.offsetWidth <= box.width;
    tip.style.left = `${fits ? right : x * scale - 12 - tip.offsetWidth}px`;
    cursor.setAttribute("d", `M${x} TOPVBOTTOM`);
  });
  svg.addEventListener("pointerleave", () => {
    tip.hidden = true;
    cursor.setAttribute("d", "");
  });
}
""".replace("TOPVBOTTOM", f"{TOP}V{HEIGHT - BOTTOM}")
