"""Train one configuration with several selectors and seeds, and compare the held-out accuracy.

    taopd compare selectors examples/tiny_pair.yaml --out runs/selectors --seeds 0 1 2
    taopd compare selectors examples/tiny_pair.yaml --out runs/seconds --equal seconds
        --selectors full prefix divergence teachability teachability_horizon discrepancy
        --lrs 5e-4 1e-3 2e-3 --seeds 0 1 2 3 4

Every run is a process of its own on one rank; finished runs in --out are not repeated. Settings of
each run: `--set train.steps=80 optimizer.lr=3e-4`. comparison.html in --out has their curves over
one another.

Two arms are more than a selector: `teachability_horizon` also has `rollout.horizon: auto`, and
`discrepancy` trains on all rows with `loss.weights: discrepancy`. --equal gives each arm the steps
in which it supervises as many rows, or takes as many processor seconds, as the reference does in
`train.steps`. With --lrs each arm has the learning rate that is best for it with --tuning-seed,
which is none of --seeds: by its last accuracy, or with --lr-by gain by its fixed-context gain on
--bank, for which every run's student is scored there. What is to be compared, and the margin within
which an arm counts as not inferior to the reference, is written to protocol.json before the first
run, and stays.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from itertools import product
from pathlib import Path
from statistics import mean, stdev

from rich.box import SIMPLE
from rich.table import Table

from megatron_taopd import config as configuration
from megatron_taopd.cli import common
from megatron_taopd.cli.compare import arms, curves, page, paired
from megatron_taopd.formats.files import file_written_aside

SELECTORS = (
    "full",
    "random",
    "entropy",
    "divergence",
    "tip",
    "teachability",
    "teachability_entropy",
)
OUTCOMES = {"accuracy": "after", "gain": "gain"}  # by which a rate is chosen → of `read`
BY = "run.name"
GAIN_MARGIN = 0.05  # of the reference's gain


def main(arguments: list[str]) -> int:
    """Train and compare; the exit status is 0, or 1 if a run has failed."""
    parser = common.Parser(prog="taopd compare selectors", description=__doc__)
    parser.add_argument("config")
    parser.add_argument("--out", type=Path, required=True, help="directory of the runs")
    parser.add_argument("--selectors", nargs="+", default=SELECTORS)
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--equal", choices=arms.EQUAL, default="steps")
    parser.add_argument("--reference", help="arm; default: full where it is compared, or the first")
    parser.add_argument("--lrs", nargs="+", type=float, default=[], help="learning rates to try")
    parser.add_argument("--tuning-seed", type=int, default=1000)
    parser.add_argument("--lr-by", choices=OUTCOMES, default="accuracy")
    parser.add_argument("--bank", type=Path, help="to measure the gain of each run's student on")
    parser.add_argument("--margin", type=float, default=0.02, help="of accuracy")
    parser.add_argument("--jobs", type=int, default=2, help="runs at a time")
    common.add_json(parser)
    parser.add_argument("--set", nargs="+", default=[], metavar="KEY=VALUE", help="for every run")
    return common.run(work, parser.parse_args(arguments))


def work(arguments: argparse.Namespace) -> int:
    """Train what has not been, and print one line for each arm."""
    names, seeds, out = list(arguments.selectors), arguments.seeds, arguments.out
    reference = arguments.reference or ("full" if "full" in names else names[0])
    if reference not in names:
        raise ValueError(f"--reference: {reference} is none of {', '.join(names)}")
    if arguments.lrs and arguments.tuning_seed in seeds:
        raise ValueError(
            f"--tuning-seed: {arguments.tuning_seed} is one of --seeds; learning rates are chosen "
            "on another one"
        )
    if arguments.lr_by == "gain" and not arguments.bank:
        raise ValueError("--lr-by: gain needs --bank, on which it is measured")
    write_protocol(arguments, reference)
    train, score = arms.Trainer(arguments.config, arguments.set), scorer_of(arguments)
    with ThreadPoolExecutor(arguments.jobs) as pool:
        settings = settle(arguments, reference, train, score, pool)

        def run(job: tuple[str, int]) -> dict:
            arm, seed = job
            directory = out / f"{arm}-{seed}"
            name = [f"run.seed={seed}", f"run.name={arm}"]
            train(directory, [*arms.overrides_of(arm), *settings[arm], *name])
            score(directory)
            return read(directory)

        jobs = list(product(names, seeds))
        results = dict(zip(jobs, pool.map(run, jobs), strict=True))
    rows = [
        summarize(arm, [results[arm, seed] for seed in seeds]) | {"settings": settings[arm]}
        for arm in names
    ]
    of_arm = {arm: [out / f"{arm}-{seed}" for seed in seeds] for arm in names}
    for row in rows:
        row["against"] = against(of_arm[row["selector"]], of_arm[reference], arguments.margin)
    common.show(as_table(rows, len(seeds)), as_comparison(rows, reference, arguments.margin))
    common.write_json(arguments.json, rows)
    runs, missing = curves.read_all([path for paths in of_arm.values() for path in paths], BY)
    compared = {axis: curves.compare(runs, axis) for axis in curves.AXES}
    page.write(out / "comparison.html", runs, BY, compared, missing)
    line = f"page: {out / 'comparison.html'}"
    common.open_console().print(line, highlight=False, soft_wrap=True)
    return 0


def write_protocol(arguments: argparse.Namespace, reference: str) -> None:
    """Write down what will be compared, and by which margin; refuse to change it afterwards.

    More selectors and seeds may come later.
    """
    protocol = {
        "equal": arguments.equal,
        "reference": reference,
        "margin": arguments.margin,
        "gain_margin": GAIN_MARGIN,
        "lrs": arguments.lrs,
        "tuning_seed": arguments.tuning_seed,
        "lr_by": arguments.lr_by,
        "set": arguments.set,
    }
    path = arguments.out / "protocol.json"
    if not path.is_file():
        arguments.out.mkdir(parents=True, exist_ok=True)
        with file_written_aside(path) as aside:
            aside.write_text(json.dumps(protocol, indent=2) + "\n")
        return
    before = json.loads(path.read_text())
    for name, value in protocol.items():
        if before.get(name) != value:
            raise ValueError(
                f"{path}: {name} was {before.get(name)!r} before the runs and is {value!r} now; "
                "use another --out"
            )


def scorer_of(arguments: argparse.Namespace) -> Callable[[Path], None]:
    """Return what scores a run's student on --bank; without one, what does nothing."""
    if not arguments.bank:
        return lambda _: None
    overrides = ["run.dir=unused", *arguments.set]
    config = configuration.load(arguments.config, overrides)
    score = arms.Scorer(
        arguments.bank, config.teacher.path, config.teacher.prompt, arguments.out / "before.parquet"
    )
    score.begin(config.student.path)
    return score


