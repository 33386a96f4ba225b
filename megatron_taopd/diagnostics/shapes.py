"""How the gain depends on the variables: in buckets, behind the regressions, on planes."""

from __future__ import annotations

import numpy as np
import torch

from megatron_taopd.diagnostics.bootstrap import interval, ratio
from megatron_taopd.diagnostics.gains import Row, ScoredBank, estimate_row, shape_variables
from megatron_taopd.diagnostics.regressions import CONTROLS, MODELS, predictors
from megatron_taopd.step.teachability import normalize_disagreement, normalize_entropy

BUCKETS, CELLS = 10, 16


def quantile_buckets(values: np.ndarray, count: int = BUCKETS) -> np.ndarray:
    """Number buckets of about as many rows each, [R] int64 from 0; equal values share one."""
    edges = np.unique(np.quantile(values, np.arange(1, count) / count))
    return np.searchsorted(edges, values, side="left")


def _bucket_rows(bank: ScoredBank, values, groups, variable, counts, keys: Row) -> list[Row]:
    num_groups = int(groups.max()) + 1
    sizes = np.bincount(groups, minlength=num_groups)
    middles = ratio(np.bincount(groups, weights=variable, minlength=num_groups), sizes)
    estimates = interval(bank.group_means(values, groups, num_groups, counts))
    return [
        keys
        | {"bucket": i, "x": float(middles[i]), "rows": int(sizes[i])}
        | estimate_row(estimates[:, i])
        for i in range(num_groups)
        if sizes[i]
    ]


def buckets(bank: ScoredBank, gain, k: int, counts: np.ndarray) -> list[Row]:
    """Average the gain in buckets of D, C, D^L and D^I; x is the variable's mean in its bucket."""
    return [
        row
        for name, variable in shape_variables(bank, k).items()
        for row in _bucket_rows(
            bank, gain, quantile_buckets(variable), variable, counts, {"K": k, "variable": name}
        )
    ]


def residual_bins(bank: ScoredBank, gain, k: int, counts: np.ndarray) -> list[Row]:
    """Average the residual gain, in nats, in buckets: is the regression's answer one of linearity?

    residual: `controls`, behind H, position and teacher entropy, shows the shape that is left for
    the variable; `decomposed`, behind that whole model, is near 0 where its lines fit. The
    regression is that of the whole bank in every resample.
    """
    columns = predictors(bank, k)
    rows = []
    for residual, terms in (("controls", CONTROLS), ("decomposed", MODELS["decomposed"])):
        design = np.stack([np.ones(bank.num_rows), *(columns[term] for term in terms)], axis=1)
        left = gain - design @ np.linalg.solve(design.T @ design, design.T @ gain)
        for name, variable in shape_variables(bank, k).items():
            keys = {"K": k, "residual": residual, "variable": name}
            groups = quantile_buckets(variable)
            rows += _bucket_rows(bank, left, groups, variable, counts, keys)
    return rows


def planes(bank: ScoredBank, gain, k: int) -> list[Row]:
    """Average in the cells of Figure 2: gain over (D^L, D^I); D^L and D^I over (H̃, D̃)."""
    h = normalize_entropy(torch.from_numpy(bank.columns["student_entropy"])).numpy()
    d = normalize_disagreement(torch.from_numpy(bank.columns[f"D_{k}"])).numpy()
    shapes = shape_variables(bank, k)
    learnable, incompatible = shapes["D^L"], shapes["D^I"]
    rows = []
    for name, x, y, values in (
        ("gain over (D^L, D^I)", learnable, incompatible, gain),
        ("D^L over (H, D)", h, d, learnable),
        ("D^I over (H, D)", h, d, incompatible),
    ):
        cell_x, cell_y = (np.minimum((z * CELLS).astype(int), CELLS - 1) for z in (x, y))
        cells = cell_x * CELLS + cell_y
        sizes = np.bincount(cells, minlength=CELLS**2)
        means = ratio(np.bincount(cells, weights=values, minlength=CELLS**2), sizes)
        rows += [
            {"K": k, "plane": name, "x": i // CELLS, "y": i % CELLS, "rows": int(sizes[i])}
            | estimate_row((means[i], np.nan, np.nan))
            for i in map(int, np.flatnonzero(sizes))
        ]
    return rows
