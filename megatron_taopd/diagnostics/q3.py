"""Support inside Q3, TIP's quadrant of low entropy and high divergence (Tables 1 and 6)."""

from __future__ import annotations

import numpy as np

from megatron_taopd.diagnostics.bootstrap import interval, ratio
from megatron_taopd.diagnostics.gains import Row, ScoredBank, estimate_row
from megatron_taopd.step.batch_scores import BatchScores

PROXIES = {
    "C": "Teacher mass on student support",
    "overlap": "Top-K overlap",
    "jaccard": "Top-K Jaccard",
    "shared": "Shared teacher top-K mass",
    "cbc": "CBC",
}


def in_q3(bank: ScoredBank, k: int) -> np.ndarray:
    """Mark the rows, [R] bool, of TIP's quadrant, as the selector `q3` has it."""
    scores = BatchScores.whole(bank.scores(k))
    inside = scores.in_q3()
    scores.refuse_nan()
    return inside.numpy()


def high_half(values: np.ndarray) -> np.ndarray:
    """Mark, [r] bool, what is above the median or from it on, whichever is nearer to a half.

    Proxies such as the overlap take few values, so that many equal the median.
    """
    if not len(values):
        return np.zeros(0, dtype=bool)
    median = np.median(values)
    return min(values > median, values >= median, key=lambda high: abs(high.mean() - 0.5))


def support_gaps(bank: ScoredBank, gain, k: int, counts: np.ndarray) -> list[Row]:
    """Subtract the mean gain of Q3's low-support half from the high one's (Tables 1, 6).

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
                | {"rows_high": int((groups == 1).sum()), **estimate_row(interval(values))}
            )
    return rows
