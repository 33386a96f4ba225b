import math
from dataclasses import replace
from fractions import Fraction
from functools import partial
from types import SimpleNamespace

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from support import dense, whole_batch
from support.ranks_of_threads import on_threads

from megatron_taopd.config.schema import CONCENTRATES
from megatron_taopd.monitoring.observer import Observer
from megatron_taopd.step.batch_scores import BatchScores, HeldRows
from megatron_taopd.step.selection import (
    SELECTORS,
    Choice,
    budget,
    choose,
    look,
    select,
)
from megatron_taopd.types import TokenScores


def selection_metrics(selector, scores, mask, cu_rows, seed) -> dict[str, float]:
    """What the log says of a mask of a batch that is here as a whole."""
    whole = BatchScores.whole(scores, cu_rows)
    return look(Choice(whole, selector, SELECTORS[selector](whole, seed), mask)).metrics


SCORED = [name for name in SELECTORS if name not in ("full", "random")]
Q3 = [name for name in SELECTORS if name.startswith("q3")]


def random_scores(rows: int, seed: int = 0, levels: int | None = None) -> TokenScores:
    """D ≥ 0, C in [0, 1], H ≥ 0; rounded to a few levels, most rows tie with others."""
    generator = torch.Generator().manual_seed(seed)
    d, c, h, t = torch.rand(4, rows, generator=generator)
    if levels:
        d, c, h, t = ((x * levels).round() / levels for x in (d, c, h, t))
    return TokenScores(3 * d**3, c, 5 * h**2, 5 * t)


def priorities(name, scores, seed):
    return SELECTORS[name](BatchScores.whole(scores), seed)


batches = st.builds(
    random_scores,
    rows=st.integers(1, 300),
    seed=st.integers(0, 1000),
    levels=st.sampled_from([None, 2, 10]),
)
ratios = st.sampled_from([0.01, 0.03, 0.05, 0.07, 0.1, 0.3, 0.5, 1.0]) | st.floats(1e-6, 1.0)


@pytest.mark.parametrize(
    ("ratio", "rows", "kept"),
    [
        (0.07, 100, 7),  # floats say 7.000000000000001
        (0.29, 100, 29),  # floats say 28.999999999999996
        (0.1, 30, 3),
        (0.1, 31, 4),
        (0.1, 1, 1),
        (1e-06, 3_000_000, 3),
        (1.0, 5, 5),
        (0.1, 0, 0),
    ],
)
def test_the_budget_reads_the_ratio_as_a_decimal(ratio, rows, kept):
    assert budget(ratio, rows) == kept


@pytest.mark.parametrize("ratio", [0, -0.1, 1.01, 10, math.nan])
def test_a_ratio_that_is_no_share_is_refused(ratio):
    with pytest.raises(ValueError, match=r"^selection\.ratio: .* is outside \(0, 1\]$"):
        select("teachability", random_scores(10), ratio, seed=0)


def test_an_unknown_selector_is_refused_with_the_list():
    with pytest.raises(ValueError, match=r"'teachabilty' is unknown; one of full, random, .*q3"):
        select("teachabilty", random_scores(10), 0.1, seed=0)


@pytest.mark.parametrize("name", SCORED)
@given(scores=batches)
def test_every_score_is_the_one_of_the_paper(name, scores):
    expected = dense.selector_scores(
        name, scores.disagreement, scores.compatibility, scores.student_entropy
    )
    actual = priorities(name, scores, 0).double()
    assert torch.equal(actual == -math.inf, expected == -math.inf)
    finite = expected > -math.inf
    assert torch.allclose(actual[finite], expected[finite], rtol=0, atol=1e-6)


@pytest.mark.parametrize("name", SELECTORS)
@given(scores=batches, ratio=ratios)
def test_exactly_the_budget_is_kept_and_nothing_better_is_left_out(name, scores, ratio):
    rows = len(scores.disagreement)
    priority, mask = priorities(name, scores, 3), select(name, scores, ratio, seed=3)
    eligible = int((priority > -math.inf).sum())
    expected = rows if name == "full" else min(dense.budget(ratio, rows), eligible)
    assert mask.sum() == expected
    if 0 < expected < rows:
        worst_kept, best_left = priority[mask].min(), priority[~mask].max()
        assert worst_kept >= best_left
        at_the_threshold = (priority == worst_kept).nonzero().squeeze(1)
        kept = mask[at_the_threshold]
        assert not (~kept[:-1] & kept[1:]).any()  # ties: the earlier rows


