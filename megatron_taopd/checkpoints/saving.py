"""Everything that moves a run, saved while the run goes on and resumed on any layout.

A checkpoint is a directory `step_00000050/` in Megatron's distributed format: the model, the
distributed optimizer's state, the learning-rate schedule and the run's counters, and beside them
the model's config and tokenizer, so that it converts to Hugging Face by itself. A save copies all
of it to host memory; a thread writes the copies while the next step runs; `checkpoint_files` has
what then makes the files a checkpoint.
"""

from __future__ import annotations

import io
import queue
import shutil
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import torch
import torch.distributed as dist
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.core import CheckpointingConfig, save_config
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import ShardedTensor
from megatron.core.dist_checkpointing.serialization import get_default_load_sharded_strategy
from megatron.core.dist_checkpointing.state_dict_utils import save_preprocess
from megatron.core.dist_checkpointing.strategies import filesystem_async
from megatron.core.dist_checkpointing.strategies.torch import TorchDistSaveShardedStrategy
from torch import Tensor
from torch.distributed.checkpoint.filesystem import SerializationFormat, _write_item
from torch.distributed.checkpoint.metadata import Metadata
from torch.distributed.checkpoint.storage import WriteResult

from megatron_taopd.checkpoints.files import (
    Best,
    Sum,
    SummedFile,
    first,
    keep_newest,
    latest_valid,
    name_best,
    path,
    publish,
    remove_remains,
    steps,
    sum_of,
    sync,
)
from megatron_taopd.formats.files import os_errors_of_torch, reason_of
from megatron_taopd.formats.hf import copy_side_files
from megatron_taopd.formats.megatron import SIDE_FILES, check_pickles
from megatron_taopd.models import weights
from megatron_taopd.models.student import Student
from megatron_taopd.parallel import platform
from megatron_taopd.parallel.objects import broadcast_object, gather

__all__ = ["Checkpoints", "NotSaved", "latest_valid", "load", "path", "steps"]

_OPTIMIZER = {"distrib_optim_sharding_type": "fully_reshardable"}


class NotSaved(Exception):
    """The run has ended, and its last checkpoint could not be written."""


