"""The script of the first GPU day: small on the CPU, its reasoning, its items as if on CUDA."""

from __future__ import annotations

import importlib
import json
import os
import signal
import sys
import time
from pathlib import Path
from unittest import mock

import pytest
import torch
from support.apart import Apart
from support.patience import known_patience, run
from test_pretend_cuda import pretending

from benchmarks.first_gpu import apart
from benchmarks.first_gpu.__main__ import NAMES, main, reason_to_skip
from benchmarks.first_gpu.items import ITEMS, Item
from benchmarks.first_gpu.page import Entry, as_json, number, page
from benchmarks.first_gpu.profile import idle_shares
from benchmarks.first_gpu.result import Result, Setting

ROOT = Path(__file__).parents[1]
TOOL = ROOT / "tools" / "first_gpu.py"
SERVED = ["colocated", "broadcast"]  # which start SGLang servers


# ------------------------------------------------------------------------------------ the script


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """What one call of it leaves, without servers: its output, the page, the figures."""
    out = tmp_path_factory.mktemp("first") / "out"
    command = [sys.executable, TOOL, "--skip", "colocated", "--out", out, "--minutes", "60"]
    done = run(command, seconds=400)
    assert done.returncode == 0, done.stdout + done.stderr
    figures = json.loads((out / "results.json").read_text())
    return done.stdout, (out / "page.md").read_text(), figures, out


@pytest.mark.slow
def test_every_item_runs_on_the_cpu(small):
    printed, text, figures, out = small
    outcomes = {item["name"]: item["outcome"] for item in figures["items"]}
    expected = {name: "passed" for name in NAMES if name not in SERVED}
    assert outcomes == expected | {"broadcast": "skipped"}
    assert figures["machine"]["torch"] == torch.__version__ and figures["small"]
    for item in figures["items"]:
        assert bool(item["checks"]) == (item["outcome"] == "passed")
        assert f"## {item['name']}\n" in text and item["name"] in printed
        assert (out / item["name"] / "output.log").exists() == (item["outcome"] == "passed")
    assert "nothing about a GPU" in text and "needs --gpus 2" in text
    assert list(outcomes) == [name for name in NAMES if name != "colocated"]


@pytest.mark.slow
def test_what_it_found_is_on_the_page(small):
    _, text, figures, out = small
    found = {item["name"]: item for item in figures["items"]}
    for item in figures["items"]:
        for check in item["checks"]:
            assert (
                f"| {check['what'].replace('|', chr(92) + '|')} | {number(check['measured'])} |"
                in text
            )
    # Of runs, not of the tool.
    losses = [
        float(x) for x in found["losses"]["figures"]["losses, two_pass, without TE"].split(", ")
    ]
    assert len(losses) == 3 and losses[-1] < 0.9 * losses[0]
    assert found["profile"]["figures"]["training, ms"] > 0
    trace = json.loads((out / "profile" / "step_3_rank_0.json").read_text())["traceEvents"]
    assert {"teacher", "scoring", "selection", "training"} <= {e.get("name") for e in trace}


def test_arguments(capsys):
    for arguments, message in {
        ("--gpus", "0"): "--gpus: 0; it has to be at least 1",
        ("--minutes", "0"): "--minutes: 0; it has to be more than 0",
        ("--json", "nowhere/x.json"): "--json: nowhere/x.json: there is no directory",
        ("--only", "kernel"): "invalid choice: 'kernel'",
    }.items():
        with pytest.raises(SystemExit) as ended:
            main([*arguments])
        assert ended.value.code == 2 and message in capsys.readouterr().err


# --------------------------------------------------------------------------- processes of its own


def give(value):
    return value, "hidden_package" in sys.modules and sys.modules["hidden_package"] is None


def raise_error():
    raise ValueError("the reason")


def crash():
    os.kill(os.getpid(), signal.SIGSEGV)


def hang(started):
    Path(started).write_text(str(os.getpid()))
    time.sleep(3600)