@settings(max_examples=30)
@given(scores=batches, ratio=ratios)
@example(scores=random_scores(50, levels=2), ratio=0.1)
def test_the_mask_is_the_oracles(scores, ratio):
    """From the same scores; the selectors' float32 scores may differ from float64 by rounding."""
    for name in SCORED:
        priority = priorities(name, scores, 0)
        assert torch.equal(select(name, scores, ratio, seed=0), dense.select(priority, ratio))


def test_q3_is_low_entropy_and_high_divergence():
    """Medians 2 and 2, both exclusive: only row 3 has H below and D above."""
    scores = TokenScores(
        disagreement=torch.tensor([0.0, 1.0, 2.0, 3.0, 4.0]),
        compatibility=torch.tensor([0.1, 0.2, 0.3, 0.4, 0.5]),
        student_entropy=torch.tensor([0.0, 4.0, 2.0, 1.0, 3.0]),
        teacher_entropy=torch.zeros(5),
    )
    for name in Q3:
        assert select(name, scores, 1.0, seed=0).tolist() == [False, False, False, True, False]


def test_an_empty_q3_keeps_nothing():
    scores = random_scores(20)
    flat = TokenScores(
        scores.disagreement, scores.compatibility, torch.zeros(20), scores.teacher_entropy
    )
    assert not select("q3", flat, 0.5, seed=0).any()


def test_rows_of_infinite_divergence_are_in_q3_however_many():
    d = torch.tensor([0.0, 1.0, math.inf, math.inf, math.inf])
    h = torch.tensor([2.0, 3.0, 0.0, 0.5, 4.0])
    scores = TokenScores(d, torch.rand(5), h, torch.zeros(5))
    assert select("q3", scores, 1.0, seed=0).nonzero().flatten().tolist() == [2, 3]


def test_teachability_entropy_mixes_products_of_normalised_scores():
    """H̃ + s − H̃s with s = D̃C̃, not Norm(D·C)."""
    scores = random_scores(200, seed=5)
    d, c, h = scores.disagreement, scores.compatibility, scores.student_entropy
    s = dense.robust_normalize(d) * dense.robust_normalize(c, degenerate=1.0)
    h = dense.robust_normalize(h)
    wrong = dense.robust_normalize(d * c)
    expected = dense.select(h + s - h * s, 0.1)
    assert torch.equal(select("teachability_entropy", scores, 0.1, seed=0), expected)
    assert not torch.equal(expected, dense.select(h + wrong - h * wrong, 0.1))


def test_self_distillation_still_fills_the_budget():
    """D = 0 and C constant everywhere: all rows tie, the first ones are kept."""
    n = 100
    scores = TokenScores(torch.zeros(n), torch.ones(n), torch.rand(n), torch.rand(n))
    assert select("teachability", scores, 0.07, seed=0).nonzero().flatten().tolist() == [*range(7)]


def test_full_keeps_all_whatever_the_ratio():
    assert select("full", random_scores(33), 0.1, seed=0).all()


def positions(lengths):
    """(offset, length, row) of each row, in canonical order."""
    rows = iter(range(sum(lengths)))
    return [(i, n, next(rows)) for n in lengths for i in range(n)]


@pytest.mark.parametrize(
    ("selector", "first"),
    [("prefix", lambda i, n: i), ("prefix_share", lambda i, n: Fraction(2 * i + 1, 2 * n))],
)
@given(lengths=st.lists(st.integers(1, 60), min_size=1, max_size=8), ratio=ratios)
def test_a_prefix_is_what_stands_first(selector, first, lengths, ratio):
    """Whatever the scores; by exact fractions, and equal ones by sequence."""
    cu_rows = torch.tensor([0, *lengths]).cumsum(0)
    mask = select(selector, random_scores(sum(lengths)), ratio, 0, cu_rows=cu_rows)
    in_order = sorted(positions(lengths), key=lambda place: (first(*place[:2]), place[2]))
    wanted = {row for *_, row in in_order[: dense.budget(ratio, sum(lengths))]}
    assert {*mask.nonzero()[:, 0].tolist()} == wanted


def test_a_prefix_of_three_responses():
    """Of 4, 1 and 8 tokens; 5 of 13 rows: the first ones and next ones, or about a third each."""
    cu_rows = torch.tensor([0, 4, 5, 13])
    kept = [
        select(selector, random_scores(13), 0.38, 0, cu_rows=cu_rows).nonzero()[:, 0].tolist()
        for selector in ("prefix", "prefix_share")
    ]
    assert kept == [[0, 1, 4, 5, 6], [0, 1, 5, 6, 7]]


