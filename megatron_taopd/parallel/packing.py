"""Which of many tensors travel in one collective; what packed tokens are a multiple of."""

from __future__ import annotations

import math
from collections.abc import Hashable, Iterator, Sequence

EXPORT_BYTES = 64 << 20  # of whole parameters that one collective of an export of weights moves


def pack(sizes: Sequence[int], kinds: Sequence[Hashable], limit: int) -> Iterator[tuple[int, int]]:
    """Yield [start, stop) of neighbours of one kind whose sizes add up to the limit at most.

    One that is larger by itself is alone.
    """
    start = total = 0
    for place, size in enumerate(sizes):
        if place > start and (kinds[place] != kinds[start] or total + size > limit):
            yield start, place
            start, total = place, 0
        total += size
    if sizes:
        yield start, len(sizes)


def shared_multiple(multiple: int, cp: int) -> int:
    """Return what the tokens of a micro-batch that a group shares are padded to a multiple of.

    Args:
        multiple: what those of each rank are.
    """
    return cp * math.lcm(2, multiple)


def batch_multiple(tp: int, cp: int, sequence: bool) -> int:
    """Return what the largest micro-batches of a layout are padded to a multiple of."""
    multiple = tp if sequence else 1
    return multiple if cp == 1 else shared_multiple(multiple, cp)
