"""Order statistics of numbers that are spread over ranks: exact, and without a sort.

The bits of a float, read as an integer, are in the floats' order once those of negative numbers are
flipped. The number at a given place of the ascending order is therefore found digit by digit, from
the highest on: ranks add up how many of their numbers have each value of a digit, the place falls
into one of them, and only the numbers that have that one go on. Nobody holds the numbers of others.

A group of None is this process alone: the same work without collectives.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import torch
import torch.distributed as dist
from torch import Tensor

_DIGIT_BITS = 11
BLOCK = 1 << 17  # numbers at a time, whose temporaries stay in a processor's cache
_INTEGERS = {torch.float32: torch.int32, torch.float64: torch.int64}


def all_reduce(
    tensor: Tensor, group: dist.ProcessGroup | None, op: dist.ReduceOp.RedOpType = dist.ReduceOp.SUM
) -> Tensor:
    """Return the tensor, reduced in place over a group, or as it is for a group of None."""
    if group is not None:
        dist.all_reduce(tensor, op=op, group=group)
    return tensor


def order_statistics(
    vectors: Sequence[Tensor], places: Tensor, group: dist.ProcessGroup | None = None
) -> Tensor:
    """Return [V, P]: the numbers at P places of the ascending order of each of V vectors.

    Args:
        vectors: V of [r], float32 or float64, all of one dtype and device: what this rank has of
            each, possibly nothing. −0 comes before 0. With a NaN the result means nothing.
        places: [V, P] int64 on the same device, the same on every rank, from 0 up to the number of
            all ranks' numbers; a place outside gives a number that means nothing.

    Collectives: three all-reduces of float32, six of float64. The first has 8 KiB for each vector,
    the others 8 KiB for each place of each vector (the last one of float32 half, of float64 a
    quarter of that).
    """
    dtype, device = vectors[0].dtype, places.device
    digits = _digits(torch.finfo(dtype).bits)
    number, count = places.shape
    if not count:
        return places.to(dtype)
    tables: list[Tensor] = []  # of each digit: [V, cells] int32, where numbers of a cell go on
    rest = places.clone()  # the places among the numbers that are still in question
    found = torch.zeros_like(places)  # the highest digits of the result
    slot = torch.zeros_like(places)  # which set of numbers each place is looked for in
    slots = 1
    for _, bits in digits:
        size = 1 << bits
        # The last row of cells has the numbers that are no longer in question.
        cells = torch.zeros(number, (slots + 1) * size, dtype=torch.int32, device=device)
        for v, vector in enumerate(vectors):
            for block in vector.split(BLOCK):
                cell = _cells(_keys(block), [table[v] for table in tables], digits, slots)
                one = cells.new_ones(()).expand(len(cell))
                cells[v].scatter_add_(0, cell, one)
        counts = all_reduce(cells.view(number, -1, size)[:, :slots].contiguous(), group)
        up_to = counts.cumsum(-1).gather(1, slot[..., None].expand(-1, -1, size))
        digit = torch.searchsorted(up_to, rest[..., None], right=True).clamp(max=size - 1)
        below = up_to.gather(-1, (digit - 1).clamp(min=0)).where(digit > 0, 0)
        digit, rest = digit[..., 0], rest - below[..., 0]
        first = not tables
        found = found << bits | (digit - (size >> 1) if first else digit)
        # Places in one cell share its numbers, under the lowest of their numbers.
        cell = slot * size + digit
        same = cell[:, :, None] == cell[:, None, :]
        order = torch.arange(count, device=device)
        slot = order.where(same, count).amin(-1)
        table = torch.full((number, (slots + 1) * size), count, dtype=torch.int32, device=device)
        tables.append(table.scatter_(1, cell, slot.int()))
        slots = count
    return _numbers(found, dtype)


def _digits(width: int) -> list[tuple[int, int]]:
    """Return (shift, bits) of each digit of an integer, the highest first."""
    ends = [*range(width, 0, -_DIGIT_BITS), 0]
    return [(low, high - low) for high, low in pairwise(ends)]


def _keys(values: Tensor) -> Tensor:
    """Return integers [r] in the order of these floats."""
    bits = values.view(_INTEGERS[values.dtype])
    return bits ^ (bits >> torch.iinfo(bits.dtype).bits - 1 & torch.iinfo(bits.dtype).max)


def _numbers(keys: Tensor, dtype: torch.dtype) -> Tensor:
    """Invert `_keys`; the keys are int64."""
    bits = keys.to(_INTEGERS[dtype])
    bits = bits ^ (bits >> torch.iinfo(bits.dtype).bits - 1 & torch.iinfo(bits.dtype).max)
    return bits.view(dtype)


def _cells(
    keys: Tensor, tables: Sequence[Tensor], digits: Sequence[tuple[int, int]], slots: int
) -> Tensor:
    """Return [r] int64: slot × size + digit of each key, in the digit after those of the tables."""
    slot: Tensor | None = None
    for i, (shift, bits) in enumerate(digits[: len(tables) + 1]):
        if slot is None:  # the highest digit, which is signed, of the only slot
            cell = (keys >> shift) + (1 << bits - 1)
        else:
            cell = (slot << bits) + (keys >> shift & (1 << bits) - 1).int()
        if i < len(tables):
            slot = tables[i].index_select(0, cell.int())
    return cell.long()
