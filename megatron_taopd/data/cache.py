"""Tokenised prompts on disk: columns of rows of unequal length, memory-mapped.

An entry is a directory, called by the digest of everything that its content depends on. It is
written aside and renamed when it is whole: a process that is killed leaves nothing that is taken
for an entry, and of several that write the same one, the first wins. Entries can be deleted at any
time.
"""

from __future__ import annotations

import json
import os
import shutil
import tempfile
import time
from array import array
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from hashlib import sha256
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from megatron_taopd.formats.files import reason_of

FORMAT = 1  # of an entry; a higher number makes all of them anew
ABOUT = "about.json"
_ABANDONED_S = 86400.0  # after which what was written aside has no writer any more

T = TypeVar("T")


class Ragged(Sequence[T]):
    """Rows of unequal length, end to end in one array.

    Args:
        values: [V], of all rows.
        offsets: [N + 1] int64, where each row begins, and the end.
        read: makes of the values of a row what is asked for.
    """

    def __init__(
        self, values: np.ndarray, offsets: np.ndarray, read: Callable[[np.ndarray], T]
    ) -> None:
        self.values, self.offsets, self.read = values, offsets, read

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def __getitem__(self, index: Any) -> Any:
        places = range(len(self))[index]
        if isinstance(places, range):
            return [self[i] for i in places]
        return self.read(self.values[self.offsets[places] : self.offsets[places + 1]])

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Sequence):
            return NotImplemented
        return len(self) == len(other) and all(a == b for a, b in zip(self, other, strict=True))

    def lengths(self) -> np.ndarray:
        """Return how many values each row has, [N] int64."""
        return np.diff(self.offsets)


class Column:
    """A column that is being written.

    Args:
        dtype: of its values; "u1" for text.
    """

    def __init__(self, directory: Path, name: str, dtype: str) -> None:
        self.dtype, self.offsets = np.dtype(dtype), array("q", [0])
        self.path = directory / f"{name}.values"
        self.file = open(self.path, "wb")  # noqa: SIM115 (closed by `close`)

    def append(self, row: Sequence[int] | bytes) -> None:
        if not isinstance(row, bytes):
            row = np.asarray(row, self.dtype).tobytes()
        self.file.write(row)
        self.offsets.append(self.offsets[-1] + len(row) // self.dtype.itemsize)

    def close(self) -> None:
        with open(self.path.with_suffix(".offsets"), "wb") as file:
            self.offsets.tofile(file)
            for each in (self.file, file):
                each.flush()
                os.fsync(each.fileno())
        self.file.close()


def column(entry: Path, name: str, dtype: str, read: Callable[[np.ndarray], T]) -> Ragged[T]:
    """Open a column of an entry, memory-mapped."""
    values, offsets = (
        np.memmap(path, kind, mode="r") if path.stat().st_size else np.zeros(0, kind)
        for path, kind in ((entry / f"{name}.values", dtype), (entry / f"{name}.offsets", "i8"))
    )
    return Ragged(values, offsets, read)


def place(cache_dir: str | None) -> Path:
    """Return the directory of all entries: `data.cache_dir`, or one in the user's cache."""
    if cache_dir is not None:
        return Path(cache_dir)
    home = os.environ.get("XDG_CACHE_HOME") or Path("~/.cache").expanduser()
    return Path(home) / "megatron-taopd" / "prompts"


def digest(made_of: Mapping[str, Any]) -> str:
    """Return 32 hexadecimal digits that change with anything in plain values, and with FORMAT."""
    text = json.dumps({**made_of, "format": FORMAT}, sort_keys=True, ensure_ascii=True)
    return sha256(text.encode()).hexdigest()[:32]


def about(entry: Path) -> dict[str, Any] | None:
    """Return what is known of an entry, or None if it is not there, or not whole."""
    try:
        record = json.loads((entry / ABOUT).read_text())
        sizes = {path.name: path.stat().st_size for path in entry.iterdir() if path.name != ABOUT}
        return record["about"] if sizes == record["sizes"] else None
    except (OSError, ValueError, KeyError, TypeError):
        return None


@contextmanager
def written(entry: Path) -> Iterator[tuple[Path, dict[str, Any]]]:
    """Give a directory to write an entry's columns to, and a dict for what `about` returns of it.

    Raises:
        ValueError: no space left, or the place cannot be written to.
    """
    aside = None
    try:
        entry.parent.mkdir(parents=True, exist_ok=True)
        _remove_abandoned(entry.parent)
        aside = Path(tempfile.mkdtemp(prefix=f"{entry.name}.", dir=entry.parent))
        known: dict[str, Any] = {}
        yield aside, known
        sizes = {path.name: path.stat().st_size for path in aside.iterdir()}
        with open(aside / ABOUT, "w") as file:
            json.dump({"about": known, "sizes": sizes}, file)
            file.flush()
            os.fsync(file.fileno())
        aside.chmod(0o755)
        _rename(aside, entry)
    except OSError as error:
        raise ValueError(
            f"data.cache_dir: {entry.parent}: {reason_of(error)}; give a directory with room that "
            "can be written to"
        ) from error
    finally:
        if aside is not None:
            shutil.rmtree(aside, ignore_errors=True)


def _rename(aside: Path, entry: Path) -> None:
    """Give what is aside its name, unless another process has been faster."""
    if about(entry) is None:
        shutil.rmtree(entry, ignore_errors=True)
        try:
            aside.rename(entry)
        except OSError:
            if about(entry) is None:
                raise


def _remove_abandoned(directory: Path) -> None:
    """Remove what processes that were killed have left aside."""
    for path in directory.glob("*.*"):
        if time.time() - path.stat().st_mtime > _ABANDONED_S:
            shutil.rmtree(path, ignore_errors=True)
