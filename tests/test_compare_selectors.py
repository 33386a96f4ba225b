"""The table over selectors and seeds, from finished runs, which are not repeated; and the terms,
learning rates and intervals of arms that are compared."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from support.commands import run_python

from megatron_taopd.cli.compare import arms, paired, selectors
from megatron_taopd.diagnostics.table import MEASURES, PLACE

ROOT = Path(__file__).parents[1]
TOOL = ROOT / "tools" / "compare_selectors.py"


def finish_run(root, selector, seed, kept_rows):
    """A run of as many steps as it has numbers of kept rows, the third of them not taken."""
    directory = root / f"{selector}-{seed}"
    (directory / "student").mkdir(parents=True)
    records = [{"step": 0, "eval/accuracy": 0.2}]
    for step, kept in enumerate(kept_rows, 1):
        tokens = {"tokens_trained": 30, "tokens_rolled_out": 60}
        taken = {"grad_norm": 2.0, "kept_rows": kept} if step != 3 else {"grad_norm": None}
        records.append({"step": step, **taken, **tokens})
    records[-1]["eval/accuracy"] = 0.5 + seed / 10
    lines = "".join(json.dumps(record) + "\n" for record in records)
    (directory / "metrics.jsonl").write_text(lines)
    config = f"run: {{seed: {seed}, name: {selector}}}\nselection: {{selector: {selector}}}\n"
    (directory / "config.yaml").write_text(config)


@pytest.fixture(scope="module")
def compared(tmp_path_factory):
    """`q3_high_dl` finds fewer positions of its kind than it may keep."""
    root = tmp_path_factory.mktemp("runs")
    finish_run(root, "full", 0, [100, 120, 0, 140])
    finish_run(root, "full", 1, [100, 120, 0, 152])
    finish_run(root, "q3_high_dl", 0, [7, 9, 0, 5])
    finish_run(root, "q3_high_dl", 1, [8, 8, 0, 8])
    words = ["CONFIG", "--out", root, "--seeds", "0", "1", "--json", root / "figures.json"]
    done = run_python("tools/compare_selectors.py", *words, "--selectors", "full", "q3_high_dl")
    assert done.returncode == 0, done.stderr
    return json.loads((root / "figures.json").read_text()), done.stdout


@pytest.mark.slow
def test_kept_rows_are_a_mean_over_the_steps_taken_and_the_seeds(compared):
    (full, q3), shown = compared
    assert (full["kept_rows"], q3["kept_rows"]) == (122, 7.5)
    assert "kept" in shown and "kept: rows a step" in shown
    lines = {line.split()[0]: line.split() for line in shown.splitlines() if line.split()}
    assert lines["full"][1:] == ["50.0", "60.0", "55.0", "7.1", "20.0", "2.0", "122", "50%"]


@pytest.mark.slow
def test_the_runs_are_drawn_over_one_another(compared):
    _, shown = compared
    page = Path(next(line for line in shown.splitlines() if line.startswith("page: "))[6:])
    html = page.read_text()
    assert "4 runs compared" in html and "Held-out accuracy by step" in html
    assert "<b>full</b> 2" in html and "<b>q3_high_dl</b> 2" in html


@pytest.mark.slow
def test_what_else_a_row_has(compared):
    (full, _), _ = compared
    assert full["selector"] == "full" and full["before"] == 0.2 and full["after"] == [0.5, 0.6]
    assert (full["mean"], full["worst"]) == (0.55, 0.2) and full["grad_norm"] == 2
    assert full["tokens_trained"] == pytest.approx(0.5) and full["std"] == pytest.approx(0.0707107)


# ---------------------------------------------------------------------------------- terms and rates


SECONDS = {"full": 2.0, "prefix": 1.0, "teachability_horizon": 0.5}
ROWS = {"full": 100, "prefix": 10, "teachability_horizon": 8}
BEST = {"full": 2e-3, "prefix": 5e-4, "teachability_horizon": 1e-3}


class Trained:
    """In place of the trainer: runs whose accuracy and cost follow from arm, rate and seed."""

    def __init__(self):
        self.runs: dict[str, dict[str, str]] = {}

    def __call__(self, directory, overrides):
        given = dict(word.split("=", 1) for word in overrides)
        self.runs[str(directory)] = given
        arm = next(
            name for name in ("teachability_horizon", "full", "prefix")
            if set(arms.overrides_of(name)) <= {*overrides}
        )  # fmt: skip
        steps, seed = int(given.get("train.steps", 40)), int(given.get("run.seed", 0))
        lr = float(given.get("optimizer.lr", 1e-3))
        finish_run(directory.parent, arm, seed, [ROWS[arm]] * 2)  # made under another name
        made = directory.parent / f"{arm}-{seed}"
        if made != directory:
            made.rename(directory)
        records = [json.loads(x) for x in (directory / "metrics.jsonl").read_text().splitlines()]
        records[-1]["eval/accuracy"] = 0.5 - abs(np.log(lr / BEST[arm]))
        lines = "".join(json.dumps(record) + "\n" for record in records)
        (directory / "metrics.jsonl").write_text(lines)
        spent = {"seconds": 7 + SECONDS[arm] * steps}  # 7 s for the start of a process
        (directory / "processor.json").write_text(json.dumps(spent))
        rng = np.random.default_rng(seed)  # problems that are hard for one are for the other
        right = (rng.random(200) < (0.5 if arm == "full" else 0.502)).astype(int).tolist()
        outcome = {"step": steps, "samples": 1, "correct": right}
        (directory / "evaluation.json").write_text(json.dumps(outcome))
        return directory


@pytest.fixture
def trained(monkeypatch, tmp_path):
    trained = Trained()
    monkeypatch.setattr(arms.Trainer, "__call__", lambda _, *rest: trained(*rest))
    config = tmp_path / "run.yaml"
    config.write_text(
        "student: {path: s}\nteacher: {path: t}\ndata: {prompts: p.jsonl}\ntrain: {steps: 40}\n"
    )

    def compare(*words):
        arguments = [str(config), "--out", str(tmp_path / "out"), "--selectors", "full", "prefix"]
        arguments += ["teachability_horizon", "--json", str(tmp_path / "figures.json")]
        status = selectors.main([*arguments, "--jobs", "1", *words])
        return status, json.loads((tmp_path / "figures.json").read_text())

    compare.runs, compare.out = trained.runs, tmp_path / "out"
    return compare


@pytest.mark.parametrize(
    ("equal", "steps"),
    [
        ("supervision", {"full": 40, "prefix": 400, "teachability_horizon": 500}),
        ("seconds", {"full": 40, "prefix": 80, "teachability_horizon": 160}),
    ],
)
def test_arms_have_equal_terms_and_each_its_own_learning_rate(trained, equal, steps):
    """2 and 1 seconds a step, 100 and 10 rows; the start of a process counts for nobody."""
    grid = ["--lrs", "5e-4", "1e-3", "2e-3", "--tuning-seed", "9", "--seeds", "0", "1"]
    status, rows = trained("--equal", equal, *grid)
    assert status == 0
    for arm, lr in BEST.items():
        for seed in (0, 1):
            given = trained.runs[str(trained.out / f"{arm}-{seed}")]
            assert int(given["train.steps"]) == steps[arm]
            assert float(given["optimizer.lr"]) == lr and given["run.seed"] == str(seed)
    tuned = {path: given for path, given in trained.runs.items() if "/tuning/" in path}
    assert len(tuned) == 9 and {given["run.seed"] for given in tuned.values()} == {"9"}
    assert [row["selector"] for row in rows] == [*BEST]
    spent = {row["selector"]: (row["supervised"], row["seconds"]) for row in rows}
    assert spent == {arm: (2 * ROWS[arm], 7 + SECONDS[arm] * steps[arm]) for arm in BEST}
    horizon = trained.runs[str(trained.out / "teachability_horizon-0")]
    assert horizon["rollout.horizon"] == "auto"
    assert horizon["selection.selector"] == "teachability"


def test_a_margin_is_written_before_the_runs_and_stays(trained, capsys):
    trained("--margin", "0.02")
    protocol = json.loads((trained.out / "protocol.json").read_text())
    assert (protocol["margin"], protocol["gain_margin"]) == (0.02, 0.05)
    assert protocol["reference"] == "full"
    before = len(trained.runs)
    assert trained("--margin", "0.05")[0] == 2
    message = capsys.readouterr().err
    assert "protocol.json: margin was 0.02 before the runs and is 0.05 now" in message
    assert len(trained.runs) == before


def test_rates_are_chosen_by_the_gain_on_a_bank(trained, monkeypatch):
    """By accuracy the best rates are BEST; forward KL, 2 before, is the less the lower η is."""

    def score(scorer, student, out):
        run = trained.runs.get(str(Path(student).parent))
        forward_kl = 1000 * float(run["optimizer.lr"]) if run else 2.0
        columns = {name: [0, 0, 1, 1, 2, 2] for name in PLACE}
        columns |= dict.fromkeys(MEASURES, np.full(6, forward_kl))
        about = {"bank": "b", "teacher_fingerprint": "t", "checkpoint": student}
        about["teacher_prompt"] = scorer.teacher_prompt
        pq.write_table(pa.table(columns).replace_schema_metadata(about), out)

    monkeypatch.setattr(arms.Scorer, "_score", score)
    grid = ["--lrs", "5e-4", "1e-3", "--bank", "bank", "--lr-by", "gain", "--seeds", "0", "1"]
    status, rows = trained(*grid, "--set", "teacher.prompt=student")
    assert status == 0
    for row in rows:
        assert row["settings"] == ["optimizer.lr=0.0005"]
        assert row["gain"] == 2 - 0.5 and row["against"]["gain"]["estimate"] == 0
    about = pq.read_schema(trained.out / "prefix-1" / "gain.parquet").metadata
    assert about[b"teacher_prompt"] == b"student"
    assert not list(trained.out.rglob("after.parquet"))


def test_a_gain_needs_a_bank(trained, capsys):
    (trained.out.parent / "figures.json").write_text("{}")
    assert trained("--lrs", "1e-3", "--lr-by", "gain")[0] == 2
    assert "--lr-by: gain needs --bank" in capsys.readouterr().err


def test_a_tuning_seed_is_none_of_the_seeds(trained, capsys):
    (trained.out.parent / "figures.json").write_text("{}")
    assert trained("--lrs", "1e-3", "--tuning-seed", "1", "--seeds", "0", "1")[0] == 2
    assert "--tuning-seed: 1 is one of --seeds" in capsys.readouterr().err
    assert not trained.runs


def test_each_arm_is_compared_with_the_reference_problem_by_problem(trained):
    _, (full, prefix, _) = trained("--seeds", "0", "1", "2")
    assert full["against"]["accuracy"]["estimate"] == 0
    right = [
        [json.loads((trained.out / f"{arm}-{seed}" / "evaluation.json").read_text())["correct"]
         for seed in range(3)] for arm in ("prefix", "full")
    ]  # fmt: skip
    found = prefix["against"]["accuracy"]
    assert found["estimate"] == pytest.approx(np.mean(right[0]) - np.mean(right[1]))
    # The same problems are hard for both, so that the interval is a fifth of an unpaired one.
    assert found["verdict"] == "not inferior" and found["high"] - found["low"] < 0.03


def test_gains_are_compared_where_they_are(tmp_path):
    """By prompt, over rows; the margin is 5 % of the reference's gain."""
    rng = np.random.default_rng(0)
    prompt = np.repeat(np.arange(50), rng.integers(5, 20, 50))
    base = rng.normal(1.0, 1.0, len(prompt))
    paths = {arm: [tmp_path / f"{arm}-{seed}" for seed in range(2)] for arm in ("a", "b")}
    for arm, add in (("a", -0.02), ("b", 0.0)):
        for path in paths[arm]:
            path.mkdir()
            table = pa.table({"prompt": prompt, "gain": base + add})
            pq.write_table(table, path / "gain.parquet")
    found = selectors.against(paths["a"], paths["b"], 0.02)
    assert "accuracy" not in found
    gain = found["gain"]
    assert [gain[name] for name in ("estimate", "low", "high")] == pytest.approx([-0.02] * 3)
    assert gain["margin"] == pytest.approx(0.05 * base.mean())
    assert gain["verdict"] == "not inferior"


