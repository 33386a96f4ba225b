"""How much each kept row counts in the loss, by how far its response has left the teacher.

An extension of the paper, off by default: the importance weights of IW-OPD (arXiv 2606.22600),
which its authors' code has as

    d_t = |log p_T(y_t) − log p_S(y_t)|        of the sampled token, both models at its context
    F_t = Σ_{k<t} d_k / Σ_{k≤T} d_k            accumulated before the token; T ends the response
    w_t = 1 + γ·(1 − F_t)

so that a response's first token counts 1 + γ times its last one. All rows of a response add to F,
also those that are not kept. The weights are constants: nothing is differentiated through them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from megatron_taopd.data.batching import MicroBatch
from megatron_taopd.parallel import platform
from megatron_taopd.parallel.copies import to_device
from megatron_taopd.parallel.order import all_reduce
from megatron_taopd.step.batch_scores import BatchScores
from megatron_taopd.types import RolloutBatch, WantedRows, ranges


@dataclass(frozen=True)
class RowWeights:
    """The weights of a batch's kept rows, the same on every rank.

    Attributes:
        values: [n] float32 on the CPU, of the kept rows in canonical order.
        counts: [N] int64, how many of them each sequence has.
        ids: [n] int64 on the CPU, these rows, where ranks share sequences; otherwise None.
    """

    values: Tensor
    counts: Tensor
    ids: Tensor | None = None

    @classmethod
    def by_discrepancy(
        cls,
        scores: BatchScores,
        batch: RolloutBatch,
        kept: WantedRows,
        gamma: float,
        shared: bool = False,
    ) -> RowWeights:
        """Tell every rank the weights of the kept rows.

        Args:
            scores: with the log-probabilities of the sampled tokens by both models.
            kept: those are known here whose sequence this rank has scored.
            shared: some of the sequences are trained by several ranks, a part by each.

        Collectives: of the scores' group, an all-reduce of 4 bytes for each kept row; of shared
        sequences another of 8.
        """
        held = scores.held
        values = torch.zeros(kept.num_rows, device=platform.device())
        starts = kept.counts.cumsum(0) - kept.counts
        places = ranges(starts[held.sequences], kept.counts[held.sequences])
        rows = kept.of(batch, held.sequences)
        own = torch.searchsorted(held.ids(), rows)
        weights = discrepancy_weights(scores, gamma)
        values[to_device(places, values.device)] = weights[to_device(own, weights.device)]
        ids = None
        if shared:
            ids = torch.zeros(kept.num_rows, dtype=torch.int64, device=values.device)
            ids[to_device(places, ids.device)] = to_device(rows, ids.device)
            ids = all_reduce(ids, held.group).cpu()
        return cls(all_reduce(values, held.group).cpu(), kept.counts, ids)

    @property
    def mean(self) -> float:
        """Return the mean over the kept rows; 1 where there is none."""
        return self.values.double().mean().item() if len(self.values) else 1.0

    def within(self, part: WantedRows) -> RowWeights:
        """Scale the weights of an optimizer step's rows to a mean of 1.

        A plain mean over its rows is then Σ w·loss / Σ w.
        """
        chosen = (part.counts > 0).nonzero()[:, 0].tolist()
        return replace(self, values=self.values / self.of(chosen).double().mean())

    def of_rows(self, micro_batch: MicroBatch) -> Tensor:
        """Return [r] float32: those of a micro-batch's kept rows."""
        if micro_batch.pieces is None:
            return self.of(micro_batch.sequences)
        assert self.ids is not None
        return self.values[torch.searchsorted(self.ids, micro_batch.row_ids)]

    def of(self, sequences: Sequence[int]) -> Tensor:
        """Return [r] float32: those of these sequences' kept rows, one after the other."""
        chosen = torch.tensor(sequences, dtype=torch.int64)
        starts = self.counts.cumsum(0) - self.counts
        return self.values[ranges(starts[chosen], self.counts[chosen])]


def discrepancy_weights(scores: BatchScores, gamma: float) -> Tensor:
    """Compute w of every row that is held, [r] float32 in [1, 1 + γ].

    A token that only one model knows says nothing of how far they are apart: its d is 0. Where all
    d of a response are 0, F is, too.
    """
    rows, held = scores.rows, scores.held
    assert rows.student_log_prob is not None and rows.teacher_log_prob is not None
    weights = torch.empty_like(rows.student_log_prob)
    for sequences, block in held.blocks():
        apart = (rows.student_log_prob[block] - rows.teacher_log_prob[block]).abs().double()
        up_to = torch.nn.functional.pad(apart.where(apart.isfinite(), 0).cumsum(0), (1, 0))
        counts = held.counts[sequences]
        ends = to_device(counts.cumsum(0), up_to.device)
        starts = ends - to_device(counts, up_to.device)
        number, _ = held.places(sequences, up_to.device)
        before = up_to[:-1] - up_to[starts].index_select(0, number)
        whole = (up_to[ends] - up_to[starts]).index_select(0, number)
        share = (before / whole).where(whole > 0, 0)
        weights[block] = 1 + gamma * (1 - share)
    return weights