class Checkpoints:
    """Saves a run's checkpoints, keeps the newest and the best. Every rank calls every method.

    A save that fails on any rank, because a disk is full, say, leaves nothing behind and the
    checkpoints before it as they are; it is told, and `failure` says so until a later one succeeds.

    Args:
        directory: made if need be; the same for all ranks. Remains of a run that died are deleted.
        keep: so many checkpoints stay.
        asynchronous: write while the run goes on. It takes host memory for this rank's share.
        tell: prints a line, once.
        step: of the checkpoint that the run was resumed from.
        best: (step, accuracy) of the best one until then, which that has under "best".

    Collectives: a gather of a truth value.
    """

    def __init__(
        self,
        directory: str | Path,
        keep: int,
        asynchronous: bool,
        tell: Callable[[str], None],
        step: int | None = None,
        best: tuple[int, float] | None = None,
    ):
        self.directory = Path(directory)
        self.keep = keep
        self.asynchronous = asynchronous
        self.tell = tell
        self.failure: str | None = None
        self._step = step  # of the last one that is there or under way
        self._writing: _Writing | None = None
        self._writer = ThreadPoolExecutor(1, "checkpoint")
        self._metrics: dict[str, float] = defaultdict(float)
        there = best is not None and path(self.directory, best[0]).is_dir()
        self._best = Best(*best) if gather(there)[0] else None
        if dist.get_rank() == 0:
            remove_remains(self.directory)
            name_best(self.directory, self._best)

    @property
    def best(self) -> Best | None:
        """The best one that is there or under way."""
        return self._writing.best if self.busy else self._best

    def would_be_best(self, accuracy: float) -> bool:
        return self.best is None or accuracy > self.best.accuracy

    def save(self, step: int, student: Student, state: dict, accuracy: float | None = None) -> None:
        """Save the run after `step` steps, unless that is there already.

        Returns once nothing that is to be written can change any more; a save that is still under
        way is waited for first.

        Args:
            state: what the run needs besides the student: plain values and tensors, equal on all
                ranks.
            accuracy: on held-out prompts, where it was evaluated after this step.

        Collectives: gathers of the optimizer state to data-parallel rank 0, of the plan (some 300
        bytes a tensor and rank) to rank 0, of the random states and of short texts.
        """
        self.finish()
        if step == self._step:
            return
        with self._blocked():
            aside = path(self.directory, step).with_suffix(".incomplete")
            if error := self._prepare(aside):
                self._fail(step, error)
                return
            best = self._best
            if accuracy is not None and self.would_be_best(accuracy):
                best = Best(step, accuracy)
            run = {**state, "step": step, "rng": gather(torch.get_rng_state())}
            if best:
                run["best"] = [best.step, best.accuracy]
            write, self._writing = _plan(student, run, step, aside)
            self._writing.best = best
            self._writing.written = self._writer.submit(write)
            self._step = step
        if not self.asynchronous:
            self.finish()

    def poll(self) -> None:
        """Make the save that is under way a checkpoint, if every rank has written its files.

        Collectives: an all-reduce of an integer while one is under way; once all are done, those of
        `finish`.
        """
        if not self.busy:
            return
        with self._blocked():
            busy = torch.tensor(int(not self._writing.written.done()), device=platform.device())
            dist.all_reduce(busy, op=dist.ReduceOp.MAX)
        if not busy:
            self.finish()

    @property
    def busy(self) -> bool:
        """Whether a save is under way; the same on every rank."""
        return self._writing is not None

    def finish(self) -> None:
        """Wait for the save that is under way and make it a checkpoint.

        Collectives: a gather of what was written, some 200 bytes a tensor, to rank 0, and a
        broadcast of a short text.
        """
        if not self.busy:
            return
        with self._blocked():
            writing, self._writing = self._writing, None
            written = writing.written.result()
            ranks = [None] * dist.get_world_size() if dist.get_rank() == 0 else None
            dist.gather_object(written, ranks)
            outcome = None
            if ranks is not None:
                outcome = self._publish(writing, ranks), max(w.seconds for w in ranks)
            error, self._metrics["checkpoint/write_s"] = broadcast_object(outcome)
            if error:
                self._fail(writing.step, error)
            else:
                self.failure, self._best = None, writing.best

    def metrics(self) -> dict[str, float]:
        """What happened since the last call: seconds that the run waited, seconds that the slowest
        rank wrote, and whether a save failed."""
        metrics, self._metrics = dict(self._metrics), defaultdict(float)
        return metrics

    def check(self) -> None:
        """Raise NotSaved if the last save has failed."""
        if self.failure:
            raise NotSaved(self.failure)

    def close(self) -> None:
        """Wait until no thread writes any more; a save under way is given up. No collective."""
        self._writer.shutdown()

    @contextmanager
    def _blocked(self) -> Iterator[None]:
        start = time.perf_counter()
        try:
            yield
        finally:
            self._metrics["checkpoint/blocked_s"] += time.perf_counter() - start

    def _prepare(self, aside: Path) -> str | None:
        """A directory that all ranks see, or the reason why not."""
        error = None
        if dist.get_rank() == 0:
            remove_remains(self.directory)
            error = _reason(partial(aside.mkdir, parents=True))
        return first(gather(error)) or first(gather(_reason(aside.stat)))

    def _publish(self, writing: _Writing, ranks: list[_Written]) -> str | None:
        """On rank 0; the reason why not."""
        error = first([w.error for w in ranks]) or _reason(
            partial(_complete, writing, ranks, path(self.directory, writing.step))
        )
        if error:
            shutil.rmtree(writing.aside, ignore_errors=True)
        else:
            name_best(self.directory, writing.best)
            keep_newest(self.directory, self.keep, writing.best)
        return error

    def _fail(self, step: int, error: str) -> None:
        self._step = None
        self._metrics["checkpoint/failed"] = 1
        self.failure = f"{path(self.directory, step)}: not saved, {error}"
        self.tell(self.failure)


