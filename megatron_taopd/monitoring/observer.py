"""What the log says of a step: its metrics, and warnings of what looks wrong."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from torch import Tensor
from transformers import PreTrainedTokenizerBase

from megatron_taopd.config.schema import Config, teacher_name
from megatron_taopd.evaluation.in_loop import Evaluation
from megatron_taopd.models.student import FrozenStudent
from megatron_taopd.monitoring.accounting import ModelCost, Work, added, step_operations
from megatron_taopd.monitoring.metrics import rollout_metrics, source_metrics
from megatron_taopd.monitoring.monitor import Monitor
from megatron_taopd.monitoring.samples import Snapshot, take
from megatron_taopd.monitoring.throughput import Devices, device_peak, throughput
from megatron_taopd.parallel import platform
from megatron_taopd.parallel.vocab import logits_bytes
from megatron_taopd.step.distiller import Lesson, replay_mib
from megatron_taopd.step.extensions.horizon import Horizon
from megatron_taopd.step.scoring import ScoredBatch
from megatron_taopd.step.selection import budget
from megatron_taopd.step.training import OF_REFERENCES
from megatron_taopd.teacher.teachers import Inputs
from megatron_taopd.types import WantedRows

ENDLESS = 0.95  # the share of responses without an end above which a run says so

Samples = Callable[[], Snapshot | None] | None  # looks at a step's tokens, for the report


class Observer:
    """Looks at steps and evaluations of a run.

    Args:
        horizon: learns from each batch how long the next may be.
        costs: of the student, and of each teacher by its number.
        devices: of the run.
    """

    def __init__(
        self,
        config: Config,
        student: FrozenStudent,
        costs: tuple[ModelCost, list[ModelCost]],
        horizon: Horizon,
        tokenizer: PreTrainedTokenizerBase,
        monitor: Monitor,
        devices: Devices,
    ):
        self.config, self.student, self.costs = config, student, costs
        self.horizon, self.tokenizer, self.monitor = horizon, tokenizer, monitor
        self.devices, self.peak_tflops = devices, config.log.peak_tflops
        if self.peak_tflops is None and (name := platform.device_name()):
            self.peak_tflops = device_peak(name, config.train.precision)

    def observe(
        self, step: int, length: int, lesson: Lesson, read: Sequence[Inputs]
    ) -> tuple[dict[str, float], Samples]:
        """Return a step's metrics and what looks at its tokens; warn of what looks wrong.

        Args:
            length: the longest response that was allowed.
            read: what the teachers have read of the batch.
        """
        scored, selection, config = lesson.scored, lesson.selection, self.config
        batch, scores = scored.batch, scored.scores
        metrics = dict(lesson.trained)
        head_rows = metrics.pop("head_rows")
        metrics |= self.horizon.observe(batch, scores.learnable, length, scores.held)
        metrics |= selection.metrics
        metrics |= rollout_metrics(batch, scored.gap, step)
        if OF_REFERENCES in metrics:
            of_data = metrics.pop(OF_REFERENCES)
            metrics |= source_metrics(batch, selection.kept.counts, metrics["loss"], of_data)
        metrics |= {"train/replayed": int(scored.kept_outputs is not None)}
        metrics |= self._head_memory(scored, head_rows)
        work = {each.teacher: _work(lesson, each, config.train.recompute) for each in read}
        student, teachers = self.costs
        metrics |= added(step_operations(student, teachers[t], done) for t, done in work.items())
        metrics |= {
            "tokens_read": sum(int(done.read.sum()) for done in work.values()),
            "tokens_scored": int(scored.assigned.lengths.sum()),
        }
        self._warn_of_replay(scored)
        self._warn_of_small_q3(batch.num_rows, selection.kept.num_rows, step)
        self._warn_of_gap(scored.gap, step)
        truncated = metrics.get("rollout/truncated_share", 0.0)  # nothing, where none is generated
        if length == config.rollout.max_new_tokens:  # a shorter horizon cuts them on purpose
            self._warn_of_endless("rollout.max_new_tokens", truncated, f"step {step}")
        tokenizer, count = self.tokenizer, config.log.samples
        return metrics, lambda: take(step, batch, selection, tokenizer, count)

    def throughput(self, metrics: Mapping[str, float]) -> dict[str, float]:
        """Return the `perf/*` of a step whose spans have ended; none of one that was skipped."""
        return throughput({**metrics, **self.monitor.times}, self.devices, self.peak_tflops)

    def observe_evaluation(self, step: int, evaluation: Evaluation) -> dict[str, float]:
        """Return an evaluation's metrics, and warn if responses hardly ever end."""
        truncated = evaluation.truncated / evaluation.total
        names = [teacher_name(key) for key in self.config.each_teacher]
        longest = "rollout" if self.config.eval.max_new_tokens is None else "eval"
        self._warn_of_endless(f"{longest}.max_new_tokens", truncated, f"evaluation {step}")
        return {
            "eval/accuracy": evaluation.accuracy,
            "eval/accuracy_low": evaluation.interval[0],
            "eval/accuracy_high": evaluation.interval[1],
            "eval/truncated_share": truncated,
            "eval/response_length_mean": evaluation.mean_length,
            **{f"eval/pass_at_{k}": value for k, value in evaluation.pass_at.items()},
            **{f"eval/accuracy/{names[t]}": share for t, share in evaluation.by_teacher.items()},
        }

    def _head_memory(self, scored: ScoredBatch, trained_rows: int) -> dict[str, int]:
        """Return the bytes of logits that exist at a time in both passes, on rank 0's rows."""
        columns = self.student.shard.stop - self.student.shard.start
        chunk_rows = self.student.rows_within(self.config.train.head_memory_mib)
        scored_rows = scored.assigned.most_rows(WantedRows.all(scored.batch))
        return {
            "memory/head_scoring": logits_bytes(scored_rows, chunk_rows, columns),
            "memory/head_training": logits_bytes(trained_rows, chunk_rows, columns),
        }

    def _warn_of_replay(self, scored: ScoredBatch) -> None:
        """Warn of steps that were to be replayed and did not fit."""
        train = self.config.train
        if train.schedule == "replay" and scored.kept_outputs is None:
            needed = replay_mib(self.student, scored.assigned)
            self.monitor.note(
                "train.replay_memory_mib",
                f"{train.replay_memory_mib} is less than the {needed:.0f} MiB of a step's layer "
                "outputs; such steps are done in two passes",
            )

    def _warn_of_gap(self, gap: Tensor, step: int) -> None:
        """Warn of an engine that samples from another policy; ahead, it is an older one."""
        gap = gap[~gap.isnan()]  # of references
        mean, most = gap.mean().item(), self.config.rollout.gap_warning
        if mean > most and not self.config.rollout.ahead:
            self.monitor.note(
                "rollout.gap_warning",
                f"step {step}: engine and trainer differ by {mean:.3g} in log-probability on "
                f"average, more than {most:g}",
            )

    def _warn_of_endless(self, key: str, truncated_share: float, when: str) -> None:
        """Warn of responses that hardly ever end by themselves."""
        if truncated_share > ENDLESS:
            self.monitor.note(
                key,
                f"{when}: {truncated_share:.0%} of the responses were cut off at this length; give "
                "more, or name in rollout.stop_token_ids what ends an answer",
            )

    def _warn_of_small_q3(self, rows: int, kept: int, step: int) -> None:
        """Warn of masks inside Q3 that are all of it, and so equal one another."""
        selection = self.config.selection
        if not selection.selector.startswith("q3_"):
            return
        most = budget(selection.ratio, rows)
        if kept < most:
            self.monitor.note(
                "selection.ratio",
                f"step {step}: {selection.selector} could keep {most} rows, but Q3 has {kept}: all "
                "of them are kept, as by every q3 selector; a lower ratio or more prompts tell "
                "them apart",
            )


def _work(lesson: Lesson, inputs: Inputs, recompute: str) -> Work:
    """Return what was run in a step of a teacher's sequences."""
    scored, kept, own = lesson.scored, lesson.selection.kept, inputs.places
    batch = scored.batch
    return Work(
        scored=scored.assigned.lengths[own],
        read=inputs.sequences.reach(),
        trained=kept.lengths[own],
        num_rows=inputs.sequences.num_rows,
        kept_rows=int(kept.counts[own].sum()),
        replayed=scored.kept_outputs is not None,
        recompute=recompute,
        generated=(batch.response_lengths * ~batch.is_reference)[own],
    )
