"""The statistics of the paper's fixed-context diagnostic (Sections 3, C–G) as tables.

`gains` says what a table is. Shapes: R rows · P prompts · W = 1 + resamples
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from megatron_taopd.diagnostics.bootstrap import draw_counts, interval, t_interval
from megatron_taopd.diagnostics.gains import Row, ScoredBank, Tables, estimate_row
from megatron_taopd.diagnostics.position import position_gaps, position_regression
from megatron_taopd.diagnostics.q3 import PROXIES, in_q3, support_gaps
from megatron_taopd.diagnostics.regressions import regressions
from megatron_taopd.diagnostics.selectors import (
    TOP_N_RATIOS,
    Masks,
    kept_positions,
    kept_rows,
    selector_gains,
)
from megatron_taopd.diagnostics.shapes import buckets, planes, residual_bins
from megatron_taopd.step.teachability import normalize_disagreement, normalize_entropy


def analyze(
    bank: ScoredBank,
    gains: dict[str, np.ndarray],
    k: int = 16,
    resamples: int = 2000,
    seed: int = 0,
) -> Tables:
    """Compute every table, each row with its `seed`; several seeds are followed by their `mean`.

    Args:
        gains: [R] of each training seed, by name.
        k: of the selectors and of what is shown for one K.
        seed: of the resamples and of the selector `random`.

    Raises:
        ValueError: the bank lacks k, or a predictor does not vary.
    """
    if k not in bank.ks:
        raise ValueError(f"--k: {k} is not in the table; one of {', '.join(map(str, bank.ks))}")
    counts = draw_counts(bank.num_prompts, resamples, seed)
    masks = kept_rows(bank, k, seed)
    by_seed = {name: _tables_of_gain(bank, gain, k, masks, counts) for name, gain in gains.items()}
    tables: Tables = {}
    for table in next(iter(by_seed.values())):
        each = {name: tables_of[table] for name, tables_of in by_seed.items()}
        tables[table] = [{"seed": name, **row} for name, rows in each.items() for row in rows]
        if len(each) > 1:
            tables[table] += mean_over_seeds(list(each.values()))
    return tables | {"kept_positions": kept_positions(bank, masks)}


def _tables_of_gain(bank: ScoredBank, gain, k: int, masks: Masks, counts: np.ndarray) -> Tables:
    coefficients, decomposition = [], []
    for each in bank.ks:
        fitted, differences = regressions(bank, gain, each, counts)
        coefficients += fitted
        decomposition += differences
    gaps = [row for each in bank.ks for row in support_gaps(bank, gain, each, counts)]
    budgets = selector_gains(bank, gain, masks, counts)
    return {
        "table1_robustness": [row for row in gaps if row["proxy"] == PROXIES["C"]],
        "table5_bank": bank_summary(bank, gain, k, counts),
        "table6_support_proxies": gaps,
        "table8_top_n": [row for row in budgets if row["budget"] in TOP_N_RATIOS],
        "table9_regression": decomposition,
        "table10_budget_sweep": budgets,
        "standardized_regression_coefficients": coefficients,
        "position_regression": [
            row for each in bank.ks for row in position_regression(bank, gain, each, counts)
        ],
        "position_gaps": [
            row for each in bank.ks for row in position_gaps(bank, gain, each, counts)
        ],
        "bucket_gains": [row for each in bank.ks for row in buckets(bank, gain, each, counts)],
        "spline_sanity_bins": [
            row for each in bank.ks for row in residual_bins(bank, gain, each, counts)
        ],
        "planes": planes(bank, gain, k),
    }


def mean_over_seeds(tables: Sequence[list[Row]]) -> list[Row]:
    """Make one table of those of S ≥ 2 seeds of one bank: means and 95 % t-intervals over seeds."""
    rows = []
    for same in zip(*tables, strict=True):
        values = np.array([row["estimate"] for row in same])
        rows.append({"seed": "mean", **same[0], **estimate_row(t_interval(values))})
    return rows


def bank_summary(bank: ScoredBank, gain, k: int, counts: np.ndarray) -> list[Row]:
    """Say what the bank is, and how much was gained on it (Table 5)."""
    h = normalize_entropy(torch.from_numpy(bank.columns["student_entropy"]))
    d = normalize_disagreement(torch.from_numpy(bank.columns[f"D_{k}"]))
    facts = {
        "prompts": bank.num_prompts,
        "sequences": len(np.unique(bank.sequence)),
        "share of rows in Q3": in_q3(bank, k).mean(),
        "median H̃": float(h.median()),
        "median D̃": float(d.median()),
    }
    everywhere = np.zeros(bank.num_rows, dtype=np.int64)
    means = {"mean gain": gain, "share of rows with gain > 0": gain > 0}
    return [
        {"quantity": name, "rows": bank.num_rows, **estimate_row((value, np.nan, np.nan))}
        for name, value in facts.items()
    ] + [
        {"quantity": name, "rows": bank.num_rows}
        | estimate_row(interval(bank.group_means(values, everywhere, 1, counts)[:, 0]))
        for name, values in means.items()
    ]
