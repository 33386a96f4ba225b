"""Which response rows to train on: selectors by name, and an exact budget over the whole batch.

Every rank calls this on the same batch-wide vectors and gets the same mask: no collectives.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from fractions import Fraction

import torch
from torch import Tensor

from megatron_taopd.config.schema import CONCENTRATES
from megatron_taopd.step.extensions.concentration import cut_responses, inside
from megatron_taopd.step.teachability import (
    bounded,
    either,
    incompatible_disagreement,
    learnable_disagreement,
    normalize_compatibility,
    normalize_disagreement,
    normalize_entropy,
    quantiles,
)
from megatron_taopd.types import TokenScores


def _random(scores: TokenScores, seed: int) -> Tensor:
    # Drawn on the CPU, so that the choice depends on the seed alone, not on the device.
    order = torch.randperm(len(scores.disagreement), generator=torch.Generator().manual_seed(seed))
    return order.to(scores.disagreement.device, torch.float64)


def _in_q3(scores: TokenScores, priority: Tensor) -> Tensor:
    """Keep `priority` in TIP's quadrant, −inf elsewhere: H below and D above the batch median."""
    if not len(priority):
        return priority
    h, d = scores.student_entropy.double(), scores.disagreement.double()
    low_entropy = h < quantiles(bounded(h, "student_entropy"), [0.5])
    high_divergence = d > quantiles(bounded(d, "disagreement"), [0.5])
    return priority.masked_fill(~(low_entropy & high_divergence), -math.inf)


def _d(scores: TokenScores) -> Tensor:
    return normalize_disagreement(scores.disagreement)


def _c(scores: TokenScores) -> Tensor:
    return normalize_compatibility(scores.compatibility)


def _h(scores: TokenScores) -> Tensor:
    return normalize_entropy(scores.student_entropy)


def _learnable(scores: TokenScores) -> Tensor:
    return learnable_disagreement(scores.disagreement, scores.compatibility)


def _incompatible(scores: TokenScores) -> Tensor:
    return incompatible_disagreement(scores.disagreement, scores.compatibility)


# name -> (batch-wide scores, seed) -> [R] priority; higher is kept first, −inf is never kept.
SELECTORS: dict[str, Callable[[TokenScores, int], Tensor]] = {
    "full": lambda s, seed: torch.ones_like(s.disagreement),
    "random": _random,
    "entropy": lambda s, seed: _h(s),
    "divergence": lambda s, seed: _d(s),
    "compatibility": lambda s, seed: _c(s),
    "tip": lambda s, seed: either(_h(s), _d(s)),
    "teachability": lambda s, seed: _learnable(s),
    "teachability_entropy": lambda s, seed: either(_h(s), _learnable(s)),
    "q3": lambda s, seed: _in_q3(s, _d(s)),
    "q3_high_c": lambda s, seed: _in_q3(s, _c(s)),
    "q3_high_dl": lambda s, seed: _in_q3(s, _learnable(s)),
    "q3_low_dl": lambda s, seed: _in_q3(s, -_learnable(s)),
    "q3_high_di": lambda s, seed: _in_q3(s, _incompatible(s)),
}


def budget(ratio: float, num_rows: int) -> int:
    """Return n = ⌈ρ|I|⌉, ρ being the decimal a person writes: 7 for .07 × 100; floats give 8.

    Raises:
        ValueError: ratio outside (0, 1].
    """
    if not 0 < ratio <= 1:
        raise ValueError(f"selection.ratio: {ratio} is outside (0, 1]")
    return math.ceil(Fraction(repr(float(ratio))) * num_rows)


def select(
    selector: str,
    scores: TokenScores,
    ratio: float,
    seed: int,
    concentrate: float = 0.0,
    cu_rows: Tensor | None = None,
) -> Tensor:
    """Choose the rows to train on: exactly the n = ⌈ρ|I|⌉ of highest priority (Eq. 13).

    The choice is the same on every layout.

    Args:
        selector: a name in SELECTORS. `full` keeps all rows whatever the ratio; a `q3` selector
            keeps min(n, |Q3|), possibly none.
        scores: of the whole rollout batch, [R] in canonical order, on any device.
        ratio: ρ in (0, 1].
        seed: of `random`; give each step its own.
        concentrate: at least this share of the rows lies behind the last that is kept of their
            sequence, so that training does not run them; not every selector can (CONCENTRATES).
        cu_rows: [N+1] int64 on the CPU, where each sequence's rows start; for concentrate only.

    Returns:
        [R] bool on the device of the scores. Rows of equal priority are kept in canonical order,
        the earlier (sequence, position) first.

    Raises:
        ValueError: unknown selector, ratio outside (0, 1], a selector that cannot concentrate, or a
            NaN in a score that it uses.
    """
    if selector not in SELECTORS:
        raise ValueError(
            f"selection.selector: {selector!r} is unknown; one of {', '.join(SELECTORS)}"
        )
    priority = SELECTORS[selector](scores, seed)
    keep = len(priority) if selector == "full" else budget(ratio, len(priority))
    if concentrate:
        if selector not in CONCENTRATES:
            raise ValueError(
                f"selection.concentrate: {concentrate}: {selector} has no priorities to add up; "
                f"one of {', '.join(CONCENTRATES)}"
            )
        max_rows = max(keep, len(priority) - budget(concentrate, len(priority)))
        assert cu_rows is not None, "where each sequence's rows start"
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
    """Return what the log says of one selection; values are finite, keys without one left out.

    Args:
        selector, scores, seed: as given to `select`.
        mask: [R] bool, R ≥ 1, what `select` returned.
        cu_rows: [N+1] int64 on the CPU, where each sequence's rows start.

    Returns:
        scores/{disagreement,compatibility,student_entropy,teacher_entropy}_{q05,q50,q95}: over all
            rows (nats; compatibility a probability).
        selection/topk_overlap: mean share of the student's top-K that is in the teacher's, over all
            rows; not where nobody has counted.
        selection/kept_share: kept rows over all rows.
        selection/kept_{disagreement,compatibility,student_entropy,teacher_entropy}: means over the
            kept rows, an infinite D counting as the largest finite one.
        selection/mass_retained: the kept rows' share of the batch's learnable disagreement ΣD^L,
            for every selector the same yardstick.
        selection/mass_of_best: ΣD^L of the kept rows over that of as many rows of highest D^L: what
            the selector, or concentrating, gives away.
        selection/trained_share: rows up to the last kept one of their sequence, over all rows.
        selection/relative_position: mean place of the kept rows in their responses, 0 the first
            token, 1 the last; .5 when all rows are kept.
        selection/threshold: the lowest kept priority; not for `full` and `random`, which have none.
    """
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
    learnable = _learnable(scores).double()
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
            metrics["selection/threshold"] = SELECTORS[selector](scores, seed)[mask].min()
    # Stacked, so that the device is waited for once.
    stacked = torch.stack([value.double() for value in metrics.values()])
    return dict(zip(metrics, stacked.tolist(), strict=True))
