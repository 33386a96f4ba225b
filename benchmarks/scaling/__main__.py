"""What a step costs on 64, 256 and 1,024 GPUs: by formula, and what can be measured without them.

    python -m benchmarks.scaling counts CONFIG.yaml --gpus 64
    python -m benchmarks.scaling saturate CONFIG.yaml --gpus 64 256 1024
    python -m benchmarks.scaling measure
    python -m benchmarks.scaling host
    torchrun --nproc-per-node 2 -m benchmarks.scaling ranks --tp 2

    counts    every collective of a rank
    saturate  phases, and what stops scaling
    measure   the formulas next to what ranks of 64 really call
    host      what every rank's host does for the whole batch
    ranks     a real step, CPU seconds

The first two read a configuration and both models' config.json, the others nothing. docs/scaling.md
has the results.
"""

from __future__ import annotations

import argparse
import json
import sys
import warnings
from pathlib import Path

from rich.console import Console, Group

from benchmarks.scaling import results
from megatron_taopd import config as configuration
from megatron_taopd.config.values import check_sections
from megatron_taopd.plan.cluster import CLUSTERS, load_cluster
from megatron_taopd.plan.setup import Setup


def main() -> int:
    """Run one part; the exit status is 0, or 2 after a mistake."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.scaling", description=__doc__.split("\n")[0]
    )
    commands = parser.add_subparsers(required=True)

    def command(run, **defaults):
        added = commands.add_parser(run.__name__, help=run.__doc__)
        added.set_defaults(run=run, **defaults)
        added.add_argument("--json", type=Path, help="write the figures there, too")
        return added

    for run, sizes in ((counts, None), (saturate, "+")):
        planned = command(run)
        planned.add_argument("config", help="CONFIG.yaml")
        planned.add_argument("overrides", nargs="*", help="section.key=value")
        planned.add_argument("--gpus", type=int, nargs=sizes, required=True, help="that train")
        planned.add_argument("--prompt-tokens", type=int, help="of the average; default: the most")
        planned.add_argument("--response-tokens", type=int, help="likewise")
        planned.add_argument("--trained-share", type=float, default=1.0, help="of tokens")
        if run is counts:
            planned.add_argument("--rank", type=int, help="default: the last")
    planned.add_argument("--cluster", default="h800", help=f"{', '.join(CLUSTERS)} or a YAML file")
    planned.add_argument("--grow", action="store_true", help="the batch grows with the GPUs")
    planned.add_argument("--gpus-per-server", type=int, help="one SGLang server for so many")
    planned.add_argument("--host-seconds", type=float, default=0.22, help="per million rows")
    command(measure)
    timed = command(host)
    timed.add_argument("--sequences", type=int, nargs="+", default=[32, 256, 2048, 8192])
    timed.add_argument("--response", type=int, default=2048, help="tokens of each")
    timed.add_argument("--tp", type=int, default=2, help="of 64 ranks, of both models")
    real = command(ranks)
    real.add_argument("--tp", type=int, default=1, help="of the student; the rest is dp")
    real.add_argument("--sequences", type=int, default=16, help="of the whole batch")
    real.add_argument("--steps", type=int, default=2, help="timed, after one that is not")
    arguments = parser.parse_args()

    warnings.simplefilter("ignore")  # of torch and Megatron, about names of functions
    try:
        table, figures = arguments.run(arguments)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    console = Console()
    if not console.is_terminal:
        console.width = 140
    if table is not None:
        console.print(table)
        if arguments.json:
            arguments.json.write_text(json.dumps(figures, indent=2) + "\n")
    return 0


def _lengths(arguments) -> dict:
    names = ("prompt_tokens", "response_tokens", "trained_share")
    return {name: getattr(arguments, name) for name in names}


def _config(arguments) -> configuration.Config:
    config = configuration.load(arguments.config, arguments.overrides)
    check_sections(config)
    return config


def counts(arguments):
    """List every collective of a rank in one step, by formula."""
    from benchmarks.scaling.share import share_of_rank_0, traffic
    from megatron_taopd.plan.collectives import step_collectives

    config = _config(arguments)
    setup = Setup.of(config, arguments.gpus, **_lengths(arguments))
    rank = setup.gpus - 1 if arguments.rank is None else arguments.rank
    if not 0 <= rank < setup.gpus:
        raise ValueError(f"--rank: {rank}; it has to be within 0 … {setup.gpus - 1}")
    found = step_collectives(setup, rank)
    layouts = f"student {setup.student_grid}, teacher {setup.teacher_grid or 'served'}"
    title = f"Collectives of a step on rank {rank} of {setup.gpus} · {layouts}"
    table = results.counts_table(found, setup.gpus_per_node, title)
    shares = share_of_rank_0(traffic(setup))
    table.caption = results.shares_line(shares)
    return table, {
        "collectives": [vars(collective) for collective in found],
        "share of rank 0": shares,
    }


def saturate(arguments):
    """Show a step's phases at several numbers of GPUs, and what stops scaling."""
    from benchmarks.scaling.saturate import as_json, sizes

    found = sizes(
        _config(arguments),
        sorted(arguments.gpus),
        arguments.grow,
        load_cluster(arguments.cluster),
        arguments.gpus_per_server,
        arguments.host_seconds,
        **_lengths(arguments),
    )
    batch = "the batch grows with the GPUs" if arguments.grow else "one batch for all"
    title = f"A step by arithmetic, {batch} · {arguments.cluster}"
    return results.sizes_table(found, title), as_json(found)


def measure(arguments):
    """Count calls and bytes of a real step on a fake group of 64 ranks, next to the formulas."""
    from benchmarks.scaling.fake import LAYOUTS, record_cases

    found = record_cases(LAYOUTS)
    return results.measured_table(found), found


def host(arguments):
    """Time what a rank's host does for a batch, and its memory; next to what it once did."""
    from benchmarks.scaling.host import BEFORE, BEFORE_PARTS, measure_host

    found = [
        measure_host(n, arguments.response, 64, arguments.tp) for n in sorted(arguments.sequences)
    ]
    tables = results.host_table(found), results.before_table(BEFORE_PARTS, BEFORE)
    return Group(*tables), found


def ranks(arguments):
    """Run a real step on gloo ranks (under torchrun): CPU and wall seconds by phase."""
    from benchmarks.scaling.ranks import measure_ranks

    found = measure_ranks(arguments.tp, arguments.sequences, arguments.steps)
    return (None, None) if found is None else (results.ranks_table(found), found)


if __name__ == "__main__":
    sys.exit(main())
