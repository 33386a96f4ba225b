"""The statistics of the paper's fixed-context diagnostic (Sections 3, C–G) as tables.

A table is a list of rows; a row has its keys (K, term, selector, …) and

    rows: how many response rows it rests on
    estimate, low, high: the value and its 95 % interval (prompt-cluster bootstrap)

Shapes, besides those of `types.py`: P prompts · W = 1 + resamples · Q columns of a regression
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch

from megatron_taopd.diagnostics.bootstrap import (
    draw_counts,
    group_sums,
    interval,
    ratio,
    t_interval,
)
from megatron_taopd.diagnostics.table import KS, SUPPORT, read_table
from megatron_taopd.step.selection import SELECTORS, budget
from megatron_taopd.step.teachability import (
    bounded,
    incompatible_disagreement,
    learnable_disagreement,
    normalize_disagreement,
    normalize_entropy,
)
from megatron_taopd.types import TokenScores

PROXIES = {
    "C": "Teacher mass on student support",
    "overlap": "Top-K overlap",
    "jaccard": "Top-K Jaccard",
    "shared": "Shared teacher top-K mass",
    "cbc": "CBC",
}
# The paper's names.
SELECTOR_NAMES = {
    "full": "Full OPD",
    "random": "Random",
    "entropy": "Entropy",
    "divergence": "Raw KL",
    "compatibility": "C-only",
    "tip": "TIP",
    "teachability": "TA-OPD",
    "teachability_entropy": "TA-OPD+Ent.",
    "q3": "Q3-only",
    "q3_high_c": "Q3+high-C",
    "q3_high_dl": "Q3+TA (high D^L)",
    "q3_low_dl": "Q3+low D^L",
    "q3_high_di": "Q3+high D^I",
}
RATIOS = (0.01, 0.02, 0.03, 0.05, 0.1, 0.2, 0.3, 0.5)
TOP_N_RATIOS = (0.03, 0.05, 0.1)

TERMS = ("H", "D", "H·D", "position", "teacher entropy", "C", "D^L", "D^I")
_H, _D, _HD = (1 + TERMS.index(term) for term in ("H", "D", "H·D"))  # behind the constant
CONTROLS = ("H", "position", "teacher entropy")
MODELS = {
    "baseline": ("H", "D", "H·D", "position", "teacher entropy"),
    "+ C": ("H", "D", "H·D", "position", "teacher entropy", "C"),
    "decomposed": ("H", "D^L", "D^I", "H·D", "position", "teacher entropy"),
}
BUCKETS, CELLS, PLACES = 10, 16, 20

Row = dict[str, Any]
Tables = dict[str, list[Row]]
Masks = dict[tuple[str, float], np.ndarray]


@dataclass(frozen=True)
class Bank:
    """Scores of the initial student and the teacher on every response row of the bank.

    Attributes:
        columns: [R] float64 each: the table's, by name; an infinite D counts as the largest finite.
        prompts: [R] int64, which of the P prompts, numbered from 0.
        sequence: [R] int64, the number of the row's sequence in the bank.
        ks: for which there are D, C and the other proxies.
        fingerprint: of the bank.
    """

    columns: dict[str, np.ndarray]
    prompts: np.ndarray
    sequence: np.ndarray
    ks: tuple[int, ...] = KS
    fingerprint: str = ""

    @property
    def num_rows(self) -> int:
        return len(self.prompts)

    @property
    def num_prompts(self) -> int:
        return int(self.prompts.max()) + 1

    def scores(self, k: int) -> TokenScores:
        """As in training: float32."""
        names = (f"D_{k}", f"C_{k}", "student_entropy", "teacher_entropy")
        return TokenScores(*(torch.from_numpy(self.columns[name]).float() for name in names))

    def place(self) -> np.ndarray:
        """[R] in (0, 1), where in its response a row stands."""
        return (self.columns["position"] + 0.5) / self.columns["length"]

    def group_sums(self, values, groups: np.ndarray, num_groups: int) -> np.ndarray:
        values = np.broadcast_to(values, self.prompts.shape)
        return group_sums(values, self.prompts, self.num_prompts, groups, num_groups)

    def group_means(self, values, groups, num_groups: int, counts: np.ndarray) -> np.ndarray:
        """[W, G] means of values [R] over the rows of each group in each resample."""
        sums = self.group_sums(values, groups, num_groups)
        return ratio(counts @ sums, counts @ self.group_sums(1.0, groups, num_groups))


def read_gains(paths: Sequence[str | Path]) -> tuple[Bank, dict[str, np.ndarray]]:
    """The bank as the initial student and the teacher see it, and each seed's gain [R], by file.

    Raises:
        ValueError: a table is missing or none that `write_gain` wrote, a value is not a number, or
            the tables differ in more than the gain.
    """
    first, gains = None, {}
    for path in map(Path, paths):
        table, about = read_table(path)
        if "gain" not in table.column_names:
            raise ValueError(f"{path}: no column gain; `gain` makes such a table of two scores")
        name = path.stem if path.stem not in gains else str(path)
        gains[name] = _numbers(path, "gain", table)
        scores = table.drop_columns("gain")
        if first is None:
            first, bank = scores, _bank(path, table, about["bank"])
        elif not scores.equals(first):
            raise ValueError(
                f"{path}: its scores are not those of {paths[0]}; all gains are over one table"
            )
    return bank, gains


def _bank(path: Path, table: pa.Table, fingerprint: str) -> Bank:
    prompts = np.unique(table["prompt"].to_numpy(), return_inverse=True)[1]
    if len(prompts) == 0 or prompts.max() == 0:
        raise ValueError(f"{path}: fewer than 2 prompts; intervals are over prompts")
    used = ("position", "length", "student_entropy", "teacher_entropy")
    used += tuple(f"{name}_{k}" for k in KS for name in SUPPORT)
    columns = {name: _numbers(path, name, table) for name in used}
    return Bank(columns, prompts, table["sequence"].to_numpy(), KS, fingerprint)


def _numbers(path: Path, name: str, table: pa.Table) -> np.ndarray:
    """[R] float64. D is infinite where the student rules an id of the union out: see `Bank`."""
    values = torch.from_numpy(table[name].to_numpy().astype(np.float64))
    if name.startswith("D_"):
        values = bounded(values, f"{path}: {name}")
    if not values.isfinite().all():
        raise ValueError(f"{path}: {name}: has NaN or infinite values; they have to be finite")
    return values.numpy()


def analyze(
    bank: Bank,
    gains: dict[str, np.ndarray],
    k: int = 16,
    resamples: int = 2000,
    seed: int = 0,
) -> Tables:
    """Every table, each row with its `seed`; with several seeds rows of seed `mean` follow.

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


