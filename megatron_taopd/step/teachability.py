"""What makes a token position teachable: robust normalisation and the split of disagreement.

Everything here is a pure function of batch-wide [R] vectors: one value for each response row of the
whole rollout batch, gathered over data parallelism beforehand. No collectives.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

_EPSILON = 1e-8
_DEGENERATE_RANGE = 1e-6


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
    dtype = torch.promote_types(values.dtype, torch.float32)
    if not len(values):
        return values.to(dtype)
    z = bounded(values, name)
    q_low, q_high = quantiles(z, (low, high))
    if q_high - q_low < _DEGENERATE_RANGE:
        return torch.full_like(z, degenerate, dtype=dtype)
    return ((z.double() - q_low) / (q_high - q_low + _EPSILON)).clamp(0, 1).to(dtype)


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
    """Return [P] float64: the quantiles of values [R], R ≥ 1, linearly interpolated.

    One sort, then P·2 reads: `torch.quantile` refuses more than 16M elements.
    """
    ordered = values.sort().values
    place = torch.tensor(probabilities, dtype=torch.float64, device=values.device)
    place = place * (len(ordered) - 1)
    below, above = ordered[place.floor().long()].double(), ordered[place.ceil().long()].double()
    return below + (above - below) * place.frac()


def bounded(values: Tensor, name: str = "values") -> Tensor:
    """Replace ±inf in values [R] by the largest (smallest) finite one; by 0 where none is finite.

    Raises:
        ValueError: a value is NaN.
    """
    if nans := int(values.isnan().sum()):
        raise ValueError(
            f"{name}: {nans} of {len(values)} values are NaN; the logits of both models must be "
            "finite or -inf"
        )
    finite = values[values.isfinite()]
    return values.clamp(finite.min(), finite.max()) if len(finite) else torch.zeros_like(values)
