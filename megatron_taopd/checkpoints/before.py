"""What a run goes on from: its newest checkpoint, loaded into what the run is made of."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_taopd.checkpoints import files, resume, saving
from megatron_taopd.config.schema import Config, TrainSection
from megatron_taopd.data.sources import written
from megatron_taopd.models.student import Student
from megatron_taopd.parallel import watchdog
from megatron_taopd.step.extensions.horizon import Horizon
from megatron_taopd.step.guard import Guard

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Before:
    """What there was before this start: the newest valid checkpoint, or nothing.

    Attributes:
        step: that the checkpoint was saved after; 0 if there is none.
        kept: the state of its run (`kept_run`).
    """

    step: int
    kept: Mapping[str, Any]

    @classmethod
    def newest(cls, config: Config) -> Before:
        """Look for the newest checkpoint of a run. Raises and collectives: see `latest_valid`."""
        directory = Path(config.run.dir) / "checkpoints"
        step = files.latest_valid(directory, logger.info, config.checkpoint.trust)
        if step is None:
            return cls(0, {})
        return cls(step, resume.kept_run(files.path(directory, step)))

    def check_prompts(self, found: int, config: Config) -> None:
        """Raise ValueError if another number of prompts fits than did when the run was begun."""
        if (known := self.kept.get("num_prompts", found)) != found:
            raise ValueError(
                f"data.prompts: {found} of {written(config.data.prompts)} fit, and {known} did "
                f"when {config.run.dir} was begun: the same versions of transformers and of this "
                "package have to render them, or give another run.dir"
            )

    def last_update(self, train: TrainSection) -> int:
        """Count the optimizer's updates until the end of the run, whatever mini_batches was."""
        done = self.kept.get("schedule_step", self.step * train.mini_batches)
        return done + (train.steps - self.step) * train.mini_batches


def go_on(
    before: Before,
    config: Config,
    student: Student,
    horizon: Horizon,
    guard: Guard,
    start: Mapping[str, Any],
) -> dict[str, Any]:
    """Load a run's checkpoint into what it is made of.

    Args:
        start: `resume.start_of` this start.

    Returns:
        The state that is left: `prompts_consumed`, `rollouts`, and `best` if the evaluation is the
        same.

    Raises:
        ValueError: see `saving.load`.
    """
    if not before.step:
        return {"prompts_consumed": 0}
    directory = Path(config.run.dir) / "checkpoints"
    with watchdog.file_io():
        state = saving.load(directory, before.step, student, config.checkpoint.trust)
    student.version = before.step
    horizon.load(state.get("horizon", {}))
    if "guard" in state:
        guard.load(state["guard"])
    if "start" in state:
        if resume.loss_level(state["start"]) != resume.loss_level(start):
            guard.forget()
        if state.get("best") and resume.evaluation(state["start"]) != resume.evaluation(start):
            logger.info("eval: another evaluation than before; the best checkpoint is sought anew")
            state["best"] = None
    return state
