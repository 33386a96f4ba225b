"""The teachers that a configuration asks for: in this job, or on servers."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from concurrent.futures import Future
from pathlib import Path

from megatron_taopd.config.schema import Config, TeacherSection, teacher_name
from megatron_taopd.data.texts import Texts
from megatron_taopd.data.vocab_map import VocabMap
from megatron_taopd.formats.hf import DTYPES
from megatron_taopd.formats.output_head import find_head
from megatron_taopd.parallel.layout import forward_layout
from megatron_taopd.serving.begin import begin_servers, open_own, wait_for_servers
from megatron_taopd.serving.hidden_states import HOOK_ARGS
from megatron_taopd.teacher.megatron import MegatronTeacher
from megatron_taopd.teacher.sglang import SGLangTeacher, SGLangTopkTeacher, student_ids_of
from megatron_taopd.teacher.teachers import Teachers

logger = logging.getLogger(__name__)


def begin_teacher_servers(config: Config, key: str) -> Future | None:
    """Start or find a teacher's servers in the background; None for one in this job.

    Args:
        key: of `Config.each_teacher`.
    """
    section = config.each_teacher[key]
    if section.engine != "sglang":
        return None
    return begin_servers(
        section.servers,
        section.path,
        config.rollout.max_new_tokens + config.prompt_limit(key)[1],
        DTYPES[config.train.precision],
        Path(config.run.dir) / "servers" / teacher_name(key),
        fixed_weights=True,
        args=HOOK_ARGS if section.form == "hidden_states" else (),
    )


def open_teachers(config: Config, servers: Mapping[str, Future | None], texts: Texts) -> Teachers:
    """Build the teachers, or wait for the servers that were begun.

    Args:
        servers: `begin_teacher_servers` of each, by key.

    Raises:
        ValueError: they do not serve, on every rank.
    """
    maps, prompts = texts.vocab_maps, texts.prompts.teacher_token_ids
    engines = {
        teacher_name(key): open_teacher(config, key, begun, maps[teacher_name(key)])
        for key, begun in servers.items()
    }
    return Teachers(engines, maps, prompts, texts.teachers)


def open_teacher(
    config: Config, key: str, servers: Future | None, vocab_map: VocabMap
) -> MegatronTeacher | SGLangTeacher | SGLangTopkTeacher:
    """Build a teacher, or wait for the servers that were begun. Raises as `open_teachers`."""
    section, dtype = config.each_teacher[key], DTYPES[config.train.precision]
    if servers is None:
        layout, tokens = forward_layout(**vars(section.parallel)), config.train.micro_batch_tokens
        return MegatronTeacher(section.path, layout, dtype, tokens, section.offload)
    where = f"{key}.servers"
    model, replicas = wait_for_servers(servers, where, section.servers.start_timeout_s)
    own = open_own(section.servers, where, model, fixed_weights=True)
    if section.form == "hidden_states":
        return SGLangTeacher(replicas, model, find_head(model.path).shape[1], dtype, own)
    logger.info(
        f"{key}.form: topk; D, C and the teacher's entropy are lower bounds from its "
        f"{section.topk} likeliest tokens (Eq. 17)"
    )
    student_ids = None
    if not vocab_map.is_identity:
        student_ids = student_ids_of(vocab_map.teacher_ids, model.vocab_size)
    return SGLangTopkTeacher(replicas, model, section.topk, student_ids, own)


def head_directory(section: TeacherSection) -> str | None:
    """Say where a teacher's head is read from; None for one that reports its top-K only."""
    topk = section.engine == "sglang" and section.form == "topk"
    return None if topk else section.path
