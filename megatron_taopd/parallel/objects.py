"""Small objects told from rank to rank, pickled. One process alone needs no process group.

Tensors do not go this way: parallel/exchange.py.
"""

from __future__ import annotations

from typing import Any

import torch.distributed as dist


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
