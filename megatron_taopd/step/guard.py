"""Steps that are not taken: numbers that are not finite, and losses that jump.

Whatever finds such a number raises `Fault`, on every rank alike and before anything of the student
has changed. The loop catches it, goes on with the next batch, and ends the run (`Broken`) after
`guard.max_skipped` such steps in a row. Losses that stay where they have jumped to are the new
usual ones after a while: within a run as its window fills with them, at the latest in the start
after the one that they have ended.
"""

from __future__ import annotations

import math
from collections import deque
from statistics import median
from typing import Any

import torch
from torch import Tensor

from megatron_taopd.config.schema import GuardSection, LossSection
from megatron_taopd.parallel.faults import Fault

MEMORY = 32  # losses that a new one is compared with
ENOUGH = 8  # of them, before it is
SMALLEST_SPIKE = 1e-3  # nats; below, a loss is noise around zero
MOST_LINES = 20  # of skipped steps; then one for every hundredth


class Broken(Exception):
    """The run cannot go on, for a reason of one line that every rank comes to."""


class Jump(Fault):
    """A loss that is finite, and far from those before it."""


class Guard:
    """Which steps of a run were skipped, and what losses its updates had.

    Args:
        max_skipped: steps in a row, after which the run ends.
        loss_spike: times the median of the last MEMORY losses, above which an update is not taken;
            0 never. For losses that are ≥ 0.
    """

    def __init__(self, max_skipped: int, loss_spike: float):
        self.max_skipped, self.loss_spike = max_skipped, loss_spike
        self.losses: deque[float] = deque(maxlen=MEMORY)
        self.skipped = self.in_a_row = self.jumps = 0

    @classmethod
    def of(cls, guard: GuardSection, loss: LossSection) -> Guard:
        """Watch what a section asks for."""
        # The loss of sampled_token is no distance: of either sign, and around zero.
        return cls(guard.max_skipped, 0 if loss.kind == "sampled_token" else guard.loss_spike)

    def check(self, loss: float) -> None:
        """Raise Fault if the loss of an update that is about to be taken has jumped.

        A loss that is refused is remembered, too, so that the median follows one that stays.
        """
        if not self.loss_spike or len(self.losses) < ENOUGH:
            return
        usual = median(self.losses)
        if loss <= max(self.loss_spike * usual, SMALLEST_SPIKE):
            return
        fault = Jump(
            f"the loss is {loss:.4g}, more than guard.loss_spike {self.loss_spike:g} times "
            f"{usual:.4g}, the median of the last {len(self.losses)}"
        )
        self._remember(loss)
        raise fault

    def taken(self, loss: float) -> None:
        """Remember the loss of an update."""
        self._remember(loss)

    def _remember(self, loss: float) -> None:
        if math.isfinite(loss):
            self.losses.append(loss)

    def forget(self) -> None:
        """Compare the next losses with each other alone: those before them were of another kind, or
        a run was ended by those that followed.
        """
        self.losses.clear()
        self.in_a_row = self.jumps = 0

    def observe(self, fault: Fault | None) -> dict[str, int]:
        """Count a step, and return what the log says of it."""
        self.in_a_row = self.in_a_row + 1 if fault else 0
        self.jumps = self.jumps + 1 if isinstance(fault, Jump) else 0
        self.skipped += fault is not None
        return {"guard/skipped": int(fault is not None), "guard/skipped_total": self.skipped}

    def line(self, fault: Fault, prompts: Tensor) -> str | None:
        """Return a line on the step observed last, without its number; None if enough was said."""
        if self.in_a_row < self.max_skipped and self.skipped > MOST_LINES and self.skipped % 100:
            return None
        return (
            f"{fault.describe(prompts)}; the step is skipped "
            f"({self.in_a_row} of {self.max_skipped} in a row)"
        )

    @property
    def exhausted(self) -> bool:
        """Tell whether so many steps in a row were skipped that the run is to end."""
        return self.in_a_row >= self.max_skipped

    @property
    def jumped(self) -> bool:
        """Tell whether that is because of losses that jumped, every time."""
        return self.exhausted and self.jumps >= self.max_skipped

    def state(self) -> dict[str, Any]:
        """Return what a resumed run needs."""
        losses = torch.tensor(list(self.losses), dtype=torch.float64)
        counts = {name: getattr(self, name) for name in ("skipped", "in_a_row", "jumps")}
        return {"losses": losses, **counts}

    def load(self, state: dict[str, Any]) -> None:
        """Go on from `state()`."""
        self.losses.extend(state["losses"].tolist())
        self.skipped, self.in_a_row = state["skipped"], state["in_a_row"]
        self.jumps = state.get("jumps", 0)  # not counted before
