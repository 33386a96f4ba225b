"""Regressions of the gain on entropy, disagreement and their parts (Sections 3, C and F; Table 9).

Shapes: P prompts · W = 1 + resamples · Q columns of a regression
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from megatron_taopd.diagnostics.bootstrap import interval, ratio
from megatron_taopd.diagnostics.gains import Row, ScoredBank, estimate_row, shape_variables

TERMS = ("H", "D", "H·D", "position", "teacher entropy", "C", "D^L", "D^I")
_H, _D, _HD = (1 + TERMS.index(term) for term in ("H", "D", "H·D"))  # behind the constant
CONTROLS = ("H", "position", "teacher entropy")
MODELS = {
    "baseline": ("H", "D", "H·D", "position", "teacher entropy"),
    "+ C": ("H", "D", "H·D", "position", "teacher entropy", "C"),
    "decomposed": ("H", "D^L", "D^I", "H·D", "position", "teacher entropy"),
}


def predictors(bank: ScoredBank, k: int) -> dict[str, np.ndarray]:
    """Standardise every term over the bank, [R] each; H·D is the product of two such.

    D^L and D^I are normalised over the whole bank, once: a resample of prompts does not move the
    quantiles.

    Raises:
        ValueError: a predictor is the same on every row.
    """
    shapes = shape_variables(bank, k)
    columns = {
        "H": bank.columns["student_entropy"],
        "D": shapes["D"],
        "position": bank.place(),
        "teacher entropy": bank.columns["teacher_entropy"],
        **{name: shapes[name] for name in ("C", "D^L", "D^I")},
    }
    for term, values in columns.items():
        if np.ptp(values) < 1e-12:
            raise ValueError(f"{term} at K = {k}: the same on every row; nothing to regress on")
        columns[term] = (values - values.mean()) / values.std()
    columns["H·D"] = columns["H"] * columns["D"]
    return {term: columns[term] for term in TERMS}


def prompt_moments(bank: ScoredBank, columns: Sequence[np.ndarray]) -> np.ndarray:
    """Sum z zᵀ over the rows of each prompt, [P, Q, Q], where z is one row of the columns."""
    moments = np.empty((bank.num_prompts, len(columns), len(columns)))
    for i, left in enumerate(columns):
        for j, right in enumerate(columns[: i + 1]):
            sums = np.bincount(bank.prompts, weights=left * right, minlength=bank.num_prompts)
            moments[:, i, j] = moments[:, j, i] = sums
    return moments


def correlations(moments: np.ndarray) -> np.ndarray:
    """Correlate (TERMS…, gain), [W, Q−1, Q−1], given moments [W, Q, Q] of (1, TERMS…, gain).

    H·D becomes the product of H and D as standardised in this very resample: with their means h and
    d there, (H − h)(D − d) = HD − d·H − h·D + hd, which is linear in the columns at hand.
    """
    means = moments[:, 0] / moments[:, :1, 0]
    recentre = np.tile(np.eye(moments.shape[-1]), (len(moments), 1, 1))
    recentre[:, _H, _HD] = -means[:, _D]
    recentre[:, _D, _HD] = -means[:, _H]
    recentre[:, 0, _HD] = means[:, _H] * means[:, _D]
    return correlate(recentre.transpose(0, 2, 1) @ moments @ recentre)


def correlate(moments: np.ndarray) -> np.ndarray:
    """Correlate the columns behind the constant, [W, Q−1, Q−1], given their moments [W, Q, Q]."""
    means = moments[:, 0] / moments[:, :1, 0]
    covariances = moments / moments[:, :1, :1] - means[:, :, None] * means[:, None]
    covariances = covariances[:, 1:, 1:]
    deviations = np.sqrt(np.einsum("wqq->wq", covariances))
    return ratio(covariances, deviations[:, :, None] * deviations[:, None])


def fit(
    correlations: np.ndarray, terms: Sequence[str], among: Sequence[str] = TERMS
) -> tuple[np.ndarray, np.ndarray]:
    """Regress the gain on these terms: standardised coefficients [W, terms] and R² [W].

    Args:
        correlations: [W, Q, Q] of the terms `among` and, last, the gain.
    """
    chosen = [among.index(term) for term in terms]
    # A term that does not vary in a resample has no correlation there: pinv gives it a 0.
    known = np.nan_to_num(correlations)
    gram, target = known[:, chosen][:, :, chosen], known[:, chosen, -1]
    beta = np.einsum("wij,wj->wi", np.linalg.pinv(gram, rcond=1e-12, hermitian=True), target)
    return beta, (beta * target).sum(axis=1)


def regressions(bank: ScoredBank, gain, k: int, counts: np.ndarray) -> tuple[list[Row], list[Row]]:
    """Tabulate every model's coefficients, and β(D^L), β(D^I), their gap, ΔR² in 10⁻³ (Table 9).

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
        | estimate_row(interval(fitted[model][0][:, i]))
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
        {"K": k, "quantity": name, "rows": bank.num_rows} | estimate_row(interval(values))
        for name, values in quantities.items()
    ]
