"""Which of many tensors travel in one collective."""

from __future__ import annotations

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
