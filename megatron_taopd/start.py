"""A training, once its configuration is known to be right: join the ranks, build, distil, end.

Everything that takes seconds to import is imported here, which is why `train` imports this last.
"""

from __future__ import annotations

import logging
import os
import signal
import sys
from collections.abc import Callable

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from rich.console import Console

from megatron_taopd import build as building
from megatron_taopd.checkpoints.end import is_finished
from megatron_taopd.checkpoints.saving import NotSaved
from megatron_taopd.config.schema import Config
from megatron_taopd.launch import ENDED_AT_ONCE, INTERRUPTED, MISTAKE, SIGNALS
from megatron_taopd.loop import distill
from megatron_taopd.monitoring.summary import summary_table
from megatron_taopd.parallel import platform
from megatron_taopd.parallel.compat.torch_internals import default_store
from megatron_taopd.parallel.objects import on_rank_0
from megatron_taopd.parallel.watchdog import Watchdog
from megatron_taopd.preflight import storage
from megatron_taopd.preflight.examine import before_run
from megatron_taopd.step.guard import Broken

logger = logging.getLogger(__name__)


def start(config: Config) -> int:
    """Run a training; return the exit status of the process, the same on every rank."""
    joined = platform.initialize()
    watchdog = watch(config, joined)
    try:
        with watchdog:
            if not before_run(config):
                watchdog.stop()
                return leave(joined, MISTAKE)  # threads of gloo that are left may abort the exit
            if on_rank_0(lambda: is_finished(config)):
                watchdog.stop()
                return leave(joined, 0)
            run = building.build(config, catch_signals)
            keep_config(run)
    except ValueError:
        # A damaged file, say, which the rank that reads it is alone to know of, and has told.
        return MISTAKE

    try:
        with watchdog:
            status = run_to_its_end(run)
        watchdog.stop()
    finally:
        run.close()
        parallel_state.destroy_model_parallel()
    return leave(joined, status)


def leave(joined: bool, status: int) -> int:
    """Leave the group that this process has joined, if it has; return the status."""
    if joined:
        dist.destroy_process_group()
    return status


def watch(config: Config, joined: bool) -> Watchdog:
    """Watch over the ranks of a group that this process has joined."""
    section, world_size = config.watchdog, dist.get_world_size()
    watched = joined and world_size > 1 and section.heartbeat_timeout_s > 0
    return Watchdog(
        default_store() if watched else None,
        dist.get_rank(),
        world_size,
        section.heartbeat_timeout_s,
        section.stall_timeout_s,
        config.run.dir,
    )


def keep_config(run) -> None:
    """Write the configuration, once there is a run of it; that it cannot be written ends none."""
    if dist.get_rank() != 0:
        return
    try:
        storage.save_config(run.monitor.run_dir, run.monitor.config_yaml)
    except ValueError as error:
        logger.info(f"not kept: {error}")


def run_to_its_end(run) -> int:
    """Distil; return the exit status of the process, the same on every rank."""
    steps = run.config.train.steps
    try:
        done = distill(run)
    except (Broken, NotSaved) as error:
        if dist.get_rank() == 0:
            print(f"error: {error}", file=sys.stderr)
        return 1
    if dist.get_rank() == 0:
        run.monitor.close()
        Console().print(summary_table(run.monitor.records, run.monitor.report_path))
    if done < steps:
        logger.info(f"stopped after step {done} of {steps}; the same command resumes")
        return INTERRUPTED
    return 0


def catch_signals() -> Callable[[], bool]:
    """Let SIGINT, SIGTERM and SIGUSR1 end the run after its phase; a second SIGINT does at once.

    Returns:
        A function that says whether any rank was signalled, the same on every rank. Collective: an
        all-reduce of one integer.
    """
    received = False

    def handler(number, _frame):
        nonlocal received
        received = True
        if number == signal.SIGINT:
            signal.signal(signal.SIGINT, end_at_once)

    for asked in SIGNALS:
        signal.signal(asked, handler)

    def interrupted() -> bool:
        any_rank = torch.full((), int(received), dtype=torch.int32, device=platform.device())
        dist.all_reduce(any_rank, op=dist.ReduceOp.MAX)
        return bool(any_rank.item())

    return interrupted


def end_at_once(_number, _frame) -> None:
    """End this process, whatever it does, with what its last checkpoint has.

    An exception would be caught, or told with a traceback, by whatever code it comes upon. Servers
    that the run has started end with the process.
    """
    if int(os.environ.get("RANK", 0)) == 0:
        os.write(2, b"ended at once; the same command goes on from the last checkpoint\n")
    os._exit(ENDED_AT_ONCE)
