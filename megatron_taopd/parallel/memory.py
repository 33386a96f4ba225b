"""How much memory a block of code needs at its worst.

with peak_memory() as memory:
    loss = linear_divergence(...)
print(memory.peak, memory.temporaries)
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import psutil
import torch
import torch.distributed as dist
from torch.autograd.profiler import profile

from megatron_taopd.parallel import platform
from megatron_taopd.parallel.compat.torch_internals import allocations


@dataclass
class PeakMemory:
    """Bytes above those allocated when the block began; filled in when it ends.

    Attributes:
        peak: the most that was allocated at any one time.
        temporaries: the same without what the block leaves behind (its results, gradients in
            `.grad`), so that it does not depend on how early these were allocated.
    """

    peak: int = 0
    temporaries: int = 0


@contextmanager
def peak_memory(device: str = "cpu") -> Iterator[PeakMemory]:
    """Meter torch's allocator of one type of device ("cpu", "cuda") while the block runs.

    The meter is the allocator itself: torch's profiler notes every allocation and every free in it,
    also those inside an operator, in the backward pass and in gloo's threads, and they are added up
    in time order. Memory from before the block that it frees is not subtracted. Not seen is what
    never goes through the allocator: the scratch space of BLAS and oneDNN, and Python objects.

    An operator costs some tens of microseconds more under the meter, so time the block apart.
    Blocks do not nest.
    """
    memory = PeakMemory()
    with profile(profile_memory=True) as profiler:
        yield memory
    changes = allocations(profiler, device)
    alive: dict[int, int] = {}  # address → its last change, which is its allocation if it survives
    for i, (address, size) in enumerate(changes):
        if size > 0:
            alive[address] = i
        else:
            alive.pop(address, None)
    kept = set(alive.values())
    memory.peak = _highest(size for _, size in changes)
    memory.temporaries = _highest(size for i, (_, size) in enumerate(changes) if i not in kept)


def _highest(sizes: Iterator[int]) -> int:
    total = highest = 0
    for size in sizes:
        total += size
        highest = max(highest, total)
    return highest


def rank_memory() -> dict[str, float]:
    """Return what the log says of all ranks' memory: the fullest, which it is, and the emptiest.

    On CUDA it is the most that torch has reserved since the last call, which nobody else can have,
    and the most that tensors took of it on any rank; on a CPU what the process holds now. The keys
    are memory/{most_mib,most_rank,least_mib}, and on CUDA memory/most_allocated_mib.

    Collectives: an all-gather of 8 bytes a rank, on CUDA 16.
    """
    if torch.cuda.is_available():
        held = [torch.cuda.max_memory_reserved(), torch.cuda.max_memory_allocated()]
        torch.cuda.reset_peak_memory_stats()
    else:
        held = [psutil.Process().memory_info().rss]
    own = torch.tensor(held, device=platform.device())
    everyone = own.new_empty(dist.get_world_size() * len(held))
    dist.all_gather_into_tensor(everyone, own)
    taken, *allocated = zip(*everyone.view(-1, len(held)).tolist(), strict=True)
    found = {
        "memory/most_mib": max(taken) / 2**20,
        "memory/most_rank": taken.index(max(taken)),
        "memory/least_mib": min(taken) / 2**20,
    }
    if allocated:
        found["memory/most_allocated_mib"] = max(allocated[0]) / 2**20
    return found
