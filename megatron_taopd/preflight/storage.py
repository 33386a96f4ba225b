"""The run's directory: whether it can be written, has room, is shared, and what it would resume."""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from itertools import starmap
from pathlib import Path
from typing import Any

import yaml

from megatron_taopd.checkpoints import files as checkpoint_files
from megatron_taopd.checkpoints import resume
from megatron_taopd.config.load import with_new_names
from megatron_taopd.formats.files import file_written_aside
from megatron_taopd.parallel.objects import gather, on_rank_0
from megatron_taopd.preflight.findings import Finding, error, ok, warning

CONFIG = "config.yaml"  # in a run's directory, the configuration that it was last built from
FEW_INODES = 10_000
SMALL_SHM = 1 << 30
SETTLE_S = 5.0  # that a shared file system may take to show a new file elsewhere


def standing(path: Path) -> Path:
    """Return the path itself, or the nearest directory above it that is there."""
    return next(p for p in (path, *path.parents) if p.exists())


@contextmanager
def written_file(directory: Path) -> Iterator[Path]:
    """Write a small file there, flush and rename it; directories are made as a run would.

    Nothing is left that was not there before.

    Raises:
        OSError: it cannot be done.
    """
    with ExitStack() as undo:
        missing = [p for p in (directory, *directory.parents) if not p.exists()]
        for path in reversed(missing):
            path.mkdir()
            undo.callback(path.rmdir)
        aside, final = (directory / f".doctor-{os.getpid()}{end}" for end in (".tmp", ""))
        undo.callback(final.unlink, missing_ok=True)
        undo.callback(aside.unlink, missing_ok=True)
        with open(aside, "wb") as file:
            file.write(b"doctor\n")
            file.flush()
            os.fsync(file.fileno())
        aside.rename(final)
        yield final


def check_write(key: str, directory: Path) -> list[Finding]:
    """Write, flush, rename and delete a file in it, alone."""
    try:
        with written_file(directory):
            pass
    except OSError as problem:
        return [_unwritable(key, directory, problem)]
    return [ok(f"{key}: {directory} can be written")]


def check_shared(directory: Path, host: str) -> list[Finding]:
    """Write from global rank 0, and see whether every other rank sees the file. Every rank calls
    this and gets the same.

    Collectives: a broadcast and an all-gather of some 100 bytes.
    """
    with ExitStack() as until_seen:

        def write() -> str | Finding:
            try:
                return str(until_seen.enter_context(written_file(directory)))
            except OSError as problem:
                return _unwritable("run.dir", directory, problem)

        found = on_rank_0(write)
        if isinstance(found, Finding):
            return [found]
        answers = gather((host, _appears(Path(found))))
    if blind := sorted({name for name, sees in answers if not sees}):
        return [
            error(
                f"run.dir: {directory} of rank 0 is not seen on {', '.join(blind)}",
                "every host needs the same directory: give one on a shared file system",
            )
        ]
    return [ok(f"run.dir: {directory} can be written; all {len(answers)} ranks see it")]


def _appears(path: Path) -> bool:
    deadline = time.monotonic() + SETTLE_S
    while not path.exists():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.1)
    return True


def _unwritable(key: str, directory: Path, problem: OSError) -> Finding:
    what = f"{key}: {directory}: {problem.strerror or problem}"
    return error(what, f"a directory that this user can write; {standing(directory)} is there")


