"""Data sets of the Hugging Face hub: `hf://datasets/OWNER/NAME[@REVISION][/FILE or SPLIT]`.

huggingface_hub downloads them into its own cache, with its progress bars and its environment
variables: HF_HOME, HF_TOKEN, HF_ENDPOINT, HF_HUB_OFFLINE.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from urllib.parse import unquote

from megatron_taopd.data.kinds import SUFFIXES
from megatron_taopd.formats.hub import fetch

PREFIX = "hf://"
_ADDRESS = re.compile(r"hf://datasets/([\w.-]+/[\w.-]+)(?:@([^/]+))?(?:/(.*?))?/?")
_SHARD = re.compile(r"-(\d{5})-of-(\d{5})$|/\d{4}$")  # as people upload, and as the hub converts


def is_address(path: str) -> bool:
    """Tell whether a path names something on the hub."""
    return path.startswith(PREFIX)


@cache  # a process sees one state of the hub
def files(address: str) -> list[Path]:
    """Return the files of an address, in their order, from the cache or by way of it.

    Behind NAME may stand a file, or a split such as `train`, in a folder or not (`main/test`);
    without either it is the only one there is, or `train`. Where the hub cannot be reached, the
    files have to be in the cache.

    Raises:
        ValueError: in one line: no address; no such data set, revision, file or split, or several;
            no access; the hub cannot be reached and the files are not in the cache.
    """
    if not (parts := _ADDRESS.fullmatch(address)):
        raise ValueError(
            f"{address}: no data set; write hf://datasets/OWNER/NAME, then @REVISION and /FILE or "
            "/SPLIT if need be"
        )
    wanted = parts[3] or ""
    repository = {
        "repo_id": parts[1],
        "repo_type": "dataset",
        "revision": unquote(parts[2] or "main"),
    }
    folder, chosen = fetch(address, repository, lambda names, where: choose(names, wanted, where))
    return [folder / name for name in chosen]


def choose(names: Sequence[str], wanted: str, address: str) -> list[str]:
    """Return the files that are meant, in their order.

    Args:
        names: of all files of the data set.
        wanted: a file, a split, a folder with one split, or "".
        address: for errors.

    Raises:
        ValueError: there is none, or several splits; a split lacks some of its files.
    """
    if wanted in names:
        return [wanted]
    splits: dict[tuple[str, str], list[str]] = defaultdict(list)
    for name in sorted(names):
        if suffix := max((s for s in SUFFIXES if name.endswith(s)), key=len, default=""):
            splits[_SHARD.sub("", name.removesuffix(suffix)), suffix].append(name)

    def named(split: str, wanted: str) -> bool:
        return split == wanted or split.endswith(f"/{wanted}") or split.startswith(f"{wanted}/")

    found = [each for each in splits if not wanted or named(each[0], wanted)]
    if len(found) > 1 and not wanted:
        found = [each for each in found if named(each[0], "train")] or found
    if len(found) != 1:
        what = f"no file or split {wanted!r}" if not found else "several splits"
        there = ", ".join(sorted(split for split, _ in found or splits)[:12]) or "no files to read"
        raise ValueError(f"{address}: {what}; name one behind the data set: {there}")
    shards = splits[found[0]]
    part = _SHARD.search(shards[0].removesuffix(found[0][1]))
    if part and part[2] and len(shards) != int(part[2]):
        raise ValueError(
            f"{address}: {len(shards)} of the {int(part[2])} files of {found[0][0]} are there; "
            "download it whole"
        )
    return shards
