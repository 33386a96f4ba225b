"""TA-OPD (arXiv 2605.26844), one step after the other."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from megatron_taopd import batching, checkpoint
from megatron_taopd.config import Config
from megatron_taopd.evaluation import Evaluation
from megatron_taopd.models.weights import save_hf
from megatron_taopd.monitor import Monitor
from megatron_taopd.prompts import Prompts, PromptStream
from megatron_taopd.rollout.engine import RolloutEngine, Sampling
from megatron_taopd.scoring import Heads, score
from megatron_taopd.selection import select, selection_metrics
from megatron_taopd.student import Student
from megatron_taopd.teacher.megatron import MegatronTeacher
from megatron_taopd.training import train_on
from megatron_taopd.types import RolloutBatch


@dataclass
class Run:
    """What a run is made of; `train.build` puts it together."""

    config: Config
    student: Student
    teacher: MegatronTeacher
    heads: Heads | None  # on the student's last pipeline stage
    engine: RolloutEngine
    sampling: Sampling
    prompts: Prompts
    stream: PromptStream
    evaluate: Callable[[int], Evaluation] | None
    monitor: Monitor
    first_step: int
    interrupted: Callable[[], bool]


def distill(run: Run) -> None:
    """Distil until `train.steps` are done, or until someone interrupts."""
    config, student, monitor = run.config, run.student, run.monitor
    teacher_fingerprint = run.teacher.fingerprint()
    step = run.first_step
    if run.first_step == 0 and config.eval.at_start:
        monitor.log(0, _evaluation(run, 0))

    for step in range(run.first_step + 1, config.train.steps + 1):
        with monitor.span("step"):
            with monitor.span("rollout"):
                batch = rollout(run, step)
            metrics = learn(run, batch, step)
            with monitor.span("sync"):
                run.engine.update_weights(student.named_tensors(), version=step)
        metrics |= rollout_metrics(batch, monitor.seconds("rollout"))

        last = step == config.train.steps or run.interrupted()
        if last or _due(step, config.eval.every):
            metrics |= _evaluation(run, step)
        if last or _due(step, config.checkpoint.every):
            if run.teacher.fingerprint() != teacher_fingerprint:
                raise RuntimeError(f"step {step}: the teacher's weights have changed")
            with monitor.span("checkpoint"):
                _save(run, step)
        monitor.log(step, metrics)
        if last:
            break

    if step == config.train.steps and config.checkpoint.export_hf:
        save_hf(student.named_tensors(), config.student.path, f"{config.run.dir}/student")


def rollout(run: Run, step: int) -> RolloutBatch:
    """The student's responses to the next prompts."""
    indices = run.stream.take(run.config.rollout.prompts)
    prompts = [run.prompts.token_ids[i] for i in indices]
    return run.engine.generate(prompts, indices, step, run.sampling)


def learn(run: Run, batch: RolloutBatch, step: int) -> dict[str, float]:
    """Score every response row, keep the teachable ones, and train on those."""
    config, student, layout = run.config, run.student, run.student.layout
    selection, tokens = config.selection, config.train.micro_batch_tokens
    everything = torch.ones(batch.num_rows, dtype=torch.bool)
    assigned = batching.assign(batch, everything, layout, tokens)

    with run.monitor.span("teacher"):
        teacher_rows = run.teacher.hidden_states(batch, layout, assigned.owner)
    with run.monitor.span("scoring"):
        scores, gap = score(batch, assigned, student, run.heads, teacher_rows, selection.k)
    with run.monitor.span("selection"):
        seed = config.run.seed * 1_000_003 + step
        mask = select(selection.selector, scores, selection.ratio, seed)
    with run.monitor.span("training"):
        trained = train_on(
            batch, mask, assigned.owner, student, run.heads, teacher_rows, tokens,
            config.train.mini_batches, vars(config.loss),
        )  # fmt: skip
    return {
        **trained,
        **selection_metrics(selection.selector, scores, mask, batch.cu_rows, seed),
        "rollout/logprob_gap_mean": gap.mean().item(),
        "rollout/logprob_gap_max": gap.max().item(),
    }


def rollout_metrics(batch: RolloutBatch, seconds: float) -> dict[str, float]:
    lengths = batch.response_lengths.double()
    return {
        "valid_rows": batch.num_rows,
        "tokens_rolled_out": int(batch.lengths.sum()),
        "rollout/response_length_mean": lengths.mean().item(),
        "rollout/truncated_share": batch.truncated.double().mean().item(),
        "rollout/tokens_per_second": batch.num_rows / max(seconds, 1e-9),
        "rollout/weight_version": batch.weight_version,
    }


def _evaluation(run: Run, step: int) -> dict[str, float]:
    if run.evaluate is None:
        return {}
    with run.monitor.span("eval"):
        evaluation = run.evaluate(step)
    return {
        "eval/accuracy": evaluation.accuracy,
        "eval/truncated_share": evaluation.truncated / evaluation.total,
        "eval/response_length_mean": evaluation.mean_length,
    }


def _save(run: Run, step: int) -> None:
    config = run.config.checkpoint
    state = {"prompts_consumed": run.stream.consumed}
    checkpoint.save(f"{run.config.run.dir}/checkpoints", step, run.student, state, config.keep)


def _due(step: int, every: int) -> bool:
    return every > 0 and step % every == 0
