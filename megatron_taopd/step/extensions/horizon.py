"""How long training responses are worth generating.

An extension of the paper, off by default. Later tokens of a response carry less teachable mass, and
supervision is all that is read off a rollout: its answer is not needed. A shorter response saves
the rollout and the teacher, which no choice of rows can.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from megatron_taopd.config.schema import Growth, RolloutSection
from megatron_taopd.parallel.copies import to_device
from megatron_taopd.parallel.order import all_reduce
from megatron_taopd.step.batch_scores import HeldRows
from megatron_taopd.types import RolloutBatch

PROBE_EVERY = 8  # steps: then responses are generated in full, or what lies behind is never seen
MEMORY = 0.8  # of what is known of a place, how much stays when a new step shows it


class Horizon:
    """The longest response of the next step.

    `auto` takes the length h at which a response yields most teachable mass per token:

        h = argmax M(h) / (w·P + N(h))

    with M(h) the mass of a response's first h tokens, N(h) how many of these there are (responses
    end by themselves, too), both averaged over responses and, with MEMORY, over steps; P the mean
    prompt length and w what a prompt token costs compared with a response token, which is also
    decoded. At the best h the next token's mass is what the average token's has been (the marginal
    value theorem). The first step and every PROBE_EVERY-th are generated in full.

    A horizon that grows is a function of the number of the step: a resumed run, and a batch that is
    begun ahead, have the length that they would have had.

    Args:
        setting: "none", "auto", a number of tokens, or one that grows.
        longest: rollout.max_new_tokens.
        floor: the least that `auto` chooses.
        prompt_weight: w.
    """

    def __init__(self, setting: str | int | Growth, longest: int, floor: int, prompt_weight: float):
        self.setting, self.longest, self.floor = setting, longest, min(floor, longest)
        self.prompt_weight = prompt_weight
        self.mass = torch.zeros(longest, dtype=torch.float64)  # at each place, per response
        self.reach = torch.zeros(longest, dtype=torch.float64)  # share of responses that have it
        self.prompt_tokens = 0.0
        self.observed = 0  # steps

    @classmethod
    def of(cls, rollout: RolloutSection) -> Horizon:
        """Take the horizon that a section asks for."""
        setting = rollout.horizon
        return cls(
            Growth(**setting) if isinstance(setting, dict) else setting,
            rollout.max_new_tokens,
            rollout.horizon_floor,
            rollout.horizon_prompt_weight,
        )

    def length(self, step: int) -> int:
        """Return how many tokens a response of this step may have."""
        if self.setting == "none":
            return self.longest
        if isinstance(self.setting, Growth):
            return self.setting.at(step)
        if self.setting != "auto":
            return min(int(self.setting), self.longest)
        if self.observed == 0 or step % PROBE_EVERY == 1:
            return self.longest
        return self._best()

    def _cost(self) -> Tensor:
        """Return [longest]: w·P + N(h) of the lengths h = 1, 2, … up to the longest."""
        return self.prompt_weight * self.prompt_tokens + self.reach.cumsum(0)

    def _best(self) -> int:
        yields = self.mass.cumsum(0) / self._cost().clamp(min=1e-12)
        return int(yields[self.floor - 1 :].argmax()) + self.floor

    def observe(
        self,
        batch: RolloutBatch,
        teachability: Tensor,
        length: int,
        held: HeldRows | None = None,
    ) -> dict[str, float]:
        """Learn from a step whose responses could have `length` tokens.

        Args:
            teachability: [r] D^L of the rows held.
            held: which those are, the same on every rank of its group; None: the whole batch.

        Returns:
            rollout/horizon: the length that was allowed; and for `auto` what it is believed to
            retain of a full response's mass (rollout/horizon_mass) and tokens
            (rollout/horizon_tokens), the prompt counted with its weight.

        Collectives: for `auto` an all-reduce of 8·length bytes.
        """
        metrics: dict[str, float] = {"rollout/horizon": length}
        if self.setting != "auto":
            return metrics
        held = held or HeldRows.all(batch.cu_rows)
        mass = torch.zeros(length, dtype=torch.float64, device=teachability.device)
        rows, counts = held.ids(), held.counts.tolist()
        places = batch.positions_of(rows) - (batch.prompt_lengths - 1)[batch.sequences_of(rows)]
        places = to_device(places, mass.device)
        # One response after another: a sum in the same order every time.
        for at, response in zip(places.split(counts), teachability.split(counts), strict=True):
            mass[at] += response
        mass = all_reduce(mass, held.group).cpu()
        ended = torch.bincount(batch.response_lengths, minlength=length + 1).cumsum(0)
        reach = (batch.num_sequences - ended[:length]).double()
        memory = MEMORY if self.observed else 0.0
        for known, seen in ((self.mass, mass), (self.reach, reach)):
            known[:length].mul_(memory).add_(seen / batch.num_sequences, alpha=1 - memory)
        prompt_tokens = batch.prompt_lengths.double().mean().item()
        self.prompt_tokens = memory * self.prompt_tokens + (1 - memory) * prompt_tokens
        self.observed += 1

        cost = self._cost()
        retained = self.mass[:length].sum() / self.mass.sum()
        if math.isfinite(retained):
            metrics["rollout/horizon_mass"] = retained.item()
        metrics["rollout/horizon_tokens"] = (cost[length - 1] / cost[-1]).item()
        return metrics

    def state(self) -> dict[str, Tensor | float | int]:
        """Return what a resumed run needs."""
        names = ("mass", "reach", "prompt_tokens", "observed")
        return {name: getattr(self, name) for name in names}

    def load(self, state: dict[str, Tensor | float | int]) -> None:
        """Go on from `state()`; of another max_new_tokens, with the places that both have."""
        for name, value in state.items():
            if isinstance(value, Tensor):
                shared = min(len(value), self.longest)
                getattr(self, name)[:shared] = value[:shared]
            else:
                setattr(self, name, value)
