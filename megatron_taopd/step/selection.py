"""Which response rows to train on: selectors by name, and an exact budget over the whole batch.

Each rank has the scores of its own rows (`batch_scores`), and learns which of these are kept; of
the others, how many of each sequence are, and up to where. The kept rows are the same on every
layout, one rank alone included.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from fractions import Fraction
from itertools import accumulate, pairwise, product

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_taopd.config.schema import CONCENTRATES
from megatron_taopd.parallel.copies import to_device
from megatron_taopd.parallel.order import BLOCK, all_reduce, order_statistics
from megatron_taopd.step.batch_scores import NAMES, BatchScores, HeldRows
from megatron_taopd.step.extensions.concentration import cut_responses
from megatron_taopd.step.teachability import either, refuse_nan
from megatron_taopd.types import RolloutBatch, TokenScores, WantedRows


def _random(scores: BatchScores, seed: int) -> Tensor:
    # Drawn on the CPU and as a whole, so that the choice depends on the seed alone, not on the
    # device or the layout.
    ids, generator = scores.held.ids(), torch.Generator().manual_seed(seed)
    device = scores.rows.disagreement.device
    if not len(ids):
        return torch.empty(0, dtype=torch.float64, device=device)
    order = torch.randperm(scores.held.num_rows, generator=generator, dtype=torch.int32)
    return to_device(order[ids].double(), device)


def _in_q3(scores: BatchScores, priority: Tensor) -> Tensor:
    """Keep `priority` in TIP's quadrant (`BatchScores.in_q3`), −inf elsewhere."""
    return priority.masked_fill(~scores.in_q3(), -math.inf)


# name -> (scores of a batch, seed) -> [r] priority of the rows that this rank holds; higher is kept
# first, −inf is never kept.
SELECTORS: dict[str, Callable[[BatchScores, int], Tensor]] = {
    "full": lambda s, seed: torch.ones_like(s.rows.disagreement),
    "random": _random,
    "prefix": lambda s, seed: -s.held.offsets(s.rows.disagreement.device),
    "prefix_share": lambda s, seed: -s.held.shares(s.rows.disagreement.device),
    "entropy": lambda s, seed: s.h,
    "divergence": lambda s, seed: s.d,
    "compatibility": lambda s, seed: s.c,
    "tip": lambda s, seed: either(s.h, s.d),
    "teachability": lambda s, seed: s.learnable,
    "teachability_entropy": lambda s, seed: either(s.h, s.learnable),
    "q3": lambda s, seed: _in_q3(s, s.d),
    "q3_high_c": lambda s, seed: _in_q3(s, s.c),
    "q3_high_dl": lambda s, seed: _in_q3(s, s.learnable),
    "q3_low_dl": lambda s, seed: _in_q3(s, -s.learnable),
    "q3_high_di": lambda s, seed: _in_q3(s, s.d * (1 - s.c)),
}


def budget(ratio: float, num_rows: int) -> int:
    """Return n = ⌈ρ|I|⌉, ρ being the decimal a person writes: 7 for .07 × 100; floats give 8.

    Raises:
        ValueError: ratio outside (0, 1].
    """
    if not 0 < ratio <= 1:
        raise ValueError(f"selection.ratio: {ratio} is outside (0, 1]")
    return math.ceil(Fraction(repr(float(ratio))) * num_rows)


@dataclass(frozen=True)
class Choice:
    """The rows of a batch that a selector keeps.

    Attributes:
        scores: that it has seen.
        selector: its name.
        priority: [r] of the rows that this rank holds.
        mask: [r] bool, those of them that are kept.
    """

    scores: BatchScores
    selector: str
    priority: Tensor
    mask: Tensor


