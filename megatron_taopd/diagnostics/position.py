"""Is teachability more than position? The gain by both, and gaps among rows that stand alike.

Teachable positions are early ones, and early ones gain. So D^L is put beside where a row stands,
linearly (`position_regression`) and without a shape, inside parts of the responses
(`position_gaps`). Shapes: R rows · P prompts · W = 1 + resamples · B cells
"""

from __future__ import annotations

import numpy as np

from megatron_taopd.diagnostics.bootstrap import interval, ratio
from megatron_taopd.diagnostics.gains import Row, ScoredBank, estimate_row, shape_variables
from megatron_taopd.diagnostics.q3 import high_half
from megatron_taopd.diagnostics.regressions import correlate, fit, prompt_moments
from megatron_taopd.diagnostics.shapes import quantile_buckets

TERMS = ("position", "log token", "D", "D^L", "D^I")
POSITION = ("position", "log token")
# quantity -> the term whose coefficient it is, and the terms of the regression
COEFFICIENTS = {
    "β(D^L)": ("D^L", ("D^L",)),
    "β(D^L) beside position": ("D^L", (*POSITION, "D^L")),
    "β(D^L) beside position and D": ("D^L", (*POSITION, "D", "D^L")),
    "β(D^L) beside position and D^I": ("D^L", (*POSITION, "D^L", "D^I")),
    "β(D^I) beside position and D^L": ("D^I", (*POSITION, "D^L", "D^I")),
    "β(position) beside D^L and D^I": ("position", (*POSITION, "D^L", "D^I")),
    "β(log token) beside D^L and D^I": ("log token", (*POSITION, "D^L", "D^I")),
}
PARTS = 10  # equal parts of a response, in which rows stand alike


def position_regression(bank: ScoredBank, gain, k: int, counts: np.ndarray) -> list[Row]:
    """Regress the gain on position, D, D^L and D^I together, all standardised in each resample.

    Position is two columns: (t + ½) / length, which `prefix_share` goes by, and log(1 + t), by
    which `prefix` does.

    Raises:
        ValueError: a column is the same on every row.
    """
    shapes = shape_variables(bank, k)
    columns = {"position": bank.place(), "log token": np.log1p(bank.columns["position"]), **shapes}
    standardised = []
    for term in TERMS:
        values = columns[term]
        if np.ptp(values) < 1e-12:
            raise ValueError(f"{term} at K = {k}: the same on every row; nothing to regress on")
        standardised.append((values - values.mean()) / values.std())
    scaled = (gain - gain.mean()) / (gain.std() or 1.0)
    moments = prompt_moments(bank, [np.ones(bank.num_rows), *standardised, scaled])
    resampled = (counts @ moments.reshape(bank.num_prompts, -1)).reshape(-1, *moments.shape[1:])
    table = correlate(resampled)

    def r2(*terms: str) -> np.ndarray:
        return fit(table, terms, TERMS)[1]

    quantities = {
        name: fit(table, terms, TERMS)[0][:, terms.index(term)]
        for name, (term, terms) in COEFFICIENTS.items()
    }
    position, with_d = r2(*POSITION), r2(*POSITION, "D")
    quantities |= {
        "R² (position)": position,
        "ΔR² (D^L over position), 10⁻³": 1e3 * (r2(*POSITION, "D^L") - position),
        "ΔR² (D^L over position and D), 10⁻³": 1e3 * (r2(*POSITION, "D", "D^L") - with_d),
    }
    return [
        {"K": k, "quantity": name, "rows": bank.num_rows, **estimate_row(interval(values))}
        for name, values in quantities.items()
    ]


def position_gaps(bank: ScoredBank, gain, k: int, counts: np.ndarray) -> list[Row]:
    """Subtract the mean gain of the low half from that of the high one, by D, D^L and D^I.

    among: `all rows`, whatever their position; `part i`, those in the i-th of PARTS equal parts of
    their response, halved at that part's own median; `parts`, the mean of these gaps, each part
    weighing as many rows as it has; and `parts, D`, likewise in cells of one part and one of ten
    buckets of D: what is left of D^L and D^I where both position and D are alike.
    """
    part = np.minimum((bank.place() * PARTS).astype(int), PARTS - 1)
    shapes = shape_variables(bank, k)
    d_bucket = quantile_buckets(shapes["D"])
    cells = part * (int(d_bucket.max()) + 1) + d_bucket
    everywhere = np.zeros_like(part)
    rows = []
    for name in ("D", "D^L", "D^I"):
        whole, _ = cell_gaps(bank, gain, shapes[name], everywhere, counts)
        gaps, weights = cell_gaps(bank, gain, shapes[name], part, counts)
        found = {"all rows": whole[:, 0]}
        found |= {f"part {i + 1}": gaps[:, i] for i in range(gaps.shape[1])}
        found["parts"] = weighted_mean(gaps, weights)
        if name != "D":
            matched = cell_gaps(bank, gain, shapes[name], cells, counts)
            found["parts, D"] = weighted_mean(*matched)
        rows += [
            {"K": k, "variable": name, "among": among, "rows": bank.num_rows}
            | estimate_row(interval(values))
            for among, values in found.items()
        ]
    return rows


def cell_gaps(
    bank: ScoredBank, gain, variable: np.ndarray, cells: np.ndarray, counts: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Halve each cell at its own median; return the gaps and the numbers of rows, [W, B] each.

    Cells are halved once, on the whole bank. A gap is NaN where a resample lacks a half.
    """
    number = int(cells.max()) + 1
    halves = np.zeros(bank.num_rows, dtype=int)
    for cell in np.unique(cells):
        inside = cells == cell
        halves[inside] = high_half(variable[inside])
    groups = 2 * cells + halves
    sums = (counts @ bank.group_sums(values, groups, 2 * number) for values in (gain, 1.0))
    totals, sizes = (each.reshape(-1, number, 2) for each in sums)
    means = ratio(totals, sizes)
    return means[..., 1] - means[..., 0], sizes.sum(-1)


def weighted_mean(gaps: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """Average gaps [W, B] over the cells in which there is one: [W]."""
    there = np.isfinite(gaps)
    return ratio(np.where(there, gaps * weights, 0).sum(1), (weights * there).sum(1))
