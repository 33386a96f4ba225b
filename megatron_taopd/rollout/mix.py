"""Reference responses of the data among a step's sequences, in the place of rollouts."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from fractions import Fraction
from functools import cached_property

import numpy as np
import torch
from torch import Tensor

from megatron_taopd.config.schema import RolloutSection
from megatron_taopd.data.prompts import Prompts
from megatron_taopd.rollout.engine import Pending, RolloutEngine, Sampling, make_rollout_batch
from megatron_taopd.types import RolloutBatch, ranges


class Mix:
    """Says which prompts of a step are answered by the data, and has the engine answer the others.

    A step has `rollout.prompts` × `rollout.samples` sequences. Of its `rollout.prompts` places,
    each for `samples` rollouts of a prompt, those of the data take a prompt for each sequence, for
    there is one reference of each. How many these are follows from the number of the step: after
    any number of steps it is the share of all places, rounded down. Which prompts of a step they
    answer is drawn from (seed, step).

    Args:
        prompts: with references, if any step takes some.
    """

    def __init__(self, rollout: RolloutSection, prompts: Prompts, seed: int):
        self.places, self.samples = rollout.prompts, rollout.samples
        self.warmup = rollout.warmup_steps
        self.share = Fraction(repr((rollout.mix or {}).get("dataset", 0.0)))
        self.prompts, self.seed = prompts, seed

    def references_of(self, step: int) -> int:
        """Return how many sequences of a step are references; the first step is 1."""
        if step <= self.warmup:
            return self.places * self.samples
        after, each = step - self.warmup, self.share * self.places
        return self.samples * (int(after * each) - int((after - 1) * each))

    def prompts_of(self, step: int) -> int:
        """Return how many prompts a step takes."""
        references = self.references_of(step)
        return self.places + references - references // self.samples

    def submit(
        self, engine: RolloutEngine, indices: Sequence[int], step: int, sampling: Sampling
    ) -> Pending:
        """Have a step's prompts answered; see `RolloutEngine.submit`. Collective if it generates.

        Args:
            indices: [`prompts_of` the step] of prompts.
        """
        references = self.references_of(step)
        if not references:
            return self._generate(engine, indices, step, sampling)
        # A generator of its own: prompts are ordered by ones of two or three numbers.
        drawn = np.random.default_rng([self.seed, step, 0, 1]).permutation(len(indices))
        by_data = torch.zeros(len(indices), dtype=torch.bool)
        by_data[torch.from_numpy(drawn[:references])] = True
        own, others = (
            [index for index, has in zip(indices, by_data.tolist(), strict=True) if has == wanted]
            for wanted in (True, False)
        )
        counts = torch.where(by_data, 1, self.samples)
        starts = counts.cumsum(0) - counts
        pending = self._generate(engine, others, step, sampling) if others else None
        return Mixed(
            (starts[by_data], self.references(own, sampling.max_new_tokens)),
            (ranges(starts[~by_data], counts[~by_data]), pending),
        )

    def _generate(
        self, engine: RolloutEngine, indices: Sequence[int], step: int, sampling: Sampling
    ) -> Pending:
        prompts = [self.prompts.token_ids[i] for i in indices]
        return engine.submit(prompts, indices, step, sampling)

    def references(self, indices: Sequence[int], longest: int) -> RolloutBatch:
        """Lay the references of these prompts out, cut after `longest` tokens."""
        assert self.prompts.references is not None
        whole = [torch.tensor(self.prompts.references[i]) for i in indices]
        cut = [response[:longest] for response in whole]
        valid = None
        if self.prompts.valid is not None:
            valid = [torch.tensor(self.prompts.valid[i])[:longest] for i in indices]
        batch = make_rollout_batch(
            [self.prompts.token_ids[i] for i in indices],
            indices,
            cut,
            [torch.full((len(response),), torch.nan) for response in cut],
            [len(response) > longest for response in whole],
            [torch.full((len(response),), -1) for response in cut],
            valid,
        )
        return replace(batch, references=torch.ones(len(cut), dtype=torch.bool))


class Mixed:
    """A `Pending` batch of references, which are there, and rollouts.

    Args:
        references: their places in the batch [n], ascending, and they themselves.
        rollouts: likewise; None: there are none.
    """

    def __init__(
        self, references: tuple[Tensor, RolloutBatch], rollouts: tuple[Tensor, Pending | None]
    ):
        self.references, self.rollouts = references, rollouts

    def parts(self) -> Iterator[tuple[Tensor, RolloutBatch]]:
        """See `Pending.parts`: the references come first."""
        yield self.references
        places, pending = self.rollouts
        if pending is not None:
            for among_rollouts, part in pending.parts():
                yield places[among_rollouts], part

    def result(self) -> RolloutBatch:
        """See `Pending.result`."""
        return self._whole

    @cached_property
    def _whole(self) -> RolloutBatch:
        (places, references), (others, pending) = self.references, self.rollouts
        if pending is None:
            return references
        joined = references.followed_by(pending.result())
        return joined.only(torch.cat([places, others]).argsort())
