"""Order statistics without sorts, on one rank and on many, against sorts."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
from support.ranks_of_threads import on_threads

from megatron_taopd.parallel.order import order_statistics

SPECIAL = [0.0, -0.0, math.inf, -math.inf, 1.0, -1.0, 1e-45, -1e-45, 3.4e38, 0.1, 0.1 + 1e-8]


@st.composite
def vectors(draw, dtype):
    """Three vectors of as many numbers: any, few that repeat, and constants; none is NaN."""
    width = torch.finfo(dtype).bits
    count = draw(st.integers(1, 60))
    anything = st.floats(width=width, allow_nan=False)
    few = st.sampled_from([float(torch.tensor(x, dtype=dtype)) for x in SPECIAL])
    elements = [anything, few, st.just(draw(few))]
    drawn = [draw(arrays.arrays(f"float{width}", count, elements=of)) for of in elements]
    return [torch.from_numpy(vector) for vector in drawn]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_every_place_has_the_number_of_a_sort(dtype, data):
    of = data.draw(vectors(dtype))
    place = st.integers(0, len(of[0]) - 1)
    places = torch.tensor(data.draw(st.lists(st.tuples(place, place, place), min_size=1))).T
    want = torch.stack([v.sort().values[p] for v, p in zip(of, places, strict=True)])
    assert torch.equal(order_statistics(of, places.contiguous()), want)


@settings(max_examples=25, deadline=None)
@given(data=st.data(), ranks=st.integers(2, 4))
def test_numbers_may_be_on_any_rank(data, ranks):
    """Some ranks have none."""
    of = data.draw(vectors(torch.float32))
    owner = torch.tensor(
        data.draw(st.lists(st.integers(0, ranks - 1), min_size=len(of[0]), max_size=len(of[0])))
    )
    places = torch.tensor([[0, len(owner) // 2, len(owner) - 1]] * 3)
    want = torch.stack([v.sort().values[p] for v, p in zip(of, places, strict=True)])

    def found(rank, group):
        return order_statistics([v[owner == rank] for v in of], places, group), group

    for got, group in on_threads(ranks, found):
        assert torch.equal(got, want)
        # 8 KiB for each vector, then for each place of each vector; the last digit has ten bits.
        assert (group.calls, group.bytes) == (3, 3 * 8192 * (1 + 3 + 1.5))


def test_no_place_and_no_number():
    assert order_statistics([torch.zeros(3)], torch.zeros(1, 0, dtype=torch.int64)).shape == (1, 0)
    places = torch.zeros(1, 1, dtype=torch.int64)
    halves = on_threads(2, lambda rank, group: order_statistics([torch.ones(rank)], places, group))
    assert [half.item() for half in halves] == [1, 1]
