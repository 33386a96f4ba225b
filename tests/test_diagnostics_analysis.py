"""Statistics of the fixed-context diagnostic, on banks whose law is known."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
import torch
from support.planted_bank import planted_bank, planted_columns, write_table

from megatron_taopd.diagnostics import position, shapes
from megatron_taopd.diagnostics.analysis import analyze
from megatron_taopd.diagnostics.bootstrap import (
    draw_counts,
    group_sums,
    interval,
    t_interval,
)
from megatron_taopd.diagnostics.gains import read_gains, shape_variables
from megatron_taopd.diagnostics.q3 import high_half, in_q3, support_gaps
from megatron_taopd.diagnostics.regressions import regressions
from megatron_taopd.step.selection import SELECTORS, budget, select
from megatron_taopd.step.teachability import incompatible_disagreement, learnable_disagreement

BANKS = 200
# As the paper has them, in its Sections 3, C and F.
MODELS = {
    "baseline": ["H", "D", "H·D", "position", "teacher entropy"],
    "+ C": ["H", "D", "H·D", "position", "teacher entropy", "C"],
    "decomposed": ["H", "D^L", "D^I", "H·D", "position", "teacher entropy"],
}
CONTROLS = ["H", "position", "teacher entropy"]
PROXIES = {
    "C": "Teacher mass on student support",
    "overlap": "Top-K overlap",
    "jaccard": "Top-K Jaccard",
    "shared": "Shared teacher top-K mass",
    "cbc": "CBC",
}
RATIOS = [0.01, 0.02, 0.03, 0.05, 0.1, 0.2, 0.3, 0.5]
NAMES = {
    "full": "Full OPD",
    "random": "Random",
    "prefix": "Prefix",
    "prefix_share": "Prefix (share)",
    "entropy": "Entropy",
    "divergence": "Raw KL",
    "compatibility": "C-only",
    "tip": "TIP",
    "teachability": "TA-OPD",
    "teachability_entropy": "TA-OPD+Ent.",
    "q3": "Q3-only",
    "q3_high_c": "Q3+high-C",
    "q3_high_dl": "Q3+TA (high D^L)",
    "q3_low_dl": "Q3+low D^L",
    "q3_high_di": "Q3+high D^I",
}


def value(rows, **keys):
    (row,) = [row for row in rows if all(row[key] == wanted for key, wanted in keys.items())]
    return row["estimate"], row["low"], row["high"]


def replicate(bank, gain, counts):
    """The bank with each prompt as often as a resample has it, row by row."""
    rows = np.concatenate(
        [np.tile(np.flatnonzero(bank.prompts == p), int(n)) for p, n in enumerate(counts)]
    )
    return rows, gain[rows]


def standardize(values):
    return (values - values.mean()) / values.std()


def design(bank, rows, terms):
    """[rows, terms] the regressors of replicated rows, each standardised among them."""
    d, c = (torch.from_numpy(bank.columns[f"{name}_16"]) for name in "DC")
    h = bank.columns["student_entropy"]
    columns = {
        "H": h[rows],
        "D": d.numpy()[rows],
        "H·D": standardize(h[rows]) * standardize(d.numpy()[rows]),
        "position": ((bank.columns["position"] + 0.5) / bank.columns["length"])[rows],
        "teacher entropy": bank.columns["teacher_entropy"][rows],
        "C": c.numpy()[rows],
        "D^L": learnable_disagreement(d, c).numpy()[rows],
        "D^I": incompatible_disagreement(d, c).numpy()[rows],
    }
    return np.stack([standardize(columns[term]) for term in terms], axis=1)


def explicit_fit(bank, gain, rows, terms):
    """Coefficients and R² of least squares on replicated rows."""
    x, y = design(bank, rows, terms), standardize(gain[rows])
    beta = np.linalg.lstsq(x, y, rcond=None)[0]
    return beta, 1 - ((y - x @ beta) ** 2).sum() / (y**2).sum()


def triple(values):
    """[3, …] what a table says of values [1 + resamples, …]: the bank's own, and the interval."""
    return np.stack([values[0], *np.quantile(values[1:], (0.025, 0.975), axis=0)])


