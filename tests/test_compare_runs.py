"""Runs compared where all of them have got to, and what is missing of them."""

from __future__ import annotations

import csv
import json
import re
from pathlib import Path

import pytest
from support.commands import run_python
from support.patience import patience

pytestmark = pytest.mark.slow  # processes and a browser
TOOL = Path(__file__).parents[1] / "tools" / "compare_runs.py"


def make_run(root, selector, seed, steps, kept_rows, seconds, evaluated=True):
    """A run whose accuracy grows by a point a step; evaluated before the first and every second."""
    directory = root / f"{selector}-{seed}"
    directory.mkdir(parents=True)
    config = f"run: {{seed: {seed}}}\nselection: {{selector: {selector}}}\n"
    (directory / "config.yaml").write_text(config)
    records = [{"step": 0, "eval/accuracy": 0.1 + 0.02 * seed}]
    for step in range(1, steps + 1):
        record = {"step": step, "loss": 1 / step, "kept_rows": kept_rows, "time/step": seconds}
        if step % 2 == 0:
            record |= {"eval/accuracy": 0.1 + 0.02 * seed + 0.01 * step, "time/eval": 1000.0}
        records.append(record)
    if not evaluated:
        records = [{k: v for k, v in r.items() if k != "eval/accuracy"} for r in records]
    lines = "".join(json.dumps(record) + "\n" for record in records)
    (directory / "metrics.jsonl").write_text(lines + '{"step": 99, "lo')  # it goes on
    return directory


def compare(out, *arguments):
    return run_python("tools/compare_runs.py", *arguments, "--out", out)


@pytest.fixture(scope="module")
def compared(tmp_path_factory):
    """full keeps ten times the rows of teachability, whose steps take half the time."""
    root = tmp_path_factory.mktemp("runs")
    runs = [
        make_run(root, "full", 0, steps=10, kept_rows=1000, seconds=36.0),
        make_run(root, "full", 1, steps=10, kept_rows=1000, seconds=36.0),
        make_run(root, "teachability", 0, steps=20, kept_rows=100, seconds=18.0),
        make_run(root, "teachability", 2, steps=10, kept_rows=100, seconds=18.0, evaluated=False),
    ]
    done = compare(root / "out", *runs, "--json", root / "figures.json")
    assert done.returncode == 0, done.stderr
    return json.loads((root / "figures.json").read_text()), root, done.stdout


def test_equal_supervision_is_where_the_run_with_the_fewest_rows_ends(compared):
    figures, _, _ = compared
    at_rows = figures["kept_rows"]
    assert at_rows["at"] == 1000
    full, ours = at_rows["groups"]["full"], at_rows["groups"]["teachability"]
    assert full["seeds"] == [0, 1] and ours["seeds"] == [0, 2]
    # One step of full, whose last evaluation was before it, and ten of the other.
    assert full["accuracy"] == pytest.approx([0.10, 0.12])
    assert (full["steps"], ours["steps"]) == ([1, 1], [10, 10])
    assert full["loss"] == [1.0, 1.0]
    assert ours["accuracy"] == [pytest.approx(0.20), None]
    assert ours["loss"] == pytest.approx([1 / 10, 1 / 10])


def test_equal_time_counts_steps_and_no_evaluations(compared):
    at_hours = compared[0]["hours"]
    assert at_hours["at"] == pytest.approx(10 * 18 / 3600)
    assert at_hours["groups"]["full"]["accuracy"] == pytest.approx([0.14, 0.16])  # after 5 steps
    assert at_hours["groups"]["teachability"]["accuracy"][0] == pytest.approx(0.20)


def test_accuracies_of_different_things_are_told(tmp_path):
    runs = [make_run(tmp_path, "full", seed, 2, 10, 1.0) for seed in range(4)]
    alike = "rollout: {max_new_tokens: 64, top_p: 0.9}\neval: {temperature: 0.0, every: 5}\n"
    others = (
        alike,
        "rollout: {max_new_tokens: 32, top_p: 1.0}\neval: {temperature: 0, max_new_tokens: 64}\n",
        "rollout: {max_new_tokens: 64, top_p: 0.9}\neval: {temperature: 0.7}\n",
        alike.replace("every: 5", "prompts: other.jsonl"),
    )
    for run, text in zip(runs, others, strict=True):
        with (run / "config.yaml").open("a") as config:
            config.write(text)
    done = compare(tmp_path / "out", *runs[:2], "--no-plots")
    assert "unlike" not in done.stdout, "the same measure, otherwise written"
    done = compare(tmp_path / "out", *runs, "--no-plots")
    assert "unlike: eval.temperature: 0.0 and 0.7; their accuracies do not compare" in done.stdout
    assert "unlike: eval.prompts: None and 'other.jsonl'; their acc" in done.stdout
    done = compare(tmp_path / "out", *runs[::2], "--no-plots", "--by", "eval.temperature")
    assert "unlike: eval.temperature" not in done.stdout


