"""When each step's batch is generated: in its step, or while the step before it trains."""

from __future__ import annotations

from dataclasses import dataclass, replace

from megatron_taopd.data.prompts import PromptStream
from megatron_taopd.rollout.engine import Pending, RolloutEngine, Sampling
from megatron_taopd.rollout.mix import Mix
from megatron_taopd.step.extensions.horizon import Horizon


@dataclass(frozen=True)
class Begun:
    """A batch that was begun.

    Attributes:
        step: that trains on it.
        length: the longest response, where the horizon has it.
        consumed: prompts before those of this batch.
    """

    step: int
    pending: Pending
    length: int
    consumed: int


class RolloutSchedule:
    """Batches in the order of the prompts, begun `ahead` steps before they are trained on.

    Args:
        mix: says how many prompts a step takes, and who answers them.
        ahead: 0, on policy, or 1: a batch is one step old when it is trained on.
    """

    def __init__(
        self,
        engine: RolloutEngine,
        mix: Mix,
        stream: PromptStream,
        sampling: Sampling,
        horizon: Horizon,
        ahead: int = 0,
    ):
        self.engine, self.mix, self.stream = engine, mix, stream
        self.sampling, self.horizon, self.ahead = sampling, horizon, ahead
        self.next: Begun | None = None

    @property
    def consumed(self) -> int:
        """The number of prompts in the batches that were taken.

        A batch that is only begun does not count: a run that resumes begins it again.
        """
        return self.next.consumed if self.next else self.stream.consumed

    def take(self, step: int) -> Begun:
        """Return the batch of this step, begun now or ahead."""
        begun = self.next or self._begin(step)
        assert begun.step == step, (begun.step, step)
        self.next = None
        return begun

    def run_ahead(self, step: int) -> None:
        """Begin the batch of the step after this one, if there is to be one already."""
        if self.ahead:
            self.next = self._begin(step + 1)

    def settle(self) -> None:
        """Wait for what was begun ahead, before the weights change."""
        if self.next:
            self.next.pending.result()

    def rewind(self, consumed: int) -> None:
        """Go back to where so many prompts were consumed: nothing was learned from later ones."""
        self.stream.consumed, self.next = consumed, None

    def _begin(self, step: int) -> Begun:
        consumed = self.stream.consumed
        indices = self.stream.take(self.mix.prompts_of(step))
        length = self.horizon.length(step)
        sampling = replace(self.sampling, max_new_tokens=length)
        pending = self.mix.submit(self.engine, indices, step, sampling)
        return Begun(step, pending, length, consumed)