def test_resampled_regressions_equal_those_on_replicated_rows():
    """Which terms each model has, their coefficients, and what Table 9 makes of them."""
    bank, gain = planted_bank(0, 12, 40, learnable=2.0)
    counts = draw_counts(bank.num_prompts, 20, seed=1)
    coefficients, differences = regressions(bank, gain, 16, counts)
    assert {row["model"] for row in coefficients} == {*MODELS}
    beta, r2 = {}, {}
    for model, terms in MODELS.items():
        fits = [explicit_fit(bank, gain, replicate(bank, gain, n)[0], terms) for n in counts]
        beta[model], r2[model] = (np.array(values) for values in zip(*fits, strict=True))
        found = [row for row in coefficients if row["model"] == model]
        assert [row["term"] for row in found] == terms
        found = np.array([[row[key] for row in found] for key in ("estimate", "low", "high")])
        np.testing.assert_allclose(found, triple(beta[model]), rtol=1e-8, atol=1e-10)
    learnable, incompatible = beta["decomposed"][:, 1], beta["decomposed"][:, 2]
    for quantity, expected in {
        "β(D^L)": learnable,
        "β(D^I)": incompatible,
        "gap": learnable - incompatible,
        "ΔR² (+ C), 10⁻³": 1e3 * (r2["+ C"] - r2["baseline"]),
        "ΔR² (decomposed), 10⁻³": 1e3 * (r2["decomposed"] - r2["baseline"]),
        "R² (baseline)": r2["baseline"],
    }.items():
        found = value(differences, quantity=quantity)
        np.testing.assert_allclose(found, triple(expected), rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize("residual", ["controls", "decomposed"])
def test_residuals_are_those_behind_their_terms(residual):
    bank, gain = planted_bank(0, 12, 40, learnable=2.0)
    terms = {"controls": CONTROLS, "decomposed": MODELS["decomposed"]}[residual]
    x = design(bank, np.arange(bank.num_rows), terms)
    x = np.concatenate([np.ones((bank.num_rows, 1)), x], axis=1)
    left = gain - x @ np.linalg.lstsq(x, gain, rcond=None)[0]
    rows = shapes.residual_bins(bank, gain, 16, draw_counts(bank.num_prompts, 3, seed=1))
    bins = shapes.quantile_buckets(bank.columns["C_16"])
    for bucket in range(10):
        found, _, _ = value(rows, residual=residual, variable="C", bucket=bucket)
        np.testing.assert_allclose(found, left[bins == bucket].mean(), rtol=1e-8)


def test_resampled_gaps_equal_those_on_replicated_rows():
    bank, gain = planted_bank(0, 12, 40, learnable=2.0)
    counts = draw_counts(bank.num_prompts, 50, seed=1)
    rows_of_table = support_gaps(bank, gain, 16, counts)
    q3 = in_q3(bank, 16)
    assert {row["proxy"] for row in rows_of_table} == {*PROXIES.values()}
    for proxy, name in PROXIES.items():
        values = bank.columns[f"{proxy}_16"]
        high = np.zeros(bank.num_rows, dtype=bool)
        high[q3] = high_half(values[q3])
        pooled, matched = [], []
        for drawn in counts:
            rows, replicated = replicate(bank, gain, drawn)
            inside, above = q3[rows], high[rows]
            pooled.append(replicated[inside & above].mean() - replicated[inside & ~above].mean())
            gaps = []
            for p, times in enumerate(drawn):
                of_prompt = q3 & (bank.prompts == p)
                if (of_prompt & high).any() and (of_prompt & ~high).any():
                    gap = gain[of_prompt & high].mean() - gain[of_prompt & ~high].mean()
                    gaps += [gap] * int(times)
            matched.append(np.mean(gaps))
        for estimator, slow in (("pooled", pooled), ("matched", matched)):
            expected = (slow[0], *np.quantile(slow[1:], (0.025, 0.975)))
            found = value(rows_of_table, proxy=name, estimator=estimator)
            np.testing.assert_allclose(found, expected, rtol=1e-9)


def covered(low, truth, high):
    return low <= truth <= high


def test_intervals_cover_planted_coefficients_at_the_nominal_rate():
    wide, gain = planted_bank(10_000, 4000, 40, learnable=2.0, incompatible=1.0)
    truth = {
        row["quantity"]: row["estimate"]
        for row in regressions(wide, gain, 16, np.ones((2, wide.num_prompts)))[1]
    }
    assert truth["β(D^L)"] > 1.5 * truth["β(D^I)"] > 0
    hits = {name: 0 for name in ("β(D^L)", "β(D^I)", "gap")}
    over_rows = 0
    for seed in range(BANKS):
        bank, gain = planted_bank(seed, 60, 40, learnable=2.0, incompatible=1.0)
        counts = draw_counts(bank.num_prompts, 300, seed)
        rows = regressions(bank, gain, 16, counts)[1]
        for name in hits:
            _, low, high = value(rows, quantity=name)
            hits[name] += covered(low, truth[name], high)
        # The mistake that the bootstrap over prompts avoids: every row its own cluster.
        x = design(bank, np.arange(bank.num_rows), MODELS["decomposed"])
        beta, _, _, _ = np.linalg.lstsq(x, standardize(gain), rcond=None)
        noise = (standardize(gain) - x @ beta).std()
        error = 1.96 * noise * np.sqrt(np.linalg.inv(x.T @ x)[1, 1])
        over_rows += covered(beta[1] - error, truth["β(D^L)"], beta[1] + error)
    for name, count in hits.items():
        assert 0.90 <= count / BANKS <= 0.98, (name, count / BANKS)
    assert over_rows / BANKS < 0.88


def test_a_bank_without_an_effect_shows_none():
    false = {"regression": 0, "Q3": 0}
    for seed in range(BANKS):
        bank, gain = planted_bank(1000 + seed, 60, 40)
        counts = draw_counts(bank.num_prompts, 300, seed)
        _, low, high = value(regressions(bank, gain, 16, counts)[1], quantity="gap")
        false["regression"] += not covered(low, 0, high)
        gaps = support_gaps(bank, gain, 16, counts)
        _, low, high = value(gaps, proxy=PROXIES["C"], estimator="pooled")
        false["Q3"] += not covered(low, 0, high)
    for name, count in false.items():
        assert 0.015 <= count / BANKS <= 0.10, (name, count / BANKS)


def test_q3_gap_finds_what_was_planted():
    bank, gain = planted_bank(0, 200, 100, learnable=2.0)
    counts = draw_counts(bank.num_prompts, 300, 0)
    for row in support_gaps(bank, gain, 16, counts):
        # d is uniform in (1/2, 1) there, c in two halves whose means differ by 1/2: 2 · 3/4 · 1/2.
        if row["proxy"] == PROXIES["C"]:
            assert row["low"] < 0.75 < row["high"]
        assert row["low"] > 0


@pytest.fixture(scope="module")
def analyzed():
    bank, gain = planted_bank(3, 10, 37 * 2)
    return bank, gain, analyze(bank, {"a": gain}, resamples=10, seed=5)


def test_every_selector_and_budget_has_its_rows(analyzed):
    _, _, tables = analyzed
    assert {*NAMES} == {*SELECTORS}
    for table, ratios in (("table10_budget_sweep", RATIOS), ("table8_top_n", [0.03, 0.05, 0.1])):
        rows = [row for row in tables[table] if row["quantity"] == "total"]
        found = {(row["selector"], row["budget"]) for row in rows}
        assert len(rows) == len(found)
        assert found == {(name, ratio) for name in NAMES.values() for ratio in ratios}


@pytest.mark.parametrize("name", SELECTORS)
def test_every_selector_keeps_exactly_n_rows_the_rows_of_the_training_selector(name, analyzed):
    bank, gain, tables = analyzed
    q3 = int(in_q3(bank, 16).sum())
    lengths = bank.columns["length"][bank.columns["position"] == 0]
    cu_rows = torch.tensor([0, *lengths.astype(int)]).cumsum(0)
    for ratio in RATIOS:
        mask = select(name, bank.scores(16), ratio, 5, cu_rows=cu_rows).numpy()
        n = bank.num_rows if name == "full" else budget(ratio, bank.num_rows)
        label = NAMES[name]
        rows = [r for r in tables["table10_budget_sweep"] if r["selector"] == label]
        rows = [r for r in rows if r["budget"] == ratio]
        expected = {"total": gain[mask].sum(), "per kept": gain[mask].mean()}
        expected["per kept − all"] = gain[mask].mean() - gain.mean()
        for quantity, wanted in expected.items():
            np.testing.assert_allclose(value(rows, quantity=quantity)[0], wanted, atol=1e-12)
        assert {row["rows"] for row in rows} == {min(n, q3) if name.startswith("q3") else n}
        places = [r for r in tables["kept_positions"] if r["selector"] == label]
        places = [r for r in places if r["budget"] == ratio]
        assert sum(row["rows"] for row in places) == mask.sum()
        assert sum(row["share"] for row in places) == pytest.approx(1)


def early_learnable_bank(effect: float, learnable: float, seed=7):
    """Gain falls along the response, and so does D^L, whatever it does for the gain."""
    bank, _ = planted_bank(seed, 60, 60)
    rng, place = np.random.default_rng(seed), bank.place()
    d = np.clip(1 - place + 0.3 * rng.random(bank.num_rows), 0, None)
    c = rng.random(bank.num_rows)
    bank.columns.update({"D_16": d, "C_16": c})
    noise = rng.normal(size=bank.num_rows) + rng.normal(size=60)[bank.prompts]
    return bank, effect * (1 - place) + learnable * shape_variables(bank, 16)["D^L"] + noise


def test_what_position_explains_is_not_teachabilitys():
    """Without an effect of its own D^L seems to have one, until rows that stand alike are compared:
    of 20 banks, at most 4 intervals exclude the effect that is not there.
    """
    excluded = 0
    for seed in range(20):
        bank, gain = early_learnable_bank(effect=4.0, learnable=0.0, seed=seed)
        counts = draw_counts(bank.num_prompts, 100, 0)
        table = position.position_regression(bank, gain, 16, counts)
        assert value(table, quantity="β(D^L)")[1] > 0.1
        estimate, low, high = value(table, quantity="β(D^L) beside position")
        excluded += not low < 0 < high
        assert abs(estimate) < 0.08
    assert excluded <= 4
    gaps = position.position_gaps(bank, gain, 16, counts)
    everywhere = value(gaps, variable="D^L", among="all rows")
    assert everywhere[1] > 0.5
    for among in ("parts", "parts, D"):
        assert abs(value(gaps, variable="D^L", among=among)[0]) < 0.2 * everywhere[0]


def test_what_teachability_adds_to_position_and_to_d_is_found():
    bank, gain = early_learnable_bank(effect=1.0, learnable=3.0)
    counts = draw_counts(bank.num_prompts, 300, 0)
    table = position.position_regression(bank, gain, 16, counts)
    gaps = position.position_gaps(bank, gain, 16, counts)
    for others in ("position", "position and D", "position and D^I"):
        assert value(table, quantity=f"β(D^L) beside {others}")[1] > 0.1
    assert value(table, quantity="ΔR² (D^L over position and D), 10⁻³")[0] > 10
    for among in ("all rows", "parts", "parts, D"):
        assert value(gaps, variable="D^L", among=among)[1] > 0.2


def test_position_beside_teachability_equals_least_squares_and_loops():
    bank, gain = early_learnable_bank(effect=2.0, learnable=1.0)
    counts = draw_counts(bank.num_prompts, 20, 3)
    columns = {"position": bank.place(), "log token": np.log(1 + bank.columns["position"])}
    columns |= shape_variables(bank, 16)
    for rows_of, pick in ((counts[0], 0), (counts[1], 1)):
        rows, y = replicate(bank, gain, rows_of)
        terms = ("position", "log token", "D^L", "D^I")
        x = np.stack([standardize(columns[term][rows]) for term in terms], axis=1)
        beta = np.linalg.lstsq(x, standardize(y), rcond=None)[0]
        found = position.position_regression(bank, gain, 16, counts[[pick, pick]])
        for term, wanted in zip(terms, beta, strict=True):
            beside = "D^L and D^I" if term in terms[:2] else "position and "
            beside += {"D^L": "D^I", "D^I": "D^L"}.get(term, "")
            name = f"β({term}) beside {beside}"
            assert value(found, quantity=name)[0] == pytest.approx(wanted, rel=1e-7, abs=1e-9)
    total = weight = 0
    tenth = np.minimum((10 * bank.place()).astype(int), 9)
    found = position.position_gaps(bank, gain, 16, counts)
    for i in range(10):
        inside = tenth == i
        high = high_half(columns["D^L"][inside])
        gap = gain[inside][high].mean() - gain[inside][~high].mean()
        assert value(found, variable="D^L", among=f"part {i + 1}")[0] == pytest.approx(gap)
        total, weight = total + inside.sum() * gap, weight + inside.sum()
    assert value(found, variable="D^L", among="parts")[0] == pytest.approx(total / weight)


def test_buckets_hold_the_rows_and_their_mean_gain():
    bank, gain = planted_bank(4, 20, 50, learnable=2.0)
    counts = draw_counts(bank.num_prompts, 50, 0)
    rows = shapes.buckets(bank, gain, 16, counts)
    for name in ("D", "C", "D^L", "D^I"):
        of_variable = [row for row in rows if row["variable"] == name]
        assert sum(row["rows"] for row in of_variable) == bank.num_rows
        weighted = sum(row["rows"] * row["estimate"] for row in of_variable)
        assert weighted == pytest.approx(gain.sum())
        assert all(a["x"] < b["x"] for a, b in pairwise(of_variable))
    c = bank.columns["C_16"]
    lowest = c <= np.quantile(c, 0.1)
    assert value(rows, variable="C", bucket=0)[0] == pytest.approx(gain[lowest].mean())


def test_equal_values_share_a_bucket():
    values = np.array([0.0] * 50 + [1.0] * 30 + [2.0] * 20)
    groups = shapes.quantile_buckets(values)
    assert len({(g, v) for g, v in zip(groups, values, strict=True)}) == 3


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ([1, 2, 3, 4], [0, 0, 1, 1]),
        ([1, 2, 2, 2, 2], [0, 1, 1, 1, 1]),  # or none at all
        ([1, 1, 1, 1, 2], [0, 0, 0, 0, 1]),
        ([], []),
    ],
)
def test_halves_by_the_median_are_as_even_as_ties_allow(values, expected):
    assert high_half(np.array(values)).tolist() == [bool(e) for e in expected]


