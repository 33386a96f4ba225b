"""What one rank writes of a checkpoint: planned and copied by the run, written by a thread."""

from __future__ import annotations

import io
import json
import time
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.checkpoint.storage import WriteResult

from megatron_taopd.checkpoints.files import Best, Sum, SummedFile, publish, sum_of, sync
from megatron_taopd.formats.files import os_errors_of_torch, reason_of
from megatron_taopd.formats.hf import CARD, copy_side_files
from megatron_taopd.formats.megatron import SIDE_FILES
from megatron_taopd.formats.unpickle import BACKEND, COMMON, CONFIG, METADATA
from megatron_taopd.models.student import Student
from megatron_taopd.parallel.compat.megatron_internals import Bucket, SavePlan, plan_save
from megatron_taopd.parallel.compat.torch_internals import write_item
from megatron_taopd.parallel.copies import HostCopies


@dataclass
class Written:
    """The part of a checkpoint that one rank has written.

    Attributes:
        files: the checksum of each.
        results: which tensor lies where.
    """

    files: dict[str, Sum] = field(default_factory=dict)
    results: list[WriteResult] = field(default_factory=list)
    seconds: float = 0.0
    error: str | None = None


@dataclass
class Writing:
    """A save under way.

    Attributes:
        best: the best checkpoint once this one is there.
    """

    step: int
    aside: Path
    plan: SavePlan
    best: Best | None
    written: Future[Written]


def plan_writing(
    sharded: dict, student: Student, aside: Path, card: str | None, host: HostCopies
) -> tuple[Callable[[], Written], SavePlan]:
    """Copy what this rank is to write to host memory; touch no file.

    Args:
        sharded: the state, with Megatron's sharded tensors.
        card: the model card of the student as it is now, if there is one.
        host: has the copies, which the thread waits for; those of the save before are written.

    Returns:
        A function that writes the copies, for a thread; Megatron's plan.

    Collectives: those of `plan_save`.
    """
    waits: list[Callable[[], None]] = []

    def copy(tensors: list[tuple[Tensor, bool]]) -> list[Tensor]:
        """Copy the student's own, and what is on the device; Megatron has copied some before."""
        moving = [tensor for tensor, own in tensors if own or not tensor.is_cpu]
        copies, wait = host.take(moving)
        waits.append(wait)
        taken = iter(copies)
        return [next(taken) if own or not tensor.is_cpu else tensor for tensor, own in tensors]

    save_plan, buckets, common = plan_save(sharded, aside, copy)
    whole = None
    if dist.get_rank() == 0:
        whole = io.BytesIO()
        torch.save(common, whole)
    side = (student.hf_dir, student.dtype, card)
    (wait,) = waits
    return partial(write, aside, buckets, save_plan, whole, side, wait), save_plan


def write(
    aside: Path,
    buckets: list[Bucket],
    save_plan: SavePlan,
    whole: io.BytesIO | None,
    side: tuple[str | Path, torch.dtype, str | None],
    wait: Callable[[], None],
) -> Written:
    """Write and sync this rank's files; on rank 0 also what there is once. In a thread.

    Args:
        whole: `common.pt`, on rank 0.
        side: Hugging Face directory, dtype and card of the model, for what is kept next to it.
        wait: returns once the copies are in the host's memory.
    """
    start, written = time.perf_counter(), Written()

    def attempt() -> None:
        wait()
        for name, items in buckets:
            with SummedFile(aside / name) as stream, os_errors_of_torch():
                for item, data in items:
                    result = write_item(save_plan.transforms, stream, data, item, name)
                    written.results.append(result)
            written.files[name] = stream.sum
        if whole is not None:
            with SummedFile(aside / COMMON) as stream:
                stream.write(whole.getbuffer())
            written.files[COMMON] = stream.sum
            hf_dir, dtype, card = side
            (aside / SIDE_FILES).mkdir()
            copy_side_files(hf_dir, aside / SIDE_FILES, [dtype])
            if card is not None:
                (aside / SIDE_FILES / CARD).write_text(card, encoding="utf-8")
            for file in (aside / SIDE_FILES).iterdir():
                written.files[f"{SIDE_FILES}/{file.name}"] = _synced_sum(file)

    written.error = reason_why_not(attempt)
    written.seconds = time.perf_counter() - start
    return written


def complete(writing: Writing, ranks: list[Written], final: Path) -> None:
    """Write what describes the files of all ranks, and give the directory its name.

    Raises:
        OSError: also where a file is not as it was written.
    """
    writing.plan.finish([w.results for w in ranks])
    (writing.aside / CONFIG).write_text(json.dumps(BACKEND) + "\n")
    files = {name: summed for w in ranks for name, summed in w.files.items()}
    for name in (METADATA, CONFIG):
        files[name] = _synced_sum(writing.aside / name)
    publish(writing.aside, final, writing.step, files)


def _synced_sum(file: Path) -> Sum:
    sync(file)
    return sum_of(file)


def reason_why_not(attempt: Callable[[], object]) -> str | None:
    """Try something; return why it cannot be done on this rank's file system, None if it can."""
    try:
        attempt()
    except OSError as error:
        return f"rank {dist.get_rank()}: {reason_of(error)}"
    return None