def test_what_is_missing_is_said(compared):
    figures, root, printed = compared
    text = "\n".join(figures["missing"])
    assert f"{root}/teachability-2: never logged eval/accuracy" in text
    assert "full: no run with seed 2" in text and "teachability: no run with seed 1" in text
    assert f"{root}/full-0: 10 of 20 steps" in text
    for line in figures["missing"]:
        assert line in printed


def test_tables_and_plots(compared):
    _, root, _ = compared
    with open(root / "out" / "at_equal_kept_rows.csv") as file:
        rows = {row["selection.selector"]: row for row in csv.DictReader(file)}
    assert rows["full"]["accuracy in %"] == "11.0 ± 1.4"
    assert rows["teachability"]["accuracy in %"] == "20.0 (1 of 2)"
    assert "| full | 2 |" in (root / "out" / "at_equal_hours.md").read_text()
    assert (root / "out" / "curves.png").read_bytes().startswith(b"\x89PNG")


def test_one_page_has_curves_ends_and_differences(compared):
    _, root, printed = compared
    html = (root / "out" / "comparison.html").read_text()
    assert f"page: {root / 'out' / 'comparison.html'}" in printed
    assert "http:" not in html and "https:" not in html and "url(" not in html
    titles = re.findall(r"<h2>(.*?)</h2>", html)
    assert titles == [
        "Where they ended",
        *(
            f"{what} by {along}"
            for what in ("Held-out accuracy", "Loss")
            for along in ("step", "rows kept so far", "hours of steps so far")
        ),
        "At equal rows kept so far: 1,000",
        "At equal hours of steps so far: 0.05",
        "What their configurations differ in",
        "What to bear in mind",
    ]
    text = re.sub(r"\s+", " ", re.sub(r"<[^>]+>", " ", html))
    # 20 and 22 %: their mean, and 12.71 times its standard error, which is 1 %, to either side.
    assert "full 0, 1 10 11 % [0 %, 23.7 %] 21 % [8.3 %, 33.7 %] 0.1 [0.1, 0.1] 6 min" in text
    # The loss of step 10, and the mean of those of 19 and 20.
    assert "teachability 0, 2 10–20 10 % 30 % 0.0757 [-0.234, 0.385] 4.5 min" in text
    assert "selection.selector full full-0, full-1 teachability teachability-0" in text
    assert "teachability-2: never logged eval/accuracy" in text


def test_the_page_of_a_comparison_in_a_browser(compared, browser):
    _, root, _ = compared
    failures = []
    page = browser.new_page(viewport={"width": 390, "height": 900})
    page.set_default_timeout(1e3 * patience(60))
    page.on("pageerror", lambda error: failures.append(str(error)))
    page.goto((root / "out" / "comparison.html").as_uri())
    assert page.evaluate("document.documentElement.scrollWidth") <= 390
    chart = page.locator("figure", has_text="Held-out accuracy by step").locator(".plot")
    assert chart.locator("..").locator(".legend").inner_text().split() == ["full", "teachability"]
    chart.focus()
    page.keyboard.press("End")
    assert chart.locator(".tip").inner_text().split("\n") == ["step 20", "teachability 30 %"]
    assert failures == []
    page.close()


def test_a_mistake_is_told_in_one_line(tmp_path):
    run = make_run(tmp_path, "full", 0, steps=1, kept_rows=1, seconds=1.0)
    for arguments, line in {
        (tmp_path / "nowhere",): "nowhere/config.yaml: no such file",
        (run, "--by", "loss.kind"): "config.yaml: has no loss.kind",
    }.items():
        done = compare(tmp_path / "out", *arguments)
        assert done.returncode == 2
        assert done.stderr.startswith("error: ") and line in done.stderr
        assert done.stderr.count("\n") == 1
