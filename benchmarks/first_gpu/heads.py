"""Scoring and loss at the widths of Qwen3-4B and Qwen3-14B, next to other projects' losses."""

from __future__ import annotations

import json
import os
from pathlib import Path
from statistics import median
from types import SimpleNamespace

import torch

from benchmarks.first_gpu.result import Result, Setting
from benchmarks.first_gpu.runs import precision
from benchmarks.vocab_parallel.measure import measure_on_rank
from benchmarks.vocab_parallel.problem import Setup
from benchmarks.vocab_parallel.results import Results
from megatron_taopd.config.schema import TrainSection
from megatron_taopd.parallel.vocab import rows_within

VOCABULARY, STUDENT, TEACHER, ROWS = 151_936, 2560, 5120, 8192
GOAL = 0.7  # of the best rate of a head's matrix products


def against_peers(setting: Setting) -> Result:
    """Time scoring and loss as a share of the matrix products' best rate, and peers in turn."""
    result = Result()
    os.environ.update(KINETO_LOG_LEVEL="99", TRL_EXPERIMENTAL_SILENCE="1")
    results = Results(measure(setting))
    kinds = [way for way in results.measured["ways"] if way["what"] in ("scores", "loss")]
    for way in kinds:
        name = f"{way['what']}, {way['name']}" + (f", ρ = {way['ratio']:g}" * (way["ratio"] < 1))
        if way["skipped"]:
            result.figures[name] = way["skipped"]
            continue
        spent = median(way["seconds"])
        result.figures[f"{name}, ms"] = 1e3 * spent
        result.figures[f"{name}, MB"] = way["temporaries"] / 1e6
        if way["name"] == "ours":
            for what, error in way.get("error", {}).items():
                result.most(f"{way['what']}, {what}: relative error", error, limit_of(what))
    result.figures["best matrix product, TFLOP/s"] = results.best_matmul_flops() / 1e12
    for what in ("scores", "loss"):
        share = results.matmul_fraction(what)
        if setting.small:
            result.figures[f"{what}: share of the matrix products' best rate"] = share
        else:
            result.least(f"{what}: share of the matrix products' best rate", share, GOAL, goal=True)
    if not setting.small:
        try:
            fastest = results.fastest_peer()
        except ValueError:
            result.notes.append("No other way to the loss is installed and fits this device.")
        else:
            ratio = results.seconds("loss", "ours") / fastest
            result.most("loss: time ÷ the fastest other way's", ratio, 1.2, goal=True)
    return result


def measure(setting: Setting) -> dict:
    """Run `benchmarks.vocab_parallel` in this process."""
    asked = SimpleNamespace(
        vocab=512 if setting.small else VOCABULARY,
        ratio=[0.1], k=16, chunk_rows=8 if setting.small else chunk_rows(),
        dtype=precision(), device="cuda" if torch.cuda.is_available() else "cpu",
        repeats=1 if setting.small else 3, threads=1 if setting.small else (os.cpu_count() or 1),
        memory_limit=None, only=["scores", "loss"],
    )  # fmt: skip
    sizes = (32, 48, 32) if setting.small else (STUDENT, TEACHER, ROWS)
    measure_on_rank(0, Setup.of(asked, *sizes, 1), setting.scratch)
    return json.loads((Path(setting.scratch) / "result.json").read_text())


def chunk_rows() -> int:
    """Return the rows whose logits a run has at a time, unless it is told otherwise."""
    return rows_within(TrainSection().head_memory_mib << 20, VOCABULARY)


def limit_of(what: str) -> float:
    """Return what an error may be: of D, C and H relative, of gradients of the largest entry."""
    if precision() == "fp32":
        return 1e-4
    return 2**-7 if what.startswith("∂") else 1e-3
