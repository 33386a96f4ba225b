"""What is measured: heads, hidden states and a number of ranks."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace

import psutil
import torch
import torch.distributed as dist
from torch import Tensor

from megatron_taopd import VocabShard
from megatron_taopd.formats.hf import DTYPES
from megatron_taopd.step.selection import budget

BLOCKS = 8  # the heads are drawn in this many blocks of columns, so that they do not depend on TP


@dataclass(frozen=True)
class Setup:
    """One table: a pair of heads, a number of rows, a tensor-parallel size."""

    vocab: int
    hidden: int
    teacher_hidden: int
    rows: int
    tp: int
    ratios: tuple[float, ...]
    k: int
    chunk_rows: int
    dtype: str
    device: str
    repeats: int
    threads: int
    memory_limit: float
    only: tuple[str, ...]

    @classmethod
    def of(cls, arguments, hidden: int, teacher_hidden: int, rows: int, tp: int) -> Setup:
        on_cuda = arguments.device == "cuda"
        free = torch.cuda.mem_get_info()[0] if on_cuda else psutil.virtual_memory().available
        limit = 0.7 * free if arguments.memory_limit is None else 1e9 * arguments.memory_limit
        return cls(
            arguments.vocab,
            hidden,
            teacher_hidden,
            rows,
            tp,
            tuple(arguments.ratio),
            arguments.k,
            min(arguments.chunk_rows, rows),
            arguments.dtype,
            arguments.device,
            arguments.repeats,
            arguments.threads,
            limit,
            tuple(arguments.only),
        )

    def __str__(self) -> str:
        heads = f"{self.vocab:,} × {self.hidden} and {self.teacher_hidden}"
        threads = f"{self.threads} threads in all" if self.device == "cpu" else self.device
        return (
            f"{heads}, {self.rows} rows, TP {self.tp}, {self.dtype}, K = {self.k}, "
            f"chunks of {self.chunk_rows} rows, {threads}"
        )

    @property
    def input_bytes(self) -> int:
        width = self.hidden + self.teacher_hidden
        return DTYPES[self.dtype].itemsize * width * (self.vocab + self.tp * self.rows)


@dataclass(frozen=True)
class Problem:
    """What a rank works on. Shapes: student_hidden [R, D_s], student_weight [V/tp, D_s], …

    `reported` has the teacher's K most probable ids [R, K] and their log-probabilities [R, K], as a
    teacher's server would.
    """

    student_hidden: Tensor
    student_weight: Tensor
    teacher_hidden: Tensor
    teacher_weight: Tensor
    shard: VocabShard
    k: int
    chunk_rows: int
    reported: tuple[Tensor, ...] = ()

    @property
    def of_the_mean(self) -> Tensor:
        """[R], the weights of rows in their mean."""
        return torch.full((self.num_rows,), 1 / self.num_rows, device=self.student_hidden.device)

    @classmethod
    def draw(cls, setup: Setup, rank: int) -> Problem:
        """Logits of standard deviation 3 that the two models half share, the same for any TP."""
        shared = min(setup.hidden, setup.teacher_hidden) // 2
        private = (setup.hidden - shared, setup.teacher_hidden - shared)
        dtype, std, columns = DTYPES[setup.dtype], 0.02, setup.vocab // BLOCKS

        def normal(rows: int, width: int, logit_std: float | None = None) -> Tensor:
            scale = std if logit_std is None else logit_std / (std * math.sqrt(width))
            return torch.randn(rows, width, generator=generator).mul_(scale).to(dtype)

        generator = torch.Generator().manual_seed(BLOCKS)
        common = normal(setup.rows, shared, 2.8)
        hidden = [torch.cat([common, normal(setup.rows, width, 1.0)], 1) for width in private]
        per_rank = BLOCKS // setup.tp
        weights = [
            torch.empty(per_rank * columns, width, dtype=dtype)
            for width in (shared + p for p in private)
        ]
        for block in range(per_rank):
            generator.manual_seed(rank * per_rank + block)
            rows = slice(block * columns, (block + 1) * columns)
            weights[0][rows, :shared] = weights[1][rows, :shared] = normal(columns, shared)
            for weight, width in zip(weights, private, strict=True):
                weight[rows, shared:] = normal(columns, width)
        student_hidden, teacher_hidden = (h.to(setup.device) for h in hidden)
        student_weight, teacher_weight = (w.to(setup.device) for w in weights)
        start = rank * per_rank * columns
        group = dist.group.WORLD if setup.tp > 1 else None
        shard = VocabShard(start, start + per_rank * columns, group, setup.vocab)
        return cls(
            student_hidden.requires_grad_(),
            student_weight.requires_grad_(),
            teacher_hidden,
            teacher_weight,
            shard,
            setup.k,
            setup.chunk_rows,
        )

    @property
    def num_rows(self) -> int:
        return len(self.student_hidden)

    def at(self, rows: Tensor) -> Problem:
        """Take only these rows [n], as a start of their own for autograd."""
        return replace(
            self,
            student_hidden=self.student_hidden.detach()[rows].requires_grad_(),
            teacher_hidden=self.teacher_hidden[rows],
            reported=tuple(x[rows] for x in self.reported),
        )

    def kept(self, ratio: float) -> Problem:
        """A share of the rows, spread evenly. All of them are the problem itself."""
        kept = budget(ratio, self.num_rows)
        return self.at(torch.arange(kept) * self.num_rows // kept)

    def logits(self) -> tuple[Tensor, Tensor]:
        """[R, V/tp] of the student, differentiable, and of the teacher, in the heads' dtype."""
        with torch.no_grad():
            teacher = self.teacher_hidden @ self.teacher_weight.t()
        return self.student_hidden @ self.student_weight.t(), teacher

    def chunks(self) -> Iterator[slice]:
        for start in range(0, self.num_rows, self.chunk_rows):
            yield slice(start, min(start + self.chunk_rows, self.num_rows))
