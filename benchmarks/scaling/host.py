"""The work on the host that every rank does for the whole batch, whatever the number of ranks.

Plans, routes and the selection are the same on every rank, so that ranks need not negotiate; their
cost grows with the batch and no rank more makes it smaller. Measured as one rank of many on a fake
group: no layer runs, and hidden states are four numbers wide.
"""

from __future__ import annotations

import resource
import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from torch.testing._internal.distributed.fake_pg import FakeStore

from benchmarks.scaling.fake import Recorder, replace_distributed
from megatron_taopd.data import batching
from megatron_taopd.parallel.exchange import RowShard
from megatron_taopd.parallel.layout import forward_layout, student_layout
from megatron_taopd.step.selection import select, selection_metrics
from megatron_taopd.step.teachability import learnable_disagreement
from megatron_taopd.teacher.dispatch import ReadRows, dispatch
from megatron_taopd.types import RolloutBatch, TokenScores

PROMPT = 32


def measure_host(sequences: int, response: int, ranks: int, tp: int, ratio: float = 0.1) -> dict:
    """Seconds by part of a batch's host work, and bytes that it adds to the process's peak."""
    replace_distributed()
    dist.init_process_group("fake", rank=0, world_size=ranks, store=FakeStore())
    seconds: dict[str, float] = defaultdict(float)

    @contextmanager
    def part(name: str) -> Iterator[None]:
        started = time.process_time()
        yield
        seconds[name] += time.process_time() - started

    try:
        layout, teacher = student_layout(tp, 1), forward_layout(tp, 1)
        length, rows = PROMPT + response, sequences * response
        batch = RolloutBatch(
            tokens=torch.zeros(sequences * length, dtype=torch.int64),
            cu_seqlens=torch.arange(sequences + 1) * length,
            prompt_lengths=torch.full((sequences,), PROMPT),
            log_probs=torch.zeros(rows),
            truncated=torch.zeros(sequences, dtype=torch.bool),
            prompts=torch.arange(sequences),
            weight_versions=torch.zeros(rows, dtype=torch.int64),
        )
        everything = torch.ones(rows, dtype=torch.bool)
        scores = TokenScores(*torch.rand(4, rows))
        before = _peak_bytes()
        with part("plans"):
            assigned = batching.assign(batch, everything, layout, 2 * length)
            own = batching.assign(batch, everything, teacher, 2 * length)
        held = torch.cat([m.row_ids for m in own.micro_batches])
        read = ReadRows(
            RowShard(held, torch.zeros(len(held), 4)),
            teacher.last_stage_rank(own.owner[:, None], torch.arange(tp)),
        )
        with part("routes of the teacher's rows"), Recorder():
            dispatch([(torch.arange(sequences), read)], batch, layout, assigned.owner)
        with part("selection"):
            mask = select("teachability", scores, ratio, 0)
        with part("plans"):
            batching.assign(batch, mask, layout, 2 * length)
        with part("metrics"):
            learnable_disagreement(scores.disagreement, scores.compatibility)
            selection_metrics("teachability", scores, mask, batch.cu_rows, 0)
        added = _peak_bytes() - before
    finally:
        parallel_state.destroy_model_parallel()
        dist.destroy_process_group()
    return {"rows": rows, "sequences": sequences, "seconds": dict(seconds), "bytes": added}


def _peak_bytes() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
