"""Memory and time of a run on GPUs that need not be there: know before you queue.

    taopd plan CONFIG.yaml --gpus 64 --cluster h800
    taopd plan CONFIG.yaml student.parallel.tp=4 --gpus 64 --propose --json plan.json

Reads the configuration and both models' config.json, nothing else: no weights, tokenizer, data or
GPU. Exit status 0: fits, 1: does not, 2: a mistake in the configuration. docs/plan.md says what is
counted and how well it agrees with what is there.
"""

from __future__ import annotations

import argparse

from megatron_taopd import config as configuration
from megatron_taopd.cli import common
from megatron_taopd.config.values import check_sections
from megatron_taopd.plan.cluster import CLUSTERS, load_cluster
from megatron_taopd.preflight.models import with_model_directories


def main(arguments: list[str]) -> int:
    """Plan a run; the exit status is 0 if it fits, 1 if not."""
    return common.run(work, parse(arguments))


def parse(arguments: list[str]) -> argparse.Namespace:
    """Read the arguments, overrides among options."""
    parser = common.Parser(prog="taopd plan", description=__doc__)
    parser.add_argument("config", help="CONFIG.yaml")
    parser.add_argument("overrides", nargs="*", help="section.key=value")
    parser.add_argument("--gpus", type=int, required=True, help="that train: one rank each")
    parser.add_argument("--gpus-per-node", type=int, default=8)
    parser.add_argument("--cluster", default="h800", help=f"{', '.join(CLUSTERS)} or a YAML file")
    parser.add_argument("--prompt-tokens", type=int, help="of the average; default: the most")
    parser.add_argument("--response-tokens", type=int, help="of the average; default: the most")
    parser.add_argument("--trained-share", type=float, default=1.0, help="of tokens, after cuts")
    parser.add_argument("--propose", action="store_true", help="rank layouts that fit")
    common.add_json(parser)
    return parser.parse_intermixed_args(arguments)


def work(arguments: argparse.Namespace) -> int:
    """Print memory and time by phase, and what does not fit."""
    if not 0 < arguments.trained_share <= 1:
        raise ValueError(f"--trained-share: {arguments.trained_share}; it has to be in (0, 1]")
    cluster = load_cluster(arguments.cluster)
    config = configuration.load(arguments.config, arguments.overrides)
    check_sections(config)
    if arguments.propose and config.teachers:
        raise ValueError(
            "--propose: it varies the layout of one teacher, and there are teachers: "
            f"{', '.join(config.teachers)}; plan without it, or with one of them"
        )
    config = with_model_directories(config, weights=False)
    # They take seconds to import, for which a mistake above does not wait.
    from megatron_taopd.formats.hf import load_config
    from megatron_taopd.plan.memory import GIB, peak
    from megatron_taopd.plan.propose import proposals
    from megatron_taopd.plan.results import Plan, as_json, tables
    from megatron_taopd.plan.setup import Setup

    setup = Setup.of(
        config,
        arguments.gpus,
        arguments.gpus_per_node,
        arguments.prompt_tokens,
        arguments.response_tokens,
        arguments.trained_share,
    )
    plan, proposed = Plan.of(setup, cluster), []
    if arguments.propose:
        teacher = load_config(config.teacher.path) if setup.teacher_grid else None
        proposed = proposals(setup, cluster, load_config(config.student.path), teacher)

    console = common.open_console()
    for table in tables(plan, proposed):
        console.print(table)
    extra = ", ".join(f"{item} {n / GIB:.1f}" for item, n in plan.last_stage_extra().items())
    console.print(f"The last stage of the student holds, beside what all do (GiB): {extra}.")
    host = ", ".join(f"{item} {n / GIB:.1f}" for item, n in plan.host().items())
    console.print(
        f"In the memory of the hosts, a rank holds at most (GiB): {host}; the ranks of a node "
        f"{plan.node_host() / GIB:.1f}."
    )
    for line in plan.problems():
        console.print(f"does not fit: {line}", style="red")
    console.print(f"devices: {setup.devices}", highlight=False)
    phase, size = peak(plan.memory[plan.worst])
    console.print(
        f"{'does not fit' if plan.problems() else 'fits'}: at most {size / GIB:.1f} of "
        f"{plan.usable / GIB:.1f} GiB, in {phase}. Estimates from arithmetic: nothing was run."
    )
    if arguments.propose and not proposed:
        console.print("no layout fits: more GPUs, a smaller batch or rollout.engine: sglang")
    common.write_json(arguments.json, as_json(plan, proposed))
    return 1 if plan.problems() else 0
