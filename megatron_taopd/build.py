"""A run, put together from its configuration: models, heads, servers, engine, prompts, monitor."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
import torch.distributed as dist

from megatron_taopd import config as configuration
from megatron_taopd.parallel import platform, watchdog

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def build(config: configuration.Config, catch_signals: Callable[[], Callable[[], bool]]):
    """Put a run together from its configuration, and resume it if it has a checkpoint.

    Args:
        catch_signals: called when all is built: from then on a signal ends the run in order. What
            it returns tells whether there was one.

    Raises:
        ValueError: something that the run was given is not what it has to be.
    """
    from megatron_taopd.checkpoints import resume
    from megatron_taopd.checkpoints import saving as checkpoint
    from megatron_taopd.data.prompts import PromptStream, load_prompts
    from megatron_taopd.data.vocab_map import VocabMap, Vocabulary
    from megatron_taopd.evaluation.in_loop import evaluate, grade_exactly, grader
    from megatron_taopd.formats.hf import load_config
    from megatron_taopd.loop import Run
    from megatron_taopd.models.student import Student
    from megatron_taopd.monitoring.accounting import ModelCost
    from megatron_taopd.monitoring.monitor import Monitor
    from megatron_taopd.parallel.layout import forward_layout, student_layout
    from megatron_taopd.parallel.objects import on_rank_0
    from megatron_taopd.parallel.vocab import rows_within
    from megatron_taopd.rollout.local import LocalEngine
    from megatron_taopd.rollout.schedule import RolloutSchedule
    from megatron_taopd.step.extensions.horizon import Horizon
    from megatron_taopd.step.guard import Guard
    from megatron_taopd.teacher.megatron import MegatronTeacher

    dtype = DTYPES[config.train.precision]
    rollout, train = config.rollout, config.train
    directory = Path(config.run.dir)
    saved = checkpoint.latest_valid(directory / "checkpoints", say, config.checkpoint.trust)
    first_step, before = saved or 0, {}
    if saved:
        before = resume.kept_run(checkpoint.path(directory / "checkpoints", saved))
    start = on_rank_0(lambda: resume.start_of(configuration.to_tree(config)))
    torch.manual_seed(config.run.seed)
    servers = begin_rollout_servers(config, dtype) if rollout.engine == "sglang" else None
    teacher_servers = None
    if config.teacher.engine == "sglang":
        teacher_servers = begin_teacher_servers(config, dtype)
    student_vocabulary = Vocabulary.from_pretrained(config.student.path)
    teacher_vocabulary = Vocabulary.from_pretrained(config.teacher.path)
    vocab_map = VocabMap.between(
        student_vocabulary.ending_at(rollout.stop_token_ids), teacher_vocabulary
    )
    tokenizer = student_vocabulary.tokenizer
    data = {
        "prompt_column": config.data.prompt_column,
        "template": config.data.template,
        "system": config.data.system,
        "max_prompt_tokens": config.data.max_prompt_tokens,
    }
    prompts = load_prompts(
        config.data.prompts,
        tokenizer,
        answer_column=None,
        limit=config.data.limit,
        teacher_tokenizer=teacher_vocabulary.tokenizer if config.teacher.prompt == "own" else None,
        **data,
    )
    held_out = None
    if config.eval.prompts is not None:
        held_out = load_prompts(
            config.eval.prompts,
            tokenizer,
            answer_column=config.data.answer_column,
            limit=config.eval.limit,
            **data,
        )

    if (known := before.get("num_prompts", len(prompts))) != len(prompts):
        raise ValueError(
            f"data.prompts: {len(prompts)} of {config.data.prompts} fit, and {known} did when "
            f"{directory} was begun: the same versions of transformers and of this package have to "
            "render them, or give another run.dir"
        )

    # The schedule ends with the run, also if mini_batches was another until here.
    last_step = before.get("schedule_step", first_step * train.mini_batches)
    last_step += (train.steps - first_step) * train.mini_batches
    layout = student_layout(**vars(config.student.parallel), seed=config.run.seed)
    student = Student(
        config.student.path,
        layout,
        dtype,
        train.recompute,
        config.optimizer,
        last_step,
        common_vocabulary=vocab_map.size,
        absent=vocab_map.absent,
    )
    chunk_rows = rows_within(train.head_memory_mib << 20, student.shard.stop - student.shard.start)
    if teacher_servers is None:
        teacher = MegatronTeacher(
            config.teacher.path,
            forward_layout(**vars(config.teacher.parallel)),
            dtype,
            train.micro_batch_tokens,
            config.teacher.offload,
        )
    else:
        teacher = sglang_teacher(config, teacher_servers, dtype, vocab_map)
    heads = read_heads(config, student, vocab_map, chunk_rows) if layout.is_last_stage else None

    if servers is None:
        with watchdog.file_io():
            engine = LocalEngine.from_hf(
                config.student.path,
                dtype,
                platform.device(),
                batch_size=rollout.batch_size,
                seed=config.run.seed,
                rank=dist.get_rank(),
                world_size=dist.get_world_size(),
                vocab_size=vocab_map.size,
                eos_token_ids=student_vocabulary.eos_token_ids,
            )
    else:
        ends, size = student_vocabulary.eos_token_ids, vocab_map.size
        engine = sglang_engine(config, servers, student, ends, size, prompts.token_ids, chunk_rows)
    sampling = sampling_of(rollout)

    horizon = Horizon(
        rollout.horizon,
        rollout.max_new_tokens,
        rollout.horizon_floor,
        rollout.horizon_prompt_weight,
    )

    # The loss of sampled_token is no distance: of either sign, and around zero.
    loss_spike = 0 if config.loss.kind == "sampled_token" else config.guard.loss_spike
    guard = Guard(config.guard.max_skipped, loss_spike)

    state = {"prompts_consumed": 0}
    if saved:
        trust = config.checkpoint.trust
        with watchdog.file_io():
            state = checkpoint.load(directory / "checkpoints", first_step, student, trust)
        student.version = first_step
        horizon.load(state.get("horizon", {}))
        if "guard" in state:
            guard.load(state["guard"])
        if "start" in state:
            if resume.loss_level(state["start"]) != resume.loss_level(start):
                guard.forget()
            if state.get("best") and resume.evaluation(state["start"]) != resume.evaluation(start):
                say("eval: another evaluation than before; the best checkpoint is sought anew")
                state["best"] = None
        engine.update_weights(student.named_tensors(), version=first_step)
    monitor = Monitor(
        config.run,
        config.log,
        train.steps,
        rank=dist.get_rank(),
        first_step=first_step + 1 if saved else 0,
        config_yaml=configuration.to_yaml(config),
        synchronize=platform.synchronize,
    )
    say(f"student {layout}, teacher {teacher.layout}, {train.precision}, {platform.device().type}")
    if prompts.dropped:
        say(f"{prompts.dropped} prompts dropped: over data.max_prompt_tokens")
    if saved:
        say(f"resuming after step {first_step}")

    checkpoints = checkpoint.Checkpoints(
        directory / "checkpoints",
        config.checkpoint.keep_last,
        config.checkpoint.asynchronous,
        say,
        saved,
        state.get("best"),
    )

    evaluation = None
    if held_out is not None:
        longest = config.eval.max_new_tokens or rollout.max_new_tokens
        eval_sampling = replace(
            sampling,
            max_new_tokens=longest,
            samples=config.eval.samples,
            temperature=config.eval.temperature,
        )
        grade = grader(config.eval.grader)
        if config.eval.grader == "auto" and grade is grade_exactly:
            say("eval.grader: exact, as Math-Verify is not installed")

        def evaluation(step: int):
            return evaluate(
                engine, held_out, tokenizer, eval_sampling, step, grade, config.eval.pass_at
            )

    return Run(
        config,
        student,
        teacher,
        partial(
            vocab_map.read, prompts=prompts.teacher_token_ids, max_tokens=teacher.longest_sequence
        ),
        heads,
        chunk_rows,
        engine,
        RolloutSchedule(
            engine,
            prompts.token_ids,
            PromptStream(
                len(prompts), config.run.seed, config.data.shuffle, state["prompts_consumed"]
            ),
            rollout.prompts,
            sampling,
            horizon,
            rollout.ahead,
        ),
        horizon,
        guard,
        (ModelCost.of(student.trunk.hf), ModelCost.of(load_config(config.teacher.path))),
        tokenizer,
        evaluation,
        monitor,
        first_step,
        catch_signals(),
        checkpoints,
        start,
    )


def sampling_of(rollout: configuration.RolloutSection):
    """How training responses are drawn."""
    from megatron_taopd.rollout.engine import Sampling

    return Sampling(
        max_new_tokens=rollout.max_new_tokens,
        samples=rollout.samples,
        temperature=rollout.temperature,
        top_p=rollout.top_p,
        top_k=rollout.top_k,
        stop_token_ids=rollout.stop_token_ids,
    )


def begin_rollout_servers(config: configuration.Config, dtype: torch.dtype, **options) -> Future:
    """Start or find the student's servers, on rank 0, while this process does other things."""
    longest = max(config.rollout.max_new_tokens, config.eval.max_new_tokens or 0)
    longest += config.data.max_prompt_tokens
    return begin_servers(config, "rollout", config.student.path, longest, dtype, **options)


