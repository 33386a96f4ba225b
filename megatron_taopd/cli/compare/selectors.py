"""Train one configuration with several selectors and seeds, and compare the held-out accuracy.

    taopd compare selectors examples/tiny_pair.yaml --out runs/selectors --seeds 0 1 2

Every run is a process of its own on one rank; finished runs in --out are not repeated. Settings of
each run: `--set train.steps=80 optimizer.lr=3e-4`. comparison.html in --out has their curves over
one another.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from itertools import product
from pathlib import Path
from statistics import mean, stdev

from rich.box import SIMPLE
from rich.table import Table

from megatron_taopd.cli import common
from megatron_taopd.cli.compare import curves, page

SELECTORS = (
    "full",
    "random",
    "entropy",
    "divergence",
    "tip",
    "teachability",
    "teachability_entropy",
)
BY = "selection.selector"
ONE_RANK = [f"{model}.parallel={{tp: 1, pp: 1}}" for model in ("student", "teacher")]


def main(arguments: list[str]) -> int:
    """Train and compare; the exit status is 0, or 1 if a run has failed."""
    parser = common.Parser(prog="taopd compare selectors", description=__doc__)
    parser.add_argument("config")
    parser.add_argument("--out", type=Path, required=True, help="directory of the runs")
    parser.add_argument("--selectors", nargs="+", default=SELECTORS)
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--jobs", type=int, default=2, help="runs at a time")
    common.add_json(parser)
    parser.add_argument("--set", nargs="+", default=[], metavar="KEY=VALUE", help="for every run")
    return common.run(work, parser.parse_args(arguments))


def work(arguments: argparse.Namespace) -> int:
    """Train what has not been, and print one line for each selector."""

    def run(selector: str, seed: int) -> dict:
        directory = arguments.out / f"{selector}-{seed}"
        overrides = [
            *ONE_RANK,
            *arguments.set,
            f"run.dir={directory}",
            f"run.seed={seed}",
            f"selection.selector={selector}",
        ]
        return train(arguments.config, directory, overrides)

    jobs = list(product(arguments.selectors, arguments.seeds))
    with ThreadPoolExecutor(arguments.jobs) as pool:
        results = dict(zip(jobs, pool.map(lambda job: run(*job), jobs), strict=True))
    rows = [
        summarize(s, [results[s, seed] for seed in arguments.seeds]) for s in arguments.selectors
    ]
    common.show(as_table(rows, len(arguments.seeds)))
    common.write_json(arguments.json, rows)
    paths = [arguments.out / f"{selector}-{seed}" for selector, seed in jobs]
    runs, missing = curves.read_all(paths, BY)
    compared = {axis: curves.compare(runs, axis) for axis in curves.AXES}
    page.write(arguments.out / "comparison.html", runs, BY, compared, missing)
    line = f"page: {arguments.out / 'comparison.html'}"
    common.open_console().print(line, highlight=False, soft_wrap=True)
    return 0


def train(config: str, directory: Path, overrides: list[str]) -> dict:
    """Run the trainer to its end (or find it there) and read what it logged."""
    directory.mkdir(parents=True, exist_ok=True)
    if not (directory / "student").is_dir():
        command = [sys.executable, "-m", "megatron_taopd.train", config, *overrides]
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        with open(directory / "output.txt", "w") as output:
            code = subprocess.run(
                command, env=environment, stdout=output, stderr=subprocess.STDOUT
            ).returncode
        if code:
            raise SystemExit(f"{directory}: exit status {code}; see {directory / 'output.txt'}")
    lines = (directory / "metrics.jsonl").read_text().splitlines()
    records = [json.loads(line) for line in lines]
    steps = [record for record in records if record.get("grad_norm") is not None]
    accuracies = [r["eval/accuracy"] for r in records if "eval/accuracy" in r]
    return {
        "before": accuracies[0],
        "after": accuracies[-1],
        "worst": min(accuracies),
        "grad_norm": mean(r["grad_norm"] for r in steps),
        "kept_rows": mean(r["kept_rows"] for r in steps),
        "tokens_trained": sum(r["tokens_trained"] for r in steps)
        / sum(r["tokens_rolled_out"] for r in steps),
    }


def summarize(selector: str, runs: list[dict]) -> dict:
    """Average the seeds of one selector."""
    after = [run["after"] for run in runs]
    return {
        "selector": selector,
        "before": mean(run["before"] for run in runs),
        "after": after,
        "mean": mean(after),
        "std": stdev(after) if len(after) > 1 else None,
        "worst": min(run["worst"] for run in runs),
        "grad_norm": mean(run["grad_norm"] for run in runs),
        "kept_rows": mean(run["kept_rows"] for run in runs),
        "tokens_trained": mean(run["tokens_trained"] for run in runs),
    }


def as_table(rows: list[dict], seeds: int) -> Table:
    """Lay out a line for each selector."""
    table = Table(
        box=SIMPLE,
        title=f"held-out accuracy in %, {seeds} seeds; before {rows[0]['before']:.1%}",
        caption="‖g‖ before clipping; kept: rows a step, on average; trained: share of the tokens "
        "rolled out",
    )
    table.add_column("selector", no_wrap=True)
    for header in ("each seed", "mean", "std", "worst", "‖g‖", "kept", "trained"):
        table.add_column(header, justify="right", no_wrap=True)
    for row in rows:
        table.add_row(
            row["selector"],
            " ".join(f"{100 * value:.1f}" for value in row["after"]),
            f"{100 * row['mean']:.1f}",
            "–" if row["std"] is None else f"{100 * row['std']:.1f}",
            f"{100 * row['worst']:.1f}",
            f"{row['grad_norm']:.1f}",
            f"{row['kept_rows']:.0f}",
            f"{row['tokens_trained']:.0%}",
        )
    return table