def settle(
    arguments: argparse.Namespace,
    reference: str,
    train: arms.Trainer,
    score: Callable[[Path], None],
    pool: ThreadPoolExecutor,
) -> dict[str, list[str]]:
    """Find each arm's steps, and then its learning rate; return the overrides that set them."""
    names, out = list(arguments.selectors), arguments.out
    settings: dict[str, list[str]] = {arm: [] for arm in names}
    if arguments.equal != "steps":
        steps = configuration.load(arguments.config, ["run.dir=unused", *arguments.set]).train.steps
        rates = pool.map(lambda arm: arms.probe(train, out / "probes", arm), names)
        found = dict(zip(names, rates, strict=True))
        for arm, count in arms.equal_steps(found, arguments.equal, reference, steps).items():
            settings[arm].append(f"train.steps={count}")
    if arguments.lrs:

        def tried(job: tuple[str, float]) -> float:
            arm, lr = job
            options = [f"optimizer.lr={lr}", f"run.seed={arguments.tuning_seed}"]
            options = [*arms.overrides_of(arm), *settings[arm], *options]
            directory = train(out / "tuning" / f"{arm}-{lr:g}", options)
            if arguments.lr_by == "gain":
                score(directory)
            return read(directory)[OUTCOMES[arguments.lr_by]]

        jobs = list(product(names, arguments.lrs))
        outcomes = dict(zip(jobs, pool.map(tried, jobs), strict=True))
        for arm in names:
            best = arms.best_rate({lr: outcomes[arm, lr] for lr in arguments.lrs})
            settings[arm].append(f"optimizer.lr={best}")
    return settings


