"""What an item found: figures, and figures next to their limits."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import SupportsFloat


@dataclass(frozen=True)
class Check:
    """A figure and its limit.

    Attributes:
        at_least: the limit is a lower one.
        goal: missing it makes the item slow, not wrong.
    """

    what: str
    measured: float
    limit: float
    at_least: bool = False
    goal: bool = False

    @property
    def met(self) -> bool:
        """Whether the limit holds; of a nan it never does."""
        return self.measured >= self.limit if self.at_least else self.measured <= self.limit


@dataclass
class Result:
    """What an item found.

    Attributes:
        figures: what is reported without a limit, with its unit in the name.
        notes: sentences.
        skipped: why it did not run, if it did not.
    """

    checks: list[Check] = field(default_factory=list)
    figures: dict[str, float | str] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    skipped: str | None = None

    def most(self, what: str, measured: SupportsFloat, limit: float, goal: bool = False) -> None:
        """Check that a figure is at most its limit."""
        self.checks.append(Check(what, float(measured), limit, False, goal))

    def least(self, what: str, measured: SupportsFloat, limit: float, goal: bool = False) -> None:
        """Check that a figure is at least its limit."""
        self.checks.append(Check(what, float(measured), limit, True, goal))

    @property
    def outcome(self) -> str:
        """`passed`, `goal missed` (right, but slow or large), `failed` or `skipped`."""
        if self.skipped:
            return "skipped"
        missed = [check for check in self.checks if not check.met]
        if not missed:
            return "passed"
        return "goal missed" if all(check.goal for check in missed) else "failed"


@dataclass(frozen=True)
class Setting:
    """How an item is to run.

    Attributes:
        small: sizes that a CPU can do in seconds.
        scratch: a directory that is deleted afterwards.
        log: the file that this item's processes write to; what it leaves is next to that.
        start: how `apart.call` starts a process.
        gpus: how many may be used; on a CPU, how many processes that stand for one.
    """

    small: bool
    scratch: str
    log: str
    start: str
    gpus: int = 1
