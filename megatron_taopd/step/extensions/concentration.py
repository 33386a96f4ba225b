"""As many kept rows in fewer trained tokens: where each sequence's training ends.

An extension of the paper, off by default. Training runs a sequence up to its last kept row, so a
row late in a sequence costs all tokens before it. Kept rows are therefore looked for in prefixes of
the responses, chosen together under a bound on their total length. Each rank works on the sequences
that it holds; what the ranks agree on are prices and thresholds.
"""

from __future__ import annotations

import math

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
    """Return [r]: the priorities with −inf behind where each response's training ends.

    The best `keep` rows of the prefixes that stay have nearly the largest sum of priorities.

    The Lagrangian of the problem: at a price λ per row, and with τ the lowest priority kept, each
    sequence ends by itself where Σ (max(priority − τ, 0) − λ) is largest. λ is the lowest at which
    the prefixes fit; what is left of the bound then goes to the sequences that would end later at
    a slightly lower price. O(r) for each of some hundred prices.

    Args:
        priority: [r] of the rows held, in [0, 1] where it can be kept, −inf where it can't.
        held: which rows those are; no response of the batch is empty.
        keep: rows to keep, ≤ max_rows.
        max_rows: the most rows in all prefixes together, of all ranks.

    Collectives: of the rows' group, for each of some 30 prices 8 bytes and four times those of
    `order_statistics` for one place; in the end 24·N bytes.
    """
    assert keep <= max_rows, (keep, max_rows)
    if max_rows >= held.num_rows:
        return priority
    return _Prefixes(priority, held, keep).cut(max_rows)


class _Prefixes:
    """Prefixes of the responses that a rank holds.

    Attributes:
        usable: [r] priorities, 0 where a row cannot be kept, and `fixed` the same as multiples of
            2^-40.
        lengths: [n] int64, rows of each response, and `starts`, where they begin.
        sequence, offset: [r] int32, where each row stands.
    """

    def __init__(self, priority: Tensor, held: HeldRows, keep: int):
        device = priority.device
        self.priority, self.held, self.keep = priority, held, keep
        self.usable = priority.clamp(min=0)
        self.fixed = _fixed(self.usable)
        self.lengths = to_device(held.counts, device)
        self.ends = self.lengths.cumsum(0)
        self.starts = self.ends - self.lengths
        numbers = torch.arange(len(held.counts), dtype=torch.int32).repeat_interleave(held.counts)
        self.sequence = to_device(numbers, device)
        self.offset = torch.arange(len(priority), device=device) - self.starts[self.sequence]

    def cut(self, max_rows: int) -> Tensor:
        """Return the priorities, −inf behind prefixes of at most max_rows rows together."""
        group, device = self.held.group, self.priority.device
        most = torch.zeros(1, dtype=torch.float64, device=device)
        if len(self.usable):
            most = self.usable.double().amax().view(1)
        all_reduce(most, group, dist.ReduceOp.MAX)
        low, high = torch.zeros_like(most), most + 1e-12
        longer, shorter = self.cuts_at(low), torch.zeros_like(self.lengths)
        if int(self.total(longer)) > max_rows:
            for _ in range(_PRICE_STEPS):
                price = (low + high) / 2
                cuts = self.cuts_at(price)
                fits = self.total(cuts) <= max_rows
                low, high = price.where(~fits, low), price.where(fits, high)
                longer, shorter = cuts.where(~fits, longer), cuts.where(fits, shorter)
        else:
            longer, shorter = self.lengths, longer
        cuts = self.between(shorter, longer, max_rows)
        return self.priority.masked_fill(~self.inside(cuts), -math.inf)

    def total(self, cuts: Tensor) -> Tensor:
        return all_reduce(cuts.sum(), self.held.group)

    def inside(self, cuts: Tensor) -> Tensor:
        """Mark, [r] bool, the rows of prefixes of these lengths [n]."""
        return self.offset < cuts[self.sequence]

    def cuts_at(self, price: Tensor) -> Tensor:
        """Return [n] int64: where each sequence ends by itself at a price [1]."""
        cuts = self.lengths
        for _ in range(_THRESHOLD_STEPS):
            cuts = self.best_prefixes(self.lowest_kept(cuts), price)
        return cuts

    def lowest_kept(self, cuts: Tensor) -> Tensor:
        """Return [1]: the lowest priority kept in prefixes; 0 where these are too few rows."""
        values = self.usable.where(self.inside(cuts), -1.0)
        place = torch.full((1, 1), self.held.num_rows - self.keep, device=values.device)
        return order_statistics([values], place, self.held.group)[0].clamp(min=0)

    def best_prefixes(self, threshold: Tensor, price: Tensor) -> Tensor:
        """Return [n] int64: the length of each sequence's shortest prefix with the largest sum.

        It is 0 where no sum is positive.
        """
        values = (self.fixed - _fixed(threshold)).clamp_(min=0).sub_(_fixed(price))
        # Of one cumulative sum, which may overflow: differences of integers are right all the same.
        sums = values.cumsum(0)
        before = (sums - values)[self.starts]
        sums -= before[self.sequence]
        best = torch.full_like(self.lengths, 0)
        best.scatter_reduce_(0, self.sequence.long(), sums, "amax")
        at_best = self.offset.where(sums >= best[self.sequence], len(sums))
        first = self.lengths.scatter_reduce(0, self.sequence.long(), at_best, "amin")
        return (first + 1).where(best > 0, 0)

    def between(self, shorter: Tensor, longer: Tensor, max_rows: int) -> Tensor:
        """Lengthen the shorter cuts up to max_rows, first where a row more brings most.

        Prices do not lead to all totals: between two that are next to each other a sequence may
        jump.
        """
        longer = torch.maximum(shorter, longer)
        sums = torch.nn.functional.pad(self.fixed.cumsum(0), (1, 0))
        brought = sums[self.starts + longer] - sums[self.starts + shorter]
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
