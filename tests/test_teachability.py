import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
from support import dense

from megatron_taopd.step.teachability import (
    bounded,
    either,
    incompatible_disagreement,
    learnable_disagreement,
    quantiles,
    robust_normalize,
)

vectors = arrays.arrays(
    "float32", st.integers(1, 200), elements=st.floats(-1e4, 1e4, width=32)
).map(torch.from_numpy)
unit_vectors = arrays.arrays("float32", 50, elements=st.floats(0, 1, width=32)).map(
    torch.from_numpy
)


def test_a_known_batch():
    """0 … 100: Q05 = 5 and Q95 = 95, so 5 → 0, 50 → .5, 95 → 1, and the tails are clipped."""
    normalized = robust_normalize(torch.arange(101.0))
    assert normalized[[0, 5, 95, 100]].tolist() == pytest.approx([0, 0, 1, 1], abs=1e-7)
    assert normalized[50].item() == pytest.approx(0.5, abs=1e-7)
    assert normalized.dtype == torch.float32


@given(vectors)
def test_norm_agrees_with_the_oracle(values):
    expected = dense.robust_normalize(values, degenerate=0.25)
    actual = robust_normalize(values, degenerate=0.25)
    assert torch.allclose(actual.double(), expected, rtol=0, atol=1e-6)


@given(vectors, st.randoms())
def test_norm_ignores_the_order_of_the_rows(values, random):
    order = list(range(len(values)))
    random.shuffle(order)
    assert torch.equal(robust_normalize(values[order]), robust_normalize(values)[order])


@given(vectors, st.sampled_from([0.25, 2.0, 1024.0]))
def test_norm_keeps_the_order_and_forgets_the_scale(values, scale):
    normalized = robust_normalize(values)
    assert (normalized[values.argsort()].diff() >= 0).all()
    q_low, q_high = quantiles(values, (0.05, 0.95))
    if q_high - q_low > 1.0:  # ε is a fixed amount: it matters for a tiny range
        assert torch.allclose(robust_normalize(values * scale), normalized, rtol=0, atol=1e-6)


def test_a_degenerate_range_gives_one_value_and_no_amplified_noise():
    noise = 0.5 + 4e-7 * torch.rand(1000, generator=torch.Generator().manual_seed(0))
    assert torch.equal(robust_normalize(noise), torch.zeros(1000))
    assert torch.equal(robust_normalize(noise, degenerate=1.0), torch.ones(1000))
    assert robust_normalize(noise * 10).unique().numel() > 1  # just above the limit it is a score


def test_a_few_outliers_do_not_hide_a_degenerate_range():
    values = torch.zeros(1000)
    values[:40] = 1.0  # 4 %, above Q95
    assert torch.equal(robust_normalize(values), torch.zeros(1000))


@pytest.mark.parametrize("infinite", [1, 50, 99])
def test_infinite_disagreement_counts_as_the_largest_finite_one(infinite):
    values = torch.linspace(0, 1, 100)
    expected = robust_normalize(values.clamp(max=values[99 - infinite]))
    values[100 - infinite :] = math.inf
    actual = robust_normalize(values)
    assert torch.equal(actual, expected)
    assert infinite == 99 or (actual[-infinite:] == 1).all()


def test_only_infinite_values_are_degenerate():
    assert torch.equal(robust_normalize(torch.full((7,), math.inf)), torch.zeros(7))


def test_nan_is_refused_by_name():
    values = torch.tensor([0.0, math.nan, 1.0, math.nan])
    with pytest.raises(ValueError, match=r"^values: 2 of 4 values are NaN"):
        robust_normalize(values)
    with pytest.raises(ValueError, match=r"^disagreement: 2 of 4"):
        learnable_disagreement(values, torch.ones(4))
    with pytest.raises(ValueError, match=r"^compatibility: 2 of 4"):
        incompatible_disagreement(torch.ones(4), values)


def test_no_rows():
    assert robust_normalize(torch.empty(0)).shape == (0,)


@given(vectors, st.lists(st.floats(0, 1), min_size=1, max_size=5))
def test_quantiles_agree_with_torch_where_torch_can(values, probabilities):
    expected = torch.quantile(values.double(), torch.tensor(probabilities, dtype=torch.float64))
    assert torch.allclose(quantiles(values, probabilities), expected, rtol=1e-12, atol=1e-9)


def test_more_rows_than_torch_quantile_takes():
    values = torch.arange(2**24 + 1, dtype=torch.int32).flip(0).float()
    with pytest.raises(RuntimeError, match="too large"):
        torch.quantile(values, 0.5)
    normalized = robust_normalize(values)
    assert normalized[2**23].item() == pytest.approx(0.5, abs=1e-7)
    assert (normalized == 0).double().mean().item() == pytest.approx(0.05, abs=1e-6)


@given(unit_vectors, unit_vectors)
def test_disagreement_splits_into_learnable_and_incompatible(d, c):
    """D^L + D^I = D̃ (Eq. 5)."""
    total = learnable_disagreement(d, c) + incompatible_disagreement(d, c)
    assert torch.allclose(total, robust_normalize(d), atol=1e-6)


def test_constant_compatibility_leaves_disagreement_alone():
    d = torch.linspace(0, 3, 50)
    assert torch.equal(learnable_disagreement(d, torch.full((50,), 0.9)), robust_normalize(d))
    assert incompatible_disagreement(d, torch.full((50,), 0.9)).sum() == 0


@given(unit_vectors, unit_vectors)
def test_either_is_the_union(a, b):
    union = either(a, b)
    assert torch.allclose(union, a + b - a * b, atol=1e-6)
    assert (union >= torch.maximum(a, b) - 1e-6).all() and (union <= 1).all()


@given(unit_vectors)
def test_either_of_a_saturated_score_is_exactly_one(a):
    """a + b − ab in floats is not, and its rounding would then rank rows that tie."""
    one = torch.ones_like(a)
    assert torch.equal(either(a, one), one) and torch.equal(either(one, a), one)


def test_bounded_touches_infinities_alone():
    values = torch.tensor([math.inf, -math.inf, 2.0, -3.0])
    assert bounded(values).tolist() == [2.0, -3.0, 2.0, -3.0]
