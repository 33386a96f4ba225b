"""Compare runs at equal supervision and at equal compute time, selector by selector.

    taopd compare runs runs/selectors/* --out comparison

Runs with the same selector (or the same value of another key, `--by loss.kind`) are seeds of one
another: curves are their mean, the band their standard deviation. Supervision is the rows kept so
far; compute time is the time of the steps so far, without evaluations and checkpoints. Runs may
differ in length: they are compared where all of them have got to. What accuracy is measured by may
differ, too: that is said. comparison.html has all of it in one page.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path

from megatron_taopd.cli import common
from megatron_taopd.cli.compare import page
from megatron_taopd.cli.compare.curves import (
    AXES,
    CURVES,
    Run,
    as_rows,
    band,
    compare,
    grouped,
    lacking,
    number,
    read_all,
    unlike,
)
from megatron_taopd.evaluation import tables


def main(arguments: list[str]) -> int:
    """Compare runs; the exit status is 0."""
    parser = common.Parser(prog="taopd compare runs", description=__doc__)
    parser.add_argument("runs", nargs="+", type=Path, help="their run.dir")
    parser.add_argument("--by", default="selection.selector", help="key of config.yaml")
    parser.add_argument("--out", type=Path, required=True, help="gets tables and plots")
    common.add_json(parser)
    parser.add_argument("--no-plots", action="store_true")
    return common.run(work, parser.parse_args(arguments))


def work(arguments: argparse.Namespace) -> int:
    """Print and write tables at equal supervision and at equal time, and plot the curves."""
    if not arguments.no_plots and find_spec("matplotlib") is None:
        raise ValueError("plots need matplotlib: pip install '.[plots]', or give --no-plots")
    runs, missing = read_all(arguments.runs, arguments.by)
    console = common.open_console()
    summary = {axis: compare(runs, axis) for axis in AXES}
    for axis, compared in summary.items():
        title = f"at equal {AXES[axis]}: {number(compared['at'])}"
        header, rows = as_rows(compared, arguments.by)
        tables.write(arguments.out / f"at_equal_{axis}", title, header, rows)
        console.print(tables.for_terminal(title, header, rows))
    missing += lacking(runs)
    differing = unlike(runs, arguments.by)
    remarks = [
        f"{word}: {line}"
        for word, lines in (("missing", missing), ("unlike", differing))
        for line in lines
    ]
    for line in remarks:
        console.print(line, highlight=False, soft_wrap=True)
    figures = {"by": arguments.by, "missing": missing, "unlike": differing, **summary}
    for path in (arguments.out / "comparison.json", arguments.json):
        common.write_json(path, figures)
    page.write(arguments.out / "comparison.html", runs, arguments.by, summary, remarks)
    console.print(f"page: {arguments.out / 'comparison.html'}", highlight=False, soft_wrap=True)
    if not arguments.no_plots:
        plot(runs, arguments.out / "curves.png")
        console.print(f"plots: {arguments.out / 'curves.png'}", highlight=False)
    return 0


def plot(runs: Sequence[Run], path: Path) -> None:
    """Draw each curve along each axis, the seeds of a group as one line with its band."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, panels = pyplot.subplots(
        len(CURVES), len(AXES), figsize=(6 * len(AXES), 4 * len(CURVES)), squeeze=False
    )
    for row, (name, label) in enumerate(CURVES.items()):
        for panel, (axis, along) in zip(panels[row], AXES.items(), strict=True):
            for group, members in grouped(runs).items():
                if (curve := band(members, axis, name)) is None:
                    continue
                x, middle, spread = curve
                (line,) = panel.plot(x, middle, label=f"{group} ({len(members)})")
                panel.fill_between(
                    x, middle - spread, middle + spread, color=line.get_color(), alpha=0.2, lw=0
                )
            panel.set_xlabel(along)
            panel.set_ylabel(label)
            panel.grid(alpha=0.3)
    panels[0][0].legend(fontsize="small")
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    pyplot.close(figure)
