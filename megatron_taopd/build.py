"""A run, put together from its configuration: a table of contents."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path

import torch
import torch.distributed as dist

from megatron_taopd.checkpoints.before import Before, go_on
from megatron_taopd.checkpoints.resume import start_of
from megatron_taopd.checkpoints.saving import Checkpoints
from megatron_taopd.config.load import to_tree, to_yaml
from megatron_taopd.config.schema import Config
from megatron_taopd.data.texts import Texts, open_texts
from megatron_taopd.evaluation.opening import open_evaluation
from megatron_taopd.formats.hf import DTYPES, load_config
from megatron_taopd.models.average import WeightAverage
from megatron_taopd.models.student import Student
from megatron_taopd.monitoring.accounting import ModelCost
from megatron_taopd.monitoring.monitor import Monitor
from megatron_taopd.monitoring.observer import Observer
from megatron_taopd.monitoring.profiling import StepProfiler
from megatron_taopd.monitoring.throughput import Devices
from megatron_taopd.parallel import platform
from megatron_taopd.parallel.layout import student_layout
from megatron_taopd.parallel.objects import on_rank_0
from megatron_taopd.plan.colocated import sized
from megatron_taopd.rollout.opening import begin_rollout_servers, open_engine, open_rollouts
from megatron_taopd.run import Run
from megatron_taopd.step.distiller import Distiller
from megatron_taopd.step.extensions.horizon import Horizon
from megatron_taopd.step.guard import Guard
from megatron_taopd.step.output_heads import Heads, OutputHeads, open_all_heads
from megatron_taopd.teacher.megatron import MegatronTeacher
from megatron_taopd.teacher.opening import begin_teacher_servers, head_directory, open_teachers
from megatron_taopd.teacher.teachers import Teacher

logger = logging.getLogger(__name__)


def build(config: Config, catch_signals: Callable[[], Callable[[], bool]]) -> Run:
    """Put a run together from its configuration, and resume it if it has a checkpoint.

    Args:
        catch_signals: called when all is built: from then on a signal ends the run in order. What
            it returns tells whether there was one.

    Raises:
        ValueError: something that the run was given is not what it has to be.
    """
    torch.manual_seed(config.run.seed)
    before = Before.newest(config)
    start = on_rank_0(lambda: start_of(to_tree(config)))
    serving = sized(config, platform.local_world_size(), platform.device_memory())
    rollout_servers = begin_rollout_servers(serving)
    teacher_servers = {key: begin_teacher_servers(serving, key) for key in serving.each_teacher}
    texts = open_texts(config)
    before.check_prompts(len(texts.prompts), config)
    student = open_student(config, before, texts)
    teachers = open_teachers(config, teacher_servers, texts)
    directories = map(head_directory, config.each_teacher.values())
    of_each = [*zip(directories, texts.vocab_maps.values(), strict=True)]
    heads = open_all_heads(student, of_each, student.rows_within(config.train.head_memory_mib))
    engine = open_engine(config, rollout_servers, student, texts)
    if config.teacher.source == "student_ema":
        average = student.keep_average(config.teacher.ema)
        follow(teachers.engines["teacher"], average, heads)
    horizon, guard = Horizon.of(config.rollout), Guard.of(config.guard, config.loss)
    state = go_on(before, config, student, horizon, guard, start)
    if before.step:
        engine.update_weights(student.named_tensors(), version=before.step)

    monitor = Monitor(
        config.run,
        config.log,
        config.train.steps,
        rank=dist.get_rank(),
        first_step=before.step + 1 if before.step else 0,
        config_yaml=to_yaml(config),
        synchronize=platform.synchronize,
    )
    place = f"{config.train.precision}, {platform.device().type}"
    layouts = ", ".join(f"{name} {engine.layout}" for name, engine in teachers.engines.items())
    logger.info(f"student {student.layout}, {layouts}, {place}")
    for remark in texts.remarks(config):
        logger.info(remark)
    if before.step:
        logger.info(f"resuming after step {before.step}")
    costs = (
        ModelCost.of(student.trunk.hf),
        [ModelCost.of(load_config(section.path)) for section in config.each_teacher.values()],
    )
    devices = Devices.of(config, dist.get_world_size(), platform.local_world_size())
    return Run(
        config=config,
        distiller=Distiller(
            student, teachers, heads, guard, config.selection, config.loss, config.train
        ),
        engine=engine,
        rollouts=open_rollouts(config, engine, texts, horizon, state),
        observer=Observer(
            config, student, costs, horizon, texts.student.tokenizer, monitor, devices
        ),
        evaluate=open_evaluation(config, engine, texts),
        monitor=monitor,
        checkpoints=Checkpoints(
            Path(config.run.dir) / "checkpoints",
            config.checkpoint.keep_last,
            config.checkpoint.asynchronous,
            logger.info,
            before.step or None,
            state.get("best"),
        ),
        first_step=before.step,
        interrupted=catch_signals(),
        start=start,
        profiler=StepProfiler(
            config.train.profile, Path(config.run.dir) / "profile", dist.get_rank()
        ),
    )


def follow(teacher: Teacher, average: WeightAverage, heads: Heads | None) -> None:
    """Have the teacher's trunk and head follow the student's weights; it is one of this job."""
    assert isinstance(teacher, MegatronTeacher)
    own = heads.of(0) if heads else None
    teacher.follow(average, own.teacher if isinstance(own, OutputHeads) else None)


def open_student(config: Config, before: Before, texts: Texts) -> Student:
    """Build the student; its learning-rate schedule ends with the run."""
    return Student(
        config.student.path,
        student_layout(**vars(config.student.parallel), seed=config.run.seed),
        DTYPES[config.train.precision],
        config.train.recompute,
        config.optimizer,
        before.last_update(config.train),
        common_vocabulary=texts.common_vocabulary,
        moe=config.student.moe,
    )
