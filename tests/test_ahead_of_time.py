"""The Triton kernels as CUDA gets them: compiled for an H100, which takes no GPU."""

from __future__ import annotations

import json
import os
import sys
from itertools import product

import pytest
from support.patience import run

from benchmarks.vocab_parallel.roofline import Problem, milliseconds

pytest.importorskip("triton")
KINDS = ("reverse_kl", "forward_kl", "jsd", "skewed_reverse_kl")
WITHIN = {"jsd": "mixture_sums", "skewed_reverse_kl": "mixture_sums"}


@pytest.fixture(scope="module")
def compiled(tmp_path_factory):
    """In a process of its own: this one interprets kernels."""
    path = tmp_path_factory.mktemp("compiled") / "kernels.json"
    module = [sys.executable, "-W", "ignore", "-m", "benchmarks.vocab_parallel.ahead_of_time"]
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment["TRITON_CACHE_DIR"] = str(path.parent / "cache")
    done = run([*module, "--json", path], seconds=300, env=environment)
    assert done.returncode == 0, done.stderr
    return json.loads(path.read_text())


@pytest.mark.slow
def test_every_kernel_compiles_in_every_variant_and_keeps_its_registers(compiled):
    expected = set(product(("entropy_sums", "log_normalizer"), ("aligned", "odd")))
    for kind, where in product(KINDS, ("aligned", "odd")):
        expected.add((WITHIN.get(kind, "kl_within"), f"{kind}, {where}"))
        for dtype in ("bfloat16", "float32"):
            expected.add(("logits_gradient", f"{kind}, {dtype}, {where}"))
    assert {(each["kernel"], each["variant"]) for each in compiled} == expected
    assert len(compiled) == len(expected) == 28
    for each in compiled:
        assert each["spills"] == each["stack"] == 0, each
        assert each["occupancy"] >= 0.25, each


@pytest.mark.slow
def test_aligned_rows_are_loaded_by_16_bytes_and_odd_ones_never(compiled):
    """Four loads of 16 bytes are a thread's 16 columns of a step of 4,096."""
    for each in compiled:
        models = 1 if each["kernel"] in ("entropy_sums", "log_normalizer") else 2
        aligned = each["variant"].endswith("aligned")
        assert each["loads_128"] == 4 * models * aligned, each
        of_the_row = 7  # numbers at most that a row comes with, one by one
        assert each["loads_narrow"] <= of_the_row + (0 if aligned else 16 * models), each


def test_the_roofline_is_that_of_its_bytes_and_operations():
    """8,192 rows of 2,560 ← 5,120 at V = 151,936: 43 ms at 740 TFLOP/s, and the logits around."""
    problem = Problem(8192, 151_936, 2560, 5120)
    products, around = milliseconds(problem, "loss")
    one = 8192 * 151_936  # of a logit for each row and column
    assert products == pytest.approx(2 * one * (2560 + 5120 + 2 * 2560) / 740e9)
    assert round(products) == 43
    # Written and read by normalizers, by the divergence and by its gradient, which is written in
    # bf16 and read by two products.
    logits, gradients = 4 * (2 + 2 + 2 + 2) * one, 2 * (1 + 2) * one
    assert sum(around.values()) == pytest.approx((logits + gradients) / 3350e6)
    products, around = milliseconds(problem, "scoring")
    assert products == pytest.approx(2 * one * (2560 + 5120) / 740e9)
    assert sum(around.values()) == pytest.approx(4 * (2 + 2) * one / 3350e6)
