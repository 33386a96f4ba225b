"""Trainings that are interrupted, each in its phase, by Ctrl-C as a terminal sends it.

    python -m support.interrupted DIR

One process imports what a training takes and forks for each of them, which therefore has an exit
status, a session and an output of its own. A line of JSON for each says how it has ended.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from megatron_taopd import start, train
from megatron_taopd.checkpoints import saving
from megatron_taopd.data import prompts
from megatron_taopd.evaluation import in_loop
from megatron_taopd.serving import health

TINY = Path(__file__).parents[2] / "examples" / "tiny_pair.yaml"
OPTIONS = [
    *("student.parallel.tp=1", "teacher.parallel.pp=1", "rollout.prompts=4", "rollout.samples=1"),
    *("train.steps=3", "checkpoint.every=1", "eval.every=0", "eval.limit=4", "eval.grader=exact"),
    *("log.tensorboard=false", "rollout.max_new_tokens=8", "data.limit=64"),
]
SERVED = [
    *("rollout.engine=sglang", "rollout.servers.urls=[http://127.0.0.1:9]"),
    "rollout.servers.start_timeout_s=60",
]
# (name, what is interrupted, presses, further options); all but the served ones share a run.dir
PHASES: list[tuple[str, Any, str, int, list[str]]] = [
    ("tokenising", prompts.Rows, "__iter__", 1, []),
    ("tokenising", prompts.Rows, "__iter__", 2, []),
    ("waiting", health.logger, "info", 1, SERVED),
    ("waiting", health.logger, "info", 2, SERVED),
    ("evaluating", in_loop, "extract_answer", 1, []),
    ("evaluating", in_loop, "extract_answer", 2, []),
    ("saving", saving, "complete", 1, []),
    ("saving", saving, "complete", 2, []),
    ("nothing", None, "", 0, []),
]


def press(times: int) -> None:
    """Send SIGINT to this process and its children, as a terminal does."""
    for _ in range(times):
        os.killpg(0, signal.SIGINT)
        time.sleep(0.2)


def interrupt(owner: Any, name: str, times: int) -> None:
    """Press when the function is called for the first time, which then goes on."""
    original, pressed = getattr(owner, name), []

    def call(*arguments: Any, **options: Any) -> Any:
        if not pressed:
            pressed.append(1)
            press(times)
        return original(*arguments, **options)

    setattr(owner, name, call)


def compare_expressions() -> int:
    """Press while Math-Verify compares, in a process of its own, what is equal each time."""
    signal.signal(signal.SIGINT, lambda *_: None)
    interrupt(in_loop.watchdog, "heartbeat", 1)
    return 0 if in_loop._equal([("1/2", "0.5")] * 3) == [True] * 3 else 1


def apart(work: Callable[[], int], output: Path) -> tuple[int, str]:
    """Do the work in a fork of this process; return its exit status and what it has printed."""
    if child := os.fork():
        return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), output.read_text()
    os.setsid()
    file = os.open(output, os.O_CREAT | os.O_WRONLY | os.O_TRUNC)
    os.dup2(file, 1)
    os.dup2(file, 2)
    try:
        status = work()
    except BaseException:
        sys.excepthook(*sys.exc_info())
        status = 1
    sys.stdout.flush()
    os._exit(status)


def main(directory: Path, only: Sequence[str] = ()) -> None:
    """Interrupt a training in every phase, and say how each has ended."""
    for name, owner, function, times, options in PHASES:
        if only and name not in only:
            continue
        run_dir = directory / ("served" if options else "run")
        overrides = [f"run.dir={run_dir}", f"data.cache_dir={directory}/cache", *OPTIONS, *options]

        def work(owner=owner, function=function, times=times, overrides=overrides) -> int:
            if times:
                interrupt(owner, function, times)
            return train.main([str(TINY), *overrides])

        status, output = apart(work, directory / f"{name}{times}.txt")
        steps = sorted(path.name for path in (run_dir / "checkpoints").glob("step_*"))
        line = {"phase": name, "times": times, "status": status, "output": output, "steps": steps}
        print(json.dumps(line), flush=True)
    status, output = apart(compare_expressions, directory / "comparing.txt")
    line = {"phase": "comparing", "times": 1, "status": status, "output": output, "steps": []}
    print(json.dumps(line))


if __name__ == "__main__":
    assert start  # imported once, for all
    main(Path(sys.argv[1]), sys.argv[2:])
