"""What a tiny student learns from itself: accuracy before and after, for several seeds.

    python -m benchmarks.self_distillation --out runs/self_distillation

Runs `examples/self_distillation.yaml` in three ways on one rank each, what is finished not again:
the teacher is the student as it was, the teacher is its moving average, and the student is one that
has never seen a solution in front of a problem. docs/teachers.md has the outcome. Some 50 s of
one core a run.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from rich.box import SIMPLE
from rich.table import Table

from megatron_taopd.cli import common
from megatron_taopd.cli.compare import arms, paired

EXAMPLES = Path(__file__).parent.parent / "examples"
ARMS = {
    "the student as it was": ["teacher.source=student"],
    "its moving average": ["teacher.source=student_ema"],
    "as it was, never shown a solution": [f"student.path={EXAMPLES / 'tiny_pair' / 'student'}"],
}
BEFORE = ["train.steps=1", "optimizer.lr=1e-30", "eval.at_start=false"]


def main(arguments: Sequence[str] | None = None) -> int:
    """Train what has not been, and print a line for each arm."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="directory of the runs")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--set", nargs="+", default=[], metavar="KEY=VALUE", help="for every run")
    common.add_json(parser)
    given = parser.parse_args(arguments)
    train = arms.Trainer(str(EXAMPLES / "self_distillation.yaml"), given.set)
    rows = [compare(train, given.out, arm, given.seeds) for arm in ARMS]
    common.show(as_table(rows))
    common.write_json(given.json, rows)
    return 0


def compare(train: arms.Trainer, out: Path, arm: str, seeds: Sequence[int]) -> dict:
    """Train an arm with each seed, and its student before the first step, which is the same."""
    place = out / arm.replace(" ", "_").replace(",", "")
    runs = [train(place / str(s), [*ARMS[arm], f"run.seed={s}"]) for s in seeds]
    before = paired.outcomes([train(place / "before", [*ARMS[arm], *BEFORE])])
    after = paired.outcomes(runs)
    assert before is not None and after is not None, place
    difference, low, high = paired.difference(after, np.broadcast_to(before, after.shape))
    return {
        "teacher": arm,
        "before": float(before.mean()),
        "after": after.mean(1).tolist(),
        "difference": difference,
        "low": low,
        "high": high,
    }


def as_table(rows: Sequence[dict]) -> Table:
    """Lay out a line for each arm."""
    table = Table(
        box=SIMPLE,
        title="held-out accuracy in %",
        caption="difference: mean over seeds and problems, 95 % by drawing both with replacement",
    )
    for header in ("teacher", "before", "after, each seed", "difference"):
        table.add_column(header, no_wrap=True, justify="left" if header == "teacher" else "right")
    for row in rows:
        low, high = 100 * row["low"], 100 * row["high"]
        table.add_row(
            row["teacher"],
            f"{100 * row['before']:.1f}",
            " ".join(f"{100 * value:.1f}" for value in row["after"]),
            f"{100 * row['difference']:+.1f} [{low:+.1f}, {high:+.1f}]",
        )
    return table


if __name__ == "__main__":
    raise SystemExit(main())