def test_shares_of_long_responses_do_not_round_together():
    """12139/14006 is 1/(5000·14006) before 8667/10000; float32 has one number for both."""
    cu_rows = torch.tensor([0, 5000, 12_003])
    mask = select("prefix_share", random_scores(12_003), 0.86669, 0, cu_rows=cu_rows)
    first, second = mask.split([5000, 7003])
    assert first.nonzero()[-1] == 4332 and second.nonzero()[-1] == 6069
    assert mask.sum() == 4333 + 6070


def test_random_depends_on_the_seed_alone():
    a, b = random_scores(1000, seed=1), random_scores(1000, seed=2)
    assert torch.equal(select("random", a, 0.1, seed=7), select("random", b, 0.1, seed=7))
    assert not torch.equal(select("random", a, 0.1, seed=7), select("random", a, 0.1, seed=8))


def test_random_is_uniform_over_positions():
    counts = sum(select("random", random_scores(50), 0.2, seed=s).double() for s in range(2000))
    # Binomial(2000, .2): mean 400, standard deviation 18.
    assert counts.sum() == 2000 * 10
    assert (counts - 400).abs().max() < 5 * 18


def test_selection_leaves_the_callers_random_state_alone():
    state = torch.get_rng_state()
    select("random", random_scores(10), 0.5, seed=0)
    assert torch.equal(torch.get_rng_state(), state)


def test_nan_is_refused_by_the_name_of_the_score():
    scores = random_scores(10)
    scores.compatibility[3] = math.nan
    with pytest.raises(ValueError, match=r"^compatibility: 1 of 10 values are NaN"):
        select("teachability", scores, 0.1, seed=0)


def test_no_rows():
    for name in SELECTORS:
        assert select(name, random_scores(0), 0.1, seed=0).shape == (0,)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
def test_the_device_does_not_change_the_choice():
    scores = random_scores(100_000, levels=1000)
    moved = TokenScores(*(v.cuda() for v in vars(scores).values() if v is not None))
    for name in SELECTORS:
        mask = select(name, moved, 0.1, seed=0)
        assert mask.is_cuda
        assert torch.equal(mask.cpu(), select(name, scores, 0.1, seed=0)), name


# Two sequences of 4 and 1 rows.
CU_ROWS = torch.tensor([0, 4, 5])
SMALL = TokenScores(
    disagreement=torch.tensor([0.0, 1.0, 2.0, 3.0, 4.0]),
    compatibility=torch.ones(5),
    student_entropy=torch.tensor([1.0, 1.0, 1.0, 1.0, 6.0]),
    teacher_entropy=torch.zeros(5),
)


def test_metrics_of_a_small_batch():
    mask = torch.tensor([True, False, False, False, True])
    metrics = selection_metrics("divergence", SMALL, mask, CU_ROWS, seed=0)
    d = metrics["scores/disagreement_q05"], metrics["scores/disagreement_q95"]
    assert d == pytest.approx((0.2, 3.8))
    assert metrics["scores/student_entropy_q50"] == 1
    assert metrics["selection/kept_share"] == pytest.approx(2 / 5)
    assert metrics["selection/kept_disagreement"] == pytest.approx(2)
    assert metrics["selection/kept_student_entropy"] == pytest.approx(3.5)
    # Row 0 stands at 1/8 of its response, row 4 in the middle of one token.
    assert metrics["selection/relative_position"] == pytest.approx((0.125 + 0.5) / 2)
    # C is constant, so D^L = D̃ = 0, .8/3.6, .5, 2.8/3.6, 1.
    assert metrics["selection/mass_retained"] == pytest.approx(1 / 2.5)
    assert metrics["selection/threshold"] == pytest.approx(0)
    assert metrics["selection/mass_of_best"] == pytest.approx(1 / (1 + 2.8 / 3.6))
    assert metrics["selection/trained_share"] == pytest.approx(2 / 5)  # neither has rows before it


def test_the_overlap_of_top_sets_is_that_of_all_rows():
    """Kept or not; where nobody has counted, nothing is said."""
    mask = torch.tensor([True, False, False, False, True])
    counted = replace(SMALL, topk_overlap=torch.tensor([1.0, 0.5, 0.25, 0.25, 0.0]))
    metrics = selection_metrics("divergence", counted, mask, CU_ROWS, seed=0)
    assert metrics["selection/topk_overlap"] == pytest.approx(2 / 5)
    without = selection_metrics("divergence", SMALL, mask, CU_ROWS, seed=0)
    assert "selection/topk_overlap" not in without


