"""Waits for events; a time-out is for what hangs, and grows with the slowness of the machine.

    wait_for(lambda: path.exists(), seconds=30)          # the condition's value
    done = run([sys.executable, "tool.py"], seconds=60)  # a CompletedProcess
    output = finish(process, seconds=60)                 # of a Popen
    Replicas([url], model, Limits(timeout_s=patience(10)))  # where others keep the time

Seconds are those of a quiet machine, ten times what is usual there or more. When they are over, a
process is started, and what that takes tells how many seconds they are on this machine as it is
now: if it is busy, waiting goes on. So a busy machine makes a test slow and never red, and what
hangs still ends.
"""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from typing import Any

import psutil

WORK = "sum(range(20_000_000))"
PROCESS_S = 0.4  # what a quiet machine takes to start Python and do it
_slowness = 1.0  # the most that was seen since this process began
_measured = float("-inf")  # when a process was started last to see


def took(seconds: float, quiet: float) -> float:
    """Note what a start has taken, and what it takes on a quiet machine; the slowness since."""
    global _slowness
    _slowness = max(_slowness, seconds / quiet)
    return _slowness


def measure() -> float:
    """Start a process now; the slowness of this machine, at least 1."""
    global _measured
    began = time.monotonic()
    subprocess.run([sys.executable, "-c", WORK], check=True)
    _measured = time.monotonic()
    return took(_measured - began, PROCESS_S)


def patience(seconds: float) -> float:
    """So many seconds of a quiet machine on this one, as it was within the last minute: for
    time-outs that others keep."""
    if time.monotonic() - _measured > 60:
        measure()
    return known_patience(seconds)


def known_patience(seconds: float) -> float:
    """The same without a new measurement."""
    return seconds * _slowness


class Deadline:
    """So many seconds of a quiet machine from now on."""

    def __init__(self, seconds: float):
        self.seconds, self.began = seconds, time.monotonic()
        self.end = self.began + known_patience(seconds)

    def left(self) -> float:
        """Seconds of this machine; 0 when it is over, which is not believed without a look."""
        if time.monotonic() >= self.end:
            self.end = self.began + self.seconds * measure()
        return max(0.0, self.end - time.monotonic())


def wait_for(condition: Callable[[], Any], seconds: float = 60, what: str = "") -> Any:
    """Return the condition's value as soon as it is true."""
    deadline = Deadline(seconds)
    while not (value := condition()):
        assert deadline.left(), what or "what was waited for has not happened"
        time.sleep(0.05)
    return value


def finish(process: subprocess.Popen, seconds: float = 60) -> str:
    """The output of a process that has ended; it and its descendants are killed if they hang."""
    return _finish(process, seconds)[0]


def run(command: list, seconds: float = 60, **options) -> subprocess.CompletedProcess:
    """`subprocess.run` with its output as text."""
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    process = subprocess.Popen([*map(str, command)], text=True, **pipes, **options)
    output = _finish(process, seconds)
    return subprocess.CompletedProcess(command, process.returncode, *output)


def _finish(process: subprocess.Popen, seconds: float) -> tuple[str, str]:
    deadline = Deadline(seconds)
    try:
        while True:
            try:
                return process.communicate(timeout=max(0.1, deadline.left()))
            except subprocess.TimeoutExpired:
                if not deadline.left():
                    raise
    except BaseException:
        kill_family(process.pid)
        process.communicate()
        raise


def kill_family(pid: int) -> None:
    """SIGKILL for a process and all its descendants, whatever sessions they are in."""
    family = []
    with suppress(psutil.NoSuchProcess):
        family = [psutil.Process(pid), *psutil.Process(pid).children(recursive=True)]
    for member in family:
        with suppress(psutil.NoSuchProcess):
            member.kill()
    psutil.wait_procs(family[1:])  # the first is its parent's to wait for
