"""What `data.prompts` and `eval.prompts` name: files, directories of `datasets`, the hub; weights.

Files without weights are read one after the other, as if they were one. Of files with weights the
stream of prompts draws these shares (`prompts.PromptStream`).
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any

from megatron_taopd.data import hub
from megatron_taopd.data.kinds import KNOWN


@dataclass(frozen=True)
class Source:
    """Files that are one list of prompts.

    Attributes:
        paths: as the configuration has them.
        weight: its part of the prompts that are drawn; 1 if it is the only one.
        teacher: the name of the teacher that its prompts are for, unless they say so themselves.
    """

    paths: tuple[str, ...]
    weight: Fraction = Fraction(1)
    teacher: str | None = None

    def files(self) -> list[Path]:
        """Return the files to read, in their order. Raises as `files_of`."""
        return [file for path in self.paths for file in files_of(path)]


def sources_of(prompts: Any) -> list[Source]:
    """Return what the value of a key names.

    Args:
        prompts: a path, or a list of paths, or a list of {path, weight}, with or without teacher.

    Raises:
        ValueError: it is something else; a weight is not above 0; some have one and others not.
    """
    if isinstance(prompts, str | Path):
        return [Source((str(prompts),))]
    items = list(prompts) if isinstance(prompts, list | tuple) else []
    if items and all(isinstance(item, str | Path) for item in items):
        return [Source(tuple(map(str, items)))]
    named = [
        item
        for item in items
        if isinstance(item, dict) and {*item} - {"teacher"} == {"path", "weight"}
    ]
    if not named or len(named) < len(items):
        hint = " (a weight for each, or for none)" if named else ""
        raise ValueError(
            f"{prompts}; it is a path, a list of paths, or a list of {{path, weight}} or "
            f"{{path, weight, teacher}}{hint}"
        )
    return [
        Source((str(item["path"]),), _weight(item["weight"]), item.get("teacher")) for item in named
    ]


def _weight(weight: Any) -> Fraction:
    number = isinstance(weight, int | float) and not isinstance(weight, bool)
    if not number or not 0 < weight < math.inf:
        raise ValueError(f"weight: {weight}; it is a number above 0")
    return Fraction(str(weight))


def with_paths(prompts: Any, change: Callable[[str], str]) -> Any:
    """Return the value of a key with its paths changed; an address on the hub stays. Raises as
    `sources_of`.
    """

    def changed(path: str) -> str:
        return path if hub.is_address(path) else change(path)

    if isinstance(prompts, str):
        return changed(prompts)
    sources_of(prompts)  # what follows takes its form for granted
    return [
        {**item, "path": changed(item["path"])} if isinstance(item, dict) else changed(item)
        for item in prompts
    ]


def written(prompts: Any) -> str:
    """Return the paths of a key's value as a person reads them."""
    return ", ".join(path for source in sources_of(prompts) for path in source.paths)


def files_of(path: str | Path) -> list[Path]:
    """Return the files that a path or an address on the hub stands for, in their order.

    Raises:
        ValueError: there is no such file; a directory that `datasets` did not save, or with several
            splits; see `hub.files`.
    """
    if hub.is_address(str(path)):
        return hub.files(str(path))
    path = Path(path)
    if path.is_dir():
        return _saved(path)
    if not path.is_file():
        raise ValueError(
            f"{path}: no such file; prompts are read from {KNOWN}, and from hf://datasets/…"
        )
    return [path]


def _saved(directory: Path) -> list[Path]:
    """Return the shards of a directory as `Dataset.save_to_disk` leaves it."""
    if (splits := directory / "dataset_dict.json").is_file():
        names = _json(splits).get("splits", [])
        each = ", ".join(str(directory / name) for name in names)
        raise ValueError(f"{directory}: a DatasetDict with several splits; give one: {each}")
    if not (record := directory / "state.json").is_file():
        raise ValueError(
            f"{directory}: a directory, and none that save_to_disk of `datasets` wrote (it has no "
            "state.json); give a file"
        )
    state = _json(record)
    if state.get("_indices_data_files") or state.get("_indices_files"):
        raise ValueError(
            f"{directory}: a selection of rows by an old version of `datasets`; load it and save "
            "it to disk with a newer one"
        )
    names = [shard["filename"] for shard in state.get("_data_files", [])]
    if missing := [name for name in names if not (directory / name).is_file()]:
        raise ValueError(f"{directory / missing[0]}: missing; {record} names it")
    return [directory / name for name in names]


def _json(path: Path) -> dict[str, Any]:
    try:
        return dict(json.loads(path.read_text(encoding="utf-8")))
    except (ValueError, TypeError) as error:
        raise ValueError(f"{path}: not JSON ({error})") from None
