"""One step in the forms that are compared."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

import torch
import torch.distributed as dist
from torch import Tensor

from benchmarks.step.pairs import RATIO, K, Models
from megatron_taopd.data import batching
from megatron_taopd.parallel import platform
from megatron_taopd.parallel.memory import peak_memory
from megatron_taopd.step.scoring import score
from megatron_taopd.step.selection import select
from megatron_taopd.step.training import backward


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
        self.everything = torch.ones(batch.num_rows, dtype=torch.bool)
        self.teacher_inputs, _ = models.read(batch)
        self.assigned = batching.assign(
            batch, self.everything, models.layout, models.micro_batch_tokens
        )

    @cached_property
    def teacher_rows(self):
        return self.read()

    @cached_property
    def scored(self):
        """(scores, gap, the layers' outputs)."""
        return self.score("replay")

    @property
    def scores(self):
        return self.scored[0]

    def read(self):
        return self.models.teacher.hidden_states(
            self.teacher_inputs, self.models.layout, self.assigned.owner
        )

    def score(self, schedule: str):
        return score(
            self.batch, self.assigned, self.models.student, self.models.heads, self.teacher_rows,
            K, keep_outputs=schedule == "replay",
        )  # fmt: skip

    def select(self, ratio: float, concentrate: float = 0.0) -> Tensor:
        if ratio == 1:
            return self.everything
        return select("teachability", self.scores, ratio, 0, concentrate, self.batch.cu_rows)

    def select_and_train(self, arm: Arm) -> None:
        self.train(self.select(arm.ratio, arm.concentrate), arm.schedule, arm.recompute)

    def train(self, mask: Tensor, schedule: str, recompute: str) -> dict[str, float]:
        outputs = None
        if schedule == "replay":  # which uses the lists up
            outputs = [list(micro_batch) for micro_batch in self.scored[2]]
        with self.models.recompute(recompute):
            return backward(
                self.batch, mask, self.assigned, self.models.student, self.models.heads,
                self.teacher_rows, self.models.micro_batch_tokens, {"kind": "reverse_kl"}, outputs,
            )  # fmt: skip


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
