"""From gain tables to a directory of CSV tables, figures and a report."""

from __future__ import annotations

import csv
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path

from megatron_taopd.diagnostics.analysis import analyze
from megatron_taopd.diagnostics.gains import Tables, read_gains
from megatron_taopd.diagnostics.page import read_views, render
from megatron_taopd.formats.files import file_written_aside

FIGURES = {
    "figure2_decomposition": (
        "Local-support decomposition",
        "Gain over learnable and incompatible disagreement, and both on TIP's plane of normalised "
        "entropy and disagreement (Figure 2)",
    ),
    "figure3_evidence": (
        "Fixed-context evidence",
        "Coefficients of the regression; parts of Q3 with as many kept tokens; gap between high "
        "and low support by K (Figure 3)",
    ),
    "figure4_q3_controls": (
        "Controls",
        "Selectors that keep the same number of tokens; support proxies; mean gain by bucket "
        "(thin: each seed and K, bold: their mean) (Figure 4)",
    ),
    "figure5_robustness": (
        "Robustness",
        "Gaps by K (and seed), every proxy, and gain by bucket with intervals (Figure 5)",
    ),
    "figure6_budget_and_position": (
        "Budget, position, residuals",
        "Gain per kept token by budget (Table 10); where kept tokens stand; what the controls and "
        "the whole model leave of the gain, by bucket",
    ),
}


def write_analysis(
    gains: Sequence[Path],
    out: Path,
    view: Path | None = None,
    k: int = 16,
    resamples: int = 2000,
    seed: int = 0,
) -> Tables:
    """Analyze the gain tables of one bank, one per training seed, and write all there is to `out`.

    Args: as for `analyze`, and
        view: of `score --view`: responses to show token by token, with the first seed's gain.

    Raises:
        ValueError: a table or the view is not what it should be; matplotlib is not installed.
    """
    if find_spec("matplotlib") is None:
        raise ValueError("matplotlib: not installed; pip install 'megatron-taopd[plots]'")
    from megatron_taopd.diagnostics import figures

    if resamples < 100:
        raise ValueError(f"--resamples: {resamples} is too few for a 95 % interval; at least 100")
    bank, gains_by_seed = read_gains(gains)
    first_gain = next(iter(gains_by_seed.values()))
    views = read_views(view, bank, first_gain, k) if view else []
    tables = analyze(bank, gains_by_seed, k, resamples, seed)
    for name, rows in tables.items():
        with (
            file_written_aside(out / f"{name}.csv") as aside,
            aside.open("w", newline="", encoding="utf-8") as file,
        ):
            writer = csv.DictWriter(file, rows[0].keys())
            writer.writeheader()
            writer.writerows(rows)
    drawn = figures.draw(tables, k)
    figures.save(drawn, out)
    shown = {
        title: (note, figures.as_svg(drawn[name], title)) for name, (title, note) in FIGURES.items()
    }
    with file_written_aside(out / "report.html") as aside:
        aside.write_text(render(tables, k, shown, views), encoding="utf-8")
    return tables
