"""The selection by whole vectors and sorts: what every layout has to agree with, bit for bit.

This is how one rank would do it that has the whole batch and any amount of memory: a quantile is a
sort and two reads, a mask is a stable sort, and the cuts of `concentrate` are searched for on one
array of all rows.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise

import numpy as np
import torch
from torch import Tensor

from megatron_taopd.step.selection import budget
from megatron_taopd.step.teachability import either
from megatron_taopd.types import TokenScores

_EPSILON = 1e-8
_DEGENERATE_RANGE = 1e-6
_PRICE_STEPS = 30
_THRESHOLD_STEPS = 4


def robust_normalize(
    values: Tensor,
    low: float = 0.05,
    high: float = 0.95,
    degenerate: float = 0.0,
    name: str = "values",
) -> Tensor:
    """[R] Norm (Eq. 11), over the whole batch."""
    dtype = torch.promote_types(values.dtype, torch.float32)
    if not len(values):
        return values.to(dtype)
    z = bounded(values, name)
    q_low, q_high = quantiles(z, (low, high))
    if q_high - q_low < _DEGENERATE_RANGE:
        return torch.full_like(z, degenerate, dtype=dtype)
    return ((z.double() - q_low) / (q_high - q_low + _EPSILON)).clamp(0, 1).to(dtype)


def quantiles(values: Tensor, probabilities: Sequence[float]) -> Tensor:
    """[P] float64, linearly interpolated."""
    ordered = values.sort().values
    place = torch.tensor(probabilities, dtype=torch.float64, device=values.device)
    place = place * (len(ordered) - 1)
    below, above = ordered[place.floor().long()].double(), ordered[place.ceil().long()].double()
    return below + (above - below) * place.frac()


def bounded(values: Tensor, name: str = "values") -> Tensor:
    """[R], with infinities replaced by the largest (smallest) finite value."""
    if nans := int(values.isnan().sum()):
        raise ValueError(
            f"{name}: {nans} of {len(values)} values are NaN; the logits of both models must be "
            "finite or -inf"
        )
    finite = values[values.isfinite()]
    return values.clamp(finite.min(), finite.max()) if len(finite) else torch.zeros_like(values)


def priorities(selector: str, scores, seed: int, cu_rows: Tensor | None = None) -> Tensor:
    """[R] the priority of every row."""
    if selector in ("prefix", "prefix_share"):
        bounds = [0, len(scores.disagreement)] if cu_rows is None else cu_rows.tolist()
        lengths = [end - start for start, end in pairwise(bounds)]
        if selector == "prefix":
            return torch.tensor([-float(i) for n in lengths for i in range(n)])
        shares = [-(i + 0.5) / n for n in lengths for i in range(n)]
        return torch.tensor(shares, dtype=torch.float64)
    if selector == "full":
        return torch.ones_like(scores.disagreement)
    if selector == "random":
        generator = torch.Generator().manual_seed(seed)
        return torch.randperm(len(scores.disagreement), generator=generator).double()
    d = robust_normalize(scores.disagreement)
    c = robust_normalize(scores.compatibility, degenerate=1.0)
    h = robust_normalize(scores.student_entropy)
    of = {
        "entropy": h, "divergence": d, "compatibility": c, "tip": either(h, d),
        "teachability": d * c, "teachability_entropy": either(h, d * c), "q3": d,
        "q3_high_c": c, "q3_high_dl": d * c, "q3_low_dl": -(d * c), "q3_high_di": d * (1 - c),
    }[selector]  # fmt: skip
    return in_q3(scores, of) if selector.startswith("q3") else of


def in_q3(scores: TokenScores, priority: Tensor) -> Tensor:
    """Keep `priority` in TIP's quadrant, −inf elsewhere: H below and D above the batch median."""
    if not len(priority):
        return priority
    h, d = scores.student_entropy.double(), scores.disagreement.double()
    low_entropy = h < quantiles(bounded(h, "student_entropy"), [0.5])
    high_divergence = d > quantiles(bounded(d, "disagreement"), [0.5])
    return priority.masked_fill(~(low_entropy & high_divergence), -math.inf)


def select(
    selector: str,
    scores: TokenScores,
    ratio: float,
    seed: int,
    concentrate: float = 0.0,
    cu_rows: Tensor | None = None,
) -> Tensor:
    """[R] bool: the rows that are kept."""
    priority = priorities(selector, scores, seed, cu_rows)
    keep = len(priority) if selector == "full" else budget(ratio, len(priority))
    if concentrate:
        max_rows = max(keep, len(priority) - budget(concentrate, len(priority)))
        starts = cu_rows.numpy()
        cuts = cut_responses(priority.double().cpu().numpy(), starts, keep, max_rows)
        behind = torch.from_numpy(~inside(cuts, starts)).to(priority.device)
        priority = priority.masked_fill(behind, -math.inf)
    first = priority.sort(descending=True, stable=True).indices[:keep]
    mask = torch.zeros_like(priority, dtype=torch.bool)
    mask[first] = priority[first] > -math.inf
    return mask


def selection_metrics(
    selector: str, scores: TokenScores, mask: Tensor, cu_rows: Tensor, seed: int
) -> dict[str, float]:
    """By name, what the log says."""
    metrics: dict[str, Tensor] = {}
    for name in ("disagreement", "compatibility", "student_entropy", "teacher_entropy"):
        values = bounded(getattr(scores, name), name).double()
        q05, q50, q95 = quantiles(values, (0.05, 0.50, 0.95))
        metrics |= {f"scores/{name}_q05": q05, f"scores/{name}_q50": q50, f"scores/{name}_q95": q95}
        if mask.any():
            metrics[f"selection/kept_{name}"] = values[mask].mean()

    if scores.topk_overlap is not None:
        metrics["selection/topk_overlap"] = scores.topk_overlap.double().mean()
    metrics["selection/kept_share"] = mask.double().mean()
    learnable = priorities("teachability", scores, seed).double()
    if (total := learnable.sum()) > 0:
        kept = learnable[mask].sum()
        metrics["selection/mass_retained"] = kept / total
        if mask.any():
            best = learnable.topk(int(mask.sum())).values.sum()
            metrics["selection/mass_of_best"] = kept / best
    if mask.any():
        counts = cu_rows.diff()
        offsets = torch.arange(len(mask)) - cu_rows[:-1].repeat_interleave(counts)
        place = (offsets + 0.5) / counts.repeat_interleave(counts)
        sequences = torch.arange(len(counts)).repeat_interleave(counts)[mask.cpu()]
        last = torch.zeros_like(counts)
        last.scatter_reduce_(0, sequences, offsets[mask.cpu()] + 1, "amax")
        metrics["selection/trained_share"] = last.sum().double().to(mask.device) / len(mask)
        metrics["selection/relative_position"] = place.to(mask.device)[mask].double().mean()
        if selector not in ("full", "random"):
            metrics["selection/threshold"] = priorities(selector, scores, seed, cu_rows)[mask].min()
    # Stacked, so that the device is waited for once.
    stacked = torch.stack([value.double() for value in metrics.values()])
    return dict(zip(metrics, stacked.tolist(), strict=True))


def cut_responses(
    priority: np.ndarray, cu_rows: np.ndarray, keep: int, max_rows: int
) -> np.ndarray:
    """[N] int64: how many rows of each response, its first ones, may be kept."""
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
