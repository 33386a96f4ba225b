"""Directories that are there whole or not at all."""

from __future__ import annotations

import errno
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import torch.distributed as dist


@contextmanager
def written_aside(out: str | Path) -> Iterator[Path]:
    """Give a directory to write, which takes the name `out` when the block has ended.

    What stood there is replaced. If the block raises, nothing is left; if the process is killed,
    `out.incomplete` is, and the next attempt starts it over. Every rank calls this.

    Raises:
        ValueError: no space left, or the place cannot be written to.

    Collectives: two barriers.
    """
    out = Path(out)
    aside = out.with_name(out.name + ".incomplete")
    first = not dist.is_initialized() or dist.get_rank() == 0
    try:
        if first:
            shutil.rmtree(aside, ignore_errors=True)
            aside.mkdir(parents=True)
        _barrier()
        yield aside
        _barrier()
        if first:
            _replace(out, aside)
    except OSError as error:
        shutil.rmtree(aside, ignore_errors=True)
        raise ValueError(f"{out}: {reason_of(error)}; nothing was kept") from error
    except BaseException:
        shutil.rmtree(aside, ignore_errors=True)
        raise
    _barrier()


def _replace(out: Path, aside: Path) -> None:
    """Give what is aside the name `out`; what had it, a directory or a file, is removed."""
    replaced = out.with_name(out.name + ".replaced")
    _remove(replaced)  # of a process that was killed between these lines
    if out.exists():
        out.rename(replaced)
    aside.rename(out)
    _remove(replaced)


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


@contextmanager
def file_written_aside(out: str | Path) -> Iterator[Path]:
    """Give a path to write a file to, which takes the name `out` when the block has ended.

    If the block raises, nothing is left but a file that was there before.

    Raises:
        ValueError: no space left, or the place cannot be written to.
    """
    out = Path(out)
    aside = out.with_name(out.name + ".incomplete")
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        yield aside
        aside.replace(out)
    except OSError as error:
        raise ValueError(f"{out}: {reason_of(error)}; nothing was kept") from error
    finally:
        with suppress(OSError):  # it is not there, or nothing can be there
            aside.unlink()


def reason_of(error: OSError) -> str:
    """Say in a few words why a file operation failed."""
    full = error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
    return "no space left" if full else error.strerror or str(error)


@contextmanager
def os_errors_of_torch() -> Iterator[None]:
    """Raise the OSError, a full disk say, over which torch.save trips and which it hides."""
    try:
        yield
    except RuntimeError as error:
        raise (error.__context__ if isinstance(error.__context__, OSError) else error) from None


def check_space(out: str | Path, needed: int) -> None:
    """Raise ValueError unless the file system of `out` has room for so many bytes."""
    place = Path(out).absolute().parent
    while not place.exists():
        place = place.parent
    with suppress(OSError):
        free = shutil.disk_usage(place).free
        if free < needed:
            raise ValueError(
                f"{out}: needs {needed / 1e9:.2f} GB, {place} has {free / 1e9:.2f} GB free"
            )


def _barrier() -> None:
    if dist.is_initialized():
        dist.barrier()