@dataclass
class _Written:
    """What one rank has written of a checkpoint."""

    files: dict[str, Sum] = field(default_factory=dict)
    results: list[WriteResult] = field(default_factory=list)  # which tensor lies where
    seconds: float = 0.0
    error: str | None = None


@dataclass
class _Writing:
    """A save under way."""

    step: int
    aside: Path
    writer: filesystem_async.FileSystemWriterAsync
    metadata: Metadata | None  # on rank 0
    written: Future[_Written] | None = None
    best: Best | None = None  # once it is there


class _Plan(TorchDistSaveShardedStrategy):
    """Megatron's plan of which rank writes what, without the writing: that is done in a thread,
    where Megatron would fork processes from one that has threads of its own."""

    def _get_save_and_finalize_callbacks(self, writer, planned):
        return writer, planned[1]


def _plan(
    student: Student, run: dict, step: int, aside: Path
) -> tuple[Callable[[], _Written], _Writing]:
    """What this rank is to write, copied, as a function that writes it; touches no file."""
    _allocate_optimizer_state(student)
    sharded = _sharded_state(student, loading=False)
    sharded |= {"run": run, "content_metadata": _OPTIMIZER}
    tensors, common = save_preprocess(sharded)
    filesystem_async._results_queue = queue.Queue()  # or Megatron starts a process to have one
    writer, metadata = _Plan("torch_dist", 1).async_save(tensors, aside)
    sources = {
        t.data.untyped_storage().data_ptr()
        for t in nested_values(tensors)
        if isinstance(t, ShardedTensor)
    }
    buckets = []
    for _, name, (objects, items) in writer.write_buckets:
        copies = [(item, _host_copy(tensor, sources)) for item, tensor in items]
        buckets.append((name, objects + copies))
    writer.write_buckets = None
    platform.synchronize()
    whole = None
    if dist.get_rank() == 0:
        whole = io.BytesIO()
        torch.save(common, whole)
    write = partial(_write, aside, buckets, writer.transforms, whole, student.hf_dir, student.dtype)
    return write, _Writing(step, aside, writer, metadata)


def _host_copy(tensor: Tensor, sources: set[int]) -> Tensor:
    """Of a tensor that may be the student's own; Megatron has copied some, in host memory."""
    if tensor.is_cpu and tensor.untyped_storage().data_ptr() not in sources:
        return tensor
    return tensor.to("cpu", non_blocking=True, copy=True)


def _write(
    aside: Path,
    buckets: list,
    transforms,
    whole: io.BytesIO | None,
    hf_dir: str | Path,
    dtype: torch.dtype,
) -> _Written:
    """Write and sync this rank's files; on rank 0 also what there is once. In a thread."""
    start, written = time.perf_counter(), _Written()

    def write() -> None:
        for name, items in buckets:
            with SummedFile(aside / name) as stream, os_errors_of_torch():
                for item, data in items:
                    how = SerializationFormat.TORCH_SAVE
                    result = _write_item(transforms, stream, data, item, name, how)
                    written.results.append(result)
            written.files[name] = stream.sum
        if whole is not None:
            with SummedFile(aside / "common.pt") as stream:
                stream.write(whole.getbuffer())
            written.files["common.pt"] = stream.sum
            (aside / SIDE_FILES).mkdir()
            copy_side_files(hf_dir, aside / SIDE_FILES, [dtype])
            for file in (aside / SIDE_FILES).iterdir():
                written.files[f"{SIDE_FILES}/{file.name}"] = _synced_sum(file)

    written.error = _reason(write)
    written.seconds = time.perf_counter() - start
    return written


def _complete(writing: _Writing, ranks: list[_Written], final: Path) -> None:
    """Write what describes the files of all ranks, and give the directory its name."""
    writing.writer.finish(writing.metadata, [w.results for w in ranks])
    save_config(CheckpointingConfig("torch_dist", 1), str(writing.aside))
    files = {name: summed for w in ranks for name, summed in w.files.items()}
    for name in (".metadata", "metadata.json"):
        files[name] = _synced_sum(writing.aside / name)
    publish(writing.aside, final, writing.step, files)