def begin_teacher_servers(config: configuration.Config, dtype: torch.dtype) -> Future:
    """The same of the teacher's."""
    from megatron_taopd.serving.hidden_states import HOOK_ARGS

    longest = config.rollout.max_new_tokens + config.data.max_prompt_tokens
    args = HOOK_ARGS if config.teacher.form == "hidden_states" else ()
    path = config.teacher.path
    return begin_servers(config, "teacher", path, longest, dtype, fixed_weights=True, args=args)


def begin_servers(
    config: configuration.Config, whose: str, path: str, longest: int, dtype: torch.dtype, **options
) -> Future:
    """Of (the model that they serve, the replicas on rank 0)."""
    from megatron_taopd.rollout.weight_sync.distributed import in_background
    from megatron_taopd.serving.begin import open_replicas
    from megatron_taopd.serving.model import ServedModel

    model = ServedModel.of(path, longest)
    if dist.get_rank() != 0:
        return in_background(lambda: (model, None))
    section, logs = getattr(config, whose).servers, Path(config.run.dir) / "servers" / whose
    return in_background(lambda: (model, open_replicas(section, model, dtype, logs, **options)))


def ready(servers: Future, key: str):
    """The model and its replicas; ValueError on every rank if they do not serve."""
    from megatron_taopd.parallel.objects import on_rank_0

    try:
        on_rank_0(lambda: servers, tell=False)
    except (RuntimeError, ValueError) as error:
        raise ValueError(f"{key}: {error}") from error
    model, replicas = servers.result()
    for remark in replicas.remarks if replicas else ():
        say(f"{key}: {remark}")
    return model, replicas


