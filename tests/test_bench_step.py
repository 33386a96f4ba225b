"""The benchmark of one step, end to end on a few prompts. Nothing here is timed."""

from __future__ import annotations

import json
import runpy
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

from benchmarks.step.results import against_full, extrapolated_arms

pytestmark = pytest.mark.slow

TOOL = Path(__file__).parents[1] / "tools" / "bench_step.py"
PROMPTS = 6


@pytest.fixture(scope="module")
def measured(tmp_path_factory) -> tuple[dict, str]:
    """The figures, and what was printed."""
    path = tmp_path_factory.mktemp("bench") / "figures.json"
    arguments = ["--prompts", str(PROMPTS), "--horizon", "8", "--json", str(path)]
    once = ["--repeats", "1", "--threads", "1"]
    command = [sys.executable, str(TOOL), "--pair", "tiny", *once, *arguments]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return json.loads(path.read_text()), done.stdout


def arm(figures: dict, name: str, recompute: str = "full") -> dict:
    return next(a for a in figures["arms"] if (a["name"], a["recompute"]) == (name, recompute))


def test_all_ways_have_the_same_gradient(measured):
    figures, _ = measured
    assert len(figures["agreement"]) == 2
    assert max(figures["agreement"].values()) < 1e-5


def test_arms_keep_and_train_what_they_should(measured):
    figures, _ = measured
    rows, tokens = figures["setup"]["rows"], figures["setup"]["tokens"]
    full = arm(figures, "full OPD")
    assert (full["kept_rows"], full["tokens_trained"]) == (rows, tokens)
    assert full["mass_retained"] == pytest.approx(1)
    replay = arm(figures, "TA-OPD 10 %, replay")
    assert replay["kept_rows"] == -(-rows // 10)
    assert replay["tokens_trained"] <= tokens
    assert replay["flops/of_full_opd"] < 1
    concentrated = arm(figures, "TA-OPD 10 %, replay, c 0.4")
    assert concentrated["kept_rows"] == replay["kept_rows"]
    assert concentrated["tokens_trained"] <= replay["tokens_trained"]


def test_every_phase_is_timed(measured):
    figures, _ = measured
    for row in figures["arms"]:
        phases = {"teacher", "training"} | ({"scoring"} if row["name"] != "full OPD" else set())
        assert set(row["seconds"]) == phases
        assert row["training_temporaries"] > 0
    assert [row["name"] for row in figures["horizon"]] == ["none", "auto", "8"]


def test_kept_rows_need_less_memory_in_the_heads(measured):
    all_rows, kept = measured[0]["heads"]
    assert kept["chunked"] < 0.15 * all_rows["unchunked"]


@pytest.mark.skipif(find_spec("trl") is None, reason="TRL is not installed")
def test_trl_does_the_same_step(measured):
    """Its loss on the rollouts is ours, so what is compared is the same work."""
    figures, _ = measured
    for row in figures["trl"]:
        assert row["loss"] == pytest.approx(figures["full_opd_loss"], rel=1e-4)


def test_tables_and_targets_are_printed(measured):
    _, printed = measured
    for text in ("TA-OPD 10 %, two_pass", "concentrate, at 10 %", "targets", "≤ 0.15"):
        assert text in printed


@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::DeprecationWarning")  # Megatron's
def test_extrapolation_adds_up():
    """Layers that cost their operations, 0.86 of the tokens trained: the sums made by hand."""
    costs = {"teacher": 26.4, "forward": 7.3, "backward": 14.6, "score": 2.34, "loss": 3.9}
    rows = extrapolated_arms(costs, cut=0.86, rows_per_token=1.0)
    ratios = {(row["name"], row["recompute"]): against_full(rows, row)["÷ same"] for row in rows}
    assert ratios["full OPD", "none"] == 1
    assert ratios["TA-OPD 10 %, two_pass", "full"] == pytest.approx(1.03, abs=0.01)
    assert ratios["TA-OPD 10 %, replay", "full"] == pytest.approx(0.93, abs=0.01)


def test_a_slice_needs_a_cut(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", [str(TOOL), "--pair", "slice"])
    with pytest.raises(SystemExit):
        runpy.run_path(str(TOOL), run_name="__main__")
    assert "--cut" in capsys.readouterr().err
