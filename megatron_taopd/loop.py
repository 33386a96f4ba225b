"""TA-OPD (arXiv 2605.26844), one step after the other."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from megatron_taopd.checkpoints import saving as checkpoint
from megatron_taopd.config import Config
from megatron_taopd.data import batching
from megatron_taopd.evaluation.in_loop import Evaluation
from megatron_taopd.models.replay import kept_bytes
from megatron_taopd.models.student import Student
from megatron_taopd.models.weights import save_hf
from megatron_taopd.monitoring.accounting import ModelCost, step_operations
from megatron_taopd.monitoring.guard import Broken, Fault, Guard
from megatron_taopd.monitoring.metrics import rollout_metrics
from megatron_taopd.monitoring.monitor import Monitor
from megatron_taopd.monitoring.report import Sample, sample_rollouts
from megatron_taopd.parallel import watchdog
from megatron_taopd.parallel.exchange import RowShard
from megatron_taopd.parallel.memory import rank_memory
from megatron_taopd.parallel.vocab import logits_bytes
from megatron_taopd.rollout.engine import Pending, RolloutEngine
from megatron_taopd.rollout.schedule import RolloutSchedule
from megatron_taopd.step.extensions.horizon import Horizon
from megatron_taopd.step.scoring import OutputHeads, TopkOutputHeads, score
from megatron_taopd.step.selection import budget, select, selection_metrics
from megatron_taopd.step.teachability import learnable_disagreement
from megatron_taopd.step.training import train_on
from megatron_taopd.teacher.dispatch import ReadRows, dispatch
from megatron_taopd.teacher.megatron import MegatronTeacher
from megatron_taopd.teacher.sglang import SGLangTeacher, SGLangTopkTeacher
from megatron_taopd.types import RolloutBatch, Sequences

ENDLESS = 0.95  # the share of responses without an end above which a run says so


class Interrupted(Exception):
    """Someone asked the run to end."""


@dataclass
class Run:
    """What a run is made of; `train.build` puts it together."""

    config: Config
    student: Student
    teacher: MegatronTeacher | SGLangTeacher | SGLangTopkTeacher
    read: Callable[[RolloutBatch], tuple[Sequences, dict[str, float]]]  # what the teacher reads
    heads: OutputHeads | TopkOutputHeads | None  # on the student's last pipeline stage
    chunk_rows: int  # that fit train.head_memory_mib
    engine: RolloutEngine
    rollouts: RolloutSchedule
    horizon: Horizon
    guard: Guard
    costs: tuple[ModelCost, ModelCost]  # of student and teacher
    tokenizer: PreTrainedTokenizerBase
    evaluate: Callable[[int], Evaluation] | None
    monitor: Monitor
    first_step: int
    interrupted: Callable[[], bool]
    checkpoints: checkpoint.Checkpoints
    start: dict  # `resume.start_of` its configuration, which its checkpoints hold


def distill(run: Run) -> int:
    """Distil until `train.steps` are done, or until someone interrupts; the steps done.

    Raises:
        Broken: there is no use in going on.
        NotSaved: it is done or interrupted, but its last checkpoint could not be written.
    """
    config, student, monitor = run.config, run.student, run.monitor
    teacher_fingerprint = run.teacher.fingerprint()
    done = run.first_step
    if done == 0 and config.eval.at_start:
        monitor.log(0, _evaluation(run, 0))

    for step in range(run.first_step + 1, config.train.steps + 1):
        watchdog.at_step(step)
        consumed = run.rollouts.consumed
        try:
            with monitor.span("step"):
                metrics, samples = take_step(run, step)
        except Interrupted:
            # Nothing has been learned from this step's prompts: it will be done again.
            run.rollouts.rewind(consumed)
            _save(run, done, last=True)
            run.checkpoints.check()
            return done
        done = step
        run.checkpoints.poll()
        jumped = run.guard.jumped
        if jumped:  # where the next start compares losses with those that it finds
            run.guard.forget()
            run.checkpoints.keep += 1  # the student from before them stays, too
        elif run.guard.exhausted:
            run.checkpoints.finish()
            monitor.log(step, metrics)
            raise Broken(
                f"step {step}: guard.max_skipped: {config.guard.max_skipped} steps in a row were "
                "skipped, for what the lines above say; mend it, and the same command goes on from "
                "the last checkpoint"
            )
        finished = step == config.train.steps
        last = finished or run.interrupted() or jumped
        if finished or _due(step, config.eval.every):
            metrics |= _evaluation(run, step)
        accuracy = metrics.get("eval/accuracy") if config.checkpoint.keep_best else None
        is_best = accuracy is not None and run.checkpoints.would_be_best(accuracy)
        save = last or is_best or _due(step, config.checkpoint.every)
        if (save or _due(step, config.guard.teacher_every)) and (
            run.teacher.fingerprint() != teacher_fingerprint
        ):
            run.checkpoints.finish()
            raise Broken(f"step {step}: {config.teacher.path}: the teacher's weights have changed")
        if save:
            with monitor.span("checkpoint"):
                _save(run, step, last, accuracy)
        monitor.log(step, metrics | run.checkpoints.metrics() | rank_memory())
        if last:
            monitor.write_report(samples())
        if jumped:
            raise Broken(_of_jumps(run, step))
        if last:
            break

    if done == config.train.steps and config.checkpoint.export_hf:
        out = f"{config.run.dir}/student"
        save_hf(student.named_tensors(), config.student.path, out, student.dtype)
    run.checkpoints.check()
    return done


def take_step(run: Run, step: int) -> tuple[dict[str, float], Callable[[], list[Sample]]]:
    """One step of the method: its metrics, and a function that picks samples for the report."""
    config, student, layout, span = run.config, run.student, run.student.layout, run.monitor.span

    def phase(name: str):
        """Before the student changes, an interrupted run need not finish the step."""
        if run.interrupted():
            raise Interrupted
        return span(name)

    # The student answers the next prompts, and the teacher reads each answer once it is there …
    with phase("rollout"):
        begun = run.rollouts.take(step)
    parts = read_parts(run, begun.pending, phase)
    batch = begun.pending.result()
    run.engine.offload()
    run.rollouts.run_ahead(step)
    everything = torch.ones(batch.num_rows, dtype=torch.bool)
    assigned = batching.assign(batch, everything, layout, config.train.micro_batch_tokens)

    with span("teacher"):
        teacher_inputs, teacher_input_metrics = run.read(batch)
        teacher_rows = dispatch(parts, batch, layout, assigned.owner)

    # … and it learns from what the teacher makes of it, unless the numbers mean nothing.
    metrics, samples, fault = {}, lambda: None, None
    try:
        metrics, samples = learn(
            run, step, batch, assigned, teacher_rows, teacher_inputs, begun.length, phase
        )
        if not metrics["kept_rows"]:
            fault = Fault(f"no row of step {step} is kept", key="selection.selector")
    except Fault as raised:
        fault = raised
    student.version = step
    with span("rollout"):
        run.rollouts.settle()
    with span("sync"):
        run.engine.update_weights(student.named_tensors(), version=step)
    metrics |= run.teacher.metrics() | teacher_input_metrics | run.engine.metrics()
    return metrics | observe(run, step, fault, batch), samples


def learn(
    run: Run,
    step: int,
    batch: RolloutBatch,
    assigned: batching.Assignment,
    teacher_rows: RowShard,
    teacher_inputs: Sequences,
    length: int,
    phase: Callable,
) -> tuple[dict[str, float], Callable[[], list[Sample]]]:
    """One batch, scored and trained on: what `take_step` returns.

    Raises:
        Fault: its numbers mean nothing. What it has taken of `mini_batches` stays.
    """
    config, student, span = run.config, run.student, run.monitor.span
    if not batch.num_rows:
        raise Fault("no response has a token", key="rollout")

    # Each response row gets its D, C and H (Eq. 3–5) …
    with phase("scoring"):
        replay = config.train.schedule == "replay" and replay_fits(run, assigned)
        scores, gap, kept_outputs = score(
            batch, assigned, student, run.heads, teacher_rows, config.selection.k, replay
        )

    # … of which the ⌈ρ|I|⌉ most teachable of the whole batch are kept (Eq. 12–13) …
    with phase("selection"):
        selector, seed = config.selection.selector, config.run.seed * 1_000_003 + step
        mask = select(
            selector,
            scores,
            config.selection.ratio,
            seed,
            config.selection.concentrate,
            batch.cu_rows,
        )
        warn_of_small_q3(run, mask, step)

    # … and the loss falls on these alone (Eq. 6–7).
    with span("training"):
        metrics = train_on(
            batch,
            mask,
            assigned,
            student,
            run.heads,
            teacher_rows,
            config.train.micro_batch_tokens,
            config.train.mini_batches,
            vars(config.loss),
            run.guard,
            kept_outputs,
        )

    teachability = learnable_disagreement(scores.disagreement, scores.compatibility)
    metrics |= run.horizon.observe(batch, teachability, length)
    metrics |= selection_metrics(selector, scores, mask, batch.cu_rows, seed)
    metrics |= rollout_metrics(batch, gap, step)
    warn_of_gap(run, gap, step)
    if length == config.rollout.max_new_tokens:  # a shorter horizon cuts them on purpose
        warn_of_endless(
            run, "rollout.max_new_tokens", metrics["rollout/truncated_share"], f"step {step}"
        )
    replayed = kept_outputs is not None
    metrics |= {"train/replayed": int(replayed)}
    metrics |= head_memory(run, assigned, metrics.pop("head_rows"))
    everything = torch.ones(batch.num_rows, dtype=torch.bool)
    metrics |= step_operations(
        *run.costs,
        assigned.lengths,
        batching.cut_lengths(teacher_inputs, everything),
        batching.cut_lengths(batch, mask),
        batch.num_rows,
        int(mask.sum()),
        replayed,
        config.train.recompute,
    )
    return metrics, lambda: sample_rollouts(batch, mask, run.tokenizer, scores=teachability)


def observe(run: Run, step: int, fault: Fault | None, batch: RolloutBatch) -> dict[str, float]:
    """Count a step that was taken or, for a fault, was not; what the log says of it."""
    metrics = run.guard.observe(fault)
    if fault and (line := run.guard.line(fault, batch.prompts)):
        run.monitor.note(fault.key or f"step {step}", line)
    return metrics


def read_parts(run: Run, pending: Pending, phase: Callable) -> list[tuple[Tensor, ReadRows]]:
    """What the teacher makes of the responses, read as they finish or all at the end."""
    finished = pending.parts()
    if not run.config.rollout.stream:
        with phase("rollout"):
            batch = pending.result()
        finished = iter([(torch.arange(batch.num_sequences), batch)])
    read = []
    with run.teacher.resident():
        while True:
            with phase("rollout"):
                places, part = next(finished, (None, None))
            if part is None:
                return read
            with run.monitor.span("teacher"):
                teacher_inputs, _ = run.read(part)
                read.append((places, run.teacher.read(teacher_inputs)))


def replay_fits(run: Run, assigned: batching.Assignment) -> bool:
    """Whether the layers' outputs of this batch fit their budget on every rank."""
    tokens = torch.zeros(run.student.layout.dp, dtype=torch.int64)
    most = int(tokens.index_add(0, assigned.owner, assigned.lengths).max())
    needed = kept_bytes(run.student.trunk, most) / 2**20
    budget = run.config.train.replay_memory_mib
    if needed > budget:
        run.monitor.note(
            "train.replay_memory_mib",
            f"{budget} is less than the {needed:.0f} MiB of a step's layer outputs; such steps are "
            "done in two passes",
        )
    return needed <= budget


