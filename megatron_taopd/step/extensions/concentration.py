"""As many kept rows in fewer trained tokens: where each sequence's training ends.

An extension of the paper, off by default. Training runs a sequence up to its last kept row, so a
row late in a sequence costs all tokens before it. Kept rows are therefore looked for in prefixes of
the responses, chosen together under a bound on their total length. Each rank works on the sequences
that it holds; what the ranks agree on are prices and thresholds.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_taopd.parallel.copies import to_device
from megatron_taopd.parallel.order import all_reduce, order_statistics
from megatron_taopd.step.batch_scores import HeldRows

_PRICE_STEPS = 30  # halvings of the interval in which the price of a token is looked for
_THRESHOLD_STEPS = 4  # rounds between cuts and the lowest priority that is kept in them
# Priorities are added up as integers, multiples of 2^-40: sums are then exact, and so the same on
# every layout. A sequence of 2^22 rows still fits into 63 bits.
_ONE = float(1 << 40)


def cut_responses(priority: Tensor, held: HeldRows, keep: int, max_rows: int) -> Tensor:
    """Return [n] int64: how many rows of each response held, its first ones, may be kept.

    The best `keep` rows of these prefixes have nearly the largest sum of priorities.

    The Lagrangian of the problem: at a price λ per row, and with τ the lowest priority kept, each
    sequence ends by itself where Σ (max(priority − τ, 0) − λ) is largest. λ is the lowest at which
    the prefixes fit; what is left of the bound then goes to the sequences that would end later at
    a slightly lower price. O(r) for each of some hundred prices.

    Args:
        priority: [r] of the rows held, in [0, 1] where it can be kept, −inf where it can't.
        held: which rows those are; no response of the batch is empty.
        keep: rows to keep, ≤ max_rows.
        max_rows: the most rows in all prefixes together, of all ranks.

    Collectives: of the rows' group, all-reduces of 8 bytes and those of `order_statistics` for one
    place (three of 20 KiB in all) in four rounds for each of some 30 prices; in the end 24·N bytes.
    """
    assert keep <= max_rows, (keep, max_rows)
    if max_rows >= held.num_rows:
        return to_device(held.counts, priority.device)
    return _Prefixes(priority, held, keep).cut(max_rows)


@dataclass(frozen=True)
class _Rows:
    """Rows among which the kept ones are looked for: all that are held, or those of most priority.

    Attributes:
        usable: [r] priorities, 0 where a row cannot be kept, and `fixed`, the same as multiples of
            2^-40.
        sequence, offset: [r] int64, where each row stands, ascending.
        first: [n] int64, the first of these rows that is of each sequence or behind it.
        total: the rows of all ranks.
    """

    usable: Tensor
    fixed: Tensor
    sequence: Tensor
    offset: Tensor
    first: Tensor
    total: int

    @classmethod
    def of(cls, usable: Tensor, sequence: Tensor, offset: Tensor, held: HeldRows) -> _Rows:
        """Take some rows of what is held. Collective: an all-reduce of 8 bytes."""
        numbers = torch.arange(len(held.sequences), device=usable.device)
        first = torch.searchsorted(sequence, numbers)
        total = all_reduce(torch.full((), len(usable), device=usable.device), held.group)
        return cls(usable, _fixed(usable), sequence, offset, first, int(total))

    def inside(self, cuts: Tensor) -> Tensor:
        """Mark, [r] bool, the rows of prefixes of these lengths [n]."""
        return self.offset < cuts.index_select(0, self.sequence)


class _Prefixes:
    """Prefixes of the responses that a rank holds.

    Attributes:
        rows: all that are held.
        near: those of the 2·keep highest priorities of all ranks. Mostly the rows that are kept,
            and any that could lengthen a prefix, are among them.
        lengths: [n] int64, rows of each response.
    """

    def __init__(self, priority: Tensor, held: HeldRows, keep: int):
        device = priority.device
        self.held, self.keep = held, keep
        self.lengths = to_device(held.counts, device)
        numbers = torch.arange(len(held.counts)).repeat_interleave(held.counts)
        sequence = to_device(numbers, device)
        starts = self.lengths.cumsum(0) - self.lengths
        offset = torch.arange(len(priority), device=device) - starts.index_select(0, sequence)
        usable = priority.clamp(min=0)
        self.rows = _Rows.of(usable, sequence, offset, held)
        place = torch.tensor([[max(0, held.num_rows - 2 * keep)]])
        high = usable >= order_statistics([usable], to_device(place, device), held.group)[0]
        chosen = high.nonzero()[:, 0]
        self.near = _Rows.of(usable[chosen], sequence[chosen], offset[chosen], held)

    def cut(self, max_rows: int) -> Tensor:
        """Return [n] int64: the lengths of prefixes of at most max_rows rows together."""
        usable, group = self.rows.usable, self.held.group
        most = torch.zeros(1, dtype=torch.float64, device=usable.device)
        most = torch.cat([most, usable.double()]).amax().view(1)
        low, high = 0.0, float(all_reduce(most, group, dist.ReduceOp.MAX)) + 1e-12
        (longer, total), shorter = self.cuts_at(low), torch.zeros_like(self.lengths)
        if total <= max_rows:
            longer, shorter = self.lengths, longer
        else:
            for _ in range(_PRICE_STEPS):
                price = (low + high) / 2
                cuts, total = self.cuts_at(price)
                if total > max_rows:
                    low, longer = price, cuts
                else:
                    high, shorter = price, cuts
        return self.between(shorter, longer, max_rows)

    def cuts_at(self, price: float) -> tuple[Tensor, int]:
        """Return [n] int64, where each sequence ends by itself at a price, and all ranks' rows.

        The device is waited for once a round. Most rounds need no row but those near the threshold:
        it is found among them, and a prefix ends at a row above it.
        """
        cuts, total = self.lengths, torch.full((), self.rows.total, device=self.lengths.device)
        for _ in range(_THRESHOLD_STEPS):
            rows, threshold = self.near, self.lowest_kept(self.near, cuts)
            known, inside = torch.stack([threshold[0].double(), total.double()]).tolist()
            if known < 0:
                rows, threshold = self.rows, torch.zeros_like(threshold)
                if inside >= self.keep:  # else every row is kept
                    threshold = self.lowest_kept(rows, cuts)
            cuts = self.best_prefixes(rows, threshold, price)
            total = all_reduce(cuts.sum(), self.held.group)
        return cuts, int(total)

    def lowest_kept(self, rows: _Rows, cuts: Tensor) -> Tensor:
        """Return [1]: the lowest priority kept in prefixes; −1: too few of the rows are there."""
        values = rows.usable.masked_fill(~rows.inside(cuts), -1.0)
        place = torch.full((1, 1), rows.total - self.keep, device=values.device)
        return order_statistics([values], place, self.held.group)[0]

    def best_prefixes(self, rows: _Rows, threshold: Tensor, price: float) -> Tensor:
        """Return [n] int64: the length of each sequence's shortest prefix with the largest sum.

        It is 0 where no sum is positive.
        """
        values = (rows.fixed - _fixed(threshold)).clamp_(min=0)
        # Of one cumulative sum, which may overflow: differences of integers are right all the same.
        sums = values.cumsum(0)
        before = torch.nn.functional.pad(sums, (1, 0)).index_select(0, rows.first)
        sums -= before.index_select(0, rows.sequence)
        sums -= round(price * _ONE) * (rows.offset + 1)
        best = torch.zeros_like(self.lengths)
        best.scatter_reduce_(0, rows.sequence, sums, "amax")
        worse = sums < best.index_select(0, rows.sequence)
        ends = (rows.offset + 1).masked_fill_(worse, self.held.num_rows)
        ends = self.lengths.scatter_reduce(0, rows.sequence, ends, "amin")
        return ends.masked_fill(best == 0, 0)

    def between(self, shorter: Tensor, longer: Tensor, max_rows: int) -> Tensor:
        """Lengthen the shorter cuts up to max_rows, first where a row more brings most.

        Prices do not lead to all totals: between two that are next to each other a sequence may
        jump.
        """
        longer = torch.maximum(shorter, longer)
        sums = torch.nn.functional.pad(self.rows.fixed.cumsum(0), (1, 0))
        brought = sums[self.rows.first + longer] - sums[self.rows.first + shorter]
        table = shorter.new_zeros(3, len(self.held.cu_rows) - 1)
        own = to_device(self.held.sequences, table.device)
        table[:, own] = torch.stack([shorter, longer - shorter, brought])
        cuts, added, brought = all_reduce(table, self.held.group).cpu()
        order = (-brought.double() / added.clamp(min=1)).argsort(stable=True)
        room = max_rows - int(cuts.sum())
        before = added[order].cumsum(0) - added[order]
        cuts[order] += torch.minimum(added[order], (room - before).clamp(min=0))
        return to_device(cuts[self.held.sequences], table.device)


def _fixed(values: Tensor) -> Tensor:
    """Return these numbers as multiples of 2^-40, int64."""
    return (values.double() * _ONE).round_().long()
