"""What a rank's host does for a batch: the batch itself, plans and routes, its share of the rows.

The batch is made of what those ranks tell that have asked servers. It, plans and routes are the
same on every rank, so that ranks need not negotiate: they grow with the whole batch. The selection
is a rank's own rows, but for what one rank alone would have to do, which is timed next to it.
Measured as one rank of many on a fake group: no layer runs, hidden states are four numbers wide.
"""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from torch import Tensor
from torch.testing._internal.distributed.fake_pg import FakeStore

from benchmarks.scaling.fake import Recorder, replace_distributed
from megatron_taopd.data import batching
from megatron_taopd.monitoring.metrics import rollout_metrics
from megatron_taopd.parallel.exchange import RowShard
from megatron_taopd.parallel.layout import forward_layout, student_layout
from megatron_taopd.rollout.engine import make_rollout_batch
from megatron_taopd.step.batch_scores import NAMES, BatchScores, HeldRows
from megatron_taopd.step.selection import choose, look
from megatron_taopd.teacher.dispatch import ReadRows, dispatch
from megatron_taopd.types import RolloutBatch, TokenScores, WantedRows

PROMPT, RATIO = 32, 0.1
# CPU seconds by rows when every rank had all scores, sorted them, and made routes row by row. That
# code is gone: the figures are of the commits before it went, on the machine of docs/scaling.md.
BEFORE_PARTS = (
    "plans",
    "routes and delivery",
    "selection",
    "metrics",
    "bytes a row",
    "s per million rows",
)
BEFORE = {
    65_536: (0.01, 0.02, 0.02, 0.06, 288, 1.46),
    524_288: (0.04, 0.04, 0.13, 0.48, 123, 1.32),
    4_194_304: (0.74, 1.01, 1.49, 5.39, 107, 2.06),
    16_777_216: (1.78, 1.90, 6.92, 24.85, 104, 2.11),
}


@dataclass
class Parts:
    """CPU seconds of each part, and the bytes that it added to what the process had at a time."""

    seconds: dict[str, float] = field(default_factory=lambda: defaultdict(float))
    bytes: dict[str, int] = field(default_factory=lambda: defaultdict(int))

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        """Measure a block."""
        before, started = _resident(reset=True), time.process_time()
        yield
        self.seconds[name] += time.process_time() - started
        self.bytes[name] = max(self.bytes[name], _resident() - before)


def measure_host(sequences: int, response: int, ranks: int, tp: int) -> dict:
    """Measure the parts of a batch's host work on one of so many ranks."""
    torch.set_num_threads(1)
    replace_distributed()
    dist.init_process_group("fake", rank=0, world_size=ranks, store=FakeStore())
    parts = Parts()
    try:
        layout, teacher = student_layout(tp, 1), forward_layout(tp, 1)
        length, rows = PROMPT + response, sequences * response
        parcel = torch.zeros(3 * rows, dtype=torch.int32)
        with parts.part("batch"):
            batch = read_batch(parcel, sequences)
        del parcel
        scores = TokenScores(*torch.rand(4, rows, generator=torch.Generator().manual_seed(0)))
        few = TokenScores(*(getattr(scores, name)[:4] for name in NAMES))
        select(few, HeldRows.all(torch.arange(5)))  # what a process does once
        with parts.part("plans"):
            assigned = batching.assign(batch, WantedRows.all(batch), layout, 2 * length)
            own = batching.assign(batch, WantedRows.all(batch), teacher, 2 * length)
        held = torch.cat([m.row_ids for m in own.micro_batches])
        read = ReadRows(
            RowShard(held, torch.zeros(len(held), 4)),
            teacher.last_stage_rank(own.owner[:, None], torch.arange(tp)),
        )
        with parts.part("routes"), Recorder():
            dispatch([(torch.arange(sequences), read)], batch, layout, assigned)
        share = HeldRows(batch.cu_rows, assigned.sequences(), dist.group.WORLD)
        of_share = TokenScores(*(getattr(scores, name)[share.ids()] for name in NAMES))
        with parts.part("selection, a rank's share"), Recorder():
            select(of_share, share)
        whole = HeldRows.all(batch.cu_rows)
        with parts.part("selection by one rank"):
            mask, seen = select(scores, whole)
        ids = share.ids()
        kept = seen.wanted(batch, ids[mask[ids]])
        with parts.part("plans"):
            batching.assign(batch, kept, layout, 2 * length)
        with parts.part("metrics of the batch"):
            rollout_metrics(batch, torch.zeros(1), 1)
    finally:
        parallel_state.destroy_model_parallel()
        dist.destroy_process_group()
    return {
        "rows": rows,
        "sequences": sequences,
        "held": len(ids),
        "seconds": dict(parts.seconds),
        "bytes": dict(parts.bytes),
    }


def read_batch(parcel: Tensor, sequences: int) -> RolloutBatch:
    """Make the batch of what the ranks that ask servers tell, as every rank does (`Generating`).

    Args:
        parcel: [3 n] int32, tokens, log-probabilities and versions of responses of one length.
    """
    tokens, log_probs, versions = (part.chunk(sequences) for part in parcel.chunk(3))
    return make_rollout_batch(
        [[0] * PROMPT] * sequences,
        range(sequences),
        tokens,
        [values.view(torch.float32) for values in log_probs],
        [False] * sequences,
        versions,
    )


def select(scores: TokenScores, held: HeldRows):
    """Choose the rows as a step does: [r] bool, and what all ranks know of it."""
    of_batch = BatchScores(scores, held)
    of_batch.describe(*NAMES)
    choice = choose("teachability", of_batch, RATIO, 0)
    return choice.mask, look(choice)


def _resident(reset: bool = False) -> int:
    """Return the most bytes that the process has had since the last reset (Linux)."""
    if reset:
        Path("/proc/self/clear_refs").write_text("5")
    status = Path("/proc/self/status").read_text()
    [line] = [line for line in status.splitlines() if line.startswith("VmHWM")]
    return int(line.split()[1]) * 1024
