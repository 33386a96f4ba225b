"""What makes a token position teachable: robust normalisation and the split of disagreement.

Everything here is a pure function of [R] vectors, one value for each response row of the whole
rollout batch. `describe` alone is told where the rest of a vector is that this rank has a part of;
what follows from it is then a matter of this rank's rows.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_taopd.parallel.copies import to_device
from megatron_taopd.parallel.order import BLOCK, all_reduce, order_statistics

_EPSILON = 1e-8
_DEGENERATE_RANGE = 1e-6
QUANTILES = (0.05, 0.50, 0.95)


@dataclass(frozen=True)
class Distribution:
    """What is known of one score over all rows, on the device of its values.

    Attributes:
        nans: [] int64, how many values are NaN; if any, the rest means nothing.
        bounds: [2], the smallest and the largest finite value; 0 where none is.
        quantiles: [P] float64, of the values within these bounds.
    """

    nans: Tensor
    bounds: Tensor
    quantiles: Tensor

    def bounded(self, values: Tensor) -> Tensor:
        """Replace ±inf in values [r] by the largest (smallest) finite one of all rows."""
        return values.clamp(self.bounds[0], self.bounds[1])

    def normalized(self, values: Tensor, degenerate: float = 0.0) -> Tensor:
        """Return Norm of values [r] (`robust_normalize`) between the first quantile and the last.

        Returns:
            [r] float32 (float64 of float64), computed in float64; as much memory beside it as a
            block of rows takes.
        """
        low, high = self.quantiles[0], self.quantiles[-1]
        constant = high - low < _DEGENERATE_RANGE
        out = torch.empty_like(values, dtype=torch.promote_types(values.dtype, torch.float32))
        for block, into in zip(values.split(BLOCK), out.split(BLOCK), strict=True):
            scaled = (self.bounded(block).double() - low) / (high - low + _EPSILON)
            into.copy_(scaled.clamp(0, 1).masked_fill(constant, degenerate))
        return out


def describe(
    vectors: Sequence[Tensor],
    num_rows: int,
    group: dist.ProcessGroup | None = None,
    probabilities: Sequence[float] = QUANTILES,
) -> list[Distribution]:
    """Describe vectors whose rows are spread over ranks, exactly; nothing waits for the device.

    Args:
        vectors: V of [r], what this rank has of each, possibly nothing; all of one device.
        num_rows: R ≥ 1, of all ranks.
        group: the ranks that have the rows; None: all are here.
        probabilities: of the quantiles, which are linearly interpolated.

    Collectives: all-reduces of 8·V and 8·V bytes, and those of `order_statistics`, two places for
    each quantile.
    """
    vectors = [v if v.dtype == torch.float64 else v.float() for v in vectors]
    device = vectors[0].device
    nans = torch.zeros(len(vectors), dtype=torch.int64, device=device)
    ends = torch.full((2, len(vectors)), -math.inf, dtype=vectors[0].dtype, device=device)
    for v, vector in enumerate(vectors):
        for block in vector.split(BLOCK):
            nans[v] += block.isnan().sum()
            finite = block.isfinite()
            for end, values in zip(ends[:, v], (-block, block), strict=True):
                if len(block):
                    torch.maximum(end, values.where(finite, -math.inf).amax(), out=end)
    all_reduce(nans, group)
    all_reduce(ends, group, dist.ReduceOp.MAX)
    bounds = torch.stack([-ends[0], ends[1]], dim=1)
    bounds = bounds.where(bounds.isfinite(), 0)

    places = torch.tensor(probabilities, dtype=torch.float64) * (num_rows - 1)
    around = torch.cat([places.floor(), places.ceil()]).long().expand(len(vectors), -1)
    found = order_statistics(vectors, to_device(around.contiguous(), device), group)
    below, above = found.clamp(bounds[:, :1], bounds[:, 1:]).double().chunk(2, dim=1)
    quantiles = below + (above - below) * to_device(places.frac(), device)
    return [Distribution(*one) for one in zip(nans, bounds, quantiles, strict=True)]


def refuse_nan(nans: Iterable[tuple[str, int]], num_rows: int) -> None:
    """Raise ValueError if values are NaN; nans: the name of each score, and how many of it are."""
    for name, count in nans:
        if count:
            raise ValueError(
                f"{name}: {count} of {num_rows} values are NaN; the logits of both models must be "
                "finite or -inf"
            )


def robust_normalize(
    values: Tensor,
    low: float = 0.05,
    high: float = 0.95,
    degenerate: float = 0.0,
    name: str = "values",
) -> Tensor:
    """Return Norm (Eq. 11): clip((z − Q05) / (Q95 − Q05 + ε), 0, 1) over the whole rollout batch.

    Args:
        values: [R], any float type, any R (also beyond the 16M elements of `torch.quantile`).
        low, high: the two quantiles, linearly interpolated.
        degenerate: returned everywhere when Q95 − Q05 < 1e-6, so that a (near) constant score is
            never amplified into noise.
        name: what an error calls the values.

    Returns:
        [R] in [0, 1], float32 (float64 for float64 input), computed in float64; empty for R = 0.
        An infinite value counts as the largest finite one: D is +inf where the student gives an id
        of the union no probability at all, which ranks it first without stretching the scale of
        the other rows, however many such rows there are.

    Raises:
        ValueError: a value is NaN.
    """
    if not len(values):
        return values.to(torch.promote_types(values.dtype, torch.float32))
    return _described(values, name, (low, high)).normalized(values, degenerate)


def _described(values: Tensor, name: str, probabilities: Sequence[float]) -> Distribution:
    """Describe values [R], R ≥ 1, of a batch that is here as a whole. Raises ValueError of NaN."""
    [found] = describe([values], len(values), probabilities=probabilities)
    refuse_nan([(name, int(found.nans))], len(values))
    return found


def learnable_disagreement(disagreement: Tensor, compatibility: Tensor) -> Tensor:
    """Return the teachability D^L = Norm(D)·Norm(C) (Eq. 5, 12): [R] in [0, 1] from raw D and C."""
    return normalize_disagreement(disagreement) * normalize_compatibility(compatibility)


def incompatible_disagreement(disagreement: Tensor, compatibility: Tensor) -> Tensor:
    """Return D^I = Norm(D)·(1 − Norm(C)) (Eq. 5): [R] in [0, 1] from raw D and C."""
    return normalize_disagreement(disagreement) * (1 - normalize_compatibility(compatibility))


def normalize_disagreement(disagreement: Tensor) -> Tensor:
    """Return D̃, [R] in [0, 1]. 0 where D does not vary: no row disagrees more than another."""
    return robust_normalize(disagreement, name="disagreement")


def normalize_compatibility(compatibility: Tensor) -> Tensor:
    """Return C̃, [R] in [0, 1]. 1 where C does not vary: then teachability is disagreement alone."""
    return robust_normalize(compatibility, degenerate=1.0, name="compatibility")


def normalize_entropy(student_entropy: Tensor) -> Tensor:
    """Return H̃, [R] in [0, 1]. 0 where H does not vary."""
    return robust_normalize(student_entropy, name="student_entropy")


def either(a: Tensor, b: Tensor) -> Tensor:
    """Return a + b − ab, TIP's union of two scores in [0, 1] (Eq. 15, 16)."""
    # In this order the result is exactly 1 where a or b is, so that saturated rows tie instead of
    # being ordered by rounding.
    return a + b * (1 - a)


def quantiles(values: Tensor, probabilities: Sequence[float]) -> Tensor:
    """Return [P] float64: the quantiles of finite values [R], R ≥ 1, linearly interpolated."""
    [found] = describe([values], len(values), probabilities=probabilities)
    return found.quantiles


def bounded(values: Tensor, name: str = "values") -> Tensor:
    """Replace ±inf in values [R] by the largest (smallest) finite one; by 0 where none is finite.

    Raises:
        ValueError: a value is NaN.
    """
    return _described(values, name, ()).bounded(values) if len(values) else values
