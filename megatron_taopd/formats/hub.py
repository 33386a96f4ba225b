"""Repositories of the Hugging Face hub, in huggingface_hub's own cache.

A model is `OWNER/NAME[@REVISION]` wherever a directory may stand. huggingface_hub downloads with
its progress bars and its environment variables: HF_HOME, HF_TOKEN, HF_ENDPOINT, HF_HUB_OFFLINE.
"""

from __future__ import annotations

import glob
import logging
import os
import re
from collections.abc import Callable, Sequence
from fnmatch import fnmatch
from functools import cache, partial
from pathlib import Path
from typing import Any

logger = logging.getLogger(__name__)
_MODEL = re.compile(r"([\w-][\w.-]*/[\w-][\w.-]*)(?:@([\w./-]+))?")
# What a model directory has that is read; the same weights in older formats are left where they
# are, and code is never run, only passed on to who takes the student. The card has the licence.
_TEXTS = ("*.json", "*.jinja", "*.model", "*.tiktoken", "*.txt", "*.py", "LICENSE*", "README.md")
_WEIGHTS = ("*.safetensors",)


def is_model(path: str) -> bool:
    """Tell whether a path that is no directory can be a model's name on the hub."""
    return bool(_MODEL.fullmatch(path))


@cache  # a process sees one state of the hub
def model_directory(name: str, weights: bool = True) -> str:
    """Return the directory of a model: the name itself if that is one, or a snapshot in the cache.

    Args:
        name: a directory, or OWNER/NAME[@REVISION]; the branch `main` without one.
        weights: whether the safetensors files are needed, too, or only what describes the model.

    Raises:
        ValueError: in one line: neither a directory nor a name; see `fetch`.
    """
    if os.path.isdir(name):
        return name
    if not (parts := _MODEL.fullmatch(name)):
        raise ValueError(
            f"{name}: no such directory; give a Hugging Face checkpoint directory, or a model of "
            "the hub as OWNER/NAME"
        )
    patterns = (*_TEXTS, *(_WEIGHTS if weights else ()))
    repository = {"repo_id": parts[1], "repo_type": "model", "revision": parts[2] or "main"}
    try:
        folder, names = fetch(name, repository, partial(_matching, patterns))
    except ValueError as error:
        raise ValueError(f"{error} (it is no directory here)") from None
    if "config.json" not in names:
        raise ValueError(f"{name}: on the hub, but without config.json; is it of transformers?")
    return str(folder)


def _matching(patterns: Sequence[str], names: Sequence[str], _where: str) -> list[str]:
    """Return the files at the top of a repository that match."""
    return [n for n in names if "/" not in n and any(fnmatch(n, p) for p in patterns)]


def fetch(
    address: str, repository: dict[str, Any], choose: Callable[[Sequence[str], str], list[str]]
) -> tuple[Path, list[str]]:
    """Bring files of a repository into the cache, or find them there where the hub is out of reach.

    Ranks of a machine may call this together: huggingface_hub lets one of them download.

    Args:
        address: begins the error lines.
        repository: `repo_id`, `repo_type` and `revision`.
        choose: (names of all files, the beginning of an error line) → those to have.

    Returns:
        The directory of the snapshot, and the names that were chosen.

    Raises:
        ValueError: in one line: no such repository or revision; no access; the hub cannot be
            reached and the cache has nothing; what `choose` raises.
    """
    # Importing these takes a while, which runs on local files need not wait for.
    import httpx
    from huggingface_hub import HfApi, constants, snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError
    from huggingface_hub.utils import disable_progress_bars

    if os.environ.get("LOCAL_RANK", "0") != "0":
        disable_progress_bars()  # the ranks of a machine wait for one of them
    try:
        chosen = choose(HfApi().list_repo_files(**repository), address)
        folder = snapshot_download(**repository, allow_patterns=[*map(glob.escape, chosen)])
    except (HfHubHTTPError, httpx.TransportError, OSError) as error:
        status = error.response.status_code if isinstance(error, HfHubHTTPError) else 0
        if status in (401, 403, 404):
            raise ValueError(
                f"{address}: {constants.ENDPOINT} answers {status}; is that the right name and "
                "revision, and does HF_TOKEN open it?"
            ) from None
        reason = f"{constants.ENDPOINT} does not answer"
        if constants.HF_HUB_OFFLINE:
            reason = "HF_HUB_OFFLINE is set"
        try:
            folder = snapshot_download(**repository, local_files_only=True)
        except LocalEntryNotFoundError as missing:
            # Of a snapshot of which only some files were asked for, the error has the place.
            if not (folder := getattr(missing, "snapshot_path", "")):
                kind = "" if repository["repo_type"] == "model" else " --repo-type dataset"
                raise ValueError(
                    f"{address}: {reason}, and the cache {constants.HF_HUB_CACHE} does not have "
                    f"it; `hf download{kind} {repository['repo_id']}` where there is a network"
                ) from None
        there = [str(f.relative_to(folder)) for f in Path(folder).rglob("*") if f.is_file()]
        chosen = choose(there, f"{address}: {reason}, and of the files in the cache")
        if not constants.HF_HUB_OFFLINE:
            logger.warning("%s: %s; the files in the cache are taken", address, reason)
    return Path(folder), chosen
