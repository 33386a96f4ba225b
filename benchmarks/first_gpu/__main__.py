"""Prove on a GPU what could not be proven without: a page in Markdown, and JSON, in ten minutes.

    python tools/first_gpu.py                    # one GPU
    python tools/first_gpu.py --gpus 2           # and weights that are broadcast to another
    python tools/first_gpu.py --only kernels attention

Each item runs in a process of its own, which may crash or hang. Without a GPU everything runs in
small sizes, which proves that it runs. docs/gpu.md says what each item proves, and what to do when
it fails. Exit status: 0 nothing failed, 1 something did, 2 the arguments are wrong.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

from rich.box import SIMPLE
from rich.console import Console
from rich.table import Table

from benchmarks.first_gpu import apart
from benchmarks.first_gpu.items import ITEMS, Item
from benchmarks.first_gpu.page import Entry, as_json, page
from benchmarks.first_gpu.result import Result, Setting

ROOT = Path(__file__).parents[2]
NAMES = [item.name for item in ITEMS]
PACKAGE = "benchmarks.first_gpu"
CPU_SLACK = 10  # a CPU may be busy with anything, and items are made for a GPU's time
INTERRUPTED = 130  # the exit status after Ctrl-C
LOG = "output.log"  # in a directory of each item, with whatever else it leaves
COLORS = {"passed": "green", "goal missed": "yellow", "failed": "bold red", "skipped": "dim"}


def main(arguments: list[str] | None = None) -> int:
    """Run the items and write the page; return the exit status."""
    asked = parse(arguments)
    began = time.monotonic()
    # Packages tell what else is not installed, which the page does. Processes that are started find
    # this tree, wherever they are started from.
    os.environ.setdefault("PYTHONWARNINGS", "ignore::UserWarning")
    paths = [str(ROOT), os.environ.get("PYTHONPATH")]
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, paths))
    console, entries = Console(), []
    file = asked.out.resolve() / "page.md"
    status = 0
    try:
        for entry in run_all(asked, began, console):
            entries.append(entry)
    except KeyboardInterrupt:  # items have been ended; the page has those before
        status = INTERRUPTED
    console.print(as_table(entries))
    console.print(f"{file}, in {time.monotonic() - began:.0f} s", highlight=False)
    return status or int(any(entry.outcome == "failed" for entry in entries))


def run_all(asked: argparse.Namespace, began: float, console: Console) -> Iterator[Entry]:
    """Run the items that are asked for; after each of them the page has it."""
    out = asked.out.resolve()
    log = clean(out / "machine") / LOG
    found = apart.call(f"{PACKAGE}.machine:facts", (), log, 120, "spawn")
    machine = found.value or {"device": "unknown", "trouble": found.trouble, "gpus": 0}
    on_cuda = machine["device"] == "cuda"
    small = asked.small or not on_cuda
    start = "spawn" if on_cuda or asked.spawn else "forkserver"
    how = Setting(small, "", "", start, asked.gpus)
    console.print(f"{machine.get('name', machine['device'])}, torch {machine.get('torch', '?')}")
    entries: list[Entry] = []
    for item in ITEMS:
        if item.name in asked.skip or (asked.only and item.name not in asked.only):
            continue
        console.print(f"{item.name} …", style="dim")
        left = 60 * asked.minutes - (time.monotonic() - began)
        limit = min(left, item.limit_s * (1 if on_cuda else CPU_SLACK))
        entry = run(item, reason_to_skip(item, asked, machine, left), out, how, limit)
        entries.append(entry)
        seconds = time.monotonic() - began
        write(out / "page.md", page(machine, entries, small, seconds))
        report = as_json(machine, entries, small, seconds)
        write(asked.json or out / "results.json", json.dumps(report, indent=1) + "\n")
        yield entry


def run(item: Item, skipped: str | None, out: Path, how: Setting, limit_s: float) -> Entry:
    """Run an item in a process of its own, unless it is skipped.

    Args:
        how: to run it, but for its scratch and log.
        limit_s: after which it is ended.
    """
    if skipped:
        return Entry(item, Result(skipped=skipped), 0.0)
    log = clean(out / item.name) / LOG
    with tempfile.TemporaryDirectory(prefix="first_gpu_") as scratch:
        setting = replace(how, scratch=scratch, log=str(log))
        outcome = apart.call(f"{PACKAGE}.{item.target}", (setting,), log, limit_s, how.start)
    if outcome.trouble:
        output = apart.tail(log)
        return Entry(item, Result(), outcome.seconds, outcome.trouble, output)
    return Entry(item, outcome.value, outcome.seconds)


def write(file: Path, text: str) -> None:
    """Write a file next to its place, and move it there."""
    aside = file.with_suffix(".incomplete")
    aside.write_text(text)
    aside.replace(file)


def clean(directory: Path) -> Path:
    """Make a directory that has nothing of an earlier call."""
    shutil.rmtree(directory, ignore_errors=True)
    directory.mkdir(parents=True)
    return directory


def reason_to_skip(item: Item, asked: argparse.Namespace, machine: dict, left: float) -> str | None:
    """Say why an item cannot run."""
    if left < 5:
        return f"no time left of {asked.minutes:g} minutes"
    if asked.gpus < item.gpus:
        return f"needs --gpus {item.gpus}"
    if item.package and machine.get(item.package) == "not installed":
        return f"{item.package} is not installed"
    if machine["device"] == "cuda" and int(machine["gpus"]) < item.gpus:
        return f"needs {item.gpus} GPUs, there is {machine['gpus']}"
    return None


def as_table(entries: list[Entry]) -> Table:
    """Lay out the outcomes."""
    table = Table(box=SIMPLE, show_header=False)
    for justify in ("left", "left", "right", "left"):
        table.add_column(justify=justify, overflow="fold")
    for entry in entries:
        mark = f"[{COLORS[entry.outcome]}]{entry.outcome}"
        table.add_row(entry.item.name, mark, f"{entry.seconds:.0f} s", entry.word)
    return table


def parse(arguments: list[str] | None) -> argparse.Namespace:
    """Read the arguments; a mistake ends the process with status 2."""
    parser = argparse.ArgumentParser(
        prog="first_gpu.py",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--gpus", type=int, default=1, help="how many may be used; default 1")
    parser.add_argument("--only", nargs="+", choices=NAMES, default=[], metavar="ITEM")
    parser.add_argument(
        "--skip", nargs="+", choices=NAMES, default=[], metavar="ITEM", help=", ".join(NAMES)
    )
    parser.add_argument("--out", type=Path, default=Path("runs/first_gpu"), help="directory")
    parser.add_argument("--json", type=Path, help="the figures; default: results.json in --out")
    parser.add_argument("--minutes", type=float, default=10.0, help="after which items are skipped")
    parser.add_argument("--small", action="store_true", help="small sizes on a GPU, too")
    parser.add_argument(
        "--spawn", action="store_true", help="start processes as on a GPU, without forks"
    )
    asked = parser.parse_args(arguments)
    if asked.gpus < 1:
        parser.error(f"--gpus: {asked.gpus}; it has to be at least 1")
    if asked.json and not asked.json.absolute().parent.is_dir():
        parser.error(f"--json: {asked.json}: there is no directory {asked.json.absolute().parent}")
    if asked.minutes <= 0:
        parser.error(f"--minutes: {asked.minutes:g}; it has to be more than 0")
    return asked


if __name__ == "__main__":
    sys.exit(main())
