"""As many kept rows in fewer trained tokens: where each sequence's training ends.

An extension of the paper, off by default. Training runs a sequence up to its last kept row, so a
row late in a sequence costs all tokens before it. Kept rows are therefore looked for in prefixes of
the responses, chosen together under a bound on their total length. Every rank computes the same
cuts from the same batch-wide vectors: no collectives.
"""

from __future__ import annotations

import numpy as np

_PRICE_STEPS = 30  # halvings of the interval in which the price of a token is looked for
_THRESHOLD_STEPS = 4  # rounds between cuts and the lowest priority that is kept in them


def cut_responses(
    priority: np.ndarray, cu_rows: np.ndarray, keep: int, max_rows: int
) -> np.ndarray:
    """Return [N] int64: how many rows of each response, its first ones, may be kept.

    The best `keep` rows of these prefixes have nearly the largest sum of priorities.

    The Lagrangian of the problem: at a price λ per row, and with τ the lowest priority kept, each
    sequence ends by itself where Σ (max(priority − τ, 0) − λ) is largest. λ is the lowest at which
    the prefixes fit; what is left of the bound then goes to the sequences that would end later at
    a slightly lower price. O(R) for each of some hundred prices.

    Args:
        priority: [R] float64, ≥ 0 where it can be kept, −inf where it can't.
        cu_rows: [N+1] int64, where each response's rows start; none is empty.
        keep: rows to keep, ≤ max_rows.
        max_rows: the most rows in all prefixes together.
    """
    assert keep <= max_rows, (keep, max_rows)
    lengths = np.diff(cu_rows)
    if max_rows >= lengths.sum():
        return lengths
    usable = np.maximum(priority, 0)

    def cuts_at(price: float) -> np.ndarray:
        cuts = lengths
        for _ in range(_THRESHOLD_STEPS):
            threshold = _kth_largest(usable[inside(cuts, cu_rows)], keep)
            cuts = _best_prefixes(np.maximum(usable - threshold, 0) - price, cu_rows)
        return cuts

    low, high = 0.0, float(usable.max()) + 1e-12
    longer, shorter = cuts_at(low), np.zeros_like(lengths)
    if longer.sum() > max_rows:
        for _ in range(_PRICE_STEPS):
            price = (low + high) / 2
            cuts = cuts_at(price)
            if cuts.sum() > max_rows:
                low, longer = price, cuts
            else:
                high, shorter = price, cuts
    else:
        longer, shorter = lengths, longer
    return _between(shorter, longer, max_rows, usable, cu_rows)


def _kth_largest(values: np.ndarray, k: int) -> float:
    return float(np.partition(values, -k)[-k]) if k <= len(values) else 0.0


def inside(cuts: np.ndarray, cu_rows: np.ndarray) -> np.ndarray:
    """Return [R] bool: the rows of prefixes of these lengths."""
    lengths = np.diff(cu_rows)
    offsets = np.arange(cu_rows[-1]) - np.repeat(cu_rows[:-1], lengths)
    return offsets < np.repeat(cuts, lengths)


def _best_prefixes(values: np.ndarray, cu_rows: np.ndarray) -> np.ndarray:
    """Return [N] int64: the length of each sequence's shortest prefix with the largest sum.

    It is 0 where no sum is positive.
    """
    starts, lengths = cu_rows[:-1], np.diff(cu_rows)
    sums = values.cumsum()
    sums -= np.repeat(sums[starts] - values[starts], lengths)
    best = np.maximum.reduceat(sums, starts)
    at_best = np.where(sums >= np.repeat(best, lengths), np.arange(len(values)), len(values))
    return np.where(best > 0, np.minimum.reduceat(at_best, starts) - starts + 1, 0)


def _between(
    shorter: np.ndarray,
    longer: np.ndarray,
    max_rows: int,
    usable: np.ndarray,
    cu_rows: np.ndarray,
) -> np.ndarray:
    """Lengthen the shorter cuts up to max_rows, first where a row of the difference brings most.

    Prices do not lead to all totals: between two that are next to each other a sequence may jump.
    """
    longer = np.maximum(shorter, longer)
    sums = np.concatenate([[0.0], usable.cumsum()])
    added = longer - shorter
    brought = sums[cu_rows[:-1] + longer] - sums[cu_rows[:-1] + shorter]
    order = np.argsort(-brought / np.maximum(added, 1), kind="stable")
    cuts, room = shorter.copy(), max_rows - int(shorter.sum())
    for sequence in order:
        step = min(room, int(added[sequence]))
        cuts[sequence] += step
        room -= step
        if room == 0:
            break
    return cuts
