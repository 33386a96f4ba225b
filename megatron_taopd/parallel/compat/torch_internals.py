"""Private parts of torch, written for version 2.13."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.profiler import profile
from torch.distributed.checkpoint.filesystem import (
    SerializationFormat,
    _StorageInfo,
    _write_item,
)
from torch.distributed.checkpoint.planner import WriteItem
from torch.distributed.checkpoint.storage import WriteResult
from torch.multiprocessing.reductions import reduce_tensor
from torch.utils._device import _device_constructors

# Where a chunk of a checkpoint lies: (file, first byte, number of bytes). Torch reads it, by this
# class, from a checkpoint's `.metadata`, and has no public name for it.
StorageInfo = _StorageInfo

MEMORY_EVENTS = 1_000_000  # of a step; of more, the last

_REDUCED_DEVICE = 6  # the device's place among the arguments that rebuild a CUDA tensor


def default_store() -> dist.Store:
    """Return the store of the default process group.

    It holds what ranks say outside of collectives, when others may be stuck in one or dead. Torch
    keeps it to itself, and a second store would need an address of its own.
    """
    return dist.distributed_c10d._get_default_store()


def write_item(transforms: Any, stream: Any, data: Any, item: WriteItem, file: str) -> WriteResult:
    """Append one tensor or object of a save plan to a stream, as torch's own writer would.

    A writer of our own is needed to take checksums while bytes are written; what it wrote has to be
    described in torch's words, which only this function makes.

    Args:
        transforms: of the torch writer that made the plan.
        stream: with `write`, `tell` and `flush`.
        data: the tensor on the CPU, or the bytes of an object.
        file: name of the file behind the stream.
    """
    return _write_item(transforms, stream, data, item, file, SerializationFormat.TORCH_SAVE)


def remember_constructors() -> None:
    """Let `with torch.device(…)` know the functions that make tensors, before they are replaced.

    It knows them by identity, and looks for them in `torch` when it is entered for the first time.
    One that it does not know makes its tensors elsewhere without a word: transformers initialises
    models on the meta device so.
    """
    _device_constructors()


@contextmanager
def memory_history() -> Iterator[Callable[[str], None]]:
    """Record each allocation and free of CUDA's caching allocator, with its Python stack.

    `record_function` blocks are recorded, too. What the block is given writes the snapshot to a
    path, for https://pytorch.org/memory_viz.
    """
    torch.cuda.memory._record_memory_history(
        stacks="python",
        max_entries=MEMORY_EVENTS,
        clear_history=True,
        global_record_annotations=True,
    )
    try:
        yield torch.cuda.memory._dump_snapshot
    finally:
        torch.cuda.memory._record_memory_history(enabled=None)


def allocations(profiler: profile, device: str) -> list[tuple[int, int]]:
    """Return (address, bytes) of each allocation, and (address, −bytes) of each free, in order.

    The events that torch makes public have no address, without which a free cannot be told to
    belong to an allocation inside the profiled block.

    Args:
        profiler: ended, with `profile_memory`.
        device: a type of device, "cpu" or "cuda".
    """
    pending, found = list(profiler.kineto_results.experimental_event_tree()), []
    while pending:
        event = pending.pop()
        pending.extend(event.children)
        if event.name == "[memory]" and event.extra_fields.device.type == device:
            found.append((event.start_time_ns, event.extra_fields))
    found.sort(key=lambda pair: pair[0])
    return [(fields.ptr, fields.alloc_size) for _, fields in found]


def ipc_handle(tensor: Tensor, device: Any) -> tuple[Callable, tuple]:
    """Return the function and the arguments that rebuild a CUDA tensor in another process.

    Torch pickles the number of the device; the other process may count its devices differently.

    Args:
        device: what the other process is told in place of the number.
    """
    rebuild, arguments = reduce_tensor(tensor)
    return rebuild, (*arguments[:_REDUCED_DEVICE], device, *arguments[_REDUCED_DEVICE + 1 :])


def bare_backend(
    store: dist.Store,
    name: str,
    world_size: int,
    address: str,
    device: torch.device,
    timeout_s: float,
) -> dist.Backend:
    """Join, as rank 0, a group of torch that other processes join as an ordinary group.

    A bare backend is not entered in torch's table of groups, so a group with a process that died
    can be abandoned. Only the prefixes of its keys in the store are an agreement: two that torch
    adds.

    Args:
        name: of the group.
        address: of this host, which gloo listens on.
        device: NCCL on CUDA, else gloo.
    """
    timeout = timedelta(seconds=timeout_s)
    for prefix in (f"{name}/", f"{device.type}/"):
        store = dist.PrefixStore(prefix, store)
    if device.type == "cuda":
        torch.cuda.set_device(device)  # threads do not inherit it
        options = dist.ProcessGroupNCCL.Options()
        options.is_high_priority_stream = False
        options._timeout = timeout
        options.global_ranks_in_group, options.group_name = [], name
        return dist.ProcessGroupNCCL(store, 0, world_size, options)
    options = dist.ProcessGroupGloo._Options()
    options._timeout = timeout
    options._devices = [dist.ProcessGroupGloo.create_device(hostname=address)]
    return dist.ProcessGroupGloo(store, 0, world_size, options)
