"""Whole tensors, checked and laid end to end in pieces of bounded size."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from math import prod
from typing import NamedTuple

import torch
from torch import Tensor


class Repeatable:
    """An iterable from a function that begins anew: `Repeatable(student.named_tensors)`."""

    def __init__(self, begin: Callable[[], Iterable]):
        self.begin = begin

    def __iter__(self) -> Iterator:
        return iter(self.begin())


def checked(
    named_tensors: Iterable[tuple[str, Tensor]], shapes: Mapping[str, tuple[int, ...]]
) -> Iterator[tuple[str, Tensor]]:
    """Yield the tensors as long as they are the model's, each of them once, all of one dtype.

    Raises:
        ValueError: before a tensor that is not, or at the end if some are missing.
    """
    left, first = dict(shapes), None
    for name, tensor in named_tensors:
        if name not in shapes:
            raise ValueError(f"{name}: the servers' model has no such weight")
        if name not in left:
            raise ValueError(f"{name}: twice in one weight update")
        if tuple(tensor.shape) != left.pop(name):
            raise ValueError(
                f"{name}: shape {list(tensor.shape)}; the servers' model has {list(shapes[name])}"
            )
        first = first or tensor.dtype
        if tensor.dtype != first:
            raise ValueError(f"{name}: {tensor.dtype} among weights of {first}")
        yield name, tensor
    if left:
        raise ValueError(f"{next(iter(left))}: missing from the weight update, {len(left)} in all")


class Entry(NamedTuple):
    """A tensor's name, shape, dtype and place among its bucket's bytes."""

    name: str
    shape: torch.Size
    dtype: torch.dtype
    start: int
    end: int


@dataclass
class Bucket:
    """Tensors end to end: `entries` say where, `data` is [n] uint8, None where it was not kept."""

    entries: list[Entry]
    data: Tensor | None

    def __str__(self) -> str:
        first, others = self.entries[0].name, len(self.entries) - 1
        return first + (f" and {others} others" if others else "")

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        for name, shape, dtype, start, end in self.entries:
            yield name, self.data[start:end].view(dtype).view(shape)


def buckets(
    named_tensors: Iterable[tuple[str, Tensor]],
    shapes: Mapping[str, tuple[int, ...]],
    limit: int,
    keep: bool,
) -> Iterator[Bucket]:
    """Fill buckets of at most `limit` bytes; a larger tensor is a bucket of its own, not copied.

    Args:
        shapes: of all tensors, so that a small model's bucket is no larger than the model.
        keep: False leaves out the bytes.
    """
    elements = sum(map(prod, shapes.values()))
    entries: list[Entry] = []
    data, end = None, 0
    for name, tensor in named_tensors:
        size = tensor.nbytes
        if entries and end + size > limit:
            yield Bucket(entries, data if data is None else data[:end])
            entries, data, end = [], None, 0
        place = Entry(name, tensor.shape, tensor.dtype, end, end + size)
        source = tensor.detach().contiguous().view(-1).view(torch.uint8)
        if size > limit:
            yield Bucket([place], source if keep else None)
            continue
        if keep and data is None:
            data = source.new_empty(min(limit, elements * tensor.element_size()))
        if keep:
            data[end : end + size].copy_(source)
        entries.append(place)
        end += size
        del tensor, source  # before the next one comes
    if entries:
        yield Bucket(entries, data if data is None else data[:end])