def test_residuals_show_a_shape_that_lines_miss():
    bank, gain = planted_bank(5, 100, 60, learnable=3.0)
    counts = draw_counts(bank.num_prompts, 200, 0)
    rows = shapes.residual_bins(bank, gain, 16, counts)
    behind_controls = [r for r in rows if r["residual"] == "controls" and r["variable"] == "D^L"]
    assert behind_controls[-1]["low"] > 0 > behind_controls[0]["high"]
    behind_all = [r for r in rows if r["residual"] == "decomposed" and r["variable"] == "D^L"]
    assert sum(row["low"] <= 0 <= row["high"] for row in behind_all) >= 8
    curved = gain + 20 * (shape_variables(bank, 16)["D^L"] - 0.5) ** 2
    rows = shapes.residual_bins(bank, curved, 16, counts)
    behind_all = [r for r in rows if r["residual"] == "decomposed" and r["variable"] == "D^L"]
    assert sum(row["low"] <= 0 <= row["high"] for row in behind_all) <= 5


def test_first_resample_is_the_bank_and_the_others_have_as_many_prompts():
    counts = draw_counts(7, 30, 0)
    assert (counts[0] == 1).all() and (counts.sum(1) == 7).all()
    assert (draw_counts(7, 30, 0) == counts).all()


