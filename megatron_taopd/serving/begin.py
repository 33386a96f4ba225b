"""A configuration's servers, started or found, while a run does other things."""

from __future__ import annotations

import logging
import os
from collections.abc import Sequence
from concurrent.futures import Future
from functools import partial
from pathlib import Path

import torch
import torch.distributed as dist

from megatron_taopd.config.schema import ServersSection
from megatron_taopd.parallel import progress
from megatron_taopd.parallel.objects import in_background, on_rank_0
from megatron_taopd.serving.client import Replicas
from megatron_taopd.serving.model import CONTEXT_MARGIN, ServedModel
from megatron_taopd.serving.replica import Limits
from megatron_taopd.serving.server import Server

logger = logging.getLogger(__name__)

_DTYPES = {torch.float32: "float32", torch.bfloat16: "bfloat16", torch.float16: "float16"}


def open_replicas(
    section: ServersSection,
    model: ServedModel,
    dtype: torch.dtype,
    logs: Path,
    fixed_weights: bool = False,
    args: Sequence[str] = (),
) -> Replicas:
    """Start the servers that a section asks for, or find those it names; wait until they serve.

    Args:
        model: that they have to serve.
        dtype: of their weights and activations.
        logs: directory of one log per server of our own.
        fixed_weights: see `Replicas`.
        args: further arguments of sglang.launch_server.

    Raises:
        RuntimeError, ValueError: see `Replicas`.
    """
    key = None if section.api_key_env is None else os.environ[section.api_key_env]
    gpus = [None] * section.replicas
    if section.gpus is not None:
        gpus = [
            section.gpus[i * section.tp : (i + 1) * section.tp] for i in range(section.replicas)
        ]
    start = partial(
        Server,
        model.path,
        host=section.host,
        tp=section.tp,
        dtype=_DTYPES[dtype],
        context_length=section.context_length or model.longest + CONTEXT_MARGIN,
        max_running_requests=section.max_running_requests,
        max_total_tokens=section.max_total_tokens,
        mem_fraction=section.mem_fraction,
        api_key=key,
        args=[*args, *section.args],
        start_timeout=section.start_timeout_s,
    )
    own = [partial(start, log=logs / f"{i}.log", gpus=gpus[i]) for i in range(section.replicas)]
    limits = Limits(
        concurrency=section.concurrency,
        timeout_s=section.timeout_s,
        attempts=section.max_retries + 1,
        start_timeout_s=section.start_timeout_s,
    )
    return Replicas(
        section.urls or own,
        model,
        limits,
        api_key=key,
        fixed_weights=fixed_weights,
        dtype=_DTYPES[dtype],
    )


def begin_servers(
    section: ServersSection,
    path: str,
    longest: int,
    dtype: torch.dtype,
    logs: Path,
    fixed_weights: bool = False,
    args: Sequence[str] = (),
) -> Future:
    """Start or find servers on rank 0, in the background.

    Args:
        path: Hugging Face directory of the model that they have to serve.
        longest: tokens of the longest sequence that they will be asked for.
        The others are those of `open_replicas`.

    Returns:
        A future of the model and, on rank 0, its replicas (elsewhere None).
    """
    model = ServedModel.of(path, longest)
    if dist.get_rank() != 0:
        return in_background(lambda: (model, None))
    replicas = partial(open_replicas, section, model, dtype, logs, fixed_weights, args)
    return in_background(lambda: (model, replicas()))


def wait_for_servers(
    servers: Future, key: str, at_most: float | None = None
) -> tuple[ServedModel, Replicas | None]:
    """Wait for servers that were begun; every rank calls this.

    Args:
        key: of the configuration, for what goes wrong.
        at_most: seconds that it may take, for the terminal.

    Raises:
        ValueError: they do not serve, on every rank.

    Collectives: see `on_rank_0`.
    """
    try:
        with progress.phase(f"waiting for {key}", seconds=at_most):
            on_rank_0(lambda: servers, tell=False)  # `start_timeout_s` ends that
    except (RuntimeError, ValueError) as error:
        raise ValueError(f"{key}: {error}") from error
    model, replicas = servers.result()
    for remark in replicas.remarks if replicas else ():
        logger.info(f"{key}: {remark}")
    return model, replicas
