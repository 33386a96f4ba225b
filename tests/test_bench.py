"""The benchmark of scoring and loss, end to end on a small vocabulary. Nothing here is timed."""

from __future__ import annotations

import json
import runpy
import subprocess
import sys
from importlib import metadata
from math import log
from pathlib import Path

import pytest
import torch

from benchmarks.vocab_parallel import peers
from benchmarks.vocab_parallel import ways as compared
from benchmarks.vocab_parallel.formulas import ON_TOPK, ON_TOPK_AND_REST, REVERSE_KL
from benchmarks.vocab_parallel.problem import Setup
from benchmarks.vocab_parallel.results import Results

pytestmark = pytest.mark.slow

TOOL = Path(__file__).parents[1] / "tools" / "bench_vocab_parallel.py"
SMALL = "--vocab 512 --hidden 32 --teacher-hidden 48 --rows 32 --chunk-rows 8 --repeats 1"
ON_ONE_RANK = {"TRL, full logits": "trl", "TRL, chunked": "trl", "Liger, chunked": "liger_kernel"}
ON_MEGATRON = {"ms-swift": "ms-swift", "verl": "verl"}
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
    for name, package in (ON_ONE_RANK | ON_MEGATRON).items():
        skipped = ways(figures)["loss", name, 1.0]["skipped"]
        if figures["setup"]["tp"] > 1 and name in ON_ONE_RANK:
            assert skipped == "for one rank"
        elif not installed(package):
            assert skipped == f"{package} is not installed"
        else:
            assert skipped is None


def installed(package: str) -> bool:
    try:
        return bool(metadata.version(package))
    except metadata.PackageNotFoundError:
        return False


def test_a_peer_that_does_not_import_says_what_it_lacks():
    absence = peers.Peer("pytest", ("pytest", "no_such_module.losses")).absence(None)
    assert absence == "pytest does not import: No module named 'no_such_module'"
    assert (
        peers.Peer("no-such-package", ("os",)).absence(None) == "no-such-package is not installed"
    )
    assert peers.Peer("pytest", ("pytest",)).absence(None) is None


def test_torch_compiles_what_is_said_to_be_compiled(measured, monkeypatch):
    """A way that is not compiled is not in the table, as in the environment of these tests."""
    figures, _ = measured
    tp = figures["setup"]["tp"]
    name = "full logits, compiled" if tp == 1 else "many collectives, compiled"
    way, setup = ways(figures)["loss", name, 1.0], Setup(**figures["setup"])
    assert way["skipped"] is None and way["computes"] == "reverse KL"
    monkeypatch.setenv("TORCHDYNAMO_DISABLE", "1")
    assert peers.COMPILER.absence(setup) == "TORCHDYNAMO_DISABLE is set"
    monkeypatch.delenv("TORCHDYNAMO_DISABLE")
    monkeypatch.setenv("CXX", "no-such-compiler")
    assert peers.COMPILER.absence(setup) == "no C++ compiler: no-such-compiler"


def test_formulas_of_peers_by_hand():
    """The two most probable ids of three."""
    student, teacher = (
        torch.tensor([[0.25, 0.5, 0.25]]).log(),
        torch.tensor([[0.5, 0.26, 0.24]]).log(),
    )
    reverse = 0.25 * log(0.25 / 0.5) + 0.5 * log(0.5 / 0.26) + 0.25 * log(0.25 / 0.24)
    on_two = 0.5 * log(0.5 / 0.25) + 0.26 * log(0.26 / 0.5)
    exact = {
        REVERSE_KL: reverse,
        ON_TOPK: on_two,
        ON_TOPK_AND_REST: on_two + 0.24 * log(0.24 / 0.25),
    }
    for formula, value in exact.items():
        assert float(formula.dense(student, teacher, 2)) == pytest.approx(value, abs=1e-6), formula


def test_the_fastest_peer_is_one_that_computes_the_same(measured):
    figures, _ = measured
    table = Results(figures)
    same = [
        way["name"]
        for way in figures["ways"]
        if way.get("computes") == "reverse KL" and "seconds" in way and "ours" not in way["name"]
    ]
    assert "full logits, gathered" in same and "verl" not in same
    assert table.fastest_peer() == min(table.seconds("loss", name) for name in same)


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
