"""A call in a process of its own, whose crash or hang is no more than a line of what it left.

Imports nothing that takes long, and nothing that looks for a GPU: a process that is started here
says first which packages it does without.
"""

from __future__ import annotations

import faulthandler
import importlib
import multiprocessing
import os
import signal
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import psutil

# What a server of forks imports once. With CUDA no process is forked: the driver would not start in
# a child of a process that has asked for it, as some packages do when they are imported.
PRELOADED = (
    "benchmarks.first_gpu.steps",
    "benchmarks.first_gpu.heads",
    "benchmarks.first_gpu.memory",
    "megatron_taopd.preflight.agreement",
)
LAST_LINES = 30
STACKS_S = 5.0  # for writing them


@dataclass(frozen=True)
class Outcome:
    """What a call came to.

    Attributes:
        value: what it returned.
        trouble: why there is no value.
    """

    value: Any
    trouble: str | None
    seconds: float


def call(
    target: str,
    arguments: Sequence[Any],
    log: str | Path,
    limit_s: float,
    start: str,
    without: Sequence[str] = (),
) -> Outcome:
    """Call `module:function` in a new process, and end that, and all that it started, afterwards.

    Args:
        arguments, and the value that is returned: can be pickled.
        log: file that the output is appended to; the stacks, too, of a crash and at the limit.
        limit_s: seconds after which the process is killed.
        start: `spawn`, or `forkserver`.
        without: packages that the process does not find.
    """
    context = multiprocessing.get_context(start)
    if start == "forkserver":
        context.set_forkserver_preload([*PRELOADED])
    began = time.monotonic()
    end, other = context.Pipe(duplex=False)
    process = context.Process(
        target=_work, args=(other, str(log), tuple(without), target, tuple(arguments))
    )
    process.start()
    handle = psutil.Process(process.pid)  # knows its process from a later one of that number
    other.close()  # so that its end is seen when the process has none any more
    value, trouble = None, None
    started: list[psutil.Process] = []
    try:
        if end.poll(limit_s):
            value = end.recv()
        else:
            trouble = f"not done after {limit_s:.0f} s"
            started = handle.children(recursive=True)
            handle.send_signal(signal.SIGABRT)  # at which it writes where it is
            process.join(STACKS_S)
    except EOFError:
        process.join()
        trouble = _cause(process.exitcode, Path(log))
    finally:
        _end(handle, started)
        process.join()
        end.close()
    return Outcome(value, trouble, time.monotonic() - began)


def _work(
    answers: Connection,
    log: str,
    without: tuple[str, ...],
    target: str,
    arguments: tuple,
) -> None:
    out = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(out, 1)
    os.dup2(out, 2)
    sys.stdout = sys.stderr = open(log, "a", buffering=1)  # noqa: SIM115, it ends with the process
    faulthandler.enable()
    sys.modules.update(dict.fromkeys(without))  # importing them raises, `find_spec` says None
    module, function = target.split(":")
    answers.send(getattr(importlib.import_module(module), function)(*arguments))


def _end(process: psutil.Process, started: list[psutil.Process]) -> None:
    """Kill a process, its descendants, and others that it is known to have started."""
    with suppress(psutil.NoSuchProcess):
        started = [*started, *process.children(recursive=True)]  # its own while it lives
    for each in (*started, process):
        with suppress(psutil.NoSuchProcess):
            each.kill()


def _cause(exit_code: int | None, log: Path) -> str:
    """Say what ended a process: a signal, or the last line of what it wrote."""
    if exit_code is not None and exit_code < 0:
        return f"ended by {signal.Signals(-exit_code).name}"
    lines = [line.strip() for line in tail(log).splitlines() if line.strip()]
    return lines[-1] if lines else f"ended with status {exit_code}"


def tail(log: Path, lines: int = LAST_LINES) -> str:
    """Return the last lines of a file; of none, nothing."""
    if not log.exists():
        return ""
    return "\n".join(log.read_text(errors="replace").splitlines()[-lines:])