def _tables_of_gain(bank: Bank, gain, k: int, masks: Masks, counts: np.ndarray) -> Tables:
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
        "bucket_gains": [row for each in bank.ks for row in buckets(bank, gain, each, counts)],
        "spline_sanity_bins": [
            row for each in bank.ks for row in residual_bins(bank, gain, each, counts)
        ],
        "planes": planes(bank, gain, k),
    }


def mean_over_seeds(tables: Sequence[list[Row]]) -> list[Row]:
    """One table from those of S ≥ 2 seeds of one bank: means, and 95 % t-intervals over seeds."""
    rows = []
    for same in zip(*tables, strict=True):
        estimate, low, high = t_interval(np.array([row["estimate"] for row in same]))
        rows.append({"seed": "mean", **same[0], **_estimate((estimate, low, high))})
    return rows


def _estimate(triple) -> Row:
    return dict(zip(("estimate", "low", "high"), map(float, triple), strict=True))


# --- regressions --------------------------------------------------------------------------------


def predictors(bank: Bank, k: int) -> dict[str, np.ndarray]:
    """[R] each, by term, with mean 0 and variance 1 over the bank; H·D is the product of two such.

    D^L and D^I are normalised over the whole bank, once: a resample of prompts does not move the
    quantiles.

    Raises:
        ValueError: a predictor is the same on every row.
    """
    d, c = (torch.from_numpy(bank.columns[f"{name}_{k}"]) for name in "DC")
    columns = {
        "H": bank.columns["student_entropy"],
        "D": d.numpy(),
        "position": bank.place(),
        "teacher entropy": bank.columns["teacher_entropy"],
        "C": c.numpy(),
        "D^L": learnable_disagreement(d, c).numpy(),
        "D^I": incompatible_disagreement(d, c).numpy(),
    }
    for term, values in columns.items():
        if np.ptp(values) < 1e-12:
            raise ValueError(f"{term} at K = {k}: the same on every row; nothing to regress on")
        columns[term] = (values - values.mean()) / values.std()
    columns["H·D"] = columns["H"] * columns["D"]
    return {term: columns[term] for term in TERMS}


