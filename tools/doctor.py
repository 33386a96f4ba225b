"""Examine a run before it starts: what can be known of machine, disk, texts and models.

    python tools/doctor.py CONFIG.yaml section.key=value … --ranks 8
    torchrun --nproc-per-node 8 tools/doctor.py CONFIG.yaml section.key=value …

Under torchrun, with the run's own command line, links, hosts and layouts are examined, too.
Exit status: 0 the run can start, 1 it cannot, 2 the configuration cannot be read.
docs/doctor.md has all checks.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from dataclasses import asdict
from pathlib import Path

import torch.distributed as dist
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from megatron_taopd import config as configuration
from megatron_taopd.preflight.examine import examine, fewest_ranks
from megatron_taopd.preflight.findings import Finding

MARKS = {"ok": "[green]ok", "warning": "[yellow]warning", "error": "[bold red]error"}


def main() -> int:
    arguments = parse()
    speaks = int(os.environ.get("RANK", 0)) == 0
    try:
        config = configuration.load(arguments.config, arguments.overrides)
    except ValueError as error:
        if speaks:
            print(f"error: {error}", file=sys.stderr)
        return 2
    ranks = int(os.environ.get("WORLD_SIZE", arguments.ranks or fewest_ranks(config)))
    console = Console(quiet=not speaks)
    results = []
    for check, findings in examine(config, ranks, arguments.quick):
        results += [{"check": check, **asdict(finding)} for finding in findings]
        console.print(as_table(check, findings))
    levels = [result["level"] for result in results]
    errors, warnings = levels.count("error"), levels.count("warning")
    console.print(f"{errors} errors, {warnings} warnings", style="bold")
    if arguments.json and speaks:
        report = {"errors": errors, "warnings": warnings, "findings": results}
        arguments.json.write_text(json.dumps(report, indent=2) + "\n")
    if dist.is_initialized():
        dist.destroy_process_group()
    return 1 if errors else 0


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("config", help="YAML file")
    parser.add_argument("overrides", nargs="*", help="section.key=value")
    parser.add_argument("--ranks", type=int, help="of the run; default: the fewest that take it")
    parser.add_argument("--quick", action="store_true", help="without the models")
    parser.add_argument("--json", type=Path, help="write the findings there, too")
    return parser.parse_intermixed_args()


def as_table(check: str, findings: list[Finding]) -> Table:
    """Errors first."""
    table = Table(box=SIMPLE_HEAD, show_header=False, title=check, title_justify="left")
    for _ in range(3):
        table.add_column(overflow="fold")
    order = ["error", "warning", "ok"]
    for finding in sorted(findings, key=lambda f: order.index(f.level)):
        table.add_row(MARKS[finding.level], escape(finding.what), escape(finding.remedy))
    return table


if __name__ == "__main__":
    sys.exit(main())
