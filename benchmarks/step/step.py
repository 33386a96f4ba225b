"""One step in the forms that are compared."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property

import torch.distributed as dist

from benchmarks.step.pairs import RATIO, K, Models
from megatron_taopd.config.schema import LossSection, SelectionSection, TrainSection
from megatron_taopd.parallel import platform
from megatron_taopd.parallel.exchange import RowShard
from megatron_taopd.parallel.memory import peak_memory
from megatron_taopd.step.distiller import Distiller, Selection
from megatron_taopd.step.guard import Guard
from megatron_taopd.step.scoring import ScoredBatch
from megatron_taopd.step.training import backward
from megatron_taopd.teacher.teachers import Teachers
from megatron_taopd.types import WantedRows


@dataclass(frozen=True)
class Arm:
    """One way to do the step.

    Attributes:
        ratio: ρ; 1 is full OPD in a single pass: nothing is scored, every row is trained on.
        schedule: single_pass, two_pass or replay.
        recompute: none or full. A replay does what full recomputation does, whatever is asked for.
    """

    ratio: float
    schedule: str
    recompute: str
    concentrate: float = 0.0

    def __str__(self) -> str:
        if self.schedule == "single_pass":
            return "full OPD"
        concentrated = f", c {self.concentrate:g}" if self.concentrate else ""
        return f"TA-OPD {100 * self.ratio:g} %, {self.schedule}{concentrated}"


def arms(ratios: list[float], concentrate: float) -> list[Arm]:
    full = [Arm(1.0, "single_pass", recompute) for recompute in ("none", "full")]
    return full + [
        Arm(ratio, schedule, recompute, c)
        for ratio in ratios
        for c in ((0.0, concentrate) if ratio == RATIO and concentrate else (0.0,))
        for schedule, recompute in (("two_pass", "none"), ("two_pass", "full"), ("replay", "full"))
    ]


class Step:
    """The phases of a step on one rollout batch; each can be run as often as one likes."""

    def __init__(self, models: Models, batch):
        self.models, self.batch = models, batch
        self.everything = WantedRows.all(batch)
        teachers = Teachers({"teacher": models.teacher}, {"teacher": models.vocab_map})
        [read] = teachers.inputs(batch)
        self.teacher_inputs = read.sequences
        train = TrainSection(
            micro_batch_tokens=models.micro_batch_tokens, replay_memory_mib=sys.maxsize
        )
        self.distiller = Distiller(
            models.student,
            teachers,
            models.heads,
            Guard(0, 0),
            SelectionSection(k=K),
            LossSection(),
            train,
        )
        self.assigned = self.distiller.assign(batch)

    @cached_property
    def teacher_rows(self):
        return self.read()

    @cached_property
    def scored(self):
        """Score the rollouts once, and keep the layers' outputs."""
        return self.score("replay")

    @property
    def scores(self):
        return self.scored.scores.rows

    def read(self) -> dict[int, RowShard]:
        """Let the teacher read, and send its rows to who scores them."""
        parts = self.distiller.read(self.batch)
        return self.distiller.dispatch(parts, self.batch, self.assigned)

    def score(self, schedule: str) -> ScoredBatch:
        """Score all rows; a replay keeps the layers' outputs."""
        train = replace(self.distiller.train, schedule=schedule)
        distiller = replace(self.distiller, train=train)
        return distiller.score(self.batch, self.assigned, self.teacher_rows)

    def selection(self, ratio: float, concentrate: float = 0.0) -> Selection:
        section = replace(self.distiller.selection, ratio=ratio, concentrate=concentrate)
        return replace(self.distiller, selection=section).select(self.scored, 0)

    def select(self, ratio: float, concentrate: float = 0.0) -> WantedRows:
        return self.everything if ratio == 1 else self.selection(ratio, concentrate).kept

    def select_and_train(self, arm: Arm) -> None:
        self.train(self.select(arm.ratio, arm.concentrate), arm.schedule, arm.recompute)

    def train(self, kept: WantedRows, schedule: str, recompute: str) -> dict[str, float]:
        """Form the gradients of the rows' loss, reverse KL; its metrics."""
        models, outputs = self.models, None
        if schedule == "replay":  # which uses the lists up
            outputs = [list(micro_batch) for micro_batch in self.scored.kept_outputs]
        scored = replace(self.scored, kept_outputs=outputs)
        with models.recompute(recompute):
            return backward(
                scored,
                kept,
                models.student,
                models.heads,
                self.distiller.loss,
                models.micro_batch_tokens,
            )


def seconds(run: Callable[[], object]) -> float:
    """Time a call until the last rank is done."""
    platform.synchronize()
    dist.barrier()
    started = time.perf_counter()
    result = run()
    platform.synchronize()
    dist.barrier()
    elapsed = time.perf_counter() - started
    del result
    return elapsed


def say(text: str) -> None:
    if dist.get_rank() == 0:
        print(f"  {text}", file=sys.stderr, flush=True)


def metered(run: Callable[[], object]) -> dict[str, int]:
    with peak_memory(platform.device().type) as memory:
        result = run()
    del result
    return {"peak": memory.peak, "temporaries": memory.temporaries}
