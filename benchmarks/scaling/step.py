"""One step of the method on random models, its phases named: on a fake group or on real ranks."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager

import torch
from megatron.core import parallel_state

import megatron_taopd.models.student
from megatron_taopd.config.schema import (
    LossSection,
    OptimizerSection,
    SelectionSection,
    TrainSection,
)
from megatron_taopd.data.vocab_map import VocabMap
from megatron_taopd.models import weights
from megatron_taopd.parallel.layout import forward_layout, student_layout
from megatron_taopd.parallel.vocab import rows_within
from megatron_taopd.plan.setup import Setup
from megatron_taopd.step.distiller import Distiller
from megatron_taopd.step.guard import Guard
from megatron_taopd.step.output_heads import OutputHeads
from megatron_taopd.step.training import backward
from megatron_taopd.teacher.megatron import MegatronTeacher
from megatron_taopd.teacher.teachers import Teachers
from megatron_taopd.types import RolloutBatch, WantedRows

Phase = Callable[[str], AbstractContextManager]
OPTIMIZER = OptimizerSection(warmup_steps=0, weight_decay=0.0)


def make_batch(setup: Setup) -> RolloutBatch:
    """Sequences of the workload's length, of random tokens."""
    work = setup.workload
    n, rows = work.sequences, work.sequences * work.response
    generator = torch.Generator().manual_seed(0)
    return RolloutBatch(
        tokens=torch.randint(setup.student.vocab, (n * work.length,), generator=generator),
        cu_seqlens=torch.arange(n + 1) * work.length,
        prompt_lengths=torch.full((n,), work.prompt),
        log_probs=torch.zeros(rows),
        truncated=torch.zeros(n, dtype=torch.bool),
        prompts=torch.arange(n),
        weight_versions=torch.zeros(rows, dtype=torch.int64),
    )


def kept_rows(setup: Setup, batch: RolloutBatch) -> WantedRows:
    """Of every response as many rows as the workload says, the last at its cut."""
    work = setup.workload
    length = int(min(work.length - 1, -(-work.length * work.trained // 1)))
    last, count = length - work.prompt, max(1, round(work.kept * work.response))
    assert count <= last + 1, work
    one = torch.zeros(work.response, dtype=torch.bool)
    one[last - count + 1 : last + 1] = True
    return WantedRows.known(batch, one.repeat(work.sequences).nonzero()[:, 0])


class NamedOutputHeads(OutputHeads):
    """Heads whose parts are phases of their own."""

    phase: Phase

    def scores(self, *args, **kwargs):
        """Score rows in a phase of its own."""
        with self.phase("scores"):
            return super().scores(*args, **kwargs)

    def student_log_probs(self, *args, **kwargs):
        """Take the student's log-probabilities in a phase of its own."""
        with self.phase("weights"):
            return super().student_log_probs(*args, **kwargs)

    def divergence(self, *args, **kwargs):
        """Sum the loss over rows in a phase of its own."""
        with self.phase("loss"):
            return super().divergence(*args, **kwargs)


class Step:
    """Both models of a setup, with random weights, and a batch.

    Args:
        student_dir, teacher_dir: directories with a config.json; weights are drawn.
    """

    def __init__(self, setup: Setup, student_dir: str, teacher_dir: str, phase: Phase):
        self.setup, self.phase = setup, phase
        grid, own, vocabulary = setup.student_grid, setup.teacher_grid, setup.student.vocab
        dtype = torch.float32 if setup.itemsize == 4 else torch.bfloat16
        self.layout = student_layout(grid.tp, grid.pp, grid.sequence, cp=grid.cp)
        teacher_layout = forward_layout(own.tp, own.pp, own.sequence, cp=own.cp)
        load, weights.load_weights = weights.load_weights, draw_weights
        try:
            self.student = megatron_taopd.models.student.Student(
                student_dir, self.layout, dtype, setup.recompute, OPTIMIZER, 10, setup.student.vocab
            )
            self.teacher = MegatronTeacher(
                teacher_dir, teacher_layout, dtype, setup.micro_batch_tokens
            )
        finally:
            weights.load_weights = load
        self.heads = None
        if self.layout.is_last_stage:
            shard = self.student.shard
            columns = shard.stop - shard.start
            head = torch.randn(columns, setup.teacher.hidden).to(dtype)
            chunk = rows_within(setup.head_memory, columns)
            self.heads = NamedOutputHeads(self.student.head_weight, head, shard, chunk)
            object.__setattr__(self.heads, "phase", phase)  # frozen
        if setup.average:
            head = self.heads and self.heads.teacher
            self.teacher.follow(self.student.keep_average(0.99), head)
        self.batch = make_batch(setup)
        self.kept = kept_rows(setup, self.batch)
        self.distiller = Distiller(
            self.student,
            Teachers({"teacher": self.teacher}, {"teacher": VocabMap(torch.arange(vocabulary))}),
            self.heads,
            Guard(0, 0),
            SelectionSection(ratio=setup.workload.kept, k=setup.k),
            LossSection(weights="discrepancy" if setup.weighted else "none"),
            TrainSection(micro_batch_tokens=setup.micro_batch_tokens),
        )

    def run(self) -> None:
        """Run the step after the rollout, up to the weights' way to the engine.

        The distiller's own parts, but for the kept rows, which are those that were planned for.
        """
        batch, phase, distiller = self.batch, self.phase, self.distiller
        assigned = distiller.assign(batch)
        with phase("teacher"):
            parts = distiller.read(batch)
        with phase("exchange"):
            rows = distiller.dispatch(parts, batch, assigned)
        with phase("scoring"):
            scored = distiller.score(batch, assigned, rows)
        with phase("selection"):
            distiller.select(scored, 0)
        with phase("training"):
            tokens = self.setup.micro_batch_tokens
            with phase("weights"):
                weights = distiller.weigh(scored, self.kept)
            models = self.student, self.heads
            backward(scored, self.kept, *models, distiller.loss, tokens, weights)
        with phase("optimizer"):
            self.student.step()
        with phase("sync"):
            for _ in self.student.named_tensors():
                pass

    def close(self) -> None:
        parallel_state.destroy_model_parallel()


@torch.no_grad()
def draw_weights(trunk, _directory) -> None:
    """Draw random weights, in place of `weights.load_weights`."""
    for parameter in trunk.parameters():
        if parameter.dim() > 1:
            parameter.normal_(std=0.02)
        else:
            parameter.fill_(1.0)