def read(directory: Path) -> dict:
    """Read what a finished run has logged."""
    records = arms.records_of(directory)
    steps = [record for record in records if record.get("grad_norm") is not None]
    accuracies = [r["eval/accuracy"] for r in records if "eval/accuracy" in r]
    gained = paired.gains([directory])
    return {
        "before": accuracies[0],
        "after": accuracies[-1],
        "worst": min(accuracies),
        "gain": gained and float(gained[0].sum() / gained[1].sum()),
        "grad_norm": mean(r["grad_norm"] for r in steps),
        "kept_rows": mean(r["kept_rows"] for r in steps),
        "tokens_trained": sum(r["tokens_trained"] for r in steps)
        / sum(r["tokens_rolled_out"] for r in steps),
        "supervised": sum(r["kept_rows"] for r in steps),
        "seconds": arms.seconds_of(directory),
    }


def against(own: list[Path], reference: list[Path], margin: float) -> dict[str, dict]:
    """Compare an arm with the reference, problem by problem and seed by seed, as far as is known.

    Returns:
        accuracy, and gain where every run has a `gain.parquet`: estimate, low, high (95 %),
        margin and verdict.
    """
    found, both = {}, [(paired.outcomes(paths), paired.gains(paths)) for paths in (own, reference)]
    (right, gained), (right_there, gained_there) = both
    if right is not None and right_there is not None:
        found["accuracy"] = _judged(paired.difference(right, right_there), margin)
    if gained is not None and gained_there is not None:
        (sums, rows), (sums_there, _) = gained, gained_there
        most = GAIN_MARGIN * sums_there.sum() / rows.sum()
        found["gain"] = _judged(paired.difference(sums, sums_there, rows), most)
    return found


def _judged(triple: tuple[float, float, float], margin: float) -> dict:
    estimate, low, high = triple
    verdict = paired.verdict(low, high, margin)
    return dict(estimate=estimate, low=low, high=high, margin=margin, verdict=verdict)


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
        "gain": _mean_known([run["gain"] for run in runs]),
        "grad_norm": mean(run["grad_norm"] for run in runs),
        "kept_rows": mean(run["kept_rows"] for run in runs),
        "tokens_trained": mean(run["tokens_trained"] for run in runs),
        "supervised": mean(run["supervised"] for run in runs),
        "seconds": _mean_known([run["seconds"] for run in runs]),
    }


def _mean_known(values: list[float | None]) -> float | None:
    """Average what is known of all runs; None where one is not."""
    known = [value for value in values if value is not None]
    return mean(known) if len(known) == len(values) else None


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


def _spent(row: dict) -> list[str]:
    """Write the rows that an arm was trained on, and its processor seconds."""
    seconds = "–" if row["seconds"] is None else f"{row['seconds']:.0f}"
    return [f"{row['supervised']:.0f}", seconds]


def as_comparison(rows: list[dict], reference: str, margin: float) -> Table:
    """Lay out each arm's differences from the reference."""
    [own] = [row for row in rows if row["selector"] == reference]
    number, seconds = _spent(own)
    gain = "" if own["gain"] is None else f", gain {own['gain']:.4f}"
    table = Table(
        box=SIMPLE,
        title=f"minus {reference} ({' '.join([*own['settings'], number])} rows, {seconds} CPU s"
        f"{gain}): paired over seeds and problems, 95 %",
        caption=f"not inferior: above −{margin:g} of accuracy, −{GAIN_MARGIN:.0%} of {reference}'s "
        "gain, as protocol.json has it from before the runs; rows trained on and processor "
        "seconds, start and evaluations included, are means over seeds",
    )
    for header in ("selector", "settings", "rows", "CPU s", "accuracy", "", "gain", ""):
        table.add_column(header, no_wrap=True)
    for row in rows:
        if row["selector"] == reference:
            continue
        cells = _spent(row)
        for name in ("accuracy", "gain"):
            of = row["against"].get(name)
            shown = of and f"{of['estimate']:+.4f} [{of['low']:+.4f}, {of['high']:+.4f}]"
            cells += [shown or "–", of["verdict"] if of else ""]
        table.add_row(row["selector"], " ".join(row["settings"]), *cells)
    return table
