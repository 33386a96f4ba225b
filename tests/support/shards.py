"""A small vocabulary cut in many ways, and rows of it, for the tests of `parallel.vocab`."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist

from megatron_taopd.parallel.vocab import VocabShard
from megatron_taopd.parallel.vocab.normalizers import BLOCK_COLUMNS

SIZE, PADDED = 90, 96
# Where the shards of a group start and stop. Columns 90 … 95 are outside the common vocabulary.
LAYOUTS = {
    "one": [0, 96],
    "halves": [0, 48, 96],
    "unequal": [0, 7, 96],
    "first empty": [0, 0, 96],
    "last all padding": [0, 91, 96],
    "quarters": [0, 24, 48, 72, 96],
    "some empty": [0, 5, 5, 93, 96],
    "eighths": list(range(0, 97, 12)),
}


on_every_layout = pytest.mark.parametrize("bounds", LAYOUTS.values(), ids=LAYOUTS.keys())


def shard_of(bounds: list[int], rank: int | None = None, size: int = SIZE) -> VocabShard:
    """This rank's shard, or a given rank's with no group."""
    group = dist.group.WORLD if rank is None else None
    rank = dist.get_rank() if rank is None else rank
    return VocabShard(bounds[rank], bounds[rank + 1], group, size)


def columns(full: torch.Tensor, shard: VocabShard) -> torch.Tensor:
    return full[..., shard.start : shard.stop].clone()


def make_logits(kind: str, rows: int = 12, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """[rows, 96] fp32 logits of student and teacher; nan in the columns that must not be read."""
    generator = torch.Generator().manual_seed(seed)
    student, noise = torch.randn(2, rows, PADDED, generator=generator)
    teacher = 0.5 * student + noise + 3
    scale = {"flat": 0.1, "plain": 2.0, "peaked": 12.0, "huge": 1e4}.get(kind, 2.0)
    student, teacher = student * scale, teacher * scale
    if kind == "huge":
        student, teacher = student.clamp(-1e4, 1e4), teacher.clamp(-1e4, 1e4)
    if kind == "tied":  # a handful of values: ties at every place, across shards too
        student, teacher = student.div(4).round(), teacher.div(4).round()
    if kind == "impossible":  # ids without any probability, different ones for the two models
        student[:, 3:60:2], teacher[:, ::3] = -torch.inf, -torch.inf
        student[0, 8:SIZE] = -torch.inf  # fewer than k ids left
    student[:, SIZE:] = teacher[:, SIZE:] = torch.nan
    return student, teacher


def tops_in_k_blocks(k: int, tied: bool, rows: int = 3) -> torch.Tensor:
    """[rows, width] logits whose top-K are each in a block of columns of its own, in any order, all
    different or all equal; the last block is not a whole one."""
    generator = torch.Generator().manual_seed(k)
    blocks = 4 * k + 1
    logits = torch.rand(rows, blocks * BLOCK_COLUMNS - 7, generator=generator)
    for row in logits:
        places = torch.randperm(blocks - 1, generator=generator)[:k] * BLOCK_COLUMNS
        places += torch.randint(BLOCK_COLUMNS, (k,), generator=generator)
        row[places] = 2.0 if tied else torch.arange(2.0, 2 + k)
    return logits


def spoil(logits: torch.Tensor, row: int, column: int, sign: int) -> torch.Tensor:
    """A copy with one nan, of either sign: what x86 makes of inf − inf is negative."""
    logits = logits.clone()
    logits[row, column] = torch.tensor(torch.nan).copysign(torch.tensor(float(sign)))
    return logits


def relative_error(got: torch.Tensor, want: torch.Tensor) -> float:
    """Largest |got − want| / |want|, below 1e-9 absolute; equal infinities agree."""
    got, want = got.double(), want.double()
    error = (got - want).abs() / want.abs().clamp(min=1e-9)
    return error.masked_fill(got == want, 0).amax().item() if got.numel() else 0.0


def make_heads(rows: int = 11, seed: int = 0, dtype=torch.float32):
    """Student and teacher hidden states (of other widths) and heads, nan where padded."""
    generator = torch.Generator().manual_seed(seed)
    sizes = ((rows, 24), (PADDED, 24), (rows, 40), (PADDED, 40))
    tensors = [torch.randn(s, generator=generator, dtype=torch.float64) for s in sizes]
    for weight in tensors[1::2]:
        weight[SIZE:] = torch.nan
        weight *= 0.5
    return [t.to(dtype) for t in tensors]


def local_heads(heads, shard):
    hidden, weight, teacher_hidden, teacher_weight = heads
    here = slice(shard.start, shard.stop)
    return (
        hidden.clone().requires_grad_(),
        weight[here].clone().requires_grad_(),
        teacher_hidden,
        teacher_weight[here],
    )
