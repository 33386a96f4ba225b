"""When each step's batch is generated: in its step, or while the steps before it train."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, replace
from typing import Protocol

from torch import Tensor

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


class Rollouts(Protocol):
    """The batches of a run, one for each step. All ranks call the same methods, in one order.

    Attributes:
        stream: of the prompts.
    """

    stream: PromptStream

    @property
    def consumed(self) -> int:
        """The number of prompts with which a run that resumes goes on."""
        ...

    def take(self, step: int) -> Begun:
        """Return the batch of this step. What is to be generated meanwhile is begun, too."""
        ...

    def give_back(self, step: int) -> None:
        """Undo `take` of this step, if there was one: nothing was learned from its batch."""
        ...

    def state(self) -> dict[str, Tensor]:
        """Return what a run that resumes needs to know of responses under way. Collective."""
        ...


class RolloutSchedule:
    """`Rollouts` in the order of the prompts, begun `ahead` steps before they are trained on.

    Args:
        mix: says how many prompts a step takes, and who answers them.
        ahead: how many batches are generated while one is trained on; 0: on policy.
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
        self.begun: deque[Begun] = deque()
        self.taken: Begun | None = None  # by the last step that took its batch

    @property
    def consumed(self) -> int:
        """The number of prompts in the batches that were taken.

        A batch that is only begun does not count: a run that resumes begins it again.
        """
        return self.begun[0].consumed if self.begun else self.stream.consumed

    def take(self, step: int) -> Begun:
        """Return the batch of this step, begun now or ahead."""
        while len(self.begun) <= self.ahead:
            self.begun.append(self._begin(step + len(self.begun)))
        begun = self.begun.popleft()
        assert begun.step == step, (begun.step, step)
        self.taken = begun
        return begun

    def give_back(self, step: int) -> None:
        """See `Rollouts.give_back`. What was begun ahead will be begun again, too."""
        if self.taken and self.taken.step == step:
            self.begun.appendleft(self.taken)
        self.stream.consumed = self.consumed
        self.begun.clear()

    def state(self) -> dict[str, Tensor]:
        """See `Rollouts.state`: nothing, since what was begun will be begun again."""
        return {}

    def _begin(self, step: int) -> Begun:
        consumed = self.stream.consumed
        indices = self.stream.take(self.mix.prompts_of(step))
        length = self.horizon.length(step)
        sampling = replace(self.sampling, max_new_tokens=length)
        pending = self.mix.submit(self.engine, indices, step, sampling)
        return Begun(step, pending, length, consumed)
