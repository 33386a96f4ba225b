"""A real step on real ranks: CPU and wall seconds by phase.

On a machine with fewer cores than ranks wall time says nothing; a rank's CPU seconds are the work
it did, its busy waiting for the others included.
"""

from __future__ import annotations

import tempfile
import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
import torch.distributed as dist

from benchmarks.scaling.fake import make_setup
from benchmarks.scaling.step import Step
from megatron_taopd.parallel import platform

PHASES = ("teacher", "exchange", "scoring", "selection", "training", "optimizer", "sync")


def measure_ranks(tp: int, sequences: int, steps: int) -> dict | None:
    """Means over steps, the most of any rank; None but on rank 0."""
    joined = platform.initialize()
    torch.set_num_threads(1)
    cpu: dict[str, float] = defaultdict(float)
    wall: dict[str, float] = defaultdict(float)

    @contextmanager
    def phase(name: str) -> Iterator[None]:
        started = time.process_time(), time.perf_counter()
        yield
        cpu[name] += time.process_time() - started[0]
        wall[name] += time.perf_counter() - started[1]

    world_size = dist.get_world_size()
    case = dict(
        student=dict(tp=tp, pp=1), teacher=dict(tp=tp, pp=1), sequences=sequences,
        prompt=32, response=96, micro_batch_tokens=256, hidden=256, vocab_size=8192, chunk_rows=128,
    )  # fmt: skip
    with tempfile.TemporaryDirectory() as directory:
        setup, *paths = make_setup(Path(directory), world_size, case)
        step = Step(setup, *paths, phase)
        step.run()
        cpu.clear(), wall.clear()
        for _ in range(steps):
            step.run()
    step.close()
    own = torch.tensor([[cpu[n], wall[n]] for n in PHASES], dtype=torch.float64) / steps
    most, total = own.clone(), own.clone()
    dist.all_reduce(most, op=dist.ReduceOp.MAX)
    dist.all_reduce(total)
    rank = dist.get_rank()
    if joined:
        dist.destroy_process_group()
    if rank:
        return None
    return {
        "layout": str(setup.student_grid),
        "ranks": world_size,
        "rows": sequences * setup.workload.response,
        "cpu": dict(zip(PHASES, most[:, 0].tolist(), strict=True)),
        "wall": dict(zip(PHASES, most[:, 1].tolist(), strict=True)),
        "cpu_of_all": dict(zip(PHASES, total[:, 0].tolist(), strict=True)),
    }
