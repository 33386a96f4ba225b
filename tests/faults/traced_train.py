"""`megatron_taopd.train`, whose ranks tell in which phase they are: the newest one, in a file each.

    TAOPD_TRACE=DIR torchrun --nproc-per-node 2 tests/faults/traced_train.py CONFIG.yaml …

For scripts that want to hit a certain phase (kill_anywhere.py). `build` is everything before the
first step.
"""

from __future__ import annotations

import os
import sys
from contextlib import contextmanager
from pathlib import Path

WIDTH = 64  # bytes of the line in a rank's file


def trace() -> None:
    """Let every span write its name and a counter when it begins."""
    from megatron_taopd.monitoring.monitor import Monitor

    path = Path(os.environ["TAOPD_TRACE"]) / f"rank_{os.environ['RANK']}"
    file = os.open(path, os.O_WRONLY | os.O_CREAT)
    span = Monitor.span
    entered = 0

    def tell(phase: str) -> None:
        os.pwrite(file, f"{entered} {phase}".ljust(WIDTH).encode(), 0)

    @contextmanager
    def traced(self, phase: str):
        nonlocal entered
        entered += 1
        tell(phase)
        with span(self, phase):
            yield

    Monitor.span = traced
    tell("build")


if __name__ == "__main__":
    trace()
    from megatron_taopd.train import main

    sys.exit(main(sys.argv[1:]))