def prompt_moments(bank: Bank, columns: Sequence[np.ndarray]) -> np.ndarray:
    """[P, Q, Q], Σ z zᵀ over the rows of each prompt, where z is one row of the columns."""
    moments = np.empty((bank.num_prompts, len(columns), len(columns)))
    for i, left in enumerate(columns):
        for j, right in enumerate(columns[: i + 1]):
            sums = np.bincount(bank.prompts, weights=left * right, minlength=bank.num_prompts)
            moments[:, i, j] = moments[:, j, i] = sums
    return moments


def correlations(moments: np.ndarray) -> np.ndarray:
    """[W, Q−1, Q−1] correlations of (TERMS…, gain) from moments [W, Q, Q] of (1, TERMS…, gain).

    H·D becomes the product of H and D as standardised in this very resample: with their means h and
    d there, (H − h)(D − d) = HD − d·H − h·D + hd, which is linear in the columns at hand.
    """
    means = moments[:, 0] / moments[:, :1, 0]
    recentre = np.tile(np.eye(moments.shape[-1]), (len(moments), 1, 1))
    recentre[:, _H, _HD] = -means[:, _D]
    recentre[:, _D, _HD] = -means[:, _H]
    recentre[:, 0, _HD] = means[:, _H] * means[:, _D]
    moments = recentre.transpose(0, 2, 1) @ moments @ recentre
    means = moments[:, 0] / moments[:, :1, 0]
    covariances = moments / moments[:, :1, :1] - means[:, :, None] * means[:, None]
    covariances = covariances[:, 1:, 1:]
    deviations = np.sqrt(np.einsum("wqq->wq", covariances))
    return ratio(covariances, deviations[:, :, None] * deviations[:, None])


