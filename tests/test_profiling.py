"""`train.profile`: the files it writes, what is in them, and where it is refused."""

from __future__ import annotations

import json
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from support.observed import observe

from megatron_taopd.config.schema import ProfileSection
from megatron_taopd.monitoring import profiling
from megatron_taopd.monitoring.profiling import StepProfiler

SPANS = {"rollout", "teacher", "scoring", "selection", "training", "sync"}


def test_a_trace_has_the_spans_of_the_step_that_was_asked_for(tmp_path):
    """And of no other, on the rank that was asked for; each lies within its step."""
    profile = ["train.profile.steps=[2]", "train.profile.ranks=[1]"]
    seen, _ = observe([f"run.dir={tmp_path}", "train.steps=3", *profile], world_size=2)
    assert seen.status == 0, seen.printed
    (path,) = (tmp_path / "profile").iterdir()
    assert path.name == "step_2_rank_1.json"
    events = json.loads(path.read_text())["traceEvents"]
    spans = [e for e in events if e.get("cat") == "user_annotation" and e["name"] in SPANS]
    (step,) = [e for e in events if e.get("cat") == "user_annotation" and e["name"] == "step"]
    assert {span["name"] for span in spans} == SPANS
    for span in spans:
        assert step["ts"] <= span["ts"]
        assert span["ts"] + span["dur"] <= step["ts"] + step["dur"]
    training = next(span for span in spans if span["name"] == "training")
    assert any(  # what is in the spans is there, too
        e.get("name") == "aten::mm" and 0 <= e["ts"] - training["ts"] <= training["dur"]
        for e in events
    )


@pytest.mark.parametrize("kind", ["train.profile.kind=nsys", "train.profile.kind=memory"])
def test_profiles_of_cuda_are_refused_without_it(tmp_path, kind):
    """In a line, before anything is built; they ask for nothing while no step is profiled."""
    if torch.cuda.is_available():
        pytest.skip("there is CUDA")
    profile = ["train.profile.steps=[1]", kind]
    seen = observe([f"run.dir={tmp_path}", *profile])
    assert (seen.status, seen.records) == (2, [])
    name = kind.rpartition("=")[2]
    assert f"train.profile.kind: {name} needs CUDA, which this machine has not" in seen.printed
    assert observe([f"run.dir={tmp_path}/none", kind]).status == 0


def test_nsys_captures_the_steps_and_their_ranges(tmp_path, monkeypatch):
    calls = []
    runtime = SimpleNamespace(
        start=lambda: calls.append("start"), stop=lambda: calls.append("stop")
    )

    @contextmanager
    def profile():
        runtime.start()
        yield
        runtime.stop()

    @contextmanager
    def emit_nvtx():
        calls.append("ranges on")
        yield
        calls.append("ranges off")

    monkeypatch.setattr(torch.cuda.profiler, "profile", profile)
    monkeypatch.setattr(profiling, "emit_nvtx", emit_nvtx)
    profiler = StepProfiler(ProfileSection(steps=(2,), kind="nsys"), tmp_path / "profile", 0)
    for step in (1, 2, 3):
        with profiler.step(step):
            calls.append(step)
    assert calls == [1, "start", "ranges on", 2, "ranges off", "stop", 3]
    assert not (tmp_path / "profile").exists()


def test_memory_is_recorded_with_the_spans_and_written_at_the_end_of_the_step(
    tmp_path, monkeypatch
):
    calls = []

    def record(enabled="all", **options):
        calls.append((enabled, options.get("global_record_annotations")))

    def dump(path):
        calls.append("dump")
        Path(path).write_text("a snapshot")

    monkeypatch.setattr(torch.cuda.memory, "_record_memory_history", record)
    monkeypatch.setattr(torch.cuda.memory, "_dump_snapshot", dump)
    profiler = StepProfiler(ProfileSection((4,), "memory", ranks=(3,)), tmp_path / "profile", 3)
    for step in (3, 4):
        with profiler.step(step):
            calls.append(step)
    assert calls == [3, ("all", True), 4, "dump", (None, None)]
    assert (tmp_path / "profile" / "step_4_rank_3.pickle").read_text() == "a snapshot"
    assert len([*(tmp_path / "profile").iterdir()]) == 1


def test_a_step_that_fails_leaves_no_file_and_a_full_disk_ends_no_run(tmp_path, caplog):
    profiler = StepProfiler(ProfileSection((1, 2)), tmp_path / "profile", 0)
    with pytest.raises(KeyError), profiler.step(1):
        raise KeyError
    assert not (tmp_path / "profile").exists()
    (tmp_path / "profile").write_text("in the way")
    with profiler.step(2):
        torch.ones(3).sum()
    assert "train.profile: " in caplog.text and "step_2_rank_0.json" in caplog.text