def choose(
    selector: str, scores: BatchScores, ratio: float, seed: int, concentrate: float = 0.0
) -> Choice:
    """Choose the rows to train on: exactly the n = ⌈ρ|I|⌉ of highest priority (Eq. 13).

    Args: those of `select`; every rank of the batch's group gives the same.

    Returns:
        A choice on the device of the scores, for which nothing has waited. NaNs are seen later,
        where the numbers come to the host (`look`, `select`).

    Raises:
        ValueError: unknown selector, ratio outside (0, 1], a selector that cannot concentrate.

    Collectives: of the batch's group, those of `teachability.describe` for scores that are not
    described yet, of `keep_highest`, and of `concentration.cut_responses`.
    """
    if selector not in SELECTORS:
        raise ValueError(
            f"selection.selector: {selector!r} is unknown; one of {', '.join(SELECTORS)}"
        )
    held = scores.held
    priority = SELECTORS[selector](scores, seed)
    keep = held.num_rows if selector == "full" else budget(ratio, held.num_rows)
    eligible = priority
    if concentrate:
        if selector not in CONCENTRATES:
            raise ValueError(
                f"selection.concentrate: {concentrate}: {selector} has no priorities to add up; "
                f"one of {', '.join(CONCENTRATES)}"
            )
        max_rows = max(keep, held.num_rows - budget(concentrate, held.num_rows))
        cuts = cut_responses(priority, held, keep, max_rows)
        eligible = priority.masked_fill(~held.inside(cuts), -math.inf)
    return Choice(scores, selector, priority, keep_highest(eligible, held, keep))


def keep_highest(priority: Tensor, held: HeldRows, keep: int) -> Tensor:
    """Mark the rows of highest priority, `keep` of them over all ranks; −inf is never kept.

    Rows of equal priority are kept in canonical order, the earlier (sequence, position) first.

    Args:
        priority: [r] of the rows that are held.

    Returns:
        [r] bool; fewer than `keep` only where fewer are above −inf.

    Collectives: an all-reduce of 8·N+8 bytes, and those of `order_statistics` for one place.
    """
    if not held.num_rows:
        return torch.zeros_like(priority, dtype=torch.bool)
    # Of the lowest that is kept; rows of −inf come before all others.
    place = torch.full((1, 1), held.num_rows - keep, device=priority.device)
    threshold = order_statistics([priority], place, held.group)[0]
    mask = priority > threshold
    ties = (priority == threshold).logical_and_(priority > -math.inf)

    # Of the ties, as many as there is room for: sequences before this one have theirs first.
    found = torch.cat([held.tally_here(ties)[0], mask.sum().view(1)])
    ties_of, above = all_reduce(found, held.group).split([len(found) - 1, 1])
    room = (keep - above - (ties_of.cumsum(0) - ties_of)).clamp(min=0)
    own = to_device(held.sequences, mask.device)
    room = torch.minimum(room, ties_of)[own].sum()
    for kept, tied in zip(mask.split(BLOCK), ties.split(BLOCK), strict=True):
        before = tied.cumsum(0, dtype=torch.int32)
        kept |= tied & (before <= room)
        room = room - tied.sum()
    return mask


