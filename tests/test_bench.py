"""The benchmark of scoring and loss, end to end on a small vocabulary. Nothing here is timed."""

from __future__ import annotations

import json
import runpy
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

from benchmarks.vocab_parallel import ways as compared
from benchmarks.vocab_parallel.problem import Setup

pytestmark = pytest.mark.slow

TOOL = Path(__file__).parents[1] / "tools" / "bench_vocab_parallel.py"
SMALL = "--vocab 512 --hidden 32 --teacher-hidden 48 --rows 32 --chunk-rows 8 --repeats 1"
PEERS = {"TRL, full logits": "trl", "TRL, chunked": "trl", "Liger, chunked": "liger_kernel"}
CHUNKS = 4
K = 16


def run(*arguments: str) -> subprocess.CompletedProcess:
    command = [sys.executable, str(TOOL), *SMALL.split(), *arguments]
    return subprocess.run(command, capture_output=True, text=True)


@pytest.fixture(scope="module", params=[1, 2])
def measured(request, tmp_path_factory) -> tuple[dict, str]:
    """The figures of one rank and of two, and what was printed."""
    path = tmp_path_factory.mktemp("bench") / "figures.json"
    done = run("--tp", str(request.param), "--json", str(path))
    assert done.returncode == 0, done.stderr
    return json.loads(path.read_text())[0], done.stdout


def ways(figures: dict) -> dict[tuple, dict]:
    return {(way["what"], way["name"], way["ratio"]): way for way in figures["ways"]}


def test_every_way_agrees_with_float64(measured):
    figures, _ = measured
    errors = {key: way["error"] for key, way in ways(figures).items() if "error" in way}
    for key, error in errors.items():
        assert max(error.values()) < 1e-4, (key, error)
    assert {("scores", "ours", 1.0), ("loss", "ours", 1.0)} <= set(errors)
    if figures["setup"]["tp"] > 1:
        assert {what for what, name, _ in errors if name == "many collectives"} == {
            "scores",
            "loss",
        }


def test_peers_run_where_they_are_installed(measured):
    figures, _ = measured
    for name, package in PEERS.items():
        skipped = ways(figures)["loss", name, 1.0]["skipped"]
        if figures["setup"]["tp"] > 1:
            assert skipped == "for one rank"
        elif find_spec(package) is None:
            assert skipped == f"{package} is not installed"
        else:
            assert skipped is None


def test_collectives_and_their_bytes(measured):
    figures, _ = measured
    many, way = figures["setup"]["tp"] > 1, ways(figures)
    ours = way["scores", "ours", 1.0]
    assert ours["collectives"] == many * CHUNKS
    assert ours["sent_per_row"] <= many * (24 * K + 24)
    assert way["loss", "ours", 1.0]["collectives"] == many * CHUNKS
    if many:
        # The fp32 logits of both models; and a collective for every reduction.
        assert way["scores", "full logits, gathered", 1.0]["sent_per_row"] == 2 * 4 * 512 / 2
        assert way["scores", "many collectives", 1.0]["collectives"] == 12
        assert way["loss", "many collectives", 1.0]["collectives"] == 6


def test_tables_and_targets_are_printed(measured):
    _, printed = measured
    assert "512 × 32 and 48, 32 rows" in printed
    assert "loss at ρ = 10 %: time ÷ all rows" in printed


def test_what_does_not_fit_is_skipped(measured):
    figures, _ = measured
    # 170 kB of inputs, 16 kB the logits of a chunk, 66 kB those of all rows.
    setup = Setup(**figures["setup"] | {"memory_limit": 0.4e6, "only": ["scores"]})
    skipped = {way.name: way.reason_to_skip(setup) for way in compared.ways(setup)}
    assert skipped["ours"] is None
    assert skipped["full logits, gathered"].startswith("needs")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("--teacher-hidden 48 64", "go in pairs"),
        ("--tp 3", "a divisor of 8"),
        ("--device cuda --tp 2", "--tp 1"),
    ],
)
def test_what_cannot_be_measured_is_refused(arguments, message, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", [str(TOOL), *arguments.split()])
    with pytest.raises(SystemExit):
        runpy.run_path(str(TOOL), run_name="__main__")
    assert message in capsys.readouterr().err
