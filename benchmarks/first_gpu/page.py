"""The page: a table of all items, and below it what each of them found."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass

from benchmarks.first_gpu.items import Item
from benchmarks.first_gpu.result import Check, Result

MARKS = {"passed": "✓", "goal missed": "slow", "failed": "**failed**", "skipped": "–"}


@dataclass(frozen=True)
class Entry:
    """An item and what came of it.

    Attributes:
        trouble: what ended it before it had a result.
        output: the last lines of its log, if it failed.
    """

    item: Item
    result: Result
    seconds: float
    trouble: str | None = None
    output: str = ""

    @property
    def outcome(self) -> str:
        return "failed" if self.trouble else self.result.outcome

    @property
    def word(self) -> str:
        """Say in a few words why it is not simply passed."""
        if self.trouble or self.result.skipped:
            return str(self.trouble or self.result.skipped)
        return "; ".join(words(check) for check in self.result.checks if not check.met)


def words(check: Check) -> str:
    """Say a check with its figures."""
    sign = "≥" if check.at_least else "≤"
    if not check.met:
        sign = "<" if check.at_least else ">"
    return f"{check.what}: {number(check.measured)} {sign} {number(check.limit)}"


def number(value: float | str) -> str:
    """Write a figure with three digits, and a count as it is."""
    if isinstance(value, str):
        return value
    whole = math.isfinite(value) and value == round(value) and abs(value) < 1e9
    return f"{value:,.0f}" if whole else f"{value:.3g}"


def page(
    machine: Mapping[str, str | int], entries: list[Entry], small: bool, seconds: float
) -> str:
    """Return the whole page in Markdown."""
    return "\n".join(_lines(machine, entries, small, seconds)) + "\n"


def _lines(
    machine: Mapping[str, str | int], entries: list[Entry], small: bool, seconds: float
) -> Iterator[str]:
    counts = {outcome: sum(entry.outcome == outcome for entry in entries) for outcome in MARKS}
    summary = ", ".join(f"{count} {outcome}" for outcome, count in counts.items() if count)
    yield "# The first GPU day\n"
    yield f"{summary}, in {seconds:.0f} s.\n"
    if machine.get("device") != "cuda":
        yield "**On a CPU: this shows that the script runs, and nothing about a GPU.**\n"
    elif small:
        yield "**In small sizes: times, rates and shares mean nothing.**\n"
    yield from _table(("machine", ""), [(name, str(value)) for name, value in machine.items()])
    yield from _table(
        ("item", "", "s", ""),
        [
            (f"[{e.item.name}](#{e.item.name})", MARKS[e.outcome], f"{e.seconds:.0f}", e.word)
            for e in entries
        ],
    )
    for entry in entries:
        yield from _section(entry)


def _section(entry: Entry) -> Iterator[str]:
    result = entry.result
    yield f"## {entry.item.name}\n"
    yield f"{entry.item.proves}\n"
    if entry.word and not result.checks:
        yield f"{entry.outcome.capitalize()}: {entry.word}.\n"
    if result.checks:
        rows = [
            (
                check.what,
                number(check.measured),
                f"{'≥' if check.at_least else '≤'} {number(check.limit)}",
                "met" if check.met else "goal missed" if check.goal else "**failed**",
            )
            for check in result.checks
        ]
        yield from _table(("check", "measured", "limit", ""), rows)
    if result.figures:
        rows = [(name, number(value)) for name, value in result.figures.items()]
        yield from _table(("figure", ""), rows)
    for note in result.notes:
        yield f"{note}\n"
    if entry.output:
        yield f"```text\n{entry.output}\n```\n"


def _table(header: tuple[str, ...], rows: list[tuple[str, ...]]) -> Iterator[str]:
    def line(cells: tuple[str, ...]) -> str:
        escaped = (cell.replace("|", "\\|").replace("\n", " ") for cell in cells)
        return f"| {' | '.join(escaped)} |"

    yield line(header)
    yield line(("---",) * len(header))
    yield from map(line, rows)
    yield ""


def as_json(
    machine: Mapping[str, str | int], entries: list[Entry], small: bool, seconds: float
) -> dict:
    """Return the same for programs."""
    return {
        "machine": dict(machine),
        "small": small,
        "seconds": round(seconds, 1),
        "items": [
            {
                "name": entry.item.name,
                "outcome": entry.outcome,
                "seconds": round(entry.seconds, 1),
                "why": entry.word,
                "checks": [asdict(c) | {"met": c.met} for c in entry.result.checks],
                "figures": entry.result.figures,
                "notes": entry.result.notes,
            }
            for entry in entries
        ],
    }
