"""How much memory a block of code needs at its worst.

with peak_memory() as memory:
    loss = linear_divergence(...)
print(memory.peak, memory.temporaries)
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from torch.autograd.profiler import profile


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
    changes = _changes(profiler, device)
    alive: dict[int, int] = {}  # address → its last change, which is its allocation if it survives
    for i, (address, size) in enumerate(changes):
        if size > 0:
            alive[address] = i
        else:
            alive.pop(address, None)
    kept = set(alive.values())
    memory.peak = _highest(size for _, size in changes)
    memory.temporaries = _highest(size for i, (_, size) in enumerate(changes) if i not in kept)


def _changes(profiler: profile, device: str) -> list[tuple[int, int]]:
    """(address, bytes) of each allocation, and (address, −bytes) of each free, in time order."""
    pending, found = list(profiler.kineto_results.experimental_event_tree()), []
    while pending:
        event = pending.pop()
        pending.extend(event.children)
        if event.name == "[memory]" and event.extra_fields.device.type == device:
            found.append((event.start_time_ns, event.extra_fields))
    found.sort(key=lambda pair: pair[0])
    return [(fields.ptr, fields.alloc_size) for _, fields in found]


def _highest(sizes: Iterator[int]) -> int:
    total = highest = 0
    for size in sizes:
        total += size
        highest = max(highest, total)
    return highest
