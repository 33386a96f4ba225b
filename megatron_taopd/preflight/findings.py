"""What a check found, and what to do about it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import torch.distributed as dist

from megatron_taopd.parallel.objects import gather


@dataclass(frozen=True)
class Finding:
    """One line of a check.

    Attributes:
        level: a run can start with warnings, and cannot (or would fail later) with an error.
        what: was seen, with the key or thing and its value.
        remedy: what would be right; "" where nothing is wrong.
    """

    level: Literal["ok", "warning", "error"]
    what: str
    remedy: str = ""


def ok(what: str) -> Finding:
    """Say that a thing is right."""
    return Finding("ok", what)


def warning(what: str, remedy: str) -> Finding:
    """Say what a run can start with, and what would be better."""
    return Finding("warning", what, remedy)


def error(what: str, remedy: str) -> Finding:
    """Say what a run cannot start with or would fail by, and what to do about it."""
    return Finding("error", what, remedy)


def examined(check: Callable[..., Iterable[Finding]], *args) -> list[Finding]:
    """Return what a check finds; what it raises is a finding, too, so that the next still runs."""
    found = []
    try:
        for finding in check(*args):
            found.append(finding)
    except Exception as problem:  # whatever a library trips over in the user's files or machine
        what = str(problem).split("\n")[0]
        if not isinstance(problem, ValueError):
            what = f"{check.__name__}: {type(problem).__name__}: {what}"
        found.append(error(what, "put this right; the rest of this check was left out"))
    return found


def of_all_hosts(findings: Sequence[Finding], host: str, speaks: bool) -> list[Finding]:
    """Return every host's findings on every rank: once what all hosts found, the rest by name.

    Args:
        speaks: one rank of each host does.

    Collectives: an all-gather of the findings.
    """
    if not dist.is_initialized():
        return list(findings)
    by_rank = gather((host, list(findings)) if speaks else None)
    hosts = [each for each in by_rank if each is not None]
    everywhere = [f for f in hosts[0][1] if all(f in found for _, found in hosts)]
    local = [
        replace(f, what=f"{name}: {f.what}")
        for name, found in hosts
        for f in found
        if f not in everywhere
    ]
    return everywhere + local