def select(
    selector: str,
    scores: TokenScores,
    ratio: float,
    seed: int,
    concentrate: float = 0.0,
    cu_rows: Tensor | None = None,
) -> Tensor:
    """Choose the rows to train on of a batch that is here as a whole (`choose`).

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
    assert cu_rows is not None or not concentrate, "where each sequence's rows start"
    choice = choose(selector, BatchScores.whole(scores, cu_rows), ratio, seed, concentrate)
    choice.scores.refuse_nan()
    return choice.mask


@dataclass(frozen=True)
class Look:
    """What all ranks know of a choice, on the host.

    Attributes:
        counts: [N] int64, the kept rows of each sequence.
        last: [N] int64, its rows up to the last kept one, that one included.
        metrics: what the log says of it; values are finite, keys without one are left out:
            scores/{disagreement,compatibility,student_entropy,teacher_entropy}_{q05,q50,q95}: over
                all rows (nats; compatibility a probability).
            selection/topk_overlap: mean share of the student's top-K that is in the teacher's, over
                all rows; not where nobody has counted.
            selection/kept_share: kept rows over all rows.
            selection/kept_{disagreement,compatibility,student_entropy,teacher_entropy}: means over
                the kept rows, an infinite D counting as the largest finite one.
            selection/mass_retained: the kept rows' share of the batch's learnable disagreement
                ΣD^L, for every selector the same yardstick.
            selection/mass_of_best: ΣD^L of the kept rows over that of as many rows of highest D^L:
                what the selector, or concentrating, gives away.
            selection/trained_share: rows up to the last kept one of their sequence, over all rows.
            selection/relative_position: mean place of the kept rows in their responses, 0 the first
                token, 1 the last; .5 when all rows are kept.
            selection/threshold: the lowest kept priority; not for `full` and `random`, which have
                none.
    """

    counts: Tensor
    last: Tensor
    metrics: dict[str, float]

    def wanted(self, batch: RolloutBatch, ids: Tensor) -> WantedRows:
        """Say what training needs of a batch; ids: [k] int64, the kept rows that are known here."""
        lengths, found = torch.zeros_like(self.last), self.last > 0
        lengths[found] = 1 + batch.positions_of((batch.cu_rows[:-1] + self.last - 1)[found])
        return WantedRows(self.counts, lengths, ids)


def look(choice: Choice) -> Look:
    """Bring what all ranks have to know of a choice to the host, and what the log says of it.

    Of a batch with R ≥ 1 rows. The numbers are sums over ranks, in float64.

    Raises:
        ValueError: a score is NaN.

    Collectives: of the batch's group, all-reduces of 24·N, 72 and 8 bytes; those of
    `teachability.describe` for scores that are not described yet, and those of `order_statistics`
    for one place.
    """
    scores, mask, held = choice.scores, choice.mask, choice.scores.held
    described = scores.describe(*NAMES)
    tally = all_reduce(held.tally_here(mask), held.group)
    kept = tally[0].sum()

    learnable = scores.learnable
    place = (held.num_rows - kept).clamp(max=held.num_rows - 1).view(1, 1)
    best = order_statistics([learnable], place, held.group)[0, 0]
    overlap = scores.rows.topk_overlap
    sums = torch.zeros(len(NAMES) + 5, dtype=torch.float64, device=mask.device)
    lowest = torch.full((1,), math.inf, dtype=torch.float64, device=mask.device)
    for start in range(0, len(mask), BLOCK):
        rows = slice(start, start + BLOCK)
        marked, mass = mask[rows], learnable[rows]
        better = mass > best
        block = [
            known.bounded(getattr(scores.rows, name)[rows]).where(marked, 0)
            for name, known in zip(NAMES, described, strict=True)
        ]
        block += [mass, mass.where(marked, 0), mass.where(better, 0), better]
        block += [mass.new_zeros(1) if overlap is None else overlap[rows]]
        sums += torch.stack([values.sum(dtype=torch.float64) for values in block])
        lowest = torch.minimum(lowest, choice.priority[rows].double().where(marked, math.inf).min())
    all_reduce(sums, held.group)
    all_reduce(lowest, held.group, dist.ReduceOp.MIN)

    counts, last, places = tally.cpu()
    numbers = torch.cat(
        [
            torch.stack([known.nans for known in described]).double(),
            *(known.quantiles for known in described),
            sums,
            best.double().view(1),
            lowest,
        ]
    ).tolist()
    nans, quantiles, summed, [best_mass, threshold] = _cut(numbers, len(NAMES), 12, len(sums))
    refuse_nan(((name, int(n)) for name, n in zip(NAMES, nans, strict=True)), held.num_rows)
    metrics = {
        f"scores/{name}_{quantile}": value
        for (name, quantile), value in zip(
            product(NAMES, ("q05", "q50", "q95")), quantiles, strict=True
        )
    }
    *of_kept, all_mass, kept_mass, better_mass, num_better, overlaps = summed
    num_rows, num_kept = held.num_rows, int(counts.sum())
    if overlap is not None:
        metrics["selection/topk_overlap"] = overlaps / num_rows
    metrics["selection/kept_share"] = num_kept / num_rows
    if all_mass > 0:
        metrics["selection/mass_retained"] = kept_mass / all_mass
    if num_kept:
        metrics |= {
            f"selection/kept_{name}": value / num_kept
            for name, value in zip(NAMES, of_kept, strict=True)
        }
        if all_mass > 0:
            most = better_mass + (num_kept - num_better) * best_mass
            metrics["selection/mass_of_best"] = kept_mass / most
        metrics["selection/trained_share"] = int(last.sum()) / num_rows
        relative = (places + 0.5 * counts) / held.cu_rows.diff()
        metrics["selection/relative_position"] = float(relative[counts > 0].sum()) / num_kept
        if choice.selector not in ("full", "random"):
            metrics["selection/threshold"] = threshold
    return Look(counts, last, metrics)


def _cut(numbers: list[float], *sizes: int) -> list[list[float]]:
    """Cut a list in parts of these sizes, and what is left."""
    ends = [0, *accumulate(sizes), len(numbers)]
    return [numbers[a:b] for a, b in pairwise(ends)]
