"""Train a student on as many ranks as torchrun starts.

    torchrun --nproc-per-node N -m megatron_taopd.train CONFIG.yaml section.key=value …

Reads the configuration, builds both models, the rollout engine and the monitor, and runs the loop.
A rerun with the same `run.dir` resumes from its last checkpoint. Ctrl-C, SIGTERM and SIGUSR1 end
the run between two phases of a step, with a checkpoint; the exit status is then 3.
"""

from __future__ import annotations

import logging
import os
import signal
import sys
from collections.abc import Callable

import torch
import torch.distributed as dist
from rich.console import Console

from megatron_taopd.config.load import load, to_yaml
from megatron_taopd.config.schema import Config
from megatron_taopd.config.values import check_values
from megatron_taopd.launch import INTERRUPTED, SIGNALS
from megatron_taopd.monitoring import logs
from megatron_taopd.monitoring.summary import summary_table
from megatron_taopd.parallel import platform
from megatron_taopd.parallel.compat.torch_internals import default_store
from megatron_taopd.parallel.watchdog import Watchdog
from megatron_taopd.preflight import storage
from megatron_taopd.preflight.check_config import check
from megatron_taopd.preflight.examine import before_run
from megatron_taopd.preflight.models import with_model_directories

logger = logging.getLogger("megatron_taopd.train")  # also where this is __main__


def main(arguments: list[str]) -> int:
    """Run a training; return the exit status of the process."""
    if not arguments or arguments[0] in ("-h", "--help"):
        print(__doc__)
        return 0 if arguments else 2
    try:
        logs.set_up()
        config = load(arguments[0], arguments[1:])
        world_size = int(os.environ.get("WORLD_SIZE", 1))
        check_values(config, world_size)
        config = with_model_directories(config)
        check(config, world_size)
    except ValueError as error:
        # Every rank has come to the same line, which needs no traceback: one of them says it.
        if int(os.environ.get("RANK", 0)) == 0:
            print(f"error: {error}", file=sys.stderr)
        return 2
    # Megatron takes seconds to import, which nobody should wait for to read that line.
    from megatron.core import parallel_state

    from megatron_taopd.build import build

    joined = platform.initialize()
    watchdog = watch(config, joined)
    try:
        with watchdog:
            if not before_run(config):
                watchdog.stop()
                return 2
            run = build(config, catch_signals)
            keep_config(run)
    except ValueError:
        # A damaged file, say, which the rank that reads it is alone to know of, and has told.
        return 2

    try:
        with watchdog:
            status = run_to_its_end(run)
        watchdog.stop()
    finally:
        run.close()
        parallel_state.destroy_model_parallel()
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
        storage.save_config(run.monitor.run_dir, to_yaml(run.config))
    except ValueError as error:
        logger.info(f"not kept: {error}")


def run_to_its_end(run) -> int:
    """Distil; return the exit status of the process, the same on every rank."""
    from megatron_taopd.checkpoints.saving import NotSaved  # as above: Megatron is imported by now
    from megatron_taopd.loop import distill
    from megatron_taopd.step.guard import Broken

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
    received = torch.zeros(1, dtype=torch.int32)

    def handler(number, _frame):
        received[0] = 1
        if number == signal.SIGINT:
            signal.signal(signal.SIGINT, signal.default_int_handler)

    for asked in SIGNALS:
        signal.signal(asked, handler)

    def interrupted() -> bool:
        any_rank = received.to(platform.device(), copy=True)
        dist.all_reduce(any_rank, op=dist.ReduceOp.MAX)
        return bool(any_rank.item())

    return interrupted


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
