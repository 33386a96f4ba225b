"""Ranks that are threads of this process, for collectives of numbers: quick enough for hypothesis.

    shares = on_threads(3, work)  # work(rank, group) on each; its results by rank

`group` goes wherever `parallel.order.all_reduce` takes one.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar
from unittest import mock

import torch
import torch.distributed as dist

T = TypeVar("T")
_REDUCE = {
    dist.ReduceOp.SUM: lambda tensors: tensors.sum(0, dtype=tensors.dtype),
    dist.ReduceOp.MAX: lambda tensors: tensors.amax(0),
    dist.ReduceOp.MIN: lambda tensors: tensors.amin(0),
}


class ThreadGroup:
    """A group of threads. `calls` and `bytes` are those of one rank."""

    def __init__(self, size: int):
        self.barrier = threading.Barrier(size, timeout=60)
        self.given: list = [None] * size
        self.rank = threading.local()
        self.calls, self.bytes = 0, 0

    def all_reduce(self, tensor: torch.Tensor, op) -> None:
        self.given[self.rank.number] = tensor.clone()
        self.barrier.wait()
        shapes = {(given.shape, given.dtype) for given in self.given}
        assert len(shapes) == 1, f"ranks call for different tensors: {shapes}"
        tensor.copy_(_REDUCE[op](torch.stack(self.given)))
        if self.rank.number == 0:
            self.calls, self.bytes = self.calls + 1, self.bytes + tensor.nbytes
        self.barrier.wait()


def on_threads(size: int, work: Callable[[int, ThreadGroup], T]) -> list[T]:
    """What the work returns on each of so many ranks."""
    group, of_processes = ThreadGroup(size), dist.all_reduce

    def all_reduce(tensor, op=dist.ReduceOp.SUM, group=None):
        if isinstance(group, ThreadGroup):
            return group.all_reduce(tensor, op)
        return of_processes(tensor, op=op, group=group)

    def of(rank: int) -> T:
        group.rank.number = rank
        try:
            return work(rank, group)
        except BaseException:
            group.barrier.abort()  # or the others would wait for this one
            raise

    with mock.patch.object(dist, "all_reduce", all_reduce), ThreadPoolExecutor(size) as pool:
        return [future.result() for future in [pool.submit(of, rank) for rank in range(size)]]
