"""The table over selectors and seeds, from finished runs, which are not repeated."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from support.commands import run_python

pytestmark = pytest.mark.slow

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
    config = f"run: {{seed: {seed}}}\nselection: {{selector: {selector}}}\n"
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


def test_kept_rows_are_a_mean_over_the_steps_taken_and_the_seeds(compared):
    (full, q3), shown = compared
    assert (full["kept_rows"], q3["kept_rows"]) == (122, 7.5)
    assert "kept" in shown and "kept: rows a step" in shown
    lines = {line.split()[0]: line.split() for line in shown.splitlines() if line.split()}
    assert lines["full"][1:] == ["50.0", "60.0", "55.0", "7.1", "20.0", "2.0", "122", "50%"]


def test_the_runs_are_drawn_over_one_another(compared):
    _, shown = compared
    page = Path(next(line for line in shown.splitlines() if line.startswith("page: "))[6:])
    html = page.read_text()
    assert "4 runs compared" in html and "Held-out accuracy by step" in html
    assert "<b>full</b> 2" in html and "<b>q3_high_dl</b> 2" in html


def test_what_else_a_row_has(compared):
    (full, _), _ = compared
    assert full["selector"] == "full" and full["before"] == 0.2 and full["after"] == [0.5, 0.6]
    assert (full["mean"], full["worst"]) == (0.55, 0.2) and full["grad_norm"] == 2
    assert full["tokens_trained"] == pytest.approx(0.5) and full["std"] == pytest.approx(0.0707107)
