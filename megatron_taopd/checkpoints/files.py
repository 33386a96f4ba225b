"""What makes a directory a checkpoint: its name, and a list of checksums that every file matches.

`step_00000050/` is written as `step_00000050.incomplete/`. The checksums of its files, taken while
they were written, are written last, everything is synced, and then it takes its name. A directory
that goes is renamed to `….deleted/` first, a damaged one to `….damaged/`.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import zlib
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch.distributed as dist

from megatron_taopd.formats.files import reason_of
from megatron_taopd.parallel import watchdog
from megatron_taopd.parallel.objects import gather

MANIFEST = "checksums.json"
BEST = "best.json"
Sum = tuple[int, int]  # of a file: bytes, CRC-32
_BLOCK = 1 << 22
_OF_A_RANK = re.compile(r"__(\d+)_\d+\.distcp")  # as torch's planner names what a rank writes


@dataclass(frozen=True)
class Best:
    """The checkpoint with the best held-out accuracy; the first of them, if several have it."""

    step: int
    accuracy: float


def path(directory: str | Path, step: int) -> Path:
    """Return where the checkpoint of a step is, or would be; nothing is created."""
    return Path(directory) / f"step_{step:08d}"


def steps(directory: str | Path) -> list[int]:
    """List the steps of the checkpoints in a directory, whole or damaged, ascending."""
    names = (entry.name for entry in Path(directory).glob("step_*"))
    return sorted(int(m[1]) for name in names if (m := re.fullmatch(r"step_(\d+)", name)))


class SummedFile:
    """A file that is written from its beginning to its end, and synced when the block ends."""

    def __init__(self, path: str | Path):
        self.stream = open(path, "wb")  # noqa: SIM115
        self.sum: Sum = (0, 0)

    def write(self, data) -> int:
        watchdog.heartbeat()
        self.stream.write(data)
        size = memoryview(data).nbytes
        self.sum = (self.sum[0] + size, zlib.crc32(data, self.sum[1]))
        return size

    def tell(self) -> int:
        return self.sum[0]

    def flush(self) -> None:
        self.stream.flush()

    def __enter__(self) -> SummedFile:
        return self

    def __exit__(self, *_) -> None:
        with self.stream:
            self.stream.flush()
            os.fsync(self.stream.fileno())


def sum_of(file: Path) -> Sum:
    """Read a whole file and return its size in bytes and its CRC-32.

    Raises:
        OSError: the file is not there or cannot be read.
    """
    size = crc = 0
    with file.open("rb") as stream:
        while block := stream.read(_BLOCK):
            watchdog.heartbeat()
            size, crc = size + len(block), zlib.crc32(block, crc)
    return size, crc


def sync(file: Path) -> None:
    """Let a file, or the names in a directory, survive a loss of power."""
    descriptor = os.open(file, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def publish(aside: Path, final: Path, step: int, files: dict[str, Sum]) -> None:
    """Make files that were written and synced a checkpoint.

    Args:
        files: all of them, by their path in the directory.

    Raises:
        OSError: also where a file is not there, or not as long as it was written.
    """
    for name, (size, _) in files.items():
        if (there := (aside / name).stat().st_size) != size:
            raise OSError(f"{name} has {there} of {size} bytes")
    text = json.dumps({"step": step, "files": files, "crc32": _own_sum(step, files)}, indent=1)
    with SummedFile(aside / MANIFEST) as manifest:
        manifest.write(text.encode())
    for folder in {aside, *((aside / name).parent for name in files)}:
        sync(folder)
    aside.rename(final)
    for folder in (final.parent, final.parent.parent):
        sync(folder)


def keep_newest(directory: str | Path, keep: int, best: Best | None = None) -> None:
    """Delete all but the newest checkpoints and the best; one that cannot be deleted stays."""
    for old in steps(directory)[:-keep]:
        if best and old == best.step:
            continue
        with suppress(OSError):
            away = path(directory, old).with_suffix(".deleted")
            path(directory, old).rename(away)
            shutil.rmtree(away)


def name_best(directory: str | Path, best: Best | None) -> None:
    """Say in best.json which checkpoint is the best; that it cannot be written is no harm."""
    file = Path(directory) / BEST
    with suppress(OSError):
        if best is None:
            file.unlink(missing_ok=True)
            return
        aside = file.with_suffix(".incomplete")
        aside.write_text(json.dumps(asdict(best) | {"path": path("", best.step).name}) + "\n")
        aside.rename(file)


def remove_remains(directory: str | Path) -> None:
    """Delete what a run that died was writing or deleting."""
    for suffix in ("incomplete", "deleted"):
        for remains in Path(directory).glob(f"step_*.{suffix}"):
            shutil.rmtree(remains, ignore_errors=True)


def difference(folder: Path, part: int = 0, parts: int = 1) -> str | None:
    """Name the file of a checkpoint that is not what was written; say how. None if all are.

    Args:
        part, parts: compare one of so many shares of the files (`shared`).
    """
    try:
        manifest = json.loads((folder / MANIFEST).read_bytes())
        step, files = manifest["step"], manifest["files"]
        if manifest["crc32"] != _own_sum(step, files) or path("", step).name != folder.name:
            return f"{MANIFEST}: damaged"
    except FileNotFoundError:
        return f"{MANIFEST}: missing"
    except OSError as error:
        return f"{MANIFEST}: {reason_of(error)}"
    except (ValueError, KeyError, TypeError):
        return f"{MANIFEST}: damaged"
    for name in shared(files, parts)[part]:
        try:
            size, crc = files[name]
            if (there := (folder / name).stat().st_size) != size:
                return f"{name}: {there} bytes, {size} were written"
            if sum_of(folder / name)[1] != crc:
                return f"{name}: its checksum is another"
        except OSError as error:
            return f"{name}: {reason_of(error)}"
    return None


def shared(files: dict[str, Sum], parts: int) -> list[list[str]]:
    """Deal the files of a checkpoint, so that a byte is read once from where they are stored.

    Each rank gets the files that it wrote, if there were as many as there are now: on the same
    layout it then loads their tensors, which are in its node's page cache. Otherwise, and what
    rank 0 wrote once for all, they are dealt by size.
    """
    writers = {name: int(found[1]) for name in files if (found := _OF_A_RANK.fullmatch(name))}
    if set(writers.values()) != set(range(parts)):
        writers = {}
    rest = sorted(files.keys() - writers, key=lambda name: files[name])
    deal = writers | {name: place % parts for place, name in enumerate(rest)}
    return [[name for name in sorted(deal) if deal[name] == part] for part in range(parts)]


def latest_valid(
    directory: str | Path, tell: Callable[[str], None], trust: bool = False
) -> int | None:
    """The step of the newest checkpoint that is as it was written; None if there is none.

    Ranks share the files. Newer ones that are damaged are told and set aside. A checkpoint without
    checksums, from before there were any, is as good as a damaged one.

    Args:
        tell: prints a line, once.
        trust: take a checkpoint without checksums, too.

    Raises:
        ValueError: there are checkpoints, and none is valid.

    Collectives: two gathers of a short text for each checkpoint that is looked at.
    """
    there = gather(steps(directory))[0]
    damaged: list[int] = []
    for step in reversed(there):
        folder = path(directory, step)
        if trust and not (folder / MANIFEST).exists():
            found = None if (folder / "metadata.json").exists() else "metadata.json: missing"
        else:
            found = difference(folder, *_share())
        if (found := first(gather(found))) is None:
            _set_aside(directory, damaged)
            gather(None)  # no rank writes here before that
            return step
        damaged.append(step)
        tell(f"{folder}: {found}; not resumed from")
    if there:
        raise ValueError(
            f"{directory}: no checkpoint is as it was written ({folder.name}: {found}); "
            "checkpoint.trust=true takes those without checksums, and a run starts anew once the "
            "directory is removed"
        )
    return None


def first(values: list) -> Any:
    """Return the first value that is not None, or None if there is none."""
    return next((value for value in values if value is not None), None)


def _share() -> tuple[int, int]:
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


def _set_aside(directory: str | Path, damaged: list[int]) -> None:
    """So that they do not count among the newest ones, and make room for new ones of that step."""
    if _share()[0] == 0:
        for step in damaged:
            away = path(directory, step).with_suffix(".damaged")
            shutil.rmtree(away, ignore_errors=True)
            with suppress(OSError):
                path(directory, step).rename(away)


def _own_sum(step: int, files: dict) -> int:
    return zlib.crc32(json.dumps([step, files], sort_keys=True).encode())
