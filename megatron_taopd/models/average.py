"""An exponential moving average of the student's weights, which a teacher can read with."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import chain
from typing import Any

import torch
from megatron.core.distributed import DistributedDataParallel
from torch import Tensor

from megatron_taopd.models import weights
from megatron_taopd.models.gpt import Trunk
from megatron_taopd.parallel.compat.megatron_internals import owned_states


class WeightAverage:
    """The average of what a rank's distributed optimizers own, in fp32: 4 bytes an element.

    It begins as the weights that are there.

    Args:
        model: whose weights they are.
        optimizers: Megatron's distributed optimizers of it.
        decay: what stays of the average at an update; of the new weights come 1 − decay.

    Attributes:
        shards: 1-D tensors, in the order of `owned_states`.
    """

    def __init__(self, model: DistributedDataParallel, optimizers: Sequence[Any], decay: float):
        self.model, self.optimizers, self.decay = model, optimizers, decay
        self.shards = [weight.clone() for weight in self._masters()]

    def _masters(self) -> list[Tensor]:
        """List the fp32 weights that the optimizers own, their own memory."""
        return [states["param"] for _, _, states in self._states()]

    def _owned(self) -> list[Tensor]:
        """List the same elements of the model's own weights, in place."""
        return [parameter.data.view(-1)[owned] for parameter, owned, _ in self._states()]

    def _states(self) -> Iterator[tuple[Tensor, slice, dict[str, Tensor]]]:
        return chain.from_iterable(map(owned_states, self.optimizers))

    def update(self) -> None:
        """Take in the weights after an update of theirs."""
        for average, weight in zip(self.shards, self._masters(), strict=True):
            average.lerp_(weight, 1 - self.decay)

    @torch.no_grad()
    def fill(self, trunk: Trunk, head: Tensor | None) -> None:
        """Give another model of this architecture the average, rounded to its dtype.

        The model's own weights are the average meanwhile, and then what they were, bit by bit.

        Args:
            trunk: in any layout over the same ranks.
            head: [V, D], rows of the output projection in the student's shards; None: this rank has
                none.

        Collectives: two all-gathers of the weights over the data-parallel ranks, of the bytes of
        the stage's buffer, as after every step; between them those of `weights.export_weights`.
        """
        own = [weight.clone() for weight in self._owned()]
        self._set(self.shards)
        student: Trunk = self.model.module
        weights.load_tensors(trunk, weights.export_weights(student))
        if head is not None:
            head.copy_(student.head_weight)
        self._set(own)

    def _set(self, values: list[Tensor]) -> None:
        for weight, value in zip(self._owned(), values, strict=True):
            weight.copy_(value)
        self.model.start_param_sync(force_sync=True)