def sglang_teacher(config, servers: Future, dtype: torch.dtype, vocab_map):
    """The teacher on servers that were begun."""
    from megatron_taopd.formats.output_head import find_head
    from megatron_taopd.teacher.sglang import SGLangTeacher, SGLangTopkTeacher, student_ids_of

    model, replicas = ready(servers, "teacher.servers")
    if config.teacher.form == "hidden_states":
        return SGLangTeacher(replicas, model, find_head(model.path).shape[1], dtype)
    say(
        f"teacher.form: topk; D, C and the teacher's entropy are lower bounds from its "
        f"{config.teacher.topk} likeliest tokens (Eq. 17)"
    )
    student_ids = None
    if not vocab_map.is_identity:
        student_ids = student_ids_of(vocab_map.teacher_ids, model.vocab_size)
    return SGLangTopkTeacher(replicas, model, config.teacher.topk, student_ids)


def read_heads(config, student, vocab_map, chunk_rows: int):
    """What the last stage scores and trains with."""
    from megatron_taopd.models import weights
    from megatron_taopd.step.scoring import OutputHeads, TopkOutputHeads

    shard = student.shard
    if config.teacher.engine == "sglang" and config.teacher.form == "topk":
        return TopkOutputHeads(student.head_weight, shard, chunk_rows)
    columns = vocab_map.columns(shard.start, shard.stop)
    teacher_head = weights.load_head(config.teacher.path, columns, student.dtype)
    return OutputHeads(student.head_weight, teacher_head, shard, chunk_rows)


def sglang_engine(
    config, servers: Future, student, ends, vocab_size: int, prompts, chunk_rows: int
):
    """The engine on servers that were begun; ValueError on every rank if they do not serve."""
    from megatron_taopd.rollout import weight_sync
    from megatron_taopd.rollout.sglang import SGLangEngine
    from megatron_taopd.step.scoring import sequence_log_probs

    model, replicas = ready(servers, "rollout.servers")
    sync, directory = config.rollout.sync, config.rollout.sync.dir
    ways = {
        "distributed": weight_sync.DistributedSync,
        "tensor": weight_sync.TensorSync,
        "disk": partial(
            weight_sync.DiskSync, directory=directory or Path(config.run.dir) / "weights"
        ),
    }
    log_probs = partial(
        sequence_log_probs,
        student,
        micro_batch_tokens=config.train.micro_batch_tokens,
        chunk_rows=chunk_rows,
    )
    return SGLangEngine(
        replicas,
        model,
        vocab_size,
        ends,
        ways[sync.transport](config.student.path, sync.bucket_mib << 20),
        weights=partial(weight_sync.Repeatable, student.named_tensors),
        version=lambda: student.version,
        probe=weight_sync.Probe(log_probs, sync.max_gap, prompts),
        release_memory=sync.release_memory,
    )


def say(line: str) -> None:
    """Print a line once."""
    if dist.get_rank() == 0:
        print(line, flush=True)