def head_memory(run: Run, scored: batching.Assignment, trained_rows: int) -> dict[str, int]:
    """Bytes of logits that exist at a time in both passes over the heads, on rank 0's rows."""
    shard = run.student.shard
    columns = shard.stop - shard.start
    scored_rows = max(len(m.rows) for m in scored.micro_batches)
    return {
        "memory/head_scoring": logits_bytes(scored_rows, run.chunk_rows, columns),
        "memory/head_training": logits_bytes(trained_rows, run.chunk_rows, columns),
    }


def warn_of_gap(run: Run, gap: Tensor, step: int) -> None:
    """Of an engine that samples from another policy than it should; ahead, it is an older one."""
    mean, most = gap.mean().item(), run.config.rollout.gap_warning
    if mean > most and not run.config.rollout.ahead:
        run.monitor.note(
            "rollout.gap_warning",
            f"step {step}: engine and trainer differ by {mean:.3g} in log-probability on average, "
            f"more than {most:g}",
        )


def warn_of_endless(run: Run, key: str, truncated_share: float, when: str) -> None:
    """Of responses that hardly ever end by themselves."""
    if truncated_share > ENDLESS:
        run.monitor.note(
            key,
            f"{when}: {truncated_share:.0%} of the responses were cut off at this length; give "
            "more, or name in rollout.stop_token_ids what ends an answer",
        )