def _synced_sum(file: Path) -> Sum:
    sync(file)
    return sum_of(file)


def _reason(attempt: Callable[[], object]) -> str | None:
    """Why something could not be done on this rank's file system; None if it is done."""
    try:
        attempt()
    except OSError as error:
        return f"rank {dist.get_rank()}: {reason_of(error)}"
    return None


def load(directory: str | Path, step: int, student: Student, trust: bool = False) -> dict:
    """Put the student into the state of a checkpoint; return the `state` it was saved with.

    The layout may differ from the one that saved. Random states come back where the world size is
    the same; nothing that a step draws depends on them.

    Args:
        trust: leave it to Megatron's loader what is unpickled.

    Raises:
        ValueError: on every rank, one line: the checkpoint holds something that is no tensor, plain
            value or description of a tensor. Nothing of it has been executed.

    Collectives: Megatron's, and a gather of a short text.
    """
    folder = str(path(directory, step))
    if not trust:
        _check_pickles(folder)
    _allocate_optimizer_state(student)
    sharded = _sharded_state(student, loading=True)
    loaded = dist_checkpointing.load(sharded, folder, get_default_load_sharded_strategy(folder))
    weights.fill(student.trunk, loaded["model"])
    _load_optimizer(student, loaded["optimizer"])
    student.go_on_after(loaded["scheduler"]["num_steps"])
    run = loaded["run"]
    if len(run["rng"]) == dist.get_world_size():
        torch.set_rng_state(run["rng"][dist.get_rank()])
    return {key: value for key, value in run.items() if key != "rng"}


def _sharded_state(student: Student, loading: bool) -> dict:
    model = weights.sharded_weights(student.trunk)
    return {
        "model": weights.without_extra_states(model) if loading else model,
        "optimizer": student.optimizer.sharded_state_dict(
            model, is_loading=loading, metadata=_OPTIMIZER
        ),
        "scheduler": student.scheduler.state_dict(),
    }


def _check_pickles(folder: str) -> None:
    error = None
    try:
        check_pickles(folder, dist.get_rank(), dist.get_world_size())
    except ValueError as refused:
        error = str(refused)
    if error := first(gather(error)):
        raise ValueError(f"{error}; not loaded unless checkpoint.trust is true")


# Megatron's distributed optimizer saves the state of torch's Adam but does not load it: it looks
# for Adam's `step` among the sharded tensors, where it is not, and then gives all parameters one
# shared `step` tensor, which every one of them increments. The three functions below repair that.
# (Apex's and TransformerEngine's Adam keep `step` elsewhere and need none of it.)


def _allocate_optimizer_state(student: Student) -> None:
    """Zero moments before the first update, so that there is something to load into, or save."""
    (distributed,) = student.optimizer.chained_optimizers
    distributed.init_state_fn(distributed.optimizer, distributed.config)
    if isinstance(distributed.optimizer, torch.optim.AdamW):
        for parameter_state in distributed.optimizer.state.values():
            parameter_state.setdefault("step", torch.zeros((), dtype=torch.float32))


def _load_optimizer(student: Student, state: dict) -> None:
    (distributed,) = student.optimizer.chained_optimizers
    # The updates so far: a float where torch's Adam has saved them. The others' kernels want an
    # integer, and they have none before the first update.
    for group in state["optimizer"]["param_groups"]:
        group["step"] = int(group.get("step", 0))
    if not isinstance(distributed.optimizer, torch.optim.AdamW):
        student.optimizer.load_state_dict(state)
        return
    distributed._set_main_param_and_optimizer_states = partial(_set_state, distributed)
    student.optimizer.load_state_dict(state)
    for parameter_state in distributed.optimizer.state.values():
        parameter_state["step"] = parameter_state["step"].clone()


@torch.no_grad()
def _set_state(distributed, parameter: Tensor, tensors: dict[str, Tensor]) -> None:
    group, order = distributed.model_param_group_index_map[parameter]
    main = distributed.optimizer.param_groups[group]["params"][order]
    targets = {"param": main, **distributed.optimizer.state[main]}
    for name, tensor in tensors.items():
        targets[name].copy_(tensor)
