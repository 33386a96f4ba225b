"""A run in a few figures, and the table of them that ends it in the terminal."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean, median
from typing import Any

from rich.table import Table

from megatron_taopd.monitoring.numbers import number, percent, seconds

PHASES = (
    "rollout",
    "teacher",
    "scoring",
    "selection",
    "training",
    "sync",
    "metrics",
    "eval",
    "checkpoint",
    "other",
)
OUTSIDE = ("eval", "checkpoint", "other")  # of a step, or no span of their own

Record = Mapping[str, Any]
Points = list[tuple[float, float]]


def column(records: Sequence[Record], key: str) -> Points:
    """List (step, value) of the records that have a finite value under this key."""
    return [
        (record["step"], float(record[key]))
        for record in records
        if record.get(key) is not None and math.isfinite(record[key])
    ]


def phase_times(records: Sequence[Record], phase: str) -> Points:
    """List (step, seconds) of a phase; `other` is what is left of the step without the others."""
    if phase != "other":
        return column(records, f"time/{phase}")
    named = [dict(column(records, f"time/{each}")) for each in PHASES if each not in OUTSIDE]
    return [
        (step, max(0.0, whole - sum(times.get(step, 0.0) for times in named)))
        for step, whole in column(records, "time/step")
    ]


def summarize(records: Sequence[Record]) -> dict[str, Any]:
    """Compute the figures of a run that fit on a card; None where the records lack them.

    Returns:
        `steps`, the last step; `accuracy_first`, `accuracy_last`; `loss_first`, `loss_last`, means
        over the first and last tenth of the steps; `kept_rows`, `valid_rows`, `tokens_trained`,
        `tokens_rolled_out`, sums over the run; `operations`, the mean share of full OPD's;
        `step_time`, the median in seconds; `tokens_per_gpu` (a second) and `mfu`, medians; `gap`,
        the mean engine–trainer gap in nats; `phases`, the total seconds of each phase, longest
        first: they add up to those of the steps, evaluations and checkpoints.
    """

    def values(key: str) -> list[float]:
        return [value for _, value in column(records, key)]

    accuracy, loss = values("eval/accuracy"), values("loss")
    tenth = max(1, len(loss) // 10)
    counts = {}
    for key in ("kept_rows", "valid_rows", "tokens_trained", "tokens_rolled_out"):
        counted = values(key)
        counts[key] = int(sum(counted)) if counted else None
    operations, step_times = values("flops/of_full_opd"), values("time/step")
    gap = values("rollout/logprob_gap_mean")
    per_gpu, mfu = values("perf/tokens_per_second_per_gpu"), values("perf/mfu")
    phases = {phase: sum(y for _, y in phase_times(records, phase)) for phase in PHASES}
    return {
        "steps": int(records[-1]["step"]) if records else 0,
        "accuracy_first": accuracy[0] if accuracy else None,
        "accuracy_last": accuracy[-1] if len(accuracy) > 1 else None,
        "loss_first": fmean(loss[:tenth]) if loss else None,
        "loss_last": fmean(loss[-tenth:]) if loss else None,
        **counts,
        "operations": fmean(operations) if operations else None,
        "step_time": median(step_times) if step_times else None,
        "tokens_per_gpu": median(per_gpu) if per_gpu else None,
        "mfu": median(mfu) if mfu else None,
        "gap": fmean(gap) if gap else None,
        "phases": {
            phase: spent
            for phase, spent in sorted(phases.items(), key=lambda item: -item[1])
            if spent > 0
        },
    }


def summary_table(records: Sequence[Record], report: str | Path | None = None) -> Table:
    """Lay out the end of a run for the terminal, with the report's path below it."""
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
    if s["tokens_per_gpu"] is not None:
        used = "" if s["mfu"] is None else f"MFU {percent(s['mfu'])}"
        table.add_row("tokens/s per GPU", number(s["tokens_per_gpu"]), used)
    table.add_section()
    total = sum(s["phases"].values())
    for phase, spent in s["phases"].items():
        table.add_row(phase, seconds(spent), percent(spent / total))
    if report is not None:
        table.caption = f"report: {os.path.relpath(report)}"
        table.caption_justify = "left"
    return table