def test_sums_by_prompt_and_group():
    prompts, groups = np.array([0, 0, 1, 1, 1]), np.array([0, 1, 1, -1, 1])
    sums = group_sums(np.array([1.0, 2, 4, 8, 16]), prompts, 2, groups, 2)
    assert sums.tolist() == [[1, 2], [0, 20]]


def test_interval_leaves_out_resamples_without_a_value():
    values = np.array([[1.0], [np.nan], [3.0], [3.0]])
    assert interval(values)[:, 0].tolist() == [1, 3, 3]
    assert np.isnan(interval(np.full((3, 1), np.nan))).all()


def test_t_interval_over_seeds():
    mean, low, high = t_interval(np.array([1.0, 2.0, 3.0]))
    # The textbook's 4.303 / √3 on each side.
    assert (mean, high - mean, mean - low) == pytest.approx((2, 2.4842, 2.4842), abs=1e-4)


def test_several_seeds_each_and_their_mean(tmp_path):
    paths = []
    for seed in range(3):
        columns = planted_columns(0, 8, 60, learnable=2.0)
        columns["gain"] = columns["gain"] + seed
        paths.append(write_table(tmp_path / f"seed{seed}.parquet", columns))
    bank, gains = read_gains(paths)
    assert list(gains) == ["seed0", "seed1", "seed2"]
    tables = analyze(bank, gains, resamples=20)
    rows = [r for r in tables["table5_bank"] if r["quantity"] == "mean gain"]
    each = [value(rows, seed=name)[0] for name in gains]
    np.testing.assert_allclose(np.diff(each), 1)
    np.testing.assert_allclose(value(rows, seed="mean"), t_interval(np.array(each)))
    # A constant more gain is no change of any slope.
    slopes = [r for r in tables["table9_regression"] if r["quantity"] == "gap" and r["K"] == 16]
    assert len({round(row["estimate"], 9) for row in slopes}) == 1