def called(tmp_path, function, *arguments, limit_s=300.0, without=()):
    target = f"test_first_gpu:{function.__name__}"
    log = tmp_path / "log"
    return apart.call(target, arguments, log, limit_s, "fork", without), log.read_text()


def test_what_a_process_does_stays_in_it(tmp_path):
    outcome, _ = called(tmp_path, give, [1, 2], without=("hidden_package",))
    assert outcome.value == ([1, 2], True) and outcome.trouble is None
    outcome, output = called(tmp_path, raise_error)
    assert outcome.trouble == "ValueError: the reason" and "Traceback" in output
    outcome, output = called(tmp_path, crash)
    assert outcome.trouble == "ended by SIGSEGV" and "in crash" in output
    outcome, output = called(tmp_path, hang, str(tmp_path / "started"), limit_s=known_patience(3))
    assert outcome.trouble.startswith("not done after") and "in hang" in output
    with pytest.raises(ProcessLookupError):
        os.kill(int((tmp_path / "started").read_text()), 0)


# -------------------------------------------------------------------------- the device's idle time


def event(category, name, start, stop):
    return {
        "cat": category,
        "name": name,
        "ph": "X",
        "ts": float(start),
        "dur": float(stop - start),
    }


def test_idle_is_what_no_kernel_and_no_copy_covers():
    """By microseconds, one after the other."""
    spans = [
        ("step", 0, 1000),
        ("teacher", 100, 300),
        ("training", 400, 500),
        ("training", 600, 800),
    ]
    device = [
        ("kernel", 90, 150), ("kernel", 120, 200),  # overlap
        ("gpu_memcpy", 290, 420), ("gpu_memset", 470, 480), ("kernel", 700, 900),
    ]  # fmt: skip
    events = [event("user_annotation", *span) for span in spans]
    events += [event(category, "a", start, stop) for category, start, stop in device]
    events += [
        event("cpu_op", "teacher", 0, 1000), event("gpu_user_annotation", "teacher", 0, 1000),
        {"ph": "M", "name": "process_name"},
    ]  # fmt: skip
    busy = {t for _, start, stop in device for t in range(start, stop)}
    expected = {}
    for phase in ("step", "teacher", "training"):
        of_phase = [t for name, start, stop in spans if name == phase for t in range(start, stop)]
        idle = [t for t in of_phase if t not in busy]
        expected[phase] = pytest.approx((1e-6 * len(of_phase), len(idle) / len(of_phase)))
    assert idle_shares(events, ("step", "teacher", "scoring", "training")) == expected


# --------------------------------------------------------------------------------------- the page


def made_up(name, *checks, **options):
    result = Result(**options)
    for kind, arguments in checks:
        getattr(result, kind)(*arguments)
    return Entry(Item(name, "", 1, f"What {name} proves."), result, 2.0)


def test_outcomes():
    """A goal that is missed is no failure; a nan meets nothing; what died has failed."""
    met, slow = ("most", ("a | b", 1.0, 1.0)), ("least", ("share", 0.5, 0.7, True))
    wrong, none = ("most", ("error", 0.25, 0.125)), ("least", ("nothing", float("nan"), 0.0))
    entries = [
        made_up("good", met), made_up("slow", met, slow), made_up("bad", met, slow, wrong),
        made_up("none", none), made_up("left", skipped="no time left"),
        Entry(ITEMS[0], Result(), 9.0, "ended by SIGSEGV", "Fatal Python error"),
    ]  # fmt: skip
    outcomes = [entry.outcome for entry in entries]
    assert outcomes == ["passed", "goal missed", "failed", "failed", "skipped", "failed"]
    text = page({"device": "cuda", "gpus": 1}, entries, False, 61.0)
    assert "1 passed, 1 goal missed, 3 failed, 1 skipped, in 61 s." in text
    assert "nothing about a GPU" not in text and "small" not in text
    for line in (
        "| [slow](#slow) | slow | 2 | share: 0.5 < 0.7 |",
        "| [bad](#bad) | **failed** | 2 | share: 0.5 < 0.7; error: 0.25 > 0.125 |",
        "| a \\| b | 1 | ≤ 1 | met |",
        "| share | 0.5 | ≥ 0.7 | goal missed |",
        "| error | 0.25 | ≤ 0.125 | **failed** |",
        "Skipped: no time left.",
        "Failed: ended by SIGSEGV.",
        "```text\nFatal Python error\n```",
    ):
        assert line in text, line
    found = as_json({"device": "cuda"}, entries, True, 61.0)
    assert [item["outcome"] for item in found["items"]] == outcomes
    assert found["items"][2]["checks"][2] == {
        "what": "error", "measured": 0.25, "limit": 0.125, "at_least": False, "goal": False,
        "met": False,
    }  # fmt: skip


