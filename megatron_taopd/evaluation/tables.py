"""Figures over seeds, and tables of them: Markdown, CSV, for the terminal."""

from __future__ import annotations

import csv
from collections.abc import Sequence
from pathlib import Path
from statistics import mean, stdev

from rich.box import SIMPLE
from rich.table import Table


def mean_and_std(values: Sequence[float], scale: float = 100, digits: int = 1) -> str:
    """Write mean and sample standard deviation as "61.3 ± 0.8", in percent by default.

    One value has no deviation: "61.3".
    """
    middle = f"{scale * mean(values):.{digits}f}"
    return middle if len(values) == 1 else f"{middle} ± {scale * stdev(values):.{digits}f}"


def markdown(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Return a table in Markdown whose first column is text and whose others are numbers."""
    rule = ["---", *["---:"] * (len(header) - 1)]
    cells = [[str(cell).replace("|", "\\|") for cell in row] for row in (header, rule, *rows)]
    return "".join(f"| {' | '.join(row)} |\n" for row in cells)


def for_terminal(title: str, header: Sequence[str], rows: Sequence[Sequence[str]]) -> Table:
    """Return a table for rich whose first column is text and whose others are numbers."""
    table = Table(box=SIMPLE, title=title)
    table.add_column(header[0])
    for name in header[1:]:
        table.add_column(name, justify="right")
    for row in rows:
        table.add_row(*row)
    return table


def write(stem: Path, title: str, header: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Write STEM.md, with the title above the table, and STEM.csv."""
    stem.parent.mkdir(parents=True, exist_ok=True)
    stem.with_name(stem.name + ".md").write_text(f"{title}\n\n{markdown(header, rows)}")
    with open(stem.with_name(stem.name + ".csv"), "w", newline="") as file:
        csv.writer(file).writerows([header, *rows])
