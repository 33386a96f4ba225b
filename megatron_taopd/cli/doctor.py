"""Examine a run before it starts: what can be known of machine, disk, texts and models.

    taopd doctor CONFIG.yaml section.key=value … --ranks 8
    taopd launch --nproc-per-node 8 -m megatron_taopd doctor CONFIG.yaml section.key=value …

Under torchrun, with the run's own command line, links, hosts and layouts are examined, too.
Exit status: 0 the run can start, 1 it cannot, 2 the configuration cannot be read.
docs/doctor.md has all checks.
"""

from __future__ import annotations

import argparse
import os
from dataclasses import asdict
from typing import TYPE_CHECKING

from rich.box import SIMPLE_HEAD
from rich.markup import escape
from rich.table import Table

from megatron_taopd import config as configuration
from megatron_taopd.cli import common
from megatron_taopd.preflight.models import with_model_directories

if TYPE_CHECKING:
    from megatron_taopd.preflight.findings import Finding

MARKS = {"ok": "[green]ok", "warning": "[yellow]warning", "error": "[bold red]error"}


def main(arguments: list[str]) -> int:
    """Examine; the exit status is 0 if the run can start, 1 if not."""
    return common.run(work, parse(arguments))


def work(arguments: argparse.Namespace) -> int:
    """Print the findings of each check as it ends."""
    config = with_model_directories(configuration.load(arguments.config, arguments.overrides))
    # It takes seconds to import, for which a typo does not wait.
    from megatron_taopd.preflight.examine import examine, fewest_ranks

    ranks = int(os.environ.get("WORLD_SIZE", arguments.ranks or fewest_ranks(config)))
    console = common.open_console()
    results = []
    for check, findings in examine(config, ranks, arguments.quick):
        results += [{"check": check, **asdict(finding)} for finding in findings]
        console.print(as_table(check, findings))
    levels = [result["level"] for result in results]
    errors, warnings = levels.count("error"), levels.count("warning")
    console.print(f"{errors} errors, {warnings} warnings", style="bold")
    report = {"errors": errors, "warnings": warnings, "findings": results}
    common.write_json(arguments.json, report)
    return 1 if errors else 0


def parse(arguments: list[str]) -> argparse.Namespace:
    """Read the arguments, overrides among options."""
    parser = common.Parser(prog="taopd doctor", description=__doc__)
    parser.add_argument("config", help="YAML file")
    parser.add_argument("overrides", nargs="*", help="section.key=value")
    parser.add_argument("--ranks", type=int, help="of the run; default: the fewest that take it")
    parser.add_argument("--quick", action="store_true", help="without the models")
    common.add_json(parser, "the findings")
    return parser.parse_intermixed_args(arguments)


def as_table(check: str, findings: list[Finding]) -> Table:
    """Lay out the findings of one check, errors first."""
    table = Table(box=SIMPLE_HEAD, show_header=False, title=check, title_justify="left")
    for _ in range(3):
        table.add_column(overflow="fold")
    order = ["error", "warning", "ok"]
    for finding in sorted(findings, key=lambda f: order.index(f.level)):
        table.add_row(MARKS[finding.level], escape(finding.what), escape(finding.remedy))
    return table