def test_the_paired_interval_has_the_width_of_its_variances():
    """d = seed effect + problem effect + noise: var(mean) = σ_s²/S + σ_q²/Q + σ²/SQ."""
    rng = np.random.default_rng(1)
    seeds, problems = 40, 400
    of_seed, of_problem = rng.normal(0, 0.3, (seeds, 1)), rng.normal(0, 1.0, (1, problems))
    reference = rng.normal(0, 5.0, (1, problems)) + np.zeros((seeds, problems))
    values = reference + 0.25 + of_seed + of_problem + rng.normal(0, 1.0, (seeds, problems))
    estimate, low, high = paired.difference(values, reference)
    assert estimate == pytest.approx((values - reference).mean())
    error = np.sqrt(of_seed.var() / seeds + of_problem.var() / problems + 1.0 / (seeds * problems))
    assert (high - low) / (2 * 1.96 * error) == pytest.approx(1, abs=0.12)
    assert paired.difference(values, reference) == (estimate, low, high)


@pytest.mark.parametrize(
    ("low", "high", "wanted"),
    [(-0.01, 0.03, "not inferior"), (-0.05, -0.03, "inferior"), (-0.05, 0.01, "open")],
)
def test_a_verdict_needs_the_whole_interval_on_one_side(low, high, wanted):
    assert paired.verdict(low, high, 0.02) == wanted


def test_other_problems_are_not_compared():
    with pytest.raises(ValueError, match="both arms need the same"):
        paired.difference(np.zeros((2, 5)), np.zeros((2, 6)))
