"""Intervals: over prompts by the prompt-cluster bootstrap, over training seeds by Student's t.

The rows of one prompt are correlated, so prompts are resampled, never rows. Every statistic is a
function of sums over the rows of each prompt, so a resample is a row of counts, and all resamples
are one matrix product. W = 1 + resamples: row 0 counts each prompt once and gives the estimate.
"""

from __future__ import annotations

import math
import warnings

import numpy as np

# Quantiles .975 of Student's t with 1 to 30 degrees of freedom; beyond, the last is a little wide.
_T = (
    *(12.7062, 4.3027, 3.1824, 2.7764, 2.5706, 2.4469, 2.3646, 2.3060, 2.2622, 2.2281),
    *(2.2010, 2.1788, 2.1604, 2.1448, 2.1314, 2.1199, 2.1098, 2.1009, 2.0930, 2.0860),
    *(2.0796, 2.0739, 2.0687, 2.0639, 2.0595, 2.0555, 2.0518, 2.0484, 2.0452, 2.0423),
)


def draw_counts(num_prompts: int, resamples: int, seed: int) -> np.ndarray:
    """Return [W, P] float64, how often each prompt is in each resample; row 0 is all ones."""
    shares = np.full(num_prompts, 1 / num_prompts)
    drawn = np.random.default_rng(seed).multinomial(num_prompts, shares, size=resamples)
    return np.concatenate([np.ones((1, num_prompts)), drawn])


def group_sums(
    values: np.ndarray, prompts: np.ndarray, num_prompts: int, groups: np.ndarray, num_groups: int
) -> np.ndarray:
    """Return [P, G] sums of values [R] by prompt and group; rows of group −1 are left out."""
    inside = groups >= 0
    cells = prompts[inside] * num_groups + groups[inside]
    sums = np.bincount(cells, weights=values[inside], minlength=num_prompts * num_groups)
    return sums.reshape(num_prompts, num_groups)


def ratio(numerator: np.ndarray, denominator: np.ndarray) -> np.ndarray:
    """Return the quotient, NaN where the denominator is 0: a mean over no rows."""
    with np.errstate(invalid="ignore", divide="ignore"):
        return np.where(denominator == 0, np.nan, numerator / denominator)


def interval(values: np.ndarray) -> np.ndarray:
    """Return [3, …] from [W, …]: the estimate and its 95 % percentile interval.

    Resamples in which the statistic does not exist (NaN) are left out.
    """
    drawn, tails = values[1:], (0.025, 0.975)
    if np.isnan(drawn).any():
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", RuntimeWarning)  # of columns that are all NaN
            bounds = np.nanquantile(drawn, tails, axis=0)
    else:
        bounds = np.quantile(drawn, tails, axis=0)
    return np.concatenate([values[:1], bounds])


def t_interval(values: np.ndarray) -> np.ndarray:
    """Return [3, …] from [S, …], S ≥ 2: the mean over seeds and its 95 % t-interval."""
    seeds = len(values)
    mean = values.mean(axis=0)
    half = _T[min(seeds - 1, len(_T)) - 1] * values.std(axis=0, ddof=1) / math.sqrt(seeds)
    return np.stack([mean, mean - half, mean + half])
