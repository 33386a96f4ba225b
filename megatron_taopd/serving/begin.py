"""A configuration's servers, started or found, while a run does other things."""

from __future__ import annotations

import logging
import os
from collections.abc import Sequence
from concurrent.futures import Future
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
import torch.distributed as dist

from megatron_taopd.config.schema import ServersSection
from megatron_taopd.parallel import progress
from megatron_taopd.parallel.objects import (
    first_rank_of_node,
    gather,
    in_background,
    on_rank_0,
)
from megatron_taopd.serving.client import Replicas
from megatron_taopd.serving.model import CONTEXT_MARGIN, ServedModel
from megatron_taopd.serving.replica import Limits
from megatron_taopd.serving.server import Server
from megatron_taopd.serving.sources import deal

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
    key = api_key_of(section)
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
    return Replicas(
        section.urls or own,
        model,
        _limits(section),
        api_key=key,
        fixed_weights=fixed_weights,
        dtype=_DTYPES[dtype],
    )


def _limits(section: ServersSection) -> Limits:
    return Limits(
        concurrency=section.concurrency,
        timeout_s=section.timeout_s,
        attempts=section.max_retries + 1,
        start_timeout_s=section.start_timeout_s,
    )


def api_key_of(section: ServersSection) -> str | None:
    """Return the key that a section's servers ask for, from the environment; None: none."""
    return None if section.api_key_env is None else os.environ[section.api_key_env]


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


def open_own(
    section: ServersSection, key: str, model: ServedModel, fixed_weights: bool = False
) -> Replicas | None:
    """Find the servers that this rank is the source of; every rank calls this.

    Those that `section.urls` names are dealt over the ranks (`sources.deal`), once rank 0 has found
    them. Rank 0 looks after all of them, and asks those alone that it has started itself.

    Args:
        key: of the section in the configuration, for what goes wrong.
        model: that they serve.
        fixed_weights: see `Replicas`.

    Returns:
        This rank's; None if it has none; None on every rank if rank 0 asks them all.

    Raises:
        ValueError: a rank cannot use its servers, on every rank.

    Collectives: two of `gather`, of some bytes.
    """
    if dist.get_world_size() == 1 or len(section.urls) < 2:
        return None
    dealt = deal(section.urls, gather(first_rank_of_node()))
    mine = [url for url, rank in dealt.items() if rank == dist.get_rank()]
    own, trouble = None, None
    if mine and len(set(dealt.values())) > 1:
        limits = replace(_limits(section), start_timeout_s=0)  # they are up
        api_key = api_key_of(section)
        try:
            own = Replicas(mine, model, limits, api_key=api_key, fixed_weights=fixed_weights)
        except (RuntimeError, ValueError) as error:
            trouble = f"rank {dist.get_rank()}: {error}"
    if troubles := [*filter(None, gather(trouble))]:
        if own is not None:
            own.close()
        raise ValueError(f"{key}: {'; '.join(troubles)}")
    return own
