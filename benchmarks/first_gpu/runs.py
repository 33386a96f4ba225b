"""Runs of the tiny pair and a step at real widths, as the package itself puts them together."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from statistics import median
from types import SimpleNamespace

import torch
import torch.distributed as dist
from megatron.core import parallel_state

from benchmarks.first_gpu.result import Setting
from benchmarks.step.pairs import pair_on_disk, qwen3_slice
from benchmarks.step.step import Step
from megatron_taopd import config as configuration
from megatron_taopd.build import build
from megatron_taopd.config.values import check_values
from megatron_taopd.parallel import cuda_variables, platform
from megatron_taopd.run import Run

EXAMPLES = Path(__file__).parents[2] / "examples"
TINY, TINY_SGLANG = EXAMPLES / "tiny_pair.yaml", EXAMPLES / "tiny_pair_sglang.yaml"
STUDENT, TEACHER = EXAMPLES / "tiny_pair" / "student", EXAMPLES / "tiny_pair" / "teacher"
ONE_RANK = ("student.parallel={tp: 1, pp: 1}", "teacher.parallel={tp: 1, pp: 1}")
QUIET = ("eval={every: 0, at_start: false}", "log={tensorboard: false, samples: 0}")


def precision() -> str:
    """Name the dtype in which a device is meant to train."""
    return "bf16" if torch.cuda.is_available() else "fp32"


def join(transport: str = "distributed") -> None:
    """Set the allocator for a way of the weights to servers, and join the process group."""
    cuda_variables.set_allocator(os.environ, transport)
    platform.initialize()


@contextmanager
def run_of(file: Path, directory: str | Path, *overrides: str) -> Iterator[Run]:
    """Build a run of one rank, as `train` does, and close it afterwards."""
    asked = (*ONE_RANK, *QUIET, f"run.dir={directory}", *overrides)
    config = configuration.load(file, list(asked))
    check_values(config, ranks=1)
    join(config.rollout.sync.transport)
    run = build(config, lambda: lambda: False)
    try:
        yield run
    finally:
        run.close()
        parallel_state.destroy_model_parallel()


@contextmanager
def step_of(setting: Setting, precision: str) -> Iterator[Step]:
    """Build the phases of a step on one rollout batch.

    The models are some layers of Qwen3-4B and Qwen3-14B at their widths, with random weights, or,
    small, the tiny pair.
    """
    join()
    asked = SimpleNamespace(
        pair="tiny", precision=precision, layers=[2, 4],
        prompts=8 if setting.small else 16,
        max_new_tokens=16 if setting.small else 448,
        micro_batch_tokens=128 if setting.small else 4096,
        head_memory_mib=1 if setting.small else 1024,
    )  # fmt: skip
    try:
        models, batch, _ = (pair_on_disk if setting.small else qwen3_slice)(asked)
        yield Step(models, batch)
    finally:
        parallel_state.destroy_model_parallel()


def rollouts(setting: Setting) -> str:
    """Let the tiny student answer some prompts; return the file that has its rollout batch."""
    file = Path(setting.scratch) / "rollouts.pt"
    prompts = 8 if setting.small else 64
    with run_of(TINY, file.with_suffix(""), f"rollout.prompts={prompts}") as run:
        torch.save(run.rollouts.take(1).pending.result(), file)
    return str(file)


def seconds_of(work: Callable[[], object], repeats: int) -> float:
    """Return the median of a call's seconds, after one that warms up."""
    work()
    times = []
    for _ in range(repeats):
        platform.synchronize()
        began = time.perf_counter()
        work()
        platform.synchronize()
        times.append(time.perf_counter() - began)
    return median(times)


def has_transformer_engine() -> bool:
    """Tell whether runs of this process take TransformerEngine's layers."""
    from megatron_taopd.models.gpt import use_transformer_engine

    return use_transformer_engine()


def leave() -> None:
    """Leave the process group, as a process that ends ought to."""
    if dist.is_initialized():
        dist.destroy_process_group()