def warn_of_small_q3(run: Run, mask: Tensor, step: int) -> None:
    """Of masks inside Q3 that are all of it, and so equal one another."""
    selection = run.config.selection
    if not selection.selector.startswith("q3_"):
        return
    most, kept = budget(selection.ratio, len(mask)), int(mask.sum())
    if kept < most:
        run.monitor.note(
            "selection.ratio",
            f"step {step}: {selection.selector} could keep {most} rows, but Q3 has {kept}: all of "
            "them are kept, as by every q3 selector; a lower ratio or more prompts tell them apart",
        )


def _evaluation(run: Run, step: int) -> dict[str, float]:
    if run.evaluate is None:
        return {}
    with run.monitor.span("eval"):
        evaluation = run.evaluate(step)
    run.monitor.examples = evaluation.examples
    truncated_share = evaluation.truncated / evaluation.total
    longest = "rollout" if run.config.eval.max_new_tokens is None else "eval"
    warn_of_endless(run, f"{longest}.max_new_tokens", truncated_share, f"evaluation {step}")
    return {
        "eval/accuracy": evaluation.accuracy,
        "eval/truncated_share": truncated_share,
        "eval/response_length_mean": evaluation.mean_length,
        **{f"eval/pass_at_{k}": value for k, value in evaluation.pass_at.items()},
    }


