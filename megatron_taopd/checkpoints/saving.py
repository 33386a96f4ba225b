"""Everything that moves a run, saved while the run goes on and resumed on any layout.

A checkpoint is a directory `step_00000050/` in Megatron's distributed format: the model, the
distributed optimizer's state, the learning-rate schedule and the run's counters, and next to them
the model's config and tokenizer, so that it converts to Hugging Face by itself. A save copies all
of it to host memory; a thread writes the copies while the next step runs
(`writing`); `files` has what then makes the files a checkpoint.
"""

from __future__ import annotations

import shutil
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import torch
import torch.distributed as dist
from megatron.core import dist_checkpointing

from megatron_taopd.checkpoints import optimizer, shards
from megatron_taopd.checkpoints.files import (
    Best,
    first,
    keep_newest,
    latest_valid,
    name_best,
    path,
    remove_remains,
    steps,
)
from megatron_taopd.checkpoints.writing import (
    Writing,
    Written,
    complete,
    plan_writing,
    reason_why_not,
)
from megatron_taopd.formats.unpickle import check_pickles
from megatron_taopd.models import weights
from megatron_taopd.models.student import Student
from megatron_taopd.parallel import platform, progress
from megatron_taopd.parallel.copies import HostCopies
from megatron_taopd.parallel.objects import gather, on_rank_0

__all__ = ["Checkpoints", "NotSaved", "latest_valid", "load", "path", "steps"]

_FORMAT = "fully_reshardable"  # of the optimizer's state, in Megatron's words


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
        self._writing: Writing | None = None
        self._writer = ThreadPoolExecutor(1, "checkpoint")
        self._host = HostCopies()
        self._metrics: dict[str, float] = defaultdict(float)
        kept = Best(*best) if best and path(self.directory, best[0]).is_dir() else None
        self._best: Best | None = gather(kept)[0]
        if dist.get_rank() == 0:
            remove_remains(self.directory)
            name_best(self.directory, self._best)

    @property
    def best(self) -> Best | None:
        """Return the best one that is there or under way."""
        return self._best if self._writing is None else self._writing.best

    def would_be_best(self, accuracy: float) -> bool:
        return self.best is None or accuracy > self.best.accuracy

    def save(
        self,
        step: int,
        student: Student,
        state: dict,
        accuracy: float | None = None,
        card: str | None = None,
    ) -> None:
        """Save the run after `step` steps, unless that is there already.

        Nothing that the run does after the call changes what is written: the device, which the run
        does not wait for, copies first. A save that is still under way is waited for.

        Args:
            state: what the run needs besides the student: plain values and tensors, equal on all
                ranks.
            accuracy: on held-out prompts, where it was evaluated after this step.
            card: the model card of the student after this step, which an export has.

        Each rank holds and writes 14 bytes (bf16; fp32: 16) of every element that its optimizer
        owns (`shards`).

        Collectives: gathers of the plan (some 300 bytes a tensor and rank) to rank 0, of the random
        states and of short texts.
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
            optimizer.allocate(student)
            write, plan = plan_writing(
                _state(student) | {"run": run}, student, aside, card, self._host
            )
            self._writing = Writing(step, aside, plan, best, self._writer.submit(write))
            self._step = step
        if not self.asynchronous:
            self.finish()

    def poll(self) -> None:
        """Make the save that is under way a checkpoint, if every rank has written its files.

        Collectives: an all-reduce of an integer while one is under way; once all are done, those of
        `finish`.
        """
        if self._writing is None:
            return
        with self._blocked():
            busy = torch.tensor(int(not self._writing.written.done()), device=platform.device())
            dist.all_reduce(busy, op=dist.ReduceOp.MAX)
        if not busy:
            self.finish()

    @property
    def busy(self) -> bool:
        """Tell whether a save is under way; the same on every rank."""
        return self._writing is not None

    def finish(self) -> None:
        """Wait for the save that is under way and make it a checkpoint.

        Collectives: a gather of what was written, some 200 bytes a tensor, to rank 0, and a
        broadcast of a short text.
        """
        writing = self._writing
        if writing is None:
            return
        with self._blocked():
            self._writing = None
            written = writing.written.result()
            leads = dist.get_rank() == 0
            ranks: list = [None] * (dist.get_world_size() if leads else 0)
            dist.gather_object(written, ranks if leads else None)
            error, self._metrics["checkpoint/write_s"] = on_rank_0(
                lambda: (self._publish(writing, ranks), max(w.seconds for w in ranks))
            )
            if error:
                self._fail(writing.step, error)
            else:
                self.failure, self._best = None, writing.best

    def metrics(self) -> dict[str, float]:
        """Return what happened since the last call.

        That is seconds that the run waited, seconds that the slowest rank wrote, and whether a save
        failed.
        """
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
        """Make a directory that all ranks see; return the reason if that fails."""
        error = None
        if dist.get_rank() == 0:
            remove_remains(self.directory)
            error = reason_why_not(partial(aside.mkdir, parents=True))
        return first(gather(error)) or first(gather(reason_why_not(aside.stat)))

    def _publish(self, writing: Writing, ranks: list[Written]) -> str | None:
        """Make the files a checkpoint, on rank 0; return the reason if that fails."""
        error = first([w.error for w in ranks]) or reason_why_not(
            partial(complete, writing, ranks, path(self.directory, writing.step))
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


def load(directory: str | Path, step: int, student: Student, trust: bool = False) -> dict:
    """Put the student into the state of a checkpoint; return the `state` it was saved with.

    The layout may differ from the one that saved. Random states come back where the world size is
    the same; nothing that a step draws depends on them.

    Args:
        trust: leave it to Megatron's loader what is unpickled.

    Raises:
        ValueError: on every rank, one line: the checkpoint holds something that is no tensor, plain
            value or description of a tensor. Nothing of it has been executed.

    Each rank reads 12 bytes of every element that its optimizer owns, and on another layout than
    the one that saved the rest of the chunks that these lie in.

    Collectives: Megatron's, those of `optimizer.go_on_from`, and a gather of a short text.
    """
    folder = str(path(directory, step))
    if not trust:
        _check_pickles(folder)
    optimizer.allocate(student)
    with progress.phase(f"loading {folder}"):
        owned = shards.of_optimizer(student) + shards.of_average(student)
        wanted = {"owned": owned, "frozen": shards.of_frozen(student)}
        loaded = dist_checkpointing.load(wanted, folder)
    optimizer.go_on_from(student, loaded["optimizer"])
    student.go_on_after(loaded["scheduler"]["num_steps"])
    run = loaded["run"]
    if len(run["rng"]) == dist.get_world_size():
        torch.set_rng_state(run["rng"][dist.get_rank()])
    return {key: value for key, value in run.items() if key != "rng"}


def _state(student: Student) -> dict:
    """Everything of the student that is saved: what this rank owns, and what is saved once."""
    model = weights.sharded_weights(student.trunk)
    state = shards.of_optimizer(student) + shards.of_average(student)
    return {
        "model": weights.extra_states(model)
        | {"owned": shards.of_weights(student), "frozen": shards.of_frozen(student)},
        "optimizer": optimizer.settings(student)
        | {"param_state": state, "param_state_sharding_type": _FORMAT},
        "scheduler": student.scheduler.state_dict(),
        "content_metadata": {"distrib_optim_sharding_type": _FORMAT},
    }


def _check_pickles(folder: str) -> None:
    error = None
    try:
        check_pickles(folder, dist.get_rank(), dist.get_world_size())
    except ValueError as refused:
        error = str(refused)
    if error := first(gather(error)):
        raise ValueError(f"{error}; not loaded unless checkpoint.trust is true")