def test_metrics_of_everything_kept():
    metrics = selection_metrics("full", SMALL, torch.ones(5, dtype=torch.bool), CU_ROWS, seed=0)
    assert metrics["selection/kept_share"] == metrics["selection/mass_retained"] == 1
    assert metrics["selection/relative_position"] == pytest.approx(0.5)
    assert "selection/threshold" not in metrics


def test_metrics_of_nothing_kept_leave_out_what_has_no_value():
    metrics = selection_metrics("q3", SMALL, torch.zeros(5, dtype=torch.bool), CU_ROWS, seed=0)
    assert metrics["selection/kept_share"] == metrics["selection/mass_retained"] == 0
    assert "selection/kept_disagreement" not in metrics
    assert "selection/relative_position" not in metrics


def test_metrics_stay_finite():
    scores = TokenScores(
        torch.tensor([0.0, 1.0, 2.0, math.inf, math.inf]),
        SMALL.compatibility,
        SMALL.student_entropy,
        SMALL.teacher_entropy,
    )
    mask = select("divergence", scores, 0.4, seed=0)
    metrics = selection_metrics("divergence", scores, mask, CU_ROWS, seed=0)
    assert all(math.isfinite(v) for v in metrics.values())
    assert metrics["selection/kept_disagreement"] == 2  # the largest finite one stands in


@given(
    rows=st.integers(20, 200),
    seed=st.integers(0, 100),
    concentrate=st.sampled_from([0.1, 0.5, 0.9]),
    selector=st.sampled_from([name for name in CONCENTRATES if name not in Q3]),
)
def test_concentrating_keeps_as_many_rows_in_fewer_tokens(rows, seed, concentrate, selector):
    scores = random_scores(rows, seed)
    generator = torch.Generator().manual_seed(seed)
    cuts = torch.randperm(rows - 1, generator=generator)[:4].sort().values + 1
    cu_rows = torch.cat([torch.tensor([0]), cuts, torch.tensor([rows])])
    mask = select(selector, scores, 0.1, seed, concentrate, cu_rows)
    assert mask.sum() == budget(0.1, rows)
    metrics = selection_metrics(selector, scores, mask, cu_rows, seed)
    most = max(1 - concentrate, budget(0.1, rows) / rows)
    assert metrics["selection/trained_share"] <= most + 1e-9
    assert metrics["selection/mass_of_best"] <= 1 + 1e-9


# Every layout


@st.composite
def dealt_batches(draw):
    """Scores with ties, infinities or constants, where each sequence's rows start, and a rank for
    each sequence."""
    rows = draw(st.lists(st.integers(1, 40), min_size=1, max_size=8))
    cu_rows = torch.tensor([0, *rows]).cumsum(0)
    seed = draw(st.integers(0, 1000))
    scores = random_scores(sum(rows), seed, draw(st.sampled_from([None, 2, 10])))
    infinite = torch.rand(sum(rows), generator=torch.Generator().manual_seed(seed))
    share = draw(st.sampled_from([0.0, 0.02, 0.5, 1.0]))
    scores.disagreement[infinite < share] = math.inf
    for name in draw(
        st.sets(st.sampled_from(["disagreement", "compatibility", "student_entropy"]))
    ):
        getattr(scores, name).fill_(0.5)
    ranks = draw(st.integers(1, 4))
    owner = draw(st.lists(st.integers(0, ranks - 1), min_size=len(rows), max_size=len(rows)))
    scores = replace(scores, topk_overlap=infinite)
    return scores, cu_rows, ranks, torch.tensor(owner)


def dealt(scores, cu_rows, owner, rank, group):
    held = HeldRows(cu_rows, (owner == rank).nonzero()[:, 0], group)
    ids = held.ids()
    return BatchScores(TokenScores(*(v[ids] for v in vars(scores).values() if v is not None)), held)


