"""Steps that take the responses that are finished, while the others go on."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from megatron_taopd.config.schema import RolloutSection
from megatron_taopd.data.prompts import PromptStream
from megatron_taopd.rollout.engine import NOTHING, Response, Sampling, batch_of
from megatron_taopd.rollout.schedule import Begun
from megatron_taopd.step.extensions.horizon import Horizon
from megatron_taopd.types import RolloutBatch


class Going(Protocol):
    """Responses that an engine is generating.

    Attributes:
        responses: the same on every rank; None: not finished, as far as is known.
    """

    responses: list[Response | None]

    def everything_so_far(self) -> list[Response]:
        """Return what there is of each response, the same on every rank. Collective."""
        ...


class Engine(Protocol):
    """What is asked of an engine, an `SGLangEngine`: it generates while other things are done."""

    def submit(
        self,
        prompts: Sequence[Sequence[int]],
        prompt_indices: Sequence[int],
        step: int,
        sampling: Sampling,
        so_far: Sequence[Response] | None = None,
    ) -> Going: ...

    def wait_for_any(self, batches: Sequence[Going]) -> None: ...


@dataclass
class Turn:
    """A step's worth of prompts that entered together.

    Attributes:
        number: the step that would train on them if all responses took equally long.
        indices: of each response the place of its prompt in the data.
        longest: tokens of a response.
        left: the responses that no step has taken.
    """

    number: int
    going: Going
    indices: list[int]
    longest: int
    left: set[int]

    @property
    def finished(self) -> list[int]:
        """The responses that a step can take, in order."""
        return [place for place in sorted(self.left) if self.going.responses[place] is not None]


Place = tuple[Turn, int]  # a response


class PartialRollouts:
    """`Rollouts` of the first responses that are finished.

    `ahead` + 1 batches of responses are under way when a step begins. The step takes a batch's
    number of those that are finished, the oldest first, as soon as there are so many. In its place
    prompts enter when the next step begins, in the stream's order. A turn's responses are begun
    `ahead` steps before the step of its number and waited for `max_staleness` steps after they were
    begun, so that a step waits for the responses of at most one turn.

    Args:
        token_ids: of every prompt.
        section: prompts and samples of a step, `ahead` and `max_staleness`.
        step: that comes next.
        state: that `state` has returned, of a run that is resumed: what was under way goes on.

    Collective: those of `Engine.submit`.
    """

    def __init__(
        self,
        engine: Engine,
        token_ids: Sequence[Sequence[int]],
        stream: PromptStream,
        sampling: Sampling,
        horizon: Horizon,
        section: RolloutSection,
        state: Mapping[str, Tensor] | None = None,
    ):
        self.engine, self.token_ids, self.stream = engine, token_ids, stream
        self.sampling, self.horizon, self.section = sampling, horizon, section
        self.size = section.prompts * section.samples
        self.taken: list[Place] = []  # by the last step that took any
        self.taken_by = 0
        self.turns = self._restored(state) if state else []

    @property
    def consumed(self) -> int:
        """The number of prompts that have entered: those under way are in `state`."""
        return self.stream.consumed

    def take(self, step: int) -> Begun:
        """See `Rollouts.take`."""
        self.taken, self.taken_by = [], step
        self.turns = [turn for turn in self.turns if turn.left]
        under_way = sum(len(turn.left) for turn in self.turns)
        while under_way < (self.section.ahead + 1) * self.size:
            number = self.turns[-1].number + 1 if self.turns else step
            self.turns.append(self._begin(number))
            under_way += self.size
        longest = max(turn.longest for turn in self.turns)
        return Begun(step, FirstFinished(self, step), longest, self.consumed)

    def give_back(self, step: int) -> None:
        """See `Rollouts.give_back`."""
        if self.taken_by == step:
            for turn, place in self.taken:
                turn.left.add(place)
            self.taken = []

    def choose(self, step: int) -> list[Place]:
        """Take what this step can have of the responses that are finished now, the oldest first.

        Those that it has to wait for have their places in it, also while they are not finished.
        """
        room = self.size - len(self.taken)
        due = step - (self.section.max_staleness - self.section.ahead)
        overdue = [(turn, p) for turn in self.turns if turn.number <= due for p in turn.left]
        for_others = max(0, room - len(overdue))
        chosen: list[Place] = []
        for turn in self.turns:
            finished = [(turn, place) for place in turn.finished]
            if turn.number > due:
                finished = finished[:for_others]
                for_others -= len(finished)
            chosen += finished
        chosen = chosen[:room]
        for turn, place in chosen:
            turn.left.remove(place)
        self.taken += chosen
        return chosen

    def wait(self) -> None:
        """Wait until more responses are finished, or some time. Collective."""
        self.engine.wait_for_any(
            [turn.going for turn in self.turns if None in turn.going.responses]
        )

    def batch(self, places: Sequence[Place]) -> RolloutBatch:
        """Lay finished responses end to end, in this order."""
        indices = [turn.indices[place] for turn, place in places]
        responses = [turn.going.responses[place] for turn, place in places]
        return batch_of([self.token_ids[i] for i in indices], indices, responses)

    def state(self) -> dict[str, Tensor]:
        """See `Rollouts.state`.

        Returns:
            Of the n responses that no step has taken, oldest first: turn, prompt, longest, length,
            finished, truncated: [n] int64 or bool; and of their tokens, end to end, tokens and
            versions: [t] int32, log_probs: [t] float32.
        """
        numbers, responses = [], [NOTHING]  # which there always is to join
        for turn in self.turns:
            known = turn.going.everything_so_far() if turn.left else []
            for place in sorted(turn.left):
                numbers.append([turn.number, turn.indices[place], turn.longest])
                responses.append(known[place])
        turns, prompts, longest = torch.tensor(numbers, dtype=torch.int64).reshape(-1, 3).T.clone()
        tokens, log_probs, versions = (
            torch.from_numpy(np.concatenate([getattr(r, name) for r in responses]))
            for name in ("tokens", "log_probs", "versions")
        )
        return {
            "turn": turns,
            "prompt": prompts,
            "longest": longest,
            "length": torch.tensor([len(r.tokens) for r in responses[1:]], dtype=torch.int64),
            "finished": torch.tensor([r.finished for r in responses[1:]], dtype=torch.bool),
            "truncated": torch.tensor([r.truncated for r in responses[1:]], dtype=torch.bool),
            "tokens": tokens,
            "log_probs": log_probs,
            "versions": versions,
        }

    def _begin(self, number: int) -> Turn:
        """Have the next prompts enter."""
        indices, samples = self.stream.take(self.section.prompts), self.section.samples
        longest = self.horizon.length(number)
        sampling = replace(self.sampling, max_new_tokens=longest)
        prompts = [self.token_ids[i] for i in indices]
        going = self.engine.submit(prompts, indices, number, sampling)
        indices = [index for index in indices for _ in range(samples)]
        return Turn(number, going, indices, longest, set(range(len(indices))))

    def _restored(self, state: Mapping[str, Tensor]) -> list[Turn]:
        """Let go on what was under way."""
        lengths = state["length"].tolist()
        pieces = [state[name].split(lengths) for name in ("tokens", "log_probs", "versions")]
        responses = [
            Response(*(values.numpy() for values in piece), *ended)
            for *piece, ended in zip(
                *pieces,
                zip(state["finished"].tolist(), state["truncated"].tolist(), strict=True),
                strict=True,
            )
        ]
        turns = []
        for number in state["turn"].unique().tolist():
            places = (state["turn"] == number).nonzero()[:, 0].tolist()
            indices, longest = state["prompt"][places].tolist(), int(state["longest"][places[0]])
            sampling = replace(self.sampling, max_new_tokens=longest, samples=1)
            prompts = [self.token_ids[i] for i in indices]
            so_far = [responses[place] for place in places]
            going = self.engine.submit(prompts, indices, number, sampling, so_far)
            turns.append(Turn(number, going, indices, longest, set(range(len(indices)))))
        return turns


class FirstFinished:
    """A `Pending` batch of the responses that a step takes."""

    def __init__(self, rollouts: PartialRollouts, step: int):
        self.rollouts, self.step = rollouts, step
        self.places: list[Place] = []

    def parts(self) -> Iterator[tuple[Tensor, RolloutBatch]]:
        """See `Pending.parts`. Collective: `Engine.wait_for_any`, until there are enough."""
        while len(self.places) < self.rollouts.size:
            chosen = self.rollouts.choose(self.step)
            if not chosen:
                self.rollouts.wait()
                continue
            first = len(self.places)
            self.places += chosen
            yield torch.arange(first, len(self.places)), self.rollouts.batch(chosen)

    def result(self) -> RolloutBatch:
        """See `Pending.result`; in the order in which they were taken."""
        for _ in self.parts():
            pass
        return self.rollouts.batch(self.places)
