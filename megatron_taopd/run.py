"""What a run is made of, and all that it does between two steps: evaluate, save, log, end."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass

from megatron_taopd.checkpoints import saving
from megatron_taopd.checkpoints.end import mark_finished
from megatron_taopd.checkpoints.saving import Checkpoints
from megatron_taopd.config.schema import Config, teacher_name
from megatron_taopd.evaluation.in_loop import Evaluation
from megatron_taopd.models.student import Student
from megatron_taopd.models.weights import save_hf
from megatron_taopd.monitoring.model_card import model_card
from megatron_taopd.monitoring.monitor import Monitor
from megatron_taopd.monitoring.observer import Observer, Samples
from megatron_taopd.monitoring.profiling import StepProfiler
from megatron_taopd.parallel.faults import Fault
from megatron_taopd.parallel.memory import rank_memory
from megatron_taopd.parallel.objects import on_rank_0
from megatron_taopd.rollout.engine import RolloutEngine
from megatron_taopd.rollout.schedule import Begun, Rollouts
from megatron_taopd.step.distiller import Distiller, Lesson
from megatron_taopd.step.guard import Broken, Guard
from megatron_taopd.teacher.teachers import Inputs, inputs_metrics


class Interrupted(Exception):
    """Someone asked the run to end."""


@dataclass
class Run:
    """What a run is made of; `build.build` puts it together.

    Attributes:
        evaluate: accuracy of the student after a step; None without `eval.prompts`.
        first_step: steps that were done before this start.
        interrupted: whether any rank was signalled, the same on every rank; collective.
        start: `resume.start_of` the configuration, which checkpoints hold.
        profiler: of single steps.
    """

    config: Config
    distiller: Distiller
    engine: RolloutEngine
    rollouts: Rollouts
    observer: Observer
    evaluate: Callable[[int], Evaluation] | None
    monitor: Monitor
    checkpoints: Checkpoints
    first_step: int
    interrupted: Callable[[], bool]
    start: dict
    profiler: StepProfiler

    @property
    def student(self) -> Student:
        return self.distiller.student

    @property
    def guard(self) -> Guard:
        return self.distiller.guard

    def seed_of(self, step: int) -> int:
        """Return a seed of this step's own."""
        return self.config.run.seed * 1_000_003 + step

    def phase(self, name: str) -> AbstractContextManager:
        """Name a part of a step; while the student is unchanged, an interruption ends it there.

        Raises:
            Interrupted: on every rank alike. Collective: see `interrupted`.
        """
        # Not between the teacher's last answer and its rows' delivery: a poll is a collective.
        if name not in ("teacher", "training") and self.interrupted():
            raise Interrupted
        return self.monitor.span(name)

    def begin(self) -> None:
        """Take the teachers' fingerprints, and evaluate a student that has learned nothing yet."""
        self._fingerprints = self.distiller.teachers.fingerprints()
        if self.first_step == 0 and self.config.eval.at_start:
            self.monitor.log(0, self._evaluate(0))

    def observe(
        self,
        step: int,
        begun: Begun,
        read: list[Inputs],
        lesson: Lesson | None,
        fault: Fault | None,
    ) -> tuple[dict[str, float], Samples]:
        """Say all there is to say of a step: its metrics, warnings, samples for the report.

        Args:
            read: what the teachers have read of the batch.
            lesson, fault: what the student was taught, or why it was not.
        """
        batch, metrics = begun.pending.result(), {}
        samples: Samples = None
        teachers = self.distiller.teachers
        if lesson is not None:
            metrics, samples = self.observer.observe(step, begun.length, lesson, read)
            if not metrics["kept_rows"]:
                fault = Fault(f"no row of step {step} is kept", key="selection.selector")
        metrics |= teachers.metrics() | inputs_metrics(read) | self.engine.metrics()
        metrics |= self.guard.observe(fault)
        if fault and (line := self.guard.line(fault, batch.prompts)):
            self.monitor.note(fault.key or f"step {step}", line)
        return metrics, samples

    def conclude(self, step: int, metrics: dict[str, float], samples: Samples) -> bool:
        """Evaluate and save if it is time, write the log; return whether this was the last step.

        Raises:
            Broken: too many steps in a row were skipped, or a model is not what it was.
        """
        config, checkpoints, guard = self.config, self.checkpoints, self.guard
        checkpoints.poll()
        metrics |= self.observer.throughput(metrics)
        jumped = guard.jumped
        if jumped:  # where the next start compares losses with those that it finds
            guard.forget()
            checkpoints.keep += 1  # the student from before them stays, too
        elif guard.exhausted:
            checkpoints.finish()
            self.monitor.log(step, metrics)
            raise Broken(
                f"step {step}: guard.max_skipped: {config.guard.max_skipped} steps in a row were "
                "skipped, for what the lines above say; mend it, and the same command goes on from "
                "the last checkpoint"
            )
        finished = step == config.train.steps
        last = finished or self.interrupted() or jumped
        if finished or _due(step, config.eval.every):
            metrics |= self._evaluate(step)
        accuracy = metrics.get("eval/accuracy") if config.checkpoint.keep_best else None
        is_best = accuracy is not None and checkpoints.would_be_best(accuracy)
        save = last or is_best or _due(step, config.checkpoint.every)
        if save or _due(step, config.guard.teacher_every):
            self._check_teacher(step)
        if save:
            with self.monitor.span("checkpoint"):
                self._save(step, last, metrics, accuracy)
        self.monitor.keep_tokens(samples, newest=last or "eval/accuracy" in metrics)
        self.monitor.log(step, metrics | checkpoints.metrics() | rank_memory())
        if jumped:
            raise Broken(self._about_jumps(step))
        return last

    def save_last(self, done: int) -> None:
        """Save a run that someone interrupted after so many steps.

        Raises:
            NotSaved: it could not be written.
        """
        self._save(done, last=True, metrics={})
        self.checkpoints.check()

    def finish(self, done: int) -> None:
        """Write the student of a run that is done, see that its last checkpoint is there, note it.

        Raises:
            NotSaved: it is not.
        """
        config, student = self.config, self.student
        exports = done == config.train.steps and config.checkpoint.export_hf
        if exports:
            out = f"{config.run.dir}/student"
            save_hf(
                student.named_tensors(),
                config.student.path,
                out,
                student.dtype,
                card=self._card(done),
            )
        self.checkpoints.check()
        if done >= config.train.steps:
            on_rank_0(lambda: mark_finished(config.run.dir, done, exports))

    def close(self) -> None:
        """Stop what outlives a run: servers, writers, threads."""
        self.engine.close()
        self.distiller.teachers.close()
        self.monitor.close()
        self.checkpoints.close()

    def _evaluate(self, step: int) -> dict[str, float]:
        if self.evaluate is None:
            return {}
        with self.monitor.span("eval"):
            evaluation = self.evaluate(step)
        self.monitor.keep_answers(step, evaluation.examples)
        self.monitor.keep_outcome(step, evaluation.per_prompt, evaluation.samples)
        return self.observer.observe_evaluation(step, evaluation)

    def _check_teacher(self, step: int) -> None:
        now = self.distiller.teachers.fingerprints()
        for key, section in self.config.each_teacher.items():
            name = teacher_name(key)
            if now[name] != self._fingerprints[name]:
                self.checkpoints.finish()
                raise Broken(f"step {step}: {section.path}: the teacher's weights have changed")

    def _card(self, step: int, metrics: Mapping[str, float] | None = None) -> str:
        """Write the student's model card, with the metrics of this step where it is not logged."""
        records = [*self.monitor.records]
        if metrics:
            records.append({"step": step, **metrics})
        return model_card(self.config, records, step, self.rollouts.stream.num_prompts)

    def _save(
        self,
        step: int,
        last: bool,
        metrics: Mapping[str, float],
        accuracy: float | None = None,
    ) -> None:
        """Save a checkpoint of the run after this many steps; of none there is nothing to save.

        Args:
            metrics: of this step, if it is not logged yet.
            accuracy: of this step, if it decides which checkpoint is the best.
        """
        if step == 0:
            return
        if fault := self.student.broken_weights():
            self.checkpoints.finish()
            raise Broken(f"step {step} is not saved: {fault.describe()}")
        train = self.config.train
        state = {
            "prompts_consumed": self.rollouts.consumed,
            "rollouts": self.rollouts.state(),
            "horizon": self.observer.horizon.state(),
            "guard": self.guard.state(),
            "schedule_step": self.student.last_step - (train.steps - step) * train.mini_batches,
            "num_prompts": self.rollouts.stream.num_prompts,
            "start": self.start,
        }
        card = self._card(step, metrics)
        self.checkpoints.save(step, self.student, state, accuracy, card)
        if last:
            self.checkpoints.finish()

    def _about_jumps(self, step: int) -> str:
        """Say what ended a run whose losses have jumped, and how it goes on."""
        saved, section = saving.path(self.checkpoints.directory, step), self.config.guard
        on = (
            f"the same command goes on with {saved} and takes such losses for usual; if they are "
            "not, remove that directory and it goes on from the one before"
        )
        return (
            f"step {step}: guard.loss_spike: {section.max_skipped} losses in a row were more than "
            f"{section.loss_spike:g} times the usual one; {self.checkpoints.failure or on}"
        )


def _due(step: int, every: int) -> bool:
    return every > 0 and step % every == 0
