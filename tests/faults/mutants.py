"""Plants one mistake at a time in a copy of the tree, and sees a test fail for it.

    python tests/faults/mutants.py                      # all of them; exit status 1 if one survives
    python tests/faults/mutants.py --only optimizer --jobs 2 --json figures.json

The mistakes are in `planted/*.yaml`, one file an area: the file, the text that stands there exactly
once, the text that takes its place, and the test that has to notice. A mistake is *caught* if that
test fails (a test file that cannot be imported does not count), and if it passes without it
(--tested: that is known). The suite does not run this: a mistake costs a start of pytest and of its
ranks. docs/reliability.md has the outcome.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path

import yaml

ROOT = Path(__file__).parent.parent.parent
PLANTED = Path(__file__).parent / "planted"
PASSED, FAILED = 0, 1  # pytest's exit statuses
LIMIT_S = 900


@dataclass(frozen=True)
class Mutant:
    """One planted mistake; `area` is the name of the file that lists it."""

    area: str
    name: str
    file: str
    old: str
    new: str
    test: str


@dataclass(frozen=True)
class Outcome:
    """What became of a mistake: "caught", "survived", or why it says nothing."""

    area: str
    name: str
    test: str
    outcome: str
    seconds: float


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--only", nargs="+", help="areas, or parts of a mistake's name")
    parser.add_argument("--jobs", type=int, default=1, help="tests at a time")
    parser.add_argument("--tested", action="store_true", help="the suite has passed just now")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()

    mutants = [m for m in planted() if wanted(m, arguments.only)]
    if not mutants:
        parser.error(f"--only: no mistake is called {' or '.join(arguments.only)}")
    with ThreadPoolExecutor(arguments.jobs) as pool:
        tests = sorted({mutant.test for mutant in mutants})
        check = (lambda test: True) if arguments.tested else (lambda test: run(test) == PASSED)
        passes = dict(zip(tests, pool.map(check, tests), strict=True))
        outcomes = list(pool.map(lambda mutant: plant(mutant, passes[mutant.test]), mutants))
    print()
    print(table(outcomes))
    if arguments.json:
        arguments.json.write_text(json.dumps([asdict(o) for o in outcomes], indent=1) + "\n")
    return int(any(o.outcome != "caught" for o in outcomes))


def planted() -> list[Mutant]:
    """Every mistake, by area."""
    return [
        Mutant(file.stem, **entry)
        for file in sorted(PLANTED.glob("*.yaml"))
        for entry in yaml.safe_load(file.read_text())
    ]


def wanted(mutant: Mutant, only: list[str] | None) -> bool:
    return not only or any(word == mutant.area or word in mutant.name for word in only)


def plant(mutant: Mutant, passes: bool) -> Outcome:
    """Run the mistake's test in a tree that has it."""
    start = time.monotonic()
    if not passes:
        outcome = "its test fails without it"
    elif (found := (ROOT / mutant.file).read_text().count(mutant.old)) != 1:
        outcome = f"its text stands {found} times in {mutant.file}"
    else:
        status = run(mutant.test, mutant)
        known = {PASSED: "survived", FAILED: "caught"}
        outcome = known.get(status, f"pytest's exit status is {status}")
    seconds = time.monotonic() - start
    print(f"{outcome:10} {mutant.area}: {mutant.name} ({seconds:.0f} s)", flush=True)
    return Outcome(mutant.area, mutant.name, mutant.test, outcome, seconds)


def run(test: str, mutant: Mutant | None = None) -> int | str:
    """pytest's exit status in a copy of what git would commit, with or without a mistake."""
    with tempfile.TemporaryDirectory(prefix="mutant-") as directory:
        copy = Path(directory)
        listed = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
        for name in subprocess.check_output(listed, cwd=ROOT, text=True).split("\0"):
            if name and (ROOT / name).is_file():
                (copy / name).parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(ROOT / name, copy / name)
        if mutant is not None:
            text = (copy / mutant.file).read_text()
            (copy / mutant.file).write_text(text.replace(mutant.old, mutant.new))
        command = [sys.executable, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider", test]
        environment = {**os.environ, "PYTHONPATH": str(copy)}
        try:
            done = subprocess.run(
                command, cwd=copy, env=environment, capture_output=True, timeout=LIMIT_S
            )
        except subprocess.TimeoutExpired:
            return f"none after {LIMIT_S} s"
        return done.returncode


def table(outcomes: list[Outcome]) -> str:
    """Mistakes and what was caught, by area, as docs/reliability.md shows them."""
    lines = ["| area | mistakes | caught | not caught |", "|---|---|---|---|"]
    areas = Counter(o.area for o in outcomes)
    for area, count in areas.items():
        missed = [o.name for o in outcomes if o.area == area and o.outcome != "caught"]
        lines.append(f"| {area} | {count} | {count - len(missed)} | {'; '.join(missed)} |")
    caught = sum(o.outcome == "caught" for o in outcomes)
    return "\n".join([*lines, f"| together | **{len(outcomes)}** | **{caught}** | |"])


if __name__ == "__main__":
    sys.exit(main())