def test_what_is_ended_leaves_its_page(tmp_path, monkeypatch):
    """Two items, the second of which is interrupted."""
    from benchmarks.first_gpu import __main__ as command

    started, figures = [], tmp_path / "figures.json"

    def call(target, arguments, log, limit_s, start, without=()):
        started.append((target, limit_s))
        if target.endswith("facts"):
            return apart.Outcome({"device": "cuda", "gpus": 1, "torch": "2"}, None, 1.0)
        if len(started) == 3:
            raise KeyboardInterrupt
        assert start == "spawn" and not arguments[0].small and Path(arguments[0].scratch).is_dir()
        return apart.Outcome(Result(notes=["A note."]), None, 1.0)

    monkeypatch.setattr(command.apart, "call", call)
    monkeypatch.setenv("PYTHONPATH", "")
    arguments = ["--out", str(tmp_path), "--json", str(figures), "--minutes", "1.5"]
    assert main([*arguments, "--only", "attention", "gradients"]) == 130
    items = json.loads(figures.read_text())["items"]
    assert [(item["name"], item["notes"]) for item in items] == [("gradients", ["A note."])]
    assert "A note." in (tmp_path / "page.md").read_text()
    assert started[1][0] == "benchmarks.first_gpu.steps:gradients" and 80 < started[1][1] <= 90


def test_reasons_to_skip():
    class Asked:
        gpus, minutes = 1, 10.0

    two, served = ITEMS[-1], next(item for item in ITEMS if item.name == "colocated")
    machine = {"device": "cuda", "gpus": 1, "sglang": "0.5.20"}
    assert reason_to_skip(ITEMS[0], Asked, machine, 100.0) is None
    assert reason_to_skip(ITEMS[0], Asked, machine, 1.0) == "no time left of 10 minutes"
    assert reason_to_skip(two, Asked, machine, 100.0) == "needs --gpus 2"
    Asked.gpus = 2
    assert reason_to_skip(two, Asked, machine, 100.0) == "needs 2 GPUs, there is 1"
    assert reason_to_skip(two, Asked, machine | {"gpus": 2}, 100.0) is None
    assert reason_to_skip(two, Asked, machine | {"device": "cpu"}, 100.0) is None
    missing = machine | {"sglang": "not installed"}
    assert reason_to_skip(served, Asked, missing, 100.0) == "sglang is not installed"


# -------------------------------------------------------------------------------- as if on CUDA


def item_on_cuda(target, directory):
    """Run an item small, where torch says that there is CUDA."""
    module, function = target.split(":")
    setting = Setting(True, str(directory), str(directory / "out" / "log"), "spawn")
    item = getattr(importlib.import_module(f"benchmarks.first_gpu.{module}"), function)
    result = item(setting)
    missed = [(check.what, check.measured, check.limit) for check in result.checks if not check.met]
    return result.outcome, missed, result.figures


@pytest.fixture(scope="module")
def on_cuda():
    with Apart() as apart:
        yield lambda function, *args: apart.run(1, pretending, function, *args)[0]


# Losses and resumption are runs of `test_pretend_cuda`; torch's profiler asks CUDA itself.
PRETENDED = ["gradients", "attention", "products", "kernels", "heads", "saves", "offload", "waits"]


