"""A step under torch's profiler, and how long the device has nothing to do in it."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch
from torch.profiler import record_function

from benchmarks.first_gpu.result import Result, Setting
from benchmarks.first_gpu.runs import step_of
from benchmarks.step.step import Step
from megatron_taopd.config.schema import ProfileSection
from megatron_taopd.monitoring.profiling import StepProfiler
from megatron_taopd.parallel import platform

ON_DEVICE = ("kernel", "gpu_memcpy", "gpu_memset")  # categories of a trace's events
SPAN = "user_annotation"
PHASES = ("step", "teacher", "scoring", "selection", "training")
WARM_UP = 3  # steps

Interval = tuple[float, float]


def profiled(setting: Setting) -> Result:
    """Profile a warm step on rollouts that are given: both trunks, heads, the optimizer."""
    result = Result()
    section = ProfileSection(steps=(WARM_UP,), kind="torch")
    with step_of(setting, "fp32" if setting.small else "bf16") as step:
        profiler = StepProfiler(section, Path(setting.log).parent, 0)
        for number in range(1, WARM_UP + 1):
            with profiler.step(number), span("step"):
                take(step, number)
    trace = profiler.directory / f"step_{WARM_UP}_rank_0.json"
    events = json.loads(trace.read_text())["traceEvents"]
    result.notes.append(f"The trace is {trace.name} in {trace.parent.name}/, next to this page.")
    shares = idle_shares(events, PHASES)
    missing = [phase for phase in PHASES if phase not in shares]
    result.most("phases that the trace does not name", len(missing), 0)
    busy = any(event.get("cat") in ON_DEVICE for event in events)
    for phase, (length, share) in shares.items():
        result.figures[f"{phase}, ms"] = 1e3 * length
        if not busy:
            continue
        name = f"{phase}: idle share of the device"
        if phase in ("teacher", "scoring", "training") and not setting.small:
            result.most(name, share, 0.1, goal=True)
        else:
            result.figures[name] = share
    if torch.cuda.is_available():
        result.least("the device is in the trace", busy, 1)
    return result


def take(step: Step, number: int) -> None:
    """Teach the student one batch, with a span for each phase, whose end waits for the device."""
    with span("teacher"):
        parts = step.distiller.read(step.batch)
    step.distiller.learn(step.batch, parts, number, span)


@contextmanager
def span(name: str) -> Iterator[None]:
    """Name a block in the trace, as the spans of a run are, and wait until the device is done."""
    with record_function(name):
        yield
        platform.synchronize()


def idle_shares(events: Iterable[dict], phases: Sequence[str]) -> dict[str, tuple[float, float]]:
    """Return by phase its seconds, and the share of them in which no kernel and no copy runs.

    Args:
        events: of a trace, whose times are in microseconds. A phase has one or more spans.
    """
    spans: dict[str, list[Interval]] = {}
    running: list[Interval] = []
    for event in events:
        interval = (event.get("ts", 0.0), event.get("ts", 0.0) + event.get("dur", 0.0))
        if event.get("cat") == SPAN and event["name"] in phases:
            spans.setdefault(event["name"], []).append(interval)
        elif event.get("cat") in ON_DEVICE:
            running.append(interval)
    running = union(running)
    shares = {}
    for phase in filter(spans.__contains__, phases):
        length = sum(stop - start for start, stop in spans[phase])
        busy = sum(overlap(own, running) for own in spans[phase])
        shares[phase] = (1e-6 * length, 1 - busy / length)
    return shares


def union(intervals: Iterable[Interval]) -> list[Interval]:
    """Return intervals that cover the same and do not overlap, in order."""
    merged: list[Interval] = []
    for start, stop in sorted(intervals):
        if merged and start <= merged[-1][1]:
            merged[-1] = (merged[-1][0], max(merged[-1][1], stop))
        else:
            merged.append((start, stop))
    return merged


def overlap(own: Interval, others: Iterable[Interval]) -> float:
    """Return the length of what an interval has in common with disjoint others."""
    return sum(max(0.0, min(own[1], stop) - max(own[0], start)) for start, stop in others)
