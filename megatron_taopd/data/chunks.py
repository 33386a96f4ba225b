"""Sequences cut into chunks, two for each rank of a context-parallel group.

Of 2·cp equal chunks of a sequence, rank r has chunk r and chunk 2·cp − 1 − r: what their tokens
attend to adds up to the same on every rank. TransformerEngine deals packed sequences alike. A
sequence is padded at its end to a multiple of 2·cp, where no token before it attends to.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_taopd.types import ranges


def chunk_tokens(lengths: Tensor, cp: int) -> Tensor:
    """Return the tokens of a chunk of sequences of these lengths, int64; at least 1."""
    return (-(-lengths // (2 * cp))).clamp(min=1)


@dataclass(frozen=True)
class Pieces:
    """What attention has to know of a rank's chunks: queries here, keys anywhere in the group.

    Attributes:
        queries: tokens of each chunk that this rank has, in their order.
        keys: tokens from the start of its sequence to its end, which it attends to.
        places: [Σ keys] int64, where these lie among the keys of all ranks, one rank after another.
    """

    queries: list[int]
    keys: list[int]
    places: Tensor


@dataclass(frozen=True)
class Chunks:
    """Packed segments over the ranks of a context-parallel group.

    Attributes:
        segments: [S] int64, tokens of each, a multiple of 2·cp.
    """

    segments: Tensor
    cp: int

    def of(self, rank: int) -> Tensor:
        """Return [T / cp] int64, the packed positions of the tokens that a rank has, in order."""
        return ranges(self._starts(rank), self._sizes())

    def places(self) -> Tensor:
        """Return [T] int64: where each token lies when the ranks' tokens are put end to end."""
        order = torch.cat([self.of(rank) for rank in range(self.cp)])
        places = torch.empty_like(order)
        places[order] = torch.arange(len(order))
        return places

    def pieces(self, rank: int) -> Pieces:
        """Say what attention has to know of a rank's chunks."""
        sequence = (self.segments.cumsum(0) - self.segments).repeat_interleave(2)
        sizes = self._sizes()
        keys = self._starts(rank) + sizes - sequence
        return Pieces(sizes.tolist(), keys.tolist(), self.places()[ranges(sequence, keys)])

    def _sizes(self) -> Tensor:
        return (self.segments // (2 * self.cp)).repeat_interleave(2)

    def _starts(self, rank: int) -> Tensor:
        """Return [2S] int64, where the chunks of a rank start."""
        chunk = self.segments // (2 * self.cp)
        first = self.segments.cumsum(0) - self.segments
        own = torch.tensor([rank, 2 * self.cp - 1 - rank])
        return (first[:, None] + own * chunk[:, None]).flatten()