@pytest.mark.slow
@pytest.mark.parametrize("name", PRETENDED)
def test_items_on_a_pretended_device(on_cuda, tmp_path, name):
    """What CUDA would refuse raises; in half precision they agree as they do in fp32."""
    [target] = [item.target for item in ITEMS if item.name == name]
    (outcome, missed, figures), _ = on_cuda(item_on_cuda, target, tmp_path)
    assert outcome == "passed", missed
    if name == "waits":  # in bf16, of which no phase is silent
        assert {figure.split(":")[0] for figure in figures} >= {"scoring", "training"}


# Mistakes: each calls a function of the product otherwise than it should be.


def of_other_tokens(pick, trunk, output, wanted, shared):
    return pick(trunk, output, wanted.roll(1), shared)


def steeper(init, attention, *arguments, **options):
    init(attention, *arguments, **options)
    attention.scale *= 1.05


def not_added(_add_product, total, *_):
    return total


def one_more(kl_within, *arguments):
    return kl_within(*arguments) + 1


def without_moments(go_on_from, student, state):
    go_on_from(student, state)
    for of_parameter in student.optimizer.chained_optimizers[0].optimizer.state.values():
        of_parameter["exp_avg"].zero_()


def doubled(take, host, tensors):
    copies, wait = take(host, tensors)
    return [2 * copy for copy in copies], wait


def with_a_look(forward, attention, query, *arguments, **options):
    query.sum().item()
    return forward(attention, query, *arguments, **options)


# By item: where the mistake is, and what has to be said of it.
MISTAKES = {
    "gradients": ("models.replay:_pick", of_other_tokens, "gradient, the kept rows"),
    "attention": ("models.attention:PackedAttention.__init__", steeper, "output"),
    "products": ("parallel.vocab.projection:_add_product", not_added, "∂weight"),
    "kernels": ("parallel.vocab.reductions:kl_within", one_more, "reverse_kl"),
    "heads": ("parallel.vocab.reductions:kl_within", one_more, "loss, loss"),
    "saves": ("checkpoints.optimizer:go_on_from", without_moments, "elements that differ"),
    "offload": ("parallel.copies:HostCopies.take", doubled, "numbers that differ"),
    "waits": ("models.attention:PackedAttention.forward", with_a_look, "synchronizing"),
}


def item_with_mistake(target, directory, place, mistake):
    """Run an item small with a mistake in the product; return what it misses, or raises."""
    module, name = place.split(":")
    owner = importlib.import_module(f"megatron_taopd.{module}")
    *classes, name = name.split(".")
    for each in classes:
        owner = getattr(owner, each)
    right = getattr(owner, name)

    def wrong(*arguments, **options):
        return mistake(right, *arguments, **options)

    with mock.patch.object(owner, name, wrong):
        try:
            outcome, missed, _ = item_on_cuda(target, directory)
        except RuntimeError as error:
            return "failed", [str(error)]
    return outcome, [check[0] for check in missed]


@pytest.mark.slow
@pytest.mark.parametrize("name", MISTAKES)
def test_items_find_mistakes(on_cuda, tmp_path, name):
    [target] = [item.target for item in ITEMS if item.name == name]
    place, mistake, check = MISTAKES[name]
    (outcome, missed), _ = on_cuda(item_with_mistake, target, tmp_path, place, mistake)
    assert outcome == "failed" and any(check in each for each in missed), missed


def wait_in_modes():
    """What waits, in each debug mode: what it raises, and what is counted."""
    from benchmarks.first_gpu.waits import Waits, sync_debug_mode

    x, waits, raised = torch.arange(3, device="cuda"), Waits(), []
    for mode in ("default", "warn", "error"):
        try:
            with waits.counted(), sync_debug_mode(mode):
                x + x
                x.tolist()
        except RuntimeError as error:
            raised.append((mode, str(error)))
    x.tolist()  # after it as before
    return raised, list(waits.counts.items())


@pytest.mark.slow
def test_waits_raise_or_are_counted(on_cuda):
    (raised, counts), _ = on_cuda(wait_in_modes)
    assert raised == [("error", "called a synchronizing CUDA operation")]
    assert [(phase, count) for (phase, _), count in counts] == [("step", 1)]