def fit(correlations: np.ndarray, terms: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
    """Standardised coefficients [W, terms] and R² [W] of the gain on these terms."""
    chosen = [TERMS.index(term) for term in terms]
    # A term that does not vary in a resample has no correlation there: pinv gives it a 0.
    known = np.nan_to_num(correlations)
    gram, target = known[:, chosen][:, :, chosen], known[:, chosen, -1]
    beta = np.einsum("wij,wj->wi", np.linalg.pinv(gram, rcond=1e-12, hermitian=True), target)
    return beta, (beta * target).sum(axis=1)


def regressions(bank: Bank, gain, k: int, counts: np.ndarray) -> tuple[list[Row], list[Row]]:
    """Coefficients of every model, and Table 9: β(D^L), β(D^I), their gap, ΔR² in 10⁻³.

    The gain and all predictors are standardised inside each resample.
    """
    # Affine changes of a column change nothing below, and these keep the moments well scaled.
    scaled = (gain - gain.mean()) / (gain.std() or 1.0)
    columns = [np.ones(bank.num_rows), *predictors(bank, k).values(), scaled]
    moments = prompt_moments(bank, columns)
    resampled = (counts @ moments.reshape(bank.num_prompts, -1)).reshape(-1, *moments.shape[1:])
    table = correlations(resampled)
    fitted = {model: fit(table, terms) for model, terms in MODELS.items()}
    coefficients = [
        {"K": k, "model": model, "term": term, "rows": bank.num_rows}
        | _estimate(interval(fitted[model][0][:, i]))
        for model, terms in MODELS.items()
        for i, term in enumerate(terms)
    ]
    beta, r2 = fitted["decomposed"]
    learnable, incompatible = (beta[:, MODELS["decomposed"].index(t)] for t in ("D^L", "D^I"))
    baseline = fitted["baseline"][1]
    quantities = {
        "β(D^L)": learnable,
        "β(D^I)": incompatible,
        "gap": learnable - incompatible,
        "ΔR² (+ C), 10⁻³": 1e3 * (fitted["+ C"][1] - baseline),
        "ΔR² (decomposed), 10⁻³": 1e3 * (r2 - baseline),
        "R² (baseline)": baseline,
    }
    return coefficients, [
        {"K": k, "quantity": name, "rows": bank.num_rows} | _estimate(interval(values))
        for name, values in quantities.items()
    ]


# --- the low-entropy, high-divergence quadrant ---------------------------------------------------


def in_q3(bank: Bank, k: int) -> np.ndarray:
    """[R] bool: TIP's quadrant, as the selector `q3` has it."""
    return (SELECTORS["q3"](bank.scores(k), 0) > -torch.inf).numpy()


def high_half(values: np.ndarray) -> np.ndarray:
    """[r] bool: above the median, or from it on, whichever is nearer to half of the values.

    Proxies such as the overlap take few values, so that many equal the median.
    """
    if not len(values):
        return np.zeros(0, dtype=bool)
    median = np.median(values)
    return min(values > median, values >= median, key=lambda high: abs(high.mean() - 0.5))


def support_gaps(bank: Bank, gain, k: int, counts: np.ndarray) -> list[Row]:
    """Mean gain of the high- minus the low-support half of Q3, by proxy (Tables 1, 6).

    pooled: over all rows of each half. matched: the gap inside each prompt that has rows in both
    halves, then the mean over those prompts, each with the same weight.
    """
    q3 = in_q3(bank, k)
    rows = []
    for proxy, name in PROXIES.items():
        groups = np.full(bank.num_rows, -1)
        groups[q3] = high_half(bank.columns[f"{proxy}_{k}"][q3])
        means = bank.group_means(gain, groups, 2, counts)
        within = ratio(bank.group_sums(gain, groups, 2), bank.group_sums(1.0, groups, 2))
        gaps = within[:, 1] - within[:, 0]
        both = np.isfinite(gaps)
        matched = ratio(counts @ np.where(both, gaps, 0), counts @ both)
        for estimator, values in (("pooled", means[:, 1] - means[:, 0]), ("matched", matched)):
            rows.append(
                {"K": k, "proxy": name, "estimator": estimator, "rows": int(q3.sum())}
                | {"rows_high": int((groups == 1).sum()), **_estimate(interval(values))}
            )
    return rows


# --- selectors on the bank -----------------------------------------------------------------------


def kept_rows(bank: Bank, k: int, seed: int) -> Masks:
    """[R] bool by (selector, budget): what `selection.select` keeps, with one sort per selector."""
    scores, masks = bank.scores(k), {}
    for name, priority_of in SELECTORS.items():
        priority = priority_of(scores, seed)
        order = priority.sort(descending=True, stable=True).indices
        order = order[priority[order] > -torch.inf].numpy()
        for share in RATIOS:
            kept = bank.num_rows if name == "full" else budget(share, bank.num_rows)
            masks[name, share] = np.zeros(bank.num_rows, dtype=bool)
            masks[name, share][order[:kept]] = True
    return masks


def selector_gains(bank: Bank, gain, masks: Masks, counts: np.ndarray) -> list[Row]:
    """Gain of the rows that each selector keeps (Tables 2, 8, 10).

    quantity: `total`, Σ gain in nats; `per kept`, over the number of kept rows; `per kept − all`,
    over the mean gain of all rows, which is what a random choice is expected to give. The rows are
    chosen once, on the whole bank; a resample of prompts takes those of its prompts.
    """
    everywhere = np.zeros(bank.num_rows, dtype=np.int64)
    average = bank.group_means(gain, everywhere, 1, counts)[:, 0]
    rows = []
    for (name, share), mask in masks.items():
        sums = (bank.group_sums(values, everywhere, 1)[:, 0] for values in (gain * mask, mask))
        total, kept = (counts @ of_prompts for of_prompts in sums)
        per_kept = ratio(total, kept)
        rows += [
            {"budget": share, "selector": SELECTOR_NAMES[name], "quantity": quantity}
            | {"rows": int(mask.sum()), **_estimate(interval(values))}
            for quantity, values in (
                ("total", total),
                ("per kept", per_kept),
                ("per kept − all", per_kept - average),
            )
        ]
    return sorted(rows, key=lambda row: row["budget"])


def kept_positions(bank: Bank, masks: Masks) -> list[Row]:
    """Where in their responses the kept rows stand, in PLACES equal parts.

    share: of the kept rows; keep_rate: of the rows in that part of a response.
    """
    part = np.minimum((bank.place() * PLACES).astype(int), PLACES - 1)
    everything = np.bincount(part, minlength=PLACES)
    rows = []
    for (name, share), mask in masks.items():
        kept = np.bincount(part[mask], minlength=PLACES)
        shares, rates = ratio(kept, mask.sum()), ratio(kept, everything)
        rows += [
            {"budget": share, "selector": SELECTOR_NAMES[name], "from": i / PLACES}
            | {"rows": int(kept[i]), "share": float(shares[i]), "keep_rate": float(rates[i])}
            for i in range(PLACES)
        ]
    return rows


# --- shapes --------------------------------------------------------------------------------------


def quantile_buckets(values: np.ndarray, count: int = BUCKETS) -> np.ndarray:
    """[R] int64 from 0: buckets of about as many rows each; equal values share one."""
    edges = np.unique(np.quantile(values, np.arange(1, count) / count))
    return np.searchsorted(edges, values, side="left")


def shape_variables(bank: Bank, k: int) -> dict[str, np.ndarray]:
    d, c = (torch.from_numpy(bank.columns[f"{name}_{k}"]) for name in "DC")
    return {
        "D": d.numpy(),
        "C": c.numpy(),
        "D^L": learnable_disagreement(d, c).numpy(),
        "D^I": incompatible_disagreement(d, c).numpy(),
    }


def _bucket_rows(bank: Bank, values, groups, variable, counts, keys: Row) -> list[Row]:
    num_groups = int(groups.max()) + 1
    sizes = np.bincount(groups, minlength=num_groups)
    middles = ratio(np.bincount(groups, weights=variable, minlength=num_groups), sizes)
    estimates = interval(bank.group_means(values, groups, num_groups, counts))
    return [
        keys
        | {"bucket": i, "x": float(middles[i]), "rows": int(sizes[i])}
        | _estimate(estimates[:, i])
        for i in range(num_groups)
        if sizes[i]
    ]


def buckets(bank: Bank, gain, k: int, counts: np.ndarray) -> list[Row]:
    """Mean gain in buckets of D, C, D^L and D^I; x is the mean of the variable in its bucket."""
    return [
        row
        for name, variable in shape_variables(bank, k).items()
        for row in _bucket_rows(
            bank, gain, quantile_buckets(variable), variable, counts, {"K": k, "variable": name}
        )
    ]


def residual_bins(bank: Bank, gain, k: int, counts: np.ndarray) -> list[Row]:
    """Mean residual gain, in nats, in buckets: is the regression's answer one of linearity?

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


def planes(bank: Bank, gain, k: int) -> list[Row]:
    """Cell means of Figure 2: gain over (D^L, D^I); D^L and D^I over (H̃, D̃). No intervals."""
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
            | _estimate((means[i], np.nan, np.nan))
            for i in map(int, np.flatnonzero(sizes))
        ]
    return rows


def bank_summary(bank: Bank, gain, k: int, counts: np.ndarray) -> list[Row]:
    """What the bank is, and how much was gained on it (Table 5)."""
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
        {"quantity": name, "rows": bank.num_rows, **_estimate((value, np.nan, np.nan))}
        for name, value in facts.items()
    ] + [
        {"quantity": name, "rows": bank.num_rows}
        | _estimate(interval(bank.group_means(values, everywhere, 1, counts)[:, 0]))
        for name, values in means.items()
    ]