def _save(run: Run, step: int, last: bool, accuracy: float | None = None) -> None:
    """A checkpoint of the run after this many steps; of none there is nothing to save."""
    if step == 0:
        return
    if fault := run.student.broken_weights():
        run.checkpoints.finish()
        raise Broken(f"step {step} is not saved: {fault.describe()}")
    train = run.config.train
    state = {
        "prompts_consumed": run.rollouts.consumed,
        "horizon": run.horizon.state(),
        "guard": run.guard.state(),
        "schedule_step": run.student.last_step - (train.steps - step) * train.mini_batches,
        "num_prompts": len(run.rollouts.token_ids),
        "start": run.start,
    }
    run.checkpoints.save(step, run.student, state, accuracy)
    if last:
        run.checkpoints.finish()


def _of_jumps(run: Run, step: int) -> str:
    """What ended a run whose losses have jumped, and how it goes on."""
    saved = checkpoint.path(run.checkpoints.directory, step)
    on = (
        f"the same command goes on with {saved} and takes such losses for usual; if they are not, "
        "remove that directory and it goes on from the one before"
    )
    return (
        f"step {step}: guard.loss_spike: {run.config.guard.max_skipped} losses in a row were more "
        f"than {run.config.guard.loss_spike:g} times the usual one; {run.checkpoints.failure or on}"
    )


def _due(step: int, every: int) -> bool:
    return every > 0 and step % every == 0
