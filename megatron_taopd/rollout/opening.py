"""The rollout engine that a configuration asks for: in this process, or on servers."""

from __future__ import annotations

from collections.abc import Mapping
from concurrent.futures import Future
from functools import partial
from pathlib import Path
from typing import Any

import torch.distributed as dist

from megatron_taopd.config.schema import Config, RolloutSection
from megatron_taopd.config.speculative import server_args
from megatron_taopd.data.prompts import PromptStream
from megatron_taopd.data.texts import Texts
from megatron_taopd.formats.hf import DTYPES
from megatron_taopd.models.student import Student
from megatron_taopd.parallel import platform, watchdog
from megatron_taopd.rollout import weight_sync
from megatron_taopd.rollout.engine import Sampling
from megatron_taopd.rollout.local import LocalEngine
from megatron_taopd.rollout.mix import Mix
from megatron_taopd.rollout.partial import PartialRollouts
from megatron_taopd.rollout.schedule import Rollouts, RolloutSchedule
from megatron_taopd.rollout.sglang import SGLangEngine, Updates
from megatron_taopd.serving.begin import api_key_of, begin_servers, open_own, wait_for_servers
from megatron_taopd.step.extensions.horizon import Horizon
from megatron_taopd.step.scoring import sequence_log_probs


def sampling_of(rollout: RolloutSection) -> Sampling:
    """Say how training responses are drawn."""
    return Sampling(
        max_new_tokens=rollout.max_new_tokens,
        samples=rollout.samples,
        temperature=rollout.temperature,
        top_p=rollout.top_p,
        top_k=rollout.top_k,
        stop_token_ids=rollout.stop_token_ids,
    )


def begin_rollout_servers(config: Config, fixed_weights: bool = False) -> Future | None:
    """Start or find the student's servers in the background; None for the local engine."""
    if config.rollout.engine != "sglang":
        return None
    longest = max(config.rollout.max_new_tokens, config.eval.max_new_tokens or 0)
    return begin_servers(
        config.rollout.servers,
        config.student.path,
        longest + config.data.max_prompt_tokens,
        DTYPES[config.train.precision],
        Path(config.run.dir) / "servers" / "rollout",
        fixed_weights=fixed_weights,
        args=server_args(config.rollout.speculative),
    )


def open_engine(
    config: Config, servers: Future | None, student: Student, texts: Texts
) -> LocalEngine | SGLangEngine:
    """Load the local engine, or wait for the servers that were begun.

    Raises:
        ValueError: they do not serve, on every rank.
    """
    if servers is None:
        with watchdog.file_io():
            return LocalEngine.from_hf(
                config.student.path,
                student.dtype,
                platform.device(),
                batch_size=config.rollout.batch_size,
                seed=config.run.seed,
                rank=dist.get_rank(),
                world_size=dist.get_world_size(),
                vocab_size=texts.common_vocabulary,
                eos_token_ids=texts.student.eos_token_ids,
            )
    model, replicas = wait_for_servers(
        servers, "rollout.servers", config.rollout.servers.start_timeout_s
    )
    own = open_own(config.rollout.servers, "rollout.servers", model)
    sync = config.rollout.sync
    log_probs = partial(
        sequence_log_probs,
        student,
        micro_batch_tokens=config.train.micro_batch_tokens,
        chunk_rows=student.rows_within(config.train.head_memory_mib),
    )
    updates = Updates(
        transport_of(config),
        weights=partial(weight_sync.Repeatable, student.named_tensors),
        version=lambda: student.version,
        probe=weight_sync.Probe(log_probs, sync.max_gap, texts.prompts.token_ids),
        release_memory=sync.release_memory,
        keep_cache=sync.cache == "keep",
    )
    tokens, ends = texts.common_vocabulary, texts.student.eos_token_ids
    return SGLangEngine(replicas, model, tokens, ends, updates, own)


def transport_of(config: Config) -> weight_sync.WeightSync:
    """Say how weights get to the servers: `rollout.sync.transport`."""
    sync, path = config.rollout.sync, config.student.path
    options: dict[str, Any] = {
        "bucket_bytes": sync.bucket_mib << 20,
        "keep_cache": sync.cache == "keep",
    }
    if sync.transport == "distributed":
        api_key = api_key_of(config.rollout.servers)
        return weight_sync.DistributedSync(path, api_key=api_key, **options)
    if sync.transport == "tensor":
        return weight_sync.TensorSync(path, **options)
    directory = sync.dir or Path(config.run.dir) / "weights"
    return weight_sync.DiskSync(path, directory=directory, **options)


def open_rollouts(
    config: Config,
    engine: LocalEngine | SGLangEngine,
    texts: Texts,
    horizon: Horizon,
    state: Mapping[str, Any],
) -> Rollouts:
    """Go on with the prompts after those that were consumed, and with what was under way.

    Args:
        state: what the run goes on from (`checkpoints.before.go_on`).
    """
    prompts, section = texts.prompts, config.rollout
    consumed = state["prompts_consumed"]
    stream = PromptStream(
        len(prompts), config.run.seed, config.data.shuffle, consumed, prompts.parts
    )
    sampling = sampling_of(section)
    if section.partial:
        assert isinstance(engine, SGLangEngine)  # `config.values`
        under_way = state.get("rollouts")
        return PartialRollouts(
            engine, prompts.token_ids, stream, sampling, horizon, section, under_way
        )
    mix = Mix(section, prompts, config.run.seed)
    return RolloutSchedule(engine, mix, stream, sampling, horizon, section.ahead)
