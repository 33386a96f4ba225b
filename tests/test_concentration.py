"""Where training may end in each sequence, against every possibility tried out."""

from __future__ import annotations

from itertools import product

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from megatron_taopd.step.batch_scores import HeldRows
from megatron_taopd.step.extensions import concentration


def cut_responses(priority, cu_rows, keep, max_rows):
    held = HeldRows.all(torch.from_numpy(cu_rows))
    return concentration.cut_responses(torch.from_numpy(priority), held, keep, max_rows).numpy()


def inside(cuts, cu_rows):
    return HeldRows.all(torch.from_numpy(cu_rows)).inside(torch.from_numpy(cuts)).numpy()


def mass(priority, cu_rows, cuts, keep):
    usable = np.maximum(priority[inside(np.asarray(cuts), cu_rows)], 0)
    return np.sort(usable)[::-1][:keep].sum()


def best_mass(priority, cu_rows, keep, max_rows):
    every = product(*(range(n + 1) for n in np.diff(cu_rows)))
    return max(mass(priority, cu_rows, c, keep) for c in every if sum(c) <= max_rows)


@given(
    lengths=st.lists(st.integers(1, 6), min_size=1, max_size=4),
    data=st.data(),
)
def test_cuts_fit_and_hold_enough_rows(lengths, data):
    cu_rows = np.cumsum([0, *lengths])
    rows = int(cu_rows[-1])
    priority = np.array(data.draw(st.lists(st.floats(0, 1), min_size=rows, max_size=rows)))
    max_rows = data.draw(st.integers(1, rows))
    keep = data.draw(st.integers(1, max_rows))
    cuts = cut_responses(priority, cu_rows, keep, max_rows)
    assert (cuts >= 0).all()
    assert (cuts <= lengths).all()
    assert keep <= cuts.sum() <= max_rows


def test_nearly_the_best_of_all_cuts():
    """Cuts on the convex hull, and the rest of the bound filled greedily."""
    generator = np.random.default_rng(0)
    ratios = []
    for _ in range(60):
        lengths = generator.integers(1, 7, size=4)
        cu_rows = np.concatenate([[0], lengths.cumsum()])
        priority = generator.random(cu_rows[-1]) ** 4
        max_rows = int(np.ceil(0.6 * cu_rows[-1]))
        keep = max(1, max_rows // 3)
        cuts = cut_responses(priority, cu_rows, keep, max_rows)
        best = best_mass(priority, cu_rows, keep, max_rows)
        ratios.append(mass(priority, cu_rows, cuts, keep) / best)
    assert np.mean(ratios) > 0.97
    assert min(ratios) > 0.75


def test_early_mass_is_kept_at_half_the_tokens():
    generator = np.random.default_rng(0)
    lengths = generator.integers(200, 400, size=200)
    cu_rows = np.concatenate([[0], lengths.cumsum()])
    place = np.concatenate([np.arange(n) / n for n in lengths])
    priority = generator.random(cu_rows[-1]) * np.exp(-3 * place)
    keep, total = cu_rows[-1] // 10, int(cu_rows[-1])
    cuts = cut_responses(priority, cu_rows, keep, total // 2)
    blind = (lengths * 0.5).astype(int)
    everything = mass(priority, cu_rows, lengths, keep)
    assert mass(priority, cu_rows, cuts, keep) > 0.9 * everything
    assert mass(priority, cu_rows, cuts, keep) >= mass(priority, cu_rows, blind, keep)


def test_no_bound_cuts_nothing():
    lengths = np.array([3, 5])
    cuts = cut_responses(np.ones(8), np.array([0, 3, 8]), 4, 8)
    assert cuts.tolist() == lengths.tolist()


@pytest.mark.parametrize("value", [0.0, -np.inf])
def test_rows_that_cannot_be_kept_attract_nothing(value):
    priority = np.array([value] * 5 + [1.0, 1.0, 0.5])
    cuts = cut_responses(priority, np.array([0, 5, 8]), 2, 3)
    assert mass(priority, np.array([0, 5, 8]), cuts, 2) == 2
