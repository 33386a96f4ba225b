"""This machine's SGLang servers for a run on others, until it is ended: one for every TP GPUs.

    SGLANG_KEY=… taopd serve MODEL --host 0.0.0.0 --api-key-env SGLANG_KEY

They listen on consecutive ports and are started anew when they die; the run, which knows them by
`rollout.servers.urls` (or `teacher.servers.urls`) and their key by `….servers.api_key_env`, gives
them its weights. `--hidden-states` lets them be a teacher that answers with hidden states.
`--text` serves people: the OpenAI API under /v1, with the model's chat template.
"""

from __future__ import annotations

import argparse
import logging
import os
import signal
import sys
import time
from contextlib import ExitStack
from functools import partial
from pathlib import Path

import torch

from megatron_taopd.cli import common
from megatron_taopd.formats.directory import SINGLE, weight_map
from megatron_taopd.parallel import progress
from megatron_taopd.serving.hidden_states import HOOK_ARGS
from megatron_taopd.serving.server import Server

logger = logging.getLogger(__name__)
POLL_S = 2.0


def main(arguments: list[str]) -> int:
    """Serve until this process is told to end, which is status 0."""
    try:
        return common.run(work, parse(arguments))
    except KeyboardInterrupt:
        return 0


def parse(arguments: list[str]) -> argparse.Namespace:
    """Read the arguments."""
    parser = common.Parser(prog="taopd serve", description=__doc__)
    parser.add_argument("model", help="Hugging Face checkpoint directory")
    parser.add_argument("--tp", type=int, default=1, help="GPUs of a server")
    parser.add_argument("--gpus", nargs="+", type=int, help="default: all of this machine")
    parser.add_argument("--host", default="127.0.0.1", help="default: for this machine only")
    parser.add_argument("--port", type=int, default=30000, help="of the first server")
    parser.add_argument("--api-key-env", help="environment variable with the key of every request")
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--context-length", type=int, help="longest sequence; default: the model's")
    parser.add_argument("--mem-fraction", type=float, help="of the memory; default: SGLang's")
    parser.add_argument("--max-total-tokens", type=int, help="of the KV cache")
    what = parser.add_mutually_exclusive_group()
    what.add_argument("--hidden-states", action="store_true", help="for a teacher")
    what.add_argument("--text", action="store_true", help="for people: texts, not token ids alone")
    parser.add_argument("--logs", type=Path, default=Path("server-logs"))
    parser.add_argument("--restarts", type=int, default=20, help="of all servers together")
    parser.add_argument("args", nargs="*", help="of sglang.launch_server, after --")
    return parser.parse_args(arguments)


def work(arguments: argparse.Namespace) -> int:
    """Serve; that a server does not start, or dies too often, is one line as well."""
    starts = plan(arguments)
    for number in (signal.SIGTERM, signal.SIGUSR1):
        signal.signal(number, lambda *_: sys.exit(0))
    try:
        return serve(starts, arguments.restarts)
    except RuntimeError as error:
        raise ValueError(str(error)) from error


def plan(arguments: argparse.Namespace) -> list[partial]:
    """Return how to start each server."""
    loopback = arguments.host in ("127.0.0.1", "localhost", "::1")
    if not loopback and arguments.api_key_env is None:
        raise ValueError(
            f"--host: {arguments.host} without --api-key-env lets everyone on the network in; name "
            "an environment variable with a key"
        )
    if arguments.api_key_env is not None and not os.environ.get(arguments.api_key_env):
        raise ValueError(f"--api-key-env: {arguments.api_key_env} is not set")
    if (Path(arguments.model) / SINGLE).is_file():
        weight_map(arguments.model)
    devices = arguments.gpus or list(range(torch.cuda.device_count()))
    if len(devices) % arguments.tp:
        raise ValueError(f"--tp: {arguments.tp} does not divide the {len(devices)} GPUs")
    groups = [devices[i : i + arguments.tp] for i in range(0, len(devices), arguments.tp)]
    return [
        partial(
            Server,
            arguments.model,
            arguments.logs / f"{arguments.port + place}.log",
            host=arguments.host,
            port=arguments.port + place,
            tp=arguments.tp,
            gpus=group,
            dtype=arguments.dtype,
            context_length=arguments.context_length,
            mem_fraction=arguments.mem_fraction,
            max_total_tokens=arguments.max_total_tokens,
            api_key=arguments.api_key_env and os.environ[arguments.api_key_env],
            token_ids_only=not arguments.text,
            args=[*(HOOK_ARGS if arguments.hidden_states else ()), *arguments.args],
        )
        for place, group in enumerate(groups or [None])  # no GPU: one on the CPU
    ]


def serve(starts: list[partial], restarts: int) -> int:
    """Run the servers until this process is told to end."""
    with ExitStack() as stack:
        servers = [start() for start in starts]
        stack.callback(lambda: [server.stop() for server in servers])
        for server in servers:
            with progress.phase(f"starting {server.url}", seconds=server.start_timeout):
                server.wait_until_ready()
            logger.info("%s serves", server.url)
        while True:
            time.sleep(POLL_S)
            for place, server in enumerate(servers):
                if server.alive:
                    continue
                if restarts == 0:
                    raise RuntimeError(f"{server.url} died, and so often did others; see its log")
                restarts -= 1
                logger.info("%s died; it is started again", server.url)
                server.stop(grace_s=0)
                servers[place] = starts[place]()
                logger.info("%s serves", servers[place].wait_until_ready().url)
