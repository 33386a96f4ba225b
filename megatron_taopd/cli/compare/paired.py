"""Two arms on the same problems with the same seeds: how far apart, with an interval.

Shapes: S seeds · Q problems
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq

RESAMPLES = 2000


def outcomes(directories: Sequence[Path]) -> np.ndarray | None:
    """Read the share of right answers to each problem in each run's last evaluation: [S, Q].

    Returns:
        None where a run has not left it.
    """
    files = [directory / "evaluation.json" for directory in directories]
    if not all(file.is_file() for file in files):
        return None
    read = [json.loads(file.read_text()) for file in files]
    return np.array([np.array(each["correct"]) / each["samples"] for each in read])


def gains(directories: Sequence[Path]) -> tuple[np.ndarray, np.ndarray] | None:
    """Read `gain.parquet` of each run, by `taopd diagnose gain`: gains summed by prompt, and rows.

    Returns:
        [S, Q] both; None where a run has none.
    """
    files = [directory / "gain.parquet" for directory in directories]
    if not all(file.is_file() for file in files):
        return None
    sums, rows = [], []
    for file in files:
        table = pq.read_table(file, columns=["prompt", "gain"])
        prompts = np.unique(table["prompt"].to_numpy(), return_inverse=True)[1]
        sums.append(np.bincount(prompts, weights=table["gain"].to_numpy()))
        rows.append(np.bincount(prompts))
    return np.array(sums), np.array(rows)


def difference(
    values: np.ndarray, reference: np.ndarray, weights: np.ndarray | None = None, seed: int = 0
) -> tuple[float, float, float]:
    """Return the mean difference of two arms and its paired 95 % bootstrap interval.

    Seeds and problems are drawn with replacement, independently and for both arms alike, since both
    could have been others.

    Args:
        values, reference: [S, Q] sums over what each problem has, by seed.
        weights: [S, Q] how much that is; None: 1.

    Raises:
        ValueError: they are of other problems or seeds.
    """
    weights = np.ones(values.shape) if weights is None else weights
    if not values.shape == reference.shape == weights.shape:
        raise ValueError(
            f"{values.shape} and {reference.shape} seeds and problems; both arms need the same"
        )
    seeds, problems = values.shape
    rng = np.random.default_rng(seed)
    drawn_seeds = rng.multinomial(seeds, np.full(seeds, 1 / seeds), size=RESAMPLES)
    drawn_problems = rng.multinomial(problems, np.full(problems, 1 / problems), size=RESAMPLES)

    def weighed(of: np.ndarray, by_seed: np.ndarray, by_problem: np.ndarray) -> np.ndarray:
        return np.einsum("ws,wq,sq->w", by_seed, by_problem, of, optimize=True)

    apart = values - reference
    estimate = apart.sum() / weights.sum()
    drawn = drawn_seeds, drawn_problems
    low, high = np.quantile(weighed(apart, *drawn) / weighed(weights, *drawn), (0.025, 0.975))
    return float(estimate), float(low), float(high)


def verdict(low: float, high: float, margin: float) -> str:
    """Say whether an arm is not inferior to its reference by more than a margin."""
    if low > -margin:
        return "not inferior"
    return "inferior" if high < -margin else "open"