@settings(max_examples=40, deadline=None)
@given(
    case=dealt_batches(),
    selector=st.sampled_from([*SELECTORS]),
    ratio=ratios,
    concentrate=st.sampled_from([0.0, 0.0, 0.0, 0.3, 0.7]),
    seed=st.integers(0, 3),
)
def test_every_layout_keeps_the_rows_of_one_sort(case, selector, ratio, concentrate, seed):
    """As with whole vectors and sorts on one rank, bit for bit; and the same is said of them."""
    scores, cu_rows, ranks, owner = case
    concentrate = concentrate if selector in CONCENTRATES else 0.0
    want = whole_batch.select(selector, scores, ratio, seed, concentrate, cu_rows)
    assert torch.equal(select(selector, scores, ratio, seed, concentrate, cu_rows), want)

    def chosen(rank, group):
        own = dealt(scores, cu_rows, owner, rank, group)
        choice = choose(selector, own, ratio, seed, concentrate)
        return own.held.ids()[choice.mask], look(choice)

    by_rank = on_threads(ranks, chosen)
    kept = torch.cat([ids for ids, _ in by_rank]).sort().values
    assert torch.equal(kept, want.nonzero()[:, 0])
    said = whole_batch.selection_metrics(selector, scores, want, cu_rows, seed)
    sequences = want.split(cu_rows.diff().tolist())
    for _, seen in by_rank:
        assert seen.counts.tolist() == [int(of.sum()) for of in sequences]
        assert seen.last.tolist() == [
            int((of.nonzero() + 1).amax()) if of.any() else 0 for of in sequences
        ]
        assert seen.metrics == pytest.approx(said, rel=2e-7, abs=1e-12)
        exact = [name for name in said if name.startswith("scores/") or name.endswith("threshold")]
        assert [seen.metrics[name] for name in exact] == [said[name] for name in exact]


def test_what_ranks_tell_each_other_does_not_grow_with_the_rows():
    """But for 32 bytes a sequence: histograms of the scores' digits, and sums."""

    def told(rows):
        scores, cu_rows = random_scores(4 * rows), torch.arange(5) * rows
        owner = torch.tensor([0, 1, 1, 0])

        def chosen(rank, group):
            look(choose("teachability", dealt(scores, cu_rows, owner, rank, group), 0.1, 0))
            return group.calls, group.bytes

        return on_threads(2, chosen)[0]

    assert told(10) == told(1000)


def test_a_nan_on_one_rank_is_refused_on_all():
    scores = random_scores(40)
    scores.teacher_entropy[33] = math.nan
    cu_rows, owner = torch.tensor([0, 20, 40]), torch.tensor([0, 1])

    def refused(rank, group):
        own = dealt(scores, cu_rows, owner, rank, group)
        with pytest.raises(ValueError, match=r"^teacher_entropy: 1 of 40 values are NaN"):
            look(choose("teachability", own, 0.1, 0))
        return True

    assert all(on_threads(2, refused))


def test_concentrating_gives_up_late_rows():
    """Two sequences of 100 rows; what disagrees stands early, but for one lone late row."""
    scores = random_scores(200)
    early = [*range(5, 15), *range(105, 114)]
    d = torch.linspace(0, 0.1, 200)
    d[[*early, 190]] = 2.0
    scores = TokenScores(d, torch.ones(200), scores.student_entropy, scores.teacher_entropy)
    cu_rows = torch.tensor([0, 100, 200])
    plain = select("divergence", scores, 0.1, 0).nonzero()[:, 0].tolist()
    concentrated = select("divergence", scores, 0.1, 0, 0.8, cu_rows).nonzero()[:, 0].tolist()
    assert plain == [*early, 190]
    assert set(early) < set(concentrated)
    assert len(concentrated) == 20
    assert 190 not in concentrated


@pytest.mark.parametrize("selector", ["full", "random", "prefix", "q3_low_dl"])
def test_a_selector_without_mass_cannot_concentrate(selector):
    with pytest.raises(ValueError, match=f"selection.concentrate: 0.5: {selector} has no prior"):
        select(selector, random_scores(10), 0.1, 0, 0.5, torch.tensor([0, 10]))


def test_a_mask_that_is_all_of_q3_is_told_of():
    """The q3 selectors are then one and the same, and comparing them says nothing."""
    notes = {}
    selection = SimpleNamespace(selector="q3_high_di", ratio=0.1)
    run = SimpleNamespace(
        config=SimpleNamespace(selection=selection), monitor=SimpleNamespace(note=notes.__setitem__)
    )
    warn_of_small_q3 = partial(Observer._warn_of_small_q3, run, 100)
    warn_of_small_q3(10, step=1)
    assert not notes
    warn_of_small_q3(9, step=2)
    assert "could keep 10 rows, but Q3 has 9" in notes["selection.ratio"]
    selection.selector = "q3"
    del notes["selection.ratio"]
    warn_of_small_q3(9, step=3)
    assert not notes
