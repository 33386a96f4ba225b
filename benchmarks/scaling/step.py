"""One step of the method on random models, its phases named: on a fake group or on real ranks."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from types import SimpleNamespace

import torch
from megatron.core import parallel_state
from torch import Tensor

import megatron_taopd.models.student
from megatron_taopd.data import batching
from megatron_taopd.models import weights
from megatron_taopd.parallel.layout import forward_layout, student_layout
from megatron_taopd.parallel.vocab import rows_within
from megatron_taopd.plan.setup import Setup
from megatron_taopd.step.scoring import OutputHeads, score
from megatron_taopd.step.selection import select
from megatron_taopd.step.training import backward
from megatron_taopd.teacher.dispatch import dispatch
from megatron_taopd.teacher.megatron import MegatronTeacher
from megatron_taopd.types import RolloutBatch

Phase = Callable[[str], AbstractContextManager]
OPTIMIZER = SimpleNamespace(
    lr=1e-6, min_lr=None, decay="constant", warmup_steps=0, weight_decay=0.0,
    beta1=0.9, beta2=0.98, eps=1e-8, clip=1.0,
)  # fmt: skip


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


def kept_rows(setup: Setup) -> Tensor:
    """[R] bool: of every response as many rows as the workload says, the last at its cut."""
    work = setup.workload
    length = int(min(work.length - 1, -(-work.length * work.trained // 1)))
    last, count = length - work.prompt, max(1, round(work.kept * work.response))
    assert count <= last + 1, work
    one = torch.zeros(work.response, dtype=torch.bool)
    one[last - count + 1 : last + 1] = True
    return one.repeat(work.sequences)


class NamedOutputHeads(OutputHeads):
    """Heads whose parts are phases of their own."""

    phase: Phase

    def scores(self, *args, **kwargs):
        with self.phase("scores"):
            return super().scores(*args, **kwargs)

    def loss(self, *args, **kwargs):
        with self.phase("loss"):
            return super().loss(*args, **kwargs)


class Step:
    """Both models of a setup, with random weights, and a batch.

    Args:
        student_dir, teacher_dir: directories with a config.json; weights are drawn.
    """

    def __init__(self, setup: Setup, student_dir: str, teacher_dir: str, phase: Phase):
        self.setup, self.phase = setup, phase
        grid, own = setup.student_grid, setup.teacher_grid
        dtype = torch.float32 if setup.itemsize == 4 else torch.bfloat16
        self.layout = student_layout(grid.tp, grid.pp, grid.sequence)
        teacher_layout = forward_layout(own.tp, own.pp, own.sequence)
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
        self.batch, self.mask = make_batch(setup), kept_rows(setup)

    def run(self) -> None:
        """The step after the rollout, up to the weights' way to the engine."""
        batch, phase, setup = self.batch, self.phase, self.setup
        everything = torch.ones(batch.num_rows, dtype=torch.bool)
        assigned = batching.assign(batch, everything, self.layout, setup.micro_batch_tokens)
        with phase("teacher"), torch.no_grad(), self.teacher.resident():
            parts = [(torch.arange(batch.num_sequences), self.teacher.read(batch))]
        with phase("exchange"):
            rows = dispatch(parts, batch, self.layout, assigned.owner)
        with phase("scoring"):
            scores, *_ = score(batch, assigned, self.student, self.heads, rows, setup.k)
        with phase("selection"):
            select("teachability", scores, setup.workload.kept, 0)
        with phase("training"):
            backward(
                batch, self.mask, assigned, self.student, self.heads, rows,
                setup.micro_batch_tokens, {"kind": "reverse_kl"},
            )  # fmt: skip
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