def check_space(
    directory: Path,
    parameters: int,
    itemsize: int,
    keep: int,
    export: bool,
    sync_copy: bool,
    average: bool = False,
) -> Iterator[Finding]:
    """Check that there is room for what a run leaves there.

    Args:
        parameters, itemsize: of the student; the bytes of one weight.
        keep: checkpoints; one more is there while it is being written.
        export: the final student as a Hugging Face directory.
        sync_copy: weights go to servers by way of this disk.
        average: a checkpoint has a moving average of the weights, too.
    """
    state = 12 + 4 * average  # Adam's moments and the parameter they belong to, fp32
    checkpoint, weights = parameters * (itemsize + state), parameters * itemsize
    needed = (keep + 1) * checkpoint + (export + sync_copy) * weights
    there = sum(f.stat().st_size for f in directory.glob("checkpoints/step_*/**/*") if f.is_file())
    needed = max(checkpoint, needed - there)
    place = standing(directory)
    free = shutil.disk_usage(place).free
    seen = (
        f"disk of run.dir: {free / 1e9:.1f} GB free; checkpoints of {checkpoint / 1e9:.2f} GB, "
        f"up to {keep + 1} at a time, and the rest take {needed / 1e9:.2f} GB"
    )
    remedy = "free some, give another run.dir, or lower checkpoint.keep_last"
    if free < checkpoint:
        yield error(seen, remedy)
    elif free < needed:
        yield warning(seen, remedy)
    else:
        yield ok(seen)
    inodes = os.statvfs(place)
    # File systems without a fixed number of them say 0.
    if inodes.f_files and inodes.f_favail < FEW_INODES:
        level = error if inodes.f_favail < 100 else warning
        yield level(f"disk of run.dir: {inodes.f_favail} inodes left", "delete small files")


def check_shared_memory(path: Path = Path("/dev/shm")) -> Iterator[Finding]:
    """Check where NCCL's and SGLang's processes of one host meet."""
    if not path.is_dir():
        yield warning(f"{path}: not there", "mount a tmpfs; NCCL and SGLang share memory there")
        return
    space = shutil.disk_usage(path)
    if space.free < SMALL_SHM:
        yield warning(
            f"{path}: {space.free / 2**20:.0f} MiB free",
            "a GiB or more: docker run --shm-size=16g, or --ipc=host",
        )
    else:
        yield ok(f"{path}: {space.total / 2**30:.0f} GiB")


# --------------------------------------------------------------------------------------- resuming


def check_resume(
    directory: Path, steps: int, config: Mapping[str, Any], missing: Sequence[str] = ()
) -> Iterator[Finding]:
    """Say where a run with this directory and configuration (as a tree) would go on, if it can.

    Args:
        missing: what is not written of a run whose steps are done (`checkpoints.end.missing`).
    """
    before = resume.last_start(directory / "checkpoints")
    if before:
        refused = [*resume.refusals(before, resume.start_of(config), directory)]
        if refused:
            yield from starmap(error, refused)
            return
    logged = directory / "metrics.jsonl"
    saved = max(checkpoint_files.steps(directory / "checkpoints"), default=None)
    if saved is None:
        if logged.is_file() and logged.stat().st_size:
            yield warning(
                f"run.dir: {directory} has a log and no checkpoint: the run starts over, and the "
                "log with it",
                "give another run.dir to keep the log",
            )
        else:
            yield ok("run.dir: a new run")
        return
    if saved >= steps and missing:
        yield ok(f"run.dir: all {steps} steps are done; {' and '.join(missing)} is still to write")
    elif saved >= steps:
        yield warning(
            f"run.dir: {directory} has a checkpoint of step {saved}, and train.steps is {steps}: "
            "nothing is left to do",
            "more train.steps, or another run.dir",
        )
    else:
        yield ok(f"run.dir: resumes after step {saved} of {steps}")
    known = before.get("config")
    if not known:
        if not (directory / CONFIG).is_file():
            yield ok(f"run.dir: no {CONFIG} there to compare the configuration with")
            return
        known, _ = with_new_names(yaml.safe_load((directory / CONFIG).read_text()) or {})
    if changed := differences(known, config):
        yield warning(
            f"run.dir: resumes with other values than it was started with: {', '.join(changed)}",
            "intended? they count from here on; else give those of before, or another run.dir",
        )


def differences(before: Mapping, now: Mapping, prefix: str = "") -> list[str]:
    """List `section.key before → now` of every value that differs, but for run.dir."""
    changed = []
    for name in dict.fromkeys([*before, *now]):
        key, old, new = f"{prefix}{name}", before.get(name), now.get(name)
        if isinstance(old, Mapping) and isinstance(new, Mapping):
            changed += differences(old, new, f"{key}.")
        elif old != new and key != "run.dir":
            changed.append(f"{key} {old} → {new}")
    return changed


def save_config(directory: Path, text: str) -> None:
    """Keep the configuration that a run was built from.

    Raises:
        ValueError: it cannot be written; what was there stays.
    """
    with file_written_aside(directory / CONFIG) as aside:
        aside.write_text(text)