def test_an_infinite_disagreement_counts_as_the_largest_finite_one(tmp_path):
    columns = planted_columns(0, 8, 60)
    columns["D_16"][5] = np.inf
    bank, _ = read_gains([write_table(tmp_path / "gain.parquet", columns)])
    finite = columns["D_16"][np.isfinite(columns["D_16"])]
    assert bank.columns["D_16"][5] == finite.max()


def test_mistakes_are_told_in_one_line(tmp_path):
    def table(name, **changes):
        columns = planted_columns(0, 4, 20)
        columns = {key: changes.get(key, values) for key, values in columns.items()}
        columns = {key: values for key, values in columns.items() if values is not None}
        return write_table(tmp_path / name, columns)

    good = table("good.parquet")
    gain = planted_columns(0, 4, 20)["gain"]
    broken = tmp_path / "broken.parquet"
    broken.write_text("x")
    for paths, message in (
        ([tmp_path / "none.parquet"], "none.parquet: "),
        ([broken], "broken.parquet: "),
        ([table("c.parquet", C_8=None)], "c.parquet: not a table"),
        ([table("g.parquet", gain=np.where(gain == gain[0], np.nan, gain))], "gain: has NaN"),
        ([table("n.parquet", gain=None)], "no column gain"),
        ([table("p.parquet", prompt=np.zeros(80))], "fewer than 2 prompts"),
        (
            [good, table("o.parquet", position=np.arange(80))],
            "o.parquet: its scores are not those of",
        ),
    ):
        with pytest.raises(ValueError, match=message) as error:
            read_gains(paths)
        assert "\n" not in str(error.value)
    bank, gains = read_gains([good])
    with pytest.raises(ValueError, match="--k: 5 is not in the table; one of 8, 16, 32"):
        analyze(bank, gains, k=5)
    bank.columns["teacher_entropy"][:] = 1.0
    with pytest.raises(ValueError, match="teacher entropy at K = 8: the same on every row"):
        analyze(bank, gains, resamples=5)
