"""The columns of the vocabulary that a rank holds."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property

import torch
import torch.distributed as dist
from torch import Tensor

ALIGNMENT = 128  # columns: rows of logits begin at addresses that matmuls and wide loads like


@dataclass(frozen=True)
class VocabShard:
    """The columns [start, stop) of both heads that this rank holds.

    Attributes:
        start, stop: global ids of the first column and of the one past the last. The shards of a
            group do not overlap and cover [0, size) together; they may be unequal, or empty.
        group: the ranks that hold the other shards; None when this shard is all there is.
        size: the common vocabulary. Columns of ids ≥ size (padding, or tokens that only one model
            has) never take part in anything, and get zero gradients.
        absent: [n] int64, on the device of the logits, ids below size that do not take part either,
            because only one of the models knows them: to both they have no probability. The same
            on every rank.
    """

    start: int
    stop: int
    group: dist.ProcessGroup | None
    size: int
    absent: Tensor | None = field(default=None, compare=False)

    @property
    def width(self) -> int:
        """The number of this shard's columns that lie below size; they are its first ones."""
        return max(0, min(self.stop, self.size) - self.start)

    @property
    def padded_width(self) -> int:
        """The number of columns whose logits the heads compute: a multiple of ALIGNMENT, or all.

        Those from `width` on are masked, so that they never take part in anything.
        """
        return min(self.stop - self.start, -(-self.width // ALIGNMENT) * ALIGNMENT)

    @property
    def world_size(self) -> int:
        return 1 if self.group is None else dist.get_world_size(self.group)

    @cached_property
    def absent_columns(self) -> Tensor | None:
        """The absent ids among this shard's columns, [n] int64; None if there are none."""
        if self.absent is None:
            return None
        columns = self.absent - self.start
        columns = columns[(columns >= 0) & (columns < self.width)]
        return columns if len(columns) else None

    def columns(self, logits: Tensor) -> Tensor:
        """Cut [R, V] to [R, width], −inf where a column is absent; a view if none is."""
        assert logits.shape[1] == self.stop - self.start, (logits.shape, self)
        logits = logits[:, : self.width]
        if self.absent_columns is None:
            return logits
        return logits.index_fill(1, self.absent_columns, -torch.inf)

    def mask(self, logits: Tensor) -> Tensor:
        """Set the columns of [R, padded_width] logits that take no part to −inf, in place."""
        logits[:, self.width :] = -torch.inf
        if self.absent_columns is not None:
            logits.index_fill_(1, self.absent_columns, -torch.inf)
        return logits

    def rows(self, weight: Tensor) -> Tensor:
        """Cut [V, D] to [padded_width, D], a view."""
        assert weight.shape[0] == self.stop - self.start, (weight.shape, self)
        return weight[: self.padded_width]

    def at_ids(self, logits: Tensor, ids: Tensor) -> Tensor:
        """Return [R, n]: the logits of ids [R, n], −inf for those not among this rank's columns.

        Args:
            logits: [R, width] or [R, padded_width].
        """
        columns, here = self.locate(ids)
        if self.width == 0:
            return logits.new_full(ids.shape, -torch.inf)
        return logits.gather(1, columns).masked_fill_(~here, -torch.inf)

    def locate(self, ids: Tensor) -> tuple[Tensor, Tensor]:
        """Return this shard's column of each id, 0 for ids elsewhere; and which ids are here."""
        columns = ids - self.start
        here = (columns >= 0) & (columns < self.width)
        return columns.masked_fill(~here, 0), here

    def all_gather(self, local: Tensor) -> Tensor:
        """Gather [R, n] of each rank: [tp, R, n], by rank.

        Collectives: one all-gather of the bytes of `local`; none for no rows, or for one rank.
        """
        if self.world_size == 1 or local.numel() == 0:
            return local.expand(self.world_size, *local.shape)
        gathered = local.new_empty(self.world_size * local.shape[0], *local.shape[1:])
        dist.all_gather_into_tensor(gathered, local.contiguous(), group=self.group)
        return gathered.view(self.world_size, *local.shape)
