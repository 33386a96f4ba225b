"""The scores of a batch: each rank has those of its own rows, normalised over all of them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_taopd.parallel.copies import to_device
from megatron_taopd.parallel.order import BLOCK
from megatron_taopd.step.teachability import Distribution, describe, refuse_nan
from megatron_taopd.types import TokenScores, ranges

NAMES = ("disagreement", "compatibility", "student_entropy", "teacher_entropy")


@dataclass(frozen=True)
class HeldRows:
    """The response rows of a batch that this rank holds: of whole sequences, in canonical order.

    Attributes:
        cu_rows: [N+1] int64 on the CPU, where each sequence's rows start in the whole batch.
        sequences: [n] int64 on the CPU, those held here, ascending; each is held by one rank.
        group: the ranks that together hold all sequences; None: all of them are here.
    """

    cu_rows: Tensor
    sequences: Tensor
    group: dist.ProcessGroup | None = None

    @classmethod
    def all(cls, cu_rows: Tensor) -> HeldRows:
        """Hold a whole batch."""
        return cls(cu_rows, torch.arange(len(cu_rows) - 1))

    @property
    def num_rows(self) -> int:
        """The rows of the whole batch, R."""
        return int(self.cu_rows[-1])

    @cached_property
    def counts(self) -> Tensor:
        """[n] int64, the rows of each sequence that is held."""
        return self.cu_rows.diff()[self.sequences]

    def ids(self) -> Tensor:
        """[r] int64, the canonical numbers of the rows that are held, ascending."""
        return ranges(self.cu_rows[self.sequences], self.counts)

    def tally_here(self, mask: Tensor) -> Tensor:
        """Count the marked rows of the sequences held: [3, N] int64, 0 for others.

        Args:
            mask: [r] bool, of the rows that are held.

        Returns:
            On the mask's device: marked rows of each sequence; its rows up to the last marked one,
            that one included; the sum of the marked rows' places in it, from 0 on.
        """
        table = torch.zeros(3, len(self.cu_rows) - 1, dtype=torch.int64, device=mask.device)
        for sequences, rows in self.blocks():
            marked, counts = mask[rows], self.counts[sequences]
            ends = to_device(counts.cumsum(0), mask.device)
            starts = ends - to_device(counts, mask.device)
            up_to = _with_zero(marked.cumsum(0))
            found = up_to[ends] - up_to[starts]
            last = torch.searchsorted(up_to, up_to[ends])  # the first end that has them all
            places = torch.arange(len(marked), device=mask.device)
            sums = _with_zero((places * marked).cumsum(0))
            sums = sums[ends] - sums[starts] - found * starts
            where = to_device(self.sequences[sequences], mask.device)
            table[:, where] = torch.stack([found, (last - starts) * (found > 0), sums])
        return table

    def inside(self, cuts: Tensor) -> Tensor:
        """Mark, [r] bool, the first `cuts[i]` rows of each sequence held; cuts: [n] int64."""
        inside = torch.empty(int(self.counts.sum()), dtype=torch.bool, device=cuts.device)
        for sequences, rows in self.blocks():
            numbers, offsets = self.places(sequences, cuts.device)
            inside[rows] = offsets < cuts[sequences].index_select(0, numbers)
        return inside

    def offsets(self, device: torch.device) -> Tensor:
        """[r] float32: how many rows of its response stand before each row that is held."""
        offsets = torch.empty(int(self.counts.sum()), device=device)
        for sequences, rows in self.blocks():
            offsets[rows] = self.places(sequences, device)[1].float()
        return offsets

    def shares(self, device: torch.device) -> Tensor:
        """[r] float64 in (0, 1): where in its response each row stands that is held.

        Equal shares of responses of different lengths are the same number: a quotient is rounded
        from its exact value.
        """
        shares = torch.empty(int(self.counts.sum()), dtype=torch.float64, device=device)
        for sequences, rows in self.blocks():
            numbers, offsets = self.places(sequences, device)
            lengths = to_device(self.counts[sequences], device).index_select(0, numbers)
            shares[rows] = (2 * offsets + 1).double() / (2 * lengths).double()
        return shares

    def places(self, sequences: slice, device: torch.device) -> tuple[Tensor, Tensor]:
        """Return, of these sequences' rows, [b] int64 each: the number of its sequence among them,
        and how many rows of it stand before.
        """
        counts = self.counts[sequences]
        numbers = torch.arange(len(counts)).repeat_interleave(counts)
        offsets = ranges(torch.zeros_like(counts), counts)
        return to_device(numbers, device), to_device(offsets, device)

    def blocks(self) -> Iterator[tuple[slice, slice]]:
        """Cut what is held into (sequences, rows) of about BLOCK rows, whole sequences each."""
        ends = self.counts.cumsum(0)
        first, row = 0, 0
        while first < len(ends):
            last = max(first + 1, int(torch.searchsorted(ends, row + BLOCK, right=True)))
            end = int(ends[last - 1])
            yield slice(first, last), slice(row, end)
            first, row = last, end


def _with_zero(sums: Tensor) -> Tensor:
    return torch.nn.functional.pad(sums, (1, 0))


class BatchScores:
    """The scores of a batch whose rows are dealt to ranks; each vector is described once.

    Every rank of `held.group` uses the same properties in the same order: what is computed for the
    first time asks all of them (`teachability.describe`).

    Args:
        rows: of the rows that this rank holds, [r] each, on any device.
        held: which those are.
    """

    def __init__(self, rows: TokenScores, held: HeldRows):
        self.rows, self.held = rows, held
        self.described: dict[str, Distribution] = {}
        self._learnable: Tensor | None = None

    @classmethod
    def whole(cls, scores: TokenScores, cu_rows: Tensor | None = None) -> BatchScores:
        """Take the scores of a batch that is here as a whole, [R] each.

        Args:
            cu_rows: [N+1] int64, where each sequence's rows start; None: they are one sequence.
        """
        if cu_rows is None:
            cu_rows = torch.tensor([0, len(scores.disagreement)])
        return cls(scores, HeldRows.all(cu_rows))

    def within(self, chosen: Tensor) -> tuple[BatchScores, Tensor]:
        """Return the scores of some sequences as a batch of their own.

        Args:
            chosen: [N] bool, on the CPU; the same on every rank.

        Returns:
            The batch, and [r] int64 on the CPU where its rows stand among those that are held here.
        """
        held = self.held
        own = chosen[held.sequences]
        part = HeldRows(
            _with_zero(held.cu_rows.diff()[chosen].cumsum(0)),
            (chosen.cumsum(0) - 1)[held.sequences[own]],
            held.group,
        )
        starts = held.counts.cumsum(0) - held.counts
        places = ranges(starts[own], part.counts)
        rows = self.rows.at(to_device(places, self.rows.disagreement.device))
        return BatchScores(rows, part), places

    def describe(self, *names: str) -> list[Distribution]:
        """Return what is known of these scores over the batch; of R ≥ 1 rows."""
        if missing := [name for name in names if name not in self.described]:
            vectors = [getattr(self.rows, name) for name in missing]
            found = describe(vectors, self.held.num_rows, self.held.group)
            self.described |= dict(zip(missing, found, strict=True))
        return [self.described[name] for name in names]

    def refuse_nan(self) -> None:
        """Raise ValueError if a score that has been described is NaN somewhere."""
        nans = ((name, int(known.nans)) for name, known in self.described.items())
        refuse_nan(nans, self.held.num_rows)

    def bounded(self, name: str) -> Tensor:
        """Return a score [r] with infinities replaced (`teachability.bounded`)."""
        [known] = self.describe(name)
        return known.bounded(getattr(self.rows, name))

    @property
    def d(self) -> Tensor:
        """D̃ (`teachability.normalize_disagreement`), [r] in [0, 1]."""
        return self._normalized("disagreement")

    @property
    def c(self) -> Tensor:
        """C̃ (`teachability.normalize_compatibility`), [r] in [0, 1]."""
        return self._normalized("compatibility", degenerate=1.0)

    @property
    def h(self) -> Tensor:
        """H̃ (`teachability.normalize_entropy`), [r] in [0, 1]."""
        return self._normalized("student_entropy")

    @property
    def learnable(self) -> Tensor:
        """D^L = D̃·C̃ (Eq. 5, 12), [r] in [0, 1]."""
        if self._learnable is None:
            self._learnable = self.d.mul_(self.c)
        return self._learnable

    def _normalized(self, name: str, degenerate: float = 0.0) -> Tensor:
        values = getattr(self.rows, name)
        if not self.held.num_rows:
            return values.clone()
        [known] = self.describe(name)
        return known.normalized(values, degenerate)

    def in_q3(self) -> Tensor:
        """Mark, [r] bool, TIP's quadrant: H below and D above the median of the batch."""
        h, d = self.rows.student_entropy, self.rows.disagreement
        if not self.held.num_rows:
            return h > d
        of_h, of_d = self.describe("student_entropy", "disagreement")
        return (h.double() < of_h.quantiles[1]) & (d.double() > of_d.quantiles[1])
