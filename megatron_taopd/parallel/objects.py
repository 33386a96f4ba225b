"""Small objects told from rank to rank, pickled. One process alone needs no process group.

Tensors do not go this way: parallel/exchange.py.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import torch.distributed as dist

T = TypeVar("T")


def gather(value: Any) -> list:
    """Of every rank, on every rank.

    Collectives: an all-gather of the sizes, one of the pickled values.
    """
    if not dist.is_initialized():
        return [value]
    values: list = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values


def told(value: Any, src: int = 0, group: dist.ProcessGroup | None = None) -> Any:
    """What global rank `src` says, on every rank of the group; the others' values do not count.

    Collectives: a broadcast of the size, one of the pickled value.
    """
    if not dist.is_initialized():
        return value
    values = [value]
    dist.broadcast_object_list(values, src=src, group=group)
    return values[0]


def comes_first(where: str) -> bool:
    """Whether no other rank has been at this place: for what several find, and one should say.

    Not a collective, since others may be stuck in one, or dead: it counts in the group's store.
    """
    if not dist.is_initialized():
        return True
    return _store().add(where, 1) == 1


def anyone_was(where: str) -> bool:
    """Whether a rank has called `comes_first` here. No collective."""
    return dist.is_initialized() and _store().add(where, 0) > 0


def _store() -> dist.Store:
    return dist.distributed_c10d._get_default_store()


def of_first_rank(work: Callable[[], T]) -> T:
    """What it gives on global rank 0, the only one that does it, on every rank.

    Collectives: those of `told`.
    """
    return told(work() if not dist.is_initialized() or dist.get_rank() == 0 else None)
